"""A chunked PUT of 1 GiB: how much the server's memory grows while it streams. Bar: 8 MiB."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measure import cpu_seconds, resident_bytes, verdict
from conformance.servers import demo
from conformance.target import Target

BAR_MIB = 8
MIB = 1024 * 1024
CHUNK = bytes(range(256)) * 1024  # 256 KiB


def body(size: int) -> Iterator[bytes]:
    for _ in range(size // len(CHUNK)):
        yield CHUNK


class Peak:
    """The highest resident memory of a process family while the block runs."""

    def __init__(self, pid: int) -> None:
        self.pid, self.bytes, self._over = pid, resident_bytes(pid), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, resident_bytes(self.pid))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def main(count: int = 1024) -> bool:
    """`count` is the size in MiB."""
    with (
        tempfile.TemporaryDirectory(prefix="ksync-bench-") as name,
        demo(Path(name) / "data", settings=["server.workers=1"]) as running,
    ):
        client = Target.from_ready(running.ready).drive()
        client.timeout = 600
        assert client.request("PUT", "warm-up", body(130 * MIB)).status == 201
        before, cpu, started = (
            resident_bytes(running.process.pid),
            cpu_seconds(running.process.pid),
            time.monotonic(),
        )
        with Peak(running.process.pid) as peak:
            answer = client.request("PUT", "large", body(count * MIB))
        assert answer.status == 201, (answer.status, answer.body[:300])
        seconds, spent = time.monotonic() - started, cpu_seconds(running.process.pid) - cpu
        assert client.request("HEAD", "large").header("Content-Length") == str(count * MIB)
    print(
        f"\nChunked PUT of {count} MiB: {count / seconds:.0f} MiB/s, {spent / (count * MIB) * 1e9:.2f} CPU s/GB"
    )
    growth = (peak.bytes - before) / MIB
    return verdict("growth of resident memory, MiB", growth, BAR_MIB, at_least=False)
