"""Processes: a supervisor binds the sockets and keeps web workers and one job worker running on them.

    supervisor --+-- web worker    (event loop, every listening socket, the admin socket)
                 +-- web worker
                 +-- job worker    (periodic work by leases)
                 +-- mail worker   (Dovecot's log-ins, where `mail.dovecot_socket` is set)

SIGTERM and SIGINT stop: no new connections, requests under way get `server.shutdown_timeout_s`. SIGHUP
reloads: the configuration is checked, new workers start on the same sockets, and the old ones drain only when
all of those answer. A worker that dies is started again. When the supervisor dies, however it does, all end.

Sockets that systemd opened (LISTEN_FDS) are used where their address is one of the configuration's. They
outlive this program, so that even a restart refuses nobody: who comes in between waits in their backlog.

Workers are forks of the supervisor, which has imported everything and runs no thread: a new one answers in
milliseconds instead of seconds, and all share the memory of the code.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksync_server import log as logs
from ksync_server import worker
from ksync_server.auth.memory import Memory
from ksync_server.errors import ConfigError
from ksync_server.mail import dovecot
from ksync_server.settings import Settings
from ksync_server.tls import Certificates

log = logging.getLogger(__name__)

Address = tuple[str, int]

_BACKLOG = 2048
_FIRST_INHERITED = 3  # SD_LISTEN_FDS_START
_FILES = 65536  # open files a process may have, where the system allows it: connections and transfers
_STEADY_S = 10.0  # a worker that lived this long is started again at once
_LONGEST_PAUSE_S = 30.0
_START_S = 60.0  # a new worker has to answer within this
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
_MARGIN_S = 5.0  # what a worker gets on top of its own time-out before it is killed


@dataclass(frozen=True, slots=True)
class Bound:
    """Where the server listens, real port numbers included."""

    listen: tuple[Address, ...]
    listen_tls: tuple[Address, ...]
    admin: Address | None


def show(address: Address) -> str:
    """`host:port` or `[ipv6]:port`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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
    listener = None
    try:
        family, kind, protocol, _, place = _resolve(address)
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if address[0] == "::" else 1)
        listener.bind(place)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"cannot listen on {show(address)}: {error.strerror or error}") from None
    return listener


def _resolve(address: Address) -> Any:
    host, port = address
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]


def inherited() -> tuple[socket.socket, ...]:
    """Listening sockets that systemd, or whoever started us, has opened (sd_listen_fds(3)).

    The variables are taken out of the environment: they are meant for this process alone.
    """
    meant_for = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if meant_for != str(os.getpid()) or not count.isdigit():
        return ()
    found = []
    for descriptor in range(_FIRST_INHERITED, _FIRST_INHERITED + int(count)):
        os.set_inheritable(descriptor, False)
        each = socket.socket(fileno=descriptor)
        if each.type == socket.SOCK_STREAM and each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            each.setblocking(False)
            found.append(each)
    return tuple(found)


def notify(state: str) -> None:
    """Tell systemd how we are (sd_notify(3)); nobody else listens."""
    place = os.environ.get("NOTIFY_SOCKET", "")
    if not place:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker, contextlib.suppress(OSError):
        speaker.sendto(state.encode(), "\0" + place[1:] if place.startswith("@") else place)


@dataclass(slots=True)
class _Child:
    kind: str  # web, jobs or mail
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


