"""calendar-query, addressbook-query and free-busy-query: which objects match, page by page.

A month costs a month: the rows' time spans and the occurrence index decide nearly everything without
looking at content. What they cannot decide is decided on the object itself, in the pool, within the
recurrence budget; an object that exhausts it counts as a match, since a superset loses nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server.dav import filters, objects, occurrences
from ksync_server.dav.collections import Collection
from ksync_server.dav.filters import CardFilter, CompFilter, TimeRange
from ksync_server.dav.objects import StoredObject
from ksync_server.errors import DAV, ClientError, Forbidden
from ksync_server.store import blobs as store
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs, Content
from ksync_server.store.database import Database, Read, Row, Write
from ksync_server.wire import contentline, ical, recurrence, vcard

_PAGE = 200  # rows of one read transaction
_HORIZON_YEARS_S = 4 * 366 * 86400  # longer ranges are not answered from the index
_EXHAUSTED = 20  # objects of one request that may use up their budget; the rest count as matches
_LOWEST, _HIGHEST = -(1 << 62), 1 << 62

_O = t.object_.c
_P = sa.bindparam
_COLUMNS = len(objects.COLUMNS)
_PAGE_OF_CALENDAR = (
    sa.select(
        *objects.COLUMNS,
        _O.first_at,
        _O.last_at,
        _O.recurring,
        _O.floating,
        t.occurrence.c.seq,
        t.occurrence.c.from_at,
        t.occurrence.c.until_at,
        t.occurrence.c.packed,
        t.occurrence.c.complete,
    )
    .select_from(t.object_.outerjoin(t.occurrence, t.occurrence.c.object_id == _O.id))
    .where(
        _O.collection_id == _P("collection_id"),
        _O.id > _P("after"),
        sa.or_(_O.first_at.is_(None), _O.first_at <= _P("until", type_=sa.BigInteger)),
        sa.or_(_O.last_at.is_(None), _O.last_at >= _P("since", type_=sa.BigInteger)),
    )
    .order_by(_O.id)
    .limit(_PAGE)
)
_PAGE_OF_CARDS = (
    sa.select(*objects.COLUMNS, _O.folded)
    .where(_O.collection_id == _P("collection_id"), _O.id > _P("after"))
    .order_by(_O.id)
    .limit(_PAGE)
)


@dataclass(frozen=True, slots=True)
class Match:
    """An object that satisfies the query; `data` where it was asked for or had to be read."""

    object: StoredObject
    data: bytes | None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A row that the time span could not rule out."""

    object: StoredObject
    first_at: int | None
    last_at: int | None
    recurring: bool
    floating: bool
    index: occurrences.Index | None


def _candidate(row: Row) -> _Candidate:
    stored = objects.stored_object(row[:_COLUMNS])
    first_at, last_at, recurring, floating, seq, from_at, until_at, packed, complete = row[_COLUMNS:]
    index = None
    if seq is not None:
        index = occurrences.Index(seq, from_at, until_at, bytes(packed), bool(complete))
    return _Candidate(stored, first_at, last_at, bool(recurring), bool(floating), index)


@dataclass(frozen=True, slots=True)
class _Span:
    """A time range in Unix seconds, open sides far away."""

    start: int
    end: int

    @staticmethod
    def of(wanted: TimeRange | None) -> _Span:
        if wanted is None:
            return _Span(_LOWEST, _HIGHEST)
        return _Span(
            recurrence.seconds_of(wanted.start, _LOWEST), recurrence.seconds_of(wanted.end, _HIGHEST)
        )

    @property
    def indexed(self) -> bool:
        """Whether an index with a horizon can cover it."""
        return self.end - self.start <= _HORIZON_YEARS_S


