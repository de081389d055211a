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

from ksync_server import log as logs
from ksync_server.app import App, Services, application, build
from ksync_server.auth.memory import Memory
from ksync_server.background import handlers, periodic
from ksync_server.connection import Connection, Crowd, Limits
from ksync_server.disk import Disk
from ksync_server.errors import ConfigError, KsyncError
from ksync_server.listener import Arrivals, Entrance, Listener
from ksync_server.mail import sender as mail
from ksync_server.mail.dovecot import Bridge
from ksync_server.metrics import CONTENT_TYPE, Metrics
from ksync_server.networks import Networks
from ksync_server.runner import Runner
from ksync_server.settings import Settings
from ksync_server.store import schema
from ksync_server.store.blobs import open_extents
from ksync_server.tls import Certificates
from ksync_server.wire.proxy import Origin

log = logging.getLogger(__name__)

Asgi = Callable[[Any, Any, Any], Any]

_TICK_S = 1.0
_READY_S = 5.0  # a database that takes longer to answer is not ready
_LONGEST_DRAIN_S = 86400.0  # of a worker that is being replaced: the longest upload or download
_MALLOC = ((-3, 8 << 20), (-1, 64 << 20), (-8, 2))  # mmap threshold, trim threshold, arenas
_ONE = sa.select(sa.literal(1))


@dataclass(frozen=True, slots=True)
class Task:
    """What one process is to do."""

    kind: str  # web, jobs or mail
    settings: Settings
    memory: Memory  # of good account passwords, the same for all workers
    listen: tuple[socket.socket, ...]
    listen_tls: tuple[socket.socket, ...]
    certificates: Certificates | None
    admin: socket.socket | None
    answered: int  # descriptor: one byte is written here when the worker serves
    lifeline: int  # descriptor: its end is the end of the supervisor
    outlived: bool = False  # the sockets stay open when the program ends: another start serves what waits


class WebWorker:
    """The event loop of one web process."""

    def __init__(self, task: Task, services: Services, app: App) -> None:
        self._task = task
        self._settings = task.settings.server
        self._state = ServerState()
        self._app = protocol_config(app)
        self._admin = protocol_config(Admin(services, app.metrics, app.disk))
        self._metrics = app.metrics
        self._disk = app.disk
        self._crowd = Crowd(
            self._settings.address_connections,
            Networks("server.trusted_proxies", self._settings.trusted_proxies),
        )
        self._stop = asyncio.Event()
        self._at_once = True
        self._limits = Limits(
            self._settings.header_bytes,
            self._settings.header_timeout_s,
            self._settings.idle_timeout_s,
            self._settings.body_timeout_s,
        )
        self._arrivals = Arrivals(self._balance)
        self._listeners: list[Listener] = []

    async def serve(self) -> None:
        """Serve until a signal or the end of the supervisor, then drain."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave, True)
        loop.add_signal_handler(signal.SIGUSR1, self._leave, False)
        loop.add_reader(self._task.lifeline, self._leave, True)  # nothing ever comes on it but its end
        self._tick()
        self._listeners = [
            Listener(each, self._protocol, self._entrance(certificates), self._arrivals)
            for sockets, certificates in (
                (self._task.listen, None),
                (self._task.listen_tls, self._task.certificates),
            )
            for each in sockets
        ]
        admin = []
        if self._task.admin:
            admin.append(Listener(self._task.admin, self._admin_protocol, None, self._arrivals))
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

    def _entrance(self, certificates: Certificates | None) -> Entrance:
        return Entrance(
            certificates,
            Networks("server.proxy_protocol", self._settings.proxy_protocol),
            self._settings.handshakes,
            self._settings.handshake_timeout_s,
            self._settings.header_bytes,
        )

    async def _drain(self) -> None:
        """Let what is under way end, handshakes too; a signal to stop cuts a long drain short."""
        began = time.monotonic()
        leaving: bool | None = None
        told: set[Connection] = set()
        while self._state.connections or self._state.tasks or self._arrivals:
            if leaving != self._at_once:
                leaving, began = self._at_once, time.monotonic()
                told.clear()
            for connection in self._state.connections - told:
                assert isinstance(connection, Connection)
                told.add(connection)
                connection.drain(at_once=leaving and not self._task.outlived)
            allowed = self._settings.shutdown_timeout_s if leaving else _LONGEST_DRAIN_S
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
        if self._task.certificates is not None:
            self._task.certificates.look()  # the supervisor looks too, and says in the log what it saw
        full = self._disk.look()
        self._metrics.load(len(self._state.tasks), len(self._state.connections))
        self._metrics.disk(self._disk.free, full)

    def _protocol(self, origin: Origin | None) -> asyncio.Protocol:
        return Connection(
            self._app, self._state, self._limits, self._balance, origin=origin, crowd=self._crowd
        )

    def _admin_protocol(self, origin: Origin | None) -> asyncio.Protocol:
        return Connection(self._admin, self._state, self._limits, self._balance)

    def _balance(self) -> None:
        """Accept while there is room; what is accepted and not yet HTTP's has its place too."""
        full = len(self._state.connections) + len(self._arrivals) >= self._settings.connections
        for listener in self._listeners:
            listener.stop() if full else listener.start()


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

    def __init__(self, services: Services, metrics: Metrics, disk: Disk) -> None:
        self._services = services
        self._metrics = metrics
        self._disk = disk

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
            if problem:
                return 503, plain, f"{problem}\n".encode()
            # Still ready: nobody else has more room on the same disk, and phones go on reading.
            full = self._disk.look()
            rest = f", but the disk of the {full} is nearly full" if full else ""
            return 200, plain, f"ready{rest}\n".encode()
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
        try:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(_READY_S):
                return await loop.run_in_executor(None, self._services.blobs.extents.problem)
        except TimeoutError:
            return "bytes: the store does not answer"


