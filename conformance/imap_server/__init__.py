"""A small, strict IMAP server to hold a mail importer against; it shares no line with what it judges.

    account = Account(separator=".", prefix="INBOX.")
    account.add("INBOX.Work", b"Subject: hello\\r\\n\\r\\n", flags={"\\\\Seen"})
    with serving(Server(account, rules=[Rule(Bye(), after_bytes=2_000_000, times=None)])) as port: ...

Content is read back as plain values (`server.folders["INBOX.Work"].messages`), what a client did wrong from
`server.violations`, and what it did at all from `server.statistics`. Standards: RFC 3501, 2177, 2342, 2971,
3348, 3502, 3691, 4315, 4731, 4959, 4978, 5161, 5258, 5819, 6154, 6851, 6855, 7162, 7888, 7889,
8438, 9208 and Gmail's X-GM-EXT-1.
"""

from conformance.imap_server.accounts import ENGLISH, GERMAN, Account, Folder, GmailAccount, Mail, Message
from conformance.imap_server.faults import (
    Bad,
    Bye,
    Drop,
    Fault,
    No,
    Order,
    Pour,
    Rule,
    Run,
    Stall,
    refuse_8bit,
    refuse_any,
    refuse_bare_lf,
    refuse_keyword,
    refuse_larger,
    refuse_nul,
)
from conformance.imap_server.server import BASIC, GMAIL, MODERN, Login, Server, Statistics, serving

__all__ = [
    "BASIC",
    "ENGLISH",
    "GERMAN",
    "GMAIL",
    "MODERN",
    "Account",
    "Bad",
    "Bye",
    "Drop",
    "Fault",
    "Folder",
    "GmailAccount",
    "Login",
    "Mail",
    "Message",
    "No",
    "Order",
    "Pour",
    "Rule",
    "Run",
    "Server",
    "Stall",
    "Statistics",
    "refuse_8bit",
    "refuse_any",
    "refuse_bare_lf",
    "refuse_keyword",
    "refuse_larger",
    "refuse_nul",
    "serving",
]
