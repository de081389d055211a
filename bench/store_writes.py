"""Durable small writes of many processes, and how long an idle writer waits behind an import and a large COPY.

A write selects a row and updates its 300 bytes. Bars, SQLite at FULL: 4 processes
of 16 threads make at least 10,000 a second; an idle writer waits at most 250 ms or 20 flushes of this disk. For
PostgreSQL figures alone: one hot collection, and 16 of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench.measure import verdict
from conformance.servers import REPOSITORY, postgresql
from ksync_server import settings
from ksync_server.drive import copying, tree
from ksync_server.store import changes, schema
from ksync_server.store import tables as t
from ksync_server.store.blobs import publish, staged_bytes
from ksync_server.store.database import Database, Write
from tests.drive.harness import make_drive

BAR = 10_000  # writes a second
BAR_WAIT_MS = 250.0
BAR_FLUSHES = 20
PROCESSES = 4
THREADS = 16
SECONDS = 4.0
IDLE_S = 0.05  # between two writes of the idle writer
FOLDERS = 100  # of the tree that is copied

_P = sa.bindparam
_SELECT = sa.select(t.audit.c.detail).where(t.audit.c.id == _P("id_"))
_UPDATE = sa.update(t.audit).where(t.audit.c.id == _P("id_")).values(detail=_P("detail"))
_NEW = sa.insert(t.collection).returning(t.collection.c.id)


def small(row: int) -> Callable[[Write], object]:
    """One select and one update of 300 bytes."""

    def write(tx: Write) -> None:
        tx.fast(_SELECT, {"id_": row})
        tx.fast(_UPDATE, {"id_": row, "detail": "x" * 300})

    return write


def bumping(collection: int) -> Callable[[Write], object]:
    """What every change of a collection begins with: its row stays locked until commit."""

    def write(tx: Write) -> None:
        changes.bump(tx, collection)
        tx.fast(_UPDATE, {"id_": collection, "detail": "x" * 300})

    return write


# -- in processes of their own --------------------------------------------------------------------


def work(url: str, kind: str, first: int, spread: int, seconds: float) -> None:
    """16 threads that write for a while; prints how many writes that were and the longest wait."""
    database = Database(settings.Database(url=url), threads=THREADS)
    make = small if kind == "small" else bumping
    database.write(make(1))
    print("ready", flush=True)
    sys.stdin.readline()
    until = time.perf_counter() + seconds
    counts, longest = [0] * THREADS, [0.0] * THREADS

    def loop(number: int) -> None:
        write = make((first + number) % spread + 1)
        now = time.perf_counter()
        while now < until:
            database.write(write)
            then, now = now, time.perf_counter()
            longest[number] = max(longest[number], now - then)
            counts[number] += 1

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    database.close()
    print(json.dumps({"count": sum(counts), "longest_ms": max(longest) * 1000}), flush=True)


def idle(url: str, seconds: float) -> None:
    """One write now and then; prints how long each waited."""
    database = Database(settings.Database(url=url), threads=1)
    write = small(1)
    database.write(write)
    print("ready", flush=True)
    sys.stdin.readline()
    waits = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        database.write(write)
        waits.append((time.perf_counter() - began) * 1000)
        time.sleep(IDLE_S)
    database.close()
    print(json.dumps({"waits_ms": waits}), flush=True)


def copy(url: str, drive: str) -> None:
    """COPY of the whole tree over and over until the input ends; prints how often and the longest."""
    database = Database(settings.Database(url=url), threads=2)
    every = settings.Drive(max_files=10_000_000)
    known = json.loads(drive)
    view = tree.View(tree.DriveGrant(**known), every, False)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    with database.read() as tx:
        source = tree.resolve(tx, view, ("source",)).node
    assert source is not None
    prepared = copying.prepare_copy(database, view, source, deep=True)

    def finish(tx: Write) -> None:
        change = tree.begin(tx, view)
        places = (tree.resolve(tx, view, (name,)) for name in ("source", "copy"))
        copying.copy(change, *places, prepared)

    database.write(finish)
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    database.close()


@contextlib.contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """This module as a process; it begins when `go` tells it so."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.store_writes", *words],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def go(*processes: subprocess.Popen[str]) -> None:
    """Let them begin together, once all are ready."""
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    found: dict[str, Any] = json.loads(process.stdout.readline())
    return found


