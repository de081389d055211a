"""The scrub: what was never read first, no faster than allowed, and on from where it was cut."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from ksync_server import settings
from ksync_server.errors import Unavailable
from ksync_server.store import blobs, scrub
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database

DAY = 86400


@pytest.fixture
def store(database: Database, tmp_path: Path) -> Iterator[Blobs]:
    store = Blobs(settings.Blobs(path=tmp_path / "blobs", inline_bytes=100, extent_bytes=1000), database)
    yield store
    store.close()


def stored(store: Blobs, content: bytes) -> int:
    stage = store.stage(10**9)
    stage.write(content)
    staged = stage.finish()
    return store.database.write(lambda tx: blobs.publish(tx, staged))


def rows(store: Blobs, column: sa.ColumnElement[Any]) -> dict[int, Any]:
    return dict(store.database.fast(sa.select(t.blob.c.id, column).order_by(t.blob.c.id)))  # type: ignore[arg-type]


def age(store: Blobs, blob: int, days: float) -> None:
    at = int(time.time() - days * DAY)
    store.database.write(
        lambda tx: tx.execute(sa.update(t.blob).where(t.blob.c.id == blob).values(scrubbed_at=at))
    )


def no_wait(seconds: float) -> None:
    """Of a scrub that keeps its pace."""


def test_all_is_read_and_what_is_wrong_is_marked(store: Blobs, caplog: pytest.LogCaptureFixture) -> None:
    sound = [stored(store, b"s" * 50), stored(store, os.urandom(2500)), stored(store, b"")]
    small, large, missing = stored(store, b"a" * 50), stored(store, b"b" * 2500), stored(store, b"c" * 2500)
    with store.database.read() as tx:
        key = blobs.content(tx, missing).extents[1][0]
        other = blobs.content(tx, large).extents[2][0]
    store.extents.erase([key])
    store.extents._path(other).write_bytes(b"B" * 500)  # type: ignore[attr-defined]
    store.database.write(
        lambda tx: tx.execute(sa.update(t.blob).where(t.blob.c.id == small).values(content=b"A" * 50))
    )
    report = scrub.run(store, sleep=no_wait)
    assert (report.blobs, report.damaged, report.finished) == (6, 3, True)
    assert report.bytes == 50 + 2500 + 50 + 2500 + 2500
    damaged = {blob for blob, at in rows(store, t.blob.c.damaged_at).items() if at}
    assert damaged == {small, large, missing}
    assert all(rows(store, t.blob.c.scrubbed_at).values())
    told = [record for record in caplog.records if record.message == "blob damaged"]
    assert sorted(vars(record)["blob"] for record in told) == sorted(damaged)
    assert store.totals() == (6, 7600, 3, 0)
    assert scrub.run(store, sleep=no_wait) == scrub.Report(0, 0, 0, True)
    store.extents._path(other).write_bytes(b"b" * 500)  # type: ignore[attr-defined]
    age(store, large, 31)
    assert scrub.run(store, sleep=no_wait).damaged == 0
    assert rows(store, t.blob.c.damaged_at)[large] is None
    assert sound


def test_the_order_is_never_read_first_then_longest_ago(store: Blobs) -> None:
    made = [stored(store, bytes([number]) * 10) for number in range(6)]
    for blob, days in zip(made[:4], (40, 50, 35, 1), strict=True):
        age(store, blob, days)
    before = int(time.time()) - 30 * DAY
    read = [each.id for each in scrub.scrubbing(store, scrub.due(store, before))]
    assert read == [made[4], made[5], made[1], made[0], made[2]]


def test_a_run_that_is_cut_goes_on_where_it_was(store: Blobs) -> None:
    made = [stored(store, bytes([number]) * 200) for number in range(150)]
    running = scrub.scrubbing(store, scrub.due(store, 0))
    first = [next(running).id for _ in range(100)]
    running.close()
    rest = [each.id for each in scrub.scrubbing(store, scrub.due(store, 0))]
    assert first + rest == made


def test_a_killed_run_loses_a_page_at_most(store: Blobs) -> None:
    made = [stored(store, bytes([number]) * 10) for number in range(150)]
    running = scrub.scrubbing(store, scrub.due(store, 0))
    for _ in range(140):
        next(running)
    noted = [blob for blob, at in rows(store, t.blob.c.scrubbed_at).items() if at]
    assert noted == made[:128]
    running.close()


def test_a_slice_ends_in_time_and_the_next_one_goes_on(store: Blobs) -> None:
    for number in range(5):
        stored(store, bytes([number]) * 10)
    store.settings = msgspec.structs.replace(store.settings, scrub_slice_s=1e-9)
    reports = [scrub.run(store, sleep=no_wait) for _ in range(6)]
    assert [report.blobs for report in reports] == [1, 1, 1, 1, 1, 0]
    assert [report.finished for report in reports] == [False] * 5 + [True]


def test_it_reads_no_faster_than_allowed(store: Blobs) -> None:
    for number in range(4):
        stored(store, bytes([number]) * 2500)
    store.settings = msgspec.structs.replace(store.settings, scrub_bytes_s=1000)
    waits: list[float] = []
    scrub.run(store, sleep=waits.append)
    # The clock stands still for whoever only notes the waits, so each wait is the whole time owed.
    assert 9.0 < max(waits) <= 10.0


def test_nothing_is_read_where_scrubbing_is_off(store: Blobs) -> None:
    stored(store, b"x")
    store.settings = msgspec.structs.replace(store.settings, scrub_days=0)
    assert scrub.run(store) == scrub.Report(0, 0, 0, True)
    assert not any(rows(store, t.blob.c.scrubbed_at).values())


def test_a_store_that_does_not_answer_is_no_damage(store: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = stored(store, b"small"), stored(store, b"l" * 1500)

    def away(*_: object) -> Iterator[bytes]:
        raise Unavailable("away")

    monkeypatch.setattr(store.extents, "read", away)
    with pytest.raises(Unavailable):
        scrub.run(store, sleep=no_wait)
    assert not any(rows(store, t.blob.c.damaged_at).values())
    read = rows(store, t.blob.c.scrubbed_at)
    assert read[first]
    assert not read[second]
