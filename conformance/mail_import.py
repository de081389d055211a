"""Whole mailboxes through the importer, between real servers: Debian's Dovecot at both ends, and mbsync as a reader.

The import is done by a process of its own, on SQLite and on PostgreSQL, and what arrived is compared by the
standard library's client, which shares no line with the importer. More kills: KSYNC_IMPORT_KILLS=20.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

from conformance import dovecot, mail_corpus, mailboxes, mbsync
from conformance.certificates import Authority
from conformance.dovecot import PASSWORD, Dovecot
from conformance.imap_server import GMAIL, Account, GmailAccount, Mail, Server, serving
from conformance.import_worker import Office, office
from conformance.mailboxes import Found
from conformance.servers import PostgreSQL, postgresql
from conformance.tap import tapped
from conformance.token_provider import providing
from ksync_server.mailimport import tokens
from ksync_server.store import tables as t

KILLS = int(os.environ.get("KSYNC_IMPORT_KILLS", "5"))
MESSAGES = max(600, 120 * KILLS)  # so that what one kill may cost is the same share of all
WINDOW_BYTES = 256 << 10  # what one kill may cost; the default is made for mailboxes ten times as large
AGAIN = 0.08  # of so few bytes one kill in a long message is 1 to 2 %; `./run bench` holds 5 %
SOURCE = "source@example.org"


@dataclass(frozen=True, slots=True)
class Place:
    """A Dovecot with a full mailbox, an empty one, and what the full one holds."""

    there: Dovecot
    here: Dovecot
    expected: Found
    size: int


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="ksync-mail-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        with dovecot.serving(folder / "there") as there, dovecot.serving(folder / "here") as here:
            size = mailboxes.fill(there.port, SOURCE, PASSWORD, mail_corpus.generate(MESSAGES))
            expected = mailboxes.content(there.port, SOURCE, PASSWORD)
            assert expected.total() == MESSAGES
            yield Place(there, here, expected, size)


@dataclass(frozen=True, slots=True)
class Store:
    """An empty database, and its server where it has one."""

    url: str
    server: PostgreSQL | None

    @property
    def name(self) -> str:
        return self.url.partition(":")[0].partition("+")[0]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    with postgresql() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path, server: PostgreSQL) -> Iterator[Store]:
    if request.param == "sqlite":
        yield Store(f"sqlite:///{tmp_path / 'ksync.db'}", None)
    else:
        with server.database() as url:
            yield Store(url, server)


def imported(running: Office, number: int, state: str = "done") -> dict[str, object]:
    """The report of an import that must have ended so."""
    ended = running.desk.imported(number)
    assert ended.state == state, ended.report
    assert ended.report is not None
    return ended.report


def order(running: Office, place: Place, user: str, port: int | None = None) -> int:
    """An import of the full mailbox into an empty one."""
    return running.desk.order(
        port or place.there.port,
        place.here.port,
        source={"user": SOURCE},
        source_secret=PASSWORD,
        target_secret=PASSWORD,
        target_user=user,
    )


def arrived(place: Place, user: str) -> Found:
    return mailboxes.content(place.here.port, user, PASSWORD)


# -- exact --------------------------------------------------------------------------------------------


def test_between_two_dovecots_nothing_is_lost_doubled_or_altered(
    place: Place, store: Store, tmp_path: Path
) -> None:
    user = f"exact-{store.name}@example.org"
    with office(store.url, tmp_path) as running:
        number = order(running, place, user)
        running.finish([number])
        report = imported(running, number)
    assert arrived(place, user) == place.expected
    assert (report["found"], report["copied"], report["checked"]) == (MESSAGES, MESSAGES, MESSAGES)


def test_a_mailbox_behind_tokens_arrives_though_each_of_them_works_once(
    place: Place, store: Store, tmp_path: Path
) -> None:
    """XOAUTH2 as Dovecot speaks it; a token is worth nothing any more once there is a newer one."""
    user = f"tokens-{store.name}@example.org"
    authority = Authority(tmp_path / "authority")
    with (
        providing(authority) as provider,
        tempfile.TemporaryDirectory(prefix="ksync-mail-", ignore_cleanup_errors=True) as name,
        office(store.url, tmp_path) as running,
    ):
        Path(name).chmod(0o755)
        provider.user = SOURCE
        url = f"http://127.0.0.1:{provider.plain_port}/info?token="
        with dovecot.serving(Path(name) / "there", tokens_url=url) as there:
            mailboxes.fill(there.port, SOURCE, PASSWORD, mail_corpus.generate(200))
            expected = mailboxes.content(there.port, SOURCE, PASSWORD)
            file = provider.file(client_id="id", client_secret="client-secret", scope="mail")
            number = running.desk.order(
                there.port,
                place.here.port,
                source={"user": SOURCE, "mechanism": "oauth2", "ca_file": str(authority.file)},
                source_secret=tokens.written(file),
                target_secret=PASSWORD,
                target_user=user,
            )
            given = running.finish_killed(number, kills=2, messages=200, seed=1, within_s=120)
        imported(running, number)
    assert arrived(place, user) == expected
    assert len(provider.forms) >= given + 1 >= 2


def test_a_maildir_is_read_by_dovecot_and_through_it_by_mbsync(
    place: Place, store: Store, tmp_path: Path
) -> None:
    user = f"maildir-{store.name}@example.org"
    maildir = place.here.maildir(user)
    with office(store.url, tmp_path) as running:
        number = running.desk.order(
            place.there.port, maildir, source={"user": SOURCE}, source_secret=PASSWORD
        )
        running.finish([number])
        imported(running, number)
    place.here.own(maildir)
    assert arrived(place, user) == place.expected
    assert mirrored(place.here, user, tmp_path / "mirror") == without_marks(place.expected, place.there)


def mirrored(server: Dovecot, user: str, folder: Path) -> Counter[bytes]:
    """SHA-256 of every message that mbsync copies from a mailbox, without the header it inserts."""
    folder.mkdir()
    far = mbsync.imap("far", server.port, user, PASSWORD)
    mbsync.pull(folder / "state", far, mbsync.maildir("near", folder))
    files = [path for path in folder.rglob("*") if path.parent.name in ("cur", "new") and path.is_file()]
    return Counter(_plain(path.read_bytes()) for path in files)


def without_marks(expected: Found, source: Dovecot) -> Counter[bytes]:
    """The same of the files of the source, which are what `expected` was read from."""
    files = [path for path in source.maildir(SOURCE).rglob("*") if path.parent.name in ("cur", "new")]
    assert len(files) == expected.total()
    return Counter(_plain(path.read_bytes()) for path in files)


def _plain(body: bytes) -> bytes:
    """A digest that knows nothing of line ends and of mbsync's own header."""
    return hashlib.sha256(re.sub(rb"(?m)^X-TUID: .*\n", b"", body.replace(b"\r", b""), count=1)).digest()


