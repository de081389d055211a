"""TZID to tzinfo: the time zone database where a name is known there, else the VTIMEZONE's own rules."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo, available_timezones

from ksync_server.wire.ical import Component
from ksync_server.wire.icaltime import BadTime, parse_moment, parse_offset
from ksync_server.wire.rrule import DAY_S, BadRule, Meter, OutOfSteps, parse_rule, starts

MAX_OBSERVANCES = 400  # of one VTIMEZONE; the longest history in the time zone database has some 250
MAX_ONSETS = 4_000  # clock changes computed of one VTIMEZONE
OBSERVANCE_STEPS = 20_000  # steps for all rules of one VTIMEZONE
CACHED_BYTES = 16_384  # larger VTIMEZONEs are computed anew, so that the cache stays small
LAST_ONSET_S = 4_102_444_800  # 2100-01-01: rules are followed up to here

_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - a wall clock
_FIXED = re.compile(r"(?:UTC|GMT|ETC/GMT)?([+-])(\d{1,2}):?(\d\d)?", re.ASCII)

# CLDR's windowsZones, the territory-neutral rows of names that Outlook and Exchange write
_WINDOWS = {
    "dateline standard time": "Etc/GMT+12",
    "hawaiian standard time": "Pacific/Honolulu",
    "alaskan standard time": "America/Anchorage",
    "pacific standard time": "America/Los_Angeles",
    "us mountain standard time": "America/Phoenix",
    "mountain standard time": "America/Denver",
    "central america standard time": "America/Guatemala",
    "central standard time": "America/Chicago",
    "central standard time (mexico)": "America/Mexico_City",
    "canada central standard time": "America/Regina",
    "sa pacific standard time": "America/Bogota",
    "eastern standard time": "America/New_York",
    "us eastern standard time": "America/Indiana/Indianapolis",
    "venezuela standard time": "America/Caracas",
    "atlantic standard time": "America/Halifax",
    "sa western standard time": "America/La_Paz",
    "pacific sa standard time": "America/Santiago",
    "newfoundland standard time": "America/St_Johns",
    "e. south america standard time": "America/Sao_Paulo",
    "argentina standard time": "America/Argentina/Buenos_Aires",
    "sa eastern standard time": "America/Cayenne",
    "greenland standard time": "America/Nuuk",
    "montevideo standard time": "America/Montevideo",
    "azores standard time": "Atlantic/Azores",
    "cape verde standard time": "Atlantic/Cape_Verde",
    "morocco standard time": "Africa/Casablanca",
    "gmt standard time": "Europe/London",
    "greenwich standard time": "Atlantic/Reykjavik",
    "w. europe standard time": "Europe/Berlin",
    "central europe standard time": "Europe/Budapest",
    "romance standard time": "Europe/Paris",
    "central european standard time": "Europe/Warsaw",
    "w. central africa standard time": "Africa/Lagos",
    "gtb standard time": "Europe/Bucharest",
    "middle east standard time": "Asia/Beirut",
    "egypt standard time": "Africa/Cairo",
    "e. europe standard time": "Europe/Chisinau",
    "south africa standard time": "Africa/Johannesburg",
    "fle standard time": "Europe/Kyiv",
    "israel standard time": "Asia/Jerusalem",
    "turkey standard time": "Europe/Istanbul",
    "jordan standard time": "Asia/Amman",
    "arabic standard time": "Asia/Baghdad",
    "arab standard time": "Asia/Riyadh",
    "russian standard time": "Europe/Moscow",
    "belarus standard time": "Europe/Minsk",
    "e. africa standard time": "Africa/Nairobi",
    "iran standard time": "Asia/Tehran",
    "arabian standard time": "Asia/Dubai",
    "azerbaijan standard time": "Asia/Baku",
    "mauritius standard time": "Indian/Mauritius",
    "georgian standard time": "Asia/Tbilisi",
    "caucasus standard time": "Asia/Yerevan",
    "afghanistan standard time": "Asia/Kabul",
    "west asia standard time": "Asia/Tashkent",
    "ekaterinburg standard time": "Asia/Yekaterinburg",
    "pakistan standard time": "Asia/Karachi",
    "india standard time": "Asia/Kolkata",
    "sri lanka standard time": "Asia/Colombo",
    "nepal standard time": "Asia/Kathmandu",
    "central asia standard time": "Asia/Bishkek",
    "bangladesh standard time": "Asia/Dhaka",
    "myanmar standard time": "Asia/Yangon",
    "se asia standard time": "Asia/Bangkok",
    "n. central asia standard time": "Asia/Novosibirsk",
    "china standard time": "Asia/Shanghai",
    "north asia standard time": "Asia/Krasnoyarsk",
    "singapore standard time": "Asia/Singapore",
    "w. australia standard time": "Australia/Perth",
    "taipei standard time": "Asia/Taipei",
    "tokyo standard time": "Asia/Tokyo",
    "korea standard time": "Asia/Seoul",
    "yakutsk standard time": "Asia/Yakutsk",
    "cen. australia standard time": "Australia/Adelaide",
    "aus central standard time": "Australia/Darwin",
    "e. australia standard time": "Australia/Brisbane",
    "aus eastern standard time": "Australia/Sydney",
    "west pacific standard time": "Pacific/Port_Moresby",
    "tasmania standard time": "Australia/Hobart",
    "vladivostok standard time": "Asia/Vladivostok",
    "central pacific standard time": "Pacific/Guadalcanal",
    "new zealand standard time": "Pacific/Auckland",
    "fiji standard time": "Pacific/Fiji",
    "tonga standard time": "Pacific/Tongatapu",
    "samoa standard time": "Pacific/Apia",
}


def zone_of(tzid: str, calendar: Component, default: tzinfo = UTC) -> tzinfo:
    """The time zone a TZID means inside one calendar object.

    Args:
        tzid: a name of the time zone database (any case, also behind a vendor's prefix such as
            `/freeassociation.sourceforge.net/`), a Windows name, or the name of a VTIMEZONE in `calendar`.
        calendar: the VCALENDAR; read only when the name is not known.
        default: what holds when neither tells.

    Spec: RFC 5545 §3.2.19, §3.6.5, §3.8.3.1; RFC 7809 §3.
    Cost: a cached look-up for known names; else one pass over the children, and a computed zone per distinct
        VTIMEZONE, which is cached.
    """
    known = named_zone(tzid) if len(tzid) <= 255 else None
    if known is not None:
        return known
    for child in calendar.children:
        if child.name == "VTIMEZONE" and child.text("TZID") == tzid:
            return zone_from(child) or default
    return default


def zone_from(vtimezone: Component) -> tzinfo | None:
    """The time zone of a VTIMEZONE: by its name or X-LIC-LOCATION, else by its rules; None if it has none.

    Cost: bounded by `OBSERVANCE_STEPS`, whatever the rules say.
    """
    for name in ("TZID", "X-LIC-LOCATION"):
        text = vtimezone.text(name)
        known = named_zone(text) if text and len(text) <= 255 else None
        if known is not None:
            return known
    size = sum(len(prop.raw) for part in vtimezone.walk() for prop in part.properties)
    return _cached_zone(vtimezone) if size <= CACHED_BYTES else _computed(vtimezone)


@lru_cache(maxsize=1024)
def named_zone(name: str) -> tzinfo | None:
    """A zone by its name alone; None for names nobody but the object's author knows."""
    name = name.strip().strip('"')
    parts = name.split("/")
    names = _database()
    for at in range(len(parts)):
        found = names.get("/".join(parts[at:]).lower())
        if found is not None:
            return UTC if found in {"UTC", "Etc/UTC"} else ZoneInfo(found)
    windows = _WINDOWS.get(name.lower())
    if windows is not None and windows.lower() in names:
        return ZoneInfo(windows)
    return _fixed(name.upper())


