"""The occurrence index: when things happen, kept beside the rows so that a month costs a month.

`facts` is what every object's row keeps: a superset of its time span. An event that recurs or floats has in
addition one packed array of starts and ends within a horizon, computed lazily and outside every transaction
by the budgeted iterator of `wire.recurrence`; it carries the change number of the object it was made from,
and holds for the time zone of its calendar.
"""

from __future__ import annotations

import datetime
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa

from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write
from ksync_server.wire import ical, recurrence
from ksync_server.wire.series import moment_of

_BEFORE_S = 366 * 86400  # horizon around the asked range: clients move month by month
_AFTER_S = 2 * 366 * 86400
_LONGEST_S = 4 * 366 * 86400  # of a longer range the index holds the beginning only
_TIMES = frozenset({"DTSTART", "DTEND", "DUE", "RECURRENCE-ID", "RDATE", "EXDATE"})
_LOW_S, _HIGH_S = -62_135_596_800 + 2 * 86400, 253_402_300_799 - 2 * 86400  # years 1 to 9999
_MAX_PACKED = 20_000  # instances of one object in one horizon; more are asked of the object itself


@dataclass(frozen=True, slots=True)
class Facts:
    """What an object's row says about time."""

    first_at: int | None  # Unix seconds; None = unbounded
    last_at: int | None
    recurring: bool
    floating: bool  # depends on the collection's time zone


@dataclass(frozen=True, slots=True)
class Index:
    """The occurrences of one object within [from_at, until_at), as stored."""

    seq: int
    from_at: int
    until_at: int
    packed: bytes
    complete: bool

    def covers(self, start: int, end: int) -> bool:
        """Whether the horizon holds the range."""
        return self.from_at <= start and end <= self.until_at

    @property
    def is_short(self) -> bool:
        """Whether the budget ended before the horizon did."""
        return self.until_at - self.from_at < _BEFORE_S + _AFTER_S

    def hits(self, start: int, end: int) -> bool | None:
        """Whether an occurrence overlaps [start, end); None where the index does not know.

        An occurrence without length counts where it starts. One that is in the index is a hit even of a range
        that leaves the horizon.

        Spec: RFC 4791 §9.9. Cost: a binary search; where lengths differ, a pass over what began before.
        """
        if self.packed and self._overlapped(start - self.from_at, end - self.from_at):
            return True
        return False if self.complete and self.covers(start, end) else None

    def _overlapped(self, start: int, end: int) -> bool:
        """`hits` in seconds since `from_at`."""
        view = memoryview(self.packed).cast("i")
        length = view[0]
        stop = len(view) if length >= 0 else 1 + len(view) // 2
        first = bisect_left(view, start, 1, stop)
        if first < stop and view[first] < end:
            return True
        if length >= 0:
            return first > 1 and view[first - 1] + length > start
        return any(view[at] + view[at + stop - 1] > start for at in range(1, first))


_WHOLE = 3  # objects of one request that may use up the whole budget
_PART = 20  # objects that may then use up a part of it
_PARTS = (20, 200)  # which part these get, and which all others: real recurrences need still less


