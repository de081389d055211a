"""Work in rows: one worker at a time, another one when it dies, each effect once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from conformance import crashing_jobs
from ksync_server import jobs, settings
from ksync_server.errors import Conflict, NotFound, Permanent, Temporary, Unavailable
from ksync_server.jobs import Cancelled, Claim, Handler, Job, LeaseLost, Periodic, Priority
from ksync_server.runner import Runner
from ksync_server.store import changes, schema
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Write

PATIENCE_S = 30


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(settings.Database(url=database_url), threads=4)
    schema.migrate(opened)
    yield opened
    opened.close()


def nothing(*_: object) -> None:
    pass


def change(database: Database, number: int | None = None, **values: object) -> None:
    """Make rows look as if something had happened to them."""
    which = sa.true() if number is None else t.job.c.id == number
    database.write(lambda tx: tx.execute(sa.update(t.job).where(which).values(**values)))


def queue(database: Database, kind: str = "work", **how: Any) -> int:
    number = database.write(lambda tx: jobs.enqueue(tx, kind, how.pop("arguments", {}), **how))
    assert number is not None
    return number


def claimed(database: Database, *kinds: str) -> Claim:
    claim = jobs.claim(database, kinds or ("work", "sweep"), lease_s=60)
    assert claim is not None
    return claim


def row(database: Database, number: int) -> dict[str, Any]:
    with database.read() as tx:
        return jobs.get_job(tx, number)


def the_only(database: Database) -> dict[str, Any]:
    with database.read() as tx:
        (found,) = jobs.list_jobs(tx)
    return found


def now(database: Database) -> int:
    return int(database.fast(sa.select(jobs.Now()))[0][0])


def runner(database: Database, run: Callable[[Job], object] = nothing, **changed: Any) -> Runner:
    """A worker whose handler of `work` is `run`."""
    attempts = changed.pop("kind_attempts", None)
    return Runner(database, (), {"work": Handler(run, attempts)}, settings.Jobs(**changed))


def wait_until(met: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        threading.Event().wait(0.01)


class Running:
    """A job worker in a thread, ended with the block."""

    def __init__(self, worker: Runner) -> None:
        self.stop = threading.Event()
        self._thread = threading.Thread(target=worker.run, args=(self.stop,))

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


# -- periodic work --------------------------------------------------------------------------------


def test_new_work_is_due_at_once_and_then_after_its_rhythm(database: Database) -> None:
    runs: list[str] = []
    work = [Periodic("sweep", 3600, lambda: runs.append("sweep"))]
    worker = Runner(database, work)
    jobs.ensure(database, work)
    assert worker.step()
    assert not worker.step()
    found = the_only(database)
    assert (found["state"], found["attempts"], found["ended_at"]) == ("ready", 0, None)
    assert 3590 <= found["run_at"] - now(database) <= 3600
    change(database, run_at=0)
    assert worker.step()
    assert runs == ["sweep", "sweep"]


def test_work_is_one_row_however_many_processes_ensure_it(database: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(jobs.ensure, database, [Periodic("sweep", 60, nothing)]) for _ in range(8)]:
            done.result()
    found = the_only(database)
    assert (found["kind"], found["every_s"]) == ("sweep", 60)


def test_a_changed_rhythm_is_taken_over_and_a_far_future_is_not_waited_for(database: Database) -> None:
    jobs.ensure(database, [Periodic("sweep", 60, nothing)])
    jobs.ensure(database, [Periodic("sweep", 90, nothing)])
    assert the_only(database)["every_s"] == 90
    change(database, run_at=now(database) + 10 * 365 * 86400)  # finished while the clock was ten years ahead
    jobs.ensure(database, [Periodic("sweep", 90, nothing)])
    assert the_only(database)["run_at"] <= now(database) + 90


def test_work_with_a_time_of_day_runs_then_and_not_before(database: Database) -> None:
    at_s = (now(database) + 1800) % 86400
    work = [Periodic("nightly", 86400, nothing, at_s=at_s)]
    jobs.ensure(database, work)
    worker = Runner(database, work)
    assert not worker.step()
    first = the_only(database)["run_at"]
    assert (first % 86400, first - now(database) <= 1800) == (at_s, True)
    change(database, run_at=now(database) - 5)
    assert worker.step()
    assert the_only(database)["run_at"] == first


def test_periodic_work_may_be_a_handler_that_resumes_and_then_starts_anew(database: Database) -> None:
    seen: list[object] = []

    def scrub(job: Job) -> None:
        seen.append(job.state)
        job.checkpoint({"at": 7})
        if len(seen) == 1:
            raise Temporary("cut")

    work = [Periodic("scrub", 3600)]
    worker = Runner(database, work, {"scrub": Handler(scrub)})
    jobs.ensure(database, work)
    for _ in range(3):
        assert worker.step()
        change(database, run_at=0)
    assert seen == [None, {"at": 7}, None]


# -- claims, leases, fences -----------------------------------------------------------------------


def test_each_job_has_one_worker(database: Database) -> None:
    for _ in range(20):
        queue(database)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(jobs.claim, database, ["work"], lease_s=60) for _ in range(40)]
        claims = [done.result() for done in running]
    numbers = [claim.id for claim in claims if claim is not None]
    assert len(numbers) == len(set(numbers)) == 20


def test_the_job_of_a_dead_worker_is_taken_over_and_the_dead_cannot_write(database: Database) -> None:
    queue(database)
    first = claimed(database)
    dead = Job(database, first)
    dead.checkpoint({"at": 1})
    lease_until = database.fast(sa.select(t.job.c.lease_until))[0][0]
    second = jobs.take_over(database, jobs.Lease(first.id, "x", first.fence, lease_until), lease_s=60)
    assert second is not None
    assert (second.id, second.attempts, second.checkpoint) == (first.id, 2, {"at": 1})

    def effect(tx: Write) -> None:
        tx.execute(sa.insert(t.job), {"kind": "effect", "run_at": 0})

    with pytest.raises(LeaseLost):
        dead.checkpoint({"at": 2}, effect)
    with pytest.raises(LeaseLost):
        jobs.finish(database, dead, "done")
    assert the_only(database)["checkpoint"] == {"at": 1}  # and no effect
    alive = Job(database, second)
    alive.checkpoint({"at": 2}, effect)
    assert jobs.finish(database, alive, "done") == "done"
    with database.read() as tx:
        assert [found["kind"] for found in jobs.list_jobs(tx)] == ["effect", "work"]


def test_a_lease_that_was_renewed_meanwhile_is_not_taken(database: Database) -> None:
    queue(database)
    first = claimed(database)
    before = database.fast(sa.select(t.job.c.lease_until))[0][0]
    change(database, lease_until=before + 5)  # the clock was ahead: a renewal still changes the value
    Job(database, first).checkpoint(None)
    assert database.fast(sa.select(t.job.c.lease_until))[0][0] == before + 6
    assert jobs.take_over(database, jobs.Lease(first.id, "x", first.fence, before), lease_s=60) is None
    assert jobs.take_over(database, jobs.Lease(first.id, "x", "another", before + 6), lease_s=60) is None


def test_an_effect_that_fails_takes_the_checkpoint_with_it(database: Database) -> None:
    queue(database)
    job = Job(database, claimed(database))

    def fail(tx: Write) -> None:
        tx.execute(sa.insert(t.job), {"kind": "effect", "run_at": 0})
        raise Conflict("no")

    with pytest.raises(Conflict):
        job.checkpoint({"at": 1}, fail)
    found = the_only(database)
    assert (found["checkpoint"], job.state) == (None, None)


def test_a_clock_that_jumps_does_not_take_a_job_from_a_living_worker(database: Database) -> None:
    """A lease that every clock calls over is still its owner's while it is renewed."""
    inside, release, runs = threading.Event(), threading.Event(), []

    def work(job: Job) -> None:
        runs.append(job.id)
        inside.set()
        assert release.wait(PATIENCE_S)

    number = queue(database)
    quick = {"lease_s": 0.3, "poll_s": 0.01}
    with Running(runner(database, work, **quick)), Running(runner(database, work, **quick)):
        assert inside.wait(PATIENCE_S)
        for _ in range(12):  # several leases long: the clock is an hour ahead, and behind
            for shift in (-3600, 3600):
                change(database, number, lease_until=now(database) + shift)
                before = database.fast(sa.select(t.job.c.lease_until))[0][0]
                wait_until(
                    lambda before=before: database.fast(sa.select(t.job.c.lease_until))[0][0] != before,
                    "renewed",
                )
        release.set()
        wait_until(lambda: row(database, number)["state"] == "done", "done")
    assert runs == [number]


