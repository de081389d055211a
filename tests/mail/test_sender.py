"""Mail goes out through the relay once, encrypted, and says where it could not."""

from __future__ import annotations

import contextlib
import email
import gc
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from email.header import decode_header, make_header
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from ksync_server import jobs, settings
from ksync_server.errors import Permanent, Temporary
from ksync_server.jobs import Handler, Job, Lease
from ksync_server.mail import sender
from ksync_server.mail.sender import Relay, Sender, compose
from ksync_server.runner import Runner
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from tests.mail.harness import PASSWORD, USER, Received, TestRelay, certificate, on_its_loop, relay

MAIL = settings.Mail(
    relay="127.0.0.1",
    security="none",
    from_address="noreply@example.org",
    from_name="Example cloud",
    timeout_s=10,
)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(settings.Database(url=database_url), threads=4)
    yield opened
    opened.close()


@pytest.fixture
def plain() -> Iterator[TestRelay]:
    """A relay that takes everything unencrypted."""
    with relay() as running:
        yield running


class Post:
    """A job worker that sends mail."""

    def __init__(self, database: Database, server: TestRelay | None, **changed: Any) -> None:
        port = server.port if server else 25
        self.settings = msgspec.structs.replace(MAIL, **{"port": port, **changed})
        self.database = database
        self.relay = Relay(self.settings)
        handler = Handler(Sender(self.settings, database, self.relay).run, sender.ATTEMPTS)
        self.runner = Runner(database, (), {sender.SEND: handler})

    def __enter__(self) -> Post:
        return self

    def __exit__(self, *_: object) -> None:
        self.relay.close()

    def queue(self, to: str = "alice@example.org", **given: Any) -> int:
        words = {"subject": "Hello", "text": "A line.\n", **given}
        number = self.database.write(lambda tx: sender.queue(tx, to=to, **words))
        assert number is not None
        return number

    def deliver(self) -> None:
        """Run what is due."""
        while self.runner.step():
            pass

    def job(self, number: int) -> dict[str, Any]:
        with self.database.read() as tx:
            return jobs.get_job(tx, number)

    def hurry(self) -> None:
        """Make what waits due now."""
        waiting = sa.update(t.job).where(t.job.c.state == "ready")
        self.database.write(lambda tx: tx.execute(waiting.values(run_at=0)))


# -- what goes over the wire ----------------------------------------------------------------------


@pytest.mark.spec("RFC 3834 §5")
@pytest.mark.spec("RFC 5322 §3.6")
def test_a_message_has_what_a_machine_made_message_needs(database: Database, plain: TestRelay) -> None:
    with Post(database, plain, reply_to="help@example.org") as post:
        number = post.queue(name="Zoë Müller", subject="Grüße", text="Hello,\n\nall is well – bye.\n")
        post.deliver()
        assert post.job(number)["state"] == "done"
        assert post.job(number)["progress"] == {"note": "250 queued as 1"}
    (taken,) = plain.received
    message = taken.message
    assert (taken.sender, taken.to, taken.utf8) == ("noreply@example.org", ["alice@example.org"], False)
    assert str(message["From"]) == "Example cloud <noreply@example.org>"
    assert str(message["To"]) == "Zoë Müller <alice@example.org>"
    assert str(message["Subject"]) == "Grüße"
    assert str(message["Reply-To"]) == "help@example.org"
    assert str(message["Auto-Submitted"]) == "auto-generated"
    assert message["Message-ID"] == f"<{number}.{database.generation}.ksync@example.org>"
    assert message["Date"].datetime.tzinfo is not None
    assert message.get_content_type() == "text/plain"
    assert taken.text.replace("\r\n", "\n") == "Hello,\n\nall is well – bye.\n"
    assert taken.raw.isascii()


def test_messages_that_wait_share_one_connection(database: Database, plain: TestRelay) -> None:
    with Post(database, plain) as post:
        for number in range(7):
            post.queue(f"person{number}@example.org")
        post.deliver()
    assert [taken.to for taken in plain.received] == [[f"person{number}@example.org"] for number in range(7)]
    assert plain.connections == 1


def test_a_connection_that_the_relay_has_ended_is_opened_anew(database: Database, plain: TestRelay) -> None:
    with Post(database, plain) as post:
        post.queue()
        post.deliver()
        on_its_loop(plain, plain.cut_all)
        number = post.queue()
        post.deliver()
        assert post.job(number)["state"] == "done"
    assert (len(plain.received), plain.connections) == (2, 2)


