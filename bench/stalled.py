"""200 stalled uploads and 200 stalled downloads: how long a GET of 1 KiB takes then, and what each costs.

Bars: p99 <= 100 ms; memory <= 150 MB + 0.5 MB for each transfer. The server is `ksync-server serve` with stock settings;
memory is the PSS of its whole process tree (supervisor, two web workers, job worker): every page once. The limit of
transfers for one account (`drive.transfers`, 40) is raised, since one account holds them all; nothing else is.

Once more with bytes on S3 (moto), where an upload is in memory until an object is whole: each stops 4 MiB in, which
together is more than the cap of both workers (`s3.memory_bytes` each). Bars: the same and the caps; 16 MiB for each.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from bench.crowd import allow_files
from bench.measure import Connection, cpu_seconds, family, on_both, proportional_bytes, verdict
from conformance.client import Client
from conformance.fire.running import free_ports
from conformance.servers import demo, s3, serve_folder
from conformance.target import Target
from ksync_server import settings as configuration

MB, MIB = 1_000_000, 1024 * 1024
BAR_MS, BAR_MB, BAR_EACH_MB = 100, 150, 0.5
LARGE = 64 * MB
SENT = 700_000  # of each upload: beyond what stays in memory, beyond one piece
SENT_S3 = 4 * MIB  # half of an object
EACH_S3_MIB = 16
READERS, READS = 4, 500


def main(count: int = 200) -> bool:
    """`count` uploads and as many downloads."""
    allow_files(2 * count + 200)
    allowed = BAR_MB + BAR_EACH_MB * 2 * count
    good = True
    for database, settings in on_both():
        good &= serving(settings("data"), database, count, SENT, allowed)
    stock = configuration.Settings()
    caps = stock.s3.memory_bytes * stock.server.workers / MB
    with tempfile.TemporaryDirectory(prefix="ksync-bench-") as name, s3() as server:
        more = server.arguments(server.create(), Path(name))
        good &= serving(more, "SQLite and S3", count, SENT_S3, allowed + caps)
    return good


def serving(more: list[str], title: str, count: int, sent: int, allowed_mb: float) -> bool:
    with tempfile.TemporaryDirectory(prefix="ksync-bench-") as name:
        data, port = Path(name) / "data", free_ports()
        with demo(data, settings=more, port=port) as prepared:
            target = Target.from_ready(prepared.ready)
        with serve_folder(data, port, ["drive.transfers=400", *more]) as process:
            return stall(process.pid, target.drive(), title, count, sent, allowed_mb)


def stall(pid: int, client: Client, title: str, count: int, sent: int, allowed_mb: float) -> bool:
    client.timeout = 120
    path = client.path("stalled/")
    assert client.request("MKCOL", path).status == 201
    assert client.request("PUT", path + "small", b"k" * 1024).status == 201
    assert client.request("PUT", path + "large", b"l" * LARGE).status == 201
    quiet = latencies(client, path + "small")
    before = proportional_bytes(pid)
    threads = thread_count(pid)
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        for number in range(count):
            stack.enter_context(upload(client, f"{path}up-{number}", sent, chunked=bool(number % 2)))
            stack.enter_context(download(client, path + "large"))
        opened = time.monotonic() - began
        wait_until_still(pid)
        held = proportional_bytes(pid)
        cpu, began = cpu_seconds(pid), time.monotonic()
        stalled = latencies(client, path + "small")
        spent = (cpu_seconds(pid) - cpu) / (READERS * READS) * 1000
        held = max(held, proportional_bytes(pid))
        more_threads = thread_count(pid) - threads
        files = sum(len(list(Path(f"/proc/{member}/fd").iterdir())) for member in family(pid))
    print(
        f"\n{count} stalled uploads and {count} stalled downloads, {title} (all open after {opened:.1f} s)\n"
        f"GET of 1 KiB, {READERS} connections: p50 {quantile(quiet, 50):.1f} ms, p99 {quantile(quiet, 99):.1f} ms before; "
        f"p50 {quantile(stalled, 50):.1f} ms, p99 {quantile(stalled, 99):.1f} ms with them, {spent:.2f} ms CPU each\n"
        f"memory (PSS of the tree): {before / MB:.0f} MB before, {held / MB:.0f} MB with them, "
        f"{(held - before) / MB / (2 * count):.2f} MB each; {more_threads} more threads, {files} open files"
    )
    each = (held - before) / MIB / (2 * count)
    return all(
        [
            verdict("p99 of a GET of 1 KiB, ms", quantile(stalled, 99), BAR_MS, at_least=False),
            verdict("memory, MB", held / MB, allowed_mb, at_least=False),
            verdict("memory for each transfer, MiB", each, EACH_S3_MIB, at_least=False),
        ]
    )


@contextlib.contextmanager
def upload(client: Client, path: str, sent: int, *, chunked: bool):
    """A PUT of 1 GB that stops after some of it."""
    with connect(client) as connection:
        length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 1000000000"
        connection.sendall(client.head("PUT", path, length) + b"\r\n")
        piece = b"u" * sent
        connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        yield


@contextlib.contextmanager
def download(client: Client, path: str):  # type: ignore[no-untyped-def]
    """A GET of a large file that nobody reads."""
    with connect(client, receive=4096) as connection:
        connection.sendall(client.head("GET", path) + b"\r\n")
        yield


def connect(client: Client, receive: int = 0) -> socket.socket:
    base = urlsplit(client.base)
    connection = socket.socket()
    if receive:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(60)
    connection.connect((base.hostname or "", base.port or 80))
    return connection


def wait_until_still(pid: int) -> None:
    """Until the server has taken what was sent: it spends next to nothing any more."""
    spent = cpu_seconds(pid)
    for _ in range(60):
        time.sleep(0.5)
        now = cpu_seconds(pid)
        if now - spent < 0.03:
            return
        spent = now


def thread_count(pid: int) -> int:
    return sum(len(list(Path(f"/proc/{member}/task").iterdir())) for member in family(pid))


def latencies(client: Client, path: str) -> list[float]:
    """Milliseconds of many GETs, on some connections at once."""
    found: list[float] = []

    def read() -> None:
        connection = Connection(client.base, client.login, client.password)
        request = connection.prepare("GET", path)
        for _ in range(READS):
            started = time.perf_counter()
            status, body = connection.send(request)
            found.append((time.perf_counter() - started) * 1000)
            assert (status, len(body)) == (200, 1024), (status, body[:200])
        connection.close()

    threads = [threading.Thread(target=read) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == READERS * READS
    return found


def quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]