def test_a_clock_that_is_set_back_by_a_day_holds_no_work_up(database: Database) -> None:
    """As if everything was queued while the clock was a day ahead."""
    work, day = [Periodic("sweep", 600, nothing), Periodic("nightly", 86_400, nothing, at_s=7200)], 86_400
    jobs.ensure(database, work)
    number, later, old = queue(database), queue(database, run_at=now(database) + 50), queue(database)
    assert not jobs.catch_up(database, work)
    for each in (t.job.c.run_at, t.job.c.created_at):
        change(database, **{each.name: each + day})
    change(database, old, created_at=now(database) - day, run_at=now(database) + day)
    assert jobs.claim(database, ["work", "sweep"], lease_s=60) is None
    assert jobs.catch_up(database, work)
    assert not jobs.catch_up(database, work), "once"
    assert row(database, number)["run_at"] <= now(database)
    assert 45 <= row(database, later)["run_at"] - now(database) <= 50
    assert row(database, old)["run_at"] > now(database) + 1000, "it may wait for another try"
    with database.read() as tx:
        rows = {each["kind"]: each["run_at"] - now(database) for each in jobs.list_jobs(tx)}
        at = {each["kind"]: each["run_at"] for each in jobs.list_jobs(tx)}
    assert rows["sweep"] <= 600
    assert at["nightly"] % day == 7200
    assert claimed(database).id == number


