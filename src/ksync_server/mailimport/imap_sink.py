"""A destination behind IMAP: any server, ours included.

One connection. Messages go in batches where the server has MULTIAPPEND, else one by one. Where UIDPLUS says
which UIDs they got, the next are sent without waiting for the answer to the last; else that is asked for.
What is asked about a folder goes between the batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from ksync_server.errors import BadRequest, Temporary
from ksync_server.mailimport.connection import Connection
from ksync_server.mailimport.listening import Listener, Whole
from ksync_server.mailimport.servers import Refused, is_of_a_message, is_temporary, said
from ksync_server.mailimport.sinks import (
    Full,
    Held,
    Parcel,
    Place,
    Placed,
    Room,
    Seen,
    Stranger,
    Unmade,
    Unwanted,
    canonical,
)
from ksync_server.wire import imap
from ksync_server.wire.imap import Fetched

_FULL = frozenset({"OVERQUOTA"})
_FULL_WORDS = ("quota", "mailbox is full", "no space", "disk full")
_PIECE = 128 << 10  # read from a file and sent at once
_STATUS_AT_ONCE = 20
_AT_ONCE = 500  # messages of one COPY
_SYSTEM = frozenset({"\\Answered", "\\Deleted", "\\Draft", "\\Flagged", "\\Seen"})
_LOOK = "(UID FLAGS INTERNALDATE RFC822.SIZE)"
_WHOLE = "(UID BODY.PEEK[])"
_HELD = "(UIDVALIDITY UIDNEXT MESSAGES)"
_LIST = 'LIST "" "*"'


class ImapSink:
    """See `sinks.Sink`.

    Args:
        require_turn: raises LeaseLost where another worker may be at the same import by now; asked before the
            last byte of what adds messages, because the server keeps it once that is there.
    """

    def __init__(self, connection: Connection, require_turn: Callable[[], None] = lambda: None) -> None:
        self._connection = connection
        self._require_turn = require_turn
        self._selected = ""
        self._selecting = asyncio.Lock()  # of what is done in a selected folder
        self._permitted: dict[str, frozenset[str] | None] = {}  # keywords that a folder keeps; None = any
        self._asking = asyncio.Lock()  # about the state of a folder
        self._order = asyncio.Lock()  # of batches
        self._alone = asyncio.Lock()  # where UIDs are told by what is new in a folder
        self.separator = "/"
        self.prefix = ""
        self.longest: int | None = None
        for each in connection.capabilities:
            name, _, value = each.partition("=")
            if name == "APPENDLIMIT" and imap.is_number(value):
                self.longest = int(value)

    @property
    def commands(self) -> int:
        """See `Sink`."""
        return self._connection.commands

    @property
    def _says_uids(self) -> bool:
        return "UIDPLUS" in self._connection.capabilities

    def uid(self, handle: str) -> int:
        """See `Sink`."""
        return int(handle)

    def is_ours(self, handle: str, first_next: int) -> bool:
        """See `Sink`."""
        return int(handle) >= first_next

    async def begin(self) -> None:
        """Learn how names are made.

        Raises:
            RemoteError: the server failed.
        """
        connection = self._connection
        if "NAMESPACE" in connection.capabilities:
            with contextlib.suppress(Refused):
                for found in (await connection.ask("NAMESPACE")).named("NAMESPACE"):
                    personal = found.values[0] if found.values else None
                    if isinstance(personal, list) and personal and isinstance(personal[0], list):
                        self.prefix = connection.decoded(personal[0][0])
                        self.separator = connection.decoded(personal[0][1]) if personal[0][1] else ""
                        return
        for found in (await connection.ask("LIST", '""', '""')).named("LIST"):
            if len(found.values) > 1:
                self.separator = connection.decoded(found.values[1]) if found.values[1] is not None else ""

    async def places(self) -> list[Place]:
        """See `Sink`."""
        connection = self._connection
        extended = {"LIST-EXTENDED", "SPECIAL-USE"} <= connection.capabilities
        reply = await connection.ask(_LIST + (" RETURN (SPECIAL-USE)" if extended else ""))
        found = []
        for each in reply.named("LIST"):
            if len(each.values) < 3 or not isinstance(each.values[0], list):
                continue
            attributes = frozenset(str(one).lower() for one in each.values[0] if isinstance(one, str))
            if not attributes & {"\\noselect", "\\nonexistent"}:
                found.append(Place(connection.decoded(each.values[2]), attributes))
        return found

    async def room(self) -> Room | None:
        """See `Sink`.

        Spec: RFC 9208 §4.1.2, resource STORAGE in units of 1024 bytes.
        """
        if "QUOTA" not in self._connection.capabilities:
            return None
        with contextlib.suppress(Refused):
            for found in (await self._connection.ask("GETQUOTAROOT", b"INBOX")).named("QUOTA"):
                resources = found.values[1] if len(found.values) > 1 else None
                if isinstance(resources, list):
                    for at in range(0, len(resources) - 2, 3):
                        if str(resources[at]).upper() == "STORAGE":
                            return Room(
                                imap.number(resources[at + 1]) * 1024, imap.number(resources[at + 2]) * 1024
                            )
        return None

    async def ensure(self, name: str) -> Held:
        """See `Sink`."""
        encoded = self._connection.encoded(name)
        try:
            return await self._status(encoded)
        except Refused as error:
            if is_temporary(error.status):
                raise Temporary(f"the destination: {error}") from None
        try:
            await self._connection.ask("CREATE", encoded)
        except Refused as error:
            if error.status.code != "ALREADYEXISTS":
                self._raise_where_temporary(error)
                raise Unmade(f"the destination: {error}") from None
        subscribed = await self._connection.send("SUBSCRIBE", encoded)
        held = await self._status(encoded)
        with contextlib.suppress(Refused):
            await self._connection.answer(subscribed)
        return held

    async def validities(self, names: Iterable[str]) -> Mapping[str, int]:
        """See `Sink`."""
        connection, found = self._connection, dict[str, int]()
        ordered = list(names)
        every = set(ordered)
        for at in range(0, len(ordered), _STATUS_AT_ONCE):
            some = ordered[at : at + _STATUS_AT_ONCE]
            sent = [
                await connection.send("STATUS", connection.encoded(name), "(UIDVALIDITY)") for name in some
            ]
            for name, pending in zip(some, sent, strict=True):
                try:
                    reply = await connection.answer(pending)
                except Refused as error:
                    self._raise_where_temporary(error)
                    continue
                for each in reply.named("STATUS"):
                    of = connection.decoded(each.values[0])  # a server may answer in its own order
                    uid_validity = imap.number(imap.pairs(each.values[-1]).get("UIDVALIDITY"))
                    found[of if of in every else name] = uid_validity
        return found

    async def _status(self, encoded: bytes) -> Held:
        async with self._asking:  # a server may answer several in its own order (RFC 3501 §5.5)
            reply = await self._connection.ask("STATUS", encoded, _HELD)
        for found in reply.named("STATUS"):
            named = imap.pairs(found.values[-1])
            return Held(*(imap.number(named.get(name)) for name in ("UIDVALIDITY", "UIDNEXT", "MESSAGES")))
        raise Temporary("the destination does not say how a folder is")

    @contextlib.asynccontextmanager
    async def _in(self, name: str, *, now: bool = False) -> AsyncIterator[None]:
        """A block in which what is sent is done in a folder; batches may go on their way meanwhile.

        One at a time, until it is answered: of two FETCH commands at once a server may mix the answers.

        Args:
            now: as the folder is now, what came since it was selected included.
        """
        async with self._selecting:
            if self._selected == name:
                if now:
                    await self._connection.ask("NOOP")
            else:
                await self._select(name)
            yield

    async def _select(self, name: str) -> None:
        self._selected = ""
        reply = await self._connection.ask("SELECT", self._connection.encoded(name))
        self._permitted[name] = None
        for found in reply.named("[PERMANENTFLAGS]"):
            if found.values and isinstance(found.values[0], list):
                flags = {str(each) for each in found.values[0]}
                keeps_all = "\\*" in flags
                self._permitted[name] = None if keeps_all else frozenset(each.lower() for each in flags)
        self._selected = name

    # -- what is there ----------------------------------------------------------------------------

    async def strangers(self, name: str, since: int) -> list[Stranger]:
        """See `Sink`."""
        found: list[Stranger] = []

        def take(uid: int, size: int, received: datetime, flags: tuple[str, ...], _: object) -> None:
            if uid >= since:  # `n:*` is never empty: it gives the last message (RFC 3501 §9)
                found.append(Stranger(str(uid), size, received, flags))

        async with self._in(name, now=True):
            await self._connection.fetch(Whole(take), "UID FETCH", f"{since}:*", _LOOK)
        return found

    async def look(self, name: str, handles: Iterable[str]) -> Mapping[str, Seen]:
        """See `Sink`."""
        wanted = set(map(int, handles))
        found: dict[str, Seen] = {}

        def take(uid: int, size: int, received: datetime, flags: tuple[str, ...], _: object) -> None:
            if uid in wanted:
                found[str(uid)] = Seen(size, received, flags)

        async with self._in(name, now=True):
            for uids in imap.sequence_set(wanted):
                await self._connection.fetch(Whole(take), "UID FETCH", uids, _LOOK)
        return found

    async def digests(
        self, name: str, handles: Iterable[str], *, as_stored: bool = False
    ) -> Mapping[str, bytes]:
        """See `Sink`."""
        wanted = list(handles)
        listener = _Digests(self._connection.longest, as_stored)
        digests = listener.found
        async with self._in(name):
            for uids in imap.sequence_set(map(int, wanted)):
                try:
                    await self._connection.fetch(listener, "UID FETCH", uids, _WHOLE)
                except Refused as error:
                    self._require_of_a_message(error)
                    for handle in wanted:  # those that can be read are not worse for it
                        if handle not in digests:
                            try:
                                await self._connection.fetch(listener, "UID FETCH", handle, _WHOLE)
                            except Refused as one:
                                self._require_of_a_message(one)
                    break
        return digests

    def _require_of_a_message(self, error: Refused) -> None:
        if not is_of_a_message(error.status):
            raise Temporary(f"the destination: {said(error.status)}") from None

    # -- what is added ----------------------------------------------------------------------------

    async def put(self, name: str, parcels: Sequence[Parcel], origin: int) -> list[Placed | Unwanted]:
        """See `Sink`.

        Spec: RFC 3502 §6.3.11: a message without a byte would cancel all that goes with it.
        """
        filled = [parcel for parcel in parcels if parcel.size]
        async with self._order:  # none goes before one that asks
            is_plain = all(_SYSTEM.issuperset(parcel.message.flags) for parcel in filled)
            if not is_plain and name not in self._permitted:
                async with self._in(name):  # it says which keywords it keeps
                    pass
        async with contextlib.nullcontext() if self._says_uids else self._alone:
            placed = iter(await self._put(name, filled) if filled else ())
        return [next(placed) if parcel.size else Unwanted("it is empty") for parcel in parcels]

    async def _put(self, name: str, parcels: Sequence[Parcel]) -> list[Placed | Unwanted]:
        is_multiple = "MULTIAPPEND" in self._connection.capabilities
        if self._says_uids and not is_multiple:  # one by itself too: else it would overtake those that wait
            sent = (self._put_one(name, parcel) for parcel in parcels)
            return _all_of(await asyncio.gather(*sent, return_exceptions=True))
        if len(parcels) == 1 or not is_multiple:
            return [await self._put_one(name, parcel) for parcel in parcels]
        try:
            uids = await self._append(name, parcels)
        except Refused as error:
            self._raise_where_temporary(error)
        else:
            return [Placed(uid, self._lost(name, parcel)) for uid, parcel in zip(uids, parcels, strict=True)]
        # Nothing of a refused batch is there (RFC 3502 §3): halves of it find the message that is not wanted.
        half = len(parcels) // 2
        return [*await self._put(name, parcels[:half]), *await self._put(name, parcels[half:])]

    async def _put_one(self, name: str, parcel: Parcel) -> Placed | Unwanted:
        try:
            return Placed((await self._append(name, [parcel]))[0], self._lost(name, parcel))
        except Refused as error:
            self._raise_where_temporary(error)
            refusal = error
        flags = parcel.message.flags
        system = tuple(flag for flag in flags if flag in _SYSTEM)
        if len(system) < len(flags) and refusal.status.code not in ("TOOBIG", "LIMIT"):
            try:
                uid = (await self._append(name, [parcel], flags=system))[0]
                return Placed(uid, tuple(flag for flag in flags if flag not in _SYSTEM))
            except Refused as error:
                self._raise_where_temporary(error)
        return Unwanted(said(refusal.status))

    def _lost(self, name: str, parcel: Parcel) -> tuple[str, ...]:
        """Flags that a folder has no place for."""
        flags = parcel.message.flags
        if _SYSTEM.issuperset(flags):
            return ()
        return tuple(flag for flag in flags if not self._keeps(name, flag))

    def _raise_where_temporary(self, error: Refused) -> None:
        """What is no matter of the message.

        Raises:
            Full: there is no room.
            Temporary: another reason to come back later, or the folder is gone.
        """
        status = error.status
        text = status.text.lower()
        if status.code in _FULL or any(words in text for words in _FULL_WORDS):
            raise Full(f"the destination is full: {said(status)}") from None
        if is_temporary(status) or status.code == "TRYCREATE":
            raise Temporary(f"the destination: {said(status)}") from None

    async def _append(
        self, name: str, parcels: Sequence[Parcel], *, flags: tuple[str, ...] | None = None
    ) -> list[str]:
        """One APPEND; the UIDs it gave.

        Raises:
            Refused: nothing of it is there.
        """
        connection = self._connection
        before = None
        if not self._says_uids:
            before = await self._status(connection.encoded(name))
        encoded = imap.quoted(connection.encoded(name))
        if encoded is None:
            raise BadRequest(f"{name!r} cannot name a folder")
        async with connection.writing():
            pending = connection.begin("APPEND")
            connection.write(b" " + encoded)
            written: dict[tuple[str, ...], bytes] = {}  # flags
            for parcel in parcels:
                message = parcel.message
                wanted = message.flags if flags is None else flags
                if wanted not in written:
                    kept = " ".join(flag for flag in wanted if self._keeps(name, flag))
                    written[wanted] = kept.encode("ascii")
                connection.write(b" (%s) %s" % (written[wanted], imap.write_date(message.received)))
                if not await connection.literal(parcel.size, pending):
                    break
                for piece in parcel.pieces:
                    connection.write(piece)
                if parcel.file is not None:
                    await self._write(parcel.file)
            else:
                connection.flush()
                await connection.drained()
                self._require_turn()
                connection.write(b"\r\n")
            connection.flush()
        reply = await connection.answer(pending)
        if reply.status.code == "APPENDUID" and len(reply.status.arguments) == 2:
            uids = imap.numbers(str(reply.status.arguments[1]))
            if len(uids) == len(parcels):
                return [str(uid) for uid in uids]
        if before is None:
            raise Temporary("the destination does not say which UIDs it gave")
        return await self._found(name, before, parcels)

    async def _write(self, path: Path) -> None:
        connection = self._connection
        with path.open("rb") as file:
            while data := await asyncio.to_thread(file.read, _PIECE):
                connection.write(data)
                connection.flush()
                await connection.drained()

    async def _found(self, name: str, before: Held, parcels: Sequence[Parcel]) -> list[str]:
        """UIDs of what was just added, at a server that does not say them: matched by size, in order.

        Raises:
            Temporary: they cannot be told; `strangers` will settle it by SHA-256.
        """
        found = await self.strangers(name, before.uid_next)
        if [each.size for each in found] != [parcel.size for parcel in parcels]:
            raise Temporary("the destination does not say which UIDs it gave")
        return [each.handle for each in found]

    async def link(self, name: str, handles: Sequence[str], to: str) -> Mapping[str, str]:
        """See `Sink`."""
        connection = self._connection
        made: dict[str, str] = {}
        ordered = sorted(map(int, handles))
        for at in range(0, len(ordered), _AT_ONCE):
            some = ordered[at : at + _AT_ONCE]
            before = None if self._says_uids else await self._status(connection.encoded(to))
            async with self._in(name):
                for uids in imap.sequence_set(some):
                    self._require_turn()
                    try:
                        reply = await connection.ask("UID COPY", uids, connection.encoded(to))
                    except Refused as error:
                        self._raise_where_temporary(error)
                        raise
                    made |= _copied(reply.status)
                    for found in reply.named("[COPYUID]"):
                        made |= _pairs(found.values)
            if before is not None:
                found_there = await self.strangers(to, before.uid_next)
                if len(found_there) == len(some):
                    made |= {str(uid): each.handle for uid, each in zip(some, found_there, strict=True)}
        return made

    async def flag(
        self, name: str, changes: Iterable[tuple[str, frozenset[str], frozenset[str]]]
    ) -> frozenset[str]:
        """See `Sink`."""
        groups: dict[tuple[str, frozenset[str]], list[int]] = {}
        lost: set[str] = set()
        async with self._in(name):
            for handle, added, removed in changes:
                lost |= {flag for flag in added if not self._keeps(name, flag)}
                for sign, flags in (("+", added), ("-", removed)):
                    kept = frozenset(flag for flag in flags if self._keeps(name, flag))
                    if kept:
                        groups.setdefault((sign, kept), []).append(int(handle))
            for (sign, flags), uids in groups.items():
                for some in imap.sequence_set(uids):
                    try:
                        await self._connection.ask(
                            "UID STORE", some, f"{sign}FLAGS.SILENT ({' '.join(sorted(flags))})"
                        )
                    except Refused as error:
                        self._raise_where_temporary(error)
                        raise
        return frozenset(lost)

    def _keeps(self, name: str, flag: str) -> bool:
        if flag in _SYSTEM:
            return True
        permitted = self._permitted.get(name)
        return imap.is_flag(flag) and (permitted is None or flag.lower() in permitted)

    async def close(self) -> None:
        """See `Sink`."""
        await self._connection.close()

    def abort(self) -> None:
        """See `Sink`."""
        self._connection.abort()


class _Digests(Listener):
    """SHA-256 of messages, by handle."""

    bodies = True

    def __init__(self, longest: int, as_stored: bool) -> None:
        self.found: dict[str, bytes] = {}
        self._longest = longest
        self._as_stored = as_stored
        self._hashed: hashlib._Hash | None = None

    def begins(self, size: int, uid: int | None) -> None:
        if size > self._longest:
            raise BadRequest(f"the destination sends {size} bytes for a message")
        self._hashed = hashlib.sha256()

    def piece(self, data: memoryview) -> None:
        assert self._hashed is not None
        self._hashed.update(canonical(data) if self._as_stored else data)

    def fetched(self, each: Fetched) -> None:
        body = each.others.get("BODY[]")
        if isinstance(body, bytes):  # a short one may come in quotes
            self._hashed = hashlib.sha256(canonical(body) if self._as_stored else body)
        if self._hashed is not None and each.uid is not None:
            self.found[str(each.uid)] = self._hashed.digest()
        self._hashed = None


def _all_of(found: Sequence[Placed | Unwanted | BaseException]) -> list[Placed | Unwanted]:
    """What all came to; the first failure is raised once all have ended."""
    placed = []
    for each in found:
        if isinstance(each, BaseException):
            raise each
        placed.append(each)
    return placed


def _copied(status: imap.Status) -> dict[str, str]:
    return _pairs(status.arguments) if status.code == "COPYUID" else {}


def _pairs(arguments: Sequence[imap.Value]) -> dict[str, str]:
    """UIDs of a COPYUID, old -> new.

    Spec: RFC 4315 §3.
    """
    if len(arguments) != 3:
        return {}
    old, new = imap.numbers(str(arguments[1])), imap.numbers(str(arguments[2]))
    return {str(one): str(other) for one, other in zip(old, new, strict=False)}
