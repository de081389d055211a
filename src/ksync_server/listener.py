"""Accepting: a shared socket, the PROXY header, the TLS handshake; then the connection is HTTP's.

Whoever has not come through PROXY header and handshake may be kept waiting for `server.handshake_timeout_s`,
and only `server.handshakes` at once; then the one that has waited longest is let go, so that peers who stall
keep out nobody who is quick.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass

from ksync_server.errors import BadRequest
from ksync_server.networks import Networks
from ksync_server.tls import Certificates
from ksync_server.wire.proxy import Origin, Reader

log = logging.getLogger(__name__)

Protocol = Callable[[Origin | None], asyncio.Protocol]

_FULL_PAUSE_S = 1.0  # no accepting for this long after the system ran out of files


@dataclass(frozen=True, slots=True)
class Entrance:
    """What a connection has to do before it may speak HTTP; the settings of `[server]` by their names."""

    certificates: Certificates | None
    proxies: Networks  # server.proxy_protocol
    handshakes: int
    handshake_timeout_s: float
    header_bytes: int


class Arrivals:
    """Connections of one process that are accepted and not yet HTTP's, the oldest first."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._tasks: dict[asyncio.Task[None], bool] = {}  # whether it may be let go
        self._on_change = on_change
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: asyncio.Task[None], most: int | None) -> None:
        """Keep a task until it ends; with `most` let the oldest go when there are more of its kind."""
        self._tasks[task] = most is not None
        task.add_done_callback(self._forget)
        waiting = [each for each, may_go in self._tasks.items() if may_go] if most is not None else []
        if most is not None and len(waiting) > most:
            self.dropped += 1
            waiting[0].cancel()
        self._on_change()

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._on_change()


class Listener:
    """Accepts on one shared socket, one connection per wake-up so that workers share the load."""

    def __init__(
        self, listener: socket.socket, protocol: Protocol, entrance: Entrance | None, arrivals: Arrivals
    ) -> None:
        self._socket = listener
        self._protocol = protocol
        self._entrance = entrance  # None: the admin address
        self._arrivals = arrivals
        self._loop = asyncio.get_running_loop()
        self._open = False

    def start(self) -> None:
        """Accept from now on."""
        if not self._open:
            self._open = True
            self._loop.add_reader(self._socket.fileno(), self._accept)

    def stop(self) -> None:
        """Leave further connections in the backlog, for this worker later or for another one now."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket.fileno())

    def _accept(self) -> None:
        try:
            connection, place = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another worker was quicker
        except OSError as error:
            log.error("cannot accept", extra={"reason": str(error)})
            self.stop()
            self._loop.call_later(_FULL_PAUSE_S, self.start)
            return
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        entrance = self._entrance
        proxied = entrance is not None and place[0] in entrance.proxies
        waits = entrance is not None and (proxied or entrance.certificates is not None)
        task = self._loop.create_task(self._serve(connection, proxied))
        self._arrivals.add(task, entrance.handshakes if entrance is not None and waits else None)

    async def _serve(self, connection: socket.socket, proxied: bool) -> None:
        """Hand a connection to HTTP, or close it without a word."""
        entrance = self._entrance
        try:
            origin = None
            if entrance is not None and proxied:
                async with asyncio.timeout(entrance.handshake_timeout_s):
                    origin = await _read_origin(self._loop, connection, entrance.header_bytes)
            if entrance is None or entrance.certificates is None:
                await self._loop.connect_accepted_socket(lambda: self._protocol(origin), connection)
            else:
                await self._loop.connect_accepted_socket(
                    lambda: self._protocol(origin),
                    connection,
                    ssl=entrance.certificates.context,
                    ssl_handshake_timeout=entrance.handshake_timeout_s,
                )
        except (OSError, BadRequest):  # a failed handshake and a time-out are OSErrors
            connection.close()
        except asyncio.CancelledError:
            connection.close()
            raise


async def _read_origin(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, limit: int
) -> Origin | None:
    """The PROXY header of a connection, and not a byte of what follows it."""
    reader = Reader(limit)
    while not reader.done:
        await _readable(loop, connection)
        try:
            seen = connection.recv(reader.wants, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            continue
        if not seen:
            raise ConnectionResetError
        connection.recv(reader.take(seen))
    return reader.origin


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    ready = loop.create_future()
    descriptor = connection.fileno()
    loop.add_reader(descriptor, lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
