"""Bytes on S3: speed of one upload and download, and the memory of 20 uploads at once, under the cap.

The S3 server is moto, a test server in Python that is slower than any real one and has the same two cores: the
speeds are its own. The memory is ours. Bars: 16 MiB for each upload, and with a cap of 64 MiB not more than the
cap and 1 MiB for each of them; an upload gets through while 19 that hold half an object are silent.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.measure import cpu_seconds, resident_bytes, verdict
from bench.upload_memory import CHUNK, Peak, body
from conformance.client import Client
from conformance.servers import S3, demo, s3
from conformance.target import Target

MIB = 1024 * 1024
AT_ONCE = 20
EACH = 24  # MiB of one of several uploads
BAR_MIB = 16
CAP_MIB = 64
OVER_CAP_MIB = 1  # of each upload: pieces on their way from the socket


def put(client: Client, name: str, pieces: Iterator[bytes]) -> int:
    client.timeout = 600
    return client.request("PUT", name, pieces).status


def silent(size: int, go: threading.Event) -> Iterator[bytes]:
    """A part of an upload, then nothing until the others are done."""
    yield from body(size)
    go.wait(300)
    yield CHUNK


def measured(server: S3, folder: Path, size: int, settings: list[str], title: str) -> tuple[float, bool]:
    """Growth of memory in MiB with 20 uploads at once; and whether all arrived."""
    arguments = [*server.arguments(server.create(), folder), *settings, "server.workers=1"]
    with demo(folder / title, settings=arguments) as running:
        pid = running.process.pid
        target = Target.from_ready(running.ready)
        good = put(target.drive(), "warm-up", body(EACH * MIB)) == 201
        if size:
            speed(target.drive(), pid, size)
        before, started = resident_bytes(pid), time.monotonic()
        with Peak(pid) as peak, ThreadPoolExecutor(AT_ONCE) as pool:
            sent = [
                pool.submit(put, target.drive(), f"file-{number}", body(EACH * MIB))
                for number in range(AT_ONCE)
            ]
            good = all(each.result() == 201 for each in sent) and good
        seconds = time.monotonic() - started
        growth = (peak.bytes - before) / MIB
        print(
            f"{title}: {AT_ONCE} uploads of {EACH} MiB at once, {AT_ONCE * EACH / seconds:.0f} MiB/s, "
            f"{growth:.0f} MiB more memory, {growth / AT_ONCE:.1f} MiB each"
        )
        return growth, stalled(target) and good


def stalled(target: Target) -> bool:
    """One upload beside 19 that hold a part of an object each and say nothing more."""
    go = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [
            pool.submit(put, target.drive(), f"silent-{number}", silent(5 * MIB, go))
            for number in range(AT_ONCE - 1)
        ]
        started = time.monotonic()
        good = put(target.drive(), "passing", body(EACH * MIB)) == 201
        print(f"   one of {EACH} MiB beside {AT_ONCE - 1} silent ones: {time.monotonic() - started:.1f} s")
        go.set()
        return all(each.result() == 201 for each in waiting) and good


def speed(client: Client, pid: int, size: int) -> None:
    cpu, started = cpu_seconds(pid), time.monotonic()
    assert put(client, "large", body(size * MIB)) == 201
    seconds, spent = time.monotonic() - started, cpu_seconds(pid) - cpu
    print(f"upload of {size} MiB: {size / seconds:.0f} MiB/s, {spent / (size * MIB) * 1e9:.2f} CPU s/GB")
    cpu, before, started = cpu_seconds(pid), resident_bytes(pid), time.monotonic()
    with Peak(pid) as peak:
        assert len(client.request("GET", "large").body) == size * MIB
    seconds, spent = time.monotonic() - started, cpu_seconds(pid) - cpu
    growth = (peak.bytes - before) / MIB
    print(
        f"download of {size} MiB: {size / seconds:.0f} MiB/s, {spent / (size * MIB) * 1e9:.2f} CPU s/GB, "
        f"{growth:.1f} MiB more memory"
    )


def main(count: int = 128) -> bool:
    """`count` is the size of the single upload in MiB."""
    with tempfile.TemporaryDirectory(prefix="ksync-bench-") as name, s3() as server:
        folder = Path(name)
        free, arrived = measured(server, folder, count, [], "uncapped")
        capped, also = measured(server, folder, 0, [f"s3.memory_bytes={CAP_MIB * MIB}"], "capped")
    held = verdict("memory for each of 20 uploads, MiB", free / AT_ONCE, BAR_MIB, at_least=False)
    over = CAP_MIB + OVER_CAP_MIB * AT_ONCE
    held &= verdict(f"memory of all under a cap of {CAP_MIB} MiB", capped, over, at_least=False)
    return held and arrived and also
