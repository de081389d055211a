"""Requests put to the drive site in process: no socket, every piece of a body under control."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import msgspec
import sqlalchemy as sa

from ksync_server import settings
from ksync_server.auth.gate import DriveGrant, DriveTarget, Identity
from ksync_server.drive import tree
from ksync_server.drive.site import Site
from ksync_server.errors import ClientError, NotFound
from ksync_server.http import Body, Headers, Peer, Request, Response
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database, Read, Write
from ksync_server.wire import headers as grammar
from ksync_server.wire import xml

NOW = 1_700_000_000


@dataclass(frozen=True, slots=True)
class Drive:
    """A drive with its members alice and bob."""

    database: Database
    blobs: Blobs
    settings: settings.Settings
    alice: DriveGrant
    bob: DriveGrant

    def view(self, grant: DriveGrant | None = None, *, folders: bool = False, **changed: object) -> tree.View:
        """The drive as a member's program sees it, with some settings changed."""
        return tree.View(
            grant or self.alice, msgspec.structs.replace(self.settings.drive, **changed), folders
        )


def _insert(tx: Write, table: sa.Table, **values: object) -> int:
    result = tx.execute(sa.insert(table).values(**values).returning(table.c.id))
    return int(result.scalar_one())


def _root(tx: Write, drive_id: int) -> int:
    values = {"drive_id": drive_id, "name": "", "folder": True, "seq": 0, "mtime_ms": NOW * 1000}
    return _insert(tx, t.node, created_at=NOW, **values)


def make_drive(tx: Write, name: str = "Team files", *, quota_bytes: int | None = None) -> list[DriveGrant]:
    """A drive with two members; returns what the gate would grant each."""
    organization = _insert(tx, t.organization, name="Example", created_at=NOW)
    product = _insert(tx, t.product, organization_id=organization, offer="kdrive-team", created_at=NOW)
    collection = _insert(tx, t.collection, kind="drive", name=name, created_at=NOW)
    drive_id = _insert(
        tx, t.drive, product_id=product, collection_id=collection, name=name, common_id=0, created_at=NOW
    )
    common_id = _root(tx, drive_id)
    tx.execute(sa.update(t.drive).where(t.drive.c.id == drive_id).values(common_id=common_id))
    return [
        _member(tx, drive_id, collection, name, common_id, person, quota_bytes) for person in ("alice", "bob")
    ]


def _member(
    tx: Write, drive_id: int, collection: int, name: str, common_id: int, person: str, quota: int | None
) -> DriveGrant:
    email = f"{person}{drive_id}@example.org"
    account_id = _insert(
        tx,
        t.account,
        sync_id=f"{person[:2].upper()}{drive_id:05}",
        login_email=email,
        login_key=email,
        display_name=person,
        created_at=NOW,
    )
    root_id, trash_id = _root(tx, drive_id), _root(tx, drive_id)
    tx.execute(
        sa.insert(t.drive_member).values(
            drive_id=drive_id, account_id=account_id, root_id=root_id, trash_id=trash_id
        )
    )
    return DriveGrant(
        drive_id=drive_id,
        collection_id=collection,
        name=name,
        offer="kdrive-team",
        account_id=account_id,
        root_id=root_id,
        trash_id=trash_id,
        common_id=common_id,
        max_file_bytes=50 * 10**9,
        max_chunked_bytes=50 * 10**9,
        quota_bytes=quota,
        used_bytes=0,
    )


GONE = object()
"""In a list of pieces: the client closes the connection here."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def propstats(self) -> dict[str, dict[int, dict[str, xml.Element]]]:
        """Of a multistatus: href -> status -> property -> element."""
        found: dict[str, dict[int, dict[str, xml.Element]]] = {}
        for response in xml.parse(self.body).all("{DAV:}response"):
            href = response.find("{DAV:}href")
            assert href is not None
            assert href.text not in found
            statuses: dict[int, dict[str, xml.Element]] = found.setdefault(href.text, {})
            for propstat in response.all("{DAV:}propstat"):
                status, prop = propstat.find("{DAV:}status"), propstat.find("{DAV:}prop")
                assert status is not None
                assert prop is not None
                statuses[int(status.text.split()[1])] = {child.tag: child for child in prop.elements()}
        return found

    def hrefs(self) -> list[str]:
        return list(self.propstats())


class Gate:
    """The door without locks on it: members of the test's drive may do everything."""

    def __init__(self, grants: Iterable[DriveGrant]) -> None:
        self.grants = {grant.account_id: grant for grant in grants}
        self.asked: list[str] = []

    def authorize(self, tx: Read, identity: Identity, target: DriveTarget, verb: str) -> DriveGrant:
        self.asked.append(verb)
        grant = self.grants.get(identity.account_id)
        if grant is None or grant.drive_id != target.drive_id:
            raise NotFound("There is nothing at this address.")
        return grant


