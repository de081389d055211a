"""REPORT: which one it is, what it asks, and the answer, streamed.

Which objects match a query is decided in queries.py, what changed since a token in sync.py; this module reads
the requests and writes the rows.
"""

from __future__ import annotations

import datetime
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server import webdav
from ksync_server.auth.gate import Identity
from ksync_server.dav import answers, collections, data, filters, objects, places, properties, queries, sync
from ksync_server.dav.collections import Collection
from ksync_server.dav.places import Kind, Level, Place
from ksync_server.dav.properties import Asked
from ksync_server.dav.services import Services
from ksync_server.dav.turns import Pool, Turns
from ksync_server.errors import CALDAV, CARDDAV, DAV, BadRequest, Forbidden, NotFound
from ksync_server.http import Request, Response, xml
from ksync_server.store import tables as t
from ksync_server.store.blobs import Content
from ksync_server.store.database import Read, Row
from ksync_server.wire import timezones
from ksync_server.wire.headers import Prefer, quote_segment
from ksync_server.wire.xml import Element

_TOO_MANY = DAV + "number-of-matches-within-limits"
_SEQ, _BLOB = 1, 6  # columns of `objects.COLUMNS`
_NAMES_AT_ONCE = 100  # of a multiget, in one read
_ROWS_WITH_DATA = 50  # changed members read at once when their content is asked, too
_PIECE = 64 * 1024  # text sent at once

_O = t.object_.c
_P = sa.bindparam
_BY_NAME = {
    count: sa.select(*objects.COLUMNS).where(
        _O.collection_id == _P("collection_id"), sa.or_(*[_O.name == _P(f"n{at}") for at in range(count)])
    )
    for count in (10, _NAMES_AT_ONCE)
}


@dataclass(frozen=True, slots=True)
class Report:
    """A report on a collection that exists and has it."""

    request: Request
    identity: Identity
    place: Place
    body: Element
    collection: Collection
    href: str  # of the collection, encoded
    zone: datetime.tzinfo  # of the collection
    prefer: Prefer
    generation: str  # of the store

    @property
    def kind(self) -> Kind:
        """Calendar or address book."""
        return self.collection.kind


@dataclass(frozen=True, slots=True)
class _Changed:
    """Some of the changed members of a sync answer."""

    rows: Sequence[Row]
    contents: dict[int, Content]  # by blob
    until: int  # the change number they end with