@lru_cache(maxsize=1)
def _database() -> dict[str, str]:
    return {name.lower(): name for name in available_timezones()}


def _fixed(name: str) -> tzinfo | None:
    if name in {"UTC", "GMT", "Z"}:
        return UTC
    match = _FIXED.fullmatch(name)
    if match is None or int(match[2]) > 14 or int(match[3] or 0) > 59:
        return None
    sign = -1 if match[1] == "-" else 1
    return timezone(sign * timedelta(hours=int(match[2]), minutes=int(match[3] or 0)))


# --- zones computed from a VTIMEZONE ---------------------------------------------------------------


class RuleZone(tzinfo):
    """A zone with the clock changes of one VTIMEZONE; `fold` as in PEP 495."""

    def __init__(self, name: str, onsets: list[tuple[int, int, int]]) -> None:
        """`onsets`: (instant, offset before, offset after) in seconds, by instant; at least one."""
        self._name = name
        self._at = [at for at, _, _ in onsets]
        self._wall = (
            [at + max(before, after) for at, before, after in onsets],
            [at + min(before, after) for at, before, after in onsets],
        )
        self._offsets = [timedelta(seconds=onsets[0][1])]
        self._offsets += [timedelta(seconds=after) for _, _, after in onsets]

    def utcoffset(self, when: datetime | None, /) -> timedelta | None:
        """The offset of a wall-clock time."""
        if when is None:
            return None
        local = _seconds(when)
        return self._offsets[bisect_right(self._wall[when.fold], local)]

    def dst(self, when: datetime | None, /) -> timedelta | None:
        """Unknown: a VTIMEZONE gives offsets, not how much of them is daylight saving."""
        return None

    def tzname(self, when: datetime | None, /) -> str | None:
        """The TZID."""
        return self._name

    def fromutc(self, when: datetime, /) -> datetime:
        """The wall clock at an instant of UTC."""
        at = _seconds(when)
        index = bisect_right(self._at, at)
        wall = when + self._offsets[index]
        again = index > 0 and at + self._offsets[index].total_seconds() < self._wall[0][index - 1]
        return wall.replace(fold=1) if again else wall


