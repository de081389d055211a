"""Whatever ends a run, and whatever changes between two passes: nothing is lost, nothing there twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from msgspec.structs import replace

from conformance import mail_corpus
from conformance.imap_server import BASIC, MODERN, Account, Bye, Drop, No, Rule, Run, Server, Stall, serving
from ksync_server import jobs
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from tests.mailimport.harness import contents, exact, moving
from tests.mailimport.test_cases import BODY, bodies, filled, flags

LARGE = b"Subject: large\r\n\r\n" + b"0123456789abcde\n" * 20_000


def corpus(count: int = 40, **switches: object) -> Server:
    """Messages in several folders."""
    server = Server(**switches)
    mail_corpus.fill(
        server.account, mail_corpus.generate(count, folders=4, median_bytes=3000, mean_bytes=5000)
    )
    return server


# -- a connection ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("action", [Bye(), Drop()])
def test_a_source_that_ends_every_so_many_bytes_is_copied_exactly(
    database: Database, tmp_path: Path, action: Bye | Drop
) -> None:
    source, target = corpus(rules=[Rule(action, after_bytes=30_000, times=None)]), Server()
    with moving(database, tmp_path, source, target, whole_bytes=20_000) as move:
        exact(move.go(), 40)
        assert move.state == "done"
    assert contents(target.account) == contents(source.account)
    total = sum(len(body) for folder in source.folders for body in bodies(source, folder))
    assert len(source.statistics.logins) <= 3 + total / 20_000
    assert not source.violations + target.violations


@pytest.mark.parametrize("features", [MODERN, BASIC, MODERN - {"UIDPLUS"}, MODERN - {"MULTIAPPEND"}])
@pytest.mark.parametrize("when", ["literal", "end"])
def test_a_destination_that_ends_in_an_append_has_nothing_twice(
    lite: Database, tmp_path: Path, when: str, features: frozenset[str]
) -> None:
    source = corpus()
    source.account.add("INBOX", BODY % (1, 1))
    source.account.add("INBOX", BODY % (1, 1))
    rules = [Rule(Drop(), "APPEND", nth=nth, when=when) for nth in (1, 3, 5)]
    target = Server(features=features, rules=rules)
    with moving(lite, tmp_path, source, target, window_bytes=60_000) as move:
        exact(move.go(), 42)
    assert contents(target.account) == contents(source.account)
    assert not target.violations
    assert any(rule.seen > rule.nth for rule in rules)


def test_a_large_message_goes_on_where_it_was_cut(lite: Database, tmp_path: Path) -> None:
    source, target = filled(), Server()
    source.account.add("INBOX", LARGE, flags={"\\Seen"})
    source.rules = [Rule(Drop(), after_bytes=200_000)]
    with moving(lite, tmp_path, source, target, whole_bytes=50_000) as move:
        exact(move.go(), 6)
        assert not list((tmp_path / "spool").iterdir())
    assert contents(target.account) == contents(source.account)
    assert source.statistics.body_bytes < len(LARGE) + 20_000


def test_a_large_message_of_a_server_that_ignores_parts_arrives(lite: Database, tmp_path: Path) -> None:
    source, target = Server(features=BASIC), Server(features=BASIC)
    source.account.add("INBOX", LARGE)
    with moving(lite, tmp_path, source, target, whole_bytes=50_000) as move:
        exact(move.go(), 1)
    assert bodies(target) == [LARGE]


def test_a_server_that_falls_silent_is_left_and_asked_again(lite: Database, tmp_path: Path) -> None:
    source, target = filled(rules=[Rule(Stall(), "UID FETCH", nth=2)]), Server()
    with moving(lite, tmp_path, source, target, timeout_s=1.0) as move:
        exact(move.go(), 5)
    assert len(source.statistics.logins) == 2


@pytest.mark.parametrize("command", ["CONNECT", "AUTHENTICATE", "LIST", "STATUS", "EXAMINE", "UID FETCH"])
def test_a_source_that_is_busy_is_asked_again(lite: Database, tmp_path: Path, command: str) -> None:
    source = filled(rules=[Rule(No(), command, times=2)], features=MODERN - {"LIST-STATUS"})
    target = Server()
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 5)
    assert contents(target.account) == contents(source.account)


@pytest.mark.parametrize(
    "command", ["CONNECT", "AUTHENTICATE", "LIST", "STATUS", "CREATE", "APPEND", "SELECT", "UID FETCH"]
)
def test_a_destination_that_is_busy_is_asked_again(lite: Database, tmp_path: Path, command: str) -> None:
    source, target = filled(), Server(rules=[Rule(No(), command, times=2)])
    source.account.add("Work", BODY % (9, 9))
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 6)
    assert contents(target.account, skip=("Work",)) == contents(source.account, skip=("Work",))
    assert bodies(target, "Work") == [BODY % (9, 9)]


# -- pauses ---------------------------------------------------------------------------------------


def test_a_full_destination_pauses_the_import_until_there_is_room(database: Database, tmp_path: Path) -> None:
    source, target = corpus(), Server(Account(quota_bytes=60_000))
    with moving(database, tmp_path, source, target, window_bytes=40_000) as move:
        move.order()
        runner = move.desk.runner()
        steps = 0
        while steps < 4:
            database.write(
                lambda tx: tx.execute(sa.update(t.job).where(t.job.c.state == "ready").values(run_at=0))
            )
            assert runner.step()
            steps += 1
            assert move.state == "paused"
            job = move.desk.job(move.number or 0)
            assert (job["state"], "full" in str(job["progress"])) == ("ready", True)
        assert len(source.statistics.logins) == len(target.statistics.logins) == steps
        assert 0 < target.account.used_bytes <= 60_000
        target.account.quota_bytes = None
        move.desk.work()
        report = move.imported.report
        assert report is not None
        assert (report["copied"], report["refused"], move.state) == (40, 0, "done")
    assert contents(target.account) == contents(source.account)


def test_a_source_that_throttles_is_asked_once_in_each_pause(lite: Database, tmp_path: Path) -> None:
    throttled = "[OVERQUOTA] Account exceeded command or bandwidth limits"
    source, target = (
        corpus(features=MODERN, rules=[Rule(Bye(throttled), "UID FETCH", nth=2, times=4)]),
        Server(),
    )
    with moving(lite, tmp_path, source, target, back_off_s=60.0) as move:
        move.order()
        for step in range(1, 5):
            lite.write(lambda tx: tx.execute(sa.update(t.job).values(run_at=0)))
            assert move.desk.work(hurry=False) == 1
            assert move.state == "paused"
            assert len(source.statistics.logins) == step
            assert "OVERQUOTA" in move.desk.job(move.number or 0)["progress"]["note"]
        move.desk.work()
        assert move.state == "done"
    assert contents(target.account) == contents(source.account)


def test_an_import_that_got_nowhere_for_long_has_failed_with_the_reason(
    lite: Database, tmp_path: Path
) -> None:
    source, target = corpus(), Server(Account(quota_bytes=0))
    with moving(lite, tmp_path, source, target, give_up_s=0) as move:
        report = move.go()
        assert move.state == "failed"
    assert "given up" in report["problem"]
    assert "quota" in report["problem"]


def test_a_daily_limit_pauses_until_the_next_day(lite: Database, tmp_path: Path) -> None:
    source, target = filled(count=100), Server()
    with moving(lite, tmp_path, source, target, daily_bytes=1000, window_bytes=1000) as move:
        move.order()
        assert move.desk.work(hurry=False) == 1
        assert move.state == "paused"
        job = move.desk.job(move.number or 0)
        assert 80_000 < job["run_at"] - job["created_at"] <= 86_400
        assert 0 < len(bodies(target)) < 100
        lite.write(lambda tx: tx.execute(sa.update(t.mail_budget).values(since=0)))
        for _ in range(10):
            lite.write(lambda tx: tx.execute(sa.update(t.job).values(run_at=0)))
            lite.write(lambda tx: tx.execute(sa.update(t.mail_budget).values(since=0)))
            move.desk.work(hurry=False)
        report = move.imported.report
        assert report is not None
        exact(report, 100)
        with lite.read() as tx:  # a pause is no crash
            assert "crashes" not in tx.execute(sa.select(t.job.c.checkpoint)).scalar_one()
    assert contents(target.account) == contents(source.account)


def test_a_running_import_ends_when_it_is_cancelled(lite: Database, tmp_path: Path) -> None:
    source, target = corpus(), Server()
    with moving(lite, tmp_path, source, target, window_bytes=20_000) as move:
        number = move.order()

        def cancel(_: Server) -> None:
            job = move.desk.imported(number).job_id or 0
            lite.write(lambda tx: jobs.cancel(tx, job))

        target.rules = [Rule(Run(cancel), "APPEND", nth=2)]
        move.desk.work()
        report = move.imported.report
        assert report is not None
        assert (move.state, report["problem"]) == ("cancelled", "It was cancelled.")
        assert 0 < report["copied"] < 40
        assert move.desk.job(number)["state"] == "cancelled"
        assert _secrets(lite) == 0
        rows = _rows(lite)
        assert move.go()["copied"] <= 40 - rows
        assert move.state == "done"
    assert contents(target.account) == contents(source.account)


def _secrets(database: Database) -> int:
    with database.read() as tx:
        return int(tx.execute(sa.select(sa.func.count()).select_from(t.job_secret)).scalar_one())


def _rows(database: Database) -> int:
    with database.read() as tx:
        return int(tx.execute(sa.select(sa.func.count()).select_from(t.mail_copy)).scalar_one())


# -- between two passes ---------------------------------------------------------------------------


@pytest.mark.parametrize("features", [MODERN, BASIC])
def test_a_second_pass_brings_what_is_new_and_flags_that_changed(
    database: Database, tmp_path: Path, features: frozenset[str]
) -> None:
    source, target = filled(features=features), Server(features=features)
    with moving(database, tmp_path, source, target) as move:
        exact(move.go(), 5)
        source.account.add("INBOX", BODY % (6, 6))
        there, here = source.folders["INBOX"].entries, target.folders["INBOX"].entries
        source.account.set_flags(there[1], {"\\Flagged"})  # was unread
        source.account.set_flags(there[2], set())  # was read
        target.account.set_flags(here[4], {"\\Seen", "\\Answered", "$mine"})  # the owner's own
        target.account.expunge(target.folders["INBOX"], 5)
        report = move.go()
        exact(report, 1, found=6)
        assert report["flags"] == 2
        third = move.go()
        assert (third["copied"], third["flags"], third["different"]) == (0, 0, 0)
    assert flags(target) == [{"\\Flagged"}, set(), set(), {"\\Seen", "\\Answered", "$mine"}, set()]
    assert not source.violations + target.violations


@pytest.mark.parametrize("features", [MODERN, BASIC])
def test_new_uids_at_the_source_bring_nothing_twice(
    lite: Database, tmp_path: Path, features: frozenset[str]
) -> None:
    source, target = filled(features=features), Server(features=features)
    source.account.add("INBOX", BODY % (1, 1))
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 6)
        source.folders["INBOX"].renumber()
        source.account.add("INBOX", BODY % (7, 7))
        source.account.set_flags(source.folders["INBOX"].entries[1], {"\\Flagged"})
        report = move.go()
        assert (move.state, report["different"], report["refused"]) == ("done", 0, 0)
        exact(move.go(), 0, found=7)
    assert contents(target.account) == contents(source.account)
    assert len(bodies(target)) == 7


@pytest.mark.parametrize("features", [MODERN, BASIC])
@pytest.mark.parametrize("news", [False, True])
def test_new_uids_at_the_destination_bring_nothing_twice(
    lite: Database, tmp_path: Path, news: bool, features: frozenset[str]
) -> None:
    source, target = filled(features=features), Server(features=features)
    source.account.add("Work", BODY % (8, 8))
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 6)
        target.folders["INBOX"].renumber()
        if news:
            source.account.add("INBOX", BODY % (7, 7))
        move.go()
        assert move.state == "done"
        source.account.set_flags(source.folders["INBOX"].entries[1], {"\\Flagged"})
        move.go()
        assert move.state == "done"
    assert contents(target.account) == contents(source.account)


def test_a_folder_made_anew_at_the_destination_is_filled_again(lite: Database, tmp_path: Path) -> None:
    source, target = filled(), Server()
    source.account.add("Work", BODY % (8, 8))
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 6)
        target.account.delete("Work")
        target.account.create("Work").uid_validity += 100
        move.go()
    assert bodies(target, "Work") == [BODY % (8, 8)]


@pytest.mark.parametrize("features", [MODERN, BASIC])
def test_what_is_at_the_destination_already_is_not_doubled(
    lite: Database, tmp_path: Path, features: frozenset[str]
) -> None:
    source, target = filled(features=features), Server(features=features)
    source.account.add("INBOX", BODY % (1, 1), flags={"\\Flagged"})
    for number in (1, 3, 77):
        target.account.add("INBOX", BODY % (number, number), flags={"$mine"})
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert (report["copied"], report["there"], report["different"], move.state) == (4, 2, 0, "done")
    assert sorted(bodies(target)) == sorted([*bodies(source), BODY % (77, 77)])
    assert flags(target)[0] == {"$mine", "\\Seen"}


@pytest.mark.parametrize(
    "missing",
    ["UIDPLUS", "MULTIAPPEND", "LITERAL+", "CONDSTORE", "LIST-STATUS", "LIST-EXTENDED", "NAMESPACE", "all"],
)
def test_servers_without_an_extension_are_copied_exactly(
    lite: Database, tmp_path: Path, missing: str
) -> None:
    gone = {missing, "QRESYNC"} if missing == "CONDSTORE" else {missing}
    features = BASIC if missing == "all" else MODERN - gone
    source, target = corpus(features=features), Server(features=features)
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 40)
        source.account.add("INBOX", BODY % (7, 7))
        exact(move.go(), 1, found=41)
    assert contents(target.account) == contents(source.account)
    assert not source.violations + target.violations


# -- shared workers -------------------------------------------------------------------------------


def test_an_import_that_makes_way_for_others_was_no_crash_and_goes_on(lite: Database, tmp_path: Path) -> None:
    source, target, other = corpus(), Server(), Server()
    with moving(lite, tmp_path, source, target, window_bytes=40_000) as move, serving(other) as second:
        move.desk.settings = replace(move.desk.settings, jobs=replace(move.desk.settings.jobs, slice_s=0))
        number = move.order()
        move.desk.order(move.there, second)
        runner = move.desk.runner()
        assert runner.step()
        with lite.read() as tx:
            kept = tx.execute(
                sa.select(t.job.c.checkpoint).where(t.job.c.checkpoint.is_not(None))
            ).scalar_one()
        assert '"is_running": false' in kept
        move.desk.work()
        assert move.desk.imported(number).state == "done"
        with lite.read() as tx:
            assert not [
                text for (text,) in tx.execute(sa.select(t.job.c.checkpoint)) if "crashes" in (text or "")
            ]
    assert contents(target.account) == contents(other.account) == contents(source.account)


def test_an_import_cancelled_as_it_fails_is_cancelled_and_can_begin_anew(
    lite: Database, tmp_path: Path
) -> None:
    source, target = filled(), Server()
    with moving(lite, tmp_path, source, target) as move:
        number = move.order()

        def cancel(_: Server) -> None:
            job = move.desk.imported(number).job_id or 0
            lite.write(lambda tx: jobs.cancel(tx, job))

        source.rules = [Rule(Run(cancel), "LIST"), Rule(Drop(), "LIST")]
        move.desk.work()
        assert move.state == "cancelled"
        exact(move.go(), 5)
