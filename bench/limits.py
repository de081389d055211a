"""The upload limits at their real sizes, 50 GB and 100 GB, exact to the byte; the store throws the bytes away.

Everything else is real: the drive site, the stage with its leases, the publishing transaction. Checksums are
left out: of these 350 GB they would take half an hour and show nothing about limits.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from bench.measure import resident_bytes
from ksync_server import settings
from ksync_server.store import blobs as staging
from ksync_server.store import schema
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database
from ksync_server.store.extents import Memory, Stored
from tests.drive.harness import Client, Drive, closing, make_drive

GB = 10**9
PIECE = bytes(1024 * 1024)  # more than a socket gives at once: a third of a million pieces are enough


class NoHash:
    """A checksum of nothing."""

    def __init__(self, **_: object) -> None:
        """As hashlib's constructors are called."""

    def update(self, piece: bytes) -> None:
        """Forget the bytes."""

    def digest(self) -> bytes:
        return b""


class NoHashes:
    """In place of `hashlib`."""

    md5 = sha1 = sha256 = NoHash


class DiscardingWriter:
    """An extent that keeps nothing."""

    def write(self, piece: bytes) -> None:
        """Forget the bytes."""

    def finish(self) -> None:
        """Nothing to make durable."""

    def abort(self) -> None:
        """Nothing to remove."""


class DiscardingExtents:
    """An extent store that remembers which extents there are, and none of their bytes."""

    extent_bytes = settings.Blobs().extent_bytes
    flushes = 2
    threads = 4

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.memory = Memory(self.extent_bytes)

    def create(self, key: str) -> DiscardingWriter:
        self.keys.add(key)
        return DiscardingWriter()

    def read(self, key: str, start: int, end: int, piece: int) -> Iterator[bytes]:
        raise FileNotFoundError(key)

    def size(self, key: str) -> int | None:
        return self.extent_bytes if key in self.keys else None

    def erase(self, keys: Iterable[str]) -> None:
        self.keys.difference_update(keys)

    def list_stored(self) -> Iterator[Stored]:
        return iter(())

    def check(self) -> None:
        """Nothing can be wrong with it."""

    def problem(self) -> str | None:
        return None


def body(size: int) -> Sequence[object]:
    """A body of `size` bytes: the same piece over and over, then the rest."""
    return [PIECE] * (size // len(PIECE)) + ([PIECE[: size % len(PIECE)]] if size % len(PIECE) else [])


def attempt(client: Client, size: int, *, chunked: bool, expected: int) -> bool:
    started = time.monotonic()
    status = client.send("PUT", "/large", pieces=body(size), length=size, chunked=chunked).status
    seconds = time.monotonic() - started
    good = status == expected
    form = "chunked" if chunked else "declared"
    print(
        f"{'ok  ' if good else 'MISS'} {form:<9}{size:>16,} bytes: {status} (expected {expected}), {seconds:.0f} s"
    )
    return good


def main(count: int = 50) -> bool:
    """`count` is the first limit in GB; the extended one is twice that."""
    limit = count * GB
    with tempfile.TemporaryDirectory(prefix="ksync-bench-") as name:
        every = settings.Settings(database=settings.Database(url=f"sqlite:///{name}/ksync.db"))
        database = Database(every.database, threads=4)
        schema.migrate(database)
        extents = DiscardingExtents()
        blobs = Blobs(settings.Blobs(path=Path(name) / "blobs"), database, extents)
        alice, bob = database.write(make_drive)
        with (
            mock.patch.object(staging, "hashlib", NoHashes),
            closing(Client(Drive(database, blobs, every, alice, bob))) as client,
        ):
            client.granted(max_file_bytes=limit, max_chunked_bytes=limit)
            before = resident_bytes(os.getpid())
            results = [
                attempt(client, limit + 1, chunked=False, expected=413),
                attempt(client, limit, chunked=False, expected=201),
                attempt(client, limit + 1, chunked=True, expected=413),
                attempt(client, limit, chunked=True, expected=204),
            ]
            client.granted(max_file_bytes=limit, max_chunked_bytes=2 * limit)
            kept = set(extents.keys)
            results.append(attempt(client, 2 * limit + 1, chunked=True, expected=413))
            results.append(extents.keys == kept)
            results.append(attempt(client, 2 * limit, chunked=True, expected=204))
            answer = client.send("HEAD", "/large")
            results.append(answer.headers["content-length"] == str(2 * limit))
            print(f"     memory grew by {(resident_bytes(os.getpid()) - before) / 2**20:.1f} MiB")
        blobs.close()
        database.close()
    return all(results)