def _seconds(when: datetime) -> int:
    gap = when.replace(tzinfo=None, fold=0) - _EPOCH
    return gap.days * DAY_S + gap.seconds


@lru_cache(maxsize=128)
def _cached_zone(vtimezone: Component) -> tzinfo | None:
    return _computed(vtimezone)


def _computed(vtimezone: Component) -> tzinfo | None:
    meter = Meter(OBSERVANCE_STEPS)
    onsets: list[tuple[int, int, int]] = []
    observances = [part for part in vtimezone.children if part.name in {"STANDARD", "DAYLIGHT"}]
    for observance in observances[:MAX_OBSERVANCES]:
        try:
            onsets.extend(_onsets(observance, meter))
        except (BadTime, BadRule):
            continue
    if not onsets:
        return None
    # the offset before comes from the order of the changes; TZOFFSETFROM of real zones is often wrong
    # two changes at one instant (Outlook begins both in 1601): standard time, the smaller offset, holds
    ordered = sorted(set(onsets), key=lambda onset: (onset[0], onset[2]))[:MAX_ONSETS]
    chained = [ordered[0]]
    for at, _, after in ordered[1:]:
        if at == chained[-1][0]:
            continue
        chained.append((at, chained[-1][2], after))
    name = vtimezone.text("TZID") or ""
    return RuleZone(name, chained)


def _onsets(observance: Component, meter: Meter) -> Iterator[tuple[int, int, int]]:
    begin, before, after = (observance.text(name) for name in ("DTSTART", "TZOFFSETFROM", "TZOFFSETTO"))
    if begin is None or after is None:
        return
    to = parse_offset(after)
    since = to if before is None else parse_offset(before)
    first = parse_moment(begin).local
    yield first - since, since, to
    for prop in observance.all("RDATE"):
        for text in prop.value.split(",")[:MAX_ONSETS]:
            yield parse_moment(text.split("/")[0]).local - since, since, to
    for prop in observance.all("RRULE"):
        rule = parse_rule(prop.value)
        last = LAST_ONSET_S
        if rule.until is not None:
            until = parse_moment(rule.until)
            last = min(last, until.local + since if until.zone is UTC else until.local)
        try:
            for local in starts(rule, first, meter, last=last):
                yield local - since, since, to
        except OutOfSteps:
            return
