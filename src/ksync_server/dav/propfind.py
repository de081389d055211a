"""PROPFIND: which resources are answered, read in key-set pages; how each looks is in properties.py."""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator, Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from ksync_server import webdav
from ksync_server.auth.gate import HomeGrant, Identity
from ksync_server.dav import answers, collections, objects, places, properties
from ksync_server.dav.collections import Collection
from ksync_server.dav.places import Kind, Level, Place
from ksync_server.dav.properties import Asked, Listed
from ksync_server.dav.services import Services
from ksync_server.errors import DAV, Forbidden, NotFound
from ksync_server.http import Request, Response, xml
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Row
from ksync_server.wire import headers as grammar

_NAME = 0  # column of `objects.COLUMNS`
_EVERY_COLUMN = tuple(range(len(objects.COLUMNS)))
_O = t.object_.c
_P = sa.bindparam


@lru_cache(maxsize=64)
def _members(columns: tuple[int, ...]) -> sa.Select[Any]:
    """The members after a name, some of their columns."""
    return (
        sa.select(*[objects.COLUMNS[column] for column in columns])
        .where(_O.collection_id == _P("collection_id"), _O.name > _P("after"))
        .order_by(_O.name)
        .limit(_P("most"))
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    """A collection as the first read found it."""

    asked: Asked
    collection: Collection
    root: str  # its own response
    rows: list[Row]  # first page of members
    key: Hashable  # of the body
    body: bytes | None  # rendered before


class Propfind:
    """PROPFIND of the sync host for one process."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._settings = services.settings
        self._page = services.settings.dav.sync_page_rows
        self._cache = answers.BodyCache(services.settings.dav.body_cache_bytes)

    async def answer(self, request: Request, identity: Identity, place: Place) -> Response:
        """Answer a PROPFIND.

        Raises:
            Forbidden: propfind-finite-depth; or not in the secret's scope.
            NotFound: nothing there, or nothing for this identity.
            BadRequest: a body that is none.

        Spec: RFC 4918 §9.1, RFC 8144 §2.1, §3.
        Cost: a listing of 10,000 members is some 15 ms of CPU at its first time, then a look-up while the
            collection does not change.
        """
        body = await webdav.read_xml(request, self._settings.xml)
        find = webdav.parse_propfind(body)
        depth = webdav.depth(request)
        if depth > 1 and place.level is not Level.OBJECT:
            raise Forbidden("Ask with Depth 0 or 1.", precondition=DAV + "propfind-finite-depth")
        prefer = webdav.prefer(request)
        root = not (prefer.depth_noroot and depth == 1)
        database = self._services.database

        def ask(tx: Read) -> Asked:
            return Asked(request, identity, self._settings, tx.generation, find, prefer.minimal)

        headers = webdav.applied(prefer, minimal=True, noroot=depth == 1)
        if place.level is Level.COLLECTION and depth == 1:
            response = await self._members(ask, place, root=root)
        else:
            read = database.reading if place.level is Level.HOME and depth == 1 else database.hot
            found = await read(lambda tx: self._whole(tx, ask(tx), place, root=root, members=depth == 1))
            response = xml(207, webdav.multistatus(found))
        response.headers += headers
        return response

    def _grant(self, tx: Read, asked: Asked, place: Place) -> HomeGrant:
        return self._services.gate.authorize(tx, asked.identity, place.target(asked.identity), "PROPFIND")

    # -- everything but members of a collection -----------------------------------------------------

    def _whole(self, tx: Read, asked: Asked, place: Place, *, root: bool, members: bool) -> list[str]:
        grant = self._grant(tx, asked, place)
        match place.level:
            case Level.COLLECTION:
                found = self._listed(tx, asked, grant, place)
                return [properties.Collections(asked, found.collection.kind).response(found)]
            case Level.OBJECT:
                return [self._object(tx, asked, grant, place)]
            case Level.HOME:
                kind = _kind(place)
                own = [properties.fixed(asked, place.level, places.home(asked.request, kind, grant.sync_id))]
                return (own if root else []) + (self._home(tx, asked, grant, kind) if members else [])
            case Level.BELOW:
                raise NotFound("There is nothing at this address.")
            case _:
                tree = _fixed_tree(asked.request, place, grant.sync_id)
                chosen = tree[0 if root else 1 : None if members else 1]
                return [properties.fixed(asked, level, href) for level, href in chosen]

    def _listed(self, tx: Read, asked: Asked, grant: HomeGrant, place: Place) -> Listed:
        kind = _kind(place)
        found = collections.get(tx, grant.account_id, kind, place.collection)
        if asked.find.kind == "prop" and not _asks_stored(asked, kind):
            return Listed(found, {})
        return Listed(found, collections.properties(tx, found.id))

    def _home(self, tx: Read, asked: Asked, grant: HomeGrant, kind: Kind) -> list[str]:
        stored = collections.home_properties(tx, grant.account_id, kind)
        entries = properties.Collections(asked, kind)
        return [
            entries.response(Listed(found, stored.get(found.id, {})))
            for found in collections.list_home(tx, grant.account_id, kind)
        ]

    def _object(self, tx: Read, asked: Asked, grant: HomeGrant, place: Place) -> str:
        kind = _kind(place)
        collection = collections.get(tx, grant.account_id, kind, place.collection)
        found = objects.find(tx, collection.id, place.object)
        if found is None:
            raise NotFound("There is no such object.")
        href = places.collection(asked.request, kind, grant.sync_id, collection.name)
        return properties.Objects(asked, collection, href).response(found)

    # -- members of a collection --------------------------------------------------------------------

    async def _members(self, ask: Callable[[Read], Asked], place: Place, *, root: bool) -> Response:
        opened = await self._services.database.hot(lambda tx: self._open(tx, ask(tx), place, root=root))
        if opened.body is not None:
            return await self._cached(opened)
        return await answers.multistatus(self._pieces(opened), [])

    def _open(self, tx: Read, asked: Asked, place: Place, *, root: bool) -> _Opened:
        grant = self._grant(tx, asked, place)
        kind = _kind(place)
        collection = collections.get(tx, grant.account_id, kind, place.collection)
        href = places.collection(asked.request, kind, grant.sync_id, collection.name)
        version = (asked.generation, collection.id, collection.seq)
        whose = (grant.account_id, asked.identity.read_only)
        key = (*version, whose, href, asked.find, asked.minimal, root)
        body = self._cache.get(key)
        if body is not None:
            return _Opened(asked, collection, "", [], key, body)
        entries = properties.Objects(asked, collection, href)
        own = ""
        if root:
            listed = Listed(collection, collections.properties(tx, collection.id))
            own = properties.Collections(asked, kind).response(listed)
        return _Opened(asked, collection, own, self._rows(tx, entries, collection.id, ""), key, None)

    def _rows(self, tx: Read, entries: properties.Objects, collection_id: int, after: str) -> list[Row]:
        values = {"collection_id": collection_id, "after": after, "most": self._page}
        return tx.fast(_members(entries.columns or _EVERY_COLUMN), values)

    async def _pieces(self, opened: _Opened) -> AsyncGenerator[str, None]:
        """The body, a page at a time; kept afterwards if nothing changed while it was read."""
        database = self._services.database
        asked, collection = opened.asked, opened.collection
        href = places.collection(asked.request, collection.kind, asked.identity.sync_id, collection.name)
        entries = properties.Objects(asked, collection, href)
        kept: list[str] | None = []
        size = 0
        rows = opened.rows
        piece = webdav.OPEN + opened.root
        while True:
            piece += entries.page(rows) if entries.columns else "".join(map(entries.response, rows))
            last = len(rows) < self._page
            piece += webdav.CLOSE if last else ""
            size += len(piece)
            if kept is not None:
                kept.append(piece)
                kept = kept if size <= self._cache.largest else None
            yield piece
            if last:
                break
            after = rows[-1][_NAME]
            rows = await database.hot(lambda tx, after=after: self._rows(tx, entries, collection.id, after))  # type: ignore[misc]
            piece = ""
        if kept is not None and len(kept) > 1:
            now = await database.hot(
                lambda tx: collections.find(tx, collection.account_id, collection.kind, collection.name)
            )
            if now is not None and (now.id, now.seq) == (collection.id, collection.seq):
                self._cache.put(opened.key, "".join(kept).encode("utf-8"))

    async def _cached(self, opened: _Opened) -> Response:
        """A kept body; compressed at most once."""
        assert opened.body is not None
        if not grammar.accepts_gzip(opened.asked.request.headers.joined("accept-encoding")):
            return xml(207, opened.body)
        packed = self._cache.get((opened.key, "gzip"))
        if packed is None:
            packed = await self._services.database.pooled(zlib.compress, opened.body, 1, 31)
            self._cache.put((opened.key, "gzip"), packed)
        response = xml(207, packed)
        response.headers += [(b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")]
        return response


def _kind(place: Place) -> Kind:
    assert place.kind is not None
    return place.kind


def _asks_stored(asked: Asked, kind: Kind) -> bool:
    """Whether a property is asked that clients may have stored."""
    live = properties.LIVE[kind]
    return any(name not in live or name in properties.SETTABLE for name in asked.find.names)


def _fixed_tree(request: Request, place: Place, sync_id: str) -> list[tuple[Level, str]]:
    """A resource that every account has, and its members."""
    principal = (Level.PRINCIPAL, places.principal(request, sync_id))
    if place.level is Level.PRINCIPAL:
        return [principal]
    segments = [places.PRINCIPALS, *(kind.segment for kind in Kind)]
    if place.level is Level.ROOT:
        branches = [(Level.BRANCH, request.href((segment,), folder=True)) for segment in segments]
        return [(Level.ROOT, request.href((), folder=True)), *branches]
    if place.kind is None:
        return [(Level.BRANCH, request.href((places.PRINCIPALS,), folder=True)), principal]
    return [
        (Level.BRANCH, request.href((place.kind.segment,), folder=True)),
        (Level.HOME, places.home(request, place.kind, sync_id)),
    ]
