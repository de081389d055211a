"""When a calendar object happens: its instances within a budget, and what CalDAV makes of them.

An object is data of a stranger: nothing here loops longer than the `Budget` allows, however the rules, dates,
overrides and time zones are combined. When the budget ends, `TooManySteps` says up to when the answer is
known.

All instants are whole seconds since 1970 UTC. Rules run on the wall clock of DTSTART (see `wire.rrule`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, tzinfo

from ksync_server.wire.contentline import Property, make_property
from ksync_server.wire.ical import CalendarObject, Component, calendar_of
from ksync_server.wire.icaltime import (
    BadTime,
    Duration,
    date_text,
    date_time_text,
    instant,
    parse_duration,
    utc_text,
    wall_clock,
)
from ksync_server.wire.rrule import DAY_S, FIRST_S, LAST_S, Meter, OutOfSteps
from ksync_server.wire.series import (
    GAP_S,
    ZONE_SLACK_S,
    Budget,
    Occurrence,
    Series,
    Times,
    TooManySteps,
    dates_of,
    duration_in,
    moment_in,
    moment_of,
    times_of,
)
from ksync_server.wire.timezones import zone_from, zone_of

__all__ = [
    "Alarm",
    "Budget",
    "Occurrence",
    "TooManySteps",
    "alarms",
    "bounds",
    "busy_periods",
    "expand",
    "free_busy",
    "is_recurring",
    "limit_freebusy_set",
    "limit_recurrence_set",
    "occurrences",
    "periods_of",
    "property_in_range",
    "seconds_of",
    "zone_from",
    "zone_of",
]

DEFAULT_BUDGET = Budget()
BOUND_STEPS = 20_000  # steps `bounds` spends on finding the end of a COUNT


def is_recurring(obj: CalendarObject) -> bool:
    """Whether the object can have more than one instance, or is one instance of something larger."""
    return obj.has_recurrence or bool(obj.overrides)


def seconds_of(when: datetime | None, default: int) -> int:
    """The instant of an aware datetime, `default` for None."""
    return default if when is None else int(when.timestamp() // 1)


def periods_of(prop: Property, calendar: Component, zone: tzinfo) -> list[tuple[int, int]]:
    """The periods of a FREEBUSY property as instants; values that are none are left out."""
    return [(moment.at(zone), end) for moment, end in dates_of(prop, calendar, zone) if end is not None]


# --- what the world asks ---------------------------------------------------------------------------


def occurrences(
    obj: CalendarObject,
    start: datetime | None,
    end: datetime | None,
    *,
    zone: tzinfo,
    budget: Budget = DEFAULT_BUDGET,
) -> Iterator[Occurrence]:
    """The instances that overlap [start, end), by start.

    Args:
        obj: a checked object of any kind.
        start, end: aware; None leaves that side open.
        zone: for floating values and dates: the query's or the collection's time zone.
        budget: of this call.

    Raises:
        TooManySteps: while iterating; what was given before is right and complete up to `complete_until`.

    Spec: RFC 4791 §9.9; RFC 5545 §3.8.4.4, §3.8.5; RFC 7953 §7.2 for VAVAILABILITY.
    Cost: O(instances in the range) for rules without COUNT, else O(instances since DTSTART); per instance
        some 5 µs. A task without any date has one instance from the beginning to the end of time.
    """
    lo, hi = seconds_of(start, FIRST_S), seconds_of(end, LAST_S + 1)
    for given, occurrence in enumerate(_all(obj, lo, hi, zone, budget), 1):
        if given > budget.max_instances:
            raise TooManySteps(occurrence.start)
        yield occurrence


def _all(obj: CalendarObject, lo: int, hi: int, zone: tzinfo, budget: Budget) -> Iterator[Occurrence]:
    if obj.component in {"VFREEBUSY", "VAVAILABILITY"} or _undated(obj):
        yield from _single(obj, lo, hi, zone)
        return
    series = Series(obj, zone, Meter(budget.max_steps))
    pending = deque(series.override_occurrences(lo, hi))
    try:
        for occurrence in series.master_occurrences(lo, hi):
            while pending and pending[0].start <= occurrence.start:
                yield pending.popleft()
            yield occurrence
    except TooManySteps as error:
        while pending and error.complete_until is not None and pending[0].start < error.complete_until:
            yield pending.popleft()
        raise
    yield from pending


def _undated(obj: CalendarObject) -> bool:
    master = obj.master
    return (
        obj.component == "VTODO"
        and master is not None
        and not obj.overrides
        and master.first("DTSTART") is None
        and master.first("DUE") is None
    )


def _single(obj: CalendarObject, lo: int, hi: int, zone: tzinfo) -> Iterator[Occurrence]:
    """Objects that do not recur: free-busy, availability, tasks without start and due."""
    for component in obj.components:
        if obj.component == "VFREEBUSY":
            span = _free_busy_span(component, obj.calendar, lo, hi, zone)
        elif obj.component == "VTODO":
            span = _undated_span(component, obj.calendar, lo, hi, zone)
        else:
            span = _availability_span(component, obj.calendar, lo, hi, zone)
        if span is not None:
            yield Occurrence(span[0], span[1], None, component, False, False)


def _free_busy_span(
    component: Component, calendar: Component, lo: int, hi: int, zone: tzinfo
) -> tuple[int, int] | None:
    times = times_of(component, calendar, zone)
    if times.start is not None and times.end is not None:
        span = times.start.at(zone), times.end.at(zone)
        return span if times.touches(span, lo, hi) else None
    for prop in component.all("FREEBUSY"):
        for begin, end in periods_of(prop, calendar, zone):
            if lo < end and hi > begin:
                return begin, end
    return None


def _availability_span(
    component: Component, calendar: Component, lo: int, hi: int, zone: tzinfo
) -> tuple[int, int] | None:
    times = times_of(component, calendar, zone)
    start = FIRST_S if times.start is None else times.start.at(zone)
    end = LAST_S if times.end is None else times.end.at(zone)
    if times.end is None and times.duration is not None and times.start is not None:
        end = times.duration.after(times.start.local, times.wall)
    return (start, end) if lo < end and hi > start else None


def _undated_span(
    component: Component, calendar: Component, lo: int, hi: int, zone: tzinfo
) -> tuple[int, int] | None:
    """RFC 4791 §9.9, the last rows of the VTODO table."""
    completed, created = (_instant(component, name, calendar, zone) for name in ("COMPLETED", "CREATED"))
    if completed is not None and created is not None:
        span = min(created, completed), max(created, completed)
        matches = (lo <= created or lo <= completed) and (hi >= created or hi >= completed)
        return span if matches else None
    if completed is not None:
        return (completed, completed) if lo <= completed <= hi else None
    if created is not None:
        return (created, LAST_S) if hi > created else None
    return FIRST_S, LAST_S


def _instant(component: Component, name: str, calendar: Component, zone: tzinfo) -> int | None:
    moment = moment_in(component, name, calendar)
    return None if moment is None else moment.at(zone)


def property_in_range(
    prop: Property, calendar: Component, start: datetime | None, end: datetime | None, zone: tzinfo
) -> bool:
    """Whether a date property (COMPLETED, CREATED, DTSTAMP, LAST-MODIFIED, ...) lies in [start, end).

    Spec: RFC 4791 §9.9, last paragraph: a DATE is its whole day.
    """
    lo, hi = seconds_of(start, FIRST_S), seconds_of(end, LAST_S + 1)
    moment = moment_of(prop, prop.value, calendar)
    if moment is None:
        return False
    at = moment.at(zone)
    if moment.is_date:
        return lo < instant(moment.local + DAY_S, zone) and hi > at
    return lo <= at < hi


def bounds(
    obj: CalendarObject, zone: tzinfo, budget: Budget = DEFAULT_BUDGET
) -> tuple[int | None, int | None]:
    """Instants between which everything of the object happens, for an index; None is unbounded.

    A superset: an object may overlap [start, end) only if `first < end` and `last > start`. Floating times
    and dates are widened by a day, so that the answer holds whatever time zone a query brings. Alarms are not
    in it: they may ring long before.

    Cost: at most `BOUND_STEPS`, for the end of a COUNT.
    """
    if obj.component in {"VFREEBUSY", "VAVAILABILITY"} or _undated(obj):
        return _single_bounds(obj, zone)
    series = Series(obj, zone, Meter(min(budget.max_steps, BOUND_STEPS)))
    spans = [t.span(t.anchor.local) for _, t, _ in series.overrides if t.anchor is not None]
    slack = max((_slack(t) for _, t, _ in series.overrides), default=0)
    endless = False
    if series.master is not None and series.anchor is not None:
        slack = max(slack, _slack(series.master))
        first, last = _master_bounds(series)
        spans.append((first, first))
        endless = last is None
        spans.append((first, first if last is None else last))
    if not spans:
        return None, None
    # one second more on both sides: some rules of RFC 4791 §9.9 compare with <= where an index has <
    lowest = min(start for start, _ in spans) - slack - 1
    highest = max(end for _, end in spans) + slack + 1
    return lowest, None if endless else highest


def _slack(times: Times) -> int:
    return 0 if times.anchor is None or times.anchor.zone is not None else ZONE_SLACK_S


def _master_bounds(series: Series) -> tuple[int, int | None]:
    assert series.master is not None
    assert series.anchor is not None
    lengths = [series.master.length_s, *(shift.times.length_s for shift in series.shifts)]
    length = max(lengths) + DAY_S  # DATE values and nominal days
    span = series.master.span(series.anchor.local)
    first, last = span
    for local, end in series.dates.items():
        at = instant(local, series.wall)
        first, last = min(first, at), max(last, at + length, end or at)
    for rule in series.rules:
        if rule.endless:
            return first - series.reach, None
        final = series.until(rule)
        if rule.count is not None:
            try:
                final = max(series.rule_starts(rule, FIRST_S, LAST_S), default=series.anchor.local)
            except OutOfSteps:
                if rule.until is None:
                    return first - series.reach, None
        last = max(last, instant(min(final, LAST_S), series.wall) + length)
    return first - series.reach, last + series.reach + (GAP_S if series.rules else 0)


def _single_bounds(obj: CalendarObject, zone: tzinfo) -> tuple[int | None, int | None]:
    spans = list(_single(obj, FIRST_S, LAST_S + 1, zone))
    if not spans:
        return None, None
    if obj.component == "VFREEBUSY":
        periods = [
            period
            for component in obj.components
            for prop in component.all("FREEBUSY")
            for period in periods_of(prop, obj.calendar, zone)
        ]
        periods += [(span.start, span.end) for span in spans]
        starts_at, ends_at = min(begin for begin, _ in periods), max(end for _, end in periods)
    else:
        starts_at, ends_at = min(span.start for span in spans), max(span.end for span in spans)
    return (
        None if starts_at <= FIRST_S else starts_at - ZONE_SLACK_S,
        None if ends_at >= LAST_S else ends_at + ZONE_SLACK_S,
    )


# --- alarms ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Alarm:
    """One ringing of a VALARM. `occurrence` is None for an alarm at an absolute time."""

    at: int
    alarm: Component
    component: Component  # the event or task it belongs to
    occurrence: Occurrence | None


@dataclass(frozen=True, slots=True)
class _Trigger:
    """A VALARM as offsets: rings at the anchor + `offset` and `repeat` times again, `every_s` apart."""

    alarm: Component
    offset: Duration
    related_end: bool
    repeat: int
    every_s: int

    @property
    def reach_s(self) -> int:
        return abs(self.offset.total_s) + self.repeat * self.every_s + DAY_S

    def ringings(self, first: int, lo: int, hi: int) -> Iterator[int]:
        """The ringings in [lo, hi), the first of all being at `first`."""
        skipped = max(0, -((first - lo) // self.every_s)) if self.every_s else 0
        for number in range(skipped, self.repeat + 1):
            at = first + number * self.every_s
            if at >= hi:
                return
            if at >= lo:
                yield at


def alarms(
    obj: CalendarObject,
    start: datetime | None,
    end: datetime | None,
    *,
    zone: tzinfo,
    budget: Budget = DEFAULT_BUDGET,
) -> Iterator[Alarm]:
    """The alarms that ring in [start, end), in no particular order.

    Args:
        obj, start, end, zone, budget: as for `occurrences`.

    Raises:
        TooManySteps: as for `occurrences`; `max_instances` counts ringings.

    Spec: RFC 4791 §9.9 (VALARM), RFC 5545 §3.6.6, §3.8.6.
    Cost: as `occurrences` over the range widened by the longest trigger.
    """
    lo, hi = seconds_of(start, FIRST_S), seconds_of(end, LAST_S + 1)
    for given, alarm in enumerate(_ringing(obj, lo, hi, zone, budget), 1):
        if given > budget.max_instances:
            raise TooManySteps(None)
        yield alarm


def _ringing(obj: CalendarObject, lo: int, hi: int, zone: tzinfo, budget: Budget) -> Iterator[Alarm]:
    triggers: dict[int, list[_Trigger]] = {}
    for component in obj.components:
        relative = triggers.setdefault(id(component), [])
        for alarm in component.children:
            if alarm.name != "VALARM":
                continue
            trigger = _trigger(alarm, obj.calendar, zone)
            if isinstance(trigger, int):
                only = _Trigger(alarm, Duration(0, 0), False, *_repeats(alarm))
                for at in only.ringings(trigger, lo, hi):
                    yield Alarm(at, alarm, component, None)
            elif trigger is not None:
                relative.append(trigger)
    reach = max((trigger.reach_s for found in triggers.values() for trigger in found), default=None)
    if reach is None:
        return
    for occurrence in _all(obj, lo - reach, hi + reach, zone, budget):
        for trigger in triggers.get(id(occurrence.component), ()):
            base = occurrence.end if trigger.related_end else occurrence.start
            for at in trigger.ringings(_offset(base, trigger.offset, zone), lo, hi):
                yield Alarm(at, trigger.alarm, occurrence.component, occurrence)


def _offset(at: int, offset: Duration, zone: tzinfo) -> int:
    return at + offset.total_s if not offset.days else offset.after(wall_clock(at, zone), zone)


def _trigger(alarm: Component, calendar: Component, zone: tzinfo) -> _Trigger | int | None:
    """Offsets, or the instant of an absolute trigger; None if it is neither."""
    prop = alarm.first("TRIGGER")
    if prop is None:
        return None
    try:
        offset = parse_duration(prop.value)
    except BadTime:
        moment = moment_of(prop, prop.value, calendar)
        return None if moment is None else moment.at(zone)
    related_end = (prop.param("RELATED") or "").upper() == "END"
    return _Trigger(alarm, offset, related_end, *_repeats(alarm))


def _repeats(alarm: Component) -> tuple[int, int]:
    """How often an alarm rings again, and seconds between."""
    every = duration_in(alarm, "DURATION")
    text = (alarm.text("REPEAT") or "").strip()
    if every is None or every.total_s <= 0 or not (text.isascii() and text.isdigit() and len(text) < 10):
        return 0, 0
    return int(text), every.total_s


# --- expand and limit ------------------------------------------------------------------------------

_RECURRENCE = frozenset({"RRULE", "RDATE", "EXDATE", "EXRULE", "RECURRENCE-ID"})


def expand(
    obj: CalendarObject,
    start: datetime,
    end: datetime,
    zone: tzinfo,
    budget: Budget = DEFAULT_BUDGET,
) -> Component:
    """A VCALENDAR with one component per instance in [start, end), its times in UTC.

    Dates stay dates and floating times floating. Without VTIMEZONE and recurrence properties.

    Raises:
        TooManySteps: too many steps, instances or bytes; nothing is returned; `known` holds the components
            made so far.

    Spec: RFC 4791 §9.6.5.
    Cost: as `occurrences`, and one copy of the properties per instance.
    """
    made: list[Component] = []
    sizes = {id(component): _size(component) for component in obj.components}
    size = 0
    try:
        for occurrence in occurrences(obj, start, end, zone=zone, budget=budget):
            size += sizes[id(occurrence.component)]
            if size > budget.max_bytes:
                raise TooManySteps(occurrence.start)
            made.append(_instance(occurrence, obj, zone))
    except TooManySteps as error:
        raise TooManySteps(error.complete_until, tuple(made)) from None
    calendar = obj.calendar
    return Component(calendar.name, calendar.properties, tuple(made))


def _size(component: Component) -> int:
    """Some bytes more or less than the text of one instance."""
    return sum(len(prop.raw) + 2 for each in component.walk() for prop in each.properties)


def _instance(occurrence: Occurrence, obj: CalendarObject, zone: tzinfo) -> Component:
    """The component of one instance, for itself alone."""
    component = occurrence.component
    properties = []
    for prop in component.properties:
        if prop.name == "DTSTART" or (prop.name == "DUE" and component.first("DTSTART") is None):
            properties.append(_rewritten(prop, occurrence.start, occurrence, obj, zone))
            if occurrence.recurrence_id is not None:
                properties.append(_recurrence_id(occurrence.recurrence_id))
        elif prop.name in {"DTEND", "DUE"}:
            properties.append(_rewritten(prop, occurrence.end, occurrence, obj, zone))
        elif prop.name not in _RECURRENCE:
            properties.append(_in_utc(prop, obj.calendar))
    return Component(component.name, tuple(properties), component.children)


def _rewritten(
    prop: Property, at: int, occurrence: Occurrence, obj: CalendarObject, zone: tzinfo
) -> Property:
    params = tuple(param for param in prop.params if param[0] != "TZID")
    if occurrence.all_day:
        return make_property(prop.name, date_text(wall_clock(at, zone)), params)
    if occurrence.floating:
        return make_property(prop.name, date_time_text(wall_clock(at, zone)), params)
    return make_property(prop.name, utc_text(at), params)


def _recurrence_id(value: date | datetime) -> Property:
    if not isinstance(value, datetime):
        return make_property("RECURRENCE-ID", value.strftime("%Y%m%d").zfill(8), (("VALUE", ("DATE",)),))
    if value.tzinfo is None:
        return make_property("RECURRENCE-ID", value.isoformat().replace("-", "").replace(":", "")[:15])
    return make_property("RECURRENCE-ID", utc_text(seconds_of(value, 0)))


def _in_utc(prop: Property, calendar: Component) -> Property:
    """A property that named a time zone, without it."""
    if prop.param("TZID") is None:
        return prop
    moment = moment_of(prop, prop.value, calendar)
    params = tuple(param for param in prop.params if param[0] != "TZID")
    if moment is None or moment.zone is None:
        return make_property(prop.name, prop.value, params)
    return make_property(prop.name, utc_text(instant(moment.local, moment.zone)), params)


def limit_recurrence_set(
    obj: CalendarObject,
    start: datetime,
    end: datetime,
    zone: tzinfo,
    budget: Budget = DEFAULT_BUDGET,
) -> Component:
    """The VCALENDAR with the master, the time zones and the overrides that matter in [start, end).

    An override matters if it happens there, would have happened there, or changes everything after it.

    Spec: RFC 4791 §9.6.6.
    Cost: linear in the number of overrides; no rule is followed, so the budget is not spent.
    """
    if obj.master is None:
        return obj.calendar
    lo, hi = seconds_of(start, FIRST_S), seconds_of(end, LAST_S + 1)
    series = Series(obj, zone, Meter(budget.max_steps))
    length = 0 if series.master is None else series.master.length_s + DAY_S
    futures = {id(shift.component) for shift in series.shifts if shift.local < hi + ZONE_SLACK_S}
    kept = {id(shown.component) for shown in series.override_occurrences(lo, hi)} | futures
    for component, _, named in series.overrides:
        at = named.at(zone)
        if at < hi and at + max(length, 1) > lo:
            kept.add(id(component))
    left_out = {id(component) for component in obj.overrides} - kept
    children = tuple(child for child in obj.calendar.children if id(child) not in left_out)
    return Component(obj.calendar.name, obj.calendar.properties, children)


def limit_freebusy_set(obj: CalendarObject, start: datetime, end: datetime, zone: tzinfo) -> Component:
    """The VCALENDAR with only the FREEBUSY values that overlap [start, end).

    Spec: RFC 4791 §9.6.7.
    """
    lo, hi = seconds_of(start, FIRST_S), seconds_of(end, LAST_S + 1)

    def limited(prop: Property) -> Iterator[Property]:
        if prop.name != "FREEBUSY":
            yield prop
            return
        kept = []
        for text in prop.value.split(","):
            one = Property(prop.name, prop.params, text, prop.raw)
            if any(lo < until and hi > begin for begin, until in periods_of(one, obj.calendar, zone)):
                kept.append(text)
        if kept:
            yield make_property(prop.name, ",".join(kept), prop.params)

    def limited_child(child: Component) -> Component:
        if child.name != "VFREEBUSY":
            return child
        properties = tuple(new for prop in child.properties for new in limited(prop))
        return Component(child.name, properties, child.children)

    children = tuple(limited_child(child) for child in obj.calendar.children)
    return Component(obj.calendar.name, obj.calendar.properties, children)


# --- free and busy ---------------------------------------------------------------------------------

Busy = tuple[int, int, str]  # instants of begin and end, FBTYPE


def busy_periods(
    obj: CalendarObject,
    start: datetime,
    end: datetime,
    zone: tzinfo,
    budget: Budget = DEFAULT_BUDGET,
) -> list[Busy]:
    """When the object keeps its owner busy within [start, end), cut to it, sorted.

    Events count unless TRANSPARENT or CANCELLED, as BUSY-TENTATIVE when TENTATIVE; VFREEBUSY objects count
    with their FREEBUSY periods, FREE ones left out; tasks and journal entries do not count.

    Raises:
        TooManySteps: nothing is returned; `known` holds the periods found so far.

    Spec: RFC 4791 §7.10.
    """
    lo, hi = seconds_of(start, FIRST_S), seconds_of(end, LAST_S + 1)
    found: list[Busy] = []
    if obj.component == "VFREEBUSY":
        for component in obj.components:
            for prop in component.all("FREEBUSY"):
                kind = (prop.param("FBTYPE") or "BUSY").upper()
                if kind != "FREE":
                    found += [(*period, kind) for period in periods_of(prop, obj.calendar, zone)]
    elif obj.component == "VEVENT":
        try:
            for occurrence in occurrences(obj, start, end, zone=zone, budget=budget):
                shown = _busy_kind(occurrence.component)
                if shown is not None:
                    found.append((occurrence.start, occurrence.end, shown))
        except TooManySteps as error:
            raise TooManySteps(error.complete_until, tuple(_cut(found, lo, hi))) from None
    return _cut(found, lo, hi)


def _busy_kind(component: Component) -> str | None:
    if (component.text("TRANSP") or "").strip().upper() == "TRANSPARENT":
        return None
    status = (component.text("STATUS") or "").strip().upper()
    if status == "CANCELLED":
        return None
    return "BUSY-TENTATIVE" if status == "TENTATIVE" else "BUSY"


def _cut(periods: Iterable[Busy], lo: int, hi: int) -> list[Busy]:
    cut = ((max(begin, lo), min(end, hi), kind) for begin, end, kind in periods)
    return sorted(period for period in cut if period[0] < period[1])


def free_busy(periods: Iterable[Busy], start: datetime, end: datetime, dtstamp: datetime) -> Component:
    """The VCALENDAR that answers a free-busy query: periods of one FBTYPE that touch are one.

    Spec: RFC 4791 §7.10, RFC 5545 §3.6.4, §3.8.2.6.
    """
    merged: dict[str, list[tuple[int, int]]] = {}
    for begin, until, kind in sorted(periods):
        rows = merged.setdefault(kind, [])
        if rows and begin <= rows[-1][1]:
            rows[-1] = rows[-1][0], max(rows[-1][1], until)
        else:
            rows.append((begin, until))
    properties = [
        make_property(name, utc_text(seconds_of(when, 0)))
        for name, when in (("DTSTAMP", dtstamp), ("DTSTART", start), ("DTEND", end))
    ]
    for kind, rows in sorted(merged.items()):
        params = () if kind == "BUSY" else (("FBTYPE", (kind,)),)
        properties += [
            make_property("FREEBUSY", f"{utc_text(begin)}/{utc_text(until)}", params) for begin, until in rows
        ]
    return calendar_of([Component("VFREEBUSY", tuple(properties))])