@pytest.mark.spec("RFC 6531 §3.2")
def test_smtputf8_is_used_only_where_an_address_needs_it(database: Database, plain: TestRelay) -> None:
    with Post(database, plain) as post:
        post.queue("alice@bücher.example", name="Ålice")
        post.queue("jürgen@example.org")
        post.deliver()
    first, second = plain.received
    assert (first.to, first.utf8) == (["alice@xn--bcher-kva.example"], False)
    assert (second.to, second.utf8) == (["jürgen@example.org"], True)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "alice",
        "alice@",
        "@example.org",
        "alice@example.org\r\nRCPT TO:<eve@example.org>",
        "alice@example.org> NOTIFY=NEVER",
        "alice@example.org,eve@example.org",
        "<alice@example.org>",
        "a b@example.org",
        "alice@exam\nple.org",
        "alice@example.org\n",
        "alice@-example.org",
        "alice@example..org",
        "alice@" + "a" * 64 + ".example",
    ],
)
def test_what_is_no_address_never_reaches_the_relay(address: str) -> None:
    with pytest.raises(Permanent, match="no address"):
        compose(MAIL, "1.x.ksync", to=address, subject="s", text="t")


anything = st.text(max_size=120) | st.sampled_from(
    [
        "a\r\nBcc: eve@example.org",
        "a\n\nb",
        "=?utf-8?q?a=0ABcc=3A_eve?=",
        '"',
        "\\",
        "a\u2028b",
        "\u202egnp",
        "\ud800",
    ]
)


@given(name=anything, subject=anything, text=anything)
def test_no_text_can_add_a_header_or_a_receiver(name: str, subject: str, text: str) -> None:
    made = compose(MAIL, "1.x.ksync", to="alice@example.org", name=name, subject=subject, text=text)
    message = Received("", [], made.content, False).message
    assert {header.lower() for header in message} == {
        *("date", "from", "to", "subject", "message-id", "auto-submitted"),
        *("mime-version", "content-type", "content-transfer-encoding"),
    }
    assert [each.addr_spec for each in message["To"].addresses] == ["alice@example.org"]
    assert not message.is_multipart()
    assert all(len(line) <= 78 for line in made.content.split(b"\r\n"))
    assert str(message["Subject"]) == sender.one_line(subject)
    # Not `display_name`: the standard library's own reader puts a space between two encoded words of a name.
    to = email.message_from_bytes(made.content)["To"]
    written = to.rpartition("alice@example.org")[0].rstrip("<").strip()
    assert str(make_header(decode_header(written))) == sender.one_line(name)
    assert b"\n" not in made.content.replace(b"\r\n", b"")


# -- refusals and failures --------------------------------------------------------------------------


def test_a_4xx_is_tried_again_with_the_same_message_id(database: Database, plain: TestRelay) -> None:
    plain.to_rcpt = ["450 4.2.1 greylisted, come back"]
    plain.to_data = ["452 4.3.1 no room"]
    with Post(database, plain) as post:
        number = post.queue()
        for said in ("450 4.2.1 greylisted", "452 4.3.1 no room"):
            post.deliver()
            found = post.job(number)
            assert found["state"] == "ready"
            assert said in found["last_error"]
            post.hurry()
        post.deliver()
        assert post.job(number)["state"] == "done"
    assert len(plain.received) == 1


@pytest.mark.parametrize("where", ["to_rcpt", "to_data"])
def test_a_5xx_is_recorded_and_not_tried_again(database: Database, plain: TestRelay, where: str) -> None:
    setattr(plain, where, ["550 5.1.1 no such person"])
    with Post(database, plain) as post:
        number, next_ = post.queue("gone@example.org"), post.queue()
        post.deliver()
        found = post.job(number)
        assert (found["state"], found["attempts"]) == ("failed", 1)
        assert found["last_error"] == "the relay says 550 5.1.1 no such person"
        assert post.job(next_)["state"] == "done"
    assert plain.connections == 1


