"""One connection to an IMAP server: TLS, log-in, pipelined commands, bodies that are never held whole.

Answers are matched to commands by tag; untagged data go to the oldest command that is not answered, what is
said of messages to the oldest that fetches. Some servers (Dovecot) work on several FETCH commands at once, so
those under way share one inlet and tell messages apart by UID (RFC 3501 §5.5). Reading pauses while nobody
takes what came.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import zlib
from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

from ksync_server import outbound
from ksync_server import settings as configuration
from ksync_server.errors import BadRequest, Permanent, RemoteError, Temporary
from ksync_server.networks import Networks, is_loopback, parse
from ksync_server.wire import imap
from ksync_server.wire.imap import (
    Continue,
    Data,
    Fetched,
    Literal,
    LiteralData,
    LiteralStart,
    Status,
    Text,
    Value,
)

SECURITIES = ("tls", "starttls", "none")
MECHANISMS = ("password", "xoauth2")

_UNSENT = 256 << 10  # bytes that wait to be sent, in the process and in its socket
_HELD = 512 << 10  # bytes of bodies that wait in a connection to be taken
_READ = 64 << 10  # asked of zlib at once
_SMALL_LITERAL = 4096  # LITERAL- (RFC 7888 §5)
_BODY = re.compile(rb"(?:^|[ (])BODY\[[^\]]*\](?:<\d+>)?[ ]\Z", re.I)
_UID = re.compile(rb"[( ]UID (\d{1,10})[ )]", re.I)
_ANSWERS = 10_000_000  # to one command: a folder has fewer messages, and a server that never ends is left
_HELD_ANSWERS = 250_000  # the same where they are kept until the end
_PARTS = 1000  # messages of which something was said, and something not
_WATCH_S = 1.0
_FAR_S = 0.01  # seconds to connect from which on compression pays


@dataclass(frozen=True, slots=True)
class Server:
    """Where a mailbox is and how to get in; the secret is not part of it."""

    host: str
    port: int
    user: str
    security: str = "tls"  # one of SECURITIES
    mechanism: str = "password"  # one of MECHANISMS
    ca_file: str = ""  # certificates (PEM) to trust instead of the system's


@dataclass(frozen=True, slots=True)
class Reply:
    """What a command came to: the tagged answer and the untagged data before it."""

    status: Status
    data: list[Data]

    def named(self, name: str) -> list[Data]:
        """Untagged data of one kind."""
        return [each for each in self.data if each.name == name]


class Refused(RemoteError):
    """NO or BAD; the connection goes on."""

    def __init__(self, command: str, status: Status) -> None:
        super().__init__(f"{command}: {status.word} {said(status)}")
        self.status = status


def said(status: Status) -> str:
    """A server's words on one line, cut to what a report may hold."""
    code = f"[{status.code}] " if status.code else ""
    return code + "".join(mark if mark.isprintable() else " " for mark in status.text)[:200]


_LATER = frozenset(
    {"UNAVAILABLE", "INUSE", "LIMIT", "SERVERBUG", "THROTTLED", "OVERQUOTA", "EXPIRED-CONNECTION"}
)
_NEVER = frozenset(
    {"AUTHENTICATIONFAILED", "AUTHORIZATIONFAILED", "EXPIRED", "PRIVACYREQUIRED", "CONTACTADMIN", "WEBALERT"}
)
_LATER_WORDS = re.compile(
    r"too many|try again|temporar|unavailable|overload|throttl|bandwidth|exceeded|later|timed? ?out", re.I
)


def is_temporary(status: Status) -> bool:
    """Whether the same command may succeed later.

    Spec: RFC 5530 §3; words where a server gives no code.
    """
    if status.code in _NEVER:
        return False
    return status.word == "BYE" or status.code in _LATER or bool(_LATER_WORDS.search(status.text))


def is_of_a_message(status: Status) -> bool:
    """Whether a refused body is the message's matter: the server does not say that it will do better later.

    SERVERBUG is no such promise: Dovecot says it of each message that it cannot read, for ever.
    """
    return status.code == "SERVERBUG" or not is_temporary(status)


# -- what comes in ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Start:
    """A body begins."""

    size: int
    uid: int | None = None  # where the server said it before


