"""A Maildir as destination: another program reads what was put there."""

from __future__ import annotations

import mailbox
import os
from collections import Counter
from pathlib import Path

import pytest

from conformance import mail_corpus
from conformance.imap_server import GMAIL, Drop, GmailAccount, Rule, Server
from ksync_server.mailimport import maildir_sink
from ksync_server.store.database import Database
from tests.mailimport.harness import exact, moving
from tests.mailimport.test_cases import BODY, filled

_LETTERS = {"\\Draft": "D", "\\Flagged": "F", "\\Answered": "R", "\\Seen": "S", "\\Deleted": "T"}


def read(root: Path, folder: str = "") -> Counter[tuple[bytes, int, str]]:
    """Bytes, date and system flags of a folder, as the standard library sees it."""
    box = mailbox.Maildir(root, create=False)
    box = box.get_folder(folder) if folder else box
    return Counter(
        (box.get_bytes(key), int(message.get_date()), "".join(c for c in message.get_flags() if c.isupper()))
        for key, message in box.iteritems()
    )


def expected(server: Server, folder: str) -> Counter[tuple[bytes, int, str]]:
    return Counter(
        (
            each.body,
            int(each.internal_date.timestamp()),
            "".join(sorted(_LETTERS[flag] for flag in each.flags if flag in _LETTERS)),
        )
        for each in server.folders[folder].messages
    )


def test_python_reads_the_same_messages_dates_and_flags(database: Database, tmp_path: Path) -> None:
    source, root = Server(), tmp_path / "Maildir"
    mail_corpus.fill(source.account, mail_corpus.generate(40, folders=20, median_bytes=3000, mean_bytes=5000))
    with moving(database, tmp_path, source, root, whole_bytes=6000) as move:
        exact(move.go(), 40)
        exact(move.go(), 0, found=40)
    for name, folder in source.folders.items():
        if not (name.isascii() and folder.messages):
            continue
        where = "" if name == "INBOX" else name.replace("/", ".").replace("&", "&-")
        assert read(root, where) == expected(source, name), name
    files = list(root.rglob("cur/*"))
    assert len(files) == 40
    assert not list(root.rglob("tmp/*"))
    assert (root / "dovecot-keywords").exists()
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_folders_below_another_spelling_of_inbox_are_below_inbox(lite: Database, tmp_path: Path) -> None:
    """Dovecot looks for `Inbox/Low` in `.INBOX.Low`, so in `.Inbox.Low` nobody would find it."""
    source, root = Server(), tmp_path / "Maildir"
    for number, name in enumerate(("Inbox/Low", "INBOX/Low", "inbox/High", "Work/Inbox")):
        source.account.add(name, BODY % (number, number))
    with moving(lite, tmp_path, source, root) as move:
        exact(move.go(), 4)
    folders = {path.parent.name for path in root.glob(".*/cur")}
    assert folders - {".Work"} == {".INBOX.Low", ".INBOX.Low-2", ".INBOX.High", ".Work.Inbox"}


def test_keywords_have_letters_and_are_carried_later(lite: Database, tmp_path: Path) -> None:
    source, root = filled(), tmp_path / "Maildir"
    source.account.add("INBOX", BODY % (9, 9), flags={"$Forwarded", "NonJunk", "\\Seen"})
    with moving(lite, tmp_path, source, root) as move:
        exact(move.go(), 6)
        words = dict(line.split(" ") for line in (root / "dovecot-keywords").read_text().splitlines())
        assert set(words.values()) == {"$Forwarded", "NonJunk"}
        source.account.set_flags(source.folders["INBOX"].entries[6], {"$Forwarded", "\\Flagged"})
        report = move.go()
    assert (report["copied"], report["flags"], report["different"]) == (0, 1, 0)
    letter = next(chr(97 + int(number)) for number, word in words.items() if word == "$Forwarded")
    assert sum(path.name.endswith(f":2,F{letter}") for path in (root / "cur").iterdir()) == 1


def test_more_keywords_than_letters_are_named(lite: Database, tmp_path: Path) -> None:
    source, root = Server(), tmp_path / "Maildir"
    for number in range(30):
        source.account.add("INBOX", BODY % (number, number), flags={f"word{number}"})
    with moving(lite, tmp_path, source, root) as move:
        report = move.go()
    assert (report["copied"], report["refused"], report["different"]) == (30, 0, 0)
    assert report["notes"]


def test_a_crash_after_the_rename_leaves_one_file(
    lite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, root = filled(count=20), tmp_path / "Maildir"
    source.account.add("INBOX", BODY % (1, 1))
    renames = 0
    rename = os.rename

    def cut(a: Path, b: Path) -> None:
        nonlocal renames
        renames += 1
        rename(a, b)
        if renames in (3, 9, 15):
            raise OSError(5, "cut", str(b))

    monkeypatch.setattr(maildir_sink.os, "rename", cut)
    with moving(lite, tmp_path, source, root) as move:
        report = move.go()
    assert (report["copied"], report["refused"], report["different"]) == (21, 0, 0)
    assert read(root) == expected(source, "INBOX")


def test_an_owners_flags_and_removals_stay(lite: Database, tmp_path: Path) -> None:
    source, root = filled(count=3), tmp_path / "Maildir"
    with moving(lite, tmp_path, source, root) as move:
        exact(move.go(), 3)
        first, second, _ = sorted((root / "cur").iterdir())
        first.rename(
            first.with_name(
                first.name + "R" if first.name.endswith(",") else first.name.replace(":2,", ":2,R")
            )
        )
        second.unlink()
        source.account.add("INBOX", BODY % (7, 7))
        exact(move.go(), 1, found=4)
    assert sum("R" in path.name.partition(":2,")[2] for path in (root / "cur").iterdir()) == 1
    assert len(list((root / "cur").iterdir())) == 3


def test_labels_of_gmail_are_links_to_one_file(lite: Database, tmp_path: Path) -> None:
    account, root = GmailAccount(), tmp_path / "Maildir"
    for number in range(3):
        account.put(BODY % (number, number), "\\Inbox", "Work/Projects", "\\Starred")
    source = Server(account, features=GMAIL, rules=[Rule(Drop(), "UID FETCH", nth=2)])
    with moving(lite, tmp_path, source, root) as move:
        exact(move.go(), 3)
    inbox, work = (sorted((root / part / "cur").iterdir()) for part in ("", ".Work.Projects"))
    assert [path.stat().st_ino for path in inbox] == [path.stat().st_ino for path in work]
    assert len(inbox) == 3
    assert {path.name.partition(":2,")[2] for path in inbox + work} == {"F"}