def test_a_connection_cut_in_the_answer_leads_to_a_repeat_that_can_be_recognised(
    database: Database, plain: TestRelay
) -> None:
    plain.to_data = ["CUT"]
    with Post(database, plain) as post:
        number = post.queue()
        post.deliver()
        assert post.job(number)["state"] == "ready"
        post.hurry()
        post.deliver()
        assert post.job(number)["state"] == "done"
    first, second = plain.received
    assert first.message["Message-ID"] == second.message["Message-ID"]


def test_a_worker_that_dies_after_the_answer_repeats_the_same_message(
    database: Database, plain: TestRelay
) -> None:
    with Post(database, plain) as post:
        number = post.queue()
        claim = jobs.claim(database, [sender.SEND], lease_s=60)
        assert claim is not None
        dead = Job(database, claim)
        Sender(post.settings, database, post.relay).run(dead)  # and never gives the job back
        row = database.fast(sa.select(t.job.c.fence, t.job.c.lease_until))[0]
        again = jobs.take_over(database, Lease(number, sender.SEND, row[0], row[1]), lease_s=60)
        assert again is not None
        Sender(post.settings, database, post.relay).run(Job(database, again))
    assert len({taken.message["Message-ID"] for taken in plain.received}) == 1
    assert len(plain.received) == 2


def test_a_slow_relay_costs_one_time_out_and_the_message_is_tried_again(
    database: Database, plain: TestRelay
) -> None:
    plain.to_data = ["SLOW"]
    with Post(database, plain, timeout_s=0.3) as post:
        number = post.queue()
        post.deliver()
        assert "too slow" in post.job(number)["last_error"]
        plain.faster.set()
        post.hurry()
        post.deliver()
        assert post.job(number)["state"] == "done"


def test_a_relay_that_is_away_is_asked_again(database: Database) -> None:
    with relay() as gone:
        port = gone.port
    with Post(database, None, port=port) as post:
        number = post.queue()
        post.deliver()
        found = post.job(number)
        assert found["state"] == "ready"
        assert "the relay: Error connecting" in found["last_error"]


def test_only_one_worker_talks_to_the_relay(database: Database) -> None:
    with Post(database, None) as post:
        post.queue()
        post.queue()
        assert jobs.claim(database, [sender.SEND], lease_s=60) is not None
        assert jobs.claim(database, [sender.SEND], lease_s=60) is None


# -- encryption and log-in ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that stands for its own authority."""
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def password_file(tmp_path: Path) -> str:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    return str(path)


@pytest.mark.spec("RFC 3207 §4")
@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_mail_goes_encrypted_and_logged_in(trusted: Path, password_file: str, security: str) -> None:
    with relay(trusted, implicit_tls=security == "tls", log_in=True) as server:
        chosen = msgspec.structs.replace(
            MAIL,
            port=server.port,
            security=security,
            ca_file=str(trusted),
            user=USER,
            password_file=password_file,
        )
        said = sender.send_now(chosen, to="alice@example.org", subject="Test", text="t\n")
        assert said == "250 queued as 1"
        assert server.log_ins == [True]
        assert len(server.received) == 1


def untrusted(trusted: Path, folder: Path, case: str) -> tuple[Path | None, str]:
    """A relay's certificate and the file of those that are trusted."""
    if case == "unknown authority":
        return trusted, ""
    if case == "another name":
        other = certificate(folder, "mail.example.net")
        return other, str(other)
    return None, str(trusted)


@pytest.mark.parametrize("case", ["unknown authority", "another name", "no starttls"])
def test_a_relay_that_cannot_be_trusted_gets_neither_mail_nor_password(
    trusted: Path, password_file: str, tmp_path: Path, case: str
) -> None:
    shown, ca_file = untrusted(trusted, tmp_path, case)
    with relay(shown, log_in=shown is not None) as server:
        chosen = msgspec.structs.replace(
            MAIL,
            port=server.port,
            security="starttls",
            ca_file=ca_file,
            user=USER,
            password_file=password_file,
        )
        with pytest.raises(Temporary, match=r"(?i)certificate|starttls"):
            sender.send_now(chosen, to="alice@example.org", subject="Test", text="t\n")
        assert (server.received, server.log_ins) == ([], [])


