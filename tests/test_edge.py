"""The outer edge on real sockets: TLS, PROXY headers, redirects, handed-over sockets, a nearly full disk."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conformance.certificates import Authority, Pair
from conformance.servers import REPOSITORY, Served, demo, serve
from ksync_server import server as supervisor

PATIENCE_S = 60
PROXY = "127.0.0.2"  # where our proxy connects from; everybody else here is 127.0.0.1
spec = pytest.mark.spec
REFUSED = (ssl.SSLError, ConnectionError)
FROM_OUTSIDE = b"PROXY TCP4 192.0.2.1 198.51.100.1 50000 443\r\n"


def until(condition: Callable[[], object]) -> None:
    """Wait for another process."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        threading.Event().wait(0.05)


@dataclass(frozen=True)
class Prepared:
    """A database with the demo's people that no server has open."""

    config: Path
    alice: Mapping[str, Any]

    @property
    def authorization(self) -> str:
        pair = f"{self.alice['login']}:{self.alice['password']}"
        return "Basic " + base64.b64encode(pair.encode()).decode()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    data = tmp_path_factory.mktemp("edge") / "data"
    with demo(data, settings=["server.workers=1"]) as first:
        return Prepared(data / "ksync.toml", first.account("alice"))


@dataclass(frozen=True)
class Edge:
    """A server with an HTTP and an HTTPS address."""

    served: Served
    prepared: Prepared
    authority: Authority
    pair: Pair

    def place(self, key: str) -> tuple[str, int]:
        host, _, port = self.served.said[key][0].rpartition(":")
        return host, int(port)

    def connect(self, key: str = "listen", *, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(self.place(key), timeout=20, source_address=(source, 0))

    def encrypted(
        self, name: str = "sync.localhost", *, before: bytes = b"", source: str = "127.0.0.1"
    ) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=self.authority.file)
        context.set_alpn_protocols(["h2", "http/1.1"])
        connection = self.connect("listen_tls", source=source)
        try:
            for at in range(len(before)):
                connection.sendall(before[at : at + 1])
            return context.wrap_socket(connection, server_hostname=name)
        except BaseException:
            connection.close()
            raise

    def request(self, path: str = "/", method: str = "OPTIONS", *fields: str) -> bytes:
        head = [
            f"{method} {path} HTTP/1.1",
            "Host: localhost",
            f"Authorization: {self.prepared.authorization}",
        ]
        return "\r\n".join([*head, *fields, "", ""]).encode()

    def admin(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.served.said['admin']}/{path}", timeout=20) as answer:
            return answer.read().decode()

    def workers(self) -> set[int]:
        pid = self.served.process.pid
        return {int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}

    def reload(self) -> None:
        before = self.workers()
        self.served.process.send_signal(signal.SIGHUP)
        until(lambda: len(self.workers()) == len(before) and not self.workers() & before)


def answer(connection: socket.socket, request: bytes = b"") -> bytes:
    """Send, then read one answer with a body of declared length, or what came until the end."""
    received = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        connection.sendall(request)
        while not is_whole(received, request) and (piece := connection.recv(65536)):
            received += piece
    return received


def is_whole(received: bytes, request: bytes) -> bool:
    head, end, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
    bodiless = length is None or request.startswith(b"HEAD ")
    return bool(end) and (bodiless or len(body) >= int(length[1]))


def serial(connection: ssl.SSLSocket) -> str:
    certificate = connection.getpeercert()
    assert certificate
    return str(certificate["serialNumber"])


@contextlib.contextmanager
def running(prepared: Prepared, folder: Path, *settings: str, **rest: Any) -> Iterator[Edge]:
    authority = Authority(folder / "tls")
    pair = authority.issue("server", "sync.localhost", "*.connect.localhost", "localhost", "127.0.0.1")
    own = ['server.listen=["127.0.0.1:0"]', 'server.admin_listen="127.0.0.1:0"', "server.workers=1"]
    own += ['server.listen_tls=["127.0.0.1:0"]', *pair.settings(), "log.level=info", *settings]
    with serve(prepared.config, folder / "log", settings=own, **rest) as served:
        yield Edge(served, prepared, authority, pair)


