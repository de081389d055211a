"""Work in rows: one worker at a time, and another one when it dies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from ksync_server import jobs, settings
from ksync_server.jobs import Claim, LeaseLost, Periodic, Runner
from ksync_server.store import changes, schema
from ksync_server.store import tables as t
from ksync_server.store.database import Database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(settings.Database(url=database_url), threads=4)
    schema.migrate(opened)
    yield opened
    opened.close()


def nothing() -> None:
    pass


def move_clock(database: Database, **values: int) -> None:
    """Make the rows look as if time had passed."""
    database.write(lambda tx: tx.execute(sa.update(t.job).values(**values)))


def claimed(database: Database) -> Claim:
    job = jobs.claim(database, 60)
    assert job is not None
    return job


def test_new_work_is_due_at_once_and_then_after_its_rhythm(database: Database) -> None:
    jobs.ensure(database, [Periodic("sweep", 3600, nothing)])
    job = claimed(database)
    assert (job.kind, job.every_s, job.attempts) == ("sweep", 3600, 1)
    jobs.finish(database, job)
    assert jobs.claim(database, 60) is None
    move_clock(database, run_at=0)
    assert claimed(database).attempts == 1


def test_work_is_one_row_however_many_processes_ensure_it(database: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(jobs.ensure, database, [Periodic("sweep", 60, nothing)]) for _ in range(8)]:
            done.result()
    rows = database.fast(sa.select(t.job.c.kind, t.job.c.every_s))
    assert [tuple(row) for row in rows] == [("sweep", 60)]


def test_a_changed_rhythm_is_taken_over(database: Database) -> None:
    jobs.ensure(database, [Periodic("sweep", 60, nothing)])
    jobs.ensure(database, [Periodic("sweep", 90, nothing)])
    assert claimed(database).every_s == 90


def test_each_job_has_one_worker(database: Database) -> None:
    jobs.ensure(database, [Periodic(f"sweep{number}", 60, nothing) for number in range(20)])
    with ThreadPoolExecutor(4) as pool:
        claims = [done.result() for done in [pool.submit(jobs.claim, database, 60) for _ in range(40)]]
    kinds = [claim.kind for claim in claims if claim is not None]
    assert len(kinds) == len(set(kinds)) == 20


def test_the_job_of_a_dead_worker_is_taken_over_and_the_dead_cannot_write(database: Database) -> None:
    jobs.ensure(database, [Periodic("sweep", 60, nothing)])
    dead = claimed(database)
    assert jobs.claim(database, 60) is None
    move_clock(database, lease_until=0)
    alive = claimed(database)
    assert (alive.id, alive.attempts) == (dead.id, 2)
    with pytest.raises(LeaseLost):
        jobs.finish(database, dead)
    with pytest.raises(LeaseLost):
        jobs.renew(database, dead, 60)
    jobs.renew(database, alive, 60)
    jobs.finish(database, alive)


def test_a_failure_is_kept_and_tried_again(database: Database) -> None:
    def fail() -> None:
        raise ValueError("the disk is on fire")

    runner = Runner(database, [Periodic("sweep", 86400, fail)])
    jobs.ensure(database, [Periodic("sweep", 86400, fail)])
    assert runner.step()
    assert not runner.step()
    (row,) = database.fast(sa.select(t.job.c.state, t.job.c.last_error, t.job.c.attempts, t.job.c.run_at))
    assert tuple(row[:3]) == ("ready", "ValueError: the disk is on fire", 1)
    move_clock(database, run_at=0)
    assert claimed(database).attempts == 2


def test_the_runner_works_until_it_is_stopped(database: Database) -> None:
    stop = threading.Event()
    runs: list[str] = []

    def note(kind: str) -> Callable[[], None]:
        def run() -> None:
            runs.append(kind)
            if len(runs) == 2:
                stop.set()

        return run

    Runner(database, [Periodic("one", 60, note("one")), Periodic("two", 60, note("two"))]).run(stop)
    assert sorted(runs) == ["one", "two"]


def test_a_long_job_keeps_its_lease(database: Database) -> None:
    seen: list[Claim | None] = []
    renewed = threading.Event()

    def work() -> None:
        before = database.fast(sa.select(t.job.c.lease_until))[0][0]
        move_clock(database, lease_until=1)
        while database.fast(sa.select(t.job.c.lease_until))[0][0] < before:
            renewed.wait(0.01)
        seen.append(jobs.claim(database, 60))

    work_list = [Periodic("long", 60, work)]
    jobs.ensure(database, work_list)
    assert Runner(database, work_list, lease_s=0.3).step()
    assert seen == [None]


def test_unknown_kinds_wait_for_a_program_that_knows_them(database: Database) -> None:
    jobs.ensure(database, [Periodic("future", 60, nothing)])
    assert Runner(database, []).step()
    (row,) = database.fast(sa.select(t.job.c.state, t.job.c.last_error))
    assert tuple(row) == ("ready", "this program does not know that kind of work")


def test_old_deletions_are_forgotten_and_older_tokens_start_anew(database: Database) -> None:
    rows = [{"collection_id": 1, "name": f"n{seq}", "seq": seq, "at": seq} for seq in range(1, 1201)]

    def fill(tx: object) -> None:
        collection = {"kind": "calendar", "account_id": None, "name": "c", "seq": 1300, "created_at": 0}
        tx.execute(sa.insert(t.collection), collection)  # type: ignore[attr-defined]
        tx.execute(sa.insert(t.tombstone), rows)  # type: ignore[attr-defined]

    database.write(fill)
    assert changes.prune(database, 1101) == 1100
    left = database.fast(sa.select(sa.func.min(t.tombstone.c.seq), sa.func.count()).select_from(t.tombstone))
    assert tuple(left[0]) == (1101, 100)
    assert database.fast(sa.select(t.collection.c.pruned_seq))[0][0] == 1100
    assert changes.prune(database, 1101) == 0
