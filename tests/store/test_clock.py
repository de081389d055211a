"""The clock of a machine jumps: nothing is lost, and no ETag, token or lease says what is not true."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from ksync_server import settings
from ksync_server.errors import Forbidden, Unavailable
from ksync_server.store import blobs, changes, holds
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database, Write

HOUR, DAY = 3600, 86400


class Clock:
    """time.time() of this process, moved by `jump`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        really = time.time
        self.ahead = 0
        monkeypatch.setattr(time, "time", lambda: really() + self.ahead)

    def jump(self, seconds: int) -> None:
        self.ahead += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def bytes_(database: Database, tmp_path: Path) -> Iterator[Blobs]:
    opened = Blobs(settings.Blobs(path=tmp_path / "blobs", inline_bytes=10, extent_bytes=100), database)
    yield opened
    opened.close()


def staged(opened: Blobs) -> blobs.StagedBlob:
    stage = opened.stage(1000)
    stage.write(b"x" * 300)
    return stage.finish()


def count(database: Database, table: sa.Table) -> int:
    return int(database.fast(sa.select(sa.func.count()).select_from(table))[0][0])


@pytest.mark.parametrize("jump", [-DAY, -HOUR, HOUR // 12])
def test_an_upload_survives_a_clock_that_goes_back_or_a_little_ahead(
    database: Database, bytes_: Blobs, clock: Clock, jump: int
) -> None:
    upload = staged(bytes_)
    clock.jump(jump)
    assert bytes_.reap() == 0
    number = database.write(lambda tx: blobs.publish(tx, upload))
    with database.read() as tx:
        content = blobs.content(tx, number)
    assert b"".join(bytes_.read(content, 0, 300, 100)) == b"x" * 300


def test_a_clock_a_day_ahead_ends_an_upload_and_never_half_publishes_it(
    database: Database, bytes_: Blobs, clock: Clock
) -> None:
    upload = staged(bytes_)
    clock.jump(DAY)
    assert bytes_.reap() == 3
    with pytest.raises(Unavailable):
        database.write(lambda tx: blobs.publish(tx, upload))
    assert count(database, t.blob) == 0


def test_an_upload_under_way_keeps_its_lease_by_its_own_beat(
    database: Database, bytes_: Blobs, clock: Clock
) -> None:
    """It is renewed by a steady clock, to a time by the new one; what came before and after is whole."""
    for jump in (DAY, -DAY, -DAY, DAY):
        stage = bytes_.stage(1000)
        stage.write(b"x" * 150)
        clock.jump(jump)
        stage.beat()
        bytes_.reap()
        stage.write(b"x" * 150)
        upload = stage.finish()
        number = database.write(lambda tx, upload=upload: blobs.publish(tx, upload))
        with database.read() as tx:
            content = blobs.content(tx, number)
        assert b"".join(bytes_.read(content, 0, 300, 100)) == b"x" * 300


@pytest.mark.parametrize("jump", [-DAY, -HOUR, DAY])
def test_published_bytes_outlive_any_jump(database: Database, bytes_: Blobs, clock: Clock, jump: int) -> None:
    upload = staged(bytes_)
    number = database.write(lambda tx: blobs.publish(tx, upload))
    clock.jump(jump)
    bytes_.reap()
    clock.jump(-2 * jump)
    bytes_.reap()
    with database.read() as tx:
        content = blobs.content(tx, number)
    assert b"".join(bytes_.read(content, 0, 300, 100)) == b"x" * 300


def test_released_bytes_stay_their_time_when_the_clock_goes_back(
    database: Database, bytes_: Blobs, clock: Clock
) -> None:
    upload = staged(bytes_)
    number = database.write(lambda tx: blobs.publish(tx, upload))
    database.write(lambda tx: blobs.release(tx, number))
    clock.jump(-HOUR)
    assert bytes_.reap() == 0
    clock.jump(HOUR + 2 * DAY)
    assert bytes_.reap() == 3


def calendar(database: Database) -> int:
    insert = sa.insert(t.collection).returning(t.collection.c.id)
    values = {"kind": "calendar", "name": "a", "created_at": 0}
    number: int = database.write(lambda tx: tx.execute(insert, values).scalar_one())
    return number


def delete(tx: Write, collection: int, name: str) -> None:
    seq = changes.bump(tx, collection)
    values = {"collection_id": collection, "name": name, "seq": seq, "at": int(time.time())}
    tx.execute(sa.insert(t.tombstone), values)


@pytest.mark.parametrize("jump", [-DAY, -HOUR, DAY])
def test_change_numbers_do_not_look_at_the_clock(database: Database, clock: Clock, jump: int) -> None:
    collection = calendar(database)
    first = database.write(lambda tx: changes.bump(tx, collection))
    clock.jump(jump)
    database.write(lambda tx: delete(tx, collection, "gone.ics"))
    with database.read() as tx:
        page = changes.since(tx, collection, changes.Position(first, first), 10)
    assert page.deleted == ("gone.ics",)
    assert page.position.seq == first + 1


def test_deletions_forgotten_too_early_make_clients_start_anew_and_miss_nothing(
    database: Database, clock: Clock
) -> None:
    collection = calendar(database)
    with database.read() as tx:
        token = changes.sync_token(tx.generation, collection, 0)
    database.write(lambda tx: delete(tx, collection, "gone.ics"))
    clock.jump(400 * DAY)
    assert changes.prune(database, int(time.time()) - 90 * DAY) == 1
    clock.jump(-400 * DAY)
    with database.read() as tx, pytest.raises(Forbidden) as caught:
        changes.position(tx, collection, token)
    assert caught.value.precondition == "{DAV:}valid-sync-token"


def test_a_backup_notices_that_a_jump_ended_its_hold(database: Database, clock: Clock) -> None:
    with holds.hold(database) as hold:
        clock.jump(-HOUR)
        hold.check()
        assert holds.is_held(database)
        clock.jump(DAY)
        with pytest.raises(Unavailable):
            hold.check()
