"""FETCH: its items, the order in which they are answered, and the faults of single messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conformance.imap_server import syntax
from conformance.imap_server.accounts import Folder, Mail
from conformance.imap_server.syntax import Cursor, Malformed, Refused

if TYPE_CHECKING:
    from conformance.imap_server.session import Session

_SIMPLE = {"UID", "FLAGS", "INTERNALDATE", "RFC822.SIZE"}
_FAST = ["FLAGS", "INTERNALDATE", "RFC822.SIZE"]
_FIELDS = re.compile(r"HEADER\.FIELDS(\.NOT)? \(([^()]+)\)")


@dataclass(frozen=True, slots=True)
class Section:
    """BODY[...]: which part, and which bytes of it."""

    text: str  # in capitals, as answered
    peek: bool
    partial: tuple[int, int] | None

    def cut(self, body: bytes) -> bytes:
        """The bytes asked for."""
        data = _part(self.text, body)
        return data[self.partial[0] : sum(self.partial)] if self.partial else data

    def label(self) -> bytes:
        """What stands before the bytes in the answer."""
        origin = f"<{self.partial[0]}>" if self.partial else ""
        return f"BODY[{self.text}]{origin}".encode()


Wanted = str | Section


def _part(section: str, body: bytes) -> bytes:
    if not section:
        return body
    found = re.search(rb"\r?\n\r?\n", body)
    header, text = (body[: found.end()], body[found.end() :]) if found else (body, b"")
    if section == "HEADER":
        return header
    if section == "TEXT":
        return text
    fields = _FIELDS.fullmatch(section)
    assert fields
    names = {name.strip('"').upper().encode() for name in fields[2].split(" ")}
    lines = re.findall(rb"[^\n]*\n(?:[ \t][^\n]*\n)*", header.rstrip(b"\r\n") + b"\r\n")
    chosen = [line for line in lines if (line.split(b":")[0].strip().upper() in names) != bool(fields[1])]
    return b"".join(chosen) + b"\r\n"


def _wanted(session: Session, cursor: Cursor) -> list[Wanted]:
    def one() -> Wanted:
        name = cursor.item()
        if name in ("BODY", "BODY.PEEK") and cursor.peek(b"["):
            text = cursor.section().decode("ascii", "replace").upper()
            if text not in ("", "HEADER", "TEXT") and not _FIELDS.fullmatch(text):
                raise Malformed(f"BODY[{text}] is not known here")
            return Section(text, name == "BODY.PEEK", cursor.partial())
        if name == "MODSEQ":
            session.need("CONDSTORE")
        elif name in ("X-GM-MSGID", "X-GM-THRID", "X-GM-LABELS"):
            session.need("X-GM-EXT-1")
        elif name not in _SIMPLE:
            raise Malformed(f"FETCH of {name} is not known here")
        return name

    if cursor.peek(b"("):
        return cursor.listed(one)
    if cursor.take(b"FAST"):
        return list(_FAST)
    return [one()]


async def fetch(session: Session, cursor: Cursor) -> str:
    """FETCH by sequence numbers."""
    return await _fetch(session, cursor, by_uid=False)


async def uid_fetch(session: Session, cursor: Cursor) -> str:
    """UID FETCH."""
    return await _fetch(session, cursor, by_uid=True)


async def _fetch(session: Session, cursor: Cursor, *, by_uid: bool) -> str:
    """Answer FETCH or UID FETCH; a message that is gone is left out (RFC 9051 §6.4.9)."""
    command = "UID FETCH" if by_uid else "FETCH"
    cursor.space()
    chosen, ranges = session.chosen(cursor, by_uid=by_uid), cursor.ranges
    cursor.space()
    wanted = _wanted(session, cursor)
    since, vanished = None, False
    if cursor.take(b" (CHANGEDSINCE "):
        session.need("CONDSTORE")
        since = cursor.number()
        vanished = cursor.take(b" VANISHED")
        cursor.expect(b")")
    cursor.end()
    selected = session.selected
    assert selected
    if len({item if isinstance(item, str) else item.label() for item in wanted}) < len(wanted):
        session.violation("an item asked for twice in one FETCH")
    if since is not None or "MODSEQ" in wanted:
        if not selected.folder.has_modseq:
            raise Malformed("MODSEQ of a mailbox with NOMODSEQ")
        session.enabled.add("CONDSTORE")
    if vanished and since is not None:
        if not by_uid or "QRESYNC" not in session.enabled:
            raise Malformed("VANISHED is for UID FETCH after ENABLE QRESYNC")
        await session.tell_vanished(selected.folder, since, ranges)
    if since is not None and "MODSEQ" not in wanted:
        wanted.append("MODSEQ")
    if by_uid and "UID" not in wanted:
        wanted.insert(0, "UID")
    if any(isinstance(item, Section) and not item.peek for item in wanted) and selected.read_only:
        session.violation("BODY[] without PEEK in a mailbox opened with EXAMINE")
    position = 0
    for number, uid in chosen:
        mail = selected.folder.entries.get(uid)
        if mail and since is not None and mail.modseq <= since:
            continue
        position += 1
        await session.disturb_message(command, position)
        mail = selected.folder.entries.get(uid)  # a rule may have removed it
        bodies = any(isinstance(item, Section) for item in wanted)
        if not mail or (mail.fault and mail.fault.body == "skip" and bodies):
            continue
        if mail.fault and mail.fault.body == "no" and bodies:
            raise Refused("[SERVERBUG] message could not be read")
        await _answer(session, number, uid, mail, wanted)
        await session.after_message()
    return ""


async def _answer(session: Session, number: int, uid: int, mail: Mail, wanted: list[Wanted]) -> None:
    selected = session.selected
    assert selected
    order = session.server.order
    items = list(wanted)
    if any(isinstance(item, Section) and not item.peek for item in items) and not selected.read_only:
        assert session.account
        if "\\Seen" not in mail.flags:
            session.account.set_flags(mail, mail.flags | {"\\Seen"})
            selected.modseq = mail.modseq
            if "FLAGS" not in items:
                items.append("FLAGS")
    if order.chatter:
        await session.untagged("OK still there")
        await session.untagged(f"{len(selected.uids)} EXISTS")
        other = selected.uids[number % len(selected.uids)]
        if shown := selected.folder.entries.get(other):
            place = number % len(selected.uids) + 1
            await session.untagged(f"{place} FETCH (FLAGS {session.flag_list(shown)})")
    if order.body_first:
        items.sort(key=lambda item: isinstance(item, str))
    if order.flags_apart and "FLAGS" in items and len(items) > 1:
        items.remove("FLAGS")
        await session.untagged(f"{number} FETCH (FLAGS {session.flag_list(mail)})")
    await session.wire.write(b"* %d FETCH (" % number)
    for place, item in enumerate(items):
        if place:
            await session.wire.write(b" ")
        if isinstance(item, Section):
            await _section(session, mail, item)
        else:
            await session.wire.write(_item(session, selected.folder, uid, mail, item))
    await session.wire.write(b")\r\n")


async def _section(session: Session, mail: Mail, section: Section) -> None:
    await session.wire.write(section.label() + b" ")
    if mail.fault and mail.fault.body == "nil":
        await session.wire.write(b"NIL")
        return
    data = section.cut(mail.body)
    lie = mail.fault.literal_lie if mail.fault else 0
    await session.wire.write(b"{%d}\r\n" % (len(data) + lie))
    if section.text:
        await session.wire.write(data)
        return
    if not section.partial or section.partial[0] == 0:
        session.server.statistics.body_fetches[mail.gm_msgid] += 1
    await session.body(data)


def _item(session: Session, folder: Folder, uid: int, mail: Mail, item: str) -> bytes:
    makers: dict[str, Callable[[], str]] = {
        "UID": lambda: str(uid),
        "FLAGS": lambda: session.flag_list(mail),
        "INTERNALDATE": lambda: syntax.date_time(mail.internal_date),
        "RFC822.SIZE": lambda: str(_size(mail)),
        "MODSEQ": lambda: f"({mail.modseq})",
        "X-GM-MSGID": lambda: str(mail.gm_msgid),
        "X-GM-THRID": lambda: str(mail.gm_thrid),
    }
    if item == "X-GM-LABELS":
        assert session.account
        labels = session.account.labels_seen_from(folder, mail)
        return b"X-GM-LABELS (%s)" % b" ".join(_label(label, mail) for label in labels)
    return f"{item} {makers[item]()}".encode()


def _size(mail: Mail) -> int:
    claimed = mail.fault.claimed_bytes if mail.fault else None
    return len(mail.body) if claimed is None else claimed


def _label(label: str, mail: Mail) -> bytes:
    r"""A label as Gmail writes it: mostly `"\\Inbox"`, now and then `\Inbox` or with the backslash doubled."""
    if label.startswith("\\"):
        if mail.gm_msgid % 5 == 0:
            return label.encode()
        if mail.gm_msgid % 7 == 0:
            return syntax.string(b"\\" + label.encode())
        return syntax.string(label.encode())
    name = syntax.to_utf7(label)
    return (
        name if re.fullmatch(rb"[A-Za-z0-9&,+-]+", name) and name.upper() != b"NIL" else syntax.string(name)
    )
