"""SEARCH: enough of its keys for a client that looks for what it knows."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from conformance.imap_server import syntax
from conformance.imap_server.accounts import Mail
from conformance.imap_server.fetching import _part
from conformance.imap_server.syntax import Cursor, Malformed, Refused

if TYPE_CHECKING:
    from conformance.imap_server.session import Session

Test = Callable[[int, Mail], bool]  # UID and mail
_FLAGS = {"SEEN", "ANSWERED", "FLAGGED", "DELETED", "DRAFT"}


def _header(name: bytes, value: bytes) -> Test:
    field = re.compile(
        rb"^" + re.escape(name) + rb":((?:[^\n]*\n)(?:[ \t][^\n]*\n)*)", re.IGNORECASE | re.MULTILINE
    )
    return lambda _, mail: any(
        value.lower() in found.lower() for found in field.findall(_part("HEADER", mail.body))
    )


def _has(flag: str) -> Test:
    return lambda _, mail: flag in mail.flags


def _not(test: Test) -> Test:
    return lambda uid, mail: not test(uid, mail)


def _dated(compare: Callable[[datetime.date, datetime.date], bool], day: datetime.date) -> Test:
    return lambda _, mail: compare(mail.internal_date.date(), day)


class _Keys:
    def __init__(self, session: Session, cursor: Cursor) -> None:
        self._session = session
        self._cursor = cursor

    def all_of(self) -> Test:
        tests = [self.one()]
        while self._cursor.take(b" "):
            tests.append(self.one())
        return lambda uid, mail: all(test(uid, mail) for test in tests)

    def _argument(self) -> Cursor:
        self._cursor.space()
        return self._cursor

    def one(self) -> Test:
        cursor = self._cursor
        if cursor.take(b"("):
            inner = self.all_of()
            cursor.expect(b")")
            return inner
        if cursor.peek(b"*") or re.match(rb"\d", cursor.rest()):
            numbers = {uid for _, uid in self._session.chosen(cursor, by_uid=False)}
            return lambda uid, _: uid in numbers
        key = cursor.word()
        if key == "ALL":
            return lambda _uid, _mail: True
        if key in _FLAGS:
            return _has("\\" + key.capitalize())
        if key.startswith("UN") and key[2:] in _FLAGS:
            return _not(_has("\\" + key[2:].capitalize()))
        return self._with_argument(key)

    def _with_argument(self, key: str) -> Test:
        cursor = self._argument()
        if key == "NOT":
            return _not(self.one())
        if key == "OR":
            first = self.one()
            cursor.space()
            second = self.one()
            return lambda uid, mail: first(uid, mail) or second(uid, mail)
        if key == "UID":
            numbers = {uid for _, uid in self._session.chosen(cursor, by_uid=True)}
            return lambda uid, _: uid in numbers
        if key == "HEADER":
            name = cursor.astring()
            cursor.space()
            return _header(name, cursor.astring())
        if key in ("SUBJECT", "FROM", "TO", "CC"):
            return _header(key.encode(), cursor.astring())
        if key in ("KEYWORD", "UNKEYWORD"):
            has = _has(cursor.flag())
            return has if key == "KEYWORD" else _not(has)
        if key in ("LARGER", "SMALLER"):
            size = cursor.number()
            return lambda _, mail: len(mail.body) > size if key == "LARGER" else len(mail.body) < size
        if key in ("SINCE", "BEFORE", "ON"):
            day = cursor.date()
            compare = {
                "SINCE": datetime.date.__ge__,
                "BEFORE": datetime.date.__lt__,
                "ON": datetime.date.__eq__,
            }
            return _dated(compare[key], day)
        if key == "MODSEQ":
            self._session.need("CONDSTORE")
            least = cursor.number()
            return lambda _, mail: mail.modseq >= least
        if key == "X-GM-MSGID":
            self._session.need("X-GM-EXT-1")
            wanted = cursor.number()
            return lambda _, mail: mail.gm_msgid == wanted
        raise Malformed(f"SEARCH {key} is not known here")


async def search(session: Session, cursor: Cursor) -> str:
    """SEARCH by sequence numbers."""
    return await _search(session, cursor, by_uid=False)


async def uid_search(session: Session, cursor: Cursor) -> str:
    """UID SEARCH."""
    return await _search(session, cursor, by_uid=True)


async def _search(session: Session, cursor: Cursor, *, by_uid: bool) -> str:
    """Answer SEARCH or UID SEARCH, with RETURN in the ESEARCH form (RFC 4731)."""
    cursor.space()
    options: list[str] | None = None
    if cursor.take(b"RETURN "):
        session.need("ESEARCH")
        options = cursor.listed(cursor.word, empty=True) or ["ALL"]
        if set(options) - {"ALL", "COUNT", "MIN", "MAX"}:
            raise Malformed("an unknown option of SEARCH RETURN")
        cursor.space()
    if cursor.take(b"CHARSET "):
        if cursor.astring().upper() not in (b"UTF-8", b"US-ASCII"):
            raise Refused("[BADCHARSET (UTF-8)] unknown")
        cursor.space()
    test = _Keys(session, cursor).all_of()
    cursor.end()
    selected = session.selected
    assert selected
    hits = [
        uid if by_uid else number
        for number, uid in enumerate(selected.uids, 1)
        if (mail := selected.folder.entries.get(uid)) and test(uid, mail)
    ]
    if options is None:
        await session.untagged(" ".join(["SEARCH", *map(str, hits)]))
        return ""
    values = {
        "ALL": syntax.compact(hits) if hits else None,
        "COUNT": len(hits),
        "MIN": hits[0] if hits else None,
        "MAX": hits[-1] if hits else None,
    }
    found = [f"{option} {values[option]}" for option in options if values[option] is not None]
    tag = session.tag.decode("ascii", "replace")
    await session.untagged(" ".join([f'ESEARCH (TAG "{tag}")', *(["UID"] if by_uid else []), *found]))
    return ""
