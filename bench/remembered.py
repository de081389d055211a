"""Accounts that poll with their passwords: argon2id in the first round, none afterwards, in any web process.

Bar: 100,000 accounts, two processes and one that was started later, 0 argon2id in every round after the first. The first round
is shortened: the hashes of the store are cheap ones (8 KiB), because what is counted is how many run, not how long. Printed beside
it: the memory that the table takes, and CPU of a remembered request.
"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from ksync_server import settings
from ksync_server.auth import keys, offers
from ksync_server.auth.gate import Credentials, Gate, Service
from ksync_server.auth.memory import Memory
from ksync_server.http import Peer
from ksync_server.store import schema
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Write

PASSWORD = "a long enough pass phrase"
_PAGE = 2_000


def _fill(database: Database, hashed: str, count: int) -> None:
    """Accounts without anything: what the door reads of them."""

    def insert(tx: Write, first: int, last: int) -> None:
        now = int(time.time())
        common = {
            "display_name": "x",
            "password_hash": hashed,
            "auth_epoch": 1,
            "state": "active",
            "created_at": now,
        }
        rows = [
            {
                "sync_id": _sync_id(n),
                "login_email": f"p{n}@example.org",
                "login_key": f"p{n}@example.org",
                **common,
            }
            for n in range(first, last)
        ]
        tx.execute(sa.insert(t.account), rows)

    for first in range(0, count, _PAGE):
        database.write(lambda tx, first=first: insert(tx, first, min(count, first + _PAGE)))  # type: ignore[misc]


def _sync_id(number: int) -> str:
    letters, digits = divmod(number, 100_000)
    return f"A{chr(65 + letters)}{digits:05}"


def _peer(number: int) -> Peer:
    return Peer(f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", True, "")


def _round(every: settings.Settings, memory: Memory, numbers: range) -> tuple[int, float]:
    """One web process: how many argon2id it ran for these accounts, and its CPU seconds."""
    database = Database(every.database, threads=2)
    gate = Gate(every, database, keys.load(every.auth.key_file), offers.load(None), memory)
    hashes = 0
    began = time.process_time()
    for number in numbers:
        credentials = Credentials(_sync_id(number), PASSWORD)
        if gate.recognise(credentials, _peer(number), service=Service.CALDAV) is None:
            hashes += 1
            gate.identify(credentials, _peer(number), service=Service.CALDAV)
    spent = time.process_time() - began
    gate.close()
    database.close()
    return hashes, spent


def _in_process(work: Callable[[], tuple[int, float]]) -> Callable[[], tuple[int, float]]:
    """Start work in a fork; the result waits for its end."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        os.write(theirs, struct.pack("<qd", *work()))
        os._exit(0)
    os.close(theirs)

    def result() -> tuple[int, float]:
        answer = os.read(ours, 16)
        os.close(ours)
        os.waitpid(pid, 0)
        hashes, seconds = struct.unpack("<qd", answer)
        return hashes, seconds

    return result


def _shared_kib() -> int:
    """Shared anonymous memory that this process has touched."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssShmem:"):
            return int(line.split()[1])
    raise AssertionError("RssShmem")


def main(count: int = 100_000) -> bool:
    """Print the rounds; whether the bar holds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        every = settings.Settings(
            database=settings.Database(url=f"sqlite:///{folder}/ksync.db"),
            auth=settings.Auth(
                key_file=folder / "keys.toml", argon2_memory_kib=8, argon2_time=1, cache_entries=count
            ),
        )
        before = _shared_kib()
        memory = Memory(every.auth.cache_entries)  # as the supervisor, before any process
        database = Database(every.database, threads=1)
        schema.migrate(database)
        ring = keys.load(every.auth.key_file)
        hashed = Gate(every, database, ring, offers.load(None)).passwords.hash(PASSWORD)
        _fill(database, hashed, count)
        database.close()
        halves = (range(0, count, 2), range(1, count, 2))
        rounds = [
            ("first round, two processes at once", halves),
            ("second round, each the other's accounts", halves[::-1]),
            ("third round, a process started later", (range(count),)),
        ]
        held = True
        for title, parts in rounds:
            running = [_in_process(lambda part=part: _round(every, memory, part)) for part in parts]  # type: ignore[misc]
            results = [each() for each in running]
            hashes, spent = (sum(column) for column in zip(*results, strict=True))
            print(f"{title:45} argon2id {hashes:>8,}   CPU {spent / count * 1e6:6.0f} us for each account")
            held &= hashes == (count if title.startswith("first") else 0)
        memory.knows(memory.tag(b"touch"), 1)
        sum(memory._map[at] for at in range(0, len(memory._map), 4096))
        print(f"memory of the table: {(_shared_kib() - before) / 1024:.1f} MiB, shared by all processes")
        print(f"bar: {count:,} accounts, no argon2id after the first round: {'held' if held else 'MISSED'}")
        return held


if __name__ == "__main__":
    raise SystemExit(0 if main() else 1)