@dataclass(slots=True)
class Piece:
    """A part of the body that began."""

    data: memoryview


@dataclass(frozen=True, slots=True)
class Ended:
    """A command is answered."""

    tag: str
    status: Status


class Inlet:
    """What commands receive, in order: Start, Piece ..., Data; and Ended for each of them.

    Args:
        bodies: they ask for bodies; a server that sends one unasked is not heard.
    """

    def __init__(self, connection: Connection, *, bodies: bool) -> None:
        self._connection = connection
        self.bodies = bodies
        self._waiting: deque[Start | Piece | Data | Fetched | Ended] = deque()
        self._taker: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self.held = 0

    def put(self, each: Start | Piece | Data | Fetched | Ended) -> None:
        """Called by the connection."""
        self._waiting.append(each)
        if isinstance(each, Piece):
            self.held += len(each.data)
        self._wake()

    def fail(self, error: Exception) -> None:
        """The connection is gone; what came before is taken first."""
        self._error = error
        self._wake()

    async def take(self) -> Start | Piece | Data | Fetched | Ended:
        """The next thing.

        Raises:
            RemoteError: the connection is gone.
        """
        while not self._waiting:  # no task switch where something waits
            if self._error is not None:
                raise self._error
            self._taker = asyncio.get_running_loop().create_future()
            await self._taker
        each = self._waiting.popleft()
        if isinstance(each, Piece):
            self.held -= len(each.data)
            self._connection.balance()
        return each

    def _wake(self) -> None:
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)


@dataclass(frozen=True, slots=True)
class Stream:
    """The answer to one command, while it comes."""

    name: str
    inlet: Inlet

    async def __aiter__(self) -> AsyncIterator[Start | Piece | Data | Fetched]:
        """What the server gives.

        Raises:
            Refused: NO or BAD, at its end.
            RemoteError: the connection is gone.
        """
        while not isinstance(each := await self.inlet.take(), Ended):
            yield each
        if each.status.word != "OK":
            raise Refused(self.name, each.status)


async def together(stream: Stream, names: frozenset[str]) -> AsyncIterator[dict[str, Value]]:
    """Messages of which a server has said all of `names`, in one answer or in several.

    Raises:
        Refused, RemoteError: as `Stream`.

    Spec: RFC 3501 §7.4.2; an answer with fewer may be about a message that was not asked for.
    """
    parts: dict[int, dict[str, Value]] = {}  # by the message's number
    async for each in stream:
        if isinstance(each, Data) and each.name == "EXPUNGE" and each.number:
            gone = each.number
            parts = {at - (at > gone): part for at, part in parts.items() if at != gone}
        if not isinstance(each, Fetched):
            continue
        found = each.found
        if not names <= found.keys():
            found = parts.pop(each.number, {}) | found
            if not names <= found.keys():
                parts[each.number] = found
                if len(parts) > _PARTS:
                    del parts[next(iter(parts))]
                continue
        yield found


@dataclass(slots=True)
class Pending:
    """A command that is sent and not answered."""

    tag: str
    name: str
    answered: asyncio.Future[Status]
    data: list[Data] = field(default_factory=list)
    inlet: Inlet | None = None
    answers: int = 0
    continued: asyncio.Future[None] | None = None  # done once the server waits for more, or has answered


