"""What runs in the processes that the supervisor forks: an event loop that serves HTTP, or the job loop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

import sqlalchemy as sa
import uvloop
from uvicorn.config import Config
from uvicorn.server import ServerState

from ksync_server import jobs
from ksync_server import log as logs
from ksync_server.app import Services, application, build, periodic
from ksync_server.connection import Connection, Limits
from ksync_server.errors import KsyncError
from ksync_server.metrics import CONTENT_TYPE, Metrics
from ksync_server.settings import Settings
from ksync_server.store import schema

log = logging.getLogger(__name__)

Asgi = Callable[[Any, Any, Any], Any]

_TICK_S = 1.0
_READY_S = 5.0  # a database that takes longer to answer is not ready
_FULL_PAUSE_S = 1.0  # no accepting for this long after the system ran out of files
_LONGEST_DRAIN_S = 86400.0  # of a worker that is being replaced: the longest upload or download
_MALLOC = ((-3, 8 << 20), (-1, 64 << 20), (-8, 2))  # mmap threshold, trim threshold, arenas
_ONE = sa.select(sa.literal(1))


@dataclass(frozen=True, slots=True)
class Task:
    """What one process is to do."""

    kind: str  # web or jobs
    settings: Settings
    listen: tuple[socket.socket, ...]
    admin: socket.socket | None
    answered: int  # descriptor: one byte is written here when the worker serves
    lifeline: int  # descriptor: its end is the end of the supervisor


class Listener:
    """Accepts on one shared socket, one connection per wake-up so that workers share the load."""

    def __init__(self, listener: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        self._socket = listener
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
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
            connection, _ = self._socket.accept()
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
        task = self._loop.create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:
            connection.close()


class WebWorker:
    """The event loop of one web process."""

    def __init__(self, task: Task, services: Services, app: Asgi, metrics: Metrics) -> None:
        self._task = task
        self._settings = task.settings.server
        self._state = ServerState()
        self._app = protocol_config(app)
        self._admin = protocol_config(Admin(services, metrics))
        self._metrics = metrics
        self._stop = asyncio.Event()
        self._at_once = True
        self._limits = Limits(
            self._settings.header_bytes,
            self._settings.header_timeout_s,
            self._settings.idle_timeout_s,
            self._settings.body_timeout_s,
        )
        self._listeners: list[Listener] = []

    async def serve(self) -> None:
        """Serve until a signal or the end of the supervisor, then drain."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave, True)
        loop.add_signal_handler(signal.SIGUSR1, self._leave, False)
        loop.add_reader(self._task.lifeline, self._leave, True)  # nothing ever comes on it but its end
        self._tick()
        self._listeners = [Listener(each, self._protocol) for each in self._task.listen]
        admin = [Listener(self._task.admin, self._admin_protocol)] if self._task.admin else []
        for listener in [*self._listeners, *admin]:
            listener.start()
        os.write(self._task.answered, b"1")
        os.close(self._task.answered)
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _TICK_S)
            self._tick()
        for listener in [*self._listeners, *admin]:
            listener.stop()
        self._listeners.clear()
        await self._drain()

    def _leave(self, at_once: bool) -> None:
        if at_once:
            asyncio.get_running_loop().remove_reader(self._task.lifeline)
        self._at_once = at_once
        self._stop.set()

    async def _drain(self) -> None:
        """Let what is under way end; a signal to stop cuts a long drain short."""
        began = time.monotonic()
        told: bool | None = None
        while self._state.connections or self._state.tasks:
            if told != self._at_once:
                told, began = self._at_once, time.monotonic()
                for connection in list(self._state.connections):
                    assert isinstance(connection, Connection)
                    connection.drain(at_once=told)
            allowed = self._settings.shutdown_timeout_s if self._at_once else _LONGEST_DRAIN_S
            if time.monotonic() - began > allowed:
                log.warning("requests cut off", extra={"requests": len(self._state.tasks)})
                break
            await asyncio.sleep(0.05)
            self._tick()

    def _tick(self) -> None:
        now = asyncio.get_running_loop().time()
        self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
        for connection in list(self._state.connections):
            assert isinstance(connection, Connection)
            connection.sweep(now)
        self._metrics.load(len(self._state.tasks), len(self._state.connections))

    def _protocol(self) -> asyncio.Protocol:
        # The one being made is not in the set yet; those being accepted at this moment may pass the cap.
        if len(self._state.connections) + 1 >= self._settings.connections:
            for listener in self._listeners:
                listener.stop()
        return Connection(self._app, self._state, self._limits, self._closed)

    def _admin_protocol(self) -> asyncio.Protocol:
        return Connection(self._admin, self._state, self._limits, self._closed)

    def _closed(self) -> None:
        if len(self._state.connections) < self._settings.connections:
            for listener in self._listeners:
                listener.start()