def test_a_worker_notices_by_itself_that_the_clock_was_set_back(database: Database) -> None:
    runs: list[int] = []
    number = queue(database)
    change(database, number, run_at=now(database) + 86_400, created_at=now(database) + 86_400)
    with Running(runner(database, lambda job: runs.append(job.id), lease_s=0.3, poll_s=0.01)):
        wait_until(lambda: runs == [number], "run")


def test_the_job_of_a_worker_that_is_gone_goes_on_elsewhere(database: Database) -> None:
    number = queue(database)
    gone = Job(database, claimed(database))
    gone.checkpoint({"at": 3})
    change(database, number, lease_until=now(database) + 10**6)  # its clock was wrong: nobody waits for that
    seen: list[object] = []
    with Running(runner(database, lambda job: seen.append(job.state), lease_s=0.3, poll_s=0.01)):
        wait_until(lambda: row(database, number)["state"] == "done", "done")
    assert seen == [{"at": 3}]


def test_a_job_that_kills_its_workers_is_given_up(database: Database) -> None:
    number = queue(database)
    change(database, number, attempts=3)  # claimed three times, never given back
    assert runner(database, attempts=3).step()
    found = row(database, number)
    assert (found["state"], found["last_error"]) == ("failed", "given up: the worker died in each of 3 tries")


def test_unknown_kinds_wait_for_a_program_that_knows_them(database: Database) -> None:
    number = queue(database, "future")
    assert not runner(database).step()
    found = row(database, number)
    assert (found["state"], found["attempts"]) == ("ready", 0)


def test_a_job_is_queued_with_its_cause_or_not_at_all(database: Database) -> None:
    def fail(tx: Write) -> None:
        jobs.enqueue(tx, "work", {})
        raise Conflict("no")

    with pytest.raises(Conflict):
        database.write(fail)
    with database.read() as tx:
        assert jobs.list_jobs(tx) == []