# -- Gmail --------------------------------------------------------------------------------------------


def test_gmails_messages_come_once_and_stand_under_each_label(
    place: Place, store: Store, tmp_path: Path
) -> None:
    account = GmailAccount()
    mail_corpus.fill_gmail(account)
    user = f"gmail-{store.name}@example.org"
    source = Server(account, features=GMAIL)
    with serving(source) as port, office(store.url, tmp_path) as running:
        number = running.desk.order(port, place.here.port, target_secret=PASSWORD, target_user=user)
        running.finish([number])
        imported(running, number)
    expected = labelled(account)
    assert arrived(place, user) == expected
    statistics = source.statistics
    assert len(statistics.body_fetches) == 300
    assert set(statistics.body_fetches.values()) == {1}, (
        "every body is fetched once, however many labels it has"
    )
    unique = sum(len(mail.body) for mail in _mails(account))
    assert statistics.body_bytes == unique
    assert statistics.bytes_sent <= 1.1 * unique
    assert not source.violations


def _mails(account: GmailAccount) -> set[Mail]:
    return {mail for folder in account.folders.values() for mail in folder.entries.values()}


def labelled(account: GmailAccount) -> Found:
    """Where Gmail's messages belong: in a folder for each label, else in the archive."""
    roles = {"\\Inbox": "INBOX", "\\Sent": "Sent", "\\Draft": "Drafts", "\\Junk": "Junk", "\\Trash": "Trash"}
    found: Found = Counter()
    for mail in _mails(account):
        kept = mail.labels - {"\\Important", "\\Starred"}
        for name in {roles.get(label, label) for label in kept} or {"Archive"}:
            digest = hashlib.sha256(mail.body).digest()
            found[(name, digest, mail.internal_date.timestamp(), frozenset(mail.flags))] += 1
    return found


