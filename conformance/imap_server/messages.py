"""Commands that bring, change, copy and remove messages."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from conformance.imap_server import syntax
from conformance.imap_server.accounts import NOW, Folder, Mail
from conformance.imap_server.syntax import Cursor, Malformed, Refused

if TYPE_CHECKING:
    from conformance.imap_server.session import Session


async def append(session: Session, cursor: Cursor) -> str:
    """APPEND of one or, with MULTIAPPEND, several messages: all or none."""
    cursor.space()
    wire_name = cursor.mailbox()
    uploads: list[Mail] = []
    while not cursor.at_end():
        if uploads:
            session.need("MULTIAPPEND")
        cursor.space()
        flags: frozenset[str] = frozenset()
        if cursor.peek(b"("):
            flags = cursor.flags()
            cursor.space()
        date = None
        if cursor.peek(b'"'):
            date = cursor.date_time()
            cursor.space()
        if cursor.take(b"UTF8 ("):
            session.need("UTF8=ACCEPT")
            if not session.utf8 or not cursor.peek(b"~"):
                raise Malformed("UTF8 (~{n}) needs ENABLE UTF8=ACCEPT")
            body = cursor.literal()
            cursor.expect(b")")
        else:
            if not cursor.peek(b"{"):
                raise Malformed("a message is a literal")
            body = cursor.literal()
        uploads.append(session.mine.new_mail(body, flags=flags, internal_date=date or NOW))
    if not uploads:
        raise Malformed("APPEND without a message")
    folder = session.mine.find(wire_name, utf8=session.utf8)
    if not folder or not folder.selectable:
        raise Refused("[TRYCREATE] no such mailbox")
    _check_uploads(session, uploads)
    uids = [session.mine.append(folder, mail) for mail in uploads]
    session.server.statistics.appends += len(uids)
    if not session.has("UIDPLUS"):
        return ""
    return f"[APPENDUID {folder.uid_validity} {syntax.compact(uids)}] stored"


def _check_uploads(session: Session, uploads: list[Mail]) -> None:
    """All or none; with MULTIAPPEND an empty message cancels the command (RFC 3502 §6.3.11)."""
    limit = session.server.append_limit
    if session.has("MULTIAPPEND") and not all(mail.body for mail in uploads):
        raise Refused("an empty message cancels APPEND")
    for mail in uploads:
        if limit is not None and len(mail.body) > limit:
            raise Refused(f"[TOOBIG] at most {limit} bytes")
        if session.server.refuse_append and (text := session.server.refuse_append(mail.body, mail.flags)):
            raise Refused(text)
        mail.flags = _permitted(session, mail.flags)
    if text := session.quota_refusal(sum(len(mail.body) for mail in uploads)):
        raise Refused(text)


def _permitted(session: Session, flags: frozenset[str]) -> frozenset[str]:
    foreign = {flag for flag in flags if not flag.startswith("\\")} - session.server.known_keywords
    if not foreign or session.server.keywords == "any":
        return flags
    if session.server.keywords == "refused":
        raise Refused(f"invalid keyword {sorted(foreign)[0]}")
    return flags - foreign


def _writable(session: Session) -> Folder:
    if session.opened.read_only:
        session.violation("a change of a mailbox opened with EXAMINE")
        raise Refused("[READ-ONLY] opened with EXAMINE")
    return session.opened.folder


async def check(session: Session, cursor: Cursor) -> str:
    """CHECK."""
    cursor.end()
    return ""


async def close(session: Session, cursor: Cursor) -> str:
    """CLOSE: expunges silently unless opened with EXAMINE."""
    cursor.end()
    selected = session.opened
    if not selected.read_only:
        for uid in _deleted(selected.folder):
            session.mine.expunge(selected.folder, uid)
    session.selected = None
    return ""


async def unselect(session: Session, cursor: Cursor) -> str:
    """UNSELECT."""
    session.need("UNSELECT")
    cursor.end()
    session.selected = None
    return ""


def _deleted(folder: Folder) -> list[int]:
    return [uid for uid, mail in list(folder.entries.items()) if "\\Deleted" in mail.flags]


async def expunge(session: Session, cursor: Cursor) -> str:
    """EXPUNGE."""
    cursor.end()
    folder = _writable(session)
    for uid in _deleted(folder):
        session.mine.expunge(folder, uid)
    return ""


async def uid_expunge(session: Session, cursor: Cursor) -> str:
    """UID EXPUNGE."""
    session.need("UIDPLUS")
    cursor.space()
    chosen = {uid for _, uid in session.chosen(cursor, by_uid=True)}
    cursor.end()
    folder = _writable(session)
    for uid in _deleted(folder):
        if uid in chosen:
            session.mine.expunge(folder, uid)
    return ""


async def store(session: Session, cursor: Cursor) -> str:
    """STORE by sequence numbers."""
    return await _store(session, cursor, by_uid=False)


async def uid_store(session: Session, cursor: Cursor) -> str:
    """UID STORE."""
    return await _store(session, cursor, by_uid=True)


async def _store(session: Session, cursor: Cursor, *, by_uid: bool) -> str:
    cursor.space()
    chosen = session.chosen(cursor, by_uid=by_uid)
    cursor.space()
    sign = (cursor.take(b"+") and "+") or (cursor.take(b"-") and "-") or ""
    item = cursor.word()
    if item not in ("FLAGS", "FLAGS.SILENT"):
        raise Malformed(f"STORE of {item}")
    cursor.space()
    if cursor.peek(b"("):
        flags = cursor.flags()
    else:
        flags = frozenset({cursor.flag()})
        while cursor.take(b" "):
            flags |= {cursor.flag()}
    cursor.end()
    folder = _writable(session)
    flags = _permitted(session, flags)
    await session.tell(expunges=False)  # what others did first
    for number, uid in chosen:
        mail = folder.entries.get(uid)
        if not mail:
            continue
        wanted = {"+": mail.flags | flags, "-": mail.flags - flags, "": flags}[sign]
        session.mine.set_flags(mail, wanted)
        if item == "FLAGS":
            await session.untagged(f"{number} FETCH ({session.flag_items(uid, mail)})")
        elif "CONDSTORE" in session.enabled and folder.has_modseq:
            await session.untagged(f"{number} FETCH (UID {uid} MODSEQ ({mail.modseq}))")
    session.opened.modseq = folder.highest_modseq
    return ""


async def copy(session: Session, cursor: Cursor) -> str:
    """COPY by sequence numbers."""
    return await _copy(session, cursor, by_uid=False, move=False)


async def uid_copy(session: Session, cursor: Cursor) -> str:
    """UID COPY."""
    return await _copy(session, cursor, by_uid=True, move=False)


async def move(session: Session, cursor: Cursor) -> str:
    """MOVE by sequence numbers."""
    return await _copy(session, cursor, by_uid=False, move=True)


async def uid_move(session: Session, cursor: Cursor) -> str:
    """UID MOVE."""
    return await _copy(session, cursor, by_uid=True, move=True)


async def _copy(session: Session, cursor: Cursor, *, by_uid: bool, move: bool) -> str:
    if move:
        session.need("MOVE")
    cursor.space()
    chosen = session.chosen(cursor, by_uid=by_uid)
    cursor.space()
    wire_name = cursor.mailbox()
    cursor.end()
    source = _writable(session) if move else session.opened.folder
    target = session.mine.find(wire_name, utf8=session.utf8)
    if not target or not target.selectable:
        raise Refused("[TRYCREATE] no such mailbox")
    present = [(uid, source.entries[uid]) for _, uid in chosen if uid in source.entries]
    if not move and (text := session.quota_refusal(sum(len(mail.body) for _, mail in present))):
        raise Refused(text)
    pairs = [(uid, session.mine.copy(mail, target)) for uid, mail in present]
    code = ""
    if pairs and session.has("UIDPLUS"):
        sets = [syntax.compact(side) for side in zip(*pairs, strict=True)]
        code = f"[COPYUID {target.uid_validity} {sets[0]} {sets[1]}]"
    if not move:
        return f"{code} copied".strip()
    if code:
        await session.untagged(f"OK {code} moved")
    for uid, mail in present:
        if source.entries.get(uid) is mail:
            session.mine.expunge(source, uid)
    return ""


async def idle(session: Session, cursor: Cursor) -> str:
    """IDLE: tells changes until DONE."""
    session.need("IDLE")
    cursor.end()
    await session.wire.write(b"+ idling\r\n")
    await session.wire.flush()
    waiting = asyncio.create_task(session.wire.line())
    try:
        while not (await asyncio.wait({waiting}, timeout=0.05))[0]:
            await session.tell(expunges=True)
            await session.wire.flush()
    finally:
        waiting.cancel()
    if waiting.result().upper() != b"DONE\r\n":
        raise Malformed("IDLE ends with DONE")
    return ""
