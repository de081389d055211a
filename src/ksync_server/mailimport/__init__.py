"""Moves a mailbox from any IMAP server into another one, or into a Maildir, with proof at the end.

orders     what people ask for, one mailbox or a CSV file of them; letters tell them what became of it
plan       which folders go where, how much it is, whether there is room
passes     the job: connects, runs a pass, pauses, reports
walking    the source's side of a pass, ahead of the other; reading fetches bodies
importer   the destination's side: place, label, flag, prove; targets knows what is there already
ledger     rows, counters and lease in one transaction; records has the rows
connection one IMAP connection; source reads through it, imap_sink writes through it
sinks      what a destination must do; maildir_sink is one without a server
"""
