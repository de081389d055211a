"""calendar-query, addressbook-query and free-busy-query: which objects match, page by page.

A month costs a month: the rows' time spans and the occurrence index decide nearly everything without
looking at content. What they cannot decide is decided on the object itself, in the pool, within the
request's allowance of recurrence steps; an object that exhausts it counts as a match, since a superset loses
nothing.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server.dav import collections, filters, objects, occurrences
from ksync_server.dav.collections import Collection
from ksync_server.dav.filters import CardFilter, CompFilter, TimeRange
from ksync_server.dav.objects import StoredObject
from ksync_server.dav.turns import Pool
from ksync_server.errors import DAV, ClientError, Forbidden, Unavailable
from ksync_server.store import blobs as store
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs, Content
from ksync_server.store.database import Read, Row, Write
from ksync_server.wire import contentline, ical, recurrence, vcard

_PAGE = 200  # rows of one read transaction
_READ_AT_ONCE = 8 * 1024 * 1024  # bytes of content in memory; a page of the largest objects has gigabytes
_KEPT_AT_ONCE = 50  # indexes written in one transaction
_LOWEST, _HIGHEST = -(1 << 62), 1 << 62
T = TypeVar("T")

_O = t.object_.c
_P = sa.bindparam
_COLUMNS = len(objects.COLUMNS)
_SEQ, _ID = 1, 7  # of them
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
        _O.seq > _P("after"),
        sa.or_(_O.first_at.is_(None), _O.first_at <= _P("until", type_=sa.BigInteger)),
        sa.or_(_O.last_at.is_(None), _O.last_at >= _P("since", type_=sa.BigInteger)),
    )
    .order_by(_O.seq)
    .limit(_PAGE)
)
_PAGE_OF_CARDS = (
    sa.select(*objects.COLUMNS, _O.folded)
    .where(_O.collection_id == _P("collection_id"), _O.seq > _P("after"))
    .order_by(_O.seq)
    .limit(_PAGE)
)
_B = t.blob.c
_CONTENTS = {
    count: sa.select(_B.id, _B.size, _B.sha1, _B.sha256, _B.md5, _B.content).where(
        _B.id.in_([_P(f"n{at}") for at in range(count)])
    )
    for count in (10, 50, _PAGE)
}


class Match(NamedTuple):
    """An object that satisfies the query; `data` where it was asked for or had to be read."""

    object: StoredObject
    data: bytes | None


class _Candidate(NamedTuple):
    """A row that the time span could not rule out."""

    object: StoredObject
    first_at: int | None
    last_at: int | None
    recurring: bool
    floating: bool
    known: occurrences.Index | None


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
    def endless(self) -> bool:
        """Whether both sides are open."""
        return self.start == _LOWEST and self.end == _HIGHEST


class CalendarQuery:
    """One calendar-query over one calendar.

    Args:
        zone: for floating times and dates: the query's, else the calendar's.
        zone_is_own: whether it is the calendar's own, which the stored indexes were computed with.
    """

    def __init__(
        self,
        settings: configuration.Dav,
        database: Pool,
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
        self._allowance = occurrences.Allowance(objects.budget(settings))
        self._made: list[tuple[int, occurrences.Index]] = []
        self._floating_made = False
        self._seen: set[int] = set()
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
            for some in _portions(found, lambda each: each[0].object.blob_id, contents):
                yield await self._database.pooled(self._decide, some, contents)
            if last is None:
                return
            after = last

    def _read(
        self, tx: Read, after: int, with_data: bool
    ) -> tuple[list[tuple[_Candidate, bool | None]], dict[int, Content], int | None]:
        """A page of candidates with the verdict of their rows, and the content of those that need it."""
        page = tx.fast(
            _PAGE_OF_CALENDAR,
            {
                "collection_id": self._collection.id,
                "after": after,
                "until": self._span.end,
                "since": self._span.start,
            },
        )
        rows = _unseen(page, self._seen)
        judged = [(candidate, self._judge(candidate)) for candidate in map(_candidate, rows)]
        found: list[tuple[_Candidate, bool | None]] = [each for each in judged if each[1] is not False]
        needed = [candidate.object.blob_id for candidate, verdict in found if with_data or verdict is None]
        contents = contents_of(tx, needed)
        return found, contents, page[-1][_SEQ] if len(page) == _PAGE else None

    def _judge(self, candidate: _Candidate) -> bool | None:
        """True or False where the row and the index say so, None where the object must be read."""
        if not self._plain:
            return None
        if self._wanted.comps and candidate.object.component != self._wanted.comps[0].name:
            return False
        if self._span.endless:
            return True
        if candidate.object.component != "VEVENT":
            return None
        if not (candidate.recurring or candidate.floating):
            return _overlaps(candidate, self._span)
        index = self._usable(candidate)
        return None if index is None else self._answer(index)

    def _usable(self, candidate: _Candidate) -> occurrences.Index | None:
        """The stored index where it is of this version of the object and of this query's time zone."""
        index = candidate.known
        if index is None or index.seq != candidate.object.seq:
            return None
        return index if self._zone_is_own or not candidate.floating else None

    def _answer(self, index: occurrences.Index) -> bool | None:
        """What an index says; one that could not be completed counts as a match for the range it is of."""
        verdict = index.hits(self._span.start, self._span.end)
        if verdict is None and not index.complete and index.covers(self._span.start, self._span.end):
            return True
        return verdict

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
        self._keep()
        return matches

    def _evaluate(self, candidate: _Candidate, data: bytes) -> bool:
        """The filter on the object itself, by the index it lacked where that suffices."""
        try:
            found = ical.check_object(ical.parse(data, objects.STORED), objects.STORED)
            verdict = self._indexed(candidate, found)
            if verdict is not None:
                return verdict
            return filters.matches_calendar(self._wanted, found, self._zone, self._allowance.budget)
        except recurrence.TooManySteps:
            self._allowance.exhausted()
            return True
        except contentline.BadContent:
            return False  # what cannot be read today happens nowhere, and must not stop the others

    def _indexed(self, candidate: _Candidate, found: ical.CalendarObject) -> bool | None:
        """Compute the index of an event that recurs or floats, to be kept, and ask it.

        Only with a whole budget: an index that stays incomplete says that nobody can complete it. A range
        that no horizon covers is not tried again with an object that has already used up a budget.
        """
        wanted = (
            self._plain
            and self._zone_is_own
            and found.component == "VEVENT"
            and (candidate.recurring or candidate.floating)
        )
        known, seq, span = self._usable(candidate), candidate.object.seq, self._span
        hopeless = known is not None and known.is_short and not occurrences.can_cover(span.start, span.end)
        if not wanted or hopeless or not self._allowance.is_whole:
            return None
        made = occurrences.compute(found, seq, span.start, span.end, self._zone, self._allowance.budget)
        if made.is_short:
            self._allowance.exhausted()
        self._made.append((candidate.object.id, made))
        self._floating_made |= candidate.floating
        return self._answer(made)

    def _keep(self) -> None:
        """Store what was computed, without waiting: whoever needs it before computes it again."""
        made, floating = self._made, self._floating_made
        self._made, self._floating_made = [], False

        def keep(tx: Write, some: list[tuple[int, occurrences.Index]]) -> None:
            if floating and not self._is_own(tx):
                return  # it has another time zone by now
            for object_id, index in some:
                occurrences.put_index(tx, object_id, index)

        with contextlib.suppress(Unavailable):  # the server is stopping
            for at in range(0, len(made), _KEPT_AT_ONCE):
                some = made[at : at + _KEPT_AT_ONCE]
                self._database.submit(lambda tx, some=some: keep(tx, some))  # type: ignore[misc]

    def _is_own(self, tx: Write) -> bool:
        """Whether the query's time zone is still the calendar's; locks the calendar against a change."""
        collections.hold(tx, self._collection.id)
        return collections.zone(collections.properties(tx, self._collection.id)) is self._zone


