"""Processes: a supervisor binds the sockets and keeps web workers and one job worker running on them.

    supervisor --+-- web worker    (event loop, every listening socket, the admin socket)
                 +-- web worker
                 +-- job worker    (periodic work by leases)

SIGTERM and SIGINT stop: no new connections, requests under way get `server.shutdown_timeout_s`. SIGHUP
reloads: the configuration is checked, new workers start on the same sockets, and the old ones drain only when
all of those answer. A worker that dies is started again. When the supervisor dies, however it does, all end.

Workers are forks of the supervisor, which has imported everything and runs no thread: a new one answers in
milliseconds instead of seconds, and all share the memory of the code.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ksync_server import log as logs
from ksync_server import worker
from ksync_server.errors import ConfigError
from ksync_server.settings import Settings

log = logging.getLogger(__name__)

Address = tuple[str, int]

_BACKLOG = 2048
_FILES = 65536  # open files a process may have, where the system allows it: connections and transfers
_STEADY_S = 10.0  # a worker that lived this long is started again at once
_LONGEST_PAUSE_S = 30.0
_START_S = 60.0  # a new worker has to answer within this
_MARGIN_S = 5.0  # what a worker gets on top of its own time-out before it is killed


@dataclass(frozen=True, slots=True)
class Bound:
    """Where the server listens, real port numbers included."""

    listen: tuple[Address, ...]
    admin: Address | None


def parse_listen(text: str) -> Address:
    """`host:port`, `[ipv6]:port` or `:port` (every address).

    Raises:
        ConfigError: anything else.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"{text!r} is not host:port")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ConfigError(f"{text!r}: an IPv6 address stands in brackets")
    return host.strip("[]") or "::", int(port)


