"""Gmail: each message is fetched once and stands in the folder of each of its labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance import mail_corpus
from conformance.imap_server import (
    BASIC,
    ENGLISH,
    GERMAN,
    GMAIL,
    MODERN,
    Account,
    Drop,
    GmailAccount,
    No,
    Rule,
    Server,
)
from ksync_server.store.database import Database
from tests.mailimport.harness import exact, moving
from tests.mailimport.test_cases import BODY, bodies, flags

_ROLES = {"\\Inbox": "INBOX", "\\Sent": "Sent", "\\Draft": "Drafts", "\\Junk": "Junk", "\\Trash": "Trash"}


def wanted(account: GmailAccount) -> dict[str, list[bytes]]:
    """Which bodies each folder of the destination must hold, from the labels alone."""
    found: dict[str, list[bytes]] = {}
    for mail in {
        id(mail): mail for folder in account.folders.values() for mail in folder.entries.values()
    }.values():
        names = {
            _ROLES.get(label, label) for label in mail.labels if label not in ("\\Important", "\\Starred")
        }
        for name in names or {"Archive"}:
            found.setdefault(name, []).append(mail.body)
    return {name: sorted(held) for name, held in found.items()}


def held(account: Account) -> dict[str, list[bytes]]:
    return {
        name: sorted(m.body for m in folder.messages)
        for name, folder in account.folders.items()
        if folder.messages
    }


@pytest.mark.parametrize("names", [ENGLISH, GERMAN], ids=["english", "german"])
@pytest.mark.parametrize("features", [MODERN, BASIC], ids=["modern", "basic"])
def test_each_message_is_fetched_once_and_has_all_its_labels(
    lite: Database, tmp_path: Path, names: dict[str, str], features: frozenset[str]
) -> None:
    account = GmailAccount(names=names, root="[Gmail]" if names is ENGLISH else "[Google Mail]")
    mail_corpus.fill_gmail(account)
    source, target = Server(account, features=GMAIL), Server(features=features)
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert move.state == "done", report["differences"]
    assert held(target.account) == wanted(account)
    assert (report["found"], report["copied"], report["refused"]) == (300, 300, 0)
    assert set(source.statistics.body_fetches.values()) == {1}
    unique = sum(
        len(body)
        for body in {id(m): m.body for f in account.folders.values() for m in f.entries.values()}.values()
    )
    assert source.statistics.body_bytes <= 1.1 * unique
    assert not source.violations + target.violations


def test_labels_are_carried_when_connections_end_everywhere(lite: Database, tmp_path: Path) -> None:
    account = GmailAccount()
    mail_corpus.fill_gmail(account)
    source = Server(account, features=GMAIL, rules=[Rule(Drop(), after_bytes=150_000, times=None)])
    target = Server(rules=[Rule(Drop(), "UID COPY", nth=nth, when="end") for nth in (1, 4)])
    with moving(lite, tmp_path, source, target, window_bytes=300_000) as move:
        report = move.go()
        assert move.state == "done", report["differences"]
    assert (report["copied"], report["linked"]) == (300, sum(map(len, wanted(account).values())) - 300)
    assert held(target.account) == wanted(account)


def test_a_second_pass_adds_new_labels_and_takes_none_away(lite: Database, tmp_path: Path) -> None:
    account = GmailAccount()
    source, target = Server(account, features=GMAIL), Server()
    mails = [account.put(BODY % (n, n), "\\Inbox", "Work") for n in range(3)]
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(), 3)
        account.set_labels(mails[0], {"\\Inbox", "Work", "New"})
        account.set_labels(mails[1], {"Work"})
        account.set_flags(mails[2], {"\\Seen"})
        account.put(BODY % (9, 9), "New")
        report = move.go()
        exact(report, 1, found=4)
        assert report["linked"] == 1
    assert bodies(target, "New") == [BODY % (0, 0), BODY % (9, 9)]
    assert bodies(target) == bodies(target, "Work") == [BODY % (n, n) for n in range(3)]
    assert flags(target)[2] == flags(target, "Work")[2] == {"\\Seen"}
    assert set(source.statistics.body_fetches.values()) == {1}


def test_a_label_that_no_message_has_is_a_folder_too(lite: Database, tmp_path: Path) -> None:
    account = GmailAccount()
    mail = account.put(BODY % (1, 1), "Work", "Trips/2020", "Skipped")
    account.set_labels(mail, {"Work"})
    source, target = Server(account, features=GMAIL), Server()
    with moving(lite, tmp_path, source, target) as move:
        exact(move.go(options={"skip": ["Skip*"]}), 1)
        assert set(target.folders) == {"INBOX", "Junk", "Trash", "Work", "Trips", "Trips/2020"}
        del target.folders["Trips/2020"]
        exact(move.go(), 0, found=1)
    assert "Trips/2020" not in target.folders  # its owner does not want it


def test_spam_trash_and_archive_go_to_the_folders_of_that_use(lite: Database, tmp_path: Path) -> None:
    account = GmailAccount(names=GERMAN)
    for number, labels in enumerate(([], ["\\Junk"], ["\\Trash"], ["\\Starred"], ["\\Draft"], ["\\Sent"])):
        account.put(BODY % (number, number), *labels)
    target = Server()
    target.account.create("Spamverdacht", "\\Junk")
    with moving(lite, tmp_path, Server(account, features=GMAIL), target) as move:
        exact(move.go(), 6)
    assert {name: len(found) for name, found in held(target.account).items()} == {
        "Archive": 2,
        "Spamverdacht": 1,
        "Trash": 1,
        "Drafts": 1,
        "Sent": 1,
    }
    assert {"\\Flagged"} in flags(target, "Archive")


def test_a_hidden_all_mail_is_noted_and_folders_are_read_one_by_one(lite: Database, tmp_path: Path) -> None:
    account = GmailAccount(hidden=["\\All"])
    for number in range(4):
        account.put(BODY % (number, number), "\\Inbox", "Work")
    target = Server()
    with moving(lite, tmp_path, Server(account, features=GMAIL), target) as move:
        exact(move.go(), 8)
        assert "All Mail is hidden" in move.imported.report["notes"][0]
    assert bodies(target) == bodies(target, "Work") == [BODY % (number, number) for number in range(4)]


def test_folders_may_be_read_one_by_one_by_choice(lite: Database, tmp_path: Path) -> None:
    account = GmailAccount()
    account.put(BODY % (1, 1), "\\Inbox", "Work")
    source, target = Server(account, features=GMAIL), Server()
    with moving(lite, tmp_path, source, target) as move:
        report = move.go(options={"gmail": "folder", "skip": ["[[]Gmail]/All Mail"]})
        exact(report, 2)
    assert held(target.account) == {"INBOX": [BODY % (1, 1)], "Work": [BODY % (1, 1)]}
    assert list(source.statistics.body_fetches.values()) == [2]


def test_gmails_daily_limit_pauses_an_import(lite: Database, tmp_path: Path) -> None:
    account = GmailAccount()
    mail_corpus.fill_gmail(account)
    source, target = Server(account, features=GMAIL), Server()
    with moving(lite, tmp_path, source, target, gmail_daily_bytes=200_000, window_bytes=60_000) as move:
        move.order()
        assert move.desk.work(hurry=False) == 1
        assert move.state == "paused"
        assert "daily limit" in str(move.desk.job(move.number or 0)["progress"])
    assert source.statistics.body_bytes < 350_000
    assert len(source.statistics.logins) == 1


def test_labels_that_the_destination_refused_to_copy_are_tried_in_the_next_pass(
    lite: Database, tmp_path: Path
) -> None:
    account = GmailAccount()
    for number in range(3):
        account.put(BODY % (number, number), "\\Inbox", "Work")
    source, target = Server(account, features=GMAIL), Server()
    target.rules = [Rule(No("[CANNOT] not there"), "UID COPY", times=1)]
    with moving(lite, tmp_path, source, target) as move:
        report = move.go()
        assert (report["copied"], report["linked"], report["different"]) == (3, 0, 3)
        assert move.state == "incomplete"
        report = move.go()
        assert (report["copied"], report["linked"], report["different"]) == (0, 3, 0)
    assert {name: len(folder.messages) for name, folder in target.folders.items() if folder.messages} == {
        "INBOX": 3,
        "Work": 3,
    }
