"""The recurrence set of one calendar object: rules, dates, exceptions and overrides, read for one time zone.

What `wire.recurrence` is built on; nothing else needs it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo

from ksync_server.wire.contentline import Property
from ksync_server.wire.ical import CalendarObject, Component
from ksync_server.wire.icaltime import (
    BadTime,
    Duration,
    Moment,
    instant,
    parse_duration,
    parse_moment,
    wall_clock,
)
from ksync_server.wire.rrule import (
    DAY_S,
    FIRST_S,
    HOURLY,
    LAST_S,
    BadRule,
    Meter,
    OutOfSteps,
    Rule,
    parse_rule,
    starts,
)
from ksync_server.wire.timezones import zone_of

ZONE_SLACK_S = 26 * 3_600  # two wall clocks never differ by more
INSTANCE_STEPS = 8  # what reading one instance costs, in steps of a rule
GAP_S = 3 * 3_600  # how far a clock change moves an instance


@dataclass(frozen=True, slots=True)
class Budget:
    """What one object may cost in one request."""

    max_steps: int = 80_000  # loop steps at some 1 µs, also those that yield nothing
    max_instances: int = 20_000  # instances given
    max_bytes: int = 64 * 1024 * 1024  # text of the instances that `expand` makes


class TooManySteps(ValueError):
    """The budget is spent. Every instance that starts before `complete_until` has been given.

    Args:
        complete_until: an instant; None when nothing is known.
        known: what functions that return a whole answer had found by then.
    """

    def __init__(self, complete_until: int | None, known: tuple[object, ...] = ()) -> None:
        super().__init__("The recurrence needs more work than one request may spend.")
        self.text = str(self)
        self.complete_until = complete_until
        self.known = known


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One instance. `end` equals `start` for what has no duration."""

    start: int
    end: int
    recurrence_id: date | datetime | None  # as the object says it; None when it does not recur
    component: Component  # the master or the override that shows it
    all_day: bool
    floating: bool


@dataclass(frozen=True, slots=True)
class Times:
    """The times of one component."""

    kind: str
    start: Moment | None
    end: Moment | None  # DTEND or DUE
    duration: Duration | None
    zone: tzinfo  # for floating values and dates
    exact_s: int  # from start to end, both given; the same for every instance unless they are dates

    @property
    def anchor(self) -> Moment | None:
        """What repeats: DTSTART, or DUE of a task that has nothing else."""
        return self.start or self.end

    @property
    def wall(self) -> tzinfo:
        """The zone of the anchor's wall clock."""
        return (self.anchor.zone if self.anchor else None) or self.zone

    def span(self, local: int, at: int | None = None) -> tuple[int, int]:
        """Start and end of the instance whose anchor is at the wall-clock second `local` (instant `at`)."""
        start, end = self.start, self.end
        if at is None:
            at = instant(local, self.wall)
        if start is None:
            return at, at
        if end is not None:
            if start.is_date:
                return at, max(at, instant(local + end.local - start.local, self.wall))
            return at, at + self.exact_s
        if self.duration is not None:
            return at, max(at, self.duration.after(local, self.wall))
        if start.is_date and self.kind != "VTODO":
            return at, instant(local + DAY_S, self.wall)
        return at, at

    @property
    def length_s(self) -> int:
        """About how long an instance is; at most a day less than the truth."""
        return self.exact_s if self.duration is None else max(self.exact_s, self.duration.total_s)

    def touches(self, span: tuple[int, int], lo: int, hi: int) -> bool:
        """Whether an instance overlaps [lo, hi) (RFC 4791 §9.9, §7.4 of RFC 7953)."""
        start, end = span
        if self.kind == "VTODO":
            if self.start is None:
                return lo < end and hi >= end
            if self.duration is not None and self.end is None:
                return lo <= end and (hi > start or hi >= end)
            if self.end is not None:
                return (lo < end or lo <= start) and (hi > start or hi >= end)
            return lo <= start < hi
        if self.kind == "VFREEBUSY":
            return lo <= end and hi > start
        return lo < end and hi > start if end > start else lo <= start < hi


def moment_in(component: Component, name: str, calendar: Component) -> Moment | None:
    prop = component.first(name)
    return None if prop is None else moment_of(prop, prop.value, calendar)


