"""Job workers that are killed or frozen at random moments, over and over, and a count of what their jobs did.

Each job has five steps. A step leaves one row in a table of our store, in the transaction of its checkpoint;
a line of a file says, outside of it, that the step was begun. However often workers die, or wake up after
others took their jobs over, the table must hold each step once.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from conformance.servers import REPOSITORY
from ksync_server import jobs, settings
from ksync_server.jobs import Handler, Job, LeaseLost, Priority
from ksync_server.runner import Runner
from ksync_server.store.database import Database, Write

STEPS = 5
LIMIT_S = 240
TRAPS = ("kill", "freeze")
LEASE_S = 0.9
FROZEN = 3  # leases: long enough for the neighbours to take the jobs over
_tables = sa.MetaData()
effect = sa.Table("crash_effect", _tables, sa.Column("job", sa.BigInteger), sa.Column("step", sa.Integer))


@dataclass(frozen=True, slots=True)
class Report:
    """What was found when every job had ended."""

    done: int
    wrong: dict[tuple[int, int], int]  # (job, step) -> how often, where that is not once
    kills: int
    freezes: int
    repeated: int  # steps that were begun more than once
    refused: int  # checkpoints that came too late: the job was somebody else's
    seconds: float


class Diary:
    """A file that all processes append lines to, outside of every transaction: BEGUN job step, ..."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, *words: object) -> None:
        os.write(self._file, (" ".join(str(word) for word in words) + "\n").encode("ascii"))

    def lines(self, first: str) -> list[str]:
        return [line for line in self._path.read_text("ascii").splitlines() if line.startswith(first + " ")]

    def close(self) -> None:
        os.close(self._file)


def work(job: Job, diary: Diary) -> None:
    """The handler: five effects, each with its checkpoint."""
    for step in range(job.state or 0, STEPS):
        diary.write("BEGUN", job.id, step)
        if job.arguments.get("trap") == step and not diary.lines(f"TRAP {job.id}"):
            diary.write("TRAP", job.id, os.getpid())
            pause = threading.Event()
            while not diary.lines(f"WOKEN {job.id}"):  # killed here, or frozen until others have the job
                pause.wait(0.01)
        mark = {"job": job.id, "step": step}
        try:
            job.checkpoint(step + 1, lambda tx, mark=mark: tx.execute(sa.insert(effect), mark))  # type: ignore[misc]
        except LeaseLost:
            diary.write("REFUSED", job.id, step)
            raise


def main(url: str, threads: int, events: Path, lease_s: float) -> None:
    """One worker process, until it is killed or its standard input ends."""
    database = Database(settings.Database(url=url), threads=threads + 2)
    diary, stop = Diary(events), threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    chosen = settings.Jobs(workers=threads, poll_s=0.05, lease_s=lease_s, attempts=1000, retry_s=1)
    Runner(database, (), {"work": Handler(lambda job: work(job, diary))}, chosen).run(stop)
    database.close()


@contextlib.contextmanager
def _prepared(url: str, jobs_: int) -> Iterator[Database]:
    database = Database(settings.Database(url=url), threads=2)
    try:
        _tables.create_all(database.engine)

        def fill(tx: Write) -> None:
            for _ in range(jobs_ - len(TRAPS)):
                jobs.enqueue(tx, "work", {})

        database.write(fill)
        yield database
    finally:
        database.close()


def _start(url: str, threads: int, events: Path, lease_s: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "conformance.crashing_jobs", url, str(threads), str(events), str(lease_s)],
        stdin=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}"},
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


class Workers:
    """Processes that are killed and started again, or frozen and woken up."""

    def __init__(
        self,
        start: Callable[[], subprocess.Popen[bytes]],
        count: int,
        chance: random.Random,
        frozen_s: float,
    ) -> None:
        self._start, self._chance, self.frozen_s = start, chance, frozen_s
        self._running = [start() for _ in range(count)]
        self._frozen: list[tuple[float, subprocess.Popen[bytes]]] = []

    def kill(self, pid: int | None = None) -> None:
        """End one at once and start another in its place."""
        victim = self._chance.randrange(len(self._running))
        if pid is not None:
            victim = [process.pid for process in self._running].index(pid)
        _kill(self._running[victim])
        self._running[victim] = self._start()

    def freeze(self) -> None:
        """Stop one where it is; `wake` lets it go on when its leases are long over."""
        victim = self._chance.choice(self._running)
        victim.send_signal(signal.SIGSTOP)
        self._frozen.append((time.monotonic() + self.frozen_s, victim))

    def wake(self, *, all_: bool = False) -> None:
        """Let those go on that were frozen long enough."""
        for until, process in list(self._frozen):
            if all_ or time.monotonic() > until:
                process.send_signal(signal.SIGCONT)
                self._frozen.remove((until, process))

    def settle(self) -> None:
        """Let all end by themselves: what a sleeper still had in hand is written now, or refused."""
        for process in self._running:
            process.communicate(timeout=LIMIT_S)

    def close(self) -> None:
        """End all."""
        for process in self._running:
            _kill(process)


