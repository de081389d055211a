"""Measurements with a bar, against our peers in the same run on the same machine."""
