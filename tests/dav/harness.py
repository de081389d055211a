"""Requests put to the sync host in process: no socket, errors as answers."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
import sqlalchemy as sa

from ksync_server import settings
from ksync_server.auth.gate import HomeGrant, HomeTarget, Identity, Service
from ksync_server.dav import collections
from ksync_server.dav.places import Kind
from ksync_server.dav.site import Site
from ksync_server.errors import ClientError, Forbidden, NotFound
from ksync_server.http import Body, Headers, Peer, Request, Response
from ksync_server.store import blobs
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database, Read, Write
from ksync_server.wire import headers as grammar
from ksync_server.wire import xml

NOW = 1_700_000_000
T = TypeVar("T")
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Store:
    """A migrated store."""

    database: Database
    blobs: Blobs
    settings: settings.Settings

    def dav(self, **changed: object) -> settings.Settings:
        """The settings with some of `dav` changed."""
        return msgspec.structs.replace(
            self.settings, dav=msgspec.structs.replace(self.settings.dav, **changed)
        )


def make_account(tx: Write, name: str = "alice") -> Identity:
    """An account without collections, with an address of its own."""
    number = next(_numbers)
    sync_id = f"{name[:2].upper()}{number:05}"
    email = f"{name}{number}@example.org"
    account_id = tx.execute(
        sa.insert(t.account)
        .values(
            sync_id=sync_id, login_email=email, login_key=email, display_name=name.title(), created_at=NOW
        )
        .returning(t.account.c.id)
    ).scalar_one()
    return Identity(account_id, sync_id, email, name.title(), frozenset({"caldav", "carddav"}), None)


class Gate:
    """The door's second question for tests: one's own home in one's own scope."""

    def authorize(self, tx: Read, identity: Identity, target: HomeTarget, verb: str) -> HomeGrant:
        if target.owner.upper() != identity.sync_id:
            raise NotFound("There is nothing here.")
        if target.service is not Service.SYNC and target.service not in identity.scopes:
            raise Forbidden("Not in the scope.")
        return HomeGrant(identity.account_id, identity.sync_id)


@dataclass(frozen=True, slots=True)
class Services:
    settings: settings.Settings
    database: Any
    blobs: Any
    gate: Gate


@dataclass(frozen=True, slots=True)
class Row:
    """One response of a multistatus."""

    status: int | None  # of the whole resource
    found: dict[str, xml.Element]  # properties with 200
    refused: dict[str, int]
    error: str | None  # Clark name inside the error of the whole resource

    def text(self, name: str) -> str:
        return self.found[name].text


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    precondition: str | None = None
    hrefs: tuple[str, ...] = ()
    pieces: int = 1
    tree: dict[str, Row] = field(default_factory=dict, compare=False)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def etag(self) -> str:
        return self.headers["etag"]

    def rows(self) -> dict[str, Row]:
        """Of a multistatus: href -> response; an href twice fails."""
        assert self.status == 207, (self.status, self.precondition, self.body[:300])
        found: dict[str, Row] = {}
        for response in xml.parse(self.body, xml.XmlLimits(1 << 30, 64, 1 << 24)).all("{DAV:}response"):
            href = _text(response, "{DAV:}href")
            assert href not in found
            found[href] = _row(response)
        return found

    @property
    def token(self) -> str:
        return _text(xml.parse(self.body, xml.XmlLimits(1 << 30, 64, 1 << 24)), "{DAV:}sync-token")


def _text(element: xml.Element, name: str) -> str:
    child = element.find(name)
    assert child is not None
    return child.text


def _row(response: xml.Element) -> Row:
    found: dict[str, xml.Element] = {}
    refused: dict[str, int] = {}
    for propstat in response.all("{DAV:}propstat"):
        prop = propstat.find("{DAV:}prop")
        assert prop is not None
        status = int(_text(propstat, "{DAV:}status").split()[1])
        for child in prop.elements():
            if status == 200:
                found[child.tag] = child
            else:
                refused[child.tag] = status
    own = response.find("{DAV:}status")
    error = response.find("{DAV:}error")
    return Row(
        int(own.text.split()[1]) if own else None,
        found,
        refused,
        error.elements()[0].tag if error else None,
    )


