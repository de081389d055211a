"""One connection to an IMAP server: TLS, log-in, pipelined commands, bodies that are never held whole.

Answers are matched to commands by tag; untagged data go to the oldest command that asks for such, what is
said of messages to the listener of the oldest that fetches, as it comes: who asks for much bounds it. Some
servers (Dovecot) work on several commands at once: data of a later one may come before the answer to an
earlier one, and FETCH commands under way share one listener and tell messages apart by UID (RFC 3501 §5.5).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import zlib
from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, cast

from ksync_server import settings as configuration
from ksync_server.errors import BadRequest, KsyncError, Permanent, RemoteError, Temporary
from ksync_server.mailimport.listening import Listener
from ksync_server.mailimport.servers import Refused, Server, is_temporary, said
from ksync_server.wire import imap
from ksync_server.wire.imap import Body, Continue, Data, Fetched, Status, Value

_UNSENT = 256 << 10  # bytes that wait to be sent, in the process and in its socket
_READ = 64 << 10  # asked of zlib at once
_SMALL_LITERAL = 4096  # LITERAL- (RFC 7888 §5)
_OPENS = ("SELECT", "EXAMINE")
_ASKERS = {  # untagged data that we look at, and which commands they answer
    "ENABLED": ("ENABLE",),
    "EXISTS": _OPENS,
    "LIST": ("LIST",),
    "NAMESPACE": ("NAMESPACE",),
    "QUOTA": ("GETQUOTAROOT",),
    "STATUS": ("STATUS", "LIST"),
    "[COPYUID]": ("UID COPY",),
    "[HIGHESTMODSEQ]": _OPENS,
    "[PERMANENTFLAGS]": _OPENS,
    "[UIDNEXT]": _OPENS,
    "[UIDVALIDITY]": _OPENS,
}
_OF_A_MESSAGE = (memoryview, Fetched, Body)
_ANSWERS = 10_000_000  # to one command: a folder has fewer messages, and a server that never ends is left
_HELD_ANSWERS = 250_000  # the same where they are kept until the end
_WATCH_S = 1.0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a command came to: the tagged answer and the untagged data before it."""

    status: Status
    data: list[Data]

    def named(self, name: str) -> list[Data]:
        """Untagged data of one kind."""
        return [each for each in self.data if each.name == name]