def run(
    url: str,
    folder: Path,
    *,
    jobs_: int,
    workers: int,
    kills: int,
    freezes: int,
    threads: int = 1,
    lease_s: float = LEASE_S,
    seed: int | None = None,
) -> Report:
    """Run jobs to their end while workers are killed and frozen: one each inside a job for sure, then at random.

    Args:
        url: of a migrated database without jobs.
        folder: for the file that says which steps were begun.
        workers: processes at a time; each one that is killed is started again.
        kills: how many SIGKILLs, spread at random over the whole run; `freezes` likewise.
        threads: jobs at once per process.
        lease_s: a dead worker's jobs are taken over after twice that.

    Raises:
        AssertionError: not every job ended within 240 s.
    """
    chance = random.Random(seed)
    began = time.monotonic()
    # When: at a share of all steps.
    blows = [(chance.uniform(0.02, 0.9), kind) for kind in ["kill"] * kills + ["freeze"] * freezes]
    blows.sort()
    pause = threading.Event()
    diary = Diary(folder / "events")
    with contextlib.closing(diary), _prepared(url, jobs_) as database:
        start = partial(_start, url, threads, folder / "events", lease_s)
        pool = Workers(start, workers, chance, FROZEN * lease_s)
        try:
            _spring_traps(database, pool, diary)
            while (left := _unfinished(database)) > 0:
                assert time.monotonic() - began < LIMIT_S, f"{left} jobs are not done after {LIMIT_S} s"
                if blows and _count(database, effect) >= blows[0][0] * jobs_ * STEPS:
                    _, kind = blows.pop(0)
                    pause.wait(chance.uniform(0, 0.02))
                    pool.kill() if kind == "kill" else pool.freeze()
                pool.wake()
                pause.wait(0.01)
            pool.wake(all_=True)
            pool.settle()
        finally:
            pool.close()
        left_out = Counter(kind for _, kind in blows)  # the last steps were quicker
        given = (kills + 1 - left_out["kill"], freezes + 1 - left_out["freeze"])
        return _report(database, diary, given, time.monotonic() - began)


def _spring_traps(database: Database, pool: Workers, diary: Diary) -> None:
    """Kill one worker that stands inside a job, and freeze another one until its job is somebody else's."""
    for how in TRAPS:
        number = database.write(lambda tx: jobs.enqueue(tx, "work", {"trap": 2}, priority=Priority.URGENT))
        _wait(lambda number=number: diary.lines(f"TRAP {number}"), f"job {number} began")  # type: ignore[misc]
        pid = int(diary.lines(f"TRAP {number}")[0].split()[2])
        if how == "kill":
            pool.kill(pid)
        else:
            holder = sa.select(jobs.t.job.c.fence).where(jobs.t.job.c.id == number)
            before = database.fast(holder)
            until = 0.0
            while database.fast(holder) == before:
                if time.monotonic() > until:  # it may have been frozen with the lock that all writers need
                    os.kill(pid, signal.SIGCONT)
                    threading.Event().wait(0.05)
                    os.kill(pid, signal.SIGSTOP)
                    until = time.monotonic() + pool.frozen_s
                threading.Event().wait(0.01)
            diary.write("WOKEN", number, pid)
            os.kill(pid, signal.SIGCONT)
            _wait(lambda number=number: diary.lines(f"REFUSED {number}"), f"job {number} refused")  # type: ignore[misc]


def _wait(met: Callable[[], object], what: str) -> None:
    until = time.monotonic() + LIMIT_S
    while not met():
        assert time.monotonic() < until, f"not within {LIMIT_S} s: {what}"
        threading.Event().wait(0.01)


def _unfinished(database: Database) -> int:
    waiting = sa.select(sa.func.count()).select_from(jobs.t.job).where(jobs.t.job.c.ended_at.is_(None))
    return int(database.fast(waiting)[0][0])


def _count(database: Database, table: sa.Table) -> int:
    return int(database.fast(sa.select(sa.func.count()).select_from(table))[0][0])


def _report(database: Database, diary: Diary, given: tuple[int, int], seconds: float) -> Report:
    job = jobs.t.job
    with database.read() as tx:
        numbers = [row.id for row in tx.execute(sa.select(job.c.id).where(job.c.state == "done"))]
        times = dict.fromkeys(((number, step) for number in numbers for step in range(STEPS)), 0)
        for row in tx.execute(sa.select(effect)):
            times[row.job, row.step] = times.get((row.job, row.step), 0) + 1
    repeated = sum(count > 1 for count in Counter(diary.lines("BEGUN")).values())
    wrong = {key: count for key, count in times.items() if count != 1}
    return Report(len(numbers), wrong, *given, repeated, len(diary.lines("REFUSED")), seconds)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