@dataclass(frozen=True, slots=True)
class Services:
    settings: settings.Settings
    database: Any
    blobs: Any
    gate: Gate


class Client:
    """A program of one member."""

    def __init__(
        self,
        drive: Drive,
        *,
        agent: str = "rclone/v1.75.2",
        base: str = "",
        bob: bool = False,
        **changed: Any,
    ) -> None:
        every = msgspec.structs.replace(
            drive.settings, drive=msgspec.structs.replace(drive.settings.drive, **changed)
        )
        self.drive = drive
        self.grant = drive.bob if bob else drive.alice
        self.gate = Gate([self.grant])
        self.site = Site(Services(every, drive.database, drive.blobs, self.gate))
        self.agent = agent
        self.base = base

    def granted(self, **changed: Any) -> None:
        """Change what the gate grants from now on."""
        self.grant = replace(self.grant, **changed)
        self.gate.grants = {self.grant.account_id: self.grant}

    def request(
        self,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        pieces: Iterable[object] = (),
        *,
        length: int | None = 0,
    ) -> Request:
        raw = path if path.startswith("/") and re.fullmatch(r"[!-~]+", path) else quote(path)
        segments, slash = grammar.split_path(raw.encode())
        sent = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
        if length is None:
            sent.append((b"transfer-encoding", b"chunked"))
        return Request(
            method=method,
            segments=segments,
            trailing_slash=slash,
            query="",
            headers=Headers(sent),
            peer=Peer("127.0.0.1", True, self.agent),
            body=Body(_receiver(list(pieces)), length),
            scheme="https",
            authority="files.example.org",
            base=self.base,
            context={"drive_id": self.grant.drive_id},
        )

    @property
    def identity(self) -> Identity:
        return Identity(
            self.grant.account_id, "AL00001", "alice@example.org", "Alice", frozenset({"drive"}), None
        )

    async def answer(self, request: Request) -> Answer:
        response = await self.site.handle(request, self.identity)
        return await whole(response)

    def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        chunked: bool = False,
        pieces: Iterable[object] | None = None,
        length: int | None = None,
        **headers: str,
    ) -> Answer:
        """One request; header names with `_` for `-`. Errors of the tree of errors come out as answers."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        parts = [body] if pieces is None else list(pieces)
        declared = None if chunked else len(body) if length is None else length

        async def run() -> Answer:
            try:
                return await self.answer(self.request(method, path, sent, parts, length=declared))
            except ClientError as error:
                return Answer(
                    error.status,
                    {name.decode(): value.decode() for name, value in error.headers},
                    f"{error.precondition or ''} {error.text}".encode(),
                )

        return asyncio.run(run())

    def put(self, path: str, content: bytes = b"content", **headers: str) -> Answer:
        return self.send("PUT", path, content, **headers)

    def propfind(self, path: str, *names: str, depth: str = "1", **headers: str) -> Answer:
        inner = "".join(xml.empty(name) for name in names)
        body = f"<d:propfind{xml.NAMESPACES}><d:prop>{inner}</d:prop></d:propfind>" if names else ""
        return self.send("PROPFIND", path, body.encode(), depth=depth, **headers)


def _receiver(pieces: list[object]) -> Callable[[], Any]:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        if not pieces:
            return {"type": "http.request", "body": b"", "more_body": False}
        piece = pieces.pop(0)
        if piece is GONE:
            return {"type": "http.disconnect"}
        if callable(piece):
            piece = await piece()
        return {"type": "http.request", "body": piece, "more_body": True}

    return receive


async def whole(response: Response) -> Answer:
    body = response.body
    if not isinstance(body, bytes):
        body = b"".join([piece async for piece in body])
    headers = {name.decode(): value.decode("latin-1") for name, value in response.headers}
    assert len(headers) == len(response.headers), "no header twice"
    return Answer(response.status, headers, body)


@contextlib.contextmanager
def closing(client: Client) -> Iterator[Client]:
    """End the threads of a client's site."""
    try:
        yield client
    finally:
        client.site.close()


async def take(source: AsyncIterator[bytes], count: int) -> list[bytes]:
    """The first pieces of a stream."""
    return [await anext(source) for _ in range(count)]