class CalendarQuery:
    """One calendar-query over one calendar.

    Args:
        zone: for floating times and dates: the query's, else the calendar's.
        zone_is_own: whether it is the calendar's own, which the stored indexes were computed with.
    """

    def __init__(
        self,
        settings: configuration.Dav,
        database: Database,
        blobs: Blobs,
        collection: Collection,
        wanted: CompFilter,
        zone: datetime.tzinfo,
        *,
        zone_is_own: bool,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._collection = collection
        self._wanted = wanted
        self._zone = zone
        self._zone_is_own = zone_is_own
        self._settings = settings
        self._budget = objects.budget(settings)
        self._limits = objects.calendar_limits(settings)
        self._exhausted = 0
        self._span = _Span.of(_only_range(wanted))
        self._plain = _is_plain(wanted)

    async def matches(self, *, with_data: bool) -> AsyncIterator[list[Match]]:
        """Matching objects in pages, each from one snapshot; no transaction is open between them.

        Spec: RFC 4791 §7.8. Cost: one index range over the objects' ids and the candidates in it.
        """
        after = 0
        while True:
            found, contents, last = await self._database.reading(
                lambda tx, after=after: self._read(tx, after, with_data)  # type: ignore[misc]
            )
            if found:
                yield await self._database.pooled(self._decide, found, contents)
            if last is None:
                return
            after = last

    def _read(
        self, tx: Read, after: int, with_data: bool
    ) -> tuple[list[tuple[_Candidate, bool | None]], dict[int, Content], int | None]:
        """A page of candidates with the verdict of their rows, and the content of those that need it."""
        rows = tx.fast(
            _PAGE_OF_CALENDAR,
            {
                "collection_id": self._collection.id,
                "after": after,
                "until": self._span.end,
                "since": self._span.start,
            },
        )
        judged = [(candidate, self._judge(candidate)) for candidate in map(_candidate, rows)]
        found: list[tuple[_Candidate, bool | None]] = [each for each in judged if each[1] is not False]
        needed = [candidate.object.blob_id for candidate, verdict in found if with_data or verdict is None]
        contents = contents_of(tx, needed)
        return found, contents, judged[-1][0].object.id if len(rows) == _PAGE else None

    def _judge(self, candidate: _Candidate) -> bool | None:
        """True or False where the row and the index say so, None where the object must be read."""
        stored = candidate.object
        if not self._plain:
            return None
        if stored.component != self._wanted.comps[0].name:
            return False
        span = self._span
        if span.start == _LOWEST and span.end == _HIGHEST:
            return True
        if not candidate.recurring:
            if stored.component == "VEVENT" and not candidate.floating:
                return _overlaps(candidate, span)
            return None
        usable = candidate.index is not None and (self._zone_is_own or not candidate.floating)
        if (
            usable
            and candidate.index is not None
            and candidate.index.covers(stored.seq, span.start, span.end)
        ):
            if stored.component == "VEVENT":
                return candidate.index.hits(span.start, span.end)
            return None
        return None

    def _decide(
        self, found: Iterable[tuple[_Candidate, bool | None]], contents: dict[int, Content]
    ) -> list[Match]:
        matches = []
        for candidate, verdict in found:
            where = contents.get(candidate.object.blob_id)
            data = None if where is None else objects.read(self._blobs, where)
            if verdict is None:
                assert data is not None
                verdict = self._evaluate(candidate, data)
            if verdict:
                matches.append(Match(candidate.object, data))
        return matches

    def _evaluate(self, candidate: _Candidate, data: bytes) -> bool:
        """The filter on the object itself; computes the index it lacked on the way."""
        try:
            found = ical.check_object(ical.parse(data, self._limits), self._limits)
        except contentline.BadContent:
            return False  # stored under wider limits than today's; it cannot be shown to match
        if self._exhausted >= _EXHAUSTED:
            return True
        try:
            verdict = filters.matches_calendar(self._wanted, found, self._zone, self._budget)
        except recurrence.TooManySteps:
            self._exhausted += 1
            verdict = True
        self._index(candidate, found)
        return verdict

    def _index(self, candidate: _Candidate, found: ical.CalendarObject) -> None:
        """Compute and keep the index of a recurring object, in its calendar's own zone."""
        stored, span = candidate.object, self._span
        stale = candidate.index is None or candidate.index.seq != stored.seq
        outside = (
            candidate.index is not None
            and candidate.index.complete
            and not candidate.index.covers(stored.seq, span.start, span.end)
        )
        wanted = candidate.recurring and self._zone_is_own and self._plain and span.indexed
        if not (wanted and (stale or outside)):
            return
        made = occurrences.compute(found, stored.seq, span.start, span.end, self._zone, self._budget)

        def keep(tx: Write) -> None:
            occurrences.put_index(tx, stored.id, made)

        self._database.submit(keep)


def _overlaps(candidate: _Candidate, span: _Span) -> bool | None:
    """A single event with fixed times: its row is its time, widened by a second on both sides."""
    if candidate.first_at is None or candidate.last_at is None:
        return None
    start, end = candidate.first_at + 1, candidate.last_at - 1
    if end > start:
        return span.start < end and span.end > start
    return span.start <= start < span.end


def _is_plain(wanted: CompFilter) -> bool:
    """The shape that clients send: objects of one component, at most within a time range."""
    if wanted.props or len(wanted.comps) != 1:
        return False
    inner = wanted.comps[0]
    return not (inner.is_not_defined or inner.props or inner.comps)


def _only_range(wanted: CompFilter) -> TimeRange | None:
    """A range outside of which nothing can match: that of the only component asked for.

    Not where alarms are: they ring long before their event.
    """
    if len(wanted.comps) != 1:
        return None
    inner = wanted.comps[0]
    return None if inner.is_not_defined else inner.time_range


def contents_of(tx: Read, blob_ids: Sequence[int]) -> dict[int, Content]:
    """Where the bytes of some blobs are: one statement for those in rows, one each for those in extents."""
    if not blob_ids:
        return {}
    statement = sa.select(
        t.blob.c.id, t.blob.c.size, t.blob.c.sha1, t.blob.c.sha256, t.blob.c.md5, t.blob.c.content
    ).where(t.blob.c.id.in_(list(blob_ids)))
    found = {}
    for row in tx.execute(statement):
        if row.content is None:
            found[row.id] = store.content(tx, row.id)
        else:
            found[row.id] = Content(
                row.size, bytes(row.sha1), bytes(row.sha256), bytes(row.md5), bytes(row.content), ()
            )
    return found


# -- contacts -------------------------------------------------------------------------------------


class CardQuery:
    """One addressbook-query over one address book."""

    def __init__(
        self,
        settings: configuration.Dav,
        database: Database,
        blobs: Blobs,
        collection: Collection,
        wanted: CardFilter,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._collection = collection
        self._wanted = wanted
        self._limits = vcard.CardLimits(settings.max_object_bytes, settings.max_properties)

    async def matches(self, *, with_data: bool) -> AsyncIterator[list[Match]]:
        """Matching contacts in pages.

        Spec: RFC 6352 §8.6. Cost: a scan of the rows' searchable text; only candidates are read and parsed.
        """
        after = 0
        while True:
            found, contents, last = await self._database.reading(
                lambda tx, after=after: self._read(tx, after, with_data)  # type: ignore[misc]
            )
            if found:
                yield await self._database.pooled(self._decide, found, contents)
            if last is None:
                return
            after = last

    def _read(
        self, tx: Read, after: int, with_data: bool
    ) -> tuple[list[StoredObject], dict[int, Content], int | None]:
        rows = tx.fast(_PAGE_OF_CARDS, {"collection_id": self._collection.id, "after": after})
        found = [
            objects.stored_object(row[:_COLUMNS])
            for row in rows
            if filters.may_match(self._wanted, row[_COLUMNS])
        ]
        decided = not self._wanted.props and not with_data
        contents = {} if decided else contents_of(tx, [each.blob_id for each in found])
        last = objects.stored_object(rows[-1][:_COLUMNS]).id if len(rows) == _PAGE else None
        return found, contents, last

    def _decide(self, found: list[StoredObject], contents: dict[int, Content]) -> list[Match]:
        matches = []
        for stored in found:
            where = contents.get(stored.blob_id)
            data = None if where is None else objects.read(self._blobs, where)
            if not self._wanted.props or (data is not None and self._evaluate(data)):
                matches.append(Match(stored, data))
        return matches

    def _evaluate(self, data: bytes) -> bool:
        try:
            return filters.matches_card(self._wanted, vcard.parse(data, self._limits))
        except contentline.BadContent:
            return False


# -- free-busy ------------------------------------------------------------------------------------


async def free_busy(
    settings: configuration.Dav,
    database: Database,
    blobs: Blobs,
    collection: Collection,
    wanted: TimeRange,
    zone: datetime.tzinfo,
    now: datetime.datetime,
) -> str:
    """The busy time of one calendar as a VCALENDAR with one VFREEBUSY.

    Args:
        wanted: both sides given.

    Raises:
        ClientError: `too_many()` where the objects in the range exceed the budget: a shortened answer would
            show somebody free who is not.

    Spec: RFC 4791 §7.10.
    """
    assert wanted.start is not None
    assert wanted.end is not None
    start, end = wanted.start, wanted.end
    limits = objects.calendar_limits(settings)
    budget = objects.budget(settings)
    periods: list[recurrence.Busy] = []

    def busy(found: list[Match]) -> None:
        for match in found:
            assert match.data is not None
            try:
                checked = ical.check_object(ical.parse(match.data, limits), limits)
                periods.extend(recurrence.busy_periods(checked, start, end, zone, budget))
            except contentline.BadContent:
                continue
            except recurrence.TooManySteps:
                raise too_many() from None
            if len(periods) > settings.max_instances:
                raise too_many()

    for component in ("VEVENT", "VFREEBUSY"):
        filter_ = CompFilter("VCALENDAR", False, None, (), (CompFilter(component, False, wanted, (), ()),))
        query = CalendarQuery(settings, database, blobs, collection, filter_, zone, zone_is_own=True)
        async for page in query.matches(with_data=True):
            await database.pooled(busy, page)
    return ical.serialise(recurrence.free_busy(periods, start, end, now))


def too_many() -> ClientError:
    """The refusal of an answer over its limits (RFC 4791 §7.8, RFC 6352 §8.6)."""
    return Forbidden(
        "The answer would be too large; ask for less.",
        precondition=f"{DAV}number-of-matches-within-limits",
    )
