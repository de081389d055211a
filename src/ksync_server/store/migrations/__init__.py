"""Alembic environment and revisions: forward only, on both databases."""