def test_a_key_is_queued_once_even_from_several_transactions(database: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        queued = [
            pool.submit(database.write, lambda tx: jobs.enqueue(tx, "work", {}, key="one")) for _ in range(8)
        ]
        numbers = [each.result() for each in queued]
    assert [number is None for number in numbers].count(False) == 1
    assert the_only(database)["id"] in numbers


# -- order, concurrency ---------------------------------------------------------------------------


def test_urgent_jobs_go_first_then_those_due_longest(database: Database) -> None:
    late = queue(database, run_at=now(database) - 5, priority=Priority.BACKGROUND)
    second = queue(database, run_at=now(database) - 10)
    first = queue(database, run_at=now(database) - 20)
    urgent = queue(database, run_at=now(database) - 1, priority=Priority.URGENT)
    queue(database, run_at=now(database) + 3600, priority=Priority.URGENT)
    assert [claimed(database).id for _ in range(4)] == [urgent, first, second, late]
    assert jobs.claim(database, ["work"], lease_s=60) is None


def test_of_a_concurrency_key_only_so_many_run_at_once(database: Database) -> None:
    numbers = [queue(database, concurrency="imap.example.org", at_most=2) for _ in range(6)]
    free = queue(database)
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(jobs.claim, database, ["work"], lease_s=60) for _ in range(24)]
        claims = [done.result() for done in running]
    taken = {claim.id: claim for claim in claims if claim is not None}
    # Two nodes that ask at the same moment may each leave the last place to the other, for one look.
    while (claim := jobs.claim(database, ["work"], lease_s=60)) is not None:
        taken[claim.id] = claim
    assert len(taken) == 3
    assert free in taken
    one = next(claim for claim in taken.values() if claim.id in numbers)
    jobs.finish(database, Job(database, one), "done")
    assert claimed(database).id in numbers
    assert jobs.claim(database, ["work"], lease_s=60) is None


def test_the_place_of_a_dead_worker_is_taken_over_with_its_job(database: Database) -> None:
    number = queue(database, concurrency="relay")
    queue(database, concurrency="relay")
    dead = claimed(database)
    assert jobs.claim(database, ["work"], lease_s=60) is None
    lease_until = database.fast(sa.select(t.job.c.lease_until).where(t.job.c.id == number))[0][0]
    again = jobs.take_over(database, jobs.Lease(dead.id, "x", dead.fence, lease_until), lease_s=60)
    assert again is not None
    assert again.id == number


def test_a_long_job_lets_waiting_ones_go_first_and_goes_on(database: Database) -> None:
    order: list[str] = []

    def work(job: Job) -> None:
        for at in range(job.state or 0, 3):
            order.append(f"{job.arguments['name']}{at}")
            job.checkpoint(at + 1)

    worker = runner(database, work, slice_s=0)
    numbers = [queue(database, arguments={"name": name}, run_at=0) for name in "ab"]
    change(database, numbers[1], run_at=1)
    while worker.step():
        pass
    assert order[0] == "a0"
    assert order.index("b0") < order.index("a2")
    assert sorted(order) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert [row(database, number)["state"] for number in numbers] == ["done", "done"]


def test_a_worker_that_stops_leaves_its_jobs_at_their_checkpoints(database: Database) -> None:
    number = queue(database)
    started = threading.Event()

    def work(job: Job) -> None:
        for at in range(10**9):
            started.set()
            job.checkpoint(at)

    with Running(runner(database, work)) as running:
        assert started.wait(PATIENCE_S)
        running.stop.set()
    found = row(database, number)
    assert (found["state"], found["attempts"], found["worker"]) == ("ready", 0, None)
    assert found["checkpoint"] >= 0


def test_a_job_may_ask_to_go_on_later(database: Database) -> None:
    number = queue(database)
    assert runner(database, lambda job: job.postpone(600)).step()
    found = row(database, number)
    assert (found["state"], found["attempts"], found["last_error"]) == ("ready", 0, None)
    assert 595 <= found["run_at"] - now(database) <= 600


def test_one_long_job_does_not_hold_up_the_others_and_new_ones_start_within_a_second(
    database: Database,
) -> None:
    release, started = threading.Event(), threading.Event()
    begun: list[float] = []

    def work(job: Job) -> None:
        if job.arguments:
            started.set()
            assert release.wait(PATIENCE_S)
        else:
            begun.append(time.monotonic())

    with Running(runner(database, work, workers=2)):
        queue(database, arguments={"long": True})
        assert started.wait(PATIENCE_S)
        waited = []
        for count in range(1, 6):
            queued = time.monotonic()
            queue(database)
            wait_until(lambda count=count: len(begun) == count, "started")
            waited.append(begun[-1] - queued)
        release.set()
    assert min(waited) < 1.0, waited


# -- failures -------------------------------------------------------------------------------------