class Allowance:
    """What following recurrences may cost in one request that meets many objects.

    The first objects that exhaust a budget had the whole of it; then it shrinks, so that a calendar full of
    rules that cannot be followed is answered as soon as any other.
    """

    def __init__(self, whole: recurrence.Budget) -> None:
        self.budget = whole
        self._whole = whole
        self._exhausted = 0

    @property
    def is_whole(self) -> bool:
        """Whether an object that exhausts it is known to be one that cannot be followed."""
        return self._exhausted < _WHOLE

    def exhausted(self) -> None:
        """An object has used up `budget`."""
        self._exhausted += 1
        if self._exhausted >= _WHOLE:
            part = _PARTS[0] if self._exhausted < _WHOLE + _PART else _PARTS[1]
            self.budget = replace(self._whole, max_steps=self._whole.max_steps // part)


def facts(found: ical.CalendarObject, zone: datetime.tzinfo, budget: recurrence.Budget) -> Facts:
    """The time facts of an object that is about to be stored.

    Cost: at most the budget; an object it cannot bound is unbounded.
    """
    try:
        first_at, last_at = recurrence.bounds(found, zone, budget)
    except recurrence.TooManySteps:
        first_at, last_at = None, None
    return Facts(first_at, last_at, recurrence.is_recurring(found), _is_floating(found))


def _is_floating(found: ical.CalendarObject) -> bool:
    """Whether any of its times depends on the time zone of who asks: floating ones and dates."""
    return any(
        moment is not None and moment.zone is None
        for component in found.components
        for prop in component.properties
        if prop.name in _TIMES
        for text in prop.value.replace("/", ",").split(",")
        if text.strip()[:1].isdigit()  # no duration
        for moment in (moment_of(prop, text, found.calendar),)
    )


def compute(
    found: ical.CalendarObject,
    seq: int,
    start: int,
    end: int,
    zone: datetime.tzinfo,
    budget: recurrence.Budget,
) -> Index:
    """The index of one object for a horizon around a range, as much of it as the budget allows.

    Where it does not reach the end of the range, it is tried for that range alone, and incomplete if that is
    too much, too.

    Args:
        start, end: Unix seconds; of an open or very long range the horizon holds the beginning, of one that
            is open to the past the end.
        zone: of the object's calendar.

    Cost: at most twice the budget.
    """
    if start < _LOW_S:
        start = max(end, _LOW_S) if end <= _HIGH_S else _LOW_S
    if end - start > _LONGEST_S:
        end = start
    for from_at, until_at in ((start - _BEFORE_S, end + _AFTER_S), (start, end)):
        index = _follow(found, seq, from_at, until_at, zone, budget)
        if index.covers(start, end):
            return index
    return Index(seq, start, end, b"", complete=False)


def can_cover(start: int, end: int) -> bool:
    """Whether a horizon may hold the whole range [start, end)."""
    return start >= _LOW_S and end <= _HIGH_S and end - start <= _LONGEST_S


def _follow(
    found: ical.CalendarObject,
    seq: int,
    from_at: int,
    until_at: int,
    zone: datetime.tzinfo,
    budget: recurrence.Budget,
) -> Index:
    """The index from there on, up to where the budget ends: before that it is complete."""
    starts: list[int] = []
    ends: list[int] = []
    try:
        for instance in recurrence.occurrences(
            found, _utc(from_at), _utc(until_at), zone=zone, budget=budget
        ):
            if len(starts) >= _MAX_PACKED:
                until_at = instance.start
                break
            starts.append(instance.start)
            ends.append(instance.end)
    except recurrence.TooManySteps as error:
        until_at = from_at - 1 if error.complete_until is None else min(until_at, error.complete_until)
    known = bisect_left(starts, until_at)
    return Index(seq, from_at, until_at, pack(starts[:known], ends[:known], from_at, until_at), complete=True)


def pack(starts: Sequence[int], ends: Sequence[int], from_at: int, until_at: int) -> bytes:
    """Occurrences as a row keeps them: 32-bit seconds, first the length that all have, then each start.

    Where lengths differ, the first is -1 and the length of each follows the starts. Starts count from
    `from_at`; what lies outside the horizon is cut off, a second behind its edge.
    """
    if not starts:
        return b""
    low, high = from_at - 1, until_at + 1
    kept = [(max(begin, low), min(until, high)) for begin, until in zip(starts, ends, strict=True)]
    lengths = [until - begin for begin, until in kept]
    same = lengths[0] if len(set(lengths)) == 1 else -1
    packed = array("i", (same, *(begin - from_at for begin, _ in kept)))
    if same < 0:
        packed.extend(lengths)
    return packed.tobytes()


def _utc(at: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(min(max(at, _LOW_S), _HIGH_S), datetime.UTC)


_FIND = sa.select(
    t.occurrence.c.seq,
    t.occurrence.c.from_at,
    t.occurrence.c.until_at,
    t.occurrence.c.packed,
    t.occurrence.c.complete,
).where(t.occurrence.c.object_id == sa.bindparam("id_"))
_DROP = sa.delete(t.occurrence).where(t.occurrence.c.object_id == sa.bindparam("id_"))
_STILL = sa.select(t.object_.c.seq).where(t.object_.c.id == sa.bindparam("id_")).with_for_update()
_ADD = sa.insert(t.occurrence).values(
    object_id=sa.bindparam("id_"),
    seq=sa.bindparam("seq"),
    from_at=sa.bindparam("from_at"),
    until_at=sa.bindparam("until_at"),
    packed=sa.bindparam("packed"),
    complete=sa.bindparam("complete", type_=sa.Boolean),
)


def find_index(tx: Read, object_id: int) -> Index | None:
    """The stored index of an object, however old."""
    row = tx.one(_FIND, {"id_": object_id})
    return None if row is None else Index(row[0], row[1], row[2], bytes(row[3]), bool(row[4]))


def put_index(tx: Write, object_id: int, index: Index) -> None:
    """Keep an index, unless the object changed since it was computed.

    It is derived and takes no change number. The object row is locked, so two workers cannot both insert.
    """
    if tx.scalar(_STILL, {"id_": object_id}) != index.seq:
        return
    tx.fast(_DROP, {"id_": object_id})
    tx.fast(
        _ADD,
        {
            "id_": object_id,
            "seq": index.seq,
            "from_at": index.from_at,
            "until_at": index.until_at,
            "packed": index.packed,
            "complete": index.complete,
        },
    )


def drop_index(tx: Write, object_id: int) -> None:
    """Forget it, e.g. when the collection's time zone changed."""
    tx.fast(_DROP, {"id_": object_id})
