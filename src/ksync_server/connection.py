"""One connection: uvicorn's HTTP/1.1 protocol, with bounds on what a peer may make us hold, and for how long.

Time limits need no timer per request: every connection notes until when it may stay as it is, and the worker
calls `sweep` on all of them once a second.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from ksync_server.errors import ClientGone
from ksync_server.networks import Networks, is_loopback, subscriber
from ksync_server.wire.proxy import Origin

App = Callable[[Any, Any, Any], Awaitable[None]]

_UNKNOWN_LENGTH = 1 << 62
_CLOSE_S = 5.0  # a closed connection whose last bytes the peer does not take is cut after this
_LAST_REQUEST_S = 5.0  # an idle connection of a worker that is being replaced may send one more request
_SLICE = 64 * 1024  # bytes parsed at once, except inside a body of declared length
_FRAME = 64  # bytes of a request line, or of a chunk's size line, beside what is counted
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may do; the same names as in `settings.Server`."""

    header_bytes: int
    header_timeout_s: float
    idle_timeout_s: float
    body_timeout_s: float


class Crowd:
    """How many connections each address has in this process.

    Args:
        most: of one IPv4 address or IPv6 network of 64 bits; 0 = any number.
        excepted: who speaks for many: our proxies. Loopback is excepted too.
    """

    def __init__(self, most: int, excepted: Networks) -> None:
        self._most = most
        self._excepted = excepted
        self._counts: Counter[str] = Counter()

    def enter(self, address: str) -> str | None:
        """Count one more; None when it is not counted, "" when it is one too many."""
        if not self._most or is_loopback(address) or address in self._excepted:
            return None
        key = subscriber(address)
        if self._counts[key] >= self._most:
            return ""
        self._counts[key] += 1
        return key

    def leave(self, key: str) -> None:
        """Count one less, by what `enter` gave."""
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key]


def refusing(status: int, text: str) -> App:
    """An ASGI application that answers a head unfit for the real one, and ends the connection."""
    content = text.encode("ascii") + b"\n"

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return answer


class Cycle(RequestResponseCycle):
    """One request and its answer.

    Differs from uvicorn's: body pieces are handed on without being copied together, waiting for them has an
    end, a send to a peer that has left raises `ClientGone`, and a client of HTTP/1.0 never gets chunks.
    """

    def __init__(self, connection: Connection, **rest: Any) -> None:
        super().__init__(**rest)
        self.connection = connection
        self.pieces: deque[bytes] = deque()
        self.held = 0  # bytes in `pieces`
        self.end_delivered = False
        self.close_delimited = False

    async def run_asgi(self, app: App) -> None:
        """Run the application; whatever it leaves unfinished ends the connection."""
        try:
            await app(self.scope, self.receive, self.send)
        except ClientGone:
            pass
        except Exception:
            self.logger.exception("The application failed outside its error boundary.")
        finally:
            if not self.response_complete and not self.disconnected:
                # An end without its last chunk, or a reset: the peer must not take the part for the whole.
                self.transport.abort() if self.close_delimited else self.transport.close()
            self.on_response = lambda: None

    async def receive(self) -> Any:
        """The next piece of the body, or that the peer has left."""
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(_CONTINUE)
        self.waiting_for_100_continue = False
        while not self.pieces and (self.more_body or self.end_delivered):
            if self.disconnected or self.response_complete:
                return {"type": "http.disconnect"}
            self.flow.resume_reading()
            if self.more_body:
                self.connection.wait_for_body()
            await self.message_event.wait()
            self.message_event.clear()
        self.connection.stop_waiting()
        if self.disconnected and self.more_body:
            return {"type": "http.disconnect"}
        body = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces.clear()
        self.held = 0
        self.end_delivered = not self.more_body
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Any) -> None:
        """Write a part of the answer, as fast as the peer takes it.

        Raises:
            ClientGone: the peer closed, or took nothing for too long.
        """
        if message["type"] == "http.response.start":
            self._choose_framing(message)
        elif self.close_delimited and not message.get("more_body"):
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)
        if self.disconnected and not self.response_complete:
            raise ClientGone

    def _choose_framing(self, message: Any) -> None:
        if self.scope["http_version"] == "1.1" or self.scope["method"] == "HEAD":
            return
        if message["status"] in (204, 304) or any(
            name == b"content-length" for name, _ in message["headers"]
        ):
            return
        self.close_delimited = True
        self.chunked_encoding = False
        self.expected_content_length = _UNKNOWN_LENGTH


