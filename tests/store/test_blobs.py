"""Bytes: nothing visible before publish, nothing left after an abort, nothing reaped that lives."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from ksync_server import settings
from ksync_server.errors import BodyTooLarge, InsufficientStorage, Unavailable
from ksync_server.store import blobs
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database

EXTENT = 1000


@pytest.fixture
def store(database: Database, tmp_path: Path) -> Iterator[Blobs]:
    store = Blobs(
        settings.Blobs(path=tmp_path / "blobs", inline_bytes=100, extent_bytes=EXTENT, reap_after_s=0),
        database,
    )
    yield store
    store.close()


def files(store: Blobs) -> list[Path]:
    return [path for path in store.settings.path.rglob("*") if path.is_file()]


def stored(store: Blobs, content: bytes, piece: int = 333) -> int:
    stage = store.stage(10**9)
    for start in range(0, len(content), piece):
        stage.write(content[start : start + piece])
    staged = stage.finish()
    assert staged.sha256 == hashlib.sha256(content).digest()
    assert staged.sha1 == hashlib.sha1(content).digest()
    assert staged.md5 == hashlib.md5(content).digest()
    return database_of(store).write(lambda tx: blobs.publish(tx, staged))


def database_of(store: Blobs) -> Database:
    return store._database


def read(store: Blobs, blob: int, start: int = 0, end: int | None = None) -> bytes:
    with database_of(store).read() as tx:
        content = blobs.content(tx, blob)
    return b"".join(store.read(content, start, content.size if end is None else end, 77))


@pytest.mark.parametrize("size", [0, 1, 100, 101, 999, 1000, 1001, 5000])
def test_content_of_any_size_comes_back_whole_and_in_parts(store: Blobs, size: int) -> None:
    content = os.urandom(size)
    blob = stored(store, content)
    assert read(store, blob) == content
    for start, end in [(0, size // 2), (size // 3, size), (size, size)]:
        assert read(store, blob, start, end) == content[start:end]
    assert (files(store) == []) == (size <= 100)


def test_more_than_the_limit_is_refused_and_leaves_nothing(store: Blobs) -> None:
    stage = store.stage(3000)
    stage.write(b"x" * 3000)
    with pytest.raises(BodyTooLarge):
        stage.write(b"x")
    stage.abort()
    assert files(store) == []
    assert database_of(store).fast(sa.select(t.stage.c.id)) == []


def test_a_staged_upload_whose_lease_ran_out_cannot_be_published(store: Blobs) -> None:
    stage = store.stage(10_000)
    stage.write(b"x" * 5000)
    staged = stage.finish()
    database = database_of(store)
    database.write(lambda tx: tx.execute(sa.update(t.stage).values(lease_until=int(time.time()) - 1)))
    with pytest.raises(Unavailable):
        database.write(lambda tx: blobs.publish(tx, staged))
    assert database.fast(sa.select(t.blob.c.id)) == []


def test_the_last_reference_leaves_the_bytes_to_the_reaper(store: Blobs) -> None:
    database = database_of(store)
    blob = stored(store, b"y" * 2500)
    database.write(lambda tx: blobs.share(tx, blob))
    database.write(lambda tx: blobs.release(tx, blob))
    assert store.reap() == 0
    assert read(store, blob) == b"y" * 2500
    with database.read() as tx:
        held = blobs.content(tx, blob)
    database.write(lambda tx: blobs.release(tx, blob))
    assert b"".join(store.read(held, 0, held.size, 100)) == b"y" * 2500  # a download goes on
    database.write(lambda tx: tx.execute(sa.update(t.garbage).values(since=0)))
    assert store.reap() == 3
    assert files(store) == []
    assert database.fast(sa.select(t.extent.c.key)) == []


def test_leftovers_of_a_crash_are_reaped_and_live_uploads_are_not(store: Blobs) -> None:
    crashed = store.stage(10_000)
    crashed.write(b"z" * 2500)  # two extents and a part, then kill -9
    crashed._writer._file.close()  # type: ignore[union-attr]
    database = database_of(store)
    kept = stored(store, b"k" * 1500)
    for path in files(store):
        os.utime(path, (0, 0))
    live = store.stage(10_000)
    live.write(b"l" * 2500)
    # The crashed upload's lease protects it until it ends.
    assert store.reap() == 0
    database.write(
        lambda tx: tx.execute(sa.update(t.stage).where(t.stage.c.id != live._id).values(lease_until=0))
    )
    assert store.reap() == 3
    staged = live.finish()
    blob = database.write(lambda tx: blobs.publish(tx, staged))
    assert read(store, blob) == b"l" * 2500
    assert read(store, kept) == b"k" * 1500


def test_a_full_disk_is_told_and_leaves_nothing_visible(store: Blobs) -> None:
    class FullWriter:
        def write(self, piece: bytes) -> None:
            raise blobs._disk(OSError(28, "No space left on device"))

        def finish(self) -> None:
            raise AssertionError

        def abort(self) -> None:
            pass

    class Full(blobs.LocalExtents):
        def create(self, key: str) -> blobs.ExtentWriter:
            return FullWriter()

    full = Blobs(store.settings, database_of(store), Full(store.settings.path))
    stage = full.stage(10_000)
    with pytest.raises(InsufficientStorage):
        stage.write(b"x" * 500)
    stage.abort()
    full.close()
    assert database_of(store).fast(sa.select(t.stage.c.id)) == []


def test_extents_are_flushed_before_they_count(store: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for name in ("fdatasync", "rename", "fsync"):
        real = getattr(os, name)

        def record(*arguments: object, name: str = name, real: object = real) -> object:
            events.append(name)
            return real(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(os, name, record)
    stored(store, b"x" * 900)
    assert events[:3] == ["fdatasync", "rename", "fsync"]