def moment_of(prop: Property, text: str, calendar: Component) -> Moment | None:
    """The time of one value; None if it is none. An unknown TZID is a floating time."""
    try:
        moment = parse_moment(text)
    except BadTime:
        return None
    tzid = prop.param("TZID") if prop.params and not moment.is_date and moment.zone is None else None
    if tzid is None:
        return moment
    zone = zone_of(tzid, calendar, _UNKNOWN)
    return moment if zone is _UNKNOWN else Moment(moment.local, zone, False)


_UNKNOWN = timezone(timedelta(0), "unknown")  # marks a TZID that means nothing here


def duration_in(component: Component, name: str = "DURATION") -> Duration | None:
    prop = component.first(name)
    if prop is None:
        return None
    try:
        return parse_duration(prop.value)
    except BadTime:
        return None


def times_of(component: Component, calendar: Component, zone: tzinfo) -> Times:
    start = moment_in(component, "DTSTART", calendar)
    end = moment_in(component, "DUE" if component.name == "VTODO" else "DTEND", calendar)
    exact_s = 0 if start is None or end is None else max(0, end.at(zone) - start.at(zone))
    return Times(component.name, start, end, duration_in(component), zone, exact_s)


# --- the recurrence set ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shift:
    """An override with RANGE=THISANDFUTURE: from `local` (of the master's wall clock) on."""

    local: int
    delta: int  # seconds on the wall clock
    component: Component
    times: Times