class _Skipped:
    """Callbacks for the body of a request that offers an upgrade: httptools ends that request at its head."""

    def __init__(self, connection: Connection) -> None:
        self.on_body = connection.on_body
        self.on_chunk_header = connection.on_chunk_header
        self.on_message_complete = connection.end_skipped


class Connection(HttpToolsProtocol):
    """A connection with limits. `deadline` and `write_deadline` are in the loop's time."""

    cycle: Cycle

    def __init__(
        self,
        config: Config,
        state: ServerState,
        limits: Limits,
        on_close: Callable[[], None],
        *,
        origin: Origin | None = None,
        crowd: Crowd | None = None,
    ) -> None:
        super().__init__(config, state, {}, asyncio.get_running_loop())
        self.limits = limits
        self.on_close = on_close
        self.origin = origin  # what a PROXY header said
        self.crowd = crowd
        self.counted: str | None = None  # as whose connection
        self.access_log = False
        self.heading = False  # inside a head
        self.head_bytes = 0  # of the fields, so far
        self.target_bytes = 0
        self.accounted = 0  # bytes of the data being parsed whose place in a request is known
        self.loose = 0  # bytes that are neither: half a field, blanks, chunk extensions
        self.declared = False  # inside a body of declared length
        self.upgrading = False  # the parser will end this request before its body
        self.broken = False  # nothing the peer sends is understood any more
        self.draining = False
        self.running: Cycle | None = None
        self.deadline = math.inf
        self.write_deadline = math.inf
        self.close_deadline = math.inf
        self.unsent = 0
        self.encrypted = False

    # -- life -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The peer has until the header time-out to send a request."""
        super().connection_made(transport)
        self.encrypted = self.scheme == "https"
        if self.origin is not None:
            # A loopback address that a proxy elsewhere tells of is not ours, so it is not trusted as ours.
            if not is_loopback(self.origin.address) or is_loopback(self.client[0] if self.client else ""):
                self.client = (self.origin.address, self.origin.port)
            if self.origin.secure:
                self.scheme = "https"
        self.deadline = self.loop.time() + self.limits.header_timeout_s
        if self.crowd is not None:
            self.counted = self.crowd.enter(self.client[0] if self.client else "")
            if self.counted == "":
                self._answer(503, "Too many connections from your address.")

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every request of this connection."""
        for cycle in (self.running, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)
        if self.crowd is not None and self.counted:
            self.crowd.leave(self.counted)
        self.on_close()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A peer that has sent a whole request may close its half and still read the answer.

        Inside TLS it may not: the event loop closes both halves at once.
        """
        cycle = self.cycle
        if self.encrypted or cycle is None or cycle.response_complete or cycle.more_body:
            return None
        cycle.keep_alive = False
        return True

    def drain(self, *, at_once: bool) -> None:
        """End the connection: an idle one `at_once`, or with the answer to its next request.

        A client that sends a request while we close sees an error; so a reload lets it send one more.
        """
        self.draining = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if at_once or not cycle.response_started:
                cycle.keep_alive = False
            # Else the head has not said so: the client will take the connection for a kept one.
        elif at_once:
            self.transport.close()
        else:
            self.deadline = min(self.deadline, self.loop.time() + _LAST_REQUEST_S)

    def sweep(self, now: float) -> None:
        """End what has lasted too long."""
        if self.transport.is_closing():
            if self.close_deadline == math.inf:
                self.close_deadline = now + _CLOSE_S
            elif now > self.close_deadline:
                self.transport.abort()
        elif now > self.deadline:
            self._give_up()
        elif self.flow.write_paused:
            unsent = self.transport.get_write_buffer_size()
            if unsent != self.unsent:
                self.unsent = unsent
                self.write_deadline = now + self.limits.body_timeout_s
            elif now > self.write_deadline:
                self.transport.abort()

    def _give_up(self) -> None:
        self.deadline = math.inf
        cycle = self.running
        busy = cycle is not None and not cycle.response_complete
        if self.heading and busy and cycle is not None:
            cycle.keep_alive = False  # the answers under way are finished first
        elif self.heading or (busy and cycle is not None and not cycle.response_started):
            self._answer(408, "The request came too slowly.")
        else:
            self.transport.close()

    def wait_for_body(self) -> None:
        """A request's body is being awaited."""
        self.deadline = self.loop.time() + self.limits.body_timeout_s

    def stop_waiting(self) -> None:
        """Nothing is awaited from the peer."""
        self.deadline = math.inf

    def pause_writing(self) -> None:
        """The peer takes our bytes more slowly than they come."""
        self.unsent = self.transport.get_write_buffer_size()
        self.write_deadline = self.loop.time() + self.limits.body_timeout_s
        super().pause_writing()

    # -- reading ----------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Bytes of any number of requests."""
        if len(data) <= _SLICE or self.declared:
            self._feed(data)
        else:  # in parts, so that a limit is noticed before what comes behind its breach
            view = memoryview(data)
            for start in range(0, len(data), _SLICE):
                self._feed(view[start : start + _SLICE])

    def _feed(self, data: bytes | memoryview) -> None:
        if self.broken:
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as ended:
            # No protocol of ours: answer what was asked, then end.
            self.cycle.keep_alive = False
            if self.upgrading:
                self._read_skipped(data[ended.args[0] :])
            else:
                self.broken = True
        except httptools.HttpParserError:
            self._break(400, "The request is malformed.")
        else:
            self.loose = max(0, self.loose + len(data) - self.accounted)
            self.accounted = 0
            if self.heading and self.target_bytes > self.limits.header_bytes:
                self._break(414, "The request target is too long.")
            elif max(self.loose, self.heading and self.head_bytes) > self.limits.header_bytes:
                self._break(431, "The head of the request, or of a chunk, is too large.")

    def _read_skipped(self, data: bytes | memoryview) -> None:
        """Read the body of a request that asked for an upgrade, by a parser that does not see that."""
        self.upgrading = False
        framing = b"".join(
            b"%b: %b\r\n" % pair
            for pair in self.headers
            if pair[0] in (b"content-length", b"transfer-encoding")
        )
        self.accounted = self.loose = 0
        self.parser = httptools.HttpRequestParser(_Skipped(self))
        self.parser.feed_data(b"PUT / HTTP/1.1\r\n" + framing + b"\r\n")
        self._feed(data)

    def end_skipped(self) -> None:
        """The end of such a body."""
        self.on_message_complete()
        self.broken = True

    def _break(self, status: int, text: str) -> None:
        """End a connection whose bytes cannot be told apart any more, after the answers under way."""
        self.broken = True
        self.heading = False
        cycle, running = self.cycle, self.running
        if cycle is not None and cycle.more_body and not cycle.response_complete:
            cycle.disconnected = True  # its body will never be whole
            cycle.message_event.set()
            if cycle is not running:
                self.pipeline.clear()
        if running is None or running.response_complete or running.disconnected:
            begun = running is not None and running.response_started and not running.response_complete
            self.transport.close() if begun else self._answer(status, text)
        else:
            running.keep_alive = False
            self.pipeline.clear()
            self.flow.pause_reading()

    def _answer(self, status: int, text: str) -> None:
        """Write an answer that no request asked for, and close."""
        self.broken = True
        for cycle in (self.running, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        content = text.encode("ascii") + b"\n"
        head = [STATUS_LINE[status]]
        head += [b"%b: %b\r\n" % pair for pair in self.server_state.default_headers]
        head.append(b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\n")
        head.append(b"content-length: %d\r\n\r\n" % len(content))
        self.transport.write(b"".join([*head, content]))
        self.transport.close()

    # -- parser callbacks -------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self.heading = True
        self.head_bytes = self.target_bytes = 0
        self.accounted += _FRAME
        if self.running is None or self.running.response_complete:
            self.deadline = self.loop.time() + self.limits.header_timeout_s

    def on_url(self, url: bytes) -> None:
        """A part of the request target."""
        self.target_bytes += len(url)
        self.accounted += len(url)
        if self.target_bytes <= self.limits.header_bytes:
            self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One whole field; those behind a chunked body mean nothing here."""
        if self.heading:
            size = len(name) + len(value) + 4
            self.accounted += size
            self.head_bytes += size
            if self.head_bytes <= self.limits.header_bytes:
                super().on_header(name, value.rstrip(b" \t"))  # RFC 9112 §5.1; the parser takes those before

    def on_chunk_header(self) -> None:
        """The size of a chunk."""
        self.accounted += _FRAME

    def on_headers_complete(self) -> None:
        """Check the head, then start the application, or queue behind the request before (pipelining)."""
        self.heading = False
        version = self.parser.get_http_version()
        method = self.parser.get_method().decode("ascii")
        scope: Any = self.scope
        scope["method"] = method
        scope["http_version"] = version
        problem = self._problem(version)
        if problem is None:
            problem = self._take_target(scope, method)
        self.cycle = Cycle(
            self,
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive() and not self.draining,
            on_response=self.on_response_complete,
        )
        app: App = self.app if problem is None else refusing(*problem)
        if self.running is None or self.running.response_complete:
            self._start(self.cycle, app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, app))

    def _start(self, cycle: Cycle, app: App) -> None:
        self.running = cycle
        self.deadline = math.inf
        self._start_asgi_task(cycle, app)

    def _problem(self, version: str) -> tuple[int, str] | None:
        """What makes a head unfit for any application: size, hosts, framing (RFC 9112 §3.2, §6.1)."""
        if self.target_bytes > self.limits.header_bytes:
            return 414, "The request target is too long."
        if self.head_bytes + self.target_bytes > self.limits.header_bytes:
            return 431, "The head of the request is too large."
        if version not in ("1.0", "1.1"):
            return 505, "Only HTTP 1.0 and 1.1 are spoken here."
        hosts = lengths = 0
        codings: list[bytes] = []
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif name == b"transfer-encoding":
                codings.append(value)
            elif name == b"content-length":
                lengths += 1
        self.declared = lengths == 1 and not codings
        self.upgrading = bool(lengths or codings) and self.parser.should_upgrade()
        if hosts > 1 or (hosts == 0 and version != "1.0"):
            return 400, "A request has exactly one Host field."
        if lengths > 1 or (codings and (version == "1.0" or lengths)):
            return 400, "The length of the body is ambiguous."
        if codings and (len(codings) > 1 or codings[0].strip().lower() != b"chunked"):
            return 501, "Only the transfer coding chunked is known."
        return None

    def _take_target(self, scope: Any, method: str) -> tuple[int, str] | None:
        """Raw path and query of the request target; an absolute one replaces Host (RFC 9112 §3.2.2)."""
        target = self.url.partition(b"#")[0]
        if not target.startswith(b"/"):
            if target == b"*" and method == "OPTIONS":
                scope.update(path="*", raw_path=b"*", query_string=b"")
                return None
            scheme, separator, rest = target.partition(b"://")
            if method == "CONNECT" or not separator or scheme.lower() not in (b"http", b"https"):
                return 400, "The request target has no form that this method takes."
            authority, slash, rest = rest.partition(b"/")
            authority, mark, query = authority.partition(b"?")
            target = slash + rest if slash else b"/" + mark + query
            scope["headers"] = [pair for pair in self.headers if pair[0] != b"host"] + [(b"host", authority)]
        raw, _, query = target.partition(b"?")
        scope.update(path=raw.decode("latin-1"), raw_path=raw, query_string=query)
        return None

    def on_body(self, body: bytes) -> None:
        """A part of a body; reading pauses while the application is slower than the peer."""
        self.accounted += len(body)
        cycle = self.cycle
        if cycle.response_complete or cycle.disconnected:
            return
        cycle.pieces.append(body)
        cycle.held += len(body)
        if cycle.held > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """The end of a request."""
        if self.upgrading:
            return
        self.declared = False
        if not self.cycle.disconnected:
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        """Go on with the next pipelined request, or wait for one."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start(cycle, app)  # type: ignore[arg-type]
        else:
            idle_s = _LAST_REQUEST_S if self.draining else self.limits.idle_timeout_s
            self.deadline = self.loop.time() + (self.limits.header_timeout_s if self.heading else idle_s)
