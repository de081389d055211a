"""Bytes: nothing visible before publish, nothing left after an abort, nothing reaped that lives."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from conformance.servers import S3
from ksync_server import settings
from ksync_server.errors import BodyTooLarge, InsufficientStorage, Unavailable
from ksync_server.store import blobs
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database
from ksync_server.store.extents import ExtentWriter, LocalExtents, Stored, disk_failure

EXTENT = 1000


def open_store(request: pytest.FixtureRequest, kind: str, database: Database, folder: Path) -> Blobs:
    """Bytes on `local` files or on `s3`, with extents of 1,000 bytes that are reaped at once."""
    whole = settings.Settings(
        blobs=settings.Blobs(path=folder / "blobs", inline_bytes=100, extent_bytes=EXTENT, reap_after_s=0)
    )
    if kind == "s3":
        server: S3 = request.getfixturevalue("s3_server")
        given = server.settings(server.create(), folder)
        whole = msgspec.structs.replace(whole, s3=s3_settings(given))
    return Blobs(whole.blobs, database, blobs.open_extents(whole))


def s3_settings(given: dict[str, str], **more: Any) -> settings.S3:
    values = {**given, "credentials_file": Path(given["credentials_file"]), "prefix": "a/b/"}
    return settings.S3(**{"extent_bytes": EXTENT, "patience_s": 2.0, **values, **more})


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, database: Database, tmp_path: Path) -> Iterator[Blobs]:
    store = open_store(request, request.param, database, tmp_path)
    yield store
    store.close()


def stored_keys(store: Blobs) -> list[str]:
    """What is on the store: files with their temporary names, or objects."""
    if isinstance(store.extents, LocalExtents):
        return [path.name for path in store.settings.path.rglob("*") if path.is_file()]
    return [each.key for each in store.extents.list_stored()]


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
    return store.database


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
    assert (stored_keys(store) == []) == (size <= 100)


def test_an_upload_that_cannot_be_erased_is_given_up_and_reaped_later(
    request: pytest.FixtureRequest, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(request, "local", database, tmp_path)
    stage = store.stage(10**9)
    stage.write(b"x" * (2 * EXTENT + 5))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        writer = store.extents.create("ab" * 16)
        writer.write(b"y")
        writer.abort()
        assert len(stored_keys(store)) == 4
        stage.abort()
    store.extents.erase(["ab" * 16])
    assert len(stored_keys(store)) == 3
    assert database.fast(sa.select(t.stage.c.id)) == []
    assert store.reap() == 3
    assert stored_keys(store) == []
    store.close()


def test_more_than_the_limit_is_refused_and_leaves_nothing(store: Blobs) -> None:
    stage = store.stage(3000)
    stage.write(b"x" * 3000)
    with pytest.raises(BodyTooLarge):
        stage.write(b"x")
    stage.abort()
    assert stored_keys(store) == []
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
    assert stored_keys(store) == []
    assert database.fast(sa.select(t.extent.c.key)) == []


def test_leftovers_of_a_crash_are_reaped_and_live_uploads_are_not(store: Blobs) -> None:
    crashed = store.stage(10_000)
    crashed.write(b"z" * 2500)  # two extents and a part, then kill -9
    for flushing in crashed.pending(EXTENT):
        flushing.result()
    database = database_of(store)
    kept = stored(store, b"k" * 1500)
    live = store.stage(10_000)
    live.write(b"l" * 2500)
    # The crashed upload's lease protects it until it ends.
    assert store.reap() == 0
    assert crashed._id is not None
    left = [key for key in stored_keys(store) if key.startswith(crashed._id)]
    assert len(left) >= 2
    database.write(
        lambda tx: tx.execute(sa.update(t.stage).where(t.stage.c.id != live._id).values(lease_until=0))
    )
    assert store.reap() == len(left)
    assert not {key for key in stored_keys(store) if key.startswith(crashed._id)}
    crashed._writer.abort()  # type: ignore[union-attr]
    staged = live.finish()
    blob = database.write(lambda tx: blobs.publish(tx, staged))
    assert read(store, blob) == b"l" * 2500
    assert read(store, kept) == b"k" * 1500


@pytest.fixture
def local(request: pytest.FixtureRequest, database: Database, tmp_path: Path) -> Iterator[Blobs]:
    store = open_store(request, "local", database, tmp_path)
    yield store
    store.close()


def test_a_full_disk_is_told_and_leaves_nothing_visible(local: Blobs) -> None:
    store = local

    class FullWriter:
        def write(self, piece: bytes) -> None:
            raise disk_failure(OSError(28, "No space left on device"))

        def finish(self) -> None:
            raise AssertionError

        def abort(self) -> None:
            pass

    class Full(LocalExtents):
        def create(self, key: str) -> ExtentWriter:
            return FullWriter()

    full = Blobs(store.settings, database_of(store), Full(store.settings.path, EXTENT))
    stage = full.stage(10_000)
    with pytest.raises(InsufficientStorage):
        stage.write(b"x" * 500)
    stage.abort()
    full.close()
    assert database_of(store).fast(sa.select(t.stage.c.id)) == []


def test_extents_are_flushed_before_they_count(local: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for name in ("fdatasync", "rename", "fsync"):
        real = getattr(os, name)

        def record(*arguments: object, name: str = name, real: object = real) -> object:
            events.append(name)
            return real(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(os, name, record)
    stored(local, b"x" * 900)
    assert events[:3] == ["fdatasync", "rename", "fsync"]


# -- the reaper, whatever comes between its steps ---------------------------------------------------


def released(store: Blobs, size: int = 1500) -> list[str]:
    """Keys of content that was stored and let go."""
    blob = stored(store, b"r" * size)
    with database_of(store).read() as tx:
        keys = [key for key, _ in blobs.content(tx, blob).extents]
    database_of(store).write(lambda tx: blobs.release(tx, blob))
    return keys


@pytest.mark.parametrize("moment", ["before the listing", "before the look", "after the look"])
def test_an_upload_published_while_the_reaper_looks_keeps_its_bytes(
    store: Blobs, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    database = database_of(store)
    stage = store.stage(10_000)
    stage.write(b"p" * 3500)
    staged = stage.finish()
    made: list[int] = []

    def publish() -> None:
        if not made:
            made.append(database.write(lambda tx: blobs.publish(tx, staged)))

    listing, look = store.extents.list_stored, store.orphans

    def list_stored() -> Iterator[Stored]:
        if moment == "before the listing":
            publish()
        yield from listing()

    def orphans(listed: list[Stored]) -> list[str]:
        if moment == "before the look":
            publish()
        found = look(listed)
        publish()
        return found

    monkeypatch.setattr(store.extents, "list_stored", list_stored)
    monkeypatch.setattr(store, "orphans", orphans)
    assert store.reap() == 0
    assert read(store, made[0]) == b"p" * 3500


def test_an_upload_whose_lease_ended_under_the_reaper_is_never_published_without_its_bytes(
    store: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = database_of(store)
    stage = store.stage(10_000)
    stage.write(b"p" * 3500)
    staged = stage.finish()
    database.write(lambda tx: tx.execute(sa.update(t.stage).values(lease_until=1)))
    look, answers = store.orphans, []

    def orphans(listed: list[Stored]) -> list[str]:
        stage.beat()  # the upload wakes up: its row is gone, and nothing brings it back
        with pytest.raises(Unavailable):
            database.write(lambda tx: blobs.publish(tx, staged))
        answers.append(look(listed))
        return answers[-1]

    monkeypatch.setattr(store, "orphans", orphans)
    assert store.reap() == 4
    assert len(answers[0]) == 4
    assert database.fast(sa.select(t.blob.c.id)) == []
    assert stored_keys(store) == []


def test_bytes_released_while_the_reaper_looks_wait_for_their_own_time(
    store: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.settings = msgspec.structs.replace(store.settings, reap_after_s=3600)
    database = database_of(store)
    blob = stored(store, b"r" * 2500)
    look = store.orphans

    def orphans(listed: list[Stored]) -> list[str]:
        database.write(lambda tx: blobs.release(tx, blob))
        return look(listed)

    monkeypatch.setattr(store, "orphans", orphans)
    monkeypatch.setattr(store, "old_extents", store.extents.list_stored)  # all are old enough
    assert store.reap() == 0
    assert len(stored_keys(store)) == 3


def test_an_extent_that_garbage_and_a_blob_both_name_is_kept(store: Blobs) -> None:
    blob = stored(store, b"k" * 2500)
    database = database_of(store)
    database.write(
        lambda tx: tx.execute(
            sa.insert(t.garbage).from_select(["key", "since"], sa.select(t.extent.c.key, sa.literal(0)))
        )
    )
    store.reap()
    assert read(store, blob) == b"k" * 2500


def test_a_reaper_that_dies_between_erasing_and_forgetting_goes_on(
    store: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = released(store)
    database = database_of(store)
    database.write(lambda tx: tx.execute(sa.update(t.garbage).values(since=0)))
    store.extents.erase(keys)
    assert store.reap() == len(keys)
    assert database.fast(sa.select(t.garbage.c.key)) == []
    assert store.reap() == 0


def test_a_store_that_does_not_answer_leaves_the_garbage_for_the_next_run(
    store: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = released(store)
    database = database_of(store)
    database.write(lambda tx: tx.execute(sa.update(t.garbage).values(since=0)))

    def away(keys: object) -> None:
        raise Unavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(store.extents, "erase", away)
        with pytest.raises(Unavailable):
            store.reap()
    assert len(database.fast(sa.select(t.garbage.c.key))) == len(keys)
    assert store.reap() == len(keys)
    assert stored_keys(store) == []


def test_reapers_in_several_processes_and_uploads_at_once_lose_nothing(store: Blobs) -> None:
    """Four reapers without a pause against two threads that store, share and let go."""
    database = database_of(store)
    over = threading.Event()
    kept: dict[int, bytes] = {}

    def reaping() -> int:
        runs = 0
        while not over.is_set():
            store.reap()
            runs += 1
        return runs

    def storing(number: int) -> None:
        for turn in range(8):
            content = bytes([number, turn]) * 1100
            blob = stored(store, content)
            if turn % 2:
                database.write(lambda tx, blob=blob: blobs.release(tx, blob))  # type: ignore[misc]
            else:
                kept[blob] = content

    with ThreadPoolExecutor(6) as pool:
        reapers = [pool.submit(reaping) for _ in range(4)]
        for uploads in [pool.submit(storing, number) for number in range(2)]:
            uploads.result(60)
        over.set()
        assert all(each.result(60) for each in reapers)
    for blob, content in kept.items():
        assert read(store, blob) == content
    database.write(lambda tx: tx.execute(sa.update(t.garbage).values(since=0)))
    store.reap()
    assert len(stored_keys(store)) == 3 * len(kept)


# -- damage -----------------------------------------------------------------------------------------


def damaged(store: Blobs) -> list[int]:
    rows = database_of(store).fast(sa.select(t.blob.c.id).where(t.blob.c.damaged_at.is_not(None)))
    return [blob for (blob,) in rows]


@pytest.mark.parametrize("part", [0, 1])
def test_reading_a_missing_extent_breaks_off_and_marks_the_blob(store: Blobs, part: int) -> None:
    blob = stored(store, b"1" * 2500)
    other = stored(store, b"2" * 2500)
    with database_of(store).read() as tx:
        content = blobs.content(tx, blob)
    store.extents.erase([content.extents[part][0]])
    got: list[bytes] = []
    with pytest.raises(Unavailable):
        got.extend(store.read(content, 0, content.size, 100))
    assert b"".join(got) == b"1" * (EXTENT * part)
    assert damaged(store) == [blob]
    assert read(store, other) == b"2" * 2500


def test_an_extent_that_is_too_short_is_damage(store: Blobs) -> None:
    blob = stored(store, b"1" * 2500)
    database_of(store).write(
        lambda tx: tx.execute(sa.update(t.extent).where(t.extent.c.position == 2).values(size=700))
    )
    with database_of(store).read() as tx:
        content = blobs.content(tx, blob)
    with pytest.raises(Unavailable):
        list(store.read(content, 2000, 2700, 100))
    assert damaged(store) == [blob]


def test_the_listing_names_every_extent_in_order_with_its_size(store: Blobs) -> None:
    for _ in range(30):
        stored(store, b"x" * 1500)
    listed = list(store.extents.list_stored())
    assert [each.key for each in listed] == sorted(stored_keys(store))
    assert sorted({each.size for each in listed}) == [500, 1000]
    assert all(abs(each.written_at - time.time()) < 60 for each in listed)
    assert store.extents.size(listed[0].key) == listed[0].size
    assert store.extents.size("0" * 32) is None


def test_extents_may_end_anywhere(store: Blobs) -> None:
    stage = store.stage(10_000)
    content = os.urandom(3333)
    for start in range(0, len(content), 111):
        stage.write(content[start : start + 111])
        if start % 7 == 0:
            stage.cut()
    staged = stage.finish()
    assert len(staged.extents) > 4
    blob = database_of(store).write(lambda tx: blobs.publish(tx, staged))
    assert read(store, blob) == content
    assert read(store, blob, 700, 2900) == content[700:2900]