class Connection(asyncio.Protocol):
    """A connection; made by `connect`, ended by `close`."""

    def __init__(self, server: Server, settings: configuration.MailImport) -> None:
        self.server = server
        self.capabilities: frozenset[str] = frozenset()
        self.utf8 = False  # mailbox names are UTF-8 (RFC 6855)
        self.received = 0  # bytes, before decompression
        self.commands = 0
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._framer = imap.Framer(line_bytes=settings.line_bytes)
        self._pieces: list[bytes | Literal] = []
        self._text = b""  # the last piece of text: what a literal that follows it is
        self._literal: bytearray | None = None  # a small one that is being read
        self._held = 0  # bytes of small ones in the line that is being read
        self._left = 0  # of the literal that is being read
        self._streaming: Inlet | None = None
        self._pending: deque[Pending] = deque()
        self._greeting: asyncio.Future[Status] = self._loop.create_future()
        self._turn = asyncio.Lock()  # of writing
        self._error: RemoteError | None = None
        self._paused = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._inflate: zlib._Decompress | None = None
        self._packed = b""  # that is not decompressed yet
        self._deflate: zlib._Compress | None = None
        self._heard = self._loop.time()
        self._since = self._heard  # what is received from here on is counted, for the rate
        self._heard_bytes = 0
        self._watch: asyncio.TimerHandle | None = None

    # -- asyncio.Protocol ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_UNSENT)
        if (own := transport.get_extra_info("socket")) is not None:
            # What is given away can be taken back no more, so little of it waits here (`Job.require_lease`).
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
        if self._watch is None:
            self._watch = self._loop.call_later(_WATCH_S, self._look)

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        self.received += len(data)
        self._heard = self._loop.time()
        try:
            if self._inflate is None:
                self._read(data)
            else:
                self._packed += data
                self._unpack(self._inflate)
        except (BadRequest, zlib.error) as error:
            self._fail(Temporary(f"{self.server.host} speaks no IMAP: {error}"))

    def _unpack(self, inflate: zlib._Decompress) -> None:
        """Read on while what came is being taken, so that little input never becomes much memory."""
        while not self._paused and self._error is None:
            data = inflate.decompress(self._packed, _READ)
            self._packed = inflate.unconsumed_tail
            self._read(data)
            if len(data) < _READ:
                return

    def eof_received(self) -> None:
        """Called by the loop."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        reason = f": {exc}" if exc else ""
        self._fail(Temporary(f"{self.server.host} ended the connection{reason}"))

    def pause_writing(self) -> None:
        """Called by the loop."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Called by the loop."""
        self._writable.set()

    # -- reading ------------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        for event in self._framer.feed(data):
            if isinstance(event, Text):
                self._text = event.data
                self._pieces.append(event.data)
                if event.ends:
                    pieces, self._pieces, self._held = self._pieces, [], 0
                    self._answer(imap.response(pieces))
            elif isinstance(event, LiteralData):
                self._literal_data(event.data)
            else:
                self._literal_start(event)
        self.balance()

    def _literal_start(self, event: LiteralStart) -> None:
        size, head = event.size, self._text
        self._left = size
        inlet = next((pending.inlet for pending in self._pending if pending.inlet is not None), None)
        if inlet is not None and inlet.bodies and _BODY.search(head):
            self._streaming = inlet
            uid = _UID.search(head)
            self._streaming.put(Start(size, int(uid[1]) if uid else None))
        else:
            self._held += size
            if self._held > self._settings.line_bytes:
                raise BadRequest(f"literals of {self._held} bytes that nobody asked for")
            self._literal = bytearray()
        if size == 0:
            self._literal_end()

    def _literal_data(self, data: memoryview) -> None:
        if self._streaming is not None:
            self._streaming.put(Piece(data))
        else:
            assert self._literal is not None
            self._literal += data
        self._left -= len(data)
        if self._left == 0:
            self._literal_end()

    def _literal_end(self) -> None:
        self._pieces.append(Literal(None if self._literal is None else bytes(self._literal)))
        self._literal = self._streaming = None

    def _answer(self, response: imap.Response) -> None:
        if isinstance(response, Continue):
            for pending in self._pending:  # one at most waits for it: the last one
                _go_on(pending)
        elif isinstance(response, Data | Fetched):
            if isinstance(response, Data) and response.name == "CAPABILITY":
                self.capabilities = _capabilities(response.values)
            oldest = self._asker(response)
            if oldest is None:
                return  # unasked for
            oldest.answers += 1
            if oldest.answers > (_HELD_ANSWERS if oldest.inlet is None else _ANSWERS):
                raise BadRequest(f"more than {oldest.answers - 1} answers to {oldest.name}")
            if oldest.inlet is not None:
                oldest.inlet.put(response)
            elif isinstance(response, Data):
                oldest.data.append(response)
        elif response.tag:
            self._tagged(response)
        else:
            self._untagged(response)

    def _asker(self, response: Data | Fetched) -> Pending | None:
        """The command that untagged data answer: what is said of a message is for those that fetch."""
        if isinstance(response, Fetched) or response.name == "EXPUNGE":
            for pending in self._pending:
                if pending.inlet is not None:
                    return pending
        return self._pending[0] if self._pending else None

    def _tagged(self, status: Status) -> None:
        for pending in self._pending:
            if pending.tag == status.tag:
                break
        else:
            raise BadRequest(f"an answer to {status.tag}, which was not asked")
        self._pending.remove(pending)
        if pending.inlet is None and self._pending and self._pending[0].inlet is not None:
            self._since, self._heard_bytes = self._loop.time(), self.received  # its answer begins now
        if status.code == "CAPABILITY":
            self.capabilities = _capabilities(status.arguments)
        if not pending.answered.done():
            pending.answered.set_result(status)
        if pending.inlet is not None:
            pending.inlet.put(Ended(pending.tag, status))
        _go_on(pending)  # refused before its literal: the waiter looks at the answer

    def _untagged(self, status: Status) -> None:
        if status.code == "CAPABILITY":
            self.capabilities = _capabilities(status.arguments)
        if not self._greeting.done():
            self._greeting.set_result(status)
        elif status.word == "BYE":
            self._fail(Temporary(f"{self.server.host} ends the connection: {said(status)}"))
        elif status.code and self._pending:
            self._pending[0].data.append(Data(f"[{status.code}]", None, list(status.arguments)))

    def balance(self) -> None:
        """Read on while what came is being taken."""
        if self._transport is None or self._transport.is_closing():
            return
        full = any(each.inlet is not None and each.inlet.held > _HELD for each in self._pending)
        if full and not self._paused:
            self._transport.pause_reading()
        elif self._paused and not full:
            self._heard = self._loop.time()
            self._heard_bytes = self.received
            self._transport.resume_reading()
            if self._inflate is not None:
                self._loop.call_soon(self.data_received, b"")
        self._paused = full

    def _look(self) -> None:
        """Notice a server that says nothing, or next to nothing."""
        self._watch = self._loop.call_later(_WATCH_S, self._look)
        if not self._pending or self._paused:
            self._heard = self._loop.time()
            self._since, self._heard_bytes = self._heard, self.received
            return
        now = self._loop.time()
        patience = self._settings.timeout_s
        if now - self._heard > patience:
            self._fail(Temporary(f"{self.server.host} has said nothing for {patience:.0f} s"))
        elif now - self._since > patience:
            few = self.received - self._heard_bytes < self._settings.slowest_bytes_s * patience
            if few and self._pending[0].inlet is not None:
                self._fail(Temporary(f"{self.server.host} sends next to nothing: it throttles"))
            self._since, self._heard_bytes = now, self.received

    def _fail(self, error: RemoteError) -> None:
        if self._error is None:
            self._error = error
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is not None:
            self._transport.abort()
        self._writable.set()
        if not self._greeting.done():
            self._greeting.set_exception(self._error)
            self._greeting.exception()
        while self._pending:
            pending = self._pending.popleft()
            if pending.continued is not None and not pending.continued.done():
                pending.continued.set_exception(self._error)
                pending.continued.exception()
            if not pending.answered.done():
                pending.answered.set_exception(self._error)
                pending.answered.exception()  # whoever waits gets it; nobody may
            if pending.inlet is not None:
                pending.inlet.fail(self._error)

    # -- writing ------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Bytes of the longest message that is read."""
        return self._settings.message_bytes

    @property
    def is_open(self) -> bool:
        """Whether commands can be sent."""
        return self._error is None

    def write(self, data: bytes | memoryview) -> None:
        """Send bytes.

        Raises:
            RemoteError: the connection is gone.
        """
        if self._error is not None:
            raise self._error
        assert self._transport is not None
        if self._deflate is not None:
            data = self._deflate.compress(data)
        if data:
            self._transport.write(data)

    def flush(self) -> None:
        """Let the server have what a compressor still holds."""
        if self._deflate is not None:
            rest = self._deflate.flush(zlib.Z_SYNC_FLUSH)
            if rest and self._error is None and self._transport is not None:
                self._transport.write(rest)

    async def drained(self) -> None:
        """Wait until the socket takes more.

        Raises:
            RemoteError: the connection is gone.
        """
        if not self._writable.is_set():
            await self._writable.wait()
        if self._error is not None:
            raise self._error

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """A block that writes one command, from `begin` to its last byte; others wait for their turn.

        Whatever cuts it ends the connection: what came next would be read as a part of it.
        """
        async with self._turn:
            with ending(self):
                yield

    def begin(self, name: str, inlet: Inlet | None = None) -> Pending:
        """Start a command line by its tag and name, inside of `writing` where there may be others."""
        self.commands += 1
        pending = Pending(f"k{self.commands}", name, self._loop.create_future(), inlet=inlet)
        self.write(f"{pending.tag} {name}".encode("ascii"))
        if not self._pending:
            self._heard = self._since = self._loop.time()
            self._heard_bytes = self.received
        self._pending.append(pending)
        return pending

    async def literal(self, size: int, pending: Pending, *, binary: bool = False) -> bool:
        """Announce a literal; True when its bytes may be sent, False where the command was refused instead.

        Raises:
            RemoteError: the connection is gone.
        """
        mark = "~" if binary else ""
        if "LITERAL+" in self.capabilities or ("LITERAL-" in self.capabilities and size <= _SMALL_LITERAL):
            self.write(f" {mark}{{{size}+}}\r\n".encode("ascii"))
            return True
        pending.continued = self._loop.create_future()
        self.write(f" {mark}{{{size}}}\r\n".encode("ascii"))
        self.flush()
        await pending.continued
        return not pending.answered.done()

    async def send(self, name: str, *arguments: bytes | str, inlet: Inlet | None = None) -> Pending:
        """Send a command without waiting for its answer.

        Args:
            arguments: str as it is; bytes as a string, quoted or as a literal.

        Raises:
            RemoteError: the connection is gone.
        """
        async with self.writing():
            pending = self.begin(name, inlet)
            for each in arguments:
                if isinstance(each, str):
                    self.write(b" " + each.encode("utf-8", "surrogateescape"))
                elif (text := imap.quoted(each, utf8=self.utf8)) is not None and len(each) < 1000:
                    self.write(b" " + text)
                elif await self.literal(len(each), pending):
                    self.write(each)
                else:
                    return pending
            self.write(b"\r\n")
            self.flush()
        return pending

    async def answer(self, pending: Pending) -> Reply:
        """Wait for a command's end.

        Raises:
            Refused: NO or BAD.
            RemoteError: the connection is gone.
        """
        status = await pending.answered
        if status.word != "OK":
            raise Refused(pending.name.partition(" ")[0], status)
        return Reply(status, pending.data)

    async def ask(self, name: str, *arguments: bytes | str) -> Reply:
        """Send a command and wait for its end.

        Raises:
            Refused: NO or BAD.
            RemoteError: the connection is gone.
        """
        return await self.answer(await self.send(name, *arguments))

    async def stream(self, name: str, *arguments: bytes | str, bodies: bool = False) -> Stream:
        """Send a command whose answer is taken while it comes, bodies in pieces where it asks for some.

        Raises:
            RemoteError: the connection is gone.
        """
        inlet = Inlet(self, bodies=bodies)
        await self.send(name, *arguments, inlet=inlet)
        return Stream(name, inlet)

    # -- mailbox names ------------------------------------------------------------------------------

    def encoded(self, name: str) -> bytes:
        """A mailbox name as this server has it."""
        return imap.encode_name(name, utf8=self.utf8)

    def decoded(self, value: Value) -> str:
        """A mailbox name as people have it."""
        return imap.decode_name(imap.string(value), utf8=self.utf8)

    # -- beginning and end --------------------------------------------------------------------------

    async def greet(self) -> None:
        """Read the greeting, and encrypt where that is asked for.

        Raises:
            Permanent: no TLS where it must be, or a certificate that cannot be trusted.
            Temporary: the server does not want us now.
        """
        status = await self._greeting
        if status.word == "BYE":
            raise Temporary(f"{self.server.host} does not let us in: {said(status)}")
        if self.server.security != "starttls":
            return
        if status.word == "PREAUTH":  # it would go on in the clear (RFC 9051 §7.1.4)
            raise Permanent(f"{self.server.host} lets us in before TLS: somebody is in between.")
        if not self.capabilities:
            await self.ask("CAPABILITY")
        if "STARTTLS" not in self.capabilities:
            raise Permanent(f"{self.server.host} offers no STARTTLS.")
        try:
            await self.ask("STARTTLS")
        except Refused as error:
            text = f"{self.server.host} refuses STARTTLS: {said(error.status)}"
            raise (Temporary if is_temporary(error.status) else Permanent)(text) from None
        if not self._framer.is_between_lines:
            raise Permanent(f"{self.server.host} says something before TLS: somebody is in between.")
        # What an eavesdropper could have said counts for nothing (RFC 3501 §6.2.1).
        self.capabilities = frozenset()
        assert self._transport is not None
        transport = self._transport
        upgraded = await self._loop.start_tls(
            transport, self, _context(self.server), server_hostname=self.server.host
        )
        assert upgraded is not None
        self.connection_made(upgraded)

    async def log_in(self, secret: str, *, utf8: bool, compress: bool) -> None:
        """Log in and turn on what helps.

        Args:
            secret: password, or access token.
            utf8: ask for UTF8=ACCEPT.
            compress: ask for COMPRESS=DEFLATE.

        Raises:
            Permanent: the server knows the name and the secret and does not take them.
            Temporary: it takes nobody now.
        """
        if not self.capabilities:
            await self.ask("CAPABILITY")
        try:
            await self._authenticate(secret)
        except Refused as error:
            text = f"{self.server.host} refuses the log-in of {self.server.user}: {said(error.status)}"
            raise (Temporary if is_temporary(error.status) else Permanent)(text) from None
        await self.ask("CAPABILITY")
        if "ID" in self.capabilities:
            with contextlib.suppress(Refused):
                await self.ask("ID", '("name" "ksync-server")')
        if utf8 and {"ENABLE", "UTF8=ACCEPT"} <= self.capabilities:
            with contextlib.suppress(Refused):
                reply = await self.ask("ENABLE", "UTF8=ACCEPT")
                self.utf8 = any(
                    "UTF8=ACCEPT" in _capabilities(each.values) for each in reply.named("ENABLED")
                )
        if compress and "COMPRESS=DEFLATE" in self.capabilities:
            with contextlib.suppress(Refused):
                await self.ask("COMPRESS", "DEFLATE")
                self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
                self._deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)

    async def _authenticate(self, secret: str) -> None:
        user = self.server.user
        if self.server.mechanism == "xoauth2":
            await self._sasl("XOAUTH2", f"user={user}\x01auth=Bearer {secret}\x01\x01".encode())
        elif "AUTH=PLAIN" in self.capabilities and "SASL-IR" in self.capabilities:
            await self._sasl("PLAIN", f"\0{user}\0{secret}".encode())
        elif "LOGINDISABLED" not in self.capabilities:
            await self.ask("LOGIN", user.encode(), secret.encode())
        elif "AUTH=PLAIN" in self.capabilities:
            await self._sasl("PLAIN", f"\0{user}\0{secret}".encode())
        else:
            raise Permanent(f"{self.server.host} offers no way to log in that we know.")

    async def _sasl(self, mechanism: str, initial: bytes) -> None:
        """AUTHENTICATE with one answer of the client.

        Spec: RFC 3501 §6.2.2, RFC 4959, RFC 4616; an error of XOAUTH2 comes as a challenge, answered empty.
        """
        encoded = b64encode(initial).decode("ascii")
        pending = self.begin(f"AUTHENTICATE {mechanism}")
        if "SASL-IR" in self.capabilities:
            self.write(f" {encoded}".encode("ascii"))
            answers = [b""]
        else:
            answers = [encoded.encode("ascii"), b""]
        pending.continued = self._loop.create_future()
        self.write(b"\r\n")
        for answer in answers:
            await pending.continued
            if pending.answered.done():
                break
            pending.continued = self._loop.create_future()
            self.write(answer + b"\r\n")
        status = await pending.answered
        if status.word != "OK":
            raise Refused("AUTHENTICATE", status)

    async def close(self) -> None:
        """Say good-bye where that is possible, and end."""
        if self._error is None:
            with contextlib.suppress(RemoteError, TimeoutError):
                async with asyncio.timeout(2):
                    await self.ask("LOGOUT")
        self.abort()
        await asyncio.sleep(0)

    def abort(self) -> None:
        """End at once."""
        self._fail(Temporary("the connection is closed"))


