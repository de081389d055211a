"""A mailbox that is read: its folders, what is in them, their messages' bytes. Nothing is changed in it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ksync_server import settings as configuration
from ksync_server.errors import BadRequest, KsyncError, Permanent, Temporary
from ksync_server.mailimport.connection import (
    Connection,
    Ended,
    Inlet,
    Piece,
    Refused,
    Start,
    is_temporary,
    together,
)
from ksync_server.mailimport.plan import Folder, label
from ksync_server.mailimport.sinks import Message, Parcel
from ksync_server.wire import imap
from ksync_server.wire.imap import Data, Fetched, Status

_STATUS_AT_ONCE = 20
_PART_BYTES = 1 << 20  # of a long message, asked for at once: what a crash may cost, so it is little
_SUBJECT_BYTES = 4096
_SCAN = ("UID", "FLAGS", "INTERNALDATE", "RFC822.SIZE")
_GMAIL = ("X-GM-LABELS", "X-GM-MSGID")


class Poisoned(KsyncError):
    """What a server sends for these messages cannot be read; the connection is of no use any more."""

    def __init__(self, messages: Sequence[Message], reason: str) -> None:
        super().__init__(reason)
        self.messages = tuple(messages)


@dataclass(frozen=True, slots=True)
class Answered:
    """A request for bodies is over."""

    missing: tuple[Message, ...]  # did not come, with it or before
    refused: Status | None  # the answer where it was not OK


class Bodies:
    """Bytes of messages that are asked for ahead, several requests at once; they come in the server's order.

    Args:
        source: its folder stays open meanwhile, and nothing else is asked of it.
    """

    def __init__(self, source: Source, settings: configuration.MailImport) -> None:
        self._connection = source.connection
        self._inlet = Inlet(source.connection, bodies=True)
        self._longest = 2 * settings.whole_bytes  # of one whose size was said to be below that
        self._requests: dict[str, tuple[Message, ...]] = {}  # by tag
        self._wanted: dict[int, Message] = {}
        self._pieces: list[memoryview] = []
        self._hashed = hashlib.sha256()
        self._size = -1  # of what came of a body; -1: no literal

    @property
    def requests(self) -> int:
        """How many are under way."""
        return len(self._requests)

    async def ask(self, messages: Sequence[Message]) -> None:
        """Ask for some messages without waiting for them.

        Raises:
            RemoteError: the connection is gone.
        """
        uids = ",".join(imap.sequence_set([message.uid for message in messages], longest=1 << 30))
        self._wanted |= {message.uid: message for message in messages}
        pending = await self._connection.send("UID FETCH", uids, "(UID BODY.PEEK[])", inlet=self._inlet)
        self._requests[pending.tag] = tuple(messages)

    async def take(self) -> Parcel | Answered:
        """The next message, or the end of a request.

        Raises:
            Poisoned: a message is longer than any may be.
            RemoteError: the server failed.
        """
        while True:
            each = await self._inlet.take()
            if isinstance(each, Piece):
                self._size += len(each.data)
                self._hashed.update(each.data)
                self._pieces.append(each.data)
            elif isinstance(each, Start):
                self._pieces, self._hashed, self._size = [], hashlib.sha256(), 0
                if each.size > self._longest:
                    self._connection.abort()
                    named = self._wanted.get(each.uid or 0)
                    suspects = [named] if named else list(self._wanted.values())
                    raise Poisoned(suspects, f"the server sends {each.size} bytes for it")
            elif isinstance(each, Ended):
                asked = self._requests.pop(each.tag)
                missing = tuple(message for message in asked if self._wanted.pop(message.uid, None))
                return Answered(missing, None if each.status.word == "OK" else each.status)
            elif isinstance(each, Fetched) and (parcel := self._parcel(each.found)) is not None:
                return parcel

    def _parcel(self, named: dict[str, imap.Value]) -> Parcel | None:
        if "BODY[]" not in named or "UID" not in named:
            return None  # unasked for: the flags of a message changed
        pieces, digest, size = tuple(self._pieces), self._hashed.digest(), self._size
        self._pieces, self._size = [], -1
        body = named["BODY[]"]
        if isinstance(body, bytes):  # a short one may come in quotes
            pieces, digest, size = (memoryview(body),), hashlib.sha256(body).digest(), len(body)
        if size < 0:  # NIL: the server cannot read it
            return None
        message = self._wanted.pop(imap.number(named["UID"]), None)
        return None if message is None else Parcel(message, size, digest, pieces)


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
        names = _SCAN + _GMAIL if self.is_gmail else _SCAN
        changed = f" (CHANGEDSINCE {since})" if since else ""
        stream = await self.connection.stream("UID FETCH", f"{first}:{last}", f"({' '.join(names)}){changed}")
        found = {}
        async for each in together(stream, frozenset(names)):
            message = self._message(each)
            if first <= message.uid <= last:
                found[message.uid] = message
        return [found[uid] for uid in sorted(found)]

    def _message(self, found: dict[str, imap.Value]) -> Message:
        labels = found.get("X-GM-LABELS")
        return Message(
            imap.number(found["UID"]),
            imap.number(found["RFC822.SIZE"]),
            imap.internal_date(found["INTERNALDATE"]),
            imap.flags(found["FLAGS"]),
            # In modified UTF-7 even where the names of folders are UTF-8 (RFC 6855).
            tuple(label(imap.decode_name(imap.string(each))) for each in labels)
            if isinstance(labels, list)
            else (),
            str(found.get("X-GM-MSGID") or ""),
        )

    async def subjects(self, uids: Sequence[int]) -> dict[int, str]:
        """The subjects of a few messages of the open folder, for a report; as they are written, cut short.

        Raises:
            BadRequest: the server sends more than that.
            RemoteError: the server failed.
        """
        found: dict[int, str] = {}
        body = bytearray()
        item = f"(UID BODY.PEEK[HEADER.FIELDS (SUBJECT)]<0.{_SUBJECT_BYTES}>)"
        for some in imap.sequence_set(uids):
            async for each in await self.connection.stream("UID FETCH", some, item, bodies=True):
                if isinstance(each, Start):
                    body.clear()
                    if each.size > 2 * _SUBJECT_BYTES:
                        self.connection.abort()
                        raise BadRequest("a subject is longer than was asked for")
                elif isinstance(each, Piece):
                    body += each.data
                elif isinstance(each, Fetched):
                    uid = each.found.get("UID")
                    if isinstance(uid, str) and imap.is_number(uid):
                        text = bytes(body).partition(b":")[2].decode("utf-8", "replace")
                        found[int(uid)] = " ".join(text.split())[:200]
        return found

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
                came, has_begun, there = 0, False, False
                part = f"(UID BODY.PEEK[]<{at}.{_PART_BYTES}>)"
                async for each in await self.connection.stream(
                    "UID FETCH", str(message.uid), part, bodies=True
                ):
                    if isinstance(each, Start) and at + came + each.size > self._settings.message_bytes:
                        self.connection.abort()
                        raise Poisoned([message], f"longer than {self._settings.message_bytes} bytes")
                    has_begun |= isinstance(each, Start)
                    if isinstance(each, Piece):
                        file.write(each.data)
                        came += len(each.data)
                    elif isinstance(each, Fetched):
                        bodies = [each.found[name] for name in each.found if name.startswith("BODY[]")]
                        for body in bodies:
                            if isinstance(body, bytes):  # a short one may come in quotes
                                file.write(body)
                                came += len(body)
                            # NIL: the server cannot read it; some say it of what is behind the end.
                            there |= has_begun or isinstance(body, bytes) or 0 < message.size <= at
                        if "BODY[]" in each.found and at and came:
                            file.truncate(at)
                            raise Temporary("the server gives no parts of a message")
                if not there:
                    return None
                file.flush()
                if came < _PART_BYTES:
                    break
        size, digest = await asyncio.to_thread(_hashed, path)
        return Parcel(message, size, digest, file=path)

    async def is_there(self, uid: int) -> bool:
        """Whether a message of the open folder has not gone."""
        found = False
        async for each in await self.connection.stream("UID FETCH", str(uid), "(UID)"):
            if isinstance(each, Fetched) and each.found.get("UID") == str(uid):
                found = True
        return found


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