# -- crashes ------------------------------------------------------------------------------------------


def test_workers_killed_at_random_moments_lose_double_and_alter_nothing(
    place: Place, store: Store, tmp_path: Path
) -> None:
    user = f"killed-{store.name}@example.org"
    with (
        tapped(place.there.port) as tap,
        office(store.url, tmp_path, window_bytes=WINDOW_BYTES) as running,
    ):
        number = order(running, place, user, tap.port)
        kills = running.finish_killed(number, kills=KILLS, messages=MESSAGES, seed=None, within_s=120)
        imported(running, number)
        again = tap.sent_bytes / place.size - 1
    print(f"{store.name}: {kills} kills, {again:.1%} of the bytes were fetched again, scans included")
    assert kills == KILLS
    assert again <= AGAIN
    assert arrived(place, user) == place.expected


# -- the secret ---------------------------------------------------------------------------------------


def test_the_password_is_nowhere_but_in_memory_and_gone_at_the_end(store: Store, tmp_path: Path) -> None:
    password = f"pw-{secrets.token_hex(12)}"
    account = Account("owner-9f2c@example.org", password)
    mail_corpus.fill(account, mail_corpus.generate(40))
    account.add(
        "INBOX", b"Subject: long\r\n\r\n" + b"0123456789abcdef\r\n" * 150_000
    )  # goes through the spool
    seen = Watch(store, tmp_path, password, account.user)
    maildir = tmp_path / "maildir"
    source = Server(account, bytes_per_s=2_000_000)
    with serving(source) as port, office(store.url, tmp_path) as running:
        number = running.desk.order(
            port,
            maildir,
            source={"user": account.user},
            source_secret=password,
            notify="owner@example.org",
        )
        with seen.meanwhile(running):
            running.finish([number])
        ended = time.monotonic()
        while running.desk.database.fast(sa.select(sa.func.count()).select_from(t.job_secret))[0][0]:
            assert time.monotonic() < ended + 5, "the sealed password outlives its job"
            time.sleep(0.05)
        imported(running, number)
        seen.look(running)
    assert seen.looks >= 3
    assert seen.spooled, "no look fell into the time when a file was in the spool"
    assert seen.found == []
    assert seen.control, "the search does not see what must be there"


class Watch:
    """Looks for a password in all that is written and shown, and for a name that must be found there."""

    def __init__(self, store: Store, folder: Path, password: str, name: str) -> None:
        self._store, self._folder = store, folder
        self._password, self._name = password.encode(), name.encode()
        self.looks = 0
        self.found: list[str] = []
        self.control = False
        self.spooled = False

    @contextlib.contextmanager
    def meanwhile(self, running: Office) -> Iterator[None]:
        """Look over and over while the block runs."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.02):
                if not self.spooled or self.looks < 20:
                    self.look(running)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def look(self, running: Office) -> None:
        """Files of the database, its log, the spool, the worker's log, its command line, and every row."""
        process = Path(f"/proc/{running.worker}")
        files = [process / "cmdline", process / "environ"]
        folders = [self._folder]
        if self._store.server is not None and self._store.server.control is not None:
            folders.append(Path(self._store.server.control.pgdata))
        for folder in folders:
            files += [path for path in folder.rglob("*") if path.is_file()]
        self.spooled |= any((self._folder / "spool").glob("*"))
        for path in files:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self._search(path.read_bytes(), str(path))
        with running.desk.database.read() as tx:
            for table in t.metadata.sorted_tables:
                for row in tx.execute(sa.select(table)):
                    self._search(repr(tuple(row)).encode(), f"a row of {table.name}")
        self.looks += 1

    def _search(self, data: bytes, where: str) -> None:
        if self._password in data:
            self.found.append(where)
        self.control |= self._name in data