def _go_on(pending: Pending) -> None:
    if pending.continued is not None and not pending.continued.done():
        pending.continued.set_result(None)


def _capabilities(found: Iterable[Value]) -> frozenset[str]:
    return frozenset(
        imap.string(each).decode("ascii", "replace").upper() for each in found if not isinstance(each, list)
    )


def _context(server: Server) -> ssl.SSLContext:
    """Certificates are always checked, the host's name included.

    Raises:
        Permanent: the file of trusted certificates cannot be used.
    """
    try:
        return ssl.create_default_context(cafile=server.ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise Permanent(f"{server.ca_file}: {error}") from None


class _Ends(Protocol):
    def abort(self) -> None: ...


@contextlib.contextmanager
def ending(what: _Ends, *, unless: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """A block that does not come to its end, for whatever reason, cancellation and a job's leaving included,
    ends what it works with: nobody would take the rest of the answers.

    Args:
        unless: with these somebody does.
    """
    try:
        yield
    except unless:
        raise
    except BaseException:
        what.abort()
        raise


async def connect(
    server: Server,
    secret: str,
    settings: configuration.MailImport,
    private_networks: Networks,
    *,
    utf8: bool = False,
) -> Connection:
    """A connection that is encrypted as asked, and logged in.

    Args:
        utf8: take messages with UTF-8 in their headers as they are (RFC 6855): other clients may be given a
            copy that was made plain. To give messages a server needs no such thing.

    Raises:
        Permanent: no such host, one that may not be reached, no TLS, a certificate that cannot be trusted, or
            a log-in that is refused.
        Temporary: the server does not answer, or does not want us now.
    """
    if server.security == "none" and not settings.plain:
        raise Permanent("A server may be asked without TLS only where mail_import.plain is set.")
    first: RemoteError | None = None
    for host in names(server.host):
        try:
            made, far = await _reached(replace(server, host=host), settings, private_networks)
        except Untrusted:
            raise
        except (Permanent, Temporary) as error:  # the next name, if there is one
            first = first or error
            continue
        with ending(made):
            await made.log_in(secret, utf8=utf8, compress=far)
        return made
    assert first is not None
    raise first


def names(host: str) -> tuple[str, ...]:
    """Hosts to try where a person may have typed a domain: that host first, then imap. and mail. of it."""
    if parse(host) is not None or "." not in host or host.lower().startswith(("imap.", "mail.")):
        return (host,)
    return host, f"imap.{host}", f"mail.{host}"


class Untrusted(Permanent):
    """The certificate is not the server's, or nobody we trust says so."""


async def _reached(
    server: Server, settings: configuration.MailImport, private_networks: Networks
) -> tuple[Connection, bool]:
    """A connection that is greeted, and whether it is far away."""
    loop = asyncio.get_running_loop()
    context = _context(server) if server.security == "tls" else None
    last: RemoteError | None = None
    for address in await outbound.addresses(server.host, server.port, private_networks):
        made = Connection(server, settings)
        began = loop.time()
        try:
            with ending(made):
                async with asyncio.timeout(settings.connect_timeout_s):
                    await loop.create_connection(
                        lambda made=made: made,
                        address,
                        server.port,
                        ssl=context,
                        server_hostname=server.host if context else None,
                    )
                    answered_s = loop.time() - began
                    await made.greet()
        except ssl.SSLCertVerificationError as error:
            raise Untrusted(f"{server.host} cannot be trusted: {error.verify_message}") from None
        except TimeoutError:
            last = Temporary(f"{server.host} does not answer within {settings.connect_timeout_s:.0f} s")
        except (OSError, ssl.SSLError) as error:
            last = Temporary(f"{server.host}: {error.strerror or error}")
        else:
            # On this machine compression costs more than it saves.
            return made, answered_s > _FAR_S and not is_loopback(address)
    assert last is not None
    raise last
