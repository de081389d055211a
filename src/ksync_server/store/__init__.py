"""Rows and bytes: the only state the processes share."""
