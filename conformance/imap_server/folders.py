"""Commands about folders: LIST in its forms, STATUS, SELECT, and their making."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conformance.imap_server import syntax
from conformance.imap_server.accounts import SPECIAL_USES, Folder, decoded, matcher, usage
from conformance.imap_server.syntax import Cursor, Malformed, Refused

if TYPE_CHECKING:
    from conformance.imap_server.session import Session


async def namespace(session: Session, cursor: Cursor) -> str:
    """NAMESPACE: one, personal."""
    session.need("NAMESPACE")
    cursor.end()
    prefix = syntax.string(syntax.to_utf7(session.mine.prefix)).decode()
    await session.untagged(f"NAMESPACE (({prefix} {_separator(session).decode()})) NIL NIL")
    return ""


def _separator(session: Session) -> bytes:
    separator = session.mine.separator
    return syntax.string(separator.encode()) if separator else b"NIL"


def _find(session: Session, cursor: Cursor, problem: str = "[NONEXISTENT] no such mailbox") -> Folder:
    folder = session.mine.find(cursor.mailbox(), utf8=session.utf8)
    if not folder:
        raise Refused(problem)
    return folder


def _wire_name(session: Session, folder: Folder) -> bytes:
    if folder.wire_name is not None:
        return b"{%d}\r\n%s" % (len(folder.wire_name), folder.wire_name)
    if session.utf8:
        name = folder.name.encode("utf-8", "replace")
        if not re.search(rb"[\x00\r\n]", name):
            return b'"' + re.sub(rb'(["\\])', rb"\\\1", name) + b'"'
    name = syntax.to_utf7(folder.name)
    if session.server.order.literal_names:
        return b"{%d}\r\n%s" % (len(name), name)
    if session.server.order.bare_names and re.fullmatch(rb"[\w&,./+-]+", name) and name.upper() != b"NIL":
        return name
    return syntax.string(name)


def _attributes(session: Session, folder: Folder, parents: set[str], special: bool) -> set[str]:
    attributes = {a for a in folder.attributes if special or a not in SPECIAL_USES}
    if session.has("CHILDREN"):
        attributes.add("\\HasChildren" if folder.name in parents else "\\HasNoChildren")
    return attributes


def _parents(names: Iterable[str], separator: str | None) -> set[str]:
    """The names that have a level below them."""
    found: set[str] = set()
    for name in names:
        while separator and separator in name:
            name = name.rpartition(separator)[0]
            found.add(name)
    return found


async def list_(session: Session, cursor: Cursor) -> str:
    """LIST, plain and extended."""
    cursor.space()
    selection: list[str] = []
    if cursor.peek(b"("):
        session.need("LIST-EXTENDED")
        selection = cursor.listed(cursor.word, empty=True)
        cursor.space()
    reference = cursor.mailbox()
    cursor.space()
    if cursor.peek(b"("):
        session.need("LIST-EXTENDED")
        patterns = cursor.listed(cursor.pattern)
    else:
        patterns = [cursor.pattern()]
    returned: list[str] = []
    status: list[str] = []
    if cursor.take(b" RETURN "):
        if not session.has("LIST-STATUS"):
            session.need("LIST-EXTENDED")
        returned, status = _return_options(session, cursor)
    cursor.end()
    unknown = set(selection) - {"SUBSCRIBED", "REMOTE", "RECURSIVEMATCH", "SPECIAL-USE"}
    unknown |= set(returned) - {"SUBSCRIBED", "CHILDREN", "SPECIAL-USE", "STATUS"}
    if "SPECIAL-USE" in [*selection, *returned]:
        session.need("SPECIAL-USE")
    if unknown:
        raise Malformed(f"LIST with {' '.join(sorted(unknown))}")
    if patterns == [b""]:
        await session.untagged(b'LIST (\\Noselect) %s ""' % _separator(session))
        return ""
    special = session.has("SPECIAL-USE") and (not returned or "SPECIAL-USE" in returned or bool(selection))
    parents = _parents(session.mine.folders, session.mine.separator)
    for folder in _matching(session, reference, patterns):
        if "SUBSCRIBED" in selection and not folder.subscribed:
            continue
        if "SPECIAL-USE" in selection and not folder.attributes & set(SPECIAL_USES):
            continue
        attributes = _attributes(session, folder, parents, special)
        if folder.subscribed and "SUBSCRIBED" in [*selection, *returned]:
            attributes.add("\\Subscribed")
        listed = " ".join(sorted(attributes)).encode()
        await session.untagged(
            b"LIST (%s) %s %s" % (listed, _separator(session), _wire_name(session, folder))
        )
        if status and folder.selectable:
            await _status_of(session, folder, status)
    return ""


def _return_options(session: Session, cursor: Cursor) -> tuple[list[str], list[str]]:
    status: list[str] = []

    def option() -> str:
        name = cursor.word()
        if name == "STATUS":
            session.need("LIST-STATUS")
            cursor.space()
            status.extend(cursor.listed(lambda: _status_item(session, cursor)))
        return name

    return cursor.listed(option, empty=True), status


def _matching(session: Session, reference: bytes, patterns: Iterable[bytes]) -> list[Folder]:
    separator = session.mine.separator
    tests = [matcher(decoded(reference + pattern, utf8=session.utf8), separator) for pattern in patterns]
    return [
        folder for folder in list(session.mine.folders.values()) if any(test(folder.name) for test in tests)
    ]


async def lsub(session: Session, cursor: Cursor) -> str:
    """LSUB."""
    cursor.space()
    reference = cursor.mailbox()
    cursor.space()
    pattern = cursor.pattern()
    cursor.end()
    for folder in _matching(session, reference, [pattern]):
        if folder.subscribed:
            await session.untagged(b"LSUB () %s %s" % (_separator(session), _wire_name(session, folder)))
    return ""


def _status_item(session: Session, cursor: Cursor) -> str:
    item = cursor.word()
    if item == "SIZE":
        session.need("STATUS=SIZE")
    elif item == "HIGHESTMODSEQ":
        session.need("CONDSTORE")
    elif item == "APPENDLIMIT":
        session.need("APPENDLIMIT")
    elif item not in ("MESSAGES", "RECENT", "UIDNEXT", "UIDVALIDITY", "UNSEEN"):
        raise Malformed(f"STATUS has no {item}")
    return item


async def status(session: Session, cursor: Cursor) -> str:
    """STATUS."""
    cursor.space()
    folder = _find(session, cursor)
    cursor.space()
    items = cursor.listed(lambda: _status_item(session, cursor))
    cursor.end()
    if not folder.selectable:
        raise Refused("[CANNOT] not selectable")
    await _status_of(session, folder, items)
    return ""


async def _status_of(session: Session, folder: Folder, items: Iterable[str]) -> None:
    count, size = usage(folder)
    limit = session.server.append_limit
    values = {
        "MESSAGES": count,
        "RECENT": 0,
        "UIDNEXT": folder.uid_next,
        "UIDVALIDITY": folder.uid_validity,
        "UNSEEN": sum("\\Seen" not in mail.flags for mail in folder.entries.values()),
        "SIZE": size,
        "HIGHESTMODSEQ": folder.highest_modseq if folder.has_modseq else 0,
        "APPENDLIMIT": "NIL" if limit is None else limit,
    }
    if "HIGHESTMODSEQ" in items:
        session.enabled.add("CONDSTORE")
    pairs = " ".join(f"{item} {values[item]}" for item in items)
    await session.untagged(b"STATUS %s (%s)" % (_wire_name(session, folder), pairs.encode()))


async def select(session: Session, cursor: Cursor) -> str:
    """SELECT."""
    return await _open(session, cursor, read_only=False)


async def examine(session: Session, cursor: Cursor) -> str:
    """EXAMINE."""
    return await _open(session, cursor, read_only=True)


async def _open(session: Session, cursor: Cursor, *, read_only: bool) -> str:
    if session.selected and session.enabled & {"CONDSTORE", "QRESYNC"}:
        await session.untagged("OK [CLOSED] the folder before")  # RFC 7162 §3.2.11
    session.selected = None
    cursor.space()
    folder = _find(session, cursor)
    known = None
    if cursor.take(b" (CONDSTORE)"):
        session.need("CONDSTORE")
        session.enabled.add("CONDSTORE")
    elif cursor.take(b" (QRESYNC "):
        known = _known(session, cursor)
        cursor.expect(b")")
    cursor.end()
    if not folder.selectable:
        raise Refused("[CANNOT] not selectable")
    uids = list(folder.entries)
    keywords = {f for m in folder.entries.values() for f in m.flags if not f.startswith("\\")}
    flags = [*syntax.SYSTEM_FLAGS, *sorted(keywords | session.server.known_keywords)]
    permanent = [] if read_only else flags + (["\\*"] if session.server.keywords == "any" else [])
    await session.untagged(f"FLAGS ({' '.join(flags)})")
    await session.untagged(f"OK [PERMANENTFLAGS ({' '.join(permanent)})] kept")
    await session.untagged(f"{len(uids)} EXISTS")
    await session.untagged(f"{len(uids) if session.server.order.recent else 0} RECENT")
    unseen = next((n for n, m in enumerate(folder.entries.values(), 1) if "\\Seen" not in m.flags), None)
    if unseen:
        await session.untagged(f"OK [UNSEEN {unseen}] first")
    await session.untagged(f"OK [UIDVALIDITY {folder.uid_validity}] valid")
    await session.untagged(f"OK [UIDNEXT {folder.uid_next}] next")
    if session.has("CONDSTORE"):
        highest = f"OK [HIGHESTMODSEQ {folder.highest_modseq}] highest"
        await session.untagged(highest if folder.has_modseq else "OK [NOMODSEQ] none")
    session.open(folder, read_only=read_only)
    if known and folder.has_modseq and known.uid_validity == folder.uid_validity:
        await session.tell_vanished(folder, known.modseq, known.uids)
        for number, uid in enumerate(uids, 1):
            mail = folder.entries[uid]
            if mail.modseq > known.modseq and (known.uids is None or syntax.members(known.uids, [uid])):
                await session.untagged(f"{number} FETCH ({session.flag_items(uid, mail)})")
    return f"[{'READ-ONLY' if read_only else 'READ-WRITE'}] opened"


@dataclass(frozen=True, slots=True)
class _Known:
    """What a client with QRESYNC remembers of a folder (RFC 7162 §3.2.5)."""

    uid_validity: int
    modseq: int
    uids: list[syntax.Range] | None


def _known(session: Session, cursor: Cursor) -> _Known:
    session.need("QRESYNC")
    if "QRESYNC" not in session.enabled:
        raise Malformed("SELECT with QRESYNC before ENABLE")
    cursor.expect(b"(")
    uid_validity = cursor.number()
    cursor.space()
    modseq = cursor.number()
    uids = None
    if not cursor.peek(b" (") and cursor.take(b" "):
        uids = cursor.sequence_set()
    if cursor.take(b" ("):  # pairs of numbers and UIDs, which we need not use
        cursor.sequence_set()
        cursor.space()
        cursor.sequence_set()
        cursor.expect(b")")
    cursor.expect(b")")
    return _Known(uid_validity, modseq, uids)


async def create(session: Session, cursor: Cursor) -> str:
    """CREATE, with USE (RFC 6154)."""
    cursor.space()
    wire_name = cursor.mailbox()
    uses: list[str] = []
    if cursor.take(b" (USE "):
        session.need("CREATE-SPECIAL-USE")
        uses = cursor.listed(cursor.special_use)
        cursor.expect(b")")
    cursor.end()
    name = decoded(wire_name, utf8=session.utf8)
    account = session.mine
    if account.separator:
        name = name.removesuffix(account.separator)
    if not name or not name.startswith(account.prefix):
        raise Refused(f"[CANNOT] a name begins with {account.prefix}")
    if name in account.folders:
        raise Refused("[ALREADYEXISTS] there is one")
    if any(set(uses) & folder.attributes for folder in account.folders.values()):
        raise Refused("[USEATTR] there is one for this use")
    account.create(name, *uses).subscribed = False
    return ""


async def delete(session: Session, cursor: Cursor) -> str:
    """DELETE."""
    cursor.space()
    folder = _find(session, cursor)
    cursor.end()
    if folder.name == "INBOX" or folder.attributes & {"\\Noselect"}:
        raise Refused("[CANNOT] not this one")
    session.mine.delete(folder.name)
    return ""


async def subscribe(session: Session, cursor: Cursor) -> str:
    """SUBSCRIBE."""
    return _subscribe(session, cursor, True)


async def unsubscribe(session: Session, cursor: Cursor) -> str:
    """UNSUBSCRIBE."""
    return _subscribe(session, cursor, False)


def _subscribe(session: Session, cursor: Cursor, wanted: bool) -> str:
    cursor.space()
    folder = _find(session, cursor)
    cursor.end()
    folder.subscribed = wanted
    return ""


async def getquotaroot(session: Session, cursor: Cursor) -> str:
    """GETQUOTAROOT: one root for all."""
    session.need("QUOTA")
    cursor.space()
    folder = _find(session, cursor)
    cursor.end()
    await session.untagged(b'QUOTAROOT %s ""' % _wire_name(session, folder))
    await _quota(session)
    return ""


async def getquota(session: Session, cursor: Cursor) -> str:
    """GETQUOTA."""
    session.need("QUOTA")
    cursor.space()
    if cursor.astring() != b"":
        raise Refused("[NONEXISTENT] no such quota root")
    cursor.end()
    await _quota(session)
    return ""


async def _quota(session: Session) -> None:
    limit = session.mine.quota_bytes
    used = -(-session.mine.used_bytes // 1024)
    await session.untagged('QUOTA "" ()' if limit is None else f'QUOTA "" (STORAGE {used} {limit // 1024})')
