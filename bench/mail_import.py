"""A mailbox from Dovecot to Dovecot: ours, mbsync and a raw fetch taking turns; then a second pass without news.

5,000 messages, 234 MB, 20 folders. Bars: >= 1.5 times mbsync's messages per second, checkpoints and proof
included; CPU of client and both servers together <= 0.7 times mbsync's; >= 30 % of the raw fetch; a second pass
<= 0.5 s and <= 60 commands; an independent comparison finds no difference. imapsync is in no package registry
and is left out; notes/mail_import.md says how far it was behind mbsync where it was measured.
"""

from __future__ import annotations

import gc
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.measure import verdict
from conformance import dovecot, mail_corpus, mailboxes, mbsync
from conformance.dovecot import PASSWORD, Dovecot
from conformance.imap_server import syntax
from ksync_server import settings
from ksync_server.store import schema
from ksync_server.store.database import Database
from ksync_server.worker import tune_memory
from tests.mailimport.harness import Desk, desk

_SOURCE = "source@example.org"


def main(count: int = 5000, rounds: int = 3) -> bool:
    """`count` messages, `rounds` times."""
    with tempfile.TemporaryDirectory(prefix="ksync-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        with (
            dovecot.serving(folder / "there", idle=2) as there,
            dovecot.serving(folder / "here", idle=2) as here,
        ):
            size = mailboxes.fill(there.port, _SOURCE, PASSWORD, mail_corpus.generate(count))
            expected = mailboxes.content(there.port, _SOURCE, PASSWORD)
            print(f"{count} messages, {size / 1e6:.0f} MB, {len({key[0] for key in expected})} folders")
            return _rounds(folder, there, here, count, rounds, expected)


def _rounds(
    folder: Path, there: Dovecot, here: Dovecot, count: int, rounds: int, expected: mailboxes.Found
) -> bool:
    database = Database(settings.Database(url=f"sqlite:///{folder / 'ksync.db'}"))
    schema.migrate(database)
    ordered = desk(database, folder)
    tools: dict[str, Callable[[str], None]] = {
        "raw fetch": lambda user: _raw_fetch(there),
        "ours": lambda user: _ours(ordered, there, here, user),
        "mbsync": lambda user: _mbsync(folder, there, here, user),
    }
    wall: dict[str, list[float]] = {tool: [] for tool in tools}
    cpu: dict[str, list[float]] = {tool: [] for tool in tools}
    exact = True
    tune_memory()  # as in every process of the server, and the same for what was imported
    gc.collect()
    gc.freeze()
    print(f"{'round':<6}{'tool':<12}{'messages/s':>11}{'client CPU':>12}{'server CPU':>12}{'together':>10}")
    for number in range(rounds):
        for tool, run in tools.items():
            user = f"{tool.replace(' ', '')}{number}@example.org"
            before = (time.monotonic(), _own_cpu_s(), there.cpu_s() + here.cpu_s())
            run(user)
            after = (time.monotonic(), _own_cpu_s(), there.cpu_s() + here.cpu_s())
            seconds, client, server = (new - old for new, old in zip(after, before, strict=True))
            wall[tool].append(seconds)
            cpu[tool].append(client + server)
            print(
                f"{number:<6}{tool:<12}{count / seconds:>11,.0f}{client:>12.2f}{server:>12.2f}{client + server:>10.2f}"
            )
            if tool == "ours":
                arrived = mailboxes.content(here.port, user, PASSWORD)
                differences = (expected - arrived).total() + (arrived - expected).total()
                exact &= differences == 0
                print(f"      compared: {differences} differences")
                exact &= _second_pass(ordered, there, here)
    medians = {tool: statistics.median(seconds) for tool, seconds in wall.items()}
    together = {tool: statistics.median(seconds) for tool, seconds in cpu.items()}
    faster = medians["mbsync"] / medians["ours"]
    share = together["ours"] / together["mbsync"]
    floor = medians["raw fetch"] / medians["ours"]
    print(f"median: {faster:.2f} times mbsync's speed, {share:.2f} of its CPU, {floor:.0%} of a raw fetch")
    database.close()
    return all(
        [
            exact,
            verdict("times mbsync's speed", faster, 1.5, at_least=True),
            verdict("share of mbsync's CPU", share, 0.7, at_least=False),
            verdict("share of a raw fetch's speed", floor, 0.3, at_least=True),
        ]
    )


def _own_cpu_s() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


# -- the tools --------------------------------------------------------------------------------------


def _ours(ordered: Desk, there: Dovecot, here: Dovecot, user: str) -> None:
    number = ordered.order(
        there.port,
        here.port,
        source={"user": _SOURCE},
        target_user=user,
        source_secret=PASSWORD,
        target_secret=PASSWORD,
    )
    ordered.work(hurry=False)
    state = ordered.imported(number).state
    assert state == "done", ordered.imported(number).report


def _second_pass(ordered: Desk, there: Dovecot, here: Dovecot) -> bool:
    """The newest import once more."""
    number = ordered.newest()
    began = time.monotonic()
    ordered.order(there.port, here.port, again=number, source_secret=PASSWORD, target_secret=PASSWORD)
    ordered.work(hurry=False)
    seconds = time.monotonic() - began
    report = ordered.imported(number).report or {}
    commands = report["commands"]
    good = seconds <= 0.5 and commands <= 60 and report["copied"] == 0
    print(f"      second pass: {seconds:.3f} s, {commands} commands (<= 0.5 s, <= 60)")
    return good


def _mbsync(folder: Path, there: Dovecot, here: Dovecot, user: str) -> None:
    far = mbsync.imap("far", there.port, _SOURCE, PASSWORD)
    mbsync.pull(folder / "mbsync", far, mbsync.imap("near", here.port, user, PASSWORD))


def _raw_fetch(server: Dovecot) -> None:
    """The least a client can do: read what the server sends and look at nothing."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        buffer = bytearray(1 << 18)

        def until(mark: bytes) -> bytes:
            tail = b""
            while mark not in tail:
                size = connection.recv_into(buffer)
                assert size
                tail = tail[-100:] + bytes(buffer[max(0, size - 2000) : size])
                assert b" NO " not in tail[-100:], tail
            return tail

        def ask(tag: bytes, command: bytes) -> None:
            connection.sendall(tag + b" " + command + b"\r\n")
            until(tag + b" OK")

        until(b"* OK")
        ask(b"zqa", b"LOGIN %s %s" % (_SOURCE.encode(), PASSWORD.encode()))
        for number, name in enumerate(mail_corpus.FOLDERS):
            wire = syntax.to_utf7("/".join(name))
            ask(b"zqs%d" % number, b'EXAMINE "%s"' % wire)
            ask(b"zqf%d" % number, b"UID FETCH 1:* (UID FLAGS INTERNALDATE BODY.PEEK[])")