def run_web(task: Task) -> None:
    """Serve HTTP until told to leave."""
    services = open_services(task.settings, task.memory)
    app = application(services)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(task, services, app))
    app.close()
    services.close()


async def _serve(task: Task, services: Services, app: App) -> None:
    await WebWorker(task, services, app).serve()


def run_jobs(task: Task) -> None:
    """Run periodic work and queued jobs until told to leave."""
    services = open_services(task.settings, task.memory)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())

    def watch() -> None:
        os.read(task.lifeline, 1)  # nothing ever comes but its end
        stop.set()

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    os.write(task.answered, b"1")
    os.close(task.answered)
    if not task.settings.mail.relay:
        log.warning(mail.NOBODY_IS_TOLD)
    with contextlib.closing(mail.Relay(task.settings.mail)) as relay:
        work = handlers(services, relay)
        Runner(services.database, periodic(services), work, task.settings.jobs).run(stop)
    services.close()


def run_mail(task: Task) -> None:
    """Answer Dovecot until told to leave."""
    services = open_services(task.settings, task.memory)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_answer_dovecot(task, services))
    services.close()


async def _answer_dovecot(task: Task, services: Services) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        loop.add_signal_handler(number, stop.set)

    def alone() -> None:
        loop.remove_reader(task.lifeline)
        stop.set()

    loop.add_reader(task.lifeline, alone)  # nothing ever comes on it but its end
    bridge = Bridge(services.settings.mail, services.database, services.gate)
    await bridge.start(task.listen[0])
    os.write(task.answered, b"1")
    os.close(task.answered)
    await stop.wait()
    await bridge.close()


def open_services(settings: Settings, memory: Memory | None = None) -> Services:
    """Services over a database of the current schema, the blobs folder made.

    Raises:
        ConfigError: an older or newer schema, or what `app.build` refuses.
    """
    services = build(settings, memory)
    try:
        schema.require_current(services.database)
        settings.blobs.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except BaseException:
        services.close()
        raise
    return services


def check_store(settings: Settings) -> None:
    """Try the store of bytes once before anything serves; S3 alone is worth it.

    In a process of its own: threads of obstore's would be missing in the workers that are forked later.

    Raises:
        ConfigError: bucket, credentials or address do not work; says why.
    """
    if not settings.s3.bucket:
        return
    answers, asks = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(answers)
        try:
            open_extents(settings).check()
        except ConfigError as error:
            os.write(asks, str(error).encode()[:4000])
        finally:
            os._exit(0)
    os.close(asks)
    with open(answers, "rb") as pipe:
        problem = pipe.read().decode(errors="replace")
    os.waitpid(pid, 0)
    if problem:
        raise ConfigError(problem)


def work(task: Task) -> int:
    """Do a task until told to leave.

    Returns:
        0 after the work was ended on purpose, 1 when it could not begin.
    """
    logs.configure(task.settings.log)
    tune_memory()
    try:
        {"web": run_web, "jobs": run_jobs, "mail": run_mail}[task.kind](task)
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
