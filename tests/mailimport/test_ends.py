"""An import ends for everybody to see, wherever its job ended; a worker that sleeps doubles nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from conformance.imap_server import Account, Rule, Server, Stall, serving
from ksync_server import jobs, settings
from ksync_server.errors import Conflict
from ksync_server.jobs import LeaseLost
from ksync_server.mail import sender
from ksync_server.mailimport import passes, records
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from tests.mailimport.harness import Desk, contents, desk, moving, until
from tests.mailimport.test_cases import filled

BODY = b"From: a@example.org\r\nSubject: number %d\r\n\r\nbody %d\r\n"
MAIL = settings.Mail(relay="relay.example.org", from_address="noreply@example.org")


def told(database: Database) -> list[dict[str, Any]]:
    """What letters say, the oldest first."""
    with database.read() as tx:
        return [job["arguments"] for job in reversed(jobs.list_jobs(tx, kind=sender.SEND))]


def office(database: Database, folder: Path) -> Desk:
    made = desk(database, folder)
    return Desk(database, msgspec.structs.replace(made.settings, mail=MAIL))


def test_an_import_whose_job_was_cancelled_while_it_waited_ends_and_its_batch_with_it(
    database: Database, tmp_path: Path
) -> None:
    ordered = office(database, tmp_path)
    batch = database.write(lambda tx: records.create_batch(tx, "people.csv", "boss@example.org"))
    numbers = [
        ordered.order(1, tmp_path / f"mail-{at}", batch_id=batch, notify=f"{at}@example.org")
        for at in range(2)
    ]
    for number in numbers:
        passes.end_abandoned(ordered.settings, database)
        assert ordered.imported(number).state == "waiting"
        database.write(partial(jobs.cancel, number=ordered.job(number)["id"]))
    passes.end_abandoned(ordered.settings, database)
    passes.end_abandoned(ordered.settings, database)
    for number in numbers:
        imported = ordered.imported(number)
        assert (imported.state, (imported.report or {})["problem"]) == ("cancelled", "It was cancelled.")
    assert [letter["to"] for letter in told(database)] == [
        "0@example.org",
        "1@example.org",
        "boss@example.org",
    ]
    ordered.order(1, tmp_path / "mail-0", again=numbers[0])  # nobody says that it is under way


@pytest.mark.parametrize("forgotten", [False, True])
def test_an_import_that_the_job_worker_gave_up_has_failed(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    def bug(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(passes._Run, "run", bug)
    ordered = office(database, tmp_path)
    number = ordered.order(1, tmp_path / "mail", notify="owner@example.org")
    ordered.work()
    assert ordered.job(number)["state"] == "failed"
    if forgotten:
        database.write(lambda tx: tx.execute(sa.delete(t.job).where(t.job.c.kind == passes.KIND)))
    passes.end_abandoned(ordered.settings, database)
    imported = ordered.imported(number)
    assert imported.state == "failed"
    said = "unknown" if forgotten else "RuntimeError: a mistake of ours"
    assert (imported.report or {})["problem"] == said
    assert len(told(database)) == 1


def test_a_failed_import_whose_job_is_tried_again_fails_for_the_same_reason(
    database: Database, tmp_path: Path
) -> None:
    source = Server(Account(password="other"))
    with serving(source) as port:
        ordered = office(database, tmp_path)
        number = ordered.order(port, tmp_path / "mail")
        ordered.work()
        problem = ordered.job(number)["last_error"]
        assert "refuses the log-in" in problem
        database.write(lambda tx: jobs.retry(tx, ordered.job(number)["id"]))
        ordered.work()
    assert (ordered.job(number)["state"], ordered.job(number)["last_error"]) == ("failed", problem)
    assert len(source.statistics.logins) == 1


def test_a_lease_that_was_not_renewed_for_its_length_is_not_ours(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.write(lambda tx: jobs.enqueue(tx, "work", {}))
    claim = jobs.claim(database, ["work"], lease_s=30, worker="one")
    assert claim is not None
    job, now = jobs.Job(database, claim), jobs.steady()
    monkeypatch.setattr(jobs, "steady", lambda: now + 29)
    job.require_lease()
    monkeypatch.setattr(jobs, "steady", lambda: now + 31)
    with pytest.raises(LeaseLost):
        job.require_lease()
    job.checkpoint({})
    job.require_lease()


WORKER = """
import sys
import threading
sys.path[:0] = {paths!r}
import threading
import msgspec
from pathlib import Path
from ksync_server import settings
from ksync_server.store.database import Database
from tests.mailimport import harness
harness.KEYS = harness.Keys("k1", {{"k1": harness.KeySet({pepper!r}, {seal!r})}})
database = Database(settings.Database(url={url!r}))
made = harness.desk(database, Path({folder!r}))
made.keys = harness.KEYS
made.settings = msgspec.structs.replace(made.settings, jobs=settings.Jobs(lease_s=1.5, workers=1))
made.runner().run(threading.Event())
"""


def test_a_worker_that_sleeps_in_mid_append_and_wakes_late_doubles_nothing(
    database: Database, tmp_path: Path
) -> None:
    """Stopped, not killed: it still has its connection, and goes on as if nothing had been."""
    source, target = Server(), Server(rules=[Rule(Stall(5), "APPEND", when="literal")])
    source.account.add("INBOX", BODY % (1, 1) + b"x" * 16_000_000)  # more than sockets hold
    ordered = desk(database, tmp_path)
    keys = ordered.keys.sets["k1"]
    script = WORKER.format(
        paths=[str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "src")],
        pepper=keys.pepper,
        seal=keys.seal,
        url=database.settings.url,
        folder=str(tmp_path),
    )
    with serving(source) as there, serving(target) as here:
        number = ordered.order(there, here)
        first = subprocess.Popen([sys.executable, "-c", script])
        try:
            until(lambda: target.rules[0].seen == 1)
            begun = time.monotonic()
            os.kill(first.pid, signal.SIGSTOP)
            second = subprocess.Popen([sys.executable, "-c", script])
            try:
                until(lambda: ordered.imported(number).state == "done", seconds=40)
                assert contents(target.account) == contents(source.account)
                os.kill(first.pid, signal.SIGCONT)
                time.sleep(max(begun + 8 - time.monotonic(), 0))  # until all has gone that would still go
            finally:
                second.kill()
                second.wait()
        finally:
            first.kill()
            first.wait()
    assert contents(target.account) == contents(source.account)
    assert (ordered.imported(number).report or {})["copied"] == 1


def test_of_two_imports_that_begin_at_once_on_one_way_one_is_refused(
    database: Database, tmp_path: Path
) -> None:
    """The second one is asked for while the first one's transaction is still open."""
    first_is_in, found = threading.Event(), []
    with moving(database, tmp_path, filled(), Server()) as move:
        write = database.write

        def slow(fn: Any) -> Any:
            def held(tx: Any) -> Any:
                number = fn(tx)
                first_is_in.set()
                time.sleep(0.3)
                return number

            return write(held)

        def order() -> None:
            try:
                found.append(move.desk.order(move.there, move.here))
            except Conflict as error:
                found.append(str(error))

        database.write = slow  # type: ignore[method-assign]
        threads = [threading.Thread(target=order) for _ in range(2)]
        threads[0].start()
        assert first_is_in.wait(10)
        threads[1].start()
        for thread in threads:
            thread.join()
        database.write = write  # type: ignore[method-assign]
    assert [type(each) for each in found] == [int, str], found