class Reports:
    """REPORT of the sync host for one process."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._settings = services.settings
        self._database = services.database
        self._turns = Turns(services.database, services.settings.dav.reports_at_once)

    async def answer(self, request: Request, identity: Identity, place: Place) -> Response:
        """Answer a REPORT.

        Raises:
            Forbidden: supported-report: not one that this resource has; or what the report itself refuses.
            NotFound: nothing there, or nothing for this identity.
            BadRequest: a body that is none.

        Spec: RFC 3253 §3.6 and that of each report.
        """
        body = await webdav.read_xml(request, self._settings.xml)
        if body is None:
            raise BadRequest("A REPORT has a body that names it.")
        if body.tag == DAV + "sync-collection" and place.level is Level.COLLECTION:
            return await self._sync(request, identity, place, body)
        report = await self._database.hot(lambda tx: self._open(tx, request, identity, place, body))
        match body.tag.rpartition("}")[2]:
            case "calendar-multiget" | "addressbook-multiget":
                return await self._multiget(report)
            case "calendar-query":
                return await self._calendar_query(report)
            case "addressbook-query":
                return await self._card_query(report)
            case _:
                return await self._free_busy(report)

    # -- opening ------------------------------------------------------------------------------------

    def _open(self, tx: Read, request: Request, identity: Identity, place: Place, body: Element) -> Report:
        collection, href = self._collection(tx, request, identity, place)
        if body.tag not in properties.COLLECTION_REPORTS[collection.kind]:
            raise _unsupported()
        zone: datetime.tzinfo = datetime.UTC
        if collection.kind is Kind.CALENDAR:
            zone = collections.zone(collections.properties(tx, collection.id))
        prefer = webdav.prefer(request)
        return Report(request, identity, place, body, collection, href, zone, prefer, tx.generation)

    def _collection(
        self, tx: Read, request: Request, identity: Identity, place: Place
    ) -> tuple[Collection, str]:
        """The collection of a request and its href.

        Raises:
            Forbidden: supported-report: it is no collection.
        """
        grant = self._services.gate.authorize(tx, identity, place.target(identity), "REPORT")
        if place.level is Level.BELOW:
            raise NotFound("There is nothing at this address.")
        if place.kind is None or not place.collection:
            raise _unsupported()
        collection = collections.get(tx, grant.account_id, place.kind, place.collection)
        if place.object:
            if objects.find(tx, collection.id, place.object) is None:
                raise NotFound("There is no such object.")
            raise _unsupported()
        return collection, places.collection(request, place.kind, grant.sync_id, collection.name)

    def _pool(self, report: Report) -> Pool:
        return self._turns.of(report.collection.account_id)

    def _entries(self, report: Report, wanted: data.DataRequest | None) -> properties.Objects:
        asked = Asked(
            report.request,
            report.identity,
            self._settings,
            report.generation,
            _find(report.body),
            report.prefer.minimal,
        )
        return properties.Objects(asked, report.collection, report.href, wanted)

    async def _send(self, report: Report, pieces: AsyncGenerator[str, None]) -> Response:
        return await answers.multistatus(pieces, webdav.applied(report.prefer, minimal=True))

    # -- content ------------------------------------------------------------------------------------

    async def _with_content(
        self,
        rows: Sequence[Row],
        contents: dict[int, Content],
        entries: properties.Objects,
        renderer: data.Renderer,
        pool: Pool,
    ) -> AsyncGenerator[str, None]:
        """Responses with the content of each object, in pieces of some 64 KiB or one object."""
        pieces: list[str] = []
        size = 0
        for row in rows:
            where = contents[row[_BLOB]]
            payload = await self._payload(where, renderer, pool)
            pieces.append(entries.response(row, payload))
            size += len(pieces[-1])
            if size > _PIECE:
                yield "".join(pieces)
                pieces, size = [], 0
        yield "".join(pieces)

    async def _payload(self, where: Content, renderer: data.Renderer, pool: Pool) -> data.Payload:
        if where.content is not None and renderer.is_quick:
            return renderer.payload(where.content)
        blobs = self._services.blobs
        async with pool.turn():
            return await blobs.pooled(lambda: renderer.payload(objects.read(blobs, where)))

    # -- sync-collection ----------------------------------------------------------------------------

    async def _sync(self, request: Request, identity: Identity, place: Place, body: Element) -> Response:
        """RFC 6578. Depth is 0; 1 is taken for it, since Thunderbird once sent that."""
        if webdav.depth(request, 0) > 1:
            raise BadRequest("A sync-collection has Depth 0.")
        assert place.kind is not None
        asked = sync.parse(body, place.kind)
        most = self._settings.dav.max_sync_rows

        zone: datetime.tzinfo = datetime.UTC

        def open_(tx: Read) -> tuple[Collection, str, sync.SyncPage, _Changed, str]:
            nonlocal zone
            collection, href = self._collection(tx, request, identity, place)
            if asked.data is not None and asked.data.needs_zone:
                zone = collections.zone(collections.properties(tx, collection.id))
            page = sync.page(tx, collection, asked, most)
            # The first rows in the same snapshot: a short answer must hold what its token stands for.
            return collection, href, page, self._changed(tx, page, page.after, asked), tx.generation

        collection, href, page, first, generation = await self._database.hot(open_)
        prefer = webdav.prefer(request)
        if page.after == page.until and not page.deleted:
            response = xml(207, f"{webdav.OPEN}{_token(page.token)}{webdav.CLOSE}")
            response.headers += webdav.applied(prefer, minimal=True)
            return response
        report = Report(request, identity, place, body, collection, href, zone, prefer, generation)
        return await self._send(report, self._changes(report, asked, page, first))

    async def _changes(
        self, report: Report, asked: sync.SyncRequest, page: sync.SyncPage, changed: _Changed
    ) -> AsyncGenerator[str, None]:
        """Changed members, removed members, 507 where the answer ends early, and the token."""
        entries = self._entries(report, asked.data)
        renderer = data.Renderer(asked.data, report.zone, self._settings.dav) if asked.data else None
        pool = self._pool(report)
        yield webdav.OPEN
        while True:
            if renderer is None:
                yield "".join([entries.response(row) for row in changed.rows])
            else:
                async for piece in self._with_content(
                    changed.rows, changed.contents, entries, renderer, pool
                ):
                    yield piece
            after = changed.until
            if after >= page.until:
                break
            changed = await self._database.hot(
                lambda tx, after=after: self._changed(tx, page, after, asked)  # type: ignore[misc]
            )
        tail = [webdav.failed(report.href + quote_segment(name), 404) for name in page.deleted]
        if page.truncated:
            tail.append(webdav.failed(report.href, 507, _TOO_MANY))
        yield f"{''.join(tail)}{_token(page.token)}{webdav.CLOSE}"

    def _changed(self, tx: Read, page: sync.SyncPage, after: int, asked: sync.SyncRequest) -> _Changed:
        """Some changed members after a number, and where their content is if it is asked."""
        if after >= page.until:
            return _Changed((), {}, page.until)
        most = _ROWS_WITH_DATA if asked.data else self._settings.dav.sync_page_rows
        rows = sync.rows(tx, page, after, most)
        contents = queries.contents_of(tx, [row[_BLOB] for row in rows]) if asked.data else {}
        return _Changed(rows, contents, rows[-1][_SEQ] if len(rows) == most else page.until)

    # -- multiget -----------------------------------------------------------------------------------

    async def _multiget(self, report: Report) -> Response:
        """RFC 4791 §7.9, RFC 6352 §8.7. Depth does not matter."""
        wanted = data.find(report.kind, report.body.find(DAV + "prop"))
        hrefs = list(dict.fromkeys(child.text.strip() for child in report.body.all(DAV + "href")))
        if len(hrefs) > self._settings.xml.max_hrefs:
            raise Forbidden(f"At most {self._settings.xml.max_hrefs} hrefs.", precondition=_TOO_MANY)
        return await self._send(report, self._named(report, hrefs, wanted))

    async def _named(
        self, report: Report, hrefs: list[str], wanted: data.DataRequest | None
    ) -> AsyncGenerator[str, None]:
        """A response for each href: the object, or 404."""
        entries = self._entries(report, wanted)
        renderer = data.Renderer(wanted, report.zone, self._settings.dav) if wanted else None
        told: set[str] = set()
        pool = self._pool(report)
        yield webdav.OPEN
        for batch in _batches(hrefs, _NAMES_AT_ONCE):
            names = {href: _member(report, href) for href in batch}
            asked = [name for name in dict.fromkeys(names.values()) if name and name not in told]
            rows, contents = await self._named_rows(report, asked, with_data=wanted is not None)
            told.update(rows)
            missing = [href for href, name in names.items() if name not in told]
            found = [rows[name] for name in asked if name in rows]
            if renderer is None:
                yield "".join([entries.response(row) for row in found])
            else:
                async for piece in self._with_content(found, contents, entries, renderer, pool):
                    yield piece
            yield "".join([webdav.failed(href, 404) for href in missing])
        yield webdav.CLOSE

    async def _named_rows(
        self, report: Report, asked: list[str], *, with_data: bool
    ) -> tuple[dict[str, Row], dict[int, Content]]:
        """Rows by name, and where their content is if it is asked."""
        if not asked:
            return {}, {}
        count = next(count for count in _BY_NAME if count >= len(asked))
        values = {f"n{at}": name for at, name in enumerate(asked + asked[-1:] * (count - len(asked)))}

        def read(tx: Read) -> tuple[dict[str, Row], dict[int, Content]]:
            rows = tx.fast(_BY_NAME[count], {"collection_id": report.collection.id, **values})
            contents = queries.contents_of(tx, [row[_BLOB] for row in rows]) if with_data else {}
            return {row[0]: row for row in rows}, contents

        return await self._database.hot(read)

    # -- queries ------------------------------------------------------------------------------------

    async def _calendar_query(self, report: Report) -> Response:
        """RFC 4791 §7.8. A calendar holds no collections, so that Depth 1 and infinity are the same."""
        element = report.body.find(CALDAV + "filter")
        if element is None:
            raise Forbidden("A calendar-query has a filter.", precondition=CALDAV + "valid-filter")
        wanted = data.find(report.kind, report.body.find(DAV + "prop"))
        filter_ = filters.parse_calendar_filter(element)
        asked_zone = _asked_zone(report.body)
        zone = asked_zone or report.zone
        query = queries.CalendarQuery(
            self._settings.dav,
            self._pool(report),
            self._services.blobs,
            report.collection,
            filter_,
            zone,
            zone_is_own=zone is report.zone,
        )
        renderer = data.Renderer(wanted, zone, self._settings.dav) if wanted else None
        return await self._send(report, self._matches(report, query, wanted, renderer, None))

    async def _card_query(self, report: Report) -> Response:
        """RFC 6352 §8.6."""
        element = report.body.find(CARDDAV + "filter")
        if element is None:
            raise Forbidden("An addressbook-query has a filter.", precondition=CARDDAV + "supported-filter")
        wanted = data.find(report.kind, report.body.find(DAV + "prop"))
        query = queries.CardQuery(
            self._pool(report),
            self._services.blobs,
            report.collection,
            filters.parse_card_filter(element),
        )
        renderer = data.Renderer(wanted, report.zone, self._settings.dav) if wanted else None
        limit = _limit(report.body)
        return await self._send(report, self._matches(report, query, wanted, renderer, limit))

    async def _matches(
        self,
        report: Report,
        query: queries.CalendarQuery | queries.CardQuery,
        wanted: data.DataRequest | None,
        renderer: data.Renderer | None,
        limit: int | None,
    ) -> AsyncGenerator[str, None]:
        """A response for each match; 507 for the collection where a limit cut the answer."""
        entries = self._entries(report, wanted)
        left = limit
        yield webdav.OPEN
        async for page in query.matches(with_data=renderer is not None):
            told = page if left is None else page[:left]
            yield await self._told(told, entries, renderer, self._pool(report))
            if left is not None:
                if len(page) > left:
                    yield webdav.failed(report.href, 507, _TOO_MANY)
                    break
                left -= len(page)
        yield webdav.CLOSE

    async def _told(
        self,
        page: Sequence[queries.Match],
        entries: properties.Objects,
        renderer: data.Renderer | None,
        pool: Pool,
    ) -> str:
        if renderer is None:
            return "".join([entries.response(match.object) for match in page])

        def render() -> str:
            assert renderer is not None
            return "".join(
                [entries.response(match.object, renderer.payload(match.data or b"")) for match in page]
            )

        return render() if renderer.is_quick else await pool.pooled(render)

    async def _free_busy(self, report: Report) -> Response:
        """RFC 4791 §7.10."""
        element = report.body.find(CALDAV + "time-range")
        if element is None:
            raise BadRequest("A free-busy-query has a time-range.")
        asked = filters.parse_range(element, BadRequest)
        if asked.start is None or asked.end is None:
            raise BadRequest("The time-range of a free-busy-query has a start and an end.")
        text = await queries.free_busy(
            self._settings.dav,
            self._pool(report),
            self._services.blobs,
            report.collection,
            asked,
            report.zone,
            datetime.datetime.now(datetime.UTC),
        )
        return Response(200, [(b"content-type", b"text/calendar; charset=utf-8")], text.encode("utf-8"))


def _unsupported() -> Forbidden:
    return Forbidden("This resource has no such report.", precondition=DAV + "supported-report")


def _token(token: str) -> str:
    return f"<d:sync-token>{token}</d:sync-token>"


def _find(body: Element) -> webdav.Propfind:
    """What a report asks of each object: as PROPFIND, but without it nothing."""
    prop = body.find(DAV + "prop")
    if prop is not None:
        return webdav.Propfind("prop", tuple(dict.fromkeys(child.tag for child in prop.elements())))
    if body.find(DAV + "propname") is not None:
        return webdav.Propfind("propname")
    return webdav.Propfind("allprop") if body.find(DAV + "allprop") else webdav.Propfind("prop")


def _batches(hrefs: list[str], count: int) -> Iterator[list[str]]:
    for at in range(0, len(hrefs), count):
        yield hrefs[at : at + count]


def _member(report: Report, href: str) -> str | None:
    """The name of a member of the report's collection, None for anything else."""
    try:
        segments = webdav.local_segments(report.request, href)
        place = places.parse(segments) if segments is not None else None
    except (BadRequest, NotFound):
        return None
    own = (report.kind, report.identity.sync_id, report.collection.name)
    if place is None or (place.kind, place.owner.upper(), place.collection) != own:
        return None
    return place.object or None


def _limit(body: Element) -> int | None:
    """nresults of an addressbook-query (RFC 6352 §10.6)."""
    limit = body.find(CARDDAV + "limit")
    rows = limit.find(CARDDAV + "nresults") if limit else None
    if rows is None:
        return None
    text = rows.text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise BadRequest("nresults is a number from 1.")
    return int(text)


def _asked_zone(body: Element) -> datetime.tzinfo | None:
    """The time zone that a calendar-query brings along, None where it brings none.

    Raises:
        Forbidden: valid-calendar-data, or valid-timezone for an unknown name.

    Spec: RFC 4791 §9.8, RFC 7809 §4.1.
    """
    text, name = body.find(CALDAV + "timezone"), body.find(CALDAV + "timezone-id")
    if text is not None:
        zone = collections.zone_in(text.text)
        if zone is None:
            raise Forbidden("The timezone is none.", precondition=CALDAV + "valid-calendar-data")
        return zone
    if name is not None:
        zone = timezones.named_zone(name.text.strip())
        if zone is None:
            raise Forbidden("The time zone is not known.", precondition=CALDAV + "valid-timezone")
        return zone
    return None
