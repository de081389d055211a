"""The occurrence index: when things happen, kept beside the rows so that a month costs a month.

`facts` is what every object's row keeps: a superset of its time span. A recurring object has in addition one
packed array of starts and ends within a horizon, computed lazily and outside every transaction by the
budgeted iterator of `wire.recurrence`; it carries the change number of the object it was made from.
"""

from __future__ import annotations

import datetime
from array import array
from bisect import bisect_left
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write
from ksync_server.wire import ical, recurrence
from ksync_server.wire.series import moment_in

_BEFORE_S = 366 * 86400  # horizon around the asked range: clients move month by month
_AFTER_S = 2 * 366 * 86400
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

    def covers(self, seq: int, start: int, end: int) -> bool:
        """Whether it can answer for this version of the object and this range."""
        return self.complete and self.seq == seq and self.from_at <= start and end <= self.until_at

    def hits(self, start: int, end: int) -> bool:
        """Whether an occurrence overlaps [start, end); one without length counts where it starts."""
        starts, ends = _unpacked(self.packed)
        stop = bisect_left(starts, end)
        return any(ends[at] > start or ends[at] == starts[at] == start for at in range(stop - 1, -1, -1))


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
    moments = (
        moment_in(component, name, found.calendar)
        for component in found.components
        for name in ("DTSTART", "DTEND", "DUE", "RECURRENCE-ID")
    )
    return any(moment is not None and moment.zone is None for moment in moments)


def compute(
    found: ical.CalendarObject,
    seq: int,
    start: int,
    end: int,
    zone: datetime.tzinfo,
    budget: recurrence.Budget,
) -> Index:
    """The index of one object for a horizon around a range; incomplete where the budget ended first."""
    from_at, until_at = start - _BEFORE_S, end + _AFTER_S
    starts, ends = array("q"), array("q")
    complete = True
    try:
        for instance in recurrence.occurrences(
            found, _utc(from_at), _utc(until_at), zone=zone, budget=budget
        ):
            if len(starts) >= _MAX_PACKED:
                complete = False
                break
            starts.append(instance.start)
            ends.append(instance.end)
    except recurrence.TooManySteps:
        complete = False
    packed = (starts + ends).tobytes() if complete else b""
    return Index(seq, from_at, until_at, packed, complete)


def _utc(at: int) -> datetime.datetime:
    low, high = -62135596800 + 86400 * 366, 253402300799 - 86400 * 366
    return datetime.datetime.fromtimestamp(min(max(at, low), high), datetime.UTC)


def _unpacked(packed: bytes) -> tuple[array[int], array[int]]:
    both = array("q")
    both.frombytes(packed)
    half = len(both) // 2
    return both[:half], both[half:]


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
