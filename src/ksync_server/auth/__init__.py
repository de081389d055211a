"""The door: who is it, and may they do that."""