class Client:
    """A program of one account; each has a site of its own, as a worker process has."""

    def __init__(self, store: Store, identity: Identity, *, base: str = "", **changed: object) -> None:
        self.store = store
        self.identity = identity
        self.base = base
        self.site = Site(Services(store.dav(**changed), store.database, store.blobs, Gate()))
        self.home = f"{base}/calendars/{identity.sync_id}/"
        self.books = f"{base}/addressbooks/{identity.sync_id}/"
        self.principal = f"{base}/principals/{identity.sync_id}/"

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return asyncio.run(work())

    def request(
        self,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        *,
        chunked: bool = False,
    ) -> Request:
        raw = path if re.fullmatch(r"[!-~]+", path) else quote(path, safe="/%")
        segments, slash = grammar.split_path(raw.encode())
        depth = len(grammar.split_path(self.base.encode())[0]) if self.base else 0
        sent = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
        if chunked:
            sent.append((b"transfer-encoding", b"chunked"))
        return Request(
            method=method,
            segments=segments[depth:],
            trailing_slash=slash,
            query="",
            headers=Headers(sent),
            peer=Peer("127.0.0.1", True, "tests"),
            body=Body(
                _receiver([body[at : at + 65536] for at in range(0, len(body), 65536)]),
                None if chunked else len(body),
            ),
            scheme="https",
            authority="sync.example.org",
            base=self.base,
        )

    async def asend(
        self,
        method: str,
        path: str,
        body: bytes | str = b"",
        *,
        chunked: bool = False,
        **headers: str,
    ) -> Answer:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        content = body.encode() if isinstance(body, str) else body
        request = self.request(method, path, sent, content, chunked=chunked)
        try:
            response = self.site.public(request) or await self.site.handle(request, self.identity)
            return await whole(response)
        except ClientError as error:
            return Answer(
                error.status,
                {name.decode(): value.decode() for name, value in error.headers},
                error.text.encode(),
                error.precondition,
                error.hrefs,
            )

    def send(
        self, method: str, path: str, body: bytes | str = b"", *, chunked: bool = False, **headers: str
    ) -> Answer:
        """One request; header names with `_` for `-`. Errors of the tree of errors come out as answers."""
        return asyncio.run(self.asend(method, path, body, chunked=chunked, **headers))

    # -- what clients send ----------------------------------------------------------------------------

    def put(self, path: str, content: bytes | str, **headers: str) -> Answer:
        kind = "text/vcard" if path.startswith(self.books) else "text/calendar"
        return self.send("PUT", path, content, **{"content_type": f"{kind}; charset=utf-8", **headers})

    def propfind(self, path: str, *names: str, depth: str = "0", **headers: str) -> Answer:
        inner = "".join(xml.empty(name) for name in names)
        body = f"<d:propfind{xml.NAMESPACES}><d:prop>{inner}</d:prop></d:propfind>" if names else ""
        return self.send("PROPFIND", path, body, depth=depth, **headers)

    def prop(self, path: str, *names: str) -> Row:
        """One resource's properties."""
        (row,) = self.propfind(path, *names).rows().values()
        return row

    def report(self, path: str, name: str, inner: str, **headers: str) -> Answer:
        return self.send("REPORT", path, f"<{name}{xml.NAMESPACES}>{inner}</{name}>", **headers)

    def sync(
        self, path: str, token: str = "", limit: int = 0, props: str = "<d:getetag/>", **headers: str
    ) -> Answer:
        asked = f"<d:limit><d:nresults>{limit}</d:nresults></d:limit>" if limit else ""
        inner = f"<d:sync-token>{token}</d:sync-token><d:sync-level>1</d:sync-level>{asked}"
        inner += f"<d:prop>{props}</d:prop>"
        return self.report(path, "d:sync-collection", inner, **{"depth": "0", **headers})

    # -- collections made behind the site ----------------------------------------------------------

    def make(self, kind: Kind = Kind.CALENDAR, name: str | None = None, **stored: str) -> str:
        """A collection; returns its path."""
        name = name or f"c{next(_numbers)}"

        def create(tx: Write) -> collections.Collection:
            return collections.create(
                tx, self.identity.account_id, kind, name, stored=stored, limit=1000, now=NOW
            )

        self.store.database.write(create)
        home = self.home if kind is Kind.CALENDAR else self.books
        return f"{home}{grammar.quote_segment(name)}/"

    def fill(self, path: str, count: int) -> None:
        """Many events at once."""
        place = grammar.split_path(path.encode())[0]

        def insert(tx: Write) -> None:
            found = collections.lock(tx, self.identity.account_id, Kind.CALENDAR, place[2], count)
            blob_id = blobs.publish(tx, blobs.staged_bytes(b"x\r\n"))
            blobs.share(tx, blob_id, count - 1)
            tx.execute(
                sa.insert(t.object_),
                [
                    {
                        "collection_id": found.id,
                        "name": f"e{number:06}.ics",
                        "uid": f"e{number:06}",
                        "component": "VEVENT",
                        "seq": found.seq - count + 1 + number,
                        "modified_at": NOW,
                        "created_at": NOW,
                        "size": 3,
                        "content_type": "text/calendar; charset=utf-8; component=vevent",
                        "blob_id": blob_id,
                    }
                    for number in range(count)
                ],
            )
            collections.count_objects(tx, found.id, count)

        self.store.database.write(insert)


def _receiver(pieces: list[bytes]) -> Callable[[], Any]:
    async def receive() -> dict[str, Any]:
        if not pieces:
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.request", "body": pieces.pop(0), "more_body": True}

    return receive


async def whole(response: Response) -> Answer:
    """An answer with its body read to the end."""
    body = response.body
    pieces = 1
    if not isinstance(body, bytes):
        parts = [piece async for piece in body]
        pieces = len(parts)
        body = b"".join(parts)
    headers = {name.decode(): value.decode("latin-1") for name, value in response.headers}
    single = [name for name, _ in response.headers if name != b"vary"]  # a list: several lines are one
    assert len(set(single)) == len(single), "no header twice"
    return Answer(response.status, headers, body, pieces=pieces)


# -- content ----------------------------------------------------------------------------------------


def event(uid: str, *lines: str, start: str = "DTSTART:20260501T100000Z") -> str:
    return calendar(component("VEVENT", uid, start, *lines))


def component(kind: str, uid: str, *lines: str) -> str:
    return _lines(f"BEGIN:{kind}", f"UID:{uid}", "DTSTAMP:20260101T000000Z", *lines, f"END:{kind}")


def calendar(*components: str) -> str:
    head = _lines("BEGIN:VCALENDAR", "VERSION:2.0", "PRODID:-//example.org//tests//EN")
    return head + "".join(components) + _lines("END:VCALENDAR")


def card(uid: str, name: str, *lines: str, version: str = "3.0") -> str:
    head = ("BEGIN:VCARD", f"VERSION:{version}", f"UID:{uid}", f"FN:{name}")
    return _lines(*head, *lines, "END:VCARD")


def _lines(*lines: str) -> str:
    return "".join(f"{line}\r\n" for line in lines)
