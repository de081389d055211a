"""A mailbox that is read: its folders, what is in them, their messages' bytes. Nothing is changed in it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import IO, NamedTuple

from ksync_server import settings as configuration
from ksync_server.errors import BadRequest, KsyncError, Permanent, Temporary
from ksync_server.mailimport.connection import Connection
from ksync_server.mailimport.listening import Listener, Whole
from ksync_server.mailimport.plan import Folder, label
from ksync_server.mailimport.servers import Refused, is_temporary
from ksync_server.mailimport.sinks import Message, Parcel
from ksync_server.wire import imap
from ksync_server.wire.imap import Data, Fetched, Status

_STATUS_AT_ONCE = 20
_PART_BYTES = 1 << 20  # of a long message, asked for at once: what a crash may cost, so it is little
_SUBJECT_BYTES = 4096
_SUBJECTS = 1000  # kept
_LARGE_PIECE = 32 << 10  # bytes of a body that are not copied: what came beside them stays in memory too
_SCAN = ("UID", "FLAGS", "INTERNALDATE", "RFC822.SIZE")
_GMAIL = ("X-GM-LABELS", "X-GM-MSGID")


class Poisoned(KsyncError):
    """What a server sends for these messages cannot be read; the connection is of no use any more."""

    def __init__(self, messages: Sequence[Message], reason: str) -> None:
        super().__init__(reason)
        self.messages = tuple(messages)


class Answer(NamedTuple):
    """What a request for bodies came to."""

    parcels: tuple[Parcel, ...]  # that came since the last answer
    missing: tuple[Message, ...]  # did not come, with it or before
    refused: Status | None  # the answer where it was not OK


class Bodies(Listener):
    """Bytes of messages that are asked for ahead, several requests at once; they come in the server's order.

    What is asked for is taken as it comes: who asks bounds it.

    Args:
        source: its folder stays open meanwhile, and nothing else is asked of it.
    """

    bodies = True

    def __init__(self, source: Source, settings: configuration.MailImport) -> None:
        self._connection = source.connection
        self._longest = 2 * settings.whole_bytes  # of one whose size was said to be below that
        # At once; there is more only where sizes lie.
        self._most = max(settings.window_bytes, 4 * settings.whole_bytes)
        self._requests: dict[str, Sequence[Message]] = {}  # by tag
        self._wanted: dict[int, Message] = {}
        self._pieces: list[memoryview | bytearray] = []
        self._hashed: hashlib._Hash | None = None
        self._has_begun = False
        self._parcels: list[Parcel] = []
        self._came = 0  # bytes of bodies since the last answer
        self._answers: deque[Answer] = deque()
        self._error: Exception | None = None
        self._taker: asyncio.Future[None] | None = None

    @property
    def requests(self) -> int:
        """How many are under way."""
        return len(self._requests) + len(self._answers)

    async def ask(self, messages: Sequence[Message]) -> None:
        """Ask for some messages without waiting for them.

        Raises:
            RemoteError: the connection is gone.
        """
        uids = ",".join(imap.sequence_set([message.uid for message in messages], longest=1 << 30))
        self._wanted |= {message.uid: message for message in messages}
        pending = await self._connection.send("UID FETCH", uids, "(UID BODY.PEEK[])", listener=self)
        self._requests[pending.tag] = messages

    async def take(self) -> Answer:
        """What the next request came to; what came before a failure is given before that is raised.

        Raises:
            Poisoned: a message is longer than any may be.
            RemoteError: the server failed.
        """
        while not self._answers:
            if self._error is not None:
                raise self._error
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker
        return self._answers.popleft()

    # -- Listener -----------------------------------------------------------------------------------

    def begins(self, size: int, uid: int | None) -> None:
        """See `Listener`."""
        self._pieces, self._hashed, self._has_begun = [], None, True
        if size > self._longest:
            named = self._wanted.get(uid or 0)
            suspects = [named] if named else list(self._wanted.values())
            raise Poisoned(suspects, f"the server sends {size} bytes for it")
        self._count(size)

    def _count(self, size: int) -> None:
        self._came += size
        if self._came > self._most:
            wanted = list(self._wanted.values())  # what came has its place: it alone is no suspect
            came = [parcel.message for parcel in self._parcels]
            raise Poisoned(wanted and [*wanted, *came], "its sizes are not what it says")

    def piece(self, data: memoryview) -> None:
        """See `Listener`."""
        if self._hashed is None:
            self._hashed = hashlib.sha256(data)
        else:
            self._hashed.update(data)
        if len(data) >= _LARGE_PIECE:
            self._pieces.append(data)
        elif self._pieces and isinstance(self._pieces[-1], bytearray):
            self._pieces[-1] += data
        else:
            self._pieces.append(bytearray(data))

    def fetched(self, each: Fetched) -> None:
        """See `Listener`."""
        if each.uid is None or "BODY[]" not in each.others:
            return  # unasked for: the flags of a message changed
        pieces, hashed, has_begun = self._pieces, self._hashed, self._has_begun
        self._pieces, self._hashed, self._has_begun = [], None, False
        body = each.others["BODY[]"]
        if isinstance(body, bytes):  # a short one may come in quotes
            self._count(len(body))
            pieces, hashed = [memoryview(body)], hashlib.sha256(body)
        elif not has_begun:  # NIL: the server cannot read it
            return
        message = self._wanted.pop(each.uid, None)
        if message is not None:
            digest = (hashed or hashlib.sha256()).digest()
            size = sum(map(len, pieces))
            self._parcels.append(Parcel(message, size, digest, tuple(map(memoryview, pieces))))

    def answered(self, tag: str, status: Status) -> None:
        """See `Listener`."""
        asked = self._requests.pop(tag)
        missing = tuple(message for message in asked if self._wanted.pop(message.uid, None))
        self._answers.append(Answer(self._came_so_far(), missing, None if status.word == "OK" else status))
        self._wake()

    def failed(self, error: Exception) -> None:
        """See `Listener`."""
        if self._error is None:
            self._error = error
            if self._parcels:
                self._answers.append(Answer(self._came_so_far(), (), None))
            self._wake()

    def _came_so_far(self) -> tuple[Parcel, ...]:
        parcels = tuple(self._parcels)
        self._parcels.clear()
        self._came = 0
        return parcels

    def _wake(self) -> None:
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)


class _Subjects(Listener):
    bodies = True

    def __init__(self) -> None:
        self.found: dict[int, str] = {}
        self._body = bytearray()

    def begins(self, size: int, uid: int | None) -> None:
        self._body.clear()
        if size > 2 * _SUBJECT_BYTES:
            raise BadRequest("a subject is longer than was asked for")

    def piece(self, data: memoryview) -> None:
        self._body += data

    def fetched(self, each: Fetched) -> None:
        if each.uid is not None and len(self.found) < _SUBJECTS:
            text = bytes(self._body).partition(b":")[2].decode("utf-8", "replace")
            self.found[each.uid] = " ".join(text.split())[:200]


class _Part(Listener):
    """A part of a long message, written to its file as it comes."""

    bodies = True

    def __init__(self, message: Message, file: IO[bytes], at: int, longest: int) -> None:
        self._message = message
        self._file = file
        self._at = at
        self._longest = longest
        self._has_begun = False
        self.came = 0  # bytes
        self.is_there = False

    def begins(self, size: int, uid: int | None) -> None:
        if self._at + self.came + size > self._longest:
            raise Poisoned([self._message], f"longer than {self._longest} bytes")
        self._has_begun = True

    def piece(self, data: memoryview) -> None:
        self._file.write(data)
        self.came += len(data)

    def fetched(self, each: Fetched) -> None:
        for body in (each.others[name] for name in each.others if name.startswith("BODY[]")):
            if isinstance(body, bytes):  # a short one may come in quotes
                self._file.write(body)
                self.came += len(body)
            # NIL: the server cannot read it; some say it of what is behind the end.
            self.is_there |= self._has_begun or isinstance(body, bytes) or 0 < self._message.size <= self._at
        if "BODY[]" in each.others and self._at and self.came:
            self._file.truncate(self._at)
            raise Temporary("the server gives no parts of a message")


class _Is(Listener):
    """Whether a message is there."""

    def __init__(self, uid: int) -> None:
        self._uid = uid
        self.there = False

    def fetched(self, each: Fetched) -> None:
        self.there |= each.uid == self._uid


class Source:
    """A mailbox over one connection."""

    def __init__(self, connection: Connection, settings: configuration.MailImport) -> None:
        self.connection = connection
        self.prefix = ""  # of personal folders, such as `INBOX.`
        self._settings = settings

    @property
    def is_gmail(self) -> bool:
        """Whether it has labels."""
        return "X-GM-EXT-1" in self.connection.capabilities

    # -- folders ----------------------------------------------------------------------------------

    async def folders(self) -> list[Folder]:
        """All folders that can be opened, with their numbers.

        Raises:
            Permanent: too many.
            RemoteError: the server failed.
        """
        connection = self.connection
        await self._learn_prefix()
        wanted = ["MESSAGES", "UIDNEXT", "UIDVALIDITY"]
        if connection.capabilities & {"CONDSTORE", "QRESYNC"}:
            wanted.append("HIGHESTMODSEQ")
        if "STATUS=SIZE" in connection.capabilities:
            wanted.append("SIZE")
        status = f"({' '.join(wanted)})"
        returned = ""
        if "LIST-EXTENDED" in connection.capabilities:
            returns = ["SPECIAL-USE"] if "SPECIAL-USE" in connection.capabilities else []
            returns += [f"STATUS {status}"] if "LIST-STATUS" in connection.capabilities else []
            returned = f" RETURN ({' '.join(returns)})" if returns else ""
        reply = await connection.ask(f'LIST "" "*"{returned}')
        found: dict[str, Folder] = {}
        for each in reply.named("LIST"):
            if len(each.values) < 3 or not isinstance(each.values[0], list):
                continue
            attributes = frozenset(one.lower() for one in each.values[0] if isinstance(one, str))
            if attributes & {"\\noselect", "\\nonexistent"}:
                continue
            separator = "" if each.values[1] is None else connection.decoded(each.values[1])
            name, wire = connection.decoded(each.values[2]), imap.string(each.values[2])
            found[name] = Folder(name, separator, attributes, wire=wire)
            if len(found) > self._settings.folders:
                raise Permanent(f"The source has more than {self._settings.folders} folders.")
        if (
            "INBOX" in found
        ):  # in whatever letters it is one folder (RFC 3501 §5.1), also where two are listed
            found = {name: each for name, each in found.items() if name == "INBOX" or name.upper() != "INBOX"}
        said_already = dict(map(self._status, reply.named("STATUS")))
        missing = [folder for name, folder in found.items() if name not in said_already]
        for at in range(0, len(missing), _STATUS_AT_ONCE):
            some = missing[at : at + _STATUS_AT_ONCE]
            sent = [await connection.send("STATUS", folder.wire, status) for folder in some]
            for pending in sent:
                try:
                    reply = await connection.answer(pending)
                except Refused as error:
                    if is_temporary(error.status):
                        raise Temporary(str(error)) from None
                    continue  # a folder that cannot be asked is said to be empty
                for each in reply.named("STATUS"):
                    name, numbers = self._status(each)
                    said_already[name] = numbers
        return [_with(folder, said_already.get(folder.name, {})) for folder in found.values()]

    async def _learn_prefix(self) -> None:
        if "NAMESPACE" in self.connection.capabilities:
            with contextlib.suppress(Refused):
                for found in (await self.connection.ask("NAMESPACE")).named("NAMESPACE"):
                    personal = found.values[0] if found.values else None
                    if isinstance(personal, list) and personal and isinstance(personal[0], list):
                        self.prefix = self.connection.decoded(personal[0][0])

    def _status(self, found: Data) -> tuple[str, dict[str, int]]:
        numbers = {name: imap.number(each) for name, each in imap.pairs(found.values[-1]).items()}
        return self.connection.decoded(found.values[0]), numbers

    async def open(self, folder: Folder) -> Folder:
        """Open a folder for reading; its numbers as they are now.

        Raises:
            RemoteError: it cannot be opened, or the server failed.
        """
        condstore = ["(CONDSTORE)"] if "CONDSTORE" in self.connection.capabilities else []
        wire = folder.wire or self.connection.encoded(folder.name)
        reply = await self.connection.ask("EXAMINE", wire, *condstore)
        numbers = {
            each.name.strip("[]"): imap.number(each.values[0])
            for each in reply.data
            if each.name in ("[UIDVALIDITY]", "[UIDNEXT]", "[HIGHESTMODSEQ]") and each.values
        }
        numbers["MESSAGES"] = max([each.number or 0 for each in reply.named("EXISTS")], default=0)
        return _with(folder, numbers)

    # -- what is in them --------------------------------------------------------------------------

    async def scan(self, first: int, last: int, *, since: int = 0) -> list[Message]:
        """Messages of the open folder by UID.

        Args:
            since: only those that changed after this mod-sequence; 0 = all.

        Raises:
            RemoteError: the server failed.

        Cost: one command; 400 bytes a message.
        """
        others = _GMAIL if self.is_gmail else ()
        changed = f" (CHANGEDSINCE {since})" if since else ""
        found: dict[int, Message] = {}

        def take(
            uid: int,
            size: int,
            received: datetime,
            flags: tuple[str, ...],
            said: Mapping[str, imap.Value],
        ) -> None:
            if first <= uid <= last:
                found[uid] = Message(uid, size, received, flags, *(_labelled(said) if others else ()))

        items = " ".join(_SCAN + others)
        listener = Whole(take, others)
        await self.connection.fetch(listener, "UID FETCH", f"{first}:{last}", f"({items}){changed}")
        return [found[uid] for uid in sorted(found)]

    async def subjects(self, uids: Sequence[int]) -> dict[int, str]:
        """The subjects of a few messages of the open folder, for a report; as they are written, cut short.

        Raises:
            BadRequest: the server sends more than that.
            RemoteError: the server failed.
        """
        listener = _Subjects()
        item = f"(UID BODY.PEEK[HEADER.FIELDS (SUBJECT)]<0.{_SUBJECT_BYTES}>)"
        for some in imap.sequence_set(uids):
            await self.connection.fetch(listener, "UID FETCH", some, item)
        return listener.found

    # -- bytes: see also `Bodies` -------------------------------------------------------------------

    async def spool(self, message: Message, path: Path) -> Parcel | None:
        """Fetch a long message into a file, and go on where an earlier try ended; None where it is gone.

        Raises:
            Poisoned: it is longer than any may be.
            Refused: NO or BAD.
            RemoteError: the server failed; what came so far stays in the file.

        Cost: 64 KiB of memory, whatever its size.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
            while True:
                at = file.seek(0, 2)
                part = _Part(message, file, at, self._settings.message_bytes)
                item = f"(UID BODY.PEEK[]<{at}.{_PART_BYTES}>)"
                await self.connection.fetch(part, "UID FETCH", str(message.uid), item)
                if not part.is_there:
                    return None
                file.flush()
                if part.came < _PART_BYTES:
                    break
        size, digest = await asyncio.to_thread(_hashed, path)
        return Parcel(message, size, digest, file=path)

    async def is_there(self, uid: int) -> bool:
        """Whether a message of the open folder has not gone."""
        listener = _Is(uid)
        await self.connection.fetch(listener, "UID FETCH", str(uid), "(UID)")
        return listener.there


def _labelled(said: Mapping[str, imap.Value]) -> tuple[tuple[str, ...], str]:
    """Gmail's labels and number of a message."""
    labels = said.get("X-GM-LABELS")
    # In modified UTF-7 even where the names of folders are UTF-8 (RFC 6855).
    names = (imap.decode_name(imap.string(each)) for each in labels) if isinstance(labels, list) else ()
    return tuple(map(label, names)), str(said.get("X-GM-MSGID") or "")


def _with(folder: Folder, numbers: dict[str, int]) -> Folder:
    return replace(
        folder,
        uid_validity=numbers.get("UIDVALIDITY", folder.uid_validity),
        uid_next=numbers.get("UIDNEXT", folder.uid_next),
        messages=numbers.get("MESSAGES", folder.messages),
        modseq=numbers.get("HIGHESTMODSEQ", folder.modseq),
        size=numbers.get("SIZE", folder.size),
    )


def _hashed(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        return file.tell(), digest
