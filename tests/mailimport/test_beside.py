"""Things that are done at once in one run: nothing is overtaken, mixed up or counted twice."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from conformance.imap_server import GMAIL, MODERN, Drop, GmailAccount, No, Rule, Server, Stall
from ksync_server.errors import Temporary
from ksync_server.mailimport import importer, maildir_sink, walking
from ksync_server.mailimport.maildir_sink import MaildirSink
from ksync_server.mailimport.targets import Target
from ksync_server.store.database import Database
from tests.mailimport.harness import contents, exact, moving
from tests.mailimport.test_cases import BODY


def subjects(server: Server, name: str = "INBOX") -> list[bytes]:
    return [each.body.partition(b"\r\n")[0] for each in server.folders[name].messages]


@pytest.mark.parametrize("keyword", [(), ("$a",)])
def test_a_single_message_does_not_overtake_the_batch_before_it(
    lite: Database, tmp_path: Path, keyword: tuple[str, ...]
) -> None:
    rules = [Rule(Stall(0.3), command) for command in ("STATUS", "SELECT")]  # both batches have come by then
    source, target = Server(), Server(features=MODERN - {"MULTIAPPEND"}, rules=rules)
    for number in range(10):
        flags = keyword if number == 0 else ()
        source.account.add("INBOX", b"Subject: %02d\r\n\r\n" % number + b"x" * 1000, flags=flags)
    source.account.add("INBOX", b"Subject: 10\r\n\r\n" + b"x" * 50_000)  # a batch by itself
    with moving(lite, tmp_path, source, target, window_bytes=100_000) as move:
        exact(move.go(), 11)
    assert contents(target.account) == contents(source.account)
    assert subjects(target) == subjects(source)


def test_folders_that_are_made_at_once_have_one_head_in_the_list_of_subscriptions(tmp_path: Path) -> None:
    async def make(root: Path) -> None:
        sink = MaildirSink(root, "1", escaped=True)
        await asyncio.gather(*(sink.ensure(f"Folder {number}") for number in range(4)))

    for trial in range(100):
        asyncio.run(make(tmp_path / str(trial)))
        lines = (tmp_path / str(trial) / "subscriptions").read_bytes().splitlines()
        assert lines.count(b"V\t2") == 1, (trial, lines)


class Slow(dict[str, Any]):
    """What is known of the files, on a machine that switches threads right before a look into it."""

    def __getitem__(self, name: str) -> Any:
        time.sleep(0.001)
        return super().__getitem__(name)


def test_a_folder_of_a_maildir_can_be_looked_at_while_messages_are_put_there(tmp_path: Path) -> None:
    """The proof of a stretch drops what is known of the files while the next stretch is placed."""

    async def both() -> None:
        sink = MaildirSink(tmp_path / "Maildir", "1")
        sink._files = Slow()
        await sink.ensure("INBOX")

        async def look() -> None:
            for _ in range(200):
                await sink.look("INBOX", [])

        async def put() -> None:
            for _ in range(200):
                await sink.put("INBOX", [], 1)

        await asyncio.gather(look(), put())

    asyncio.run(both())


def test_labels_go_into_a_maildir_while_the_stretch_before_is_proven(
    lite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = GmailAccount()
    for number in range(60):
        account.put(BODY % (number, number), "\\Inbox", "Work")
    write = maildir_sink._write

    def slowly(*arguments: Any) -> None:
        write(*arguments)
        time.sleep(0.003)

    monkeypatch.setattr(maildir_sink, "_write", slowly)
    monkeypatch.setattr(walking, "_SCAN_UIDS", 3)
    with moving(lite, tmp_path, Server(account, features=GMAIL), tmp_path / "Maildir") as move:
        report = move.go()
    assert report["differences"] == []
    for name in (".Work", "."):
        assert len(list((tmp_path / "Maildir" / name / "cur").iterdir())) == 60


def test_a_folder_that_is_not_made_is_not_subscribed_to(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server(rules=[Rule(No("[CANNOT] not this one"), "CREATE", times=None)])
    source.account.add("Forbidden", BODY % (1, 1))
    with moving(lite, tmp_path, source, target) as move:
        move.go()
    assert target.statistics.commands["SUBSCRIBE"] == 0


def test_what_is_linked_is_counted_with_its_row(
    lite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof of a stretch before is settled, and the run cut, while labels are being put on."""
    account = GmailAccount()
    for number in range(4):
        account.put(BODY % (number, number) + b"x" * number, "\\Inbox", "Work")
    target = Server(rules=[Rule(Drop(), "UID COPY", when="end")])  # it has them, and we no rows
    links, recognise = importer.Importer._links, Target.recognise
    cut = known = False

    async def cut_once(made: importer.Importer, stretch: Any) -> None:
        async def recognised(target: Target, parcel: Any) -> Any:
            nonlocal cut, known
            if known and not cut:
                cut = True
                await made._ledger.commit(lambda tx: None)  # as `_settle` does
                raise Temporary("cut")
            found = await recognise(target, parcel)
            known |= found is not None
            return found

        with monkeypatch.context() as patched:
            patched.setattr(Target, "recognise", recognised)
            await links(made, stretch)

    monkeypatch.setattr(importer.Importer, "_links", cut_once)
    with moving(lite, tmp_path, Server(account, features=GMAIL), target) as move:
        report = move.go()
    assert cut
    assert (report["copied"], report["linked"]) == (4, 4)