def together(url: str, kind: str, spread: int, seconds: float) -> tuple[float, float, list[int]]:
    """Writes a second of all processes, the longest wait in ms, the count of each."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(started("work", url, kind, str(number * THREADS), str(spread), str(seconds)))
            for number in range(PROCESSES)
        ]
        go(*processes)
        found = [answer(process) for process in processes]
    counts = [each["count"] for each in found]
    return sum(counts) / seconds, max(each["longest_ms"] for each in found), counts


# -- the measurement ------------------------------------------------------------------------------


def flush_ms(folder: Path) -> float:
    """Median time of an fdatasync after 4 KiB, what a commit at FULL costs at least."""
    times = []
    with (folder / "flush").open("wb", buffering=0) as file:
        for _ in range(100):
            file.write(b"x" * 4096)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)


def prepared(url: str) -> Database:
    database = Database(settings.Database(url=url), threads=4)
    schema.migrate(database)
    rows = [
        {"at": 0, "actor": "a", "action": "b", "subject": str(number), "detail": "x" * 300}
        for number in range(PROCESSES * THREADS)
    ]
    database.write(lambda tx: tx.execute(sa.insert(t.audit), rows) and None)
    for number in range(16):
        values = {"kind": "calendar", "name": str(number), "created_at": 0}
        database.write(lambda tx, values=values: tx.execute(_NEW, values).scalar_one())  # type: ignore[misc]
    return database


def plant(database: Database, nodes: int) -> dict[str, object]:
    """A drive with a tree of so many nodes in 100 folders; returns its grant."""
    grant = database.write(make_drive)[0]
    blob = database.write(lambda tx: publish(tx, staged_bytes(b"content")))
    each = {"drive_id": grant.drive_id, "seq": 1, "mtime_ms": 0, "created_at": 0}
    per_folder = nodes // FOLDERS

    def folder(tx: Write, parent: int, name: str, entries: int) -> int:
        values = {**each, "parent_id": parent, "name": name, "folder": True, "entries": entries}
        return int(tx.execute(sa.insert(t.node).returning(t.node.c.id), values).scalar_one())

    top = database.write(lambda tx: folder(tx, grant.root_id, "source", FOLDERS))
    for number in range(FOLDERS):

        def fill(tx: Write, number: int = number) -> None:
            parent = folder(tx, top, f"folder {number:03}", per_folder)
            file = {**each, "parent_id": parent, "folder": False, "size": 7, "blob_id": blob}
            tx.execute(sa.insert(t.node), [{**file, "name": f"{n:05}.txt"} for n in range(per_folder)])

        database.write(fill)
    database.write(lambda tx: tx.execute(sa.update(t.blob).values(refs=nodes)) and None)
    return {name: getattr(grant, name) for name in type(grant).__dataclass_fields__}


def behind(url: str, grant: dict[str, object], seconds: float) -> tuple[list[float], float, float]:
    """Waits of an idle writer while an import and a COPY run; writes a second of the import; COPY's time."""
    with (
        started("idle", url, str(seconds)) as quiet,
        started("work", url, "small", "0", str(PROCESSES * THREADS), str(seconds)) as load,
        started("copy", url, json.dumps(grant)) as copying,
    ):
        go(copying, load, quiet)
        waits = sorted(answer(quiet)["waits_ms"])
        imported = answer(load)["count"] / seconds
        copied = answer(copying)["seconds"]
    return waits, imported, copied


def main(count: int = 100_000) -> bool:
    """`count` is the number of nodes of the COPY."""
    good = True
    with tempfile.TemporaryDirectory(prefix="ksync-bench-") as name:
        folder = Path(name)
        flush = flush_ms(folder)
        print(f"     fdatasync of 4 KiB on this disk: {flush:.2f} ms")
        url = f"sqlite:///{folder / 'rows.db'}"
        database = prepared(url)
        speed, longest, counts = together(url, "small", PROCESSES * THREADS, SECONDS)
        print(f"     shares of the processes: {counts}; longest wait {longest:.0f} ms")
        what = f"durable writes a second, SQLite FULL, {PROCESSES} processes of {THREADS} threads"
        good &= verdict(what, speed, BAR, at_least=True)
        grant = plant(database, count)
        waits, imported, copied = behind(url, grant, SECONDS * 3)
        database.close()
        print(
            f"     behind an import ({imported:.0f} writes/s) and a COPY of {count} nodes ({copied:.1f} s):"
            f" {len(waits)} writes, median {statistics.median(waits):.1f} ms,"
            f" 99 % {waits[int(len(waits) * 0.99)]:.1f} ms"
        )
        bar = max(BAR_WAIT_MS, BAR_FLUSHES * flush)
        good &= verdict("longest wait of an idle writer, ms", waits[-1], bar, at_least=False)
    with postgresql(durable=True) as server, server.database() as url:
        prepared(url).close()
        for spread in (1, 16):
            speed, longest, counts = together(url, "bump", spread, SECONDS)
            print(
                f"     PostgreSQL, {spread} hot: {speed:.0f} writes/s, longest wait {longest:.0f} ms, {counts}"
            )
    return good


if __name__ == "__main__":
    command, url_, *rest = sys.argv[1:]
    if command == "work":
        work(url_, rest[0], int(rest[1]), int(rest[2]), float(rest[3]))
    elif command == "idle":
        idle(url_, float(rest[0]))
    else:
        copy(url_, rest[0])