def fail(error: BaseException) -> Callable[[Job], None]:
    def run(job: Job) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Temporary("the relay is away"), "the relay is away"),
        (ValueError("a fault of ours"), "ValueError: a fault of ours"),
        (Unavailable("The database is busy."), "Unavailable: The database is busy."),
    ],
)
def test_a_failure_is_kept_and_tried_again_until_its_bound(
    database: Database, error: Exception, text: str
) -> None:
    number = queue(database)
    worker = runner(database, fail(error), kind_attempts=4)
    waits = []
    for _ in range(3):
        assert worker.step()
        assert not worker.step()
        found = row(database, number)
        assert (found["state"], found["last_error"]) == ("ready", text)
        waits.append(found["run_at"] - now(database))
        change(database, run_at=0)
    assert 4 <= waits[0] <= 10
    assert 9 <= waits[1] <= 20
    assert 19 <= waits[2] <= 40
    assert worker.step()
    found = row(database, number)
    assert (found["state"], found["attempts"], found["last_error"]) == ("failed", 4, text)
    assert found["ended_at"] is not None


def test_the_longest_pause_has_a_bound(database: Database) -> None:
    number = queue(database)
    change(database, number, attempts=17)
    runner(database, fail(Temporary("no"))).step()
    assert row(database, number)["run_at"] - now(database) <= 3600


def test_what_cannot_succeed_is_not_tried_again(database: Database) -> None:
    number = queue(database)
    assert runner(database, fail(Permanent("no such mailbox"))).step()
    found = row(database, number)
    assert (found["state"], found["last_error"]) == ("failed", "no such mailbox")


def test_progress_gives_back_all_tries(database: Database) -> None:
    number = queue(database)

    def work(job: Job) -> None:
        job.checkpoint((job.state or 0) + 1)
        raise Temporary("cut")

    worker = runner(database, work, attempts=2)
    for step in range(1, 6):
        assert worker.step()
        found = row(database, number)
        assert (found["state"], found["attempts"], found["checkpoint"]) == ("ready", 1, step)
        change(database, run_at=0)


def test_periodic_work_never_fails_for_good(database: Database) -> None:
    def burn() -> None:
        raise Permanent("the disk is on fire")

    work = [Periodic("sweep", 60, burn)]
    jobs.ensure(database, work)
    change(database, attempts=100)
    worker = Runner(database, work)
    assert worker.step()
    found = the_only(database)
    assert (found["state"], found["last_error"]) == ("ready", "the disk is on fire")
    assert found["run_at"] - now(database) <= 60


def test_the_runner_outlives_a_database_that_is_away(database: Database) -> None:
    number = queue(database)
    real, answers = database.write, [Unavailable("away"), Unavailable("away")]

    def write(fn: Callable[[Write], Any]) -> Any:
        if answers:
            raise answers.pop()
        return real(fn)

    database.write = write  # type: ignore[method-assign]
    with Running(runner(database, poll_s=0.01)):
        wait_until(lambda: row(database, number)["state"] == "done", "done")
    assert answers == []


# -- progress, cancelling, cleaning up -------------------------------------------------------------


def test_progress_is_seen_while_the_job_runs_and_kept_at_its_end(database: Database) -> None:
    number = queue(database)
    release = threading.Event()

    def work(job: Job) -> None:
        job.progress(done=1, of=2)
        assert release.wait(PATIENCE_S)
        job.progress(done=2, of=2)

    with Running(runner(database, work, lease_s=0.3, poll_s=0.01)):
        wait_until(lambda: row(database, number)["progress"] == {"done": 1, "of": 2}, "progress")
        assert row(database, number)["worker"].endswith(f"/{os.getpid()}")
        release.set()
        wait_until(lambda: row(database, number)["state"] == "done", "done")
    assert row(database, number)["progress"] == {"done": 2, "of": 2}


def test_a_waiting_job_is_cancelled_at_once(database: Database) -> None:
    number = queue(database)
    assert database.write(lambda tx: jobs.cancel(tx, number)) == "cancelled"
    assert not runner(database).step()
    assert row(database, number)["ended_at"] is not None
    with pytest.raises(Conflict, match="cancelled already"):
        database.write(lambda tx: jobs.cancel(tx, number))