def _portions(found: list[T], blob_id: Callable[[T], int], contents: dict[int, Content]) -> Iterator[list[T]]:
    """What was found, in parts whose content may be in memory at once; an object alone may be larger."""
    part: list[T] = []
    size = 0
    for each in found:
        content = contents.get(blob_id(each))
        more = 0 if content is None else content.size
        if part and size + more > _READ_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(each)
        size += more
    if part:
        yield part


def _unseen(page: list[Row], seen: set[int]) -> list[Row]:
    """The rows of a page that no earlier one had: what changes meanwhile comes again, with its new number."""
    rows = [row for row in page if row[_ID] not in seen]
    seen.update([row[_ID] for row in rows])
    return rows


def _overlaps(candidate: _Candidate, span: _Span) -> bool | None:
    """A single event with fixed times: its row is its time, widened by a second on both sides."""
    if candidate.first_at is None or candidate.last_at is None:
        return None
    start, end = candidate.first_at + 1, candidate.last_at - 1
    if end > start:
        return span.start < end and span.end > start
    return span.start <= start < span.end


def _is_plain(wanted: CompFilter) -> bool:
    """The shape that clients send: everything, or objects of one component, at most within a time range."""
    if wanted.is_not_defined or wanted.props or len(wanted.comps) > 1:
        return False
    return not any(
        inner.is_not_defined or inner.props or inner.comps or inner.name not in ical.OBJECT_KINDS
        for inner in wanted.comps
    )


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
    found = {}
    for at in range(0, len(blob_ids), _PAGE):
        some = list(blob_ids[at : at + _PAGE])
        count = next(count for count in _CONTENTS if count >= len(some))
        values = {f"n{n}": blob_id for n, blob_id in enumerate([*some, *some[-1:] * (count - len(some))])}
        for number, size, sha1, sha256, md5, content in tx.fast(_CONTENTS[count], values):
            if content is None:
                found[number] = store.content(tx, number)
            else:
                digests = bytes(sha1), bytes(sha256), bytes(md5)
                found[number] = Content(number, size, *digests, bytes(content), ())
    return found


