"""Files: the drive hosts."""
