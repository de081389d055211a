"""What a hostile server can make us hold, and for how long: little, and not for ever."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import tracemalloc
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from conformance.imap_server import Fault, Pour, Rule, Server, Stall
from ksync_server import settings
from ksync_server.mailimport import reading
from ksync_server.mailimport.connection import Connection
from ksync_server.mailimport.listening import Whole
from ksync_server.mailimport.sinks import Message
from ksync_server.mailimport.source import Bodies, Source
from ksync_server.store.database import Database
from tests.mailimport.harness import exact, moving
from tests.mailimport.test_cases import BODY
from tests.mailimport.test_pipelining import Wire, talk

MIB = 1 << 20


def held(feed: Callable[[Connection], Coroutine[Any, Any, object]]) -> int:
    """Bytes in memory at the end."""
    found = 0

    async def conversation(made: Connection, wire: Wire) -> None:
        nonlocal found
        tracemalloc.start()
        kept = await feed(made)
        found = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        del kept

    talk(conversation)
    return found


def message(uid: int, size: int = 10) -> Message:
    return Message(uid, size, datetime(2020, 1, 1, tzinfo=UTC), ())


@pytest.mark.parametrize("same", [True, False])
def test_parts_of_what_is_said_of_messages_are_not_held_without_bound(same: bool) -> None:
    async def feed(made: Connection) -> object:
        listener = Whole(lambda *_: None)
        await made.send("UID FETCH", "1:9", "(UID)", listener=listener)
        for number in range(1, 100):
            made.data_received(
                b'* %d FETCH (X%d "%s")\r\n' % (1 if same else number, number, b"x" * 1_000_000)
            )
        return listener

    assert held(feed) < 32 * MIB


def test_flags_of_messages_are_not_held_without_bound() -> None:
    async def feed(made: Connection) -> object:
        source = Source(made, settings.MailImport())
        scan = asyncio.create_task(source.scan(1, 5000))
        await asyncio.sleep(0)
        rest = b'INTERNALDATE "17-Jul-1996 02:44:25 -0700" RFC822.SIZE 5'
        for uid in range(1, 100):
            made.data_received(b"* %d FETCH (UID %d %s FLAGS (%s))\r\n" % (uid, uid, rest, b"x" * 1_000_000))
            if not made.is_open:
                break
        with contextlib.suppress(Exception):
            made.data_received(b"k1 OK\r\n")
            return await scan
        return None

    assert held(feed) < 32 * MIB


def bodies(made: Connection) -> Bodies:
    return Bodies(Source(made, settings.MailImport()), settings.MailImport())


def test_bodies_in_quotes_count_as_others_do() -> None:
    async def feed(made: Connection) -> object:
        listener = bodies(made)
        await listener.ask([message(uid) for uid in range(1, 201)])
        for uid in range(1, 100):
            made.data_received(b'* %d FETCH (UID %d BODY[] "%s")\r\n' % (uid, uid, b"x" * 1_000_000))
        return listener

    assert held(feed) < 32 * MIB


def test_a_short_body_holds_nothing_of_what_came_beside_it() -> None:
    async def feed(made: Connection) -> object:
        listener = bodies(made)
        await listener.ask([message(uid) for uid in range(1, 201)])
        for uid in range(1, 201):
            body = b"* %d FETCH (UID %d BODY[] {10}\r\n0123456789)\r\n" % (uid, uid)
            made.data_received(body + b"* OK %s\r\n" % (b"x" * 250_000))
        return listener

    assert held(feed) < 32 * MIB


def test_a_body_in_many_pieces_is_not_many_times_its_size() -> None:
    async def feed(made: Connection) -> object:
        listener = bodies(made)
        await listener.ask([message(1, 1_000_000)])
        made.data_received(b"* 1 FETCH (UID 1 BODY[] {1000000}\r\n")
        for _ in range(500_000):
            made.data_received(b"xy")
        return listener

    assert held(feed) < 32 * MIB


def test_what_is_longer_than_it_was_said_to_be_waits_in_the_window_with_its_length(
    lite: Database, tmp_path: Path
) -> None:
    """A destination that is slow meanwhile; with 5,000 messages it would be as many GB."""
    source, target = Server(), Server(rules=[Rule(Stall(4), "APPEND", nth=6)])
    body = b"Subject: x\r\n\r\n" + b"x" * 1_000_000
    for _ in range(160):
        source.account.add("INBOX", body, fault=Fault(claimed_bytes=10))
    most = 0
    run = reading.Reader._ask

    async def watched(reader: reading.Reader, *arguments: Any) -> None:
        nonlocal most
        await run(reader, *arguments)
        most = max(most, reader._ledger.fetched_bytes - reader._ledger.counters.copied_bytes)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading.Reader, "_ask", watched)
        patched.setattr(reading, "_BATCH", 4)
        with moving(lite, tmp_path, source, target, window_bytes=4 << 20) as move:
            exact(move.go(), 160)
    assert most < 32 * MIB


@pytest.mark.parametrize("said", [b"* 7 PLUGH", b"* OK x", b"* 1 FETCH (UID 1)", b"* 1 EXPUNGE", b"+ x"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_nobody_asked_for_without_end_is_an_end(lite: Database, tmp_path: Path, said: bytes) -> None:
    source, target = Server(), Server()
    source.account.add("INBOX", BODY % (1, 1))
    source.rules = [Rule(Pour(b"", (said + b"\r\n") * 5000, None), "LIST")]
    with moving(lite, tmp_path, source, target) as move:
        worker = threading.Thread(target=move.go, daemon=True)
        worker.start()
        worker.join(20)
        hangs = worker.is_alive()
        source.stop()
        worker.join(30)
    assert not hangs


def test_a_message_that_came_before_a_flood_is_not_refused_too(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server()
    source.account.add("INBOX", BODY % (1, 1))
    flood = b"* 9 FETCH (UID 999 BODY[] {100000}\r\n" + b"x" * 100_000 + b")\r\n"
    source.rules = [Rule(Pour(b"", flood, 20), "UID FETCH", nth=2, when="end")]
    sizes = {"window_bytes": 400_000, "whole_bytes": 100_000}
    with moving(lite, tmp_path, source, target, **sizes) as move:
        report = move.go()
        assert (move.state, report["copied"], report["refused"]) == ("done", 1, 0), report["problem"]
