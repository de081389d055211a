"""The server itself: its switches, what it counts, and a thread with a loop of its own to run it in."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from conformance.imap_server.accounts import Account, Folder
from conformance.imap_server.faults import Order, Refusal, Rule
from conformance.imap_server.session import Session

# Each capability is a switch: what is not announced is not understood. LITERAL- replaces LITERAL+.
MODERN = frozenset(
    {
        *(
            "AUTH=PLAIN",
            "AUTH=XOAUTH2",
            "AUTH=OAUTHBEARER",
            "SASL-IR",
            "ID",
            "ENABLE",
            "COMPRESS=DEFLATE",
            "IDLE",
        ),
        *("NAMESPACE", "CHILDREN", "LIST-EXTENDED", "LIST-STATUS", "SPECIAL-USE", "CREATE-SPECIAL-USE"),
        *("STATUS=SIZE", "QUOTA", "APPENDLIMIT", "LITERAL+", "MULTIAPPEND", "UIDPLUS", "MOVE", "UNSELECT"),
        *("CONDSTORE", "QRESYNC", "ESEARCH", "UTF8=ACCEPT"),
    }
)
BASIC = frozenset({"AUTH=PLAIN"})  # IMAP4rev1 and nothing else
GMAIL = MODERN - {"LITERAL+", "MULTIAPPEND", "STATUS=SIZE", "CREATE-SPECIAL-USE", "QRESYNC"} | {
    "LITERAL-",
    "X-GM-EXT-1",
}


_USUAL = Order()
_RECEIVED = 256 << 10  # bytes that a socket holds unread


@dataclass(frozen=True, slots=True)
class Login:
    """An attempt to log in; `at_s` on the monotonic clock."""

    user: str
    at_s: float
    accepted: bool


@dataclass(slots=True)
class Statistics:
    """What happened since the start. Bytes are those on the wire inside TLS, after compression."""

    logins: list[Login] = field(default_factory=list)
    connections: int = 0
    most_connections: int = 0  # at one time
    commands: Counter[str] = field(default_factory=Counter)
    body_fetches: Counter[int] = field(
        default_factory=Counter
    )  # by gm_msgid; of a partial one its first piece
    body_bytes: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    appends: int = 0


class Server:
    """An IMAP server to hold a client against.

    Args:
        accounts: who may log in; without any, alice@example.org with an empty plain account.
        features: the capabilities, each a switch.
        tls: `implicit`, `starttls` (LOGIN is refused before it) or `none`.
        certificate: files of the certificate chain and the key, for TLS.
        rules: what goes wrong when; may be changed while the server runs.
        delay_s: pause before each command, as a distant server has.
        bytes_per_s: largest rate of what is sent on one connection.
        most_connections: further ones are greeted with BYE [LIMIT].
        append_limit: largest message in bytes taken by APPEND.
        refuse_append: asked about each uploaded message.
        keywords: `any` stores each; `refused` answers NO to an APPEND or a STORE with an unknown one; `dropped`
            leaves it out silently. Unless `any`, PERMANENTFLAGS has no `\\*`.
        known_keywords: keywords that are allowed whatever `keywords` says.
        order: unusual but legal answers.

    Attributes:
        violations: what the client did that the standard, or the care for a source, forbids.
        crashes: tracebacks of our own mistakes; `serving` raises them.
    """

    def __init__(
        self,
        *accounts: Account,
        features: Iterable[str] = MODERN,
        tls: Literal["none", "implicit", "starttls"] = "none",
        certificate: tuple[Path, Path] | None = None,
        rules: Sequence[Rule] = (),
        delay_s: float = 0,
        bytes_per_s: float | None = None,
        most_connections: int | None = None,
        append_limit: int | None = None,
        refuse_append: Refusal | None = None,
        keywords: Literal["any", "refused", "dropped"] = "any",
        known_keywords: Iterable[str] = (),
        order: Order = _USUAL,
    ) -> None:
        self.accounts = {account.user: account for account in accounts or (Account(),)}
        self.features = frozenset(features)
        self.tls = tls
        self.context: ssl.SSLContext | None = None
        if tls != "none":
            assert certificate, "TLS needs a certificate"
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(*certificate)
        self.rules = list(rules)
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self.most_connections = most_connections
        self.append_limit = append_limit
        self.refuse_append = refuse_append
        self.keywords = keywords
        self.known_keywords = frozenset(known_keywords)
        self.order = order
        self.statistics = Statistics()
        self.violations: list[str] = []
        self.crashes: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._sessions: set[asyncio.Task[None]] = set()

    @property
    def account(self) -> Account:
        """The first account."""
        return next(iter(self.accounts.values()))

    @property
    def folders(self) -> dict[str, Folder]:
        """Folders of the first account, by decoded full name."""
        return self.account.folders

    def login(self, account: Account | None, user: str) -> Account | None:
        """Count an attempt to log in.

        Returns:
            The account as given: None is a refusal.
        """
        self.statistics.logins.append(Login(user, time.monotonic(), account is not None))
        return account

    async def run(self, started: threading.Event, ports: list[int], port: int = 0) -> None:
        """Serve until `stop`, on loopback only."""
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        context = self.context if self.tls == "implicit" else None
        listener = await asyncio.start_server(self._accept, "127.0.0.1", port, ssl=context, backlog=1024)
        # A server that stalls must not have in its socket what it has not read: accepted ones are like this one.
        listener.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVED)
        ports.append(listener.sockets[0].getsockname()[1])
        started.set()
        try:
            await self._stop.wait()
        finally:
            listener.close()
            for session in self._sessions:
                session.cancel()
            await asyncio.gather(*self._sessions, return_exceptions=True)

    def stop(self) -> None:
        """End `run` and every connection, from any thread."""
        if self._loop and self._stop:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stop.set)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._sessions.add(task)
        self.statistics.connections += 1
        self.statistics.most_connections = max(self.statistics.most_connections, len(self._sessions))
        full = self.most_connections is not None and len(self._sessions) > self.most_connections
        session = Session(self, reader, writer)
        try:
            if full:
                await session.untagged("BYE [LIMIT] Too many simultaneous connections")
                await session.wire.close()
            else:
                await session.run()
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError, asyncio.CancelledError):
            pass  # the client's or the rules' doing
        except Exception:  # our own mistake is no finding about the client: `serving` raises it
            self.crashes.append(traceback.format_exc())
        finally:
            session.wire.abort()
            self._sessions.discard(task)


@contextlib.contextmanager
def serving(server: Server, port: int = 0) -> Iterator[int]:
    """Run a server in a thread of its own.

    Yields:
        The port on 127.0.0.1.

    Raises:
        RuntimeError: the server itself broke, which is no finding about the client.
    """
    started, ports = threading.Event(), list[int]()

    def run() -> None:
        try:
            asyncio.run(server.run(started, ports, port))
        finally:
            started.set()

    thread = threading.Thread(target=run, name="imap-server", daemon=True)
    thread.start()
    started.wait(10)
    if not ports:
        raise RuntimeError("the IMAP server did not start")
    try:
        yield ports[0]
    finally:
        server.stop()
        thread.join(10)
    if server.crashes:
        raise RuntimeError("the IMAP server broke:\n" + "\n".join(server.crashes))
