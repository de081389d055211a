"""Messages that are alike, unreadable, renumbered, or answered wrongly: none is lost, doubled or mixed up."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from conformance.imap_server import (
    GMAIL,
    MODERN,
    Drop,
    Fault,
    GmailAccount,
    No,
    Pour,
    Rule,
    Server,
    Stall,
)
from ksync_server import settings
from ksync_server.jobs import LeaseLost
from ksync_server.mailimport import listening, servers
from ksync_server.mailimport.connection import Connection
from ksync_server.mailimport.imap_sink import ImapSink
from ksync_server.mailimport.ledger import Ledger
from ksync_server.store.database import Database
from ksync_server.wire import imap
from tests.mailimport.harness import contents, exact, moving
from tests.mailimport.test_cases import BODY, bodies
from tests.mailimport.test_pipelining import Wire


def big(number: int, size: int = 20_000) -> bytes:
    return b"Subject: %05d\r\n\r\n" % number + b"x" * size


def test_a_destination_that_says_a_body_without_its_uid_stops_nothing_for_ever(
    lite: Database, tmp_path: Path
) -> None:
    source = Server()
    target = Server()
    source.account.add("INBOX", big(1, 400_000))
    source.account.add("INBOX", big(2, 700_000))
    for number in (7, 8, 9):
        target.account.add("INBOX", big(number, 700_000), internal_date=datetime(2001, 1, 1, tzinfo=UTC))
    target.rules = [
        Rule(Stall(0.5), "STATUS", nth=1),
        Rule(Pour(b"* 1 FETCH (BODY[] {3}\r\nabc)\r\n"), "UID FETCH", nth=2),
    ]
    with moving(lite, tmp_path, source, target, timeout_s=2.0) as move:
        move.order()
        runner = move.desk.runner()
        worker = threading.Thread(target=runner.step, daemon=True)
        worker.start()
        worker.join(15)
        assert not worker.is_alive()


@pytest.mark.parametrize("trouble", ["drop", "quota"])
def test_no_failure_is_left_unread(
    lite: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    source, target = Server(), Server(features=MODERN - {"MULTIAPPEND"})
    if trouble == "drop":
        target.rules = [Rule(Drop(), "APPEND", nth=3)]
    else:
        target.rules = [Rule(No("[OVERQUOTA] full"), "APPEND", nth=3, times=10)]
    for number in range(20):
        source.account.add("INBOX", BODY % (number, number))
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 20)
        gc.collect()
    said = [each.getMessage()[:200] for each in caplog.records if each.name == "asyncio"]
    assert not said


def test_messages_keep_their_order(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server()
    for number in range(60):
        source.account.add("INBOX", big(number), flags={"$Forwarded"} if number == 0 else ())
    with moving(lite, tmp_path, source, target, window_bytes=400_000) as move:
        exact(move.go(), 60)
    assert contents(target.account) == contents(source.account)
    here = [each.body[9:14] for each in target.folders["INBOX"].messages]
    assert here == sorted(here)


def test_what_is_there_is_counted_once(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server()
    for number in range(60):
        source.account.add("INBOX", big(number))
    for number in range(3):
        target.account.add("INBOX", big(number))
    target.rules = [Rule(Stall(0.3), "STATUS"), Rule(No("[UNAVAILABLE] later"), "APPEND", nth=1)]
    with moving(lite, tmp_path, source, target, window_bytes=400_000) as move:
        report = move.go()
    assert contents(target.account) == contents(source.account)
    assert (report["copied"], report["there"]) == (57, 3)


@pytest.mark.parametrize("into", ["imap", "maildir"])
def test_new_uids_of_one_of_two_folders_that_become_one_bring_nothing_twice(
    lite: Database, tmp_path: Path, into: str
) -> None:
    source, target, root = Server(), Server(), tmp_path / "Maildir"
    source.account.add("One", BODY % (1, 1))
    source.account.add("Two", BODY % (2, 2))
    with moving(lite, tmp_path, source, target if into == "imap" else root) as move:
        exact(move.go(options={"rename": [["One", "Both"], ["Two", "Both"]]}), 2)
        source.account.add("One", BODY % (3, 3))
        source.folders["Two"].renumber()
        # whatever the order of reading is, the destination's folder is open when Two is found renumbered
        move.go()
    if into == "imap":
        assert bodies(target, "Both") == [BODY % (n, n) for n in (1, 2, 3)]
    else:
        assert len(list((root / ".Both" / "cur").iterdir())) == 3


def test_an_unreadable_stranger_is_not_taken_for_the_one_before(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server()
    for _ in range(2):
        source.account.add("INBOX", BODY % (1, 1))
    target.account.add("INBOX", BODY % (1, 1))
    target.account.add("INBOX", BODY % (9, 9), fault=Fault(body="nil"))
    with moving(lite, tmp_path, source, target) as move:
        move.go()
    assert bodies(target).count(BODY % (1, 1)) == 2


def test_a_poisoned_message_for_a_folder_that_cannot_be_made_stops_nothing(
    lite: Database, tmp_path: Path
) -> None:
    source, target = Server(), Server(rules=[Rule(No("[CANNOT] not that name"), "CREATE", times=None)])
    source.account.add("Bad", BODY % (1, 1), fault=Fault(literal_lie=99_999_999_999))
    source.account.add("INBOX", BODY % (2, 2))
    source.account.add("Bed", BODY % (4, 4))
    with moving(lite, tmp_path, source, target, give_up_s=5, back_off_s=0.01) as move:
        move.order()
        move.desk.work(most=30)
        report = move.imported.report
    assert report
    assert not report["problem"]


def test_a_fetch_that_was_just_sent_is_no_server_that_throttles() -> None:
    async def run() -> None:
        made = Connection(
            servers.Server("mail.example.org", 143, "alice"), settings.MailImport(timeout_s=3.0)
        )
        made.capabilities = frozenset({"LITERAL+", "UIDPLUS"})
        made.connection_made(cast(asyncio.Transport, Wire()))
        pending = await made.send("APPEND", b"INBOX", b"x")
        end = time.monotonic() + 8
        while time.monotonic() < end and made.is_open:
            # an APPEND is always under way; each fetch is answered within 50 ms
            fetch = await made.send("UID FETCH", "7", "(UID FLAGS)", listener=listening.Listener())
            made.data_received(b"%s OK\r\n" % pending.tag.encode())
            pending = await made.send("APPEND", b"INBOX", b"x")
            await asyncio.sleep(0.2)
            if not made.is_open:
                break
            made.data_received(b"* 3 FETCH (UID 7 FLAGS (\\Seen))\r\nk%d OK\r\n" % (made.commands - 1))
            await made.answer(fetch)
        assert made.is_open
        made.abort()

    asyncio.run(run())


def test_an_unreadable_stranger_stops_nothing(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server()
    source.account.add("INBOX", BODY % (1, 1))
    source.account.add("INBOX", BODY % (10, 10))
    target.account.add("INBOX", BODY % (9, 9), fault=Fault(body="no"))
    with moving(lite, tmp_path, source, target, give_up_s=3, back_off_s=0.01) as move:
        report = move.go()
    assert not report["problem"]
    assert BODY % (1, 1) in bodies(target)


def test_a_disk_that_fails_leaves_nothing_behind(
    lite: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = Server(), Server()
    for number in range(60):
        source.account.add("INBOX", big(number))
    count = 0
    write = ImapSink._write

    async def broken(sink: ImapSink, parcel: Any) -> None:
        nonlocal count
        count += 1
        if count <= 3:
            raise OSError(5, "broken")
        await write(sink, parcel)

    monkeypatch.setattr(ImapSink, "_write", broken)
    with moving(lite, tmp_path, source, target, window_bytes=400_000) as move:
        exact(move.go(), 60)
        gc.collect()
    said = [each.getMessage()[:200] for each in caplog.records if each.name == "asyncio"]
    assert not said


def test_a_lease_that_is_lost_ends_the_placing(lite: Database, tmp_path: Path, monkeypatch: Any) -> None:
    source, target = Server(), Server(features=MODERN - {"MULTIAPPEND", "LITERAL+"})
    for number in range(60):
        source.account.add("INBOX", big(number))
    commit, lost, after = Ledger.commit, False, 0

    async def losing(self: Ledger, *arguments: Any) -> None:
        nonlocal lost
        if target.folders["INBOX"].entries:
            lost = True
        if lost:
            raise LeaseLost("x")
        await commit(self, *arguments)

    append = ImapSink._append

    async def counted(sink: ImapSink, *arguments: Any, **more: Any) -> Any:
        nonlocal after
        found = await append(sink, *arguments, **more)
        after += lost
        return found

    monkeypatch.setattr(Ledger, "commit", losing)
    monkeypatch.setattr(ImapSink, "_append", counted)
    with moving(lite, tmp_path, source, target, window_bytes=400_000) as move:
        move.order()
        move.desk.runner().step()
    assert lost
    assert after <= 3  # what was answered at that moment


def test_flags_for_a_folder_that_is_gone_and_cannot_be_made_again_are_told(
    lite: Database, tmp_path: Path
) -> None:
    source, target = Server(), Server()
    source.account.add("Plans", BODY % (1, 1))
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 1)
        del target.folders["Plans"]
        target.rules = [Rule(No("[CANNOT] not that name"), "CREATE", times=None)]
        source.account.set_flags(next(iter(source.folders["Plans"].entries.values())), {"\\Flagged"})
        report = move.go()
    assert move.state == "incomplete"
    assert report["differences"] == [
        "Plans: flags of 1 messages: the destination: CREATE: NO [CANNOT] not that name"
    ]


def test_flags_without_end_are_not_kept() -> None:
    tracemalloc.start()
    for number in range(100):
        imap.response([b"* 1 FETCH (FLAGS (f%d " % number + b"x" * 900_000 + b"))"])
    gc.collect()
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now < 20 << 20


def test_a_keyword_that_is_not_kept_of_a_message_that_was_there_is_no_difference(
    lite: Database, tmp_path: Path
) -> None:
    source, target = Server(), Server(keywords="dropped")
    source.account.add("INBOX", BODY % (1, 1), flags={"NonJunk"})
    target.account.add("INBOX", BODY % (1, 1))
    target.rules = [Rule(Drop(), "UID FETCH", nth=3)]
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert (move.state, report["differences"]) == ("done", [])


@pytest.mark.parametrize("how", ["keyword", "no"])
def test_flags_of_messages_that_are_alike_are_not_mixed_up(lite: Database, tmp_path: Path, how: str) -> None:
    source, target = Server(), Server()
    source.account.add("INBOX", BODY % (1, 1), flags={"\\Seen", *(["$work"] if how == "keyword" else [])})
    source.account.add("INBOX", big(1, 100_000))
    source.account.add("INBOX", big(2, 100_000))
    source.account.add("INBOX", BODY % (1, 1), flags={"\\Flagged"})
    if how == "keyword":  # the first batch asks which keywords there are, and the second one goes first
        target.rules = [Rule(Stall(0.3), "STATUS"), Rule(Drop(), "APPEND", when="end")]
    else:
        target.rules = [
            Rule(Stall(0.3), "STATUS"),
            Rule(No("[UNAVAILABLE] later"), "APPEND"),
            Rule(Drop(), "APPEND", when="end"),
        ]
    with moving(lite, tmp_path, source, target, window_bytes=400_000) as move:
        exact(move.go(), 4)
    assert contents(target.account) == contents(source.account)


def test_two_messages_alike_never_have_one_row(lite: Database, tmp_path: Path) -> None:
    account = GmailAccount()
    account.put(BODY % (1, 1), "\\Inbox", "Work")
    source, target = Server(account, features=GMAIL), Server()
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 1)
        account.special("\\All").renumber()
        move.go()
        account.special("\\All").renumber()
        account.put(BODY % (1, 1), "\\Inbox")
        move.go()
    assert [len(bodies(target, name)) for name in ("INBOX", "Work")] == [2, 1]
