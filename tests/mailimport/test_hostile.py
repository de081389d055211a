"""A source that means harm costs bounded time and memory, is reported, and harms no import beside it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conformance.imap_server import BASIC, Account, Fault, Pour, Rule, Server, hostile, serving
from ksync_server.store.database import Database
from tests.mailimport.harness import contents, desk, exact, moving
from tests.mailimport.test_cases import BODY, filled

_PAGE = os.sysconf("SC_PAGE_SIZE")
_MEMORY = 96 << 20
_SECONDS = 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Neither time nor memory without end; the server's share is counted too."""
    before, began, over = _resident(), time.monotonic(), threading.Event()
    most = before

    def watch() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    assert most - before < _MEMORY, f"{(most - before) >> 20} MiB"
    assert time.monotonic() - began < _SECONDS


def on(make: Callable[..., Rule], command: str, nth: int = 1, times: int | None = 1) -> Rule:
    rule = make(command)
    rule.nth, rule.times = nth, times
    return rule


ATTACKS = [
    hostile.endless_literal,
    hostile.huge_literal,
    hostile.deep_parentheses,
    hostile.unclosed_parentheses,
    hostile.garbage,
    hostile.foreign_tag,
    hostile.continuation,
    hostile.foreign_messages,
    hostile.unknown_answers,
    lambda command: hostile.long_line(command, 20_000_000),
    lambda command: hostile.exists_without_end(command, 400_000),
]
_NAMES = [
    "endless",
    "huge",
    "deep",
    "unclosed",
    "garbage",
    "tag",
    "continuation",
    "foreign",
    "unknown",
    "line",
    "exists",
]


@pytest.mark.parametrize(
    ("command", "nth"), [("LIST", 1), ("EXAMINE", 1), ("UID FETCH", 1), ("UID FETCH", 2)]
)
@pytest.mark.parametrize("attack", ATTACKS, ids=_NAMES)
def test_an_attack_that_passes_harms_nothing(
    lite: Database, tmp_path: Path, attack: Callable[[str], Rule], command: str, nth: int
) -> None:
    source, target = filled(rules=[on(attack, command, nth)]), Server()
    with bounded(), moving(lite, tmp_path, source, target) as move:
        report = move.go()
    if report["refused"]:  # one message, which the server said was endless
        assert report["refused"] == 1
        assert "bytes" in report["refusals"][0]["reason"]
        assert report["copied"] == 4
        return
    exact(report, 5)
    assert contents(target.account) == contents(source.account)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("attack", ATTACKS[:6], ids=_NAMES[:6])
def test_an_attack_without_end_is_reported_and_another_import_finishes(
    lite: Database, tmp_path: Path, attack: Callable[[str], Rule], nth: int
) -> None:
    source, good, target, other = (
        filled(rules=[on(attack, "UID FETCH", nth, None)]),
        filled(),
        Server(),
        Server(),
    )
    both = desk(lite, tmp_path, give_up_s=0)
    with (
        serving(source) as there,
        serving(good) as beside,
        serving(target) as here,
        serving(other) as second,
        bounded(),
    ):
        bad, fine = both.order(there, here), both.order(beside, second)
        workers = [threading.Thread(target=both.work) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(_SECONDS)
    assert both.imported(fine).state == "done"
    assert contents(other.account) == contents(good.account)
    assert both.imported(bad).state in ("failed", "incomplete")
    report = both.imported(bad).report
    assert report is not None
    assert report["problem"] or report["refused"]


def test_lengths_that_are_none_are_passed_over_in_time(lite: Database, tmp_path: Path) -> None:
    source, target = filled(rules=hostile.absurd_literals()), Server()
    with bounded(), moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 5)
    assert contents(target.account) == contents(source.account)


def test_an_endless_body_without_a_uid_is_found_by_asking_one_by_one(lite: Database, tmp_path: Path) -> None:
    source, target = filled(), Server()
    source.rules = [
        Rule(Pour(b"* 1 FETCH (BODY[] {99999999999}\r\n", b"x" * 1000, 10), "UID FETCH", nth=2, times=3)
    ]
    with bounded(), moving(lite, tmp_path, source, target) as move:
        report = move.go()
    assert report["copied"] + report["refused"] == 5
    assert report["refused"] <= 2


def test_sizes_that_lie_do_not_fill_the_memory(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), tmp_path / "Maildir"
    for number in range(60):
        source.account.add("INBOX", BODY % (number, number) + b"x" * 1_000_000, fault=Fault(claimed_bytes=10))
    with bounded(), moving(lite, tmp_path, source, target, window_bytes=4 << 20, whole_bytes=600_000) as move:
        exact(move.go(), 60)


def test_a_subject_without_end_is_left_out_of_the_report(lite: Database, tmp_path: Path) -> None:
    source, target = filled(), Server()
    source.account.add("INBOX", b"")
    head = b"* 6 FETCH (UID 6 BODY[HEADER.FIELDS (SUBJECT)]<0> {9000000000000000000}\r\n"
    source.rules = [Rule(Pour(head, b"x" * 65536, None), "UID FETCH", nth=3)]
    with bounded(), moving(lite, tmp_path, source, target) as move:
        report = move.go()
    assert (report["copied"], report["refused"]) == (5, 1)


def test_a_referral_is_followed_by_nobody(lite: Database, tmp_path: Path) -> None:
    source = filled(rules=[hostile.referral()])
    with moving(lite, tmp_path, source, Server(), give_up_s=0) as move:
        assert "REFERRAL" in move.go()["problem"]
    assert not source.statistics.logins


@pytest.mark.parametrize("features", [BASIC, None])
@pytest.mark.parametrize("into", ["imap", "maildir"])
def test_names_of_folders_that_escape_hide_or_break_lines(
    lite: Database, tmp_path: Path, features: frozenset[str] | None, into: str
) -> None:
    source = Server(features=features) if features else Server()
    hostile.nasty_folders(source.account)
    target, root = Server(), tmp_path / "deep" / "Maildir"
    with moving(lite, tmp_path, source, target if into == "imap" else root) as move:
        report = move.go()
    unaskable = [name for name in hostile.NASTY_NAMES if len(name) > 1000 or set(name) & set("\0\r\n")]
    assert report["copied"] == len(hostile.NASTY_NAMES) - len(unaskable)
    assert (report["different"], move.state) == (len(unaskable), "incomplete")
    assert not [name for folder in target.folders for name in folder if not name.isprintable()]
    assert not (tmp_path / "etc").exists()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} <= {"deep", "spool"}
    if into == "maildir":
        assert list((tmp_path / "deep").iterdir()) == [root]
        assert {path.parent for path in root.rglob("cur")} == {root, *root.glob(".*")}


def test_a_name_too_long_for_a_disk_costs_only_its_folder(lite: Database, tmp_path: Path) -> None:
    source = filled()
    source.account.add("x" * 300, BODY % (9, 9))
    with moving(lite, tmp_path, source, tmp_path / "Maildir") as move:
        report = move.go()
        assert move.state == "incomplete"
    assert (report["copied"], report["different"]) == (5, 1)
    assert "too long" in report["differences"][0]


def test_too_many_folders_are_refused(lite: Database, tmp_path: Path) -> None:
    source = Server(Account())
    hostile.many_folders(source.account, 3000)
    with bounded(), moving(lite, tmp_path, source, Server(), folders=2000) as move:
        assert "more than 2000 folders" in move.go()["problem"]
        assert move.state == "failed"
