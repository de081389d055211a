"""The end of an import is told by e-mail: each one's counts, and one summary of a batch."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from conformance import mail_corpus
from conformance.imap_server import Account, Server, serving
from ksync_server import settings
from ksync_server.jobs import Handler
from ksync_server.mail import sender
from ksync_server.mail.sender import Relay, Sender
from ksync_server.mailimport import records
from ksync_server.runner import Runner
from ksync_server.store.database import Database
from tests.mail.harness import Received, relay
from tests.mailimport.harness import Desk, desk

LONG = b"Subject: =?utf-8?q?a?=\r\n\tlong\x1b[31m one\r\n\r\n" + b"x" * 40_000


class Office:
    """A desk whose letters arrive."""

    def __init__(self, database: Database, folder: Path, port: int) -> None:
        made = desk(database, folder, message_bytes=40_000)
        self.mail = settings.Mail(
            relay="127.0.0.1", port=port, security="none", from_address="noreply@example.org", timeout_s=10
        )
        self.desk = Desk(database, msgspec.structs.replace(made.settings, mail=self.mail))

    def post(self) -> None:
        """Send what waits."""
        connection = Relay(self.mail)
        handler = Handler(Sender(self.mail, self.desk.database, connection).run, sender.ATTEMPTS)
        runner = Runner(self.desk.database, (), {sender.SEND: handler})
        while runner.step():
            pass
        connection.close()


def text(letter: Received) -> str:
    """A letter's text."""
    found = letter.message.get_content()
    assert isinstance(found, str)
    return found


def source(count: int = 12) -> Server:
    account = Account()
    mail_corpus.fill(account, mail_corpus.generate(count, median_bytes=2_000, mean_bytes=2_500))
    return Server(account)


def test_the_owner_is_told_the_counts_and_what_was_refused_and_why(
    database: Database, tmp_path: Path
) -> None:
    there = source()
    there.account.add("INBOX", LONG)
    with relay() as post, serving(there) as port:
        office = Office(database, tmp_path, post.port)
        office.desk.do(port, tmp_path / "Maildir", notify="owner@example.org")
        office.post()
        office.post()
    (letter,) = post.received
    assert letter.to == ["owner@example.org"]
    assert letter.message["Subject"] == (
        "The import of alice@example.org has ended, and not everything could be taken over"
    )
    said = text(letter)
    for line in ("Found:         13", "Copied:        12", "Refused:       1"):
        assert line in said
    joined = " ".join(said.split())
    assert f"INBOX, UID 5, {len(LONG)} bytes" in joined
    assert "the most is 40000" in joined
    assert "\x1b" not in said
    assert "secret" not in said
    assert all(len(line) <= 78 for line in said.splitlines())


def test_a_batch_has_one_summary_when_the_last_of_its_imports_ends(
    database: Database, tmp_path: Path
) -> None:
    there = source()
    with relay() as post, serving(there) as port:
        office = Office(database, tmp_path, post.port)
        batch = database.write(lambda tx: records.create_batch(tx, "people.csv", "boss@example.org"))
        for number in range(3):
            password = "wrong" if number == 1 else "secret"
            office.desk.order(port, tmp_path / f"mail-{number}", source_secret=password, batch_id=batch)
        runner = office.desk.runner()
        for expected in (0, 0, 1):
            assert runner.step()
            office.post()
            assert len(post.received) == expected
        assert not runner.step()
    (letter,) = post.received
    assert letter.to == ["boss@example.org"]
    said = text(letter)
    assert "done:        2" in said
    assert "failed:      1" in said
    assert "24 copied" in said
    assert "refuses the log-in of alice@example.org" in " ".join(said.split())


@pytest.mark.parametrize("notify", ["", "owner@example.org"])
def test_without_a_relay_an_import_ends_and_nobody_is_told(
    database: Database, tmp_path: Path, notify: str
) -> None:
    there = source(3)
    with serving(there) as port:
        assert desk(database, tmp_path).do(port, tmp_path / "Maildir", notify=notify)["copied"] == 3
