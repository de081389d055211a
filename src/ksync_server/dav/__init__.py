"""Calendars, tasks and contacts: the sync host."""