def test_a_running_job_ends_at_its_next_checkpoint_which_is_kept(database: Database) -> None:
    number = queue(database)
    after: list[str] = []

    def work(job: Job) -> None:
        assert database.write(lambda tx: jobs.cancel(tx, number)) == "running"
        job.checkpoint({"at": 1})
        after.append("went on")

    assert runner(database, work).step()
    found = row(database, number)
    assert (found["state"], found["checkpoint"], found["cancel_asked"]) == ("cancelled", {"at": 1}, False)
    assert after == []
    database.write(lambda tx: jobs.retry(tx, number))
    assert claimed(database).checkpoint == {"at": 1}


def test_a_job_without_checkpoints_learns_of_it_too(database: Database) -> None:
    number = queue(database)

    def work(job: Job) -> None:
        database.write(lambda tx: jobs.cancel(tx, number))
        wait_until(lambda: job.cancelled, "told")
        raise Cancelled

    with Running(runner(database, work, lease_s=0.3, poll_s=0.01)):
        wait_until(lambda: row(database, number)["state"] == "cancelled", "cancelled")


def test_a_cancelled_job_that_fails_is_not_tried_again(database: Database) -> None:
    number = queue(database)

    def work(job: Job) -> None:
        database.write(lambda tx: jobs.cancel(tx, number))
        raise Temporary("cut")

    assert runner(database, work).step()
    assert row(database, number)["state"] == "cancelled"


def test_a_run_of_periodic_work_can_be_cancelled_the_work_cannot(database: Database) -> None:
    def sweep(job: Job) -> None:
        database.write(lambda tx: jobs.cancel(tx, job.id))
        job.checkpoint({"at": 1})

    work = [Periodic("sweep", 3600)]
    jobs.ensure(database, work)
    assert Runner(database, work, {"sweep": Handler(sweep)}).step()
    found = the_only(database)
    assert (found["state"], found["checkpoint"], found["cancel_asked"]) == ("ready", None, False)
    assert found["run_at"] > now(database)
    with pytest.raises(Conflict, match="comes round"):
        database.write(lambda tx: jobs.cancel(tx, found["id"]))


def test_retry_runs_a_job_now_with_all_its_tries(database: Database) -> None:
    number = queue(database, run_at=now(database) + 3600)
    database.write(lambda tx: jobs.retry(tx, number))
    assert runner(database, fail(Permanent("no"))).step()
    database.write(lambda tx: jobs.retry(tx, number))
    found = row(database, number)
    assert (found["state"], found["attempts"], found["ended_at"]) == ("ready", 0, None)
    assert runner(database).step()
    with pytest.raises(Conflict, match="is done"):
        database.write(lambda tx: jobs.retry(tx, number))
    with pytest.raises(NotFound):
        database.write(lambda tx: jobs.retry(tx, number + 1))


def test_ended_jobs_are_forgotten_after_a_while_and_no_others(database: Database) -> None:
    old = now(database) - 31 * 86400
    rows = [
        {"kind": "work", "state": state, "run_at": old, "created_at": old, "ended_at": ended}
        for state, ended in (("done", old), ("failed", old), ("cancelled", old), ("done", old + 2 * 86400))
    ]
    rows += [{"kind": "work", "state": "ready", "run_at": old, "created_at": old, "ended_at": None}] * 2
    rows += [rows[0]] * 600
    database.write(lambda tx: tx.execute(sa.insert(t.job), rows))
    assert jobs.prune(database, 30) == 603
    assert jobs.prune(database, 30) == 0
    with database.read() as tx:
        assert sorted(found["state"] for found in jobs.list_jobs(tx)) == ["done", "ready", "ready"]


# -- secrets --------------------------------------------------------------------------------------


def kept(database: Database) -> list[tuple[int, str]]:
    """The secrets that there are, by job and name."""
    c = t.job_secret.c
    with database.read() as tx:
        return [tuple(row) for row in tx.execute(sa.select(c.job_id, c.name).order_by(c.job_id, c.name))]


def with_secrets(database: Database, **how: Any) -> int:
    return queue(database, secrets={"password": b"k-1:sealed", "token": b"\0\xff"}, **how)


def test_a_job_gets_its_secrets_as_they_were_sealed_in_every_run(database: Database) -> None:
    number = with_secrets(database)
    seen: list[bytes] = []

    def work(job: Job) -> None:
        seen.append(job.secret("password"))
        seen.append(job.secret("token"))
        if job.tries == 1:
            raise Temporary("cut")
        job.checkpoint({"at": 1})
        seen.append(job.secret("password"))

    assert runner(database, work).step()
    assert kept(database) == [(number, "password"), (number, "token")], "it will be tried again"
    change(database, number, run_at=0)
    assert runner(database, work).step()
    assert seen == [b"k-1:sealed", b"\0\xff"] * 2 + [b"k-1:sealed"]
    assert row(database, number)["state"] == "done"