class _Sockets:
    """Every listening socket by its setting (`listen`, `listen_tls`, `admin_listen`, `dovecot_socket`) and
    address; of the last one, a path and 0."""

    def __init__(self, given: tuple[socket.socket, ...] = ()) -> None:
        self._given = given
        self._open: dict[tuple[str, Address], socket.socket] = {}

    def of(self, setting: str) -> tuple[socket.socket, ...]:
        return tuple(each for (name, _), each in self._open.items() if name == setting)

    def bound(self) -> Bound:
        def addresses(setting: str) -> tuple[Address, ...]:
            return tuple(each.getsockname()[:2] for each in self.of(setting))

        return Bound(
            addresses("listen"), addresses("listen_tls"), next(iter(addresses("admin_listen")), None)
        )

    @property
    def outlive(self) -> bool:
        """Whether somebody else keeps every socket of clients open when we end."""
        return all(each in self._given for each in (*self.of("listen"), *self.of("listen_tls")))

    def change(self, wanted: Settings) -> None:
        """Open what the settings name and close what they do not; an address that is open already stays so.

        Raises:
            ConfigError: an address cannot be used; nothing has changed.
        """
        server, mail = wanted.server, wanted.mail
        settings = [("listen", server.listen), ("listen_tls", server.listen_tls)]
        settings.append(("admin_listen", (server.admin_listen,) if server.admin_listen else ()))
        fresh: dict[tuple[str, Address], socket.socket] = {}
        opened: list[socket.socket] = []
        try:
            for setting, texts in settings:
                for text in texts:
                    key = setting, parse_listen(text)
                    found = self._open.get(key) or self._find_given(key[1])
                    if found is None:
                        found = bind(key[1])
                        opened.append(found)
                    fresh[key] = found
            if mail.dovecot_socket:
                key = "dovecot_socket", (mail.dovecot_socket, 0)
                found = self._open.get(key) if Path(mail.dovecot_socket).is_socket() else None
                if found is None:
                    found = dovecot.listen(mail)
                    opened.append(found)
                fresh[key] = found
        except ConfigError:
            for each in opened:
                each.close()
            raise
        for key, each in self._open.items():
            if fresh.get(key) is not each and each not in self._given:
                each.close()
        self._open = fresh

    def _find_given(self, address: Address) -> socket.socket | None:
        try:
            place = _resolve(address)[4][:2]
        except OSError:
            return None
        return next((each for each in self._given if each.getsockname()[:2] == place), None)

    def unused(self) -> Iterator[Address]:
        """What was given and no setting names."""
        for each in self._given:
            if each not in self._open.values():
                yield each.getsockname()[:2]

    def close(self) -> None:
        for each in {*self._open.values(), *self._given}:
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
        on_ready: Callable[[Bound], None],
    ) -> None:
        self._load = load
        self._on_ready: Callable[[Bound], None] | None = on_ready
        self._settings = load()
        self._memory = Memory(self._settings.auth.cache_entries)  # before any fork; lives as long as this
        self._sockets = _Sockets()
        self._certificates: Certificates | None = None  # forks start with the last ones that were good
        self._children: list[_Child] = []
        self._generation = 1
        self._failures = 0
        self._restarts: list[tuple[float, str]] = []  # when, kind
        self._reloading: Settings | None = None  # the settings that the new generation runs with
        self._reload_again = False  # asked for meanwhile: what was read may be older than that
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
            self._certificates = _certificates(self._settings)
            self._sockets = _Sockets(inherited())
            self._sockets.change(self._settings)
            for address in self._sockets.unused():
                log.warning("a socket we were given is in no setting", extra={"listen": show(address)})
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
            notify("READY=1")
        if self._reloading is not None:
            self._settings, self._reloading = self._reloading, None
            for each in self._children:
                if each.generation != self._generation:
                    self._leave(each, signal.SIGUSR1)
            log.info("reloaded")
            notify("READY=1")
        if self._reload_again:
            self._reload()

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
        for used, text in self._certificates.look() if self._certificates else ():
            (log.info if used else log.error)(
                "certificate renewed" if used else "certificate not renewed, the one before stays",
                extra={"certificate": text},
            )
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
            notify("STOPPING=1")
        self._restarts.clear()
        for child in self._children:
            self._leave(child, signal.SIGTERM)

    def _reload(self) -> None:
        """Start a new generation of workers; the old one leaves when all of it answers."""
        if self._stopping_since is not None:
            return
        if self._reloading is not None or self._on_ready is not None:
            self._reload_again = True
            return
        self._reload_again = False
        try:
            settings = self._load()
            certificates = _certificates(settings)
            self._sockets.change(settings)
        except ConfigError as error:
            log.error("not reloaded", extra={"reason": str(error)})
            return
        self._certificates = certificates
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
        if self._reload_again:
            self._reload()

    # -- starting ---------------------------------------------------------------------------------

    def _spawn_all(self, settings: Settings) -> None:
        for _ in range(max(1, settings.server.workers)):
            self._spawn("web", settings)
        self._spawn("jobs", settings)
        if settings.mail.dovecot_socket:
            self._spawn("mail", settings)

    def _spawn(self, kind: str, settings: Settings) -> None:
        ready, answered = os.pipe()
        lifeline, ours = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        # What a child is sent before it has let go of our wake pipe would come to us, and stop the server.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                os.close(ready)
                os.close(ours)
                os._exit(self._become_worker(kind, settings, answered, lifeline, before))
        finally:  # ours alone: the child has left
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(answered)
        os.close(lifeline)
        child = _Child(kind, self._generation, pid, ready, ours, time.monotonic())
        self._children.append(child)
        self._selector.register(ready, selectors.EVENT_READ, child)

    def _become_worker(
        self, kind: str, settings: Settings, answered: int, lifeline: int, mask: Iterable[int]
    ) -> int:
        """In the forked process: let go of everything that is the supervisor's, then work.

        A worker that kept another one's lifeline would keep it alive beyond the supervisor.
        """
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closing terminal speaks to the supervisor
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for descriptor in self._wake:
                os.close(descriptor)
            self._selector.close()
            for child in self._children:
                child.close_pipes()
            sockets = self._sockets
            web = kind == "web"
            task = worker.Task(
                kind,
                settings,
                self._memory,
                listen=sockets.of({"web": "listen", "mail": "dovecot_socket"}.get(kind, "")),
                listen_tls=sockets.of("listen_tls") if web else (),
                certificates=self._certificates if web else None,
                admin=next(iter(sockets.of("admin_listen")), None) if web else None,
                answered=answered,
                lifeline=lifeline,
                outlived=sockets.outlive,
            )
            return worker.work(task)
        except BaseException:  # nothing of the supervisor's may run in this process
            log.exception("worker failed")
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _certificates(settings: Settings) -> Certificates | None:
    return Certificates(settings.tls) if settings.server.listen_tls else None


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
