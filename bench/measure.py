"""Wall time and server CPU time of single requests, servers taking turns, medians of rounds.

On a shared machine wall time says more about the neighbours than about us; CPU time of all processes of a server,
read before and after a round, is what the ratios are made of. Both are printed.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from conformance.client import basic
from conformance.servers import postgresql

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def family(pid: int) -> set[int]:
    """The process and everything below it."""
    found, queue = set(), [pid]
    while queue:
        current = queue.pop()
        found.add(current)
        for children in Path(f"/proc/{current}/task").glob("*/children"):
            queue += [int(word) for word in children.read_text().split()]
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time that a process and everything below it has spent."""
    ticks = 0
    for member in family(pid):
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and everything below it, each page of each process counted."""
    total = 0
    for member in family(pid):
        for line in Path(f"/proc/{member}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) * 1024
    return total


def proportional_bytes(pid: int) -> int:
    """Memory of a process and everything below it, shared pages counted once (PSS)."""
    total = 0
    for member in family(pid):
        for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def on_both() -> Iterator[tuple[str, Callable[[str], list[str]]]]:
    """Each database: its name, and what makes settings for a demo called so, a database for each."""
    yield "SQLite", lambda name: []
    with postgresql(durable=True) as server:
        yield "PostgreSQL", lambda name: [f"database.url={server.create()}"]


class Connection:
    """One kept-alive connection that sends prepared bytes: the client costs next to nothing."""

    def __init__(self, url: str, login: str, password: str) -> None:
        parts = urlsplit(url)
        self.host = parts.netloc
        self._place = (parts.hostname or "", parts.port or 80)
        self._authorization = basic(login, password)
        self._socket = self._connect()

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(self._place, timeout=600)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def close(self) -> None:
        self._socket.close()

    def prepare(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> bytes:
        """The bytes of a request."""
        fields = {"Host": self.host, "Authorization": self._authorization, "Content-Length": str(len(body))}
        fields.update(headers or {})
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body

    def send(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer; a connection that the server closed is opened again."""
        for attempt in (1, 2):
            try:
                self._socket.sendall(request)
                return self._read()
            except (ConnectionError, EOFError):
                if attempt == 2:
                    raise
                self._socket.close()
                self._socket = self._connect()
        raise AssertionError("unreachable")

    def _read(self) -> tuple[int, bytes]:
        buffer = bytearray()
        while (end := buffer.find(b"\r\n\r\n")) < 0:
            self._more(buffer)
        head = bytes(buffer[:end]).decode("latin-1").split("\r\n")
        del buffer[: end + 4]
        fields = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
        }
        status = int(head[0].split()[1])
        if "content-length" in fields:
            length = int(fields["content-length"])
            while len(buffer) < length:
                self._more(buffer)
        elif "chunked" in fields.get("transfer-encoding", ""):
            while not buffer.endswith(b"0\r\n\r\n"):
                self._more(buffer)
        elif status not in (204, 304):
            try:
                while True:
                    self._more(buffer)
            except EOFError:
                pass
        if fields.get("connection", "").lower() == "close" or head[0].startswith("HTTP/1.0"):
            self._socket.close()
            self._socket = self._connect()
        return status, bytes(buffer)

    def _more(self, buffer: bytearray) -> None:
        piece = self._socket.recv(1 << 20)
        if not piece:
            raise EOFError
        buffer += piece


@dataclass
class Subject:
    """One request to one server, measured over and over."""

    name: str
    pid: int
    act: Callable[[], object]
    wall_ms: list[float] = field(default_factory=list)  # per request, one value a round
    cpu_ms: list[float] = field(default_factory=list)

    def round(self, seconds: float) -> None:
        """Act for about this long, at least once."""
        acts, cpu, started = 0, cpu_seconds(self.pid), time.perf_counter()
        while acts == 0 or time.perf_counter() - started < seconds:
            self.act()
            acts += 1
        self.wall_ms.append((time.perf_counter() - started) / acts * 1000)
        self.cpu_ms.append((cpu_seconds(self.pid) - cpu) / acts * 1000)

    @property
    def wall(self) -> float:
        return statistics.median(self.wall_ms)

    @property
    def cpu(self) -> float:
        return statistics.median(self.cpu_ms)


def interleave(subjects: Iterable[Subject], *, rounds: int = 5, seconds: float = 1.5) -> None:
    """Every subject once a round, so that a busy neighbour meets all of them; one unmeasured act first."""
    subjects = list(subjects)
    for subject in subjects:
        subject.act()
    for _ in range(rounds):
        for subject in subjects:
            subject.round(seconds)


def show(title: str, subjects: Iterable[Subject]) -> None:
    print(f"\n{title}\n{'':<46}{'wall ms':>10}{'CPU ms':>10}")
    for subject in subjects:
        print(f"{subject.name:<46}{subject.wall:>10.2f}{subject.cpu:>10.2f}")


def verdict(what: str, value: float, bar: float, *, at_least: bool) -> bool:
    """Print one figure beside its bar; true when it holds."""
    good = value >= bar if at_least else value <= bar
    print(f"{'ok  ' if good else 'MISS'} {what}: {value:.2f} (bar: {'>=' if at_least else '<='} {bar:g})")
    return good
