"""ksync-server: calendars, contacts, files and mail, synchronised behind one door."""

__version__ = "0.1.0"
