"""Mailboxes of a server, filled and compared with the standard library alone: it shares no line with the importer."""

from __future__ import annotations

import hashlib
import imaplib
import re
import time
from collections import Counter
from collections.abc import Iterable

from conformance.imap_server import syntax
from conformance.mail_corpus import CorpusMail

imaplib._MAXLINE = 10_000_000

Found = Counter[tuple[str, bytes, float, frozenset[str]]]  # folder, SHA-256, date, flags and keywords

_FLAGS = re.compile(rb"FLAGS \(([^)]*)\)")
_LISTED = re.compile(rb'\((?P<attributes>[^)]*)\) (?:"[^"]*"|NIL) (?P<name>.*)')


def log_in(port: int, user: str, password: str) -> imaplib.IMAP4:
    """A connection without TLS to a server of this machine."""
    client = imaplib.IMAP4("127.0.0.1", port)
    client.login(user, password)
    return client


def fill(port: int, user: str, password: str, mails: Iterable[CorpusMail]) -> int:
    """Put a corpus into a mailbox whose separator is `/`.

    Returns:
        Its bytes.
    """
    client = log_in(port, user, password)
    made, size = {"INBOX"}, 0
    for mail in mails:
        name = syntax.to_utf7("/".join(mail.folder)).decode()
        if name not in made:
            client.create(f'"{name}"')
            made.add(name)
        date = imaplib.Time2Internaldate(mail.internal_date)
        status, said = client.append(f'"{name}"', f"({' '.join(sorted(mail.flags))})", date, mail.body)
        assert status == "OK", said
        size += len(mail.body)
    client.logout()
    return size


def content(port: int, user: str, password: str) -> Found:
    """Everything in a mailbox, each with how often it is there."""
    client = log_in(port, user, password)
    found: Found = Counter()
    for name in _names(client):
        quoted = name.replace(b"\\", b"\\\\").replace(b'"', b'\\"').decode()
        assert client.select(f'"{quoted}"', readonly=True)[0] == "OK", name
        _, data = client.uid("FETCH", "1:*", "(UID FLAGS INTERNALDATE BODY.PEEK[])")
        for each in data:
            if isinstance(each, tuple):
                flags, date = _FLAGS.search(each[0]), imaplib.Internaldate2tuple(each[0])
                assert flags, each[0]
                assert date, each[0]
                kept = frozenset(flags[1].decode().split()) - {"\\Recent"}
                digest = hashlib.sha256(each[1]).digest()
                found[(syntax.from_utf7(name), digest, time.mktime(date), kept)] += 1
    client.logout()
    return found


def _names(client: imaplib.IMAP4) -> list[bytes]:
    """Names of the folders that hold mail, as the wire has them."""
    found = []
    for line in client.list()[1]:
        if line is None:
            continue
        if isinstance(line, tuple):  # the name is a literal
            head, name = line
        else:
            head = line
            named = _LISTED.fullmatch(line)
            assert named, line
            name = named["name"]
            if name.startswith(b'"'):
                name = re.sub(rb"\\(.)", rb"\1", name[1:-1])
        if (
            isinstance(name, bytes)
            and b"\\noselect" not in head.lower()
            and b"\\nonexistent" not in head.lower()
        ):
            found.append(name)
    return found
