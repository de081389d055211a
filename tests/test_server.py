"""Real processes: what happens when they die, reload and stop."""

from __future__ import annotations

import base64
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from conformance.servers import Demo, demo
from ksync_server.errors import ConfigError
from ksync_server.server import bind, parse_listen

PATIENCE_S = 60


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """A demo of this module's own, for tests that kill and reload it."""
    with demo(tmp_path_factory.mktemp("running") / "data", settings=["log.level=info"]) as server:
        yield server


def until(condition: Callable[[], object]) -> None:
    """Wait for another process."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        threading.Event().wait(0.05)


def children(server: Demo) -> set[int]:
    listed = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return {int(pid) for pid in listed.split()}


def admin(server: Demo, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(server.ready["admin_url"] + path, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def options(server: Demo, connection: http.client.HTTPConnection | None = None) -> int:
    """One authenticated request; over its own connection unless one is given."""
    alice = server.account("alice")
    token = base64.b64encode(f"{alice['login']}:{alice['password']}".encode()).decode()
    place = urlsplit(server.url)
    own = connection or http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    try:
        own.request("OPTIONS", f"/calendars/{alice['sync_id']}/", headers={"Authorization": f"Basic {token}"})
        answer = own.getresponse()
        answer.read()
        return answer.status
    finally:
        if connection is None:
            own.close()


def test_health_readiness_and_metrics_are_on_the_admin_address(running: Demo) -> None:
    assert admin(running, "healthz") == (200, "ok\n")
    assert admin(running, "readyz") == (200, "ready\n")
    assert options(running) in (200, 204)
    counted = 'ksync_requests_total{method="OPTIONS",site="sync",status="2xx"}'
    until(lambda: counted in admin(running, "metrics")[1])  # it is counted after the answer
    assert admin(running, "metrics")[0] == 200
    assert admin(running, "else")[0] == 404


def test_the_log_has_one_line_per_request_without_path_or_secret(running: Demo) -> None:
    alice = running.account("alice")
    before = running.log.stat().st_size

    def logged() -> str:
        with running.log.open() as log:
            log.seek(before)
            return log.read()

    assert options(running) in (200, 204)
    until(lambda: " request " in logged())  # the line is written after the answer
    text = logged()
    assert text.count(" request ") == 1
    assert "method=OPTIONS site=sync status=20" in text
    assert f"account={alice['sync_id']}" in text
    assert alice["password"] not in text
    assert "/calendars/" not in text


def test_a_killed_worker_is_replaced(running: Demo) -> None:
    before = children(running)
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(children(running) - {victim}) == len(before))
    until(lambda: options(running) in (200, 204))
    until(lambda: "ksync_connections" in admin(running, "metrics")[1])


def test_a_reload_under_load_fails_no_request(running: Demo) -> None:
    place = urlsplit(running.url)
    failures: list[str] = []
    answered = [0]
    over = threading.Event()

    def kept() -> None:
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
        while not over.is_set():
            try:
                # http.client opens a new connection by itself after an answer that said `close`.
                status = options(running, connection)
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"kept: {error!r}")
                connection.close()
            else:
                answered[0] += 1
                if status not in (200, 204):
                    failures.append(str(status))
        connection.close()

    def fresh() -> None:
        while not over.is_set():
            try:
                status = options(running)
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"fresh: {error!r}")
            else:
                if status not in (200, 204):
                    failures.append(str(status))

    threads = [threading.Thread(target=work) for work in (kept, kept, fresh)]
    old = children(running)
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            before = children(running)
            os.kill(running.process.pid, signal.SIGHUP)
            until(lambda before=before: len(children(running)) == len(old) and not children(running) & before)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert answered[0] > 20


def test_a_reload_with_a_mistake_changes_nothing(running: Demo) -> None:
    config = running.data / "ksync.toml"
    good = config.read_text()
    before = children(running)
    config.write_text(good + "\n[drive]\nno_such_key = 1\n")
    try:
        os.kill(running.process.pid, signal.SIGHUP)
        until(lambda: "not reloaded" in running.log.read_text())
    finally:
        config.write_text(good)
    assert "no_such_key" in running.log.read_text()
    assert children(running) == before
    assert options(running) in (200, 204)


def test_a_setting_changes_with_a_reload(running: Demo) -> None:
    config = running.data / "ksync.toml"
    before = children(running)
    config.write_text(config.read_text().replace("[auth]\n", '[auth]\nrealm = "elsewhere"\n'))
    os.kill(running.process.pid, signal.SIGHUP)
    until(lambda: not children(running) & before and len(children(running)) == len(before))
    place = urlsplit(running.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="elsewhere", charset="UTF-8"'
    connection.close()


def test_a_reload_asked_for_during_a_reload_is_done_too(running: Demo) -> None:
    config = running.data / "ksync.toml"
    good = config.read_text()
    first = children(running)
    place = urlsplit(running.url)

    def challenge() -> str | None:
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=30)
        try:
            connection.request("GET", "/")
            return connection.getresponse().headers["WWW-Authenticate"]
        finally:
            connection.close()

    os.kill(running.process.pid, signal.SIGHUP)
    until(lambda: children(running) - first)  # it has read the configuration
    config.write_text(re.sub(r"\[auth\]\n(realm = .*\n)?", '[auth]\nrealm = "second"\n', good))
    os.kill(running.process.pid, signal.SIGHUP)
    until(lambda: challenge() == 'Basic realm="second", charset="UTF-8"')
    until(lambda: len(children(running)) == len(first) and not children(running) & first)


def test_an_upload_under_way_survives_a_reload(running: Demo) -> None:
    alice = running.account("alice")
    drive = urlsplit(alice["drives"][0]["url"])
    token = base64.b64encode(f"{alice['login']}:{alice['password']}".encode()).decode()
    before = children(running)
    with socket.create_connection((drive.hostname or "", drive.port or 0), timeout=30) as connection:
        head = f"PUT {drive.path}slow HTTP/1.1\r\nHost: {drive.netloc}\r\nAuthorization: Basic {token}\r\n"
        connection.sendall(f"{head}Content-Length: 10\r\nExpect: 100-continue\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"12345")
        os.kill(running.process.pid, signal.SIGHUP)
        until(lambda: len(children(running) - before) == len(before))
        until(lambda: len(children(running) & before) == 1)
        connection.sendall(b"67890")
        assert connection.recv(1000).startswith(b"HTTP/1.1 201 ")
    until(lambda: not children(running) & before)


def test_workers_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    with demo(tmp_path / "data", settings=["server.workers=1"]) as server:
        workers = children(server)
        assert len(workers) == 2
        server.process.kill()
        until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers))


def test_stopping_ends_every_process_with_status_0(tmp_path: Path) -> None:
    with demo(tmp_path / "data", settings=["server.workers=1"]) as server:
        workers = children(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
        assert not any(Path(f"/proc/{pid}/exe").exists() for pid in workers)


def test_a_first_start_that_cannot_work_ends_with_a_sentence(tmp_path: Path) -> None:
    config = tmp_path / "ksync.toml"
    config.write_text("[server]\nlisten = ['127.0.0.1:0']\nadmin_listen = ''\n")
    command = [sys.executable, "-m", "ksync_server.cli", "serve", "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 1
    assert "ksync-server migrate" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_address_in_use_is_a_mistake_of_the_configuration() -> None:
    with bind(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="cannot listen"):
        bind(("127.0.0.1", taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:8080", ("::1", 8080)),
        (":8080", ("::", 8080)),
        ("host:0", ("host", 0)),
    ],
)
def test_listen_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_listen(text) == address


@pytest.mark.parametrize(
    "text", ["", "80", "host", "host:", "host:x", "host:65536", "::1:80", "[::1:80", "host:-1"]
)
def test_listen_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_listen(text)


_EARLY = """
import os, selectors, signal, sys, time
from ksync_server import settings
from ksync_server.server import Supervisor

class Slow(Supervisor):
    def __init__(self):
        self._children, self._generation, self._selector = [], 1, selectors.DefaultSelector()

    def _become_worker(self, *arguments):
        time.sleep(0.5)
        signal.set_wakeup_fd(-1)
        return 0

wake, waker = os.pipe()
os.set_blocking(wake, False)
os.set_blocking(waker, False)
signal.set_wakeup_fd(waker)
signal.signal(signal.SIGTERM, lambda *_: None)
slow = Slow()
slow._spawn("web", settings.Settings())
(child,) = slow._children
os.kill(child.pid, signal.SIGTERM)
os.waitpid(child.pid, 0)
try:
    print("came to us", os.read(wake, 10))
except BlockingIOError:
    print("kept apart")
os.kill(os.getpid(), signal.SIGTERM)
print(os.read(wake, 10) == bytes([signal.SIGTERM]))
"""


def test_a_signal_to_a_worker_that_was_just_forked_does_not_come_to_the_supervisor() -> None:
    """An abandoned reload ends such workers; it must not end the server."""
    done = subprocess.run(
        [sys.executable, "-c", _EARLY], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split("\n")[:2] == ["kept apart", "True"], done