def test_a_wrong_password_is_no_fault_of_the_message_and_is_never_shown(
    database: Database, trusted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = tmp_path / "wrong"
    wrong.write_text("not-the-secret-9K\n")
    tls = {"security": "starttls", "ca_file": str(trusted), "user": USER, "password_file": str(wrong)}
    with relay(trusted, log_in=True) as server, Post(database, server, **tls) as post:
        number = post.queue()
        post.deliver()
        found = post.job(number)
        assert found["state"] == "ready"
        assert "does not let us in: 535" in found["last_error"]
        wrong.write_text(PASSWORD + "\n")
        post.hurry()
        post.deliver()
        assert post.job(number)["state"] == "done"
        everything = str(found) + str(post.job(number)) + caplog.text
    assert "not-the-secret" not in everything
    assert PASSWORD not in everything


def wait_until(met: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not met():
        assert time.monotonic() < until
        threading.Event().wait(0.005)


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What is still open is seen: nothing is closed because it was forgotten."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def failing(case: str, trusted: Path, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the relay, and settings with which no message gets through."""
    wrong = folder / "wrong"
    wrong.write_text("not-the-secret-9K\n")
    log_in = {"security": "starttls", "ca_file": str(trusted), "user": USER, "password_file": str(wrong)}
    return {
        "unknown authority": ({"certificate": trusted}, {"security": "starttls"}),
        "unknown authority, tls": ({"certificate": trusted, "implicit_tls": True}, {"security": "tls"}),
        "no starttls": ({}, {"security": "starttls"}),
        "wrong password": ({"certificate": trusted, "log_in": True}, log_in),
        "cut": ({}, {}),
        "cut, tls": ({"certificate": trusted}, {"security": "starttls", "ca_file": str(trusted)}),
    }[case]


HELLO = compose(MAIL, "1.x.ksync", to="alice@example.org", subject="s", text="t")


@contextlib.contextmanager
def client(server: TestRelay, **changed: Any) -> Iterator[Relay]:
    sending = Relay(msgspec.structs.replace(MAIL, **{"port": server.port, **changed}))
    try:
        yield sending
    finally:
        sending.close()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(
    "case",
    ["unknown authority", "unknown authority, tls", "no starttls", "wrong password", "cut", "cut, tls"],
)
def test_a_hundred_failing_connections_leave_no_descriptor(trusted: Path, tmp_path: Path, case: str) -> None:
    options, changed = failing(case, trusted, tmp_path)
    with relay(**options) as server, client(server, **changed) as sending:

        def fail(times: int) -> None:
            for _ in range(times):
                server.to_data[:] = ["CUT"] if case.startswith("cut") else []
                with pytest.raises(Temporary):
                    sending.send(HELLO)

        fail(1)
        wait_until(lambda: not server.open)
        before = descriptors()
        fail(100)
        wait_until(lambda: descriptors() <= before)
        assert server.connections >= 100 or case == "unknown authority, tls"


@pytest.mark.usefixtures("no_collection")
def test_a_relay_that_stops_reading_costs_no_descriptor() -> None:
    """Megabytes wait to be sent: a polite end would wait for their end."""
    text = "A line of a message that is too long for what lies between us.\n" * 160_000
    message = compose(MAIL, "1.x.ksync", to="alice@example.org", subject="s", text=text)
    with relay() as server, client(server, timeout_s=0.2) as sending:
        server.deaf = True

        def fail(times: int) -> None:
            for _ in range(times):
                with pytest.raises(Temporary):
                    sending.send(message)

        fail(1)
        before = descriptors() - len(server.open)  # the relay does not see the end of what it does not read
        fail(5)
        assert server.unread > 1
        wait_until(lambda: descriptors() - len(server.open) <= before)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_connection_that_is_closed_leaves_no_descriptor(trusted: Path, security: str) -> None:
    with relay(trusted, implicit_tls=security == "tls") as server:
        chosen = msgspec.structs.replace(MAIL, port=server.port, security=security, ca_file=str(trusted))
        send = partial(sender.send_now, chosen, to="alice@example.org", subject="Test", text="t\n")
        send()
        wait_until(lambda: not server.open)
        before = descriptors()
        for _ in range(30):
            send()
        wait_until(lambda: not server.open)
        wait_until(lambda: descriptors() <= before)


@pytest.mark.parametrize("key", ["password_file", "ca_file"])
def test_a_file_that_cannot_be_read_is_named(
    database: Database, plain: TestRelay, tmp_path: Path, key: str
) -> None:
    security = "none" if key == "password_file" else "starttls"
    missing = {key: str(tmp_path / "missing"), "user": "" if key == "ca_file" else USER, "security": security}
    with Post(database, plain, **missing) as post:
        number = post.queue()
        post.deliver()
        assert f"mail.{key}" in post.job(number)["last_error"]


# -- pace, no relay -------------------------------------------------------------------------------


def shift(database: Database, seconds: int) -> None:
    """Move the clock: what lies in the rows is longer ago."""
    c = t.job.c
    earlier = {"ended_at": c.ended_at - seconds, "run_at": c.run_at - seconds}
    database.write(lambda tx: tx.execute(sa.update(t.job).values(earlier)))


def now(database: Database) -> int:
    return int(database.fast(sa.select(jobs.Now()))[0][0])


@pytest.mark.parametrize("share", [0, 1], ids=["no spread", "the whole spread"])
def test_no_more_than_the_bound_go_out_in_a_minute(
    database: Database, plain: TestRelay, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    monkeypatch.setattr(sender.random, "uniform", lambda low, high: low + share * (high - low))
    with Post(database, plain, per_minute=3) as post:
        sent = [post.queue() for _ in range(3)]
        post.deliver()
        assert len(plain.received) == 3
        shift(database, 50)
        waiting = [post.queue() for _ in range(2)]
        post.deliver()
        assert len(plain.received) == 3
        latest = now(database) + 60 - 50 + share * 60 * 1 // 3  # one other waits, three a minute
        earliest = min(post.job(number)["ended_at"] for number in sent) + 60
        for found in map(post.job, waiting):
            assert found["attempts"] == 0
            assert earliest + share * 20 <= found["run_at"] <= latest
        shift(database, 31)
        post.deliver()
    assert len(plain.received) == 5


def test_a_full_queue_goes_out_at_the_pace_and_not_much_slower(
    database: Database, plain: TestRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where the relay sees it, on a clock that only this test moves."""
    chance = random.Random(7)
    monkeypatch.setattr(sender.random, "uniform", chance.uniform)
    waiting = sa.select(sa.func.min(t.job.c.run_at)).where(t.job.c.state == "ready")
    seen: list[int] = []
    clock = 0
    with Post(database, plain, per_minute=4) as post:
        for _ in range(20):
            post.queue()
        while True:
            post.deliver()
            seen += [clock] * (len(plain.received) - len(seen))
            due = database.fast(waiting)[0][0]
            if due is None:
                break
            step = max(1, due - now(database))
            clock += step
            shift(database, step)
            assert clock < 3600, seen
    assert len(seen) == 20
    assert all(later - first >= 58 for first, later in zip(seen, seen[4:], strict=False)), seen
    assert seen[-1] <= 2 * 60 * 20 / 4, seen


def test_without_a_relay_mail_ends_quietly(database: Database) -> None:
    with Post(database, None, relay="") as post:
        number = post.queue()
        post.deliver()
        found = post.job(number)
        assert (found["state"], found["progress"], found["last_error"]) == (
            "done",
            {"note": "no relay"},
            None,
        )
        assert found["arguments"] == {"subject": "Hello"}


# -- what is kept ---------------------------------------------------------------------------------


def test_of_a_sent_message_only_the_subject_stays_in_the_job(database: Database, plain: TestRelay) -> None:
    plain.to_data = ["452 4.3.1 no room"]
    with Post(database, plain) as post:
        words = {"name": "Alice", "subject": "Hello", "text": "Private.\n"}
        number = post.queue(**words)
        post.deliver()
        assert post.job(number)["arguments"] == {"to": "alice@example.org", **words}, "needed again"
        post.hurry()
        post.deliver()
        found = post.job(number)
        assert (found["state"], found["arguments"]) == ("done", {"subject": "Hello"})
        everything = str(database.fast(sa.select(t.job)))
    assert len(plain.received) == 1
    assert "Private" not in everything
    assert "alice" not in everything.casefold()


def test_a_message_that_failed_keeps_what_another_try_needs(database: Database, plain: TestRelay) -> None:
    plain.to_rcpt = ["550 5.1.1 no such person"]
    with Post(database, plain) as post:
        number = post.queue()
        post.deliver()
        assert post.job(number)["state"] == "failed"
        database.write(lambda tx: jobs.retry(tx, number))
        post.deliver()
        assert post.job(number)["state"] == "done"
    assert plain.received[0].to == ["alice@example.org"]