def protocol_config(app: Asgi) -> Config:
    """What uvicorn's protocol needs to know; sockets, signals and logging are ours."""
    config = Config(
        app,
        http=Connection,
        loop="none",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    config.load()
    return config


class Admin:
    """The admin address: for probes and Prometheus, never open to the world."""

    def __init__(self, services: Services, metrics: Metrics) -> None:
        self._services = services
        self._metrics = metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        status, kind, content = await self._answer(scope["method"], scope["path"])
        headers = [
            (b"content-type", kind.encode("ascii")),
            (b"content-length", str(len(content)).encode("ascii")),
            (b"cache-control", b"no-store"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _answer(self, method: str, path: str) -> tuple[int, str, bytes]:
        plain = "text/plain; charset=utf-8"
        if method not in ("GET", "HEAD"):
            return 405, plain, b"only GET\n"
        if path == "/healthz":
            return 200, plain, b"ok\n"
        if path == "/readyz":
            problem = await self._problem()
            return (503, plain, f"{problem}\n".encode()) if problem else (200, plain, b"ready\n")
        if path == "/metrics":
            loop = asyncio.get_running_loop()
            return 200, CONTENT_TYPE, await loop.run_in_executor(None, self._metrics.text)
        return 404, plain, b"/healthz, /readyz, /metrics\n"

    async def _problem(self) -> str | None:
        try:
            async with asyncio.timeout(_READY_S):
                await self._services.database.pooled(self._services.database.fast, _ONE)
        except (KsyncError, TimeoutError) as error:
            return f"database: {error or 'does not answer'}"
        folder = self._services.settings.blobs.path
        if not os.access(folder, os.W_OK | os.X_OK):
            return f"blobs.path: {folder} cannot be written"
        return None


def run_web(task: Task) -> None:
    """Serve HTTP until told to leave."""
    services = open_services(task.settings)
    app = application(services)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(task, services, app, app.metrics))
    app.close()
    services.close()


async def _serve(task: Task, services: Services, app: Asgi, metrics: Metrics) -> None:
    await WebWorker(task, services, app, metrics).serve()


def run_jobs(task: Task) -> None:
    """Run periodic work until told to leave."""
    services = open_services(task.settings)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())

    def watch() -> None:
        os.read(task.lifeline, 1)  # nothing ever comes but its end
        stop.set()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    os.write(task.answered, b"1")
    os.close(task.answered)
    jobs.Runner(services.database, periodic(services)).run(stop)
    services.close()


def open_services(settings: Settings) -> Services:
    """Services over a database of the current schema, the blobs folder made.

    Raises:
        ConfigError: an older or newer schema, or what `app.build` refuses.
    """
    services = build(settings)
    try:
        schema.require_current(services.database)
        settings.blobs.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except BaseException:
        services.close()
        raise
    return services


def work(task: Task) -> int:
    """Do a task until told to leave.

    Returns:
        0 after the work was ended on purpose, 1 when it could not begin.
    """
    logs.configure(task.settings.log)
    tune_memory()
    try:
        run_web(task) if task.kind == "web" else run_jobs(task)
    except (KsyncError, OSError) as error:
        print(f"ksync-server: {error}", file=sys.stderr)
        return 1
    return 0


def tune_memory() -> None:
    """Let glibc keep large blocks: it gives them back after each piece of an upload and asks for them again
    for the next one, which makes an upload 2 to 4 times dearer. Other C libraries have no such switch."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC:
            mallopt(option, value)
