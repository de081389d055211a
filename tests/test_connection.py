"""One connection, seen from a raw socket: framing, limits in size and time, ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from ksync_server.connection import Connection, Limits
from ksync_server.errors import ClientGone
from ksync_server.worker import protocol_config

spec = pytest.mark.spec
LIMITS = Limits(header_bytes=4096, header_timeout_s=0.5, idle_timeout_s=0.5, body_timeout_s=0.5)
PATIENT = Limits(header_bytes=4096, header_timeout_s=20, idle_timeout_s=20, body_timeout_s=20)


@dataclass
class Echo:
    """An application that answers with what it got, and remembers how each request ended."""

    seen: list[tuple[str, str]] = field(default_factory=list)  # target, outcome
    changed: threading.Condition = field(default_factory=threading.Condition)

    def note(self, path: str, outcome: str) -> None:
        with self.changed:
            self.seen.append((path, outcome))
            self.changed.notify_all()

    def wait(self, entry: tuple[str, str]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: entry in self.seen, 10), self.seen

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        try:
            if path == "/refuse":
                await self.answer(send, 413, b"no")
            elif path == "/endless":
                await self.stream(send, 10_000)
            elif path == "/stream":
                await self.stream(send, 3)
            elif path == "/early":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"early", "more_body": True})
                while (await receive())["more_body"]:
                    pass
                await send({"type": "http.response.body", "body": b""})
            else:
                await self.echo(scope, receive, send)
        except ClientGone:
            self.note(path, "gone")
        else:
            self.note(path, "answered")

    async def echo(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message["body"]
            if not message["more_body"]:
                break
        host = dict(scope["headers"]).get(b"host", b"")
        line = b"%b %b %b " % (scope["method"].encode(), scope["raw_path"], host)
        await self.answer(send, 200, line + body)

    async def answer(self, send: Any, status: int, body: bytes) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def stream(self, send: Any, pieces: int) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(pieces):
            await send({"type": "http.response.body", "body": b"p" * 65536, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Running:
    """A listening event loop in a thread."""

    def __init__(self, limits: Limits) -> None:
        self.app = Echo()
        self.state = ServerState()
        self.port = 0
        self._limits = limits
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self.loop: Any = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._started.wait()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        config = protocol_config(self.app)
        server = await self.loop.create_server(
            lambda: Connection(config, self.state, self._limits, lambda: None), "127.0.0.1", 0
        )
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        while not self._stop.is_set():
            for connection in list(self.state.connections):
                connection.sweep(self.loop.time())  # type: ignore[union-attr]
            try:
                await asyncio.wait_for(self._stop.wait(), 0.02)
            except TimeoutError:
                continue
        server.close()
        for connection in list(self.state.connections):
            connection.transport.abort()

    def call(self, fn: Callable[[], None]) -> None:
        self.loop.call_soon_threadsafe(fn)

    def close(self) -> None:
        self.call(self._stop.set)
        self._thread.join()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def exchange(self, *parts: bytes) -> bytes:
        """Send parts, then read until the server closes, which it may do before it has everything."""
        with self.connect() as connection:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                for part in parts:
                    connection.sendall(part)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while True:
        try:
            piece = connection.recv(65536)
        except ConnectionResetError:
            return received
        if not piece:
            return received
        received += piece


def get(path: str, *fields: str, version: str = "1.1", method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: example.org", *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1")


CLOSE = "Connection: close"
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    """A server whose time-outs are half a second."""
    running = Running(LIMITS)
    yield running
    running.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = Running(PATIENT)
    yield running
    running.close()


# -- time -----------------------------------------------------------------------------------------


def test_a_head_that_never_ends_is_answered_408(hasty: Running) -> None:
    assert hasty.exchange(b"GET / HTTP/1.1\r\nHost: exam").startswith(b"HTTP/1.1 408 ")


def test_a_connection_without_a_request_is_closed(hasty: Running) -> None:
    assert hasty.exchange() == b""


def test_an_idle_connection_is_closed_after_its_answer(hasty: Running) -> None:
    assert hasty.exchange(get("/")).count(b"HTTP/1.1 200 ") == 1


def test_a_body_that_stalls_is_answered_408_and_the_application_told(hasty: Running) -> None:
    answer = hasty.exchange(get("/stalled", "Content-Length: 10", method="PUT") + b"12345")
    assert answer.startswith(b"HTTP/1.1 408 ")
    hasty.app.wait(("/stalled", "gone"))


def test_a_peer_that_takes_no_answer_is_cut_off(hasty: Running) -> None:
    with hasty.connect() as connection:
        connection.sendall(get("/endless"))
        hasty.app.wait(("/endless", "gone"))


# -- size -----------------------------------------------------------------------------------------


@spec("RFC 6585 §5")
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 5000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 700 + b"\r\n", b"431"),
        (b"GET /" + b"y" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX:" + b" " * 100_000 + b"y\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"y" * 5000, b"431"),
    ],
    ids=["one field", "many fields", "target", "blanks", "name without end"],
)
def test_a_head_over_the_limit_is_refused(server: Running, head: bytes, status: bytes) -> None:
    assert server.exchange(head)[9:12] == status


@pytest.mark.parametrize(
    ("head", "more"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"y" * 65536),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X: y\r\n" * 10_000),
        (b"GET /", b"y" * 65536),
    ],
    ids=["one field", "many fields", "target"],
)
def test_a_head_of_20_mb_is_refused_long_before_its_end(server: Running, head: bytes, more: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(head)
        sent = 0
        try:
            while sent < 20_000_000:
                sent += connection.send(more)
        except OSError:
            pass
        assert sent < 20_000_000


def test_extensions_of_chunks_and_trailers_are_bounded(server: Running) -> None:
    put = get("/bounded", CHUNKED, CLOSE, method="PUT")
    for rest in (b"1;" + b"e" * 200_000 + b"\r\nx\r\n0\r\n\r\n", b"0\r\n" + b"T: x\r\n" * 50_000 + b"\r\n"):
        answer = server.exchange(put + rest)
        assert b"200 OK" not in answer
    assert ("/bounded", "answered") not in server.app.seen


@spec("RFC 9112 §7.1")
def test_a_million_chunks_of_one_byte_are_fine(server: Running) -> None:
    answer = server.exchange(get("/", CHUNKED, CLOSE, method="PUT") + b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n")
    assert answer.endswith(b"x" * 100_000)


# -- framing --------------------------------------------------------------------------------------


@spec("RFC 9112 §6.1, §6.3")
@pytest.mark.parametrize(
    "fields",
    [
        ["Content-Length: 6", CHUNKED],
        [CHUNKED, "Content-Length: 6"],
        ["Content-Length: 1", "Content-Length: 2"],
        ["Content-Length: 1", "Content-Length: 1"],
        ["Content-Length: +1"],
        ["Content-Length : 1"],
        ["Transfer-Encoding : chunked"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: xchunked"],
        ["X: a\x00b"],
    ],
    ids=str,
)
def test_ambiguous_framing_ends_the_connection_and_smuggles_nothing(
    server: Running, fields: list[str]
) -> None:
    answer = server.exchange(get("/front", *fields, method="PUT") + b"0\r\n\r\n" + get("/smuggled"))
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")), answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert ("/smuggled", "answered") not in server.app.seen


@spec("RFC 9112 §3.2")
@pytest.mark.parametrize(
    "head",
    [b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"],
    ids=["none", "two"],
)
def test_a_request_has_exactly_one_host(server: Running, head: bytes) -> None:
    assert server.exchange(head).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "rest", [b"zz\r\nx\r\n", b"-1\r\nx\r\n", b"1\r\nxy\r\n0\r\n\r\n", b"fffffffffffffffff\r\n"]
)
def test_a_bad_chunk_is_the_end_of_the_upload(server: Running, rest: bytes) -> None:
    path = "/bad" + rest[:2].decode()
    answer = server.exchange(get(path, CHUNKED, method="PUT") + b"1\r\nx\r\n" + rest)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert (path, "answered") not in server.app.seen


@spec("RFC 9112 §3.2.2")
def test_an_absolute_target_replaces_the_host(server: Running) -> None:
    answer = server.exchange(get("http://other.example.org:81/a?b#c", CLOSE))
    assert answer.endswith(b"GET /a other.example.org:81 ")


@pytest.mark.parametrize("target", ["ftp://example.org/", "example", "*"])
def test_a_target_of_another_form_is_refused(server: Running, target: str) -> None:
    assert server.exchange(get(target)).startswith(b"HTTP/1.1 400 ")


@spec("RFC 9112 §9.3.2")
def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    requests = [get(f"/{number}") for number in range(50)] + [get("/last", CLOSE)]
    answer = server.exchange(b"".join(requests))
    places = [answer.index(b"GET /%d " % number) for number in range(50)]
    assert places == sorted(places)
    assert answer.endswith(b"GET /last example.org ")


def test_nonsense_behind_a_request_does_not_harm_its_answer(server: Running) -> None:
    answer = server.exchange(get("/stream") + b"\x00\x01nonsense\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"0\r\n\r\n")
    assert answer.count(b"p") >= 3 * 65536


@spec("RFC 9110 §10.1.1")
def test_100_continue_is_sent_only_when_the_body_is_wanted(server: Running) -> None:
    expect = ("Expect: 100-continue", "Content-Length: 3", CLOSE)
    assert server.exchange(get("/refuse", *expect, method="PUT")).startswith(b"HTTP/1.1 413 ")
    with server.connect() as connection:
        connection.sendall(get("/", *expect, method="PUT"))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"abc")
        assert read_all(connection).endswith(b"abc")


def test_a_client_of_http_1_0_gets_no_chunks(server: Running) -> None:
    answer = server.exchange(get("/stream", version="1.0"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert body == b"p" * (3 * 65536)


@spec("RFC 9110 §9.3.2")
def test_head_has_no_body(server: Running) -> None:
    answer = server.exchange(get("/", CLOSE, method="HEAD"))
    assert answer.partition(b"\r\n\r\n")[2] == b""
    assert b"content-length: 19" in answer


def test_an_offer_to_upgrade_is_ignored(server: Running) -> None:
    answer = server.exchange(get("/up", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"))
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("size", [1000, 1], ids=["at once", "one byte at a time"])
@pytest.mark.parametrize(
    ("fields", "body"),
    [(["Content-Length: 5"], b"hello"), ([CHUNKED], b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")],
    ids=["declared", "chunked"],
)
def test_the_body_of_an_offer_to_upgrade_is_whole_and_nothing_behind_it_is_a_request(
    server: Running, fields: list[str], body: bytes, size: int
) -> None:
    path = f"/up-{size}-{len(body)}"
    sent = get(path, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", *fields, method="PUT") + body
    sent += get(f"{path}-behind")
    answer = server.exchange(*[sent[at : at + size] for at in range(0, len(sent), size)])
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.endswith(b" example.org hello")
    assert (f"{path}-behind", "answered") not in server.app.seen


@spec("RFC 9110 §15.6.6")
@pytest.mark.parametrize("version", ["0.9", "2.0"])
def test_other_versions_of_http_are_505(server: Running, version: str) -> None:
    answer = server.exchange(get("/version", version=version) + get("/smuggled"))
    assert answer.startswith(b"HTTP/1.1 505 ")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_request_line_without_a_version_is_505(server: Running) -> None:
    assert server.exchange(b"GET /\r\nHost: example.org\r\n\r\n").startswith(b"HTTP/1.1 505 ")


@spec("RFC 9112 §5.1")
def test_blanks_around_a_value_are_not_part_of_it(server: Running) -> None:
    answer = server.exchange(get("/blanks", "Content-Length: \t 3 \t ", CLOSE, method="PUT") + b"abc")
    assert answer.endswith(b"abc")
    assert server.exchange(b"GET / HTTP/1.1\r\nHost:  a \t\r\n" + CLOSE.encode() + b"\r\n\r\n").endswith(
        b"/ a "
    )


# -- ends -----------------------------------------------------------------------------------------


def test_a_half_closed_connection_still_gets_the_answer_to_a_whole_request(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(get("/half", "Content-Length: 3", method="PUT") + b"abc")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection).endswith(b"abc")


@pytest.mark.parametrize("fields", [["Content-Length: 10"], [CHUNKED]], ids=str)
def test_a_body_cut_short_is_never_whole(server: Running, fields: list[str]) -> None:
    path = f"/cut-{fields[0][0]}"
    with server.connect() as connection:
        connection.sendall(
            get(path, *fields, method="PUT") + b"3\r\nabc\r\n"[: 5 if fields == [CHUNKED] else 3]
        )
        connection.shutdown(socket.SHUT_WR)
        read_all(connection)
    server.app.wait((path, "gone"))
    assert (path, "answered") not in server.app.seen


def test_stopping_closes_idle_connections_and_lets_requests_end(server: Running) -> None:
    with server.connect() as idle, server.connect() as busy:
        idle.sendall(get("/idle"))
        assert idle.recv(1000).startswith(b"HTTP/1.1 200 ")
        busy.sendall(get("/busy", "Content-Length: 3", "Expect: 100-continue", method="PUT"))
        assert busy.recv(1000).startswith(b"HTTP/1.1 100 ")
        server.call(lambda: [each.drain(at_once=True) for each in list(server.state.connections)])  # type: ignore
        assert read_all(idle) == b""
        busy.sendall(b"abc")
        answer = read_all(busy)
        assert answer.endswith(b"abc")
        assert b"connection: close" in answer


def test_replacing_a_worker_answers_one_more_request_of_an_idle_connection(server: Running) -> None:
    with server.connect() as idle:
        idle.sendall(get("/before"))
        assert idle.recv(1000).startswith(b"HTTP/1.1 200 ")
        told = threading.Event()

        def drain() -> None:
            for each in list(server.state.connections):
                each.drain(at_once=False)  # type: ignore[call-arg]
            told.set()

        server.call(drain)
        assert told.wait(10)
        idle.sendall(get("/after"))
        answer = read_all(idle)
        assert b"connection: close" in answer
        assert answer.endswith(b"GET /after example.org ")


def test_replacing_a_worker_lets_an_answer_that_has_begun_be_followed_by_one_more_request(
    server: Running,
) -> None:
    with server.connect() as busy:
        busy.sendall(get("/early", "Content-Length: 3", method="PUT"))
        received = b""
        while b"early" not in received:
            received += busy.recv(1000)
        assert b"connection: close" not in received
        told = threading.Event()

        def drain() -> None:
            for each in list(server.state.connections):
                each.drain(at_once=False)  # type: ignore[call-arg]
            told.set()

        server.call(drain)
        assert told.wait(10)
        busy.sendall(b"abc")
        while not received.endswith(b"0\r\n\r\n"):
            received += busy.recv(1000)
        busy.sendall(get("/behind"))
        answer = read_all(busy)
        assert b"connection: close" in answer
        assert answer.endswith(b"GET /behind example.org ")


# -- any cut of the bytes is the same request -----------------------------------------------------

WHOLE = (
    get("/one", "Content-Length: 5", method="PUT")
    + b"hello"
    + get("/two", CHUNKED, method="PUT")
    + b"3;a=b\r\nabc\r\n2\r\nde\r\n0\r\nT: x\r\n\r\n"
    + get("/three", CLOSE)
)


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(1, len(WHOLE) - 1), max_size=12))
def test_pieces_of_any_size_make_the_same_requests(server: Running, cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(WHOLE)]
    answer = server.exchange(*[WHOLE[low:high] for low, high in itertools.pairwise(edges)])
    assert [answer.count(text) for text in (b" hello", b" abcde", b"GET /three ")] == [1, 1, 1]


def test_one_byte_at_a_time_makes_the_same_requests(server: Running) -> None:
    with server.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(WHOLE)):
            connection.sendall(WHOLE[at : at + 1])
        answer = read_all(connection)
    assert [answer.count(text) for text in (b" hello", b" abcde", b"GET /three ")] == [1, 1, 1]
