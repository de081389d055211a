"""Folders and messages arrive as they were; what cannot is refused with a reason, and the rest goes on."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from conformance import mail_corpus
from conformance.imap_server import (
    BASIC,
    MODERN,
    Account,
    Bye,
    Fault,
    No,
    Order,
    Rule,
    Run,
    Server,
    refuse_8bit,
    refuse_any,
    refuse_bare_lf,
    refuse_keyword,
    refuse_larger,
    refuse_nul,
)
from ksync_server.mailimport import walking
from ksync_server.store.database import Database
from tests.mailimport.harness import contents, exact, moving

BODY = b"From: a@example.org\r\nSubject: number %d\r\n\r\nbody %d\r\n"


def filled(account: Account | None = None, count: int = 5, **switches: object) -> Server:
    """Some messages in INBOX."""
    server = Server(account or Account(), **switches)
    for number in range(count):
        server.account.add("INBOX", BODY % (number, number), flags={"\\Seen"} if number % 2 else set())
    return server


def bodies(server: Server, folder: str = "INBOX") -> list[bytes]:
    return sorted(message.body for message in server.folders[folder].messages)


def flags(server: Server, folder: str = "INBOX") -> list[set[str]]:
    return [set(message.flags) for message in server.folders[folder].messages]


# -- folders --------------------------------------------------------------------------------------

LAYOUTS = {
    "slash": ("/", ""),
    "dot": (".", ""),
    "prefix": (".", "INBOX."),
    "slash prefix": ("/", "INBOX/"),
    "flat": (None, ""),
}


@pytest.mark.parametrize("here", LAYOUTS)
@pytest.mark.parametrize("there", LAYOUTS)
def test_folders_keep_their_levels_whatever_the_separators(
    lite: Database, tmp_path: Path, there: str, here: str
) -> None:
    source = Server(Account(separator=LAYOUTS[there][0], prefix=LAYOUTS[there][1]))
    target = Server(Account(separator=LAYOUTS[here][0], prefix=LAYOUTS[here][1]))
    names = (
        [("Work",), ("Work", "R & D"), ("Müller", "日本語", "a")]
        if source.account.separator
        else [("Work",), ("Müller a",)]
    )
    for name in names:
        source.account.add(source.account.path(*name), BODY % (len(name), 1))
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), len(names))
    for name in names:
        wanted = target.account.path(*name) if target.account.separator else "_".join(name)
        assert bodies(target, wanted) == [BODY % (len(name), 1)]
    assert not source.violations + target.violations


def test_a_separator_in_a_name_becomes_another_mark_and_two_names_never_one(
    lite: Database, tmp_path: Path
) -> None:
    source, target = Server(Account(separator="/")), Server(Account(separator="."))
    for number, name in enumerate(("a.b", "a_b", "a/b", "A_B")):
        source.account.add(name, BODY % (number, number))
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 4)
    assert {name for name, folder in target.folders.items() if folder.messages} == {
        "A_B",
        "a.b",
        "a_b-2",
        "a_b-3",
    }


@pytest.mark.parametrize("order", [Order(literal_names=True), Order(bare_names=True)])
@pytest.mark.parametrize("features", [MODERN, MODERN - {"UTF8=ACCEPT"}, MODERN - {"LIST-STATUS"}, BASIC])
def test_names_come_in_any_form(
    lite: Database, tmp_path: Path, order: Order, features: frozenset[str]
) -> None:
    names = ("R&D", "Entwürfe Ω", "日本語", 'say "hi"', "back\\slash", "&", "a%b*c", "😀", "NIL", "~peter")
    source, target = Server(features=features, order=order), Server()
    for number, name in enumerate(names):
        source.account.add(name, BODY % (number, number))
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), len(names))
    assert set(names) <= set(target.folders)
    assert not source.violations + target.violations


@pytest.mark.parametrize("wire", [b"M\xc3\xbcller", b"M\xfcller", b"bad &utf7", b"\x1b[31mred"])
def test_a_folder_whose_name_breaks_the_standard_is_read_by_that_name(
    lite: Database, tmp_path: Path, wire: bytes
) -> None:
    source, target = Server(features=BASIC), Server()
    source.account.add("odd", BODY % (1, 1))
    source.folders["odd"].wire_name = wire
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 1)
        report = move.go()
    assert (report["copied"], report["different"]) == (0, 0)
    assert sum(len(folder.messages) for folder in target.folders.values()) == 1


def test_folders_of_a_use_go_to_the_folder_of_that_use(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server()
    for name, use in (("Gesendet", "\\Sent"), ("Müll", "\\Trash")):
        source.account.create(name, use)
        source.account.add(name, BODY % (1, 1))
    source.account.add("Entwürfe", BODY % (2, 2))
    target.account.create("Sent Messages", "\\Sent")
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 3)
    assert {name for name, folder in target.folders.items() if folder.messages} == {
        "Sent Messages",
        "Trash",
        "Drafts",
    }


def test_a_folder_that_the_destination_does_not_make_is_reported_and_the_others_arrive(
    lite: Database, tmp_path: Path
) -> None:
    source = filled()
    source.account.add("bad", BODY % (9, 9))
    source.account.add("good", BODY % (8, 8))
    target = Server(rules=[Rule(No("[CANNOT] not that name"), "CREATE")])
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert move.state == "incomplete"
    assert (report["copied"], report["different"]) == (6, 1)
    assert "not that name" in report["differences"][0]


def test_a_folder_that_the_source_does_not_open_is_reported_and_the_others_arrive(
    lite: Database, tmp_path: Path
) -> None:
    source, target = filled(rules=[Rule(No("[NOPERM] not yours"), "EXAMINE", nth=2)]), Server()
    source.account.add("closed", BODY % (9, 9))
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert move.state == "incomplete"
    assert (report["copied"], report["different"]) == (5, 1)
    assert "not yours" in report["differences"][0]


# -- messages -------------------------------------------------------------------------------------


def test_messages_that_break_importers_arrive_byte_by_byte(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server()
    odd = mail_corpus.edge_messages(large_bytes=300_000)
    for body in odd.values():
        source.account.add("INBOX", body)
    with moving(lite, tmp_path, source, target, whole_bytes=100_000) as move:
        report = move.go()
        assert move.state == "incomplete"
        assert not list((tmp_path / "spool").iterdir())
    assert bodies(target) == sorted(body for body in odd.values() if body)
    assert (report["refused"], report["different"]) == (1, 0)
    assert report["refusals"][0]["bytes"] == 0
    assert report["refusals"][0]["reason"]
    assert not source.violations + target.violations


@pytest.mark.spec("RFC 3502 §6.3.11")
def test_an_empty_message_is_refused_without_breaking_what_goes_with_it(
    lite: Database, tmp_path: Path
) -> None:
    source, target = filled(count=50), Server()
    source.account.add("INBOX", b"")
    source.account.add("INBOX", BODY % (51, 51))
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
    assert (report["copied"], report["refused"]) == (51, 1)
    assert target.statistics.commands["APPEND"] == 1


def test_what_the_destination_refuses_is_reported_and_the_rest_arrives(
    lite: Database, tmp_path: Path
) -> None:
    source = filled()
    for body in (
        b"a: b\r\n\r\n\0",
        b"a: b\r\n\r\n\xff",
        b"a: b\n\n",
        b"Subject: too long\r\n\r\n" + b"x" * 5000,
    ):
        source.account.add("INBOX", body)
    refuse = refuse_any(refuse_nul(), refuse_8bit(), refuse_bare_lf(), refuse_larger(4000))
    target = Server(refuse_append=refuse)
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert move.state == "incomplete"
        assert bodies(target) == [BODY % (number, number) for number in range(5)]
        assert sorted(each["reason"].split()[0] for each in report["refusals"]) == [
            "8bit",
            "NUL",
            "[TOOBIG]",
            "bare",
        ]
        assert "too long" in {each["subject"] for each in report["refusals"]}
        target.refuse_append = refuse_nul()
        report = move.go()
    assert (report["copied"], report["refused"]) == (3, 1)
    assert len(bodies(target)) == 8


def test_a_message_above_the_limit_is_refused_before_it_is_fetched(lite: Database, tmp_path: Path) -> None:
    source, target = filled(), Server(append_limit=5000)
    source.account.add("INBOX", b"Subject: x\r\n\r\n" + b"x" * 10_000)
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
    assert (report["copied"], report["refused"]) == (5, 1)
    assert "5000" in report["refusals"][0]["reason"]
    assert source.statistics.body_bytes < 5000


def test_duplicates_in_one_folder_stay_two(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server()
    for _ in range(3):
        source.account.add("INBOX", BODY % (1, 1))
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 3)
        exact(move.go(), 0, found=3)
    assert bodies(target) == [BODY % (1, 1)] * 3


def test_dates_keep_their_second_and_their_zone(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server()
    moments = [
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(2038, 1, 20, 1, 2, 3, tzinfo=timezone(timedelta(hours=-9.5))),
    ]
    for moment in moments:
        source.account.add("INBOX", BODY % (1, moment.year), internal_date=moment)
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 2)
    there = [message.internal_date for message in target.folders["INBOX"].messages]
    assert [(each, each.utcoffset()) for each in there] == [(each, each.utcoffset()) for each in moments]


@pytest.mark.parametrize(
    "order",
    [
        Order(body_first=True),
        Order(flags_apart=True),
        Order(chatter=True),
        Order(recent=True),
        Order(True, True, True, True, True, True),
    ],
)
def test_answers_in_any_order_say_the_same(lite: Database, tmp_path: Path, order: Order) -> None:
    source, target = filled(count=20, order=order), Server(order=order)
    with moving(lite, tmp_path, source, target, whole_bytes=60) as move:
        exact(move.go(), 20)
        source.account.set_flags(source.folders["INBOX"].entries[1], {"\\Flagged"})
        report = move.go()
    assert contents(target.account) == contents(source.account)
    assert (report["copied"], report["flags"]) == (0, 1)


@pytest.mark.parametrize("claimed", [0, 1, 10_000, 5_000_000])
def test_a_size_that_lies_harms_nothing(lite: Database, tmp_path: Path, claimed: int) -> None:
    source, target = filled(), Server()
    source.account.add("INBOX", b"Subject: x\r\n\r\n" + b"y" * 3000, fault=Fault(claimed_bytes=claimed))
    with moving(lite, tmp_path, source, target, whole_bytes=5000) as move:
        exact(move.go(), 6)
    assert contents(target.account) == contents(source.account)


@pytest.mark.parametrize("kind", ["no", "nil", "skip"])
@pytest.mark.parametrize("size", [100, 9000])
def test_a_body_that_cannot_be_had_is_refused_and_the_rest_arrives(
    lite: Database, tmp_path: Path, kind: str, size: int
) -> None:
    source, target = filled(), Server()
    fault = Fault(body=kind)
    source.account.add("INBOX", b"Subject: broken\r\n\r\n" + b"y" * size, fault=fault)
    source.account.add("INBOX", BODY % (9, 9))
    with moving(lite, tmp_path, source, target, whole_bytes=5000) as move:
        report = move.go()
    assert (report["copied"], report["refused"], report["different"]) == (6, 1, 0)
    # Dovecot says SERVERBUG of each message that it cannot read, for ever.
    said = "[SERVERBUG]" if kind == "no" else "the server does not give it"
    assert report["refusals"][0]["reason"].startswith(said)
    assert len(source.statistics.logins) == 1


def test_many_bodies_that_cannot_be_had_do_not_stop_an_import(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server()
    for number in range(60):
        fault = None if number % 20 == 0 else Fault(body="nil")
        source.account.add("INBOX", BODY % (number, number) + b"x" * 4000, fault=fault)
    with moving(lite, tmp_path, source, target, window_bytes=40_000) as move:
        report = move.go()
    assert (report["copied"], report["refused"]) == (3, 57)


def test_a_message_expunged_in_mid_copy_is_gone_and_no_failure(lite: Database, tmp_path: Path) -> None:
    source, target = filled(count=10), Server()

    def expunge(server: Server) -> None:
        server.account.expunge(server.folders["INBOX"], 7)

    source.rules = [Rule(Run(expunge), "UID FETCH", nth=2)]
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert move.state == "done"
    assert (report["copied"], report["gone"], report["refused"], report["different"]) == (9, 1, 0, 0)
    assert contents(target.account) == contents(source.account)


# -- flags and keywords -----------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", ["refused", "dropped"])
def test_keywords_the_destination_does_not_take_are_named_and_the_messages_arrive(
    lite: Database, tmp_path: Path, keywords: str
) -> None:
    source = filled()
    source.account.add("INBOX", BODY % (7, 7), flags={"$Forwarded", "NonJunk", "\\Seen"})
    target = Server(keywords=keywords, known_keywords=["NonJunk"])
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert (report["copied"], report["refused"]) == (6, 0)
        assert "$Forwarded" in " ".join(report["notes"])
        assert (report["different"], move.state) == (0, "done")
        report = move.go()
        assert (report["copied"], report["different"], move.state) == (0, 0, "done")
    assert flags(target)[5] == {"NonJunk", "\\Seen"}


def test_one_keyword_the_destination_dislikes_costs_no_message(lite: Database, tmp_path: Path) -> None:
    source = filled()
    source.account.add("INBOX", BODY % (7, 7), flags={"$Forwarded", "\\Seen"})
    target = Server(refuse_append=refuse_keyword("$Forwarded"))
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert (report["copied"], report["refused"], move.state) == (6, 0, "done")
        assert flags(target)[5] == {"\\Seen"}
        target.rules = [Rule(No("invalid keyword"), "UID STORE", times=None)]
        source.account.set_flags(source.folders["INBOX"].entries[6], {"\\Seen", "$Forwarded", "\\Flagged"})
        report = move.go()
    assert report["copied"] == 0
    assert move.state == "incomplete"


def test_an_empty_folder_that_cannot_be_made_is_reported_and_tried_again(
    lite: Database, tmp_path: Path
) -> None:
    source, target = filled(), Server()
    source.account.create("Plans")
    target.rules = [Rule(No("[CANNOT] not that name"), "CREATE", nth=1, times=1)]
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert (report["copied"], report["different"], move.state) == (5, 1, "incomplete")
        assert report["differences"] == [
            "Plans: it cannot be made: the destination: CREATE: NO [CANNOT] not that name"
        ]
        exact(move.go(), 0, found=5)
    assert "Plans" in target.folders


def test_what_was_refused_is_read_again_when_a_pass_begins_with_a_failure(
    lite: Database, tmp_path: Path
) -> None:
    source, target = filled(), Server()
    target.refuse_append = refuse_8bit()
    source.account.add("INBOX", b"Subject: \xe9\r\n\r\nx\r\n")
    with moving(lite, tmp_path, source, target) as move:
        assert move.go()["refused"] == 1
        target.refuse_append = None
        source.rules = [Rule(Bye("come back later"), "CONNECT")]
        exact(move.go(), 1, found=6)


def test_ten_thousand_messages_that_are_there_are_recognised_in_seconds(
    lite: Database, tmp_path: Path
) -> None:
    source, target = Server(), Server()
    for number in range(10_000):  # all of one size, and each of its own
        for server in (source, target):
            server.account.add("INBOX", b"Subject: %05d\r\n\r\n\r\n" % number)
    with moving(lite, tmp_path, source, target) as move:
        began = time.process_time()
        report = move.go()
        spent_s = time.process_time() - began
    assert (report["there"], report["copied"], report["different"]) == (10_000, 0, 0)
    assert len(target.folders["INBOX"].messages) == 10_000
    assert spent_s < 60  # it is 5; looking through all of them for each was 10,000 times 10,000 steps


def test_a_file_of_a_long_message_from_before_a_crash_of_the_machine_is_not_trusted(
    lite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = Server(), Server()
    source.account.add("INBOX", b"Subject: long\r\n\r\n" + b"y" * 90_000)
    source.rules = [Rule(Bye("enough"), after_bytes=40_000)]
    with moving(lite, tmp_path, source, target, whole_bytes=5000) as move:
        move.order()
        move.desk.runner().step()
        (left,) = (tmp_path / "spool").iterdir()
        left.write_bytes(b"\0" * left.stat().st_size)  # what some file systems leave
        monkeypatch.setattr(walking, "_boot", lambda: "another")
        move.desk.work()
        exact(move.imported.report or {}, 1)
    assert contents(target.account) == contents(source.account)
    assert not list((tmp_path / "spool").iterdir())


def test_two_folders_that_become_one_in_a_maildir_keep_messages_that_are_alike(
    lite: Database, tmp_path: Path
) -> None:
    source, root = Server(), tmp_path / "Maildir"
    for name in ("One", "Two"):
        source.account.create(name)
        source.account.add(name, BODY % (1, 1))
    with moving(lite, tmp_path, source, root) as move:
        report = move.go(options={"rename": [["One", "Both"], ["Two", "Both"]]})
    exact(report, 2)
    assert len(list((root / ".Both" / "cur").iterdir())) == 2


def test_inbox_is_one_folder_in_whatever_letters(lite: Database, tmp_path: Path) -> None:
    """A server may list the parent of `Inbox/Old` beside INBOX, and opens INBOX for both."""
    source, target = filled(), Server()
    source.account.add("Inbox/Old", BODY % (9, 9))
    source.account.create("Inbox") if "Inbox" not in source.folders else None
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert (move.state, report["copied"], report["found"]) == ("done", 6, 6)
    assert len(bodies(target)) == 5
    assert len(bodies(target, "INBOX/Old")) == 1
