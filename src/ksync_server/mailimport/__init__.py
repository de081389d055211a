"""Moves a mailbox from any IMAP server into another one, or into a Maildir, with proof at the end.

plan       which folders go where, how much it is, whether there is room
connection one IMAP connection; source reads through it, sinks.imap writes through it
importer   copy, verify, report: the one place that knows the order of things
records    what is copied, in rows: what a crash leaves is found again there
"""