@pytest.mark.parametrize(
    ("end", "state"), [(nothing, "done"), (fail(Permanent("no")), "failed"), (fail(Cancelled()), "cancelled")]
)
def test_secrets_go_with_the_end_of_a_job(database: Database, end: Callable[[Job], None], state: str) -> None:
    other = with_secrets(database, run_at=now(database) + 3600)
    number = with_secrets(database)
    assert runner(database, end).step()
    assert row(database, number)["state"] == state
    assert kept(database) == [(other, "password"), (other, "token")]


def test_secrets_of_a_job_that_is_cancelled_while_it_waits_are_gone_at_once(database: Database) -> None:
    number, other = with_secrets(database), with_secrets(database)
    database.write(lambda tx: jobs.cancel(tx, number))
    assert kept(database) == [(other, "password"), (other, "token")]


def test_secrets_of_a_job_that_is_cancelled_while_it_runs_last_until_it_ends(database: Database) -> None:
    number = with_secrets(database)

    def work(job: Job) -> None:
        database.write(lambda tx: jobs.cancel(tx, number))
        assert job.secret("password") == b"k-1:sealed", "it may need it to end well"
        job.checkpoint(1)

    assert runner(database, work).step()
    assert row(database, number)["state"] == "cancelled"
    assert kept(database) == []


def test_a_job_that_ended_is_retried_without_its_secrets_and_says_so(database: Database) -> None:
    number = with_secrets(database)
    assert runner(database, fail(Permanent("no"))).step()
    database.write(lambda tx: jobs.retry(tx, number))
    assert runner(database, lambda job: job.secret("password")).step()
    found = row(database, number)
    assert (found["state"], found["last_error"]) == ("failed", "the password is not kept any more")


def test_a_job_that_goes_on_later_keeps_its_secrets(database: Database) -> None:
    number = with_secrets(database)
    assert runner(database, lambda job: job.postpone(0)).step()
    database.write(lambda tx: jobs.retry(tx, number))
    assert kept(database) == [(number, "password"), (number, "token")]


def test_secrets_go_with_the_row_of_their_job_whatever_erases_it(database: Database) -> None:
    number = with_secrets(database)
    assert kept(database)
    database.write(lambda tx: tx.execute(sa.delete(t.job).where(t.job.c.id == number)))
    assert kept(database) == []


def test_secrets_are_queued_with_their_job_or_not_at_all(database: Database) -> None:
    with_secrets(database, key="once")
    before = kept(database)
    again = {"password": b"another"}
    assert database.write(lambda tx: jobs.enqueue(tx, "work", {}, key="once", secrets=again)) is None
    assert kept(database) == before
    with pytest.raises(RuntimeError):
        database.write(lambda tx: _fails_after(tx, jobs.enqueue(tx, "work", {}, secrets=again)))
    assert kept(database) == before


def _fails_after(tx: Write, number: int | None) -> None:
    assert number is not None
    raise RuntimeError


def test_a_worker_that_lost_its_job_neither_ends_it_nor_takes_its_secrets(database: Database) -> None:
    number = with_secrets(database)
    late = Job(database, claimed(database))
    change(database, number, fence="of another worker")
    with pytest.raises(LeaseLost):
        jobs.finish(database, late, "done")
    assert kept(database) == [(number, "password"), (number, "token")]


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


# -- kill -9 --------------------------------------------------------------------------------------


def test_effects_happen_once_however_often_workers_are_killed(database_url: str, tmp_path: Path) -> None:
    """The small form of `./run conformance jobs`."""
    report = crashing_jobs.run(
        database_url, tmp_path, jobs_=20, workers=2, kills=1, freezes=0, lease_s=0.5, seed=20
    )
    assert report.wrong == {}
    assert report.done == 20
    assert report.repeated >= 2, "one step was cut by a kill, one taken over from a sleeper"
    assert report.refused >= 1, "the sleeper's effect was refused"