def bind(address: Address) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the address cannot be used; says why.
    """
    host, port = address
    listener = None
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        listener.bind(place)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener


@dataclass(slots=True)
class _Child:
    kind: str  # web or jobs
    generation: int
    pid: int
    ready_pipe: int  # one byte comes when it answers; -1 once that is known
    lifeline: int  # closed by our end: how a worker learns that the supervisor is gone
    started: float
    ready: bool = False
    leaving: bool = False  # told to end
    code: int | None = None  # how it ended

    def has_ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def send(self, number: signal.Signals) -> None:
        if self.code is None:  # not waited for yet, so the number is still its own
            os.kill(self.pid, number)

    def close_pipes(self) -> None:
        for descriptor in (self.ready_pipe, self.lifeline):
            if descriptor >= 0:
                os.close(descriptor)


@dataclass(slots=True)
class _Sockets:
    listen: dict[Address, socket.socket] = field(default_factory=dict)
    admin: tuple[Address, socket.socket] | None = None

    def bound(self) -> Bound:
        admin = self.admin[1].getsockname()[:2] if self.admin else None
        return Bound(tuple(each.getsockname()[:2] for each in self.listen.values()), admin)

    def close(self) -> None:
        for each in [*self.listen.values(), *([self.admin[1]] if self.admin else [])]:
            each.close()


class Supervisor:
    """The process that operators see.

    Args:
        load: reads and checks the configuration; called at the start and on SIGHUP.
        metrics: folder of the counters that workers share.
        on_ready: called once, when every worker answers.
    """

    def __init__(
        self,
        load: Callable[[], Settings],
        metrics: Path,
        on_ready: Callable[[Bound], None] | None = None,
    ) -> None:
        self._load = load
        self._on_ready = on_ready
        self._settings = load()
        self._sockets = _Sockets()
        self._children: list[_Child] = []
        self._generation = 1
        self._failures = 0
        self._restarts: list[tuple[float, str]] = []  # when, kind
        self._reloading: Settings | None = None  # the settings that the new generation runs with
        self._stopping_since: float | None = None
        self._selector = selectors.DefaultSelector()
        self._metrics = metrics
        self._wake = (-1, -1)
        self._status = 0

    def run(self) -> int:
        """Serve until told to stop.

        Returns:
            0 after a stop that was asked for, 1 when the workers could not start.

        Raises:
            ConfigError: an address cannot be used.
        """
        self._wake = wake, waker = os.pipe()
        try:
            os.set_blocking(waker, False)
            os.set_blocking(wake, False)
            signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, lambda *_: None)
            self._selector.register(wake, selectors.EVENT_READ, None)
            _raise_file_limit()
            self._sockets = self._bind(self._settings, _Sockets())
            gc.collect()
            gc.freeze()  # what is imported stays in memory that all workers share
            self._spawn_all(self._settings)
            self._loop(wake)
        finally:
            for child in self._children:
                child.send(signal.SIGKILL)
            signal.set_wakeup_fd(-1)
            os.close(wake)
            os.close(waker)
            self._sockets.close()
            self._selector.close()
        return self._status

    # -- the loop ---------------------------------------------------------------------------------

    def _loop(self, wake: int) -> None:
        while self._children or self._restarts:
            for key, _ in self._selector.select(self._pause()):
                if key.data is None:
                    self._on_signals(os.read(wake, 4096))
                else:
                    self._on_ready_pipe(key.data)
            self._reap()
            self._check_times()

    def _pause(self) -> float:
        waits = [at - time.monotonic() for at, _ in self._restarts]
        return max(0.0, min([1.0, *waits]))

    def _on_signals(self, received: bytes) -> None:
        for number in received:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop()
            elif number == signal.SIGHUP:
                self._reload()

    def _on_ready_pipe(self, child: _Child) -> None:
        self._selector.unregister(child.ready_pipe)
        child.ready = bool(os.read(child.ready_pipe, 1))  # nothing: it died
        os.close(child.ready_pipe)
        child.ready_pipe = -1
        if not child.ready or child.leaving or self._stopping_since is not None:
            return
        current = [each for each in self._children if each.generation == self._generation]
        if not all(each.ready for each in current):
            return
        if self._on_ready is not None:
            self._on_ready(self._sockets.bound())
            self._on_ready = None
        if self._reloading is not None:
            self._settings, self._reloading = self._reloading, None
            for each in self._children:
                if each.generation != self._generation:
                    self._leave(each, signal.SIGUSR1)
            log.info("reloaded")

    def _reap(self) -> None:
        for child in [each for each in self._children if each.has_ended()]:
            self._children.remove(child)
            self._forget(child)
            if child.leaving or self._stopping_since is not None:
                continue
            log.error("worker ended", extra={"kind": child.kind, "pid": child.pid, "code": child.code})
            if self._reloading is not None and child.generation == self._generation:
                self._abandon_reload()
            elif self._on_ready is not None and not child.ready:
                self._status = 1  # the very first start failed: say so instead of trying for ever
                self._stop()
            else:
                self._restart_later(child)

    def _forget(self, child: _Child) -> None:
        if child.ready_pipe >= 0:
            self._selector.unregister(child.ready_pipe)
        child.close_pipes()
        for path in self._metrics.glob(f"gauge_live*_{child.pid}.db"):
            path.unlink(missing_ok=True)  # its counters stay in the sums

    def _restart_later(self, child: _Child) -> None:
        lived = time.monotonic() - child.started
        self._failures = 0 if lived > _STEADY_S else self._failures + 1
        pause = min(0.25 * 2**self._failures, _LONGEST_PAUSE_S) if self._failures else 0.0
        self._restarts.append((time.monotonic() + pause, child.kind))

    def _check_times(self) -> None:
        now = time.monotonic()
        if self._stopping_since is not None:
            if now - self._stopping_since > self._settings.server.shutdown_timeout_s + _MARGIN_S:
                for child in self._children:
                    child.send(signal.SIGKILL)
            return
        due = [entry for entry in self._restarts if entry[0] <= now]
        self._restarts = [entry for entry in self._restarts if entry[0] > now]
        for _, kind in due:
            self._spawn(kind, self._reloading or self._settings)
        for child in self._children:
            if not child.ready and not child.leaving and now - child.started > _START_S:
                log.error("worker does not answer", extra={"kind": child.kind, "pid": child.pid})
                child.send(signal.SIGKILL)

    # -- stopping and reloading -------------------------------------------------------------------

    def _leave(self, child: _Child, number: signal.Signals) -> None:
        child.leaving = True
        child.send(number)

    def _stop(self) -> None:
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
        self._restarts.clear()
        for child in self._children:
            self._leave(child, signal.SIGTERM)

    def _reload(self) -> None:
        """Start a new generation of workers; the old one leaves when all of it answers."""
        if self._reloading is not None or self._on_ready is not None or self._stopping_since is not None:
            return
        try:
            settings = self._load()
            sockets = self._bind(settings, self._sockets)
        except ConfigError as error:
            log.error("not reloaded", extra={"reason": str(error)})
            return
        self._sockets = sockets
        self._restarts.clear()
        self._generation += 1
        self._reloading = settings
        logs.configure(settings.log)
        self._spawn_all(settings)

    def _abandon_reload(self) -> None:
        log.error("not reloaded", extra={"reason": "a new worker could not start"})
        self._reloading = None
        for child in self._children:
            if child.generation == self._generation:
                self._leave(child, signal.SIGTERM)
        # What still serves is the current generation from now on.
        self._generation += 1
        for child in self._children:
            if not child.leaving:
                child.generation = self._generation

    def _bind(self, settings: Settings, old: _Sockets) -> _Sockets:
        """Sockets for the settings; open ones are kept, those no longer named are closed."""
        fresh = _Sockets()
        opened: list[socket.socket] = []
        try:
            for text in settings.server.listen:
                address = parse_listen(text)
                if address not in old.listen:
                    opened.append(bind(address))
                fresh.listen[address] = old.listen.get(address) or opened[-1]
            if settings.server.admin_listen:
                address = parse_listen(settings.server.admin_listen)
                if old.admin is None or old.admin[0] != address:
                    opened.append(bind(address))
                    fresh.admin = (address, opened[-1])
                else:
                    fresh.admin = old.admin
        except ConfigError:
            for each in opened:
                each.close()
            raise
        for address, listener in old.listen.items():
            if address not in fresh.listen:
                listener.close()
        if old.admin is not None and (fresh.admin is None or fresh.admin[0] != old.admin[0]):
            old.admin[1].close()
        return fresh

    # -- starting ---------------------------------------------------------------------------------

    def _spawn_all(self, settings: Settings) -> None:
        for _ in range(max(1, settings.server.workers)):
            self._spawn("web", settings)
        self._spawn("jobs", settings)

    def _spawn(self, kind: str, settings: Settings) -> None:
        ready, answered = os.pipe()
        lifeline, ours = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(ready)
            os.close(ours)
            os._exit(self._become_worker(kind, settings, answered, lifeline))
        os.close(answered)
        os.close(lifeline)
        child = _Child(kind, self._generation, pid, ready, ours, time.monotonic())
        self._children.append(child)
        self._selector.register(ready, selectors.EVENT_READ, child)

    def _become_worker(self, kind: str, settings: Settings, answered: int, lifeline: int) -> int:
        """In the forked process: let go of everything that is the supervisor's, then work.

        A worker that kept another one's lifeline would keep it alive beyond the supervisor.
        """
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closing terminal speaks to the supervisor
            for descriptor in self._wake:
                os.close(descriptor)
            self._selector.close()
            for child in self._children:
                child.close_pipes()
            sockets = self._sockets
            listen = tuple(sockets.listen.values()) if kind == "web" else ()
            admin = sockets.admin[1] if kind == "web" and sockets.admin else None
            return worker.work(worker.Task(kind, settings, listen, admin, answered, lifeline))
        except BaseException:  # nothing of the supervisor's may run in this process
            log.exception("worker failed")
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