@pytest.fixture(scope="module")
def edge(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """One server for the tests that leave it as it is."""
    settings = [f'server.proxy_protocol=["{PROXY}"]', "server.handshake_timeout_s=1.0", "server.handshakes=5"]
    settings += ["server.address_connections=3"]
    with running(prepared, tmp_path_factory.mktemp("running"), *settings) as started:
        yield started


# -- what is said at the start --------------------------------------------------------------------


def test_serve_says_where_it_listens_in_json(edge: Edge) -> None:
    said = edge.served.said
    assert said["pid"] == edge.served.process.pid
    assert [len(said["listen"]), len(said["listen_tls"])] == [1, 1]
    assert edge.admin("healthz") == "ok\n"


def test_serve_and_demo_say_it_in_words_or_in_json(tmp_path: Path) -> None:
    def first_line(*arguments: str) -> str:
        command = [sys.executable, "-m", "ksync_server.cli", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
            return line

    data, ready = tmp_path / "data", tmp_path / "ready.json"
    demonstrated = json.loads(first_line("demo", "--data", str(data), "--port", "0", "--json"))
    assert [account["name"] for account in demonstrated["accounts"]] == ["alice", "bob", "carol", "dave"]
    assert demonstrated["sync_url"].startswith("http://127.0.0.1:")
    assert not ready.exists()
    anywhere = ['server.listen=["127.0.0.1:0"]', 'server.admin_listen=""']
    sets = [word for each in anywhere for word in ("--set", each)]
    assert first_line("serve", "--config", str(data / "ksync.toml"), *sets).startswith(
        "Listening on http://127.0.0.1:"
    )


# -- TLS ------------------------------------------------------------------------------------------


def test_http_and_https_are_served_side_by_side(edge: Edge) -> None:
    with edge.connect() as plain:
        assert answer(plain, edge.request()).startswith(b"HTTP/1.1 200 ")
    with edge.encrypted() as connection:
        assert connection.version() == "TLSv1.3"
        assert connection.selected_alpn_protocol() == "http/1.1"
        assert answer(connection, edge.request()).startswith(b"HTTP/1.1 200 ")


def handshake(edge: Edge, change: Callable[[ssl.SSLContext], None]) -> str:
    """The cipher of a handshake whose client offers what `change` leaves it."""
    context = ssl.create_default_context(cafile=edge.authority.file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # old versions are what we try
        change(context)
    with (
        edge.connect("listen_tls") as connection,
        context.wrap_socket(connection, server_hostname="localhost") as wrapped,
    ):
        found = wrapped.cipher()
        assert found
        return found[0]


def test_old_versions_and_weak_ciphers_are_refused(edge: Edge) -> None:
    def old(context: ssl.SSLContext) -> None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1

    def weak(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("AES128-SHA:AES128-GCM-SHA256:ECDHE-ECDSA-AES128-SHA:@SECLEVEL=0")

    def good(context: ssl.SSLContext) -> None:
        context.maximum_version = ssl.TLSVersion.TLSv1_2

    for change in (old, weak):
        with pytest.raises(REFUSED):
            handshake(edge, change)
    assert handshake(edge, good).startswith("ECDHE-ECDSA-")


def test_bytes_that_are_no_handshake_end_that_connection_alone(edge: Edge) -> None:
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70000, b"\x00"):
        with edge.connect("listen_tls") as connection:
            assert b"HTTP" not in answer(connection, nonsense)
    with edge.encrypted() as connection:
        assert answer(connection, edge.request()).startswith(b"HTTP/1.1 200 ")


def test_a_handshake_that_stalls_is_ended(edge: Edge) -> None:
    with edge.connect("listen_tls") as connection:
        began = time.monotonic()
        assert answer(connection, b"\x16\x03\x01") == b""
        assert time.monotonic() - began < 10


def test_peers_that_stall_in_the_handshake_keep_out_nobody(edge: Edge) -> None:
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(edge.connect("listen_tls")) for _ in range(20)]
        for each in stalled:
            each.sendall(b"\x16\x03\x01")
        connection = stack.enter_context(edge.encrypted())
        assert answer(connection, edge.request()).startswith(b"HTTP/1.1 200 ")
        assert answer(stalled[0]) == b"", "the oldest was let go"


def test_an_upload_and_a_download_through_tls_are_whole(edge: Edge) -> None:
    drive = edge.prepared.alice["drives"][0]["id"]
    content = os.urandom(3_000_000)
    context = ssl.create_default_context(cafile=edge.authority.file)
    client = http.client.HTTPSConnection(*edge.place("listen_tls"), context=context, timeout=30)
    fields = {"Authorization": edge.prepared.authorization}
    pieces = (content[at : at + 70_000] for at in range(0, len(content), 70_000))
    client.request("PUT", f"/drives/{drive}/tls.bin", pieces, fields, encode_chunked=True)
    put = client.getresponse()
    put.read()
    assert put.status in (201, 204)
    client.request("GET", f"/drives/{drive}/tls.bin", headers=fields)
    assert client.getresponse().read() == content
    client.close()


def test_the_name_that_is_asked_for_chooses_the_certificate(prepared: Prepared, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "pairs")
    pairs = [
        authority.issue("first", "localhost"),
        authority.issue("wild", "*.connect.localhost"),
        authority.issue("one", "7.connect.localhost"),
    ]
    settings = [
        "tls.certificates=" + json.dumps([str(pair.certificate) for pair in pairs]),
        "tls.keys=" + json.dumps([str(pair.key) for pair in pairs]),
    ]
    with running(prepared, tmp_path, *settings) as started:
        context = ssl.create_default_context(cafile=authority.file)
        context.check_hostname = False
        found = {}
        names = ("localhost", "8.connect.localhost", "7.connect.localhost", "7.CONNECT.localhost", "x.org")
        for name in names:
            with (
                started.connect("listen_tls") as connection,
                context.wrap_socket(connection, server_hostname=name) as wrapped,
            ):
                certificate: Any = wrapped.getpeercert()
                found[name] = certificate["subjectAltName"][0][1]
    assert found == {
        "localhost": "localhost",
        "8.connect.localhost": "*.connect.localhost",
        "7.connect.localhost": "7.connect.localhost",
        "7.CONNECT.localhost": "7.connect.localhost",
        "x.org": "localhost",
    }


def test_a_renewed_certificate_serves_new_connections_and_ends_none(
    prepared: Prepared, tmp_path: Path
) -> None:
    def current(started: Edge) -> str:
        with started.encrypted() as connection:
            return serial(connection)

    def renew(started: Edge) -> None:
        started.authority.issue("server", "sync.localhost", "localhost")

    with running(prepared, tmp_path) as started, started.encrypted() as kept:
        assert answer(kept, started.request()).startswith(b"HTTP/1.1 200 ")
        first, workers = current(started), started.workers()
        renew(started)
        until(lambda: current(started) != first)
        assert started.workers() == workers, "no process was replaced"
        assert answer(kept, started.request()).startswith(b"HTTP/1.1 200 ")
        assert serial(kept) == first
        until(lambda: "certificate renewed" in started.served.log.read_text())

        second = current(started)
        whole = started.pair.certificate.read_bytes()
        started.pair.certificate.write_bytes(whole[: len(whole) // 3])
        until(lambda: "certificate not renewed" in started.served.log.read_text())
        assert current(started) == second
        (victim,) = [pid for pid in started.workers() if is_web(pid)]
        os.kill(victim, signal.SIGKILL)
        until(lambda: victim not in started.workers() and len(started.workers()) == len(workers))
        assert current(started) == second, "a new worker starts with the last good pair too"
        started.served.process.send_signal(signal.SIGHUP)
        until(lambda: "not reloaded" in started.served.log.read_text())
        assert current(started) == second

        renew(started)
        until(lambda: current(started) not in (first, second))


def is_web(pid: int) -> bool:
    """Whether a worker runs an event loop: the job worker waits in a lock."""
    return any(
        "eventpoll" in os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir() if each.exists()
    )


def test_a_reload_under_load_fails_no_request_over_tls(prepared: Prepared, tmp_path: Path) -> None:
    failures: list[str] = []
    answered = [0]
    over = threading.Event()

    def load(started: Edge, *, kept: bool) -> None:
        context = ssl.create_default_context(cafile=started.authority.file)
        client = http.client.HTTPSConnection(*started.place("listen_tls"), context=context, timeout=30)
        while not over.is_set():
            try:
                client.request("OPTIONS", "/", headers={"Authorization": prepared.authorization})
                status = client.getresponse()
                status.read()
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"kept={kept}: {error!r}")
                client.close()
            else:
                answered[0] += 1
                if status.status != 200:
                    failures.append(str(status.status))
            if not kept:
                client.close()
        client.close()

    with running(prepared, tmp_path) as started:
        threads = [
            threading.Thread(target=load, args=(started,), kwargs={"kept": kept}) for kept in (True, False)
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(2):
                started.reload()
        finally:
            over.set()
            for thread in threads:
                thread.join()
    assert failures == []
    assert answered[0] > 20


def test_a_download_that_is_not_taken_is_cut_off_inside_tls_too(prepared: Prepared, tmp_path: Path) -> None:
    drive = prepared.alice["drives"][0]["id"]
    with running(prepared, tmp_path, "server.body_timeout_s=1.0") as started, started.encrypted() as slow:
        context = ssl.create_default_context(cafile=started.authority.file)
        client = http.client.HTTPSConnection(*started.place("listen_tls"), context=context, timeout=30)
        fields = {"Authorization": prepared.authorization}
        client.request("PUT", f"/drives/{drive}/long.bin", bytes(40_000_000), fields)
        assert client.getresponse().status in (201, 204)
        client.close()
        slow.sendall(started.request(f"/drives/{drive}/long.bin", "GET"))
        until(lambda: "ksync_requests_running 1.0" in started.admin("metrics"))
        until(lambda: "ksync_requests_running 0.0" in started.admin("metrics"))
        received = 0
        with contextlib.suppress(OSError):
            while piece := slow.recv(1 << 20):
                received += len(piece)
        assert received < 40_000_000


# -- PROXY headers --------------------------------------------------------------------------------


def test_what_the_proxy_says_is_who_the_client_is(edge: Edge) -> None:
    with edge.connect(source=PROXY) as connection:
        refused = answer(connection, FROM_OUTSIDE + edge.request())
    assert refused.startswith(b"HTTP/1.1 403 "), "plain HTTP from outside takes no password"
    assert b"www-authenticate" not in refused
    with edge.encrypted(before=FROM_OUTSIDE, source=PROXY) as connection:
        assert answer(connection, edge.request()).startswith(b"HTTP/1.1 200 ")
    until(lambda: edge.served.log.read_text().count("address=192.0.2.1") == 2)


def test_version_2_tells_of_tls_up_to_the_proxy(edge: Edge) -> None:
    ends = socket.inet_aton("192.0.2.7") + socket.inet_aton("198.51.100.1") + b"\x00\x01\x01\xbb"
    for tls, status in ((b"\x20\x00\x05\x01\x00\x00\x00\x00", b"200"), (b"", b"403")):
        body = ends + tls
        header = b"\r\n\r\n\x00\r\nQUIT\n\x21\x11" + len(body).to_bytes(2, "big") + body
        with edge.connect(source=PROXY) as connection:
            assert answer(connection, header + edge.request())[9:12] == status


def test_the_proxy_has_to_say_it(edge: Edge) -> None:
    with edge.connect(source=PROXY) as connection:
        assert answer(connection, edge.request()) == b""
    with pytest.raises(REFUSED), edge.encrypted(source=PROXY):
        pass
    with edge.connect(source=PROXY) as connection:
        began = time.monotonic()
        assert answer(connection, b"PROXY TCP4 192.0.2.1 ") == b"", "nor may it stop in the middle"
        assert time.monotonic() - began < 10
    with edge.connect(source=PROXY) as connection:
        assert answer(connection, b"PROXY " + b"x" * 200) == b""


@pytest.mark.parametrize("header", [FROM_OUTSIDE, b"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"])
def test_nobody_else_may_say_it(edge: Edge, header: bytes) -> None:
    with edge.connect() as connection:
        assert answer(connection, header + edge.request()).startswith(b"HTTP/1.1 400 ")
    with pytest.raises(REFUSED), edge.encrypted(before=header):
        pass


def test_one_address_may_not_take_every_connection(edge: Edge) -> None:
    with contextlib.ExitStack() as stack:

        def enter(address: str) -> bytes:
            connection = stack.enter_context(edge.connect(source=PROXY))
            header = f"PROXY TCP6 {address} ::1 1 2\r\n".encode()
            return answer(
                connection, header + b"GET /.well-known/caldav HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )[9:12]

        assert [enter(f"2001:db8::{at}") for at in range(1, 6)] == [b"301"] * 3 + [b"503"] * 2
        assert enter("2001:db8:0:1::1") == b"301", "another subscriber's network"
    with edge.connect(source=PROXY) as connection:  # those of before have left
        header = b"PROXY TCP6 2001:db8::9 ::1 1 2\r\n"
        request = b"GET /.well-known/caldav HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert answer(connection, header + request)[9:12] in (b"301", b"503")
    assert [answer_of_loopback(edge) for _ in range(5)] == [b"200"] * 5


def answer_of_loopback(edge: Edge) -> bytes:
    with edge.connect() as connection:
        return answer(connection, edge.request())[9:12]


# -- plain HTTP -----------------------------------------------------------------------------------


@spec("RFC 9110 §15.4.9")
def test_plain_http_may_lead_to_https_and_never_asks_for_a_password(
    prepared: Prepared, tmp_path: Path
) -> None:
    with running(prepared, tmp_path, "server.redirect_https_port=8443") as started:
        for method, status in (("GET", b"301"), ("HEAD", b"301"), ("PROPFIND", b"308"), ("PUT", b"308")):
            with started.connect() as connection:
                request = started.request("/calendars/a%20b/?x=y", method, "Content-Length: 0")
                got = answer(connection, request)
            assert got[9:12] == status
            assert b"location: https://localhost:8443/calendars/a%20b/?x=y\r\n" in got
            assert b"www-authenticate" not in got
        with started.connect() as connection:
            alien = answer(connection, b"GET / HTTP/1.1\r\nHost: evil.example.org\r\n\r\n")
        assert alien.startswith(b"HTTP/1.1 421 ")
        assert b"location" not in alien
        with started.encrypted() as connection:
            assert answer(connection, started.request()).startswith(b"HTTP/1.1 200 ")


# -- sockets that outlive the server --------------------------------------------------------------


def test_with_sockets_of_systemd_even_a_restart_fails_no_request(prepared: Prepared, tmp_path: Path) -> None:
    failures: list[str] = []
    answered = [0]
    over = threading.Event()
    with supervisor.bind(("127.0.0.1", 0)) as given, supervisor.bind(("127.0.0.1", 0)) as unused:
        host, port = given.getsockname()
        settings = [f'server.listen=["{host}:{port}"]', "server.listen_tls=[]"]

        def load(*, kept: bool) -> None:
            client = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)
            while not over.is_set():
                try:
                    client.request("OPTIONS", "/", headers={"Authorization": prepared.authorization})
                    status = client.getresponse()
                    status.read()
                except (OSError, http.client.HTTPException) as error:
                    failures.append(f"kept={kept}: {error!r}")
                    client.close()
                else:
                    answered[0] += 1
                    if status.status != 200:
                        failures.append(str(status.status))
                if not kept:
                    client.close()
            client.close()

        threads = [threading.Thread(target=load, kwargs={"kept": kept}) for kept in (True, True, False)]
        with contextlib.ExitStack() as stack:
            for at in range(2):  # the first one ends with clients on it: who asks then waits for the second
                with running(prepared, tmp_path, *settings, sockets=[given, unused]) as started:
                    assert started.place("listen") == (host, port)
                    for thread in threads if not at else ():
                        thread.start()
                        stack.callback(thread.join)
                    stack.callback(over.set)
                    seen = answered[0]
                    until(lambda seen=seen: answered[0] > seen + 20)
                    if at:
                        stack.close()
        assert failures == []
        assert "a socket we were given is in no setting" in (tmp_path / "log").read_text()


def test_before_a_restart_an_idle_connection_may_send_one_more_request(
    prepared: Prepared, tmp_path: Path
) -> None:
    with supervisor.bind(("127.0.0.1", 0)) as given:
        host, port = given.getsockname()
        settings = [f'server.listen=["{host}:{port}"]', "server.listen_tls=[]"]
        with running(prepared, tmp_path, *settings, sockets=[given]) as started, started.connect() as kept:
            assert b"connection: close" not in answer(kept, started.request())
            started.served.process.terminate()
            last = b""
            while b"connection: close" not in last:
                threading.Event().wait(0.1)  # idle is what we try
                last = answer(kept, started.request())
                assert last.startswith(b"HTTP/1.1 200 ")
            assert started.served.process.wait(PATIENCE_S) == 0


def test_systemd_is_told_when_the_server_is_ready_and_when_it_stops(
    prepared: Prepared, tmp_path: Path
) -> None:
    place = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.bind(str(place))
        ear.settimeout(PATIENCE_S)
        with running(prepared, tmp_path, environment={"NOTIFY_SOCKET": str(place)}):
            assert ear.recv(100) == b"READY=1"
        assert ear.recv(100) == b"STOPPING=1"


# -- disk nearly full -----------------------------------------------------------------------------


@spec("RFC 4918 §11.5")
def test_a_nearly_full_disk_refuses_what_grows_and_ends_by_itself(prepared: Prepared, tmp_path: Path) -> None:
    config = prepared.config
    good = config.read_text()
    drive = f"/drives/{prepared.alice['drives'][0]['id']}/"

    def ask(started: Edge, method: str, path: str, *fields: str, body: bytes = b"") -> bytes:
        length = f"Content-Length: {len(body)}"
        with started.connect() as connection:
            return answer(connection, started.request(path, method, length, *fields) + body)

    with running(prepared, tmp_path) as started:
        assert ask(started, "PUT", f"{drive}kept", body=b"x")[9:12] in (b"201", b"204")
        assert started.admin("readyz") == "ready\n"
        assert "ksync_disk_nearly_full 0.0" in started.admin("metrics")
        config.write_text(good + "\n[disk]\nreserve_percent = 99.999\n")
        try:
            started.reload()
            refused = ask(started, "PUT", f"{drive}more", "Expect: 100-continue", body=b"")
            assert refused.startswith(b"HTTP/1.1 507 ")
            assert b"sufficient-disk-space" in refused
            calendar = f"/calendars/{prepared.alice['sync_id']}/default/"
            assert ask(started, "PUT", f"{calendar}x.ics", body=b"x").startswith(b"HTTP/1.1 507 ")
            assert ask(started, "MKCOL", f"{drive}folder").startswith(b"HTTP/1.1 507 ")
            assert ask(started, "GET", f"{drive}kept").startswith(b"HTTP/1.1 200 ")
            assert ask(started, "PROPFIND", calendar, "Depth: 0").startswith(b"HTTP/1.1 207 ")
            assert ask(started, "DELETE", f"{drive}kept").startswith(b"HTTP/1.1 204 ")
            assert started.admin("readyz").startswith("ready, but the disk of the ")
            until(lambda: "ksync_disk_nearly_full 1.0" in started.admin("metrics"))
            assert 'ksync_disk_free_bytes{disk="blobs"}' in started.admin("metrics")
            assert started.served.log.read_text().count("disk nearly full") == 1
        finally:
            config.write_text(good)
        started.reload()
        assert ask(started, "PUT", f"{drive}more", body=b"x").startswith(b"HTTP/1.1 201 ")
        assert started.admin("readyz") == "ready\n"