@dataclass(slots=True)
class Pending:
    """A command that is sent and not answered."""

    tag: str
    name: str
    answered: asyncio.Future[Status]
    data: list[Data] = field(default_factory=list)
    listener: Listener | None = None
    answers: int = 0  # untagged, so far
    continued: asyncio.Future[None] | None = None  # done once the server waits for more, or has answered

    def count(self, most: int) -> None:
        """One more answer.

        Raises:
            BadRequest: more than there may be.
        """
        self.answers += 1
        if self.answers > most:
            raise BadRequest(f"more than {most} answers to {self.name}")


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
        self._answers = imap.Answers(line_bytes=settings.line_bytes)
        self._fetching: Pending | None = None  # the oldest command that has a listener
        self._pending: deque[Pending] = deque()
        self._greeting: asyncio.Future[Status] = self._loop.create_future()
        self._turn = asyncio.Lock()  # of writing
        self._error: RemoteError | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._inflate: zlib._Decompress | None = None
        self._deflate: zlib._Compress | None = None
        self._unsent: list[bytes | memoryview] = []
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
                self._unpack(self._inflate, data)
        except (BadRequest, zlib.error) as error:
            self._fail(Temporary(f"{self.server.host} speaks no IMAP: {error}"))

    def _unpack(self, inflate: zlib._Decompress, data: bytes) -> None:
        """Read piece by piece, so that little input never becomes much memory."""
        while self._error is None:
            unpacked = inflate.decompress(data, _READ)
            data = inflate.unconsumed_tail
            self._read(unpacked)
            if len(unpacked) < _READ:
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
        for each in self._answers.feed(data):
            if isinstance(each, _OF_A_MESSAGE):
                if (pending := self._fetching) is not None:
                    self._tell(pending, each)
                elif not isinstance(each, memoryview):
                    self._count()  # nobody asked
            else:
                self._count()
                self._answer(each)
            if self._error is not None:
                return

    def _count(self) -> None:
        """What no listener is told: a server that never comes to the answer is left."""
        if self._pending:
            oldest = self._pending[0]
            oldest.count(_HELD_ANSWERS if oldest.listener is None else _ANSWERS)

    def _tell(self, pending: Pending, each: memoryview | Fetched | Body) -> None:
        """What is said of a message is for the oldest command that fetches."""
        listener = pending.listener
        assert listener is not None
        try:
            if isinstance(each, Fetched):
                pending.count(_ANSWERS)
                listener.fetched(each)
            elif isinstance(each, Body):
                listener.begins(each.size, each.uid)
            else:
                listener.piece(each)
        except (KsyncError, OSError) as error:
            self._fail(Temporary(f"{self.server.host}: {error}"), listener, error)

    def _answer(self, response: Status | Data | Continue) -> None:
        if isinstance(response, Continue):
            for pending in self._pending:  # one at most waits for it: the last one
                _go_on(pending)
        elif isinstance(response, Data):
            if response.name == "CAPABILITY":
                self.capabilities = _capabilities(response.values)
            if response.name == "EXPUNGE" and self._fetching is not None:
                assert self._fetching.listener is not None
                self._fetching.listener.expunged(response.number or 0)
            else:
                self._keep(response)
        elif response.tag:
            self._tagged(response)
        else:
            self._untagged(response)

    def _tagged(self, status: Status) -> None:
        for pending in self._pending:
            if pending.tag == status.tag:
                break
        else:
            raise BadRequest(f"an answer to {status.tag}, which was not asked")
        self._pending.remove(pending)
        self._turn_to_the_oldest()
        if pending.listener is None and self._fetching is not None and self._fetching is self._pending[0]:
            self._since, self._heard_bytes = self._loop.time(), self.received  # its answer begins now
        if status.code == "CAPABILITY":
            self.capabilities = _capabilities(status.arguments)
        if not pending.answered.done():
            pending.answered.set_result(status)
        if pending.listener is not None:
            pending.listener.answered(pending.tag, status)
        _go_on(pending)  # refused before its literal: the waiter looks at the answer

    def _untagged(self, status: Status) -> None:
        if status.code == "CAPABILITY":
            self.capabilities = _capabilities(status.arguments)
        if not self._greeting.done():
            self._greeting.set_result(status)
        elif status.word == "BYE":
            self._fail(Temporary(f"{self.server.host} ends the connection: {said(status)}"))
        elif status.code:
            self._keep(Data(f"[{status.code}]", None, list(status.arguments)))

    def _keep(self, data: Data) -> None:
        """For the oldest command that asks for such."""
        askers = _ASKERS.get(data.name)
        if askers is not None:
            for pending in self._pending:
                if pending.name.startswith(askers):
                    pending.count(_HELD_ANSWERS)
                    pending.data.append(data)
                    return

    def _turn_to_the_oldest(self) -> None:
        """Say who fetches."""
        fetching = (pending for pending in self._pending if pending.listener is not None)
        self._fetching = next(fetching, None)
        listener = None if self._fetching is None else self._fetching.listener
        self._answers.expects_bodies = listener is not None and listener.bodies

    def _look(self) -> None:
        """Notice a server that says nothing, or next to nothing."""
        self._watch = self._loop.call_later(_WATCH_S, self._look)
        if not self._pending:
            self._heard = self._loop.time()
            self._since, self._heard_bytes = self._heard, self.received
            return
        now = self._loop.time()
        patience = self._settings.timeout_s
        if now - self._heard > patience:
            self._fail(Temporary(f"{self.server.host} has said nothing for {patience:.0f} s"))
        elif now - self._since > patience:
            few = self.received - self._heard_bytes < self._settings.slowest_bytes_s * patience
            if few and self._pending[0] is self._fetching:
                self._fail(Temporary(f"{self.server.host} sends next to nothing: it throttles"))
            self._since, self._heard_bytes = now, self.received

    def _fail(
        self, error: RemoteError, listener: Listener | None = None, reason: Exception | None = None
    ) -> None:
        """End. `reason`: what the commands of a listener are told instead."""
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
            told: Exception = self._error
            if reason is not None and pending.listener is listener:
                told = reason
            if not pending.answered.done():
                pending.answered.set_exception(told)
                pending.answered.exception()  # whoever waits gets it; nobody may
            if pending.listener is not None:
                pending.listener.failed(told)
        self._turn_to_the_oldest()

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
        """Add bytes to what `flush` sends: each call to the system makes a packet, and work for the server.

        Raises:
            RemoteError: the connection is gone.
        """
        if self._error is not None:
            raise self._error
        self._unsent.append(data)

    def flush(self) -> None:
        """Send what was written, and what a compressor still holds."""
        unsent, self._unsent = self._unsent, []
        if self._error is not None or self._transport is None:
            return
        if (deflate := self._deflate) is not None:
            unsent = [*map(deflate.compress, unsent), deflate.flush(zlib.Z_SYNC_FLUSH)]
        self._transport.writelines(unsent)

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

    def begin(self, name: str, listener: Listener | None = None) -> Pending:
        """Start a command line by its tag and name, inside of `writing` where there may be others."""
        self.commands += 1
        pending = Pending(f"k{self.commands}", name, self._loop.create_future(), listener=listener)
        self.write(f"{pending.tag} {name}".encode("ascii"))
        if not self._pending:
            self._heard = self._since = self._loop.time()
            self._heard_bytes = self.received
        self._pending.append(pending)
        if self._fetching is None and listener is not None:
            self._turn_to_the_oldest()
        return pending

    async def literal(self, size: int, pending: Pending) -> bool:
        """Announce a literal; True when its bytes may be sent, False where the command was refused instead.

        Raises:
            RemoteError: the connection is gone.
        """
        if "LITERAL+" in self.capabilities or ("LITERAL-" in self.capabilities and size <= _SMALL_LITERAL):
            self.write(b" {%d+}\r\n" % size)
            return True
        pending.continued = self._loop.create_future()
        self.write(b" {%d}\r\n" % size)
        self.flush()
        await pending.continued
        return not pending.answered.done()

    async def send(self, name: str, *arguments: bytes | str, listener: Listener | None = None) -> Pending:
        """Send a command without waiting for its answer.

        Args:
            arguments: str as it is; bytes as a string, quoted or as a literal.

        Raises:
            RemoteError: the connection is gone.
        """
        async with self.writing():
            pending = self.begin(name, listener)
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

    async def fetch(self, listener: Listener, name: str, *arguments: bytes | str) -> None:
        """Send a command and wait until its listener was told everything.

        Raises:
            Refused: NO or BAD.
            RemoteError: the connection is gone.
            Exception: what the listener raised; the connection is gone too.
        """
        with ending(self, unless=(Refused,)):  # nobody would listen to the rest
            await self.answer(await self.send(name, *arguments, listener=listener))

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
        if not self._answers.is_between_lines:
            raise Permanent(f"{self.server.host} says something before TLS: somebody is in between.")
        # What an eavesdropper could have said counts for nothing (RFC 3501 §6.2.1).
        self.capabilities = frozenset()
        assert self._transport is not None
        transport = self._transport
        upgraded = await self._loop.start_tls(
            transport, self, self.server.context(), server_hostname=self.server.host
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
        if self.server.mechanism != "password":
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
        self.flush()
        for answer in answers:
            await pending.continued
            if pending.answered.done():
                break
            pending.continued = self._loop.create_future()
            self.write(answer + b"\r\n")
            self.flush()
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
