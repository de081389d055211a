"""A small HTTP client that shows everything: one request, one answer, nothing followed, nothing repaired."""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urljoin, urlsplit

TIMEOUT_S = 30.0

DAV = "{DAV:}"
CALDAV = "{urn:ietf:params:xml:ns:caldav}"
CARDDAV = "{urn:ietf:params:xml:ns:carddav}"
NAMESPACES = (
    'xmlns:D="DAV:" xmlns:C="urn:ietf:params:xml:ns:caldav" xmlns:A="urn:ietf:params:xml:ns:carddav" '
    'xmlns:S="http://calendarserver.org/ns/" xmlns:I="http://apple.com/ns/ical/" xmlns:E="http://example.org/ns/"'
)


@dataclass(frozen=True, slots=True)
class Row:
    """One DAV:response of a multistatus."""

    href: str
    status: int | None  # of the response itself, when it has one
    properties: Mapping[str, ET.Element]  # those with propstat 200, by Clark name
    refused: Mapping[str, int]  # the others: Clark name -> status
    errors: tuple[str, ...] = ()  # precondition elements, Clark names

    @property
    def path(self) -> str:
        return urlsplit(self.href).path

    def text(self, name: str) -> str:
        """Text of a property, all of it, or the empty string."""
        element = self.properties.get(name)
        return "" if element is None else "".join(element.itertext()).strip()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    seconds: float

    def header(self, name: str) -> str:
        return self.headers.get(name, "")

    @property
    def etag(self) -> str:
        return self.header("ETag")

    @property
    def xml(self) -> ET.Element:
        return ET.fromstring(self.body)

    @property
    def preconditions(self) -> tuple[str, ...]:
        """Clark names of the elements in a DAV:error body, or in those of a multistatus."""
        if not self.body.lstrip().startswith(b"<"):
            return ()
        found = (child.tag for error in self.xml.iter(f"{DAV}error") for child in error)
        return tuple(tag for tag in found if not tag.startswith("{urn:ksync:ns}"))

    @property
    def rows(self) -> list[Row]:
        """The responses of a multistatus; anything else fails the check that asks."""
        assert self.status == 207, f"expected 207, got {self.status}: {self.body[:500]!r}"
        assert "xml" in self.header("Content-Type"), self.header("Content-Type")
        root = self.xml
        assert root.tag == f"{DAV}multistatus", root.tag
        return [_row(response) for response in root.findall(f"{DAV}response")]

    @property
    def sync_token(self) -> str:
        return (self.xml.findtext(f"{DAV}sync-token") or "").strip()


def _status(line: str | None) -> int | None:
    return int(line.split()[1]) if line else None


def _row(response: ET.Element) -> Row:
    good: dict[str, ET.Element] = {}
    refused: dict[str, int] = {}
    for propstat in response.findall(f"{DAV}propstat"):
        status = _status(propstat.findtext(f"{DAV}status")) or 0
        for prop in propstat.findall(f"{DAV}prop"):
            for element in prop:
                if status == 200:
                    good[element.tag] = element
                else:
                    refused[element.tag] = status
    errors = tuple(child.tag for error in response.iter(f"{DAV}error") for child in error)
    href = (response.findtext(f"{DAV}href") or "").strip()
    return Row(href, _status(response.findtext(f"{DAV}status")), good, refused, errors)


def escaped(name: str) -> str:
    """A name as one path segment."""
    return quote(name.encode(), safe="")