class _Exceptions:
    """Moments of EXDATE or RECURRENCE-ID, matched as they should have been written.

    A DATE names the whole day of a DATE-TIME series; a DATE-TIME names its day in a DATE series: clients mix
    them.
    """

    __slots__ = ("_by_day", "_by_instant", "_dates", "_zone")

    def __init__(self, dates: bool, zone: tzinfo) -> None:
        self._dates = dates
        self._zone = zone
        self._by_day: set[int] = set()
        self._by_instant: set[int] = set()

    def add(self, moment: Moment) -> None:
        if self._dates or moment.is_date:
            self._by_day.add(moment.local // DAY_S)
        else:
            self._by_instant.add(moment.at(self._zone))

    def holds(self, local: int, at: int) -> bool:
        return at in self._by_instant or local // DAY_S in self._by_day

    def __bool__(self) -> bool:
        return bool(self._by_day or self._by_instant)


class Series:
    """An object read for one zone: rules, dates, exceptions, overrides."""

    def __init__(self, obj: CalendarObject, zone: tzinfo, meter: Meter) -> None:
        calendar = obj.calendar
        self.obj, self.zone, self.meter = obj, zone, meter
        self.master = None if obj.master is None else times_of(obj.master, calendar, zone)
        self.anchor = None if self.master is None else self.master.anchor
        self.wall = zone if self.master is None else self.master.wall
        dates = self.anchor is not None and self.anchor.is_date
        self.replaced = _Exceptions(dates, zone)
        self.excluded = _Exceptions(dates, zone)
        self.shifts: list[_Shift] = []
        self.overrides: list[tuple[Component, Times, Moment]] = []
        self.rules: list[Rule] = []
        self.exrules: list[Rule] = []
        self.dates: dict[int, int | None] = {}  # wall-clock second -> end of a PERIOD
        if obj.master is not None and self.anchor is not None:
            self._read_master(obj.master, calendar)
        for component in obj.overrides:
            self._read_override(component, calendar)
        self.shifts.sort(key=lambda shift: shift.local)
        self.shift_locals = [shift.local for shift in self.shifts]
        self.recurring = obj.has_recurrence or bool(self.overrides)
        self.reach = max((abs(shift.delta) for shift in self.shifts), default=0)

    def _read_master(self, master: Component, calendar: Component) -> None:
        for prop in master.properties:
            if prop.name in {"RRULE", "EXRULE"}:
                try:
                    rule = parse_rule(prop.value)
                except BadRule:
                    continue
                (self.rules if prop.name == "RRULE" else self.exrules).append(rule)
            elif prop.name == "EXDATE":
                for text in prop.value.split(","):
                    moment = moment_of(prop, text, calendar)
                    if moment is not None:
                        self.excluded.add(moment)
            elif prop.name == "RDATE":
                for moment, end in dates_of(prop, calendar, self.zone):
                    self.dates[self._local(moment)] = end

    def _read_override(self, component: Component, calendar: Component) -> None:
        prop = component.first("RECURRENCE-ID")
        named = None if prop is None else moment_of(prop, prop.value, calendar)
        if prop is None or named is None:
            return
        times = times_of(component, calendar, self.zone)
        self.overrides.append((component, times, named))
        self.replaced.add(named)
        if (prop.param("RANGE") or "").upper() == "THISANDFUTURE" and times.anchor is not None:
            local = self._local(named)
            moved = wall_clock(times.anchor.at(self.zone), self.wall)
            self.shifts.append(_Shift(local, moved - local, component, times))

    def _local(self, moment: Moment) -> int:
        """A moment on the wall clock of the master."""
        anchor = self.anchor
        if moment.is_date and anchor is not None and not anchor.is_date:
            return moment.local + anchor.local % DAY_S
        if anchor is not None and anchor.is_date:
            return moment.local - moment.local % DAY_S
        if moment.zone is None or (anchor is not None and moment.zone is anchor.zone):
            return moment.local
        return wall_clock(moment.at(self.zone), self.wall)

    def until(self, rule: Rule) -> int:
        """UNTIL on the wall clock of the master; a DATE means to the end of that day."""
        if rule.until is None:
            return LAST_S
        try:
            moment = parse_moment(rule.until)
        except BadTime:
            return LAST_S
        if moment.is_date:
            return moment.local + DAY_S - 1
        if moment.zone is None or (self.anchor is not None and self.anchor.is_date):
            return moment.local
        return wall_clock(moment.local, self.wall)

    def rule_starts(self, rule: Rule, after: int, last: int, *, exrule: bool = False) -> Iterator[int]:
        """The wall-clock seconds of one rule. DTSTART is an instance even if the rule does not match it, and
        then COUNT counts it."""
        assert self.anchor is not None
        first = self.anchor.local
        skipped = 0
        if rule.count is not None and not exrule:
            matches = next(starts(rule, first, self.meter, last=first), None) is not None
            skipped = 0 if matches else 1
        last = min(last, self.until(rule))
        return starts(rule, first, self.meter, after=after, last=last, skipped=skipped)

    def locals(self, after: int, last: int) -> Iterator[int]:
        """The wall-clock seconds of the recurrence set, ascending, exceptions taken out."""
        if self.anchor is None:
            return
        streams: list[Iterable[int]] = [[self.anchor.local] if after <= self.anchor.local <= last else []]
        streams += [self.rule_starts(rule, after, last) for rule in self.rules]
        streams.append(sorted(local for local in self.dates if after <= local <= last))
        excluded = heapq.merge(*(self.rule_starts(rule, after, last, exrule=True) for rule in self.exrules))
        skip = next(excluded, None)
        before = None
        for local in heapq.merge(*streams):
            if local == before:
                continue
            before = local
            while skip is not None and skip < local:
                skip = next(excluded, None)
            if skip != local:
                yield local

    @property
    def disorder_s(self) -> int:
        """How much later than its turn on the wall clock an instance can come."""
        several_a_day = len(self.rules) > 1 or bool(self.dates)
        for rule in self.rules:
            if rule.freq >= HOURLY or rule.by_hour or rule.by_minute or rule.by_second:
                several_a_day = True
        changing = self.wall is not UTC and several_a_day
        return self.reach + (GAP_S if changing else 0)

    def master_occurrences(self, lo: int, hi: int) -> Iterator[Occurrence]:
        """Instances shown by the master or a THISANDFUTURE override, in order of their start."""
        if self.master is None or self.anchor is None or self.obj.master is None:
            return
        lengths = [self.master.length_s, *(shift.times.length_s for shift in self.shifts)]
        lengths += [end - instant(local, self.wall) for local, end in self.dates.items() if end is not None]
        after = lo - max(lengths) - self.reach - ZONE_SLACK_S - DAY_S
        last = hi + self.reach + ZONE_SLACK_S
        lag = self.disorder_s
        waiting: list[tuple[int, int, int, Occurrence]] = []
        try:
            for local in self.locals(max(after, FIRST_S), min(last, LAST_S)):
                self.meter.spend(INSTANCE_STEPS, local)
                at = instant(local, self.wall)
                if (self.excluded and self.excluded.holds(local, at)) or (
                    self.replaced and self.replaced.holds(local, at)
                ):
                    continue
                found = self._shown(local, at, lo, hi)
                if found is not None and not lag:
                    yield found
                elif found is not None:
                    heapq.heappush(waiting, (found.start, found.end, local, found))
                if waiting:
                    yield from _popped(waiting, at - lag)
        except OutOfSteps as error:
            reached = instant(min(max(error.at, FIRST_S), LAST_S), self.wall) - lag - GAP_S
            yield from _popped(waiting, reached)
            raise TooManySteps(reached) from None
        yield from _popped(waiting, LAST_S + 1)

    def _shown(self, local: int, at: int | None, lo: int, hi: int) -> Occurrence | None:
        assert self.master is not None
        assert self.anchor is not None
        assert self.obj.master is not None
        component, times, delta = self.obj.master, self.master, 0
        if self.shifts:
            index = bisect_right(self.shift_locals, local)
            if index:
                shift = self.shifts[index - 1]
                component, times, delta = shift.component, shift.times, shift.delta
        anchor = times.anchor
        moved = local + delta
        if anchor is not None and anchor.zone is not self.anchor.zone:
            moved = wall_clock(instant(moved, self.wall), times.wall)
            moved -= moved % DAY_S if anchor.is_date else 0
            at = None
        span = times.span(moved, None if delta else at)
        end = self.dates.get(local) if self.dates else None
        if end is not None and component is self.obj.master:
            span = span[0], max(end, span[0])
        if not times.touches(span, lo, hi):
            return None
        named = Moment(local, self.anchor.zone, self.anchor.is_date).value() if self.recurring else None
        return shown_by(component, times, span, named)

    def override_occurrences(self, lo: int, hi: int) -> list[Occurrence]:
        """Instances that an override shows at its own time, sorted."""
        found = []
        for component, times, named in self.overrides:
            if times.anchor is None:
                continue
            span = times.span(times.anchor.local)
            if times.touches(span, lo, hi):
                found.append(shown_by(component, times, span, named.value()))
        return sorted(found, key=lambda occurrence: (occurrence.start, occurrence.end))


def _popped(waiting: list[tuple[int, int, int, Occurrence]], limit: int) -> Iterator[Occurrence]:
    """What starts before `limit`, in order; a clock change can lay two wall-clock times on one instant."""
    while waiting and waiting[0][0] < limit:
        found = heapq.heappop(waiting)[3]
        while waiting and waiting[0][0] == found.start and waiting[0][3].component is found.component:
            heapq.heappop(waiting)
        yield found


def shown_by(
    component: Component, times: Times, span: tuple[int, int], named: date | datetime | None
) -> Occurrence:
    anchor = times.anchor
    assert anchor is not None
    floating = anchor.zone is None and not anchor.is_date
    # a time zone or duration can lead out of the years that can be written
    start, end = max(span[0], FIRST_S), min(span[1], LAST_S)
    return Occurrence(min(start, LAST_S), max(end, FIRST_S), named, component, anchor.is_date, floating)


def dates_of(prop: Property, calendar: Component, zone: tzinfo) -> Iterator[tuple[Moment, int | None]]:
    """The values of RDATE: a moment, and for a PERIOD the instant of its end."""
    for text in prop.value.split(","):
        begin, _, rest = text.partition("/")
        moment = moment_of(prop, begin, calendar)
        if moment is None:
            continue
        yield moment, _period_end(moment, rest, prop, calendar, zone) if rest else None


def _period_end(moment: Moment, rest: str, prop: Property, calendar: Component, zone: tzinfo) -> int | None:
    if rest.strip()[:1] in {"P", "p", "+", "-"}:
        try:
            return parse_duration(rest).after(moment.local, moment.zone or zone)
        except BadTime:
            return None
    end = moment_of(prop, rest, calendar)
    return None if end is None else end.at(zone)
