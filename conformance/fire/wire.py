"""Requests that are sent once: what became of one whose connection broke is for the model to find out."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from conformance.client import NAMESPACES, Answer, basic

TIMEOUT_S = 45.0
DECLARATION = '<?xml version="1.0" encoding="utf-8"?>'

Body = bytes | Iterable[bytes] | None


class Cut(Exception):
    """The connection broke before the whole answer was there."""


@dataclass(frozen=True, slots=True)
class Login:
    """Where and as whom to send requests."""

    base: str  # URL of the server, without a slash at the end
    name: str
    password: str


class Wire:
    """One kept connection; opened again only for the next request."""

    def __init__(self, login: Login) -> None:
        place = urlsplit(login.base)
        self._place = (place.hostname or "", place.port or 80)
        self._authorization = basic(login.name, login.password)
        self._connection: http.client.HTTPConnection | None = None
        self.fresh = False  # open a connection for every request

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def send(
        self, method: str, path: str, body: Body = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request, never repeated. Pieces go out in chunks.

        Raises:
            Cut: no whole answer came.
        """
        fields = {"Authorization": self._authorization, **(headers or {})}
        if self.fresh:
            self.close()
        connection = self._connection or http.client.HTTPConnection(*self._place, timeout=TIMEOUT_S)
        whole = isinstance(body, bytes | None)
        try:
            if self._connection is None:
                connection.connect()
                self._connection = connection
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                # An answer that came before the end of the body can still be read.
                connection.request(
                    method, path, body if whole else iter(body or ()), fields, encode_chunked=not whole
                )
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Cut(repr(error)) from None
        if response.will_close:
            self.close()
        return Answer(response.status, response.headers, content, 0.0)

    def propfind(self, path: str, depth: str, *names: str) -> Answer:
        """Ask for properties by prefixed names."""
        wanted = "".join(f"<{name}/>" for name in names)
        body = f"{DECLARATION}<D:propfind {NAMESPACES}><D:prop>{wanted}</D:prop></D:propfind>"
        return self.send("PROPFIND", path, body.encode(), {"Depth": depth})