def basic(login: str, password: str) -> str:
    """Value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{login}:{password}".encode()).decode()


@dataclass
class Client:
    """Requests below one base URL with one login; a connection is kept until the server closes it."""

    base: str
    login: str = ""
    password: str = ""
    host: str = ""  # Host header, when it is not the base URL's own
    timeout: float = TIMEOUT_S
    _connection: http.client.HTTPConnection | None = field(default=None, repr=False)

    def close(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    def __del__(self) -> None:
        self.close()

    def path(self, target: str) -> str:
        """Request target for a URL, an absolute path, or a path below the base URL."""
        joined = urlsplit(urljoin(self.base.rstrip("/") + "/", target))
        return (joined.path or "/") + (f"?{joined.query}" if joined.query else "")

    def url(self, target: str) -> str:
        base = urlsplit(self.base)
        return f"{base.scheme}://{self.host or base.netloc}{self.path(target)}"

    def request(
        self,
        method: str,
        target: str = "",
        body: bytes | str | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        auth: bool = True,
        raw_target: str | None = None,
    ) -> Answer:
        """Send one request and read the whole answer. A sequence of bytes is sent chunked."""
        fields = {"User-Agent": "conformance"}
        if auth and self.login:
            fields["Authorization"] = basic(self.login, self.password)
        if self.host:
            fields["Host"] = self.host
        if isinstance(body, str):
            body = body.encode()
        if isinstance(body, bytes) and body.startswith(b"<?xml"):
            fields["Content-Type"] = "application/xml; charset=utf-8"
        fields.update(headers or {})
        from_s = time.monotonic()
        for attempt in (1, 2):
            fresh = self._connection is None
            connection = self._connection or self._connect()
            try:
                connection.request(
                    method,
                    raw_target or self.path(target),
                    body=body,
                    headers=fields,
                    encode_chunked=not isinstance(body, bytes | None),
                )
                response = connection.getresponse()
                content = response.read()
                break
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                self.close()
                if fresh or attempt == 2:
                    raise
        if response.will_close:
            self.close()
        return Answer(response.status, response.headers, content, time.monotonic() - from_s)

    def _connect(self) -> http.client.HTTPConnection:
        base = urlsplit(self.base)
        self._connection = http.client.HTTPConnection(base.hostname or "", base.port, timeout=self.timeout)
        return self._connection

    def propfind(
        self, target: str = "", *names: str, depth: str = "0", headers: Mapping[str, str] | None = None
    ) -> list[Row]:
        """Ask for properties by prefixed names (`D:getetag`); none = allprop."""
        wanted = "".join(f"<{name}/>" for name in names)
        inner = f"<D:prop>{wanted}</D:prop>" if names else "<D:allprop/>"
        body = f'<?xml version="1.0" encoding="utf-8"?><D:propfind {NAMESPACES}>{inner}</D:propfind>'
        return self.request("PROPFIND", target, body, {"Depth": depth, **(headers or {})}).rows

    def proppatch(self, target: str, set_: str = "", remove: str = "") -> Answer:
        """Set and remove properties given as XML with our prefixes."""
        parts = (f"<D:set><D:prop>{set_}</D:prop></D:set>" if set_ else "") + (
            f"<D:remove><D:prop>{remove}</D:prop></D:remove>" if remove else ""
        )
        return self.request(
            "PROPPATCH",
            target,
            f'<?xml version="1.0"?><D:propertyupdate {NAMESPACES}>{parts}</D:propertyupdate>',
        )

    def report(self, target: str, name: str, inner: str, *, depth: str | None = "1") -> Answer:
        """A REPORT whose root element is `name` (prefixed)."""
        headers = {} if depth is None else {"Depth": depth}
        body = f'<?xml version="1.0" encoding="utf-8"?><{name} {NAMESPACES}>{inner}</{name}>'
        return self.request("REPORT", target, body, headers)

    def members(self, target: str = "") -> set[str]:
        """Decoded names of the direct members of a collection."""
        own = unquote(self.path(target)).rstrip("/")
        rows = self.propfind(target, "D:resourcetype", depth="1")
        paths = [unquote(row.path).rstrip("/") for row in rows]
        assert own in paths, f"a listing contains the collection itself; {own} not in {paths[:5]}"
        return {path.removeprefix(own + "/") for path in paths if path != own}

    def raw(self, payload: bytes, *, timeout: float = 5.0) -> bytes:
        """Bytes in, bytes out: what the server says to exactly this until it closes or falls silent."""
        base = urlsplit(self.base)
        with socket.create_connection((base.hostname or "", base.port or 80), timeout=timeout) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(payload)
            return read_answer(connection)

    def head(self, method: str, target: str, *fields: str) -> bytes:
        """The head of a request for `raw`: all but the empty line that ends it."""
        host = self.host or urlsplit(self.base).netloc
        lines = [f"{method} {self.path(target)} HTTP/1.1", f"Host: {host}"]
        if self.login:
            lines.append(f"Authorization: {basic(self.login, self.password)}")
        return "\r\n".join([*lines, *fields, ""]).encode("latin-1")


def read_answer(connection: socket.socket) -> bytes:
    """Read until the server closes, or until it is silent for the socket's timeout."""
    pieces: list[bytes] = []
    try:
        while piece := connection.recv(65536):
            pieces.append(piece)
            head, separator, rest = b"".join(pieces).partition(b"\r\n\r\n")
            if separator and head.split(b" ", 2)[1:2] != [b"100"] and _is_complete(head, rest):
                break
    except (TimeoutError, ConnectionResetError):
        pass
    return b"".join(pieces)


def _is_complete(head: bytes, rest: bytes) -> bool:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return len(rest) >= int(value)
    return rest.endswith(b"0\r\n\r\n")


def status_of(answer: bytes) -> int:
    """Status of the last response in raw bytes (after any 100 Continue); 0 = closed without one."""
    status = 0
    while answer.startswith(b"HTTP/1."):
        status = int(answer.split(b" ", 2)[1])
        if status != 100:
            break
        answer = answer.partition(b"\r\n\r\n")[2]
    return status
