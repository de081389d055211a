"""The whole application in process, with people who must not see one another's data."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ksync_server import settings as configuration
from ksync_server.app import App, Services, application
from ksync_server.auth.accounts import Account
from ksync_server.store.blobs import Blobs
from ksync_server.wire import xml
from tests.auth.harness import PASSWORD, Door

HOSTS = configuration.Hosts(
    sync=("sync.example.org", "dav.example.org"), drive_suffix="connect.example.org", paths=("localhost",)
)
TOPSECRET = "topsecret-a1b2c3"
ORIGIN = "https://localhost"
XML = f'<?xml version="1.0" encoding="utf-8"?><{{0}}{xml.NAMESPACES}>{{1}}</{{0}}>'


def document(name: str, inner: str = "") -> str:
    """A request body with the usual prefixes."""
    return XML.format(name, inner)


def event(uid: str, *lines: str) -> str:
    """A calendar object whose text must not be seen by others."""
    inner = [
        f"UID:{uid}",
        "DTSTAMP:20260101T000000Z",
        "DTSTART:20260501T100000Z",
        f"SUMMARY:{TOPSECRET}",
        *lines,
    ]
    body = "".join(f"{line}\r\n" for line in ("BEGIN:VEVENT", *inner, "END:VEVENT"))
    return f"BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//example.org//EN\r\n{body}END:VCALENDAR\r\n"


def basic(name: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{secret}".encode()).decode()


@dataclass
class Answer:
    """A whole answer."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    def header(self, name: str) -> str:
        return next((value.decode("latin-1") for key, value in self.headers if key == name.encode()), "")

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def said(self, *ids: str) -> tuple[object, ...]:
        """Everything that tells answers apart: what the request itself named (`ids`) is taken out."""
        text = self.text
        for each in ids:
            text = text.replace(each, "-")
        kept = [
            (name, value) for name, value in self.headers if name not in (b"x-request-id", b"content-length")
        ]
        return self.status, kept, text


@dataclass(frozen=True, slots=True)
class Person:
    """An account and the secret that opens its calendars and drives."""

    account: Account
    secret: str

    @property
    def sync_id(self) -> str:
        return self.account.sync_id

    @property
    def home(self) -> str:
        return f"/calendars/{self.sync_id}/"

    @property
    def calendar(self) -> str:
        return f"{self.home}work/"


class World:
    """alice and bob share a drive; mallory, of another organization, has one of her own."""

    def __init__(self, door: Door, folder: Path) -> None:
        settings = msgspec.structs.replace(
            door.settings, hosts=HOSTS, blobs=configuration.Blobs(path=folder / "blobs")
        )
        self.door = door
        self.blobs = Blobs(settings.blobs, door.database)
        gate = type(door.gate)(settings, door.database, door.keys, door.offers)
        self.services = Services(settings, door.database, self.blobs, door.keys, door.offers, gate)
        self.app: App = application(self.services)
        self.alice, self.bob, self.mallory = (self._person(name) for name in ("alice", "bob", "mallory"))
        self.shared = door.drive("kdrive-team", self.alice.account, self.bob.account)
        self.other = door.drive("kdrive-solo", self.mallory.account)
        for each in (self.alice, self.bob, self.mallory):
            assert self.ask("MKCALENDAR", each.calendar, by=each).status == 201

    def _person(self, name: str) -> Person:
        account = self.door.account(name)
        return Person(account, self.door.app_password(account)[1])

    def close(self) -> None:
        self.services.gate.flush()
        self.app.close()
        self.blobs.close()

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | str = b"",
        *,
        by: Person | None = None,
        host: str = "localhost",
        peer: str = "192.0.2.7",
        **headers: str,
    ) -> Answer:
        """One request over TLS; header names with `_` for `-`."""
        fields = {"host": host}
        if by is not None:
            fields["authorization"] = basic(by.account.login_email, by.secret)
        fields |= {name.replace("_", "-").lower(): value for name, value in headers.items()}
        return self.send(method, path, body, fields.items(), peer=peer)

    def send(
        self,
        method: str,
        path: str,
        body: bytes | str,
        fields: Iterable[tuple[str, str]],
        *,
        peer: str = "192.0.2.7",
    ) -> Answer:
        """One request with exactly these header fields."""
        content = body.encode() if isinstance(body, str) else body
        fields = [*fields, ("content-length", str(len(content)))] if content else list(fields)
        answer, pieces = Answer(), [content]

        async def receive() -> dict[str, Any]:
            piece = pieces.pop() if pieces else b""
            return {"type": "http.request", "body": piece, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.headers = message["status"], list(message["headers"])
            else:
                answer.body += message["body"]

        raw, _, query = path.partition("?")
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "https",
            "client": (peer, 5000),
            "raw_path": raw.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in fields],
        }
        asyncio.run(self.app(scope, receive, send))
        return answer

    # -- what people do -------------------------------------------------------------------------------

    def drive(self, number: int | None = None) -> str:
        return f"/drives/{self.shared if number is None else number}/"

    def put_event(self, by: Person, name: str, *lines: str) -> Answer:
        path = f"{by.calendar}{name}.ics"
        return self.ask("PUT", path, event(name, *lines), by=by, content_type="text/calendar")

    def propfind(self, path: str, *names: str, by: Person, depth: str = "0", **headers: str) -> Answer:
        inner = "".join(f"<{name}/>" for name in names)
        body = document("d:propfind", f"<d:prop>{inner}</d:prop>") if names else ""
        return self.ask("PROPFIND", path, body, by=by, depth=depth, **headers)

    def report(self, path: str, name: str, inner: str, *, by: Person, depth: str = "1") -> Answer:
        return self.ask("REPORT", path, document(name, inner), by=by, depth=depth)

    def lock(self, path: str, *, by: Person, owner: str = "") -> Answer:
        inner = "<d:lockscope><d:exclusive/></d:lockscope><d:locktype><d:write/></d:locktype>"
        return self.ask("LOCK", path, document("d:lockinfo", inner + owner), by=by, depth="0")


def opened(url: str, folder: Path) -> Iterator[World]:
    """A world for a fixture."""
    with Door.opened(url, folder) as door:
        world = World(door, folder)
        try:
            yield world
        finally:
            world.close()


__all__ = [
    "ORIGIN",
    "PASSWORD",
    "TOPSECRET",
    "Answer",
    "Person",
    "World",
    "basic",
    "document",
    "event",
    "opened",
]
