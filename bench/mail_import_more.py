"""The importer beyond its speed: a slow server, Gmail's bytes, memory, twenty kills, and a hundred accounts at once.

Bars: with 20 ms before each command 750 messages in folders >= 10 times mbsync's speed; Gmail by message <= 1.1
times the unique bytes, every body once; four accounts at once <= 96 MB resident; a message of 60 MB adds <= 8 MB;
20 SIGKILLs in 5,000 messages lose, double and alter nothing and cost <= 5 % of the bytes; of 100 accounts none
waits longer than twice the mean. imapsync is in no package registry and is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bench.measure import proportional_bytes, verdict
from conformance import dovecot, mail_corpus, mailboxes, mbsync
from conformance.dovecot import PASSWORD, Dovecot
from conformance.imap_server import Account, Server, serving
from conformance.import_worker import Office, office
from conformance.servers import REPOSITORY, demo
from conformance.tap import tapped
from ksync_server import settings
from ksync_server.auth import keys
from ksync_server.mailimport import passes
from ksync_server.store import tables as t
from ksync_server.store.database import Database
from tests.mailimport.harness import Desk, desk

_SOURCE = "source@example.org"
_DELAY_MS = 20
_COPIES = 750  # of Gmail's 300 messages, as its folders show them
_LONG_BYTES = 60_000_000
_ACCOUNTS = 100
_HOLDERS = sa.select(t.job.c.worker).where(t.job.c.kind == passes.KIND, t.job.c.state == "running")


def main(count: int = 5000) -> bool:
    """Kills and memory with `count` messages."""
    with tempfile.TemporaryDirectory(prefix="ksync-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        with (
            dovecot.serving(folder / "there", idle=2) as there,
            dovecot.serving(folder / "here", idle=4) as here,
        ):
            size = mailboxes.fill(there.port, _SOURCE, PASSWORD, mail_corpus.generate(count))
            print(f"{count} messages, {size / 1e6:.0f} MB")
            return all(
                [
                    _distant(folder / "distant", here),
                    _gmail(folder / "gmail", here),
                    _memory(folder / "memory", there, here),
                    _memory_of_server(folder / "server", there, here),
                    _long_message(folder / "long", here),
                    _kills(folder / "kills", there, here, count, size),
                    _fairness(folder / "fairness"),
                ]
            )


@contextlib.contextmanager
def _office(folder: Path, **more: Any) -> Iterator[Office]:
    with office(f"sqlite:///{folder / 'ksync.db'}", folder, **more) as running:
        yield running


def _finish(running: Office, *numbers: int, within_s: float = 120) -> None:
    running.finish(list(numbers), within_s=within_s)
    for number in numbers:
        imported = running.desk.imported(number)
        assert imported.state == "done", imported.report


# -- Gmail, near and far ------------------------------------------------------------------------------


@contextlib.contextmanager
def _gmail_server(*options: str) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """Gmail as a process of its own: its port, and what ends it and says what it counted."""
    process = subprocess.Popen(
        [sys.executable, "-m", "conformance.imap_server", "--gmail", "--stats", *options],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
    )

    def counted() -> dict[str, Any]:
        process.send_signal(signal.SIGTERM)
        said: dict[str, Any] = json.loads(process.communicate(timeout=30)[0])
        return said

    try:
        assert process.stdout
        yield int(process.stdout.readline()), counted
    finally:
        process.kill()
        process.communicate()


def _distant(folder: Path, here: Dovecot, rounds: int = 3) -> bool:
    """Every folder as it is shown, from a server that takes its time before each command, and from one that does not."""
    near, ours, peers = [], [], []
    with (
        _gmail_server() as (near_port, _),
        _gmail_server("--delay-ms", str(_DELAY_MS)) as (port, _),
        _office(folder) as running,
    ):
        for number in range(rounds):
            near.append(_by_folder(running, near_port, here, f"near{number}@example.org"))
            ours.append(_by_folder(running, port, here, f"distant{number}@example.org"))
            peers.append(_mbsync(folder, port, here, f"mbsync{number}@example.org"))
    middle = [statistics.median(each) for each in (near, ours, peers)]
    print(
        f"{_DELAY_MS} ms before each command, {_COPIES} messages:"
        f" ours {middle[1]:.2f} s ({middle[0]:.2f} s without the delay), mbsync {middle[2]:.2f} s"
    )
    return all(
        [
            verdict("times mbsync's speed at 20 ms a command", middle[2] / middle[1], 10, at_least=True),
            verdict("seconds that the delay costs", middle[1] - middle[0], 1.5, at_least=False),
        ]
    )


def _by_folder(running: Office, port: int, here: Dovecot, user: str) -> float:
    began = time.monotonic()
    ordered = running.desk.order(
        port, here.port, target_secret=PASSWORD, target_user=user, options={"gmail": "folder"}
    )
    _finish(running, ordered)
    seconds = time.monotonic() - began
    arrived = mailboxes.content(here.port, user, PASSWORD).total()
    assert arrived == _COPIES, arrived
    return seconds


def _mbsync(folder: Path, port: int, here: Dovecot, user: str) -> float:
    began = time.monotonic()
    far = mbsync.imap("far", port, "alice@example.org", "secret")
    mbsync.pull(folder / "mbsync", far, mbsync.imap("near", here.port, user, PASSWORD))
    seconds = time.monotonic() - began
    arrived = mailboxes.content(here.port, user, PASSWORD).total()
    assert arrived == _COPIES, arrived
    return seconds


def _gmail(folder: Path, here: Dovecot) -> bool:
    """By message: what the source sends, against the bytes of its 300 different messages."""
    with _gmail_server() as (port, counted), _office(folder) as running:
        ordered = running.desk.order(port, here.port, target_secret=PASSWORD, target_user="gmail@example.org")
        _finish(running, ordered)
        said = counted()
    fetches = said["body_fetches"]
    print(
        f"Gmail by message: {len(fetches)} bodies, {said['body_bytes'] / 1e6:.2f} MB of them,"
        f" {said['bytes_sent'] / 1e6:.2f} MB in all"
    )
    good = len(fetches) == 300 and not said["violations"]
    return all(
        [
            good,
            verdict("most fetches of one body", max(fetches.values()), 1, at_least=False),
            verdict(
                "bytes from Gmail / unique", said["bytes_sent"] / said["body_bytes"], 1.1, at_least=False
            ),
        ]
    )


# -- memory -------------------------------------------------------------------------------------------


def _four(ordered: Desk, there: Dovecot, here: Dovecot, name: str) -> list[int]:
    """Order four imports of the large mailbox."""
    secrets = {"source_secret": PASSWORD, "target_secret": PASSWORD}
    return [
        ordered.order(
            there.port,
            here.port,
            source={"user": _SOURCE},
            target_user=f"{name}{number}@example.org",
            **secrets,
        )
        for number in range(4)
    ]


def _memory(folder: Path, there: Dovecot, here: Dovecot) -> bool:
    """Four mailboxes at the same time in one process."""
    with _office(folder, how="stay") as running:
        idle = running.memory()
        numbers = _four(running.desk, there, here, "memory")
        _finish(running, *numbers)
        most = running.memory("VmHWM")
    print(f"memory: {idle / 1e6:.1f} MB before the first import, {most / 1e6:.1f} MB with four at once")
    return verdict("MB resident with four accounts at once", most / 1e6, 96, at_least=False)


def _memory_of_server(folder: Path, there: Dovecot, here: Dovecot) -> bool:
    """The same in a server that runs: what its job worker has for itself, and its share of what all workers have."""
    plain = ["mail_import.plain=true", 'outbound.private_networks=["127.0.0.0/8"]']
    with demo(folder / "demo", settings=plain) as running:
        database = Database(settings.Database(url=f"sqlite:///{running.data / 'ksync.db'}"))
        ordered = dataclasses.replace(desk(database, folder), keys=keys.load(running.data / "keys.toml"))
        numbers = _four(ordered, there, here, "server")
        most, until = 0, time.monotonic() + 120
        while (states := {ordered.imported(number).state for number in numbers}) != {"done"}:
            assert time.monotonic() < until, states
            with database.read() as tx:
                holders = {str(holder) for (holder,) in tx.execute(_HOLDERS)}
            for holder in holders:
                most = max(most, proportional_bytes(int(holder.rpartition("/")[2])))
            time.sleep(0.02)
        database.close()
    return verdict(
        "MB of the server's job worker (PSS), four accounts at once", most / 1e6, 96, at_least=False
    )


def _long_message(folder: Path, here: Dovecot) -> bool:
    """One message of 60 MB after one of 1 KB."""
    body = mail_corpus.edge_messages(large_bytes=_LONG_BYTES)["large"]
    account = Account()
    account.add("INBOX", body[:1000])
    with serving(Server(account)) as port, _office(folder, how="stay") as running:
        short = running.desk.order(port, here.port, target_secret=PASSWORD, target_user="short@example.org")
        _finish(running, short)
        account.add("INBOX", body)
        running.forget_peak()
        before = running.memory()
        long = running.desk.order(port, here.port, target_secret=PASSWORD, target_user="long@example.org")
        _finish(running, long)
        added = running.memory("VmHWM") - before
    arrived = mailboxes.content(here.port, "long@example.org", PASSWORD)
    assert arrived.total() == 2, arrived
    return verdict("MB more for a message of 60 MB", added / 1e6, 8, at_least=False)


# -- crashes and crowds -------------------------------------------------------------------------------


def _kills(folder: Path, there: Dovecot, here: Dovecot, count: int, size: int, kills: int = 20) -> bool:
    """SIGKILLs at random moments of one import."""
    user = "killed@example.org"
    with tapped(there.port) as tap, _office(folder) as running:
        number = running.desk.order(
            tap.port,
            here.port,
            source={"user": _SOURCE},
            source_secret=PASSWORD,
            target_secret=PASSWORD,
            target_user=user,
        )
        given = running.finish_killed(number, kills=kills, messages=count, seed=None, within_s=170)
        assert running.desk.imported(number).state == "done", running.desk.imported(number).report
        again = tap.sent_bytes / size - 1
    there_now = mailboxes.content(there.port, _SOURCE, PASSWORD)
    here_now = mailboxes.content(here.port, user, PASSWORD)
    lost, surplus = (there_now - here_now).total(), (here_now - there_now).total()
    print(f"{given} of {kills} kills; {lost} lost or altered, {surplus} doubled or altered")
    return all(
        [
            given == kills and not lost and not surplus,
            verdict("share of the bytes fetched again", again, 0.05, at_least=False),
        ]
    )


def _fairness(folder: Path) -> bool:
    """A hundred small accounts of one server, ordered at once, with the default four threads."""
    accounts = [Account(f"user{number}@example.org") for number in range(_ACCOUNTS)]
    for number, account in enumerate(accounts):
        mail_corpus.fill(account, mail_corpus.generate(20, seed=number))
    with serving(Server(*accounts)) as port, _office(folder) as running:
        began = time.monotonic()
        numbers = [
            running.desk.order(port, folder / "mail" / account.user, source={"user": account.user})
            for account in accounts
        ]
        ended = running.finish(numbers, within_s=170)
        for number in numbers:
            assert running.desk.imported(number).state == "done", running.desk.imported(number).report
    waits = [at - began for at in ended.values()]
    mean, longest = statistics.mean(waits), max(waits)
    print(f"{_ACCOUNTS} accounts: {mean:.1f} s on average until one is done, {longest:.1f} s at most")
    return verdict("longest wait / mean", longest / mean, 2, at_least=False)
