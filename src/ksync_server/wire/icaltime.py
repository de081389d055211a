"""Times of iCalendar: DATE, DATE-TIME, DURATION, PERIOD, UTC-OFFSET (RFC 5545 §3.3).

A `Moment` is what an object says; an instant (whole seconds since 1970 UTC) is what it means once the zone
for floating values and dates is known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo

from ksync_server.wire.rrule import DAY_S, EPOCH_ORDINAL, FIRST_S, LAST_S

_MOMENT = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)(?:T(\d\d):?(\d\d):?(\d\d)?(Z?))?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(
    r"([+-]?)P(?:(\d{1,8})W)?(?:(\d{1,8})D)?(?:T(?:(\d{1,10})H)?(?:(\d{1,10})M)?(?:(\d{1,12})S)?)?",
    re.IGNORECASE | re.ASCII,
)
_OFFSET = re.compile(r"([+-])(\d\d):?(\d\d):?(\d\d)?", re.ASCII)
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - a wall clock


class BadTime(ValueError):
    """Text that is no time of iCalendar."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A DATE or DATE-TIME. `local` counts the seconds of its own wall clock since 1970-01-01T00:00:00."""

    local: int
    zone: tzinfo | None  # None: floating, or a DATE
    is_date: bool

    def at(self, zone: tzinfo) -> int:
        """The instant in seconds since 1970 UTC; `zone` holds for floating values and dates."""
        return instant(self.local, self.zone or zone)

    def value(self) -> date | datetime:
        """A date, a naive datetime (floating) or an aware datetime."""
        if self.is_date:
            return date.fromordinal(self.local // DAY_S + EPOCH_ORDINAL)
        wall = _EPOCH + timedelta(seconds=self.local)
        return wall if self.zone is None else wall.replace(tzinfo=self.zone)

    def text(self) -> str:
        """The value as iCalendar writes it; with Z when its zone is UTC."""
        if self.is_date:
            return date_text(self.local)
        return date_time_text(self.local) + ("Z" if self.zone is UTC else "")


@dataclass(frozen=True, slots=True)
class Duration:
    """Days are nominal (a day across a clock change has 23 or 25 hours), seconds exact (RFC 5545 §3.3.6)."""

    days: int
    seconds: int

    def after(self, local: int, zone: tzinfo) -> int:
        """The instant this long after the wall-clock second `local` of `zone`."""
        return instant(local + self.days * DAY_S, zone) + self.seconds

    @property
    def total_s(self) -> int:
        """Seconds when every day has 24 hours."""
        return self.days * DAY_S + self.seconds


def parse_moment(text: str, zone: tzinfo | None = None) -> Moment:
    """A DATE or DATE-TIME.

    Args:
        text: `20260131`, `20260131T101500` or `20260131T101500Z`; the dashes and colons of ISO 8601 that some
            programs write are let pass, second 60 counts as 59.
        zone: that of TZID, for a DATE-TIME without Z.

    Raises:
        BadTime: anything else, or a day no calendar has.

    Spec: RFC 5545 §3.3.4, §3.3.5.
    """
    match = _MOMENT.fullmatch(text.strip())
    if match is None:
        raise BadTime(f"{text[:40]!r} is no date.")
    year, month, day, hour, minute, second, z = match.groups()
    try:
        midnight = (date(int(year), int(month), int(day)).toordinal() - EPOCH_ORDINAL) * DAY_S
        if hour is None:
            return Moment(midnight, None, True)
        clock = time(int(hour), int(minute), min(int(second or 0), 59))
    except ValueError:
        raise BadTime(f"{text[:40]!r} is no date.") from None
    local = midnight + clock.hour * 3_600 + clock.minute * 60 + clock.second
    return Moment(local, UTC if z else zone, False)


def parse_duration(text: str) -> Duration:
    """A DURATION such as `PT1H30M`, `-P1D` or `P2W`.

    Raises:
        BadTime: no duration.

    Spec: RFC 5545 §3.3.6.
    """
    text = text.strip()
    match = _DURATION.fullmatch(text)
    if match is None or text[-1:].upper() in {"P", "T"}:
        raise BadTime(f"{text[:40]!r} is no duration.")
    weeks, days, hours, minutes, seconds = (int(number or 0) for number in match.groups()[1:])
    sign = -1 if match[1] == "-" else 1
    return Duration(sign * (7 * weeks + days), sign * (3_600 * hours + 60 * minutes + seconds))


def parse_offset(text: str) -> int:
    """Seconds east of UTC from `+0200`, `-0330` or `+001234`.

    Raises:
        BadTime: no offset, or of a day or more.

    Spec: RFC 5545 §3.3.14.
    """
    match = _OFFSET.fullmatch(text.strip())
    if match is None:
        raise BadTime(f"{text[:40]!r} is no offset from UTC.")
    seconds = int(match[2]) * 3_600 + int(match[3]) * 60 + int(match[4] or 0)
    if seconds >= DAY_S:
        raise BadTime(f"{text[:40]!r} is no offset from UTC.")
    return -seconds if match[1] == "-" else seconds


def instant(local: int, zone: tzinfo) -> int:
    """Seconds since 1970 UTC of a wall-clock second.

    A time that a clock change skips counts with the offset before it, one that comes twice is the first.

    Spec: RFC 5545 §3.3.5.
    Cost: some 1 µs; nothing for UTC.
    """
    if zone is UTC:
        return local
    # kept a day off the ends of the calendar, where the arithmetic of time zones would overflow
    offset = zone.utcoffset(_EPOCH + timedelta(seconds=min(max(local, FIRST_S + DAY_S), LAST_S - DAY_S)))
    return local if offset is None else local - (offset.days * DAY_S + offset.seconds)


def wall_clock(at: int, zone: tzinfo) -> int:
    """The wall-clock second of `zone` at an instant."""
    if zone is UTC:
        return at
    moment = _EPOCH.replace(tzinfo=UTC) + timedelta(seconds=min(max(at, FIRST_S + DAY_S), LAST_S - DAY_S))
    offset = moment.astimezone(zone).utcoffset()
    return at if offset is None else at + offset.days * DAY_S + offset.seconds


def date_text(local: int) -> str:
    """`20260131`."""
    when = date.fromordinal(min(max(local, FIRST_S), LAST_S) // DAY_S + EPOCH_ORDINAL)
    return f"{when.year:04}{when.month:02}{when.day:02}"


def date_time_text(local: int) -> str:
    """`20260131T101500`."""
    hour, rest = divmod(local % DAY_S, 3_600)
    return f"{date_text(local)}T{hour:02}{rest // 60:02}{rest % 60:02}"


def utc_text(at: int) -> str:
    """`20260131T101500Z` of an instant."""
    return date_time_text(at) + "Z"