# -- contacts -------------------------------------------------------------------------------------


class CardQuery:
    """One addressbook-query over one address book."""

    def __init__(
        self,
        database: Pool,
        blobs: Blobs,
        collection: Collection,
        wanted: CardFilter,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._collection = collection
        self._wanted = wanted
        self._seen: set[int] = set()

    async def matches(self, *, with_data: bool) -> AsyncIterator[list[Match]]:
        """Matching contacts in pages.

        Spec: RFC 6352 §8.6. Cost: a scan of the rows' searchable text; only candidates are read and parsed.
        """
        after = 0
        while True:
            found, contents, last = await self._database.reading(
                lambda tx, after=after: self._read(tx, after, with_data)  # type: ignore[misc]
            )
            for some in _portions(found, lambda each: each.blob_id, contents):
                yield await self._database.pooled(self._decide, some, contents)
            if last is None:
                return
            after = last

    def _read(
        self, tx: Read, after: int, with_data: bool
    ) -> tuple[list[StoredObject], dict[int, Content], int | None]:
        page = tx.fast(_PAGE_OF_CARDS, {"collection_id": self._collection.id, "after": after})
        found = [
            objects.stored_object(row[:_COLUMNS])
            for row in _unseen(page, self._seen)
            if filters.may_match(self._wanted, row[_COLUMNS])
        ]
        decided = not self._wanted.props and not with_data
        contents = {} if decided else contents_of(tx, [each.blob_id for each in found])
        return found, contents, page[-1][_SEQ] if len(page) == _PAGE else None

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
            return filters.matches_card(self._wanted, vcard.parse(data, objects.STORED_CARD))
        except contentline.BadContent:
            return False


# -- free-busy ------------------------------------------------------------------------------------


async def free_busy(
    settings: configuration.Dav,
    database: Pool,
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
    budget = objects.budget(settings)
    periods: list[recurrence.Busy] = []

    def busy(found: list[Match]) -> None:
        for match in found:
            assert match.data is not None
            try:
                checked = ical.check_object(ical.parse(match.data, objects.STORED), objects.STORED)
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
