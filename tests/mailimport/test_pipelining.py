"""What is asked before the last answer came: nothing is mixed up, and nothing is asked in vain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import pytest

from conformance.imap_server import MODERN, No, Rule, Server
from ksync_server import settings
from ksync_server.errors import BadRequest, Temporary
from ksync_server.mailimport import servers
from ksync_server.mailimport.connection import Connection
from ksync_server.mailimport.imap_sink import ImapSink
from ksync_server.mailimport.listening import Listener, Whole
from ksync_server.store.database import Database
from ksync_server.wire.imap import Fetched
from tests.mailimport.harness import contents, exact, moving


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.writes: list[bytes] = []

    def writelines(self, data: list[bytes]) -> None:
        self.writes.append(b"".join(data))
        self.written += self.writes[-1]

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class Heard(Listener):
    def __init__(self) -> None:
        self.said: list[Fetched | int] = []

    def fetched(self, each: Fetched) -> None:
        self.said.append(each)

    def expunged(self, number: int) -> None:
        self.said.append(number)


def talk(conversation: Callable[[Connection, Wire], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        made = Connection(servers.Server("mail.example.org", 143, "alice"), settings.MailImport())
        made.capabilities = frozenset({"LITERAL+", "UIDPLUS"})
        wire = Wire()
        made.connection_made(cast(asyncio.Transport, wire))
        await conversation(made, wire)
        made.abort()

    asyncio.run(run())


@pytest.mark.spec("RFC 3501 §5.5")
def test_what_is_said_of_messages_is_for_who_asked_about_messages() -> None:
    async def conversation(made: Connection, wire: Wire) -> None:
        append = await made.send("APPEND", b"INBOX", b"x")
        heard = Heard()
        fetch = await made.send("UID FETCH", "7", "(UID FLAGS)", listener=heard)
        made.data_received(b"* 3 FETCH (UID 7 FLAGS (\\Seen))\r\n* 3 EXPUNGE\r\nk2 OK\r\nk1 OK\r\n")
        await made.answer(fetch)
        assert heard.said == [Fetched(3, 7, ("\\Seen",)), 3]
        assert not (await made.answer(append)).data

    talk(conversation)


@pytest.mark.spec("RFC 3501 §5.5")
def test_data_that_come_before_an_earlier_answer_are_for_who_asked() -> None:
    async def conversation(made: Connection, wire: Wire) -> None:
        append = await made.send("APPEND", b"INBOX", b"x")
        status = await made.send("STATUS", b"INBOX", "(UIDNEXT)")
        made.data_received(
            b"* STATUS INBOX (UIDNEXT 5)\r\n* OK [UIDNEXT 9] x\r\n* 5 EXISTS\r\nk1 OK\r\nk2 OK\r\n"
        )
        assert [each.name for each in (await made.answer(status)).data] == ["STATUS"]
        assert not (await made.answer(append)).data

    talk(conversation)


@pytest.mark.spec("RFC 3501 §5.5")
def test_a_folder_is_asked_one_thing_at_a_time() -> None:
    async def conversation(made: Connection, wire: Wire) -> None:
        sink = ImapSink(made)
        look = asyncio.create_task(sink.look("A", ["1"]))
        digests = asyncio.create_task(sink.digests("A", ["2"]))
        for answer in (
            b"k1 OK\r\n",
            b'* 1 FETCH (UID 1 FLAGS () RFC822.SIZE 3 INTERNALDATE "17-Jul-1996 02:44:25 -0700")\r\n',
        ):
            await asyncio.sleep(0.01)
            made.data_received(answer)
        await asyncio.sleep(0.01)
        assert [each.split(b" ", 1)[1][:9] for each in wire.writes] == [b'SELECT "A', b"UID FETCH"]
        made.data_received(b"k2 OK\r\n")
        await asyncio.sleep(0.01)
        made.data_received(b"* 2 FETCH (UID 2 BODY[] {1}\r\nx)\r\nk3 OK\r\n")
        assert (list(await look), await digests) == (["1"], {"2": sha256(b"x").digest()})

    talk(conversation)


@pytest.mark.spec("RFC 3501 §5.5")
def test_the_state_of_several_folders_may_come_in_any_order() -> None:
    async def conversation(made: Connection, wire: Wire) -> None:
        asked = asyncio.create_task(ImapSink(made).validities(["A", "B", "INBOX"]))
        await asyncio.sleep(0.01)
        made.data_received(b"* STATUS B (UIDVALIDITY 2)\r\n* STATUS A (UIDVALIDITY 1)\r\nk2 OK\r\nk1 OK\r\n")
        made.data_received(b"* STATUS Inbox (UIDVALIDITY 3)\r\nk3 OK\r\n")
        assert await asked == {"A": 1, "B": 2, "INBOX": 3}

    talk(conversation)


def test_a_command_is_one_write() -> None:
    async def conversation(made: Connection, wire: Wire) -> None:
        await made.send("APPEND", b"INBOX", "(a)", b"\xe9")
        await made.send("NOOP")
        assert wire.writes == [b'k1 APPEND "INBOX" (a) {1+}\r\n\xe9\r\n', b"k2 NOOP\r\n"]

    talk(conversation)


@pytest.mark.spec("RFC 3501 §7.4.2")
def test_what_is_said_in_parts_is_put_together() -> None:
    async def conversation(made: Connection, wire: Wire) -> None:
        found: list[tuple[int, int, tuple[str, ...]]] = []
        heard = Whole(lambda uid, size, received, flags, others: found.append((uid, size, flags)), ["X"])
        fetch = await made.send("UID FETCH", "1:9", "(UID FLAGS INTERNALDATE RFC822.SIZE X)", listener=heard)
        made.data_received(
            b"* 3 FETCH (UID 7 FLAGS (a) RFC822.SIZE 5)\r\n* 4 FETCH (UID 8 RFC822.SIZE 6 FLAGS ())\r\n"
            b'* 2 EXPUNGE\r\n* 2 FETCH (INTERNALDATE "17-Jul-1996 02:44:25 -0700" FLAGS (b))\r\n'
            b'* 3 FETCH (X 1 INTERNALDATE "17-Jul-1996 02:44:25 -0700")\r\n* 2 FETCH (X 1)\r\n'
            b"* 3 FETCH (FLAGS (c))\r\nk1 OK\r\n"
        )
        await made.answer(fetch)
        assert found == [(8, 6, ()), (7, 5, ("b",))]

    talk(conversation)


def test_what_a_listener_raises_ends_the_connection_and_is_told_to_who_asked() -> None:
    class Deaf(Listener):
        def fetched(self, each: Fetched) -> None:
            raise BadRequest("no")

    async def conversation(made: Connection, wire: Wire) -> None:
        noop = await made.send("NOOP")
        fetch = await made.send("UID FETCH", "7", "(UID)", listener=Deaf())
        made.data_received(b"* 3 FETCH (UID 7)\r\n* 4 FETCH (UID 8)\r\nk1 OK\r\nk2 OK\r\n")
        with pytest.raises(BadRequest):
            await made.answer(fetch)
        with pytest.raises(Temporary):
            await made.answer(noop)
        assert not made.is_open

    talk(conversation)


@pytest.mark.spec("RFC 3501 §7.5")
def test_the_answer_to_one_command_lets_no_other_send_its_literal() -> None:
    async def conversation(made: Connection, wire: Wire) -> None:
        made.capabilities = frozenset()
        first = await made.send("NOOP")
        second = asyncio.create_task(made.send("LOGIN", b"\xe9", b"secret"))
        await asyncio.sleep(0)
        made.data_received(b"k1 OK\r\n")
        await asyncio.sleep(0)
        assert first.answered.done()
        assert wire.written.endswith(b"{1}\r\n")
        made.data_received(b"+ go on\r\n")
        await second
        assert wire.written.endswith(b'\xe9 "secret"\r\n')

    talk(conversation)


def test_no_command_is_written_into_the_literal_of_another() -> None:
    async def conversation(made: Connection, wire: Wire) -> None:
        made.capabilities = frozenset()
        first = asyncio.create_task(made.send("LOGIN", b"\xe9", b"secret"))
        await asyncio.sleep(0)
        second = asyncio.create_task(made.send("NOOP"))
        await asyncio.sleep(0)
        assert b"NOOP" not in wire.written
        made.data_received(b"+ go on\r\n")
        await first
        await second
        assert wire.written.endswith(b'\xe9 "secret"\r\nk2 NOOP\r\n')

    talk(conversation)


def test_a_command_that_is_cut_in_its_literal_ends_the_connection() -> None:
    async def conversation(made: Connection, wire: Wire) -> None:
        made.capabilities = frozenset()
        cut = asyncio.create_task(made.send("LOGIN", b"\xe9", b"secret"))
        await asyncio.sleep(0)
        cut.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cut
        assert not made.is_open

    talk(conversation)


@pytest.mark.parametrize("gone", [(), ("MULTIAPPEND",), ("MULTIAPPEND", "LITERAL+"), ("UIDPLUS",)])
def test_the_next_message_is_sent_before_the_last_one_is_answered(
    lite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: tuple[str, ...]
) -> None:
    under_way, most, append = 0, 0, ImapSink._append

    async def counted(sink: ImapSink, *arguments: Any, **more: Any) -> list[str]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await append(sink, *arguments, **more)
        finally:
            under_way -= 1

    monkeypatch.setattr(ImapSink, "_append", counted)
    source, target = Server(), Server(features=MODERN - set(gone))
    for number in range(60):
        source.account.add("INBOX", b"Subject: %d\r\n\r\n" % number + b"x" * 20_000)
    with moving(lite, tmp_path, source, target, window_bytes=400_000) as move:
        exact(move.go(), 60)
    assert contents(target.account) == contents(source.account)
    assert [each.body[:12] for each in target.folders["INBOX"].messages] == [
        each.body[:12] for each in source.folders["INBOX"].messages
    ]
    assert not target.violations
    assert most == 1 if "UIDPLUS" in gone else most > 1


def test_bodies_for_a_folder_that_cannot_be_made_are_not_fetched_on(lite: Database, tmp_path: Path) -> None:
    source, target = Server(), Server(rules=[Rule(No("not this one"), "CREATE", times=None)])
    source.account.add("Forbidden", b"Subject: first\r\n\r\n")
    for number in range(100):
        source.account.add("Forbidden", b"Subject: %d\r\n\r\n" % number + b"x" * 50_000)
    source.account.add("INBOX", b"Subject: other\r\n\r\n")
    with moving(lite, tmp_path, source, target, window_bytes=400_000) as move:
        report = move.go()
    assert (report["copied"], report["found"]) == (1, 102)
    assert "101 messages have no place" in report["differences"][0]
    assert source.statistics.body_bytes < 1_000_000
