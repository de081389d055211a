"""Request and Response over ASGI: decoded once at the edge, streamed bodies, no framework.

A site sees `Request.segments`, already percent-decoded and relative to the site, and answers hrefs with
`Request.href`, which keeps the form that the client used (HOST2).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ksync_server.errors import BadRequest, BodyTooLarge, ClientGone
from ksync_server.wire import headers as grammar

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Headers:
    """Request headers: names lower-case, values as sent, order kept."""

    __slots__ = ("_first", "raw")

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self.raw = tuple(raw)
        first: dict[bytes, bytes] = {}
        for name, value in self.raw:
            first.setdefault(name, value)
        self._first = first

    def get(self, name: str) -> str | None:
        """The first value of a header (name in lower case), Latin-1 decoded, or None."""
        value = self._first.get(name.encode("ascii"))
        return None if value is None else value.decode("latin-1")

    def joined(self, name: str) -> str | None:
        """All values of a list header joined by commas (RFC 9110 §5.3), or None."""
        key = name.encode("ascii")
        values = [value.decode("latin-1") for header, value in self.raw if header == key]
        return ", ".join(values) if values else None

    def __contains__(self, name: str) -> bool:
        return name.encode("ascii") in self._first

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self.raw)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, after trusted proxies were taken off."""

    address: str  # IP address text, "" for a Unix socket
    secure: bool  # TLS up to us or up to a trusted proxy
    user_agent: str


class Body:
    """A request body, read at most once, in pieces as they arrive.

    `received` tells whether reading began: the edge drains what a refused upload still sends.
    """

    __slots__ = ("_more", "_receive", "guard", "length", "received", "started")

    def __init__(self, receive: Receive, length: int | None) -> None:
        self._receive = receive
        self._more = True
        self.length = length  # declared Content-Length in bytes; None = chunked or no body
        self.received = 0
        self.started = False
        self.guard: Callable[[], None] | None = None  # raises when no more may come in

    @property
    def complete(self) -> bool:
        """Whether the last piece was read."""
        return not self._more

    async def chunk(self) -> bytes | None:
        """The next piece (>= 1 B), or None at the end.

        Raises:
            ClientGone: the peer closed before the end of the body.
            ClientError: what the guard says.
        """
        self.started = True
        while self._more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._more = False
                raise ClientGone
            self._more = bool(message.get("more_body", False))
            piece: bytes = message.get("body", b"")
            if piece:
                if self.guard is not None:
                    self.guard()
                self.received += len(piece)
                return piece
        if self.length is not None and self.received != self.length:
            raise ClientGone
        return None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (piece := await self.chunk()) is not None:
            yield piece

    async def read(self, limit: int) -> bytes:
        """The whole body, at most `limit` bytes.

        Raises:
            BodyTooLarge: declared or sent more; before a byte is read when it was declared.
            ClientGone: the peer closed early.
        """
        if self.length is not None and self.length > limit:
            raise BodyTooLarge(f"At most {limit} bytes are accepted here.")
        pieces: list[bytes] = []
        size = 0
        async for piece in self:
            size += len(piece)
            if size > limit:
                raise BodyTooLarge(f"At most {limit} bytes are accepted here.")
            pieces.append(piece)
        return b"".join(pieces)


@dataclass(frozen=True, slots=True)
class Request:
    """One request, decoded. `segments` is relative to the site, `base` the site's own prefix."""

    method: str
    segments: tuple[str, ...]
    trailing_slash: bool
    query: str  # raw, without "?"
    headers: Headers
    peer: Peer
    body: Body
    scheme: str  # http or https, as the client sees us
    authority: str  # Host header: name[:port]
    base: str = ""  # "" or "/drives/<id>": quoted, no slash at the end
    id: str = ""  # request id, in logs and answers
    context: dict[str, Any] = field(default_factory=dict)  # log fields filled on the way

    def under(self, base: str, count: int) -> Request:
        """The same request with its first `count` segments moved into the base."""
        return replace(self, base=base, segments=self.segments[count:])

    def href(self, segments: Iterable[str], *, folder: bool = False) -> str:
        """A path on this site in the form that the client used, percent-encoded."""
        return self.base + grammar.join_path(tuple(segments), folder)

    @property
    def has_body(self) -> bool:
        """Whether the client announced a body, even an empty chunked one."""
        return bool(self.body.length) or "transfer-encoding" in self.headers


@dataclass(slots=True)
class Response:
    """An answer: whole bytes, or a stream whose pieces are sent as they come."""

    status: int
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes | AsyncIterator[bytes] = b""
    close: bool = False  # end the connection after this answer

    def set(self, name: bytes, value: str | bytes) -> None:
        """Replace a header (name in lower case)."""
        self.headers = [pair for pair in self.headers if pair[0] != name]
        self.headers.append((name, value.encode("latin-1") if isinstance(value, str) else value))


XML_TYPE = (b"content-type", b"application/xml; charset=utf-8")


def xml(status: int, body: str | bytes | AsyncIterator[bytes]) -> Response:
    """An answer in XML."""
    return Response(status, [XML_TYPE], body.encode("utf-8") if isinstance(body, str) else body)


def text(status: int, body: str) -> Response:
    """An answer in plain text."""
    return Response(status, [(b"content-type", b"text/plain; charset=utf-8")], body.encode("utf-8"))


def content_length(headers: Headers) -> int | None:
    """The declared body length in bytes, 0 where neither length nor chunks are announced.

    Raises:
        BadRequest: not digits, or several that differ.
    """
    if "transfer-encoding" in headers:
        return None
    values = {value for name, value in headers if name == b"content-length"}
    if not values:
        return 0
    if len(values) > 1:
        raise BadRequest("Several Content-Length headers.")
    return grammar.parse_content_length(values.pop().decode("latin-1"))
