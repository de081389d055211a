"""Recurrence rules (RFC 5545 §3.3.10): the grammar, and an iterator that cannot be made to run away.

The iterator works on whole seconds of a wall clock, counted from 1970-01-01T00:00:00 on that clock, so it
needs no time zone. Every loop step is paid for from a `Meter`, also those that yield nothing: a rule that
never matches (`BYMONTH=2;BYMONTHDAY=30`) costs its budget and not an afternoon. Rules without COUNT jump
straight to the window that is asked for, however long ago they began.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import MAXYEAR, MINYEAR, date
from itertools import product

YEARLY, MONTHLY, WEEKLY, DAILY, HOURLY, MINUTELY, SECONDLY = range(7)
FREQUENCIES = {
    "YEARLY": YEARLY,
    "MONTHLY": MONTHLY,
    "WEEKLY": WEEKLY,
    "DAILY": DAILY,
    "HOURLY": HOURLY,
    "MINUTELY": MINUTELY,
    "SECONDLY": SECONDLY,
}
WEEKDAYS = {"MO": 0, "TU": 1, "WE": 2, "TH": 3, "FR": 4, "SA": 5, "SU": 6}
DAY_S = 86_400
EPOCH_ORDINAL = date(1970, 1, 1).toordinal()
FIRST_DAY = date(MINYEAR, 1, 1).toordinal() - EPOCH_ORDINAL
LAST_DAY = date(MAXYEAR, 12, 31).toordinal() - EPOCH_ORDINAL
FIRST_S = FIRST_DAY * DAY_S
LAST_S = LAST_DAY * DAY_S + DAY_S - 1
CYCLE_DAYS = 146_097  # the Gregorian calendar, weekdays included, repeats after 400 years
_UNIT_S = {HOURLY: 3_600, MINUTELY: 60, SECONDLY: 1}
_MONTH_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_BYDAY = re.compile(r"([+-]?\d{1,2})?(MO|TU|WE|TH|FR|SA|SU)", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d{1,12}", re.ASCII)
_RANGES = {  # part -> (lowest, highest, negative allowed)
    "BYSECOND": (0, 60, False),
    "BYMINUTE": (0, 59, False),
    "BYHOUR": (0, 23, False),
    "BYMONTHDAY": (1, 31, True),
    "BYYEARDAY": (1, 366, True),
    "BYWEEKNO": (1, 53, True),
    "BYMONTH": (1, 12, False),
    "BYSETPOS": (1, 366, True),
}


class BadRule(ValueError):
    """Text that is no recurrence rule; `rscale` tells a calendar system that is not kept here."""

    def __init__(self, text: str, *, rscale: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.rscale = rscale


class OutOfSteps(ValueError):
    """The meter is empty; everything up to `at` (wall-clock seconds) had been found."""

    def __init__(self, at: int) -> None:
        super().__init__("The recurrence needs more steps than one request may spend.")
        self.at = at


class Meter:
    """Steps left for one object; shared by all its rules."""

    __slots__ = ("left",)

    def __init__(self, steps: int) -> None:
        """`steps`: loop steps, at some 1 µs each."""
        self.left = steps

    def spend(self, steps: int, at: int) -> None:
        """Pay for work at the wall-clock second `at`.

        Raises:
            OutOfSteps: nothing is left.
        """
        self.left -= steps
        if self.left < 0:
            raise OutOfSteps(at)


@dataclass(frozen=True, slots=True)
class Rule:
    """A parsed RRULE; lists are sorted and without doubles, empty when the part is absent."""

    freq: int
    interval: int = 1
    count: int | None = None
    until: str | None = None  # as written: DATE, or DATE-TIME local or UTC
    by_second: tuple[int, ...] = ()
    by_minute: tuple[int, ...] = ()
    by_hour: tuple[int, ...] = ()
    by_day: tuple[tuple[int, int], ...] = ()  # (weekday with Monday 0, ordinal or 0)
    by_monthday: tuple[int, ...] = ()
    by_yearday: tuple[int, ...] = ()
    by_weekno: tuple[int, ...] = ()
    by_month: tuple[int, ...] = ()
    by_setpos: tuple[int, ...] = ()
    wkst: int = 0

    @property
    def endless(self) -> bool:
        """Neither COUNT nor UNTIL."""
        return self.count is None and self.until is None

    @property
    def plain(self) -> bool:
        """No BY part at all."""
        return not (
            self.by_second
            or self.by_minute
            or self.by_hour
            or self.by_day
            or self.by_monthday
            or self.by_yearday
            or self.by_weekno
            or self.by_month
            or self.by_setpos
        )


def parse_rule(text: str) -> Rule:
    """The rule of a RRULE or EXRULE value.

    Parts that RFC 5545 does not know are ignored; BYDAY ordinals where they mean nothing as well.

    Raises:
        BadRule: FREQ missing or unknown, INTERVAL below 1, a number out of its range, another RSCALE than
            GREGORIAN.

    Spec: RFC 5545 §3.3.10, RFC 7529 §4.
    """
    parts = {}
    for part in text.strip().upper().split(";"):
        name, _, value = part.strip().partition("=")
        if name:
            parts[name] = value.strip()
    if parts.get("RSCALE", "GREGORIAN") != "GREGORIAN":
        raise BadRule("Only Gregorian recurrence rules are kept here.", rscale=True)
    freq = FREQUENCIES.get(parts.get("FREQ", ""))
    if freq is None:
        raise BadRule("A recurrence rule has no known FREQ.")
    interval = _number(parts.get("INTERVAL", "1"), "INTERVAL")
    if interval < 1:
        raise BadRule("INTERVAL of a recurrence rule must be at least 1.")
    count = _number(parts["COUNT"], "COUNT") if "COUNT" in parts else None
    if count is not None and count < 0:
        raise BadRule("COUNT of a recurrence rule is negative.")
    wkst = WEEKDAYS.get(parts.get("WKST", "MO"))
    if wkst is None:
        raise BadRule("WKST of a recurrence rule is no weekday.")
    return Rule(
        freq=freq,
        interval=interval,
        count=count,
        until=parts.get("UNTIL") or None,
        by_second=tuple(sorted({min(second, 59) for second in _numbers(parts, "BYSECOND")})),
        by_minute=_numbers(parts, "BYMINUTE"),
        by_hour=_numbers(parts, "BYHOUR"),
        by_day=_weekdays(parts.get("BYDAY", "")),
        by_monthday=_numbers(parts, "BYMONTHDAY"),
        by_yearday=_numbers(parts, "BYYEARDAY"),
        by_weekno=_numbers(parts, "BYWEEKNO"),
        by_month=_numbers(parts, "BYMONTH"),
        by_setpos=_numbers(parts, "BYSETPOS"),
        wkst=wkst,
    )


def _number(text: str, part: str) -> int:
    text = text.strip()
    if _NUMBER.fullmatch(text) is None:
        raise BadRule(f"{part} of a recurrence rule holds no number.")
    return int(text)


def _numbers(parts: dict[str, str], part: str) -> tuple[int, ...]:
    text = parts.get(part)
    if not text:
        return ()
    low, high, negative = _RANGES[part]
    numbers = {_number(piece, part) for piece in text.split(",") if piece}
    for number in numbers:
        if not low <= (abs(number) if negative else number) <= high:
            raise BadRule(f"{part} of a recurrence rule is out of range.")
    return tuple(sorted(numbers))


def _weekdays(text: str) -> tuple[tuple[int, int], ...]:
    days = set()
    for piece in text.split(","):
        piece = piece.strip()
        if not piece:
            continue
        match = _BYDAY.fullmatch(piece)
        if match is None or abs(int(match[1] or 0)) > 53:
            raise BadRule("BYDAY of a recurrence rule holds no weekday.")
        days.add((WEEKDAYS[match[2]], int(match[1] or 0)))
    return tuple(sorted(days))


# --- iterating -------------------------------------------------------------------------------------


def starts(
    rule: Rule, first: int, meter: Meter, *, after: int = FIRST_S, last: int = LAST_S, skipped: int = 0
) -> Iterator[int]:
    """The wall-clock seconds a rule generates, ascending.

    As in RFC 5545 without the special place of DTSTART: `first` is generated only if the rule matches it.

    Args:
        rule: what `parse_rule` gave; its UNTIL is for the caller to put into `last`.
        first: DTSTART in seconds of its wall clock.
        meter: pays for each step.
        after: nothing before this second is given (but counted, where COUNT asks for it).
        last: nothing after this second is given.
        skipped: instances that COUNT has already seen.

    Raises:
        OutOfSteps: the meter is empty; what was given before is right.

    Spec: RFC 5545 §3.3.10.
    Cost: one to three steps per instance; without COUNT those before `after` are jumped over.
    """
    walk = _Walk(rule, first, after, min(last, LAST_S), skipped)
    if walk.impossible:
        return iter(())
    if rule.freq >= HOURLY:
        return walk.counted(walk.within_days(meter), meter)
    return walk.counted(walk.whole_days(meter), meter)


class _Walk:
    """One pass over a rule: the rule completed from DTSTART, and the window."""

    __slots__ = (
        "after", "day_filtered", "emitted", "first", "first_day",
        "fitting_day", "last", "rule", "seek", "times", "weekdays",
    )  # fmt: skip

    def __init__(self, rule: Rule, first: int, after: int, last: int, skipped: int) -> None:
        self.first = first
        self.first_day, second_of_day = divmod(first, DAY_S)
        self.after = max(after, first)
        self.last = last
        self.rule = _completed(rule, self.first_day)
        self.weekdays = frozenset(weekday for weekday, _ in self.rule.by_day)
        self.times = _times(rule, second_of_day)
        self.day_filtered = bool(
            rule.by_month or rule.by_monthday or rule.by_yearday or rule.by_weekno or rule.by_day
        )
        self.fitting_day: int | None = None  # the last day that passed the filters
        self.emitted = skipped
        # where generation may begin: COUNT needs every earlier instance, unless each period has exactly one
        one_per_period = rule.plain and rule.freq >= WEEKLY
        self.seek = self.after if rule.count is None or one_per_period else first
        if rule.count is not None and one_per_period:
            period_s = rule.interval * _UNIT_S.get(rule.freq, DAY_S * (7 if rule.freq == WEEKLY else 1))
            passed = -((first - self.after) // period_s)
            self.emitted += passed
            self.seek = first + passed * period_s

    @property
    def impossible(self) -> bool:
        """No date has these months and days: February 30 needs no search."""
        rule = self.rule
        if not (rule.by_month and rule.by_monthday):
            return False
        longest = max(_MONTH_DAYS[month - 1] for month in rule.by_month)
        return all(abs(day) > longest for day in rule.by_monthday)

    def counted(self, generated: Iterable[int], meter: Meter) -> Iterator[int]:
        """What was generated from `first` on, cut by COUNT and the window."""
        count = self.rule.count
        emitted = self.emitted
        if count is not None and emitted >= count:
            return
        for start in generated:
            if start < self.first:
                continue
            if start > self.last:
                return
            emitted += 1
            if start >= self.after:
                yield start
            if count is not None and emitted >= count:
                return

    # --- YEARLY to DAILY: periods of days, each day with the same times

    def whole_days(self, meter: Meter) -> Iterator[int]:
        rule, times = self.rule, self.times
        seek_day = self.seek // DAY_S
        for days in self.periods(meter):
            if rule.by_setpos:
                meter.spend(len(rule.by_setpos), days[0] * DAY_S if days else self.first)
                for at in _positions(rule.by_setpos, len(days) * len(times)):
                    yield days[at // len(times)] * DAY_S + times[at % len(times)]
                continue
            for day in days:
                if day < seek_day:
                    continue
                midnight = day * DAY_S
                meter.spend(len(times), midnight)
                for time in times:
                    yield midnight + time

    def periods(self, meter: Meter) -> Iterator[list[int]]:
        """The days of each period, from the one that holds `seek` to the one that holds `last`."""
        freq = self.rule.freq
        if freq == DAILY:
            return self.daily(meter)
        if freq == WEEKLY:
            return self.weekly(meter)
        if freq == MONTHLY:
            return self.monthly(meter)
        return self.yearly(meter)

    def daily(self, meter: Meter) -> Iterator[list[int]]:
        rule, interval = self.rule, self.rule.interval
        limited = bool(rule.by_month or rule.by_monthday or rule.by_yearday or rule.by_weekno)
        cost = 5 if limited else 1
        day = _aligned(self.first_day, self.seek // DAY_S, interval)
        last_day = self.last // DAY_S
        while day <= last_day:
            meter.spend(cost, day * DAY_S)
            if (not self.weekdays or (day + 3) % 7 in self.weekdays) and (not limited or self.day_fits(day)):
                yield [day]
                day += interval
            elif rule.by_month:
                day = _aligned(self.first_day, max(day + 1, self.month_that_fits(day)), interval)
            else:
                day += interval

    def weekly(self, meter: Meter) -> Iterator[list[int]]:
        rule = self.rule
        week = self.first_day - (self.first_day + 3 - rule.wkst) % 7
        step = 7 * rule.interval
        # a week that began before the wanted day may still hold it
        week = _aligned(week, self.seek // DAY_S - 6, step)
        offsets = sorted((weekday - rule.wkst) % 7 for weekday in self.weekdays) or range(7)
        limited = bool(rule.by_month or rule.by_monthday or rule.by_yearday or rule.by_weekno)
        last_day = self.last // DAY_S
        while week <= last_day:
            meter.spend(35 if limited else 1, week * DAY_S)
            days = [week + offset for offset in offsets if FIRST_DAY <= week + offset <= LAST_DAY]
            yield [day for day in days if self.day_fits(day)] if limited else days
            week += step

    def monthly(self, meter: Meter) -> Iterator[list[int]]:
        rule = self.rule
        last = _month_index(self.last // DAY_S)
        month = _aligned(_month_index(self.first_day), _month_index(self.seek // DAY_S), rule.interval)
        while month <= last:
            year, zero_month = divmod(month, 12)
            begin, end = _month_span(year, zero_month + 1)
            meter.spend(1, begin * DAY_S)
            if not rule.by_month or zero_month + 1 in rule.by_month:
                yield self.span_days(begin, end, meter)
            month += rule.interval

    def yearly(self, meter: Meter) -> Iterator[list[int]]:
        rule = self.rule
        last = _date(self.last // DAY_S).year
        year = _aligned(_date(self.first_day).year, _date(self.seek // DAY_S).year, rule.interval)
        while year <= last:
            begin, end = _month_span(year, 1)[0], _month_span(year, 12)[1]
            meter.spend(5, begin * DAY_S)
            if rule.by_month and not rule.by_yearday and not rule.by_weekno:
                days = []
                for month in rule.by_month:
                    days += self.span_days(*_month_span(year, month), meter)
                yield days
            else:
                yield self.span_days(begin, end, meter)
            year += rule.interval

    def span_days(self, begin: int, end: int, meter: Meter) -> list[int]:
        """The days of one month or year that fit; BYDAY ordinals count inside it."""
        rule = self.rule
        if not (rule.by_yearday or rule.by_weekno or rule.by_monthday):
            found = _ordinal_weekdays(rule.by_day, begin, end)
            meter.spend(len(rule.by_day) + len(found) // 4, begin * DAY_S)
            return found
        candidates: Sequence[int]
        if rule.by_yearday:
            candidates = _from_both_ends(rule.by_yearday, *_year_span(begin))
        elif rule.by_weekno:
            candidates = range(begin, end + 1)
        else:
            candidates = [
                day for span in _months_in(begin, end) for day in _from_both_ends(rule.by_monthday, *span)
            ]
        meter.spend(5 * (1 + len(candidates)), begin * DAY_S)
        found = [day for day in candidates if begin <= day <= end and self.day_fits(day)]
        if rule.by_day and found:
            scope = self.ordinal_scope
            found = [day for day in found if _weekday_fits(rule.by_day, day, *scope(day, begin, end))]
        return found

    def ordinal_scope(self, day: int, begin: int, end: int) -> tuple[int, int]:
        """Where the ordinals of BYDAY count for `day`: its month with BYMONTH, else the whole span."""
        if self.rule.by_month and end - begin > 31:
            when = _date(day)
            return _month_span(when.year, when.month)
        return begin, end

    def day_fits(self, day: int) -> bool:
        """BYMONTH, BYMONTHDAY, BYYEARDAY and BYWEEKNO as filters."""
        rule = self.rule
        when = _date(day)
        if rule.by_month and when.month not in rule.by_month:
            return False
        if rule.by_monthday:
            _, end = _month_span(when.year, when.month)
            if when.day not in rule.by_monthday and day - end - 1 not in rule.by_monthday:
                return False
        if rule.by_yearday:
            begin, end = _year_span(day)
            if day - begin + 1 not in rule.by_yearday and day - end - 1 not in rule.by_yearday:
                return False
        if rule.by_weekno:
            number, weeks = _week(day, rule.wkst)
            return number in rule.by_weekno or number - weeks - 1 in rule.by_weekno
        return True

    def month_that_fits(self, day: int) -> int:
        """The first day of the next month of BYMONTH, or `day` when its own month is one."""
        when = _date(day)
        months = self.rule.by_month
        if when.month in months:
            return day
        at = bisect_left(months, when.month)
        if at < len(months):
            return _month_span(when.year, months[at])[0]
        return _month_span(when.year + 1, months[0])[0] if when.year < MAXYEAR else LAST_DAY + 1

    # --- HOURLY to SECONDLY: units of time, days as filters

    def within_days(self, meter: Meter) -> Iterator[int]:
        rule = self.rule
        unit = _UNIT_S[rule.freq]
        step = unit * rule.interval
        base = self.first - self.first % unit
        offsets = _offsets(rule, self.first % unit)
        at = _aligned(base, self.seek - unit + 1, step)
        filtered = bool(rule.by_hour or rule.by_minute or rule.by_second or self.day_filtered)
        cost = 2 if filtered else 1
        while at <= self.last:
            meter.spend(cost, at)
            if filtered:
                jump = self.unit_that_fits(at, meter)
                if jump > at:
                    at = _aligned(base, jump, step)
                    continue
            if rule.by_setpos:
                for position in _positions(rule.by_setpos, len(offsets)):
                    yield at + offsets[position]
            else:
                if len(offsets) > 1:
                    meter.spend(len(offsets), at)
                for offset in offsets:
                    yield at + offset
            at += step

    def unit_that_fits(self, at: int, meter: Meter) -> int:
        """`at` if the filters accept it, else a second before which they accept none."""
        rule = self.rule
        day, second = divmod(at, DAY_S)
        if day != self.fitting_day and self.day_filtered:
            meter.spend(5, at)
            if rule.by_month:
                month = self.month_that_fits(day)
                if month > day:
                    return month * DAY_S
            if (self.weekdays and (day + 3) % 7 not in self.weekdays) or not self.day_fits(day):
                return (day + 1) * DAY_S
            self.fitting_day = day
        if rule.by_hour and second // 3_600 not in rule.by_hour:
            return at - second % 3_600 + 3_600
        if rule.freq >= MINUTELY and rule.by_minute and second // 60 % 60 not in rule.by_minute:
            return at - second % 60 + 60
        if rule.freq == SECONDLY and rule.by_second and second % 60 not in rule.by_second:
            return at + 1
        return at


def _completed(rule: Rule, first_day: int) -> Rule:
    """The rule with what it leaves to DTSTART (RFC 5545 §3.3.10, last paragraphs) filled in."""
    when = _date(first_day)
    weekday = (((first_day + 3) % 7, 0),)
    if rule.by_yearday or rule.by_monthday or rule.by_day:
        return rule
    if rule.freq == WEEKLY or (rule.freq == YEARLY and rule.by_weekno):
        return replace(rule, by_day=weekday)
    if rule.by_weekno:
        return rule
    if rule.freq == MONTHLY:
        return replace(rule, by_monthday=(when.day,))
    if rule.freq == YEARLY:
        return replace(rule, by_monthday=(when.day,), by_month=rule.by_month or (when.month,))
    return rule


def _times(rule: Rule, second_of_day: int) -> list[int]:
    """Seconds of the day at which DAILY and longer rules happen."""
    if rule.freq >= HOURLY:
        return []
    hour, rest = divmod(second_of_day, 3_600)
    minute, second = divmod(rest, 60)
    return [
        3_600 * h + 60 * m + s
        for h, m, s in product(
            rule.by_hour or (hour,), rule.by_minute or (minute,), rule.by_second or (second,)
        )
    ]


def _offsets(rule: Rule, rest: int) -> list[int]:
    """Seconds inside one hour or minute that HOURLY and MINUTELY rules expand to."""
    minute, second = divmod(rest, 60)
    if rule.freq == HOURLY:
        return [60 * m + s for m, s in product(rule.by_minute or (minute,), rule.by_second or (second,))]
    if rule.freq == MINUTELY:
        return list(rule.by_second or (second,))
    return [0]


def _aligned(base: int, wanted: int, step: int) -> int:
    """The first of `base`, `base + step`, ... that is not below `wanted`."""
    return base if wanted <= base else base + -(-(wanted - base) // step) * step


def _positions(by_setpos: tuple[int, ...], size: int) -> list[int]:
    """BYSETPOS as indexes into a set of `size`, ascending."""
    return sorted({p - 1 if p > 0 else size + p for p in by_setpos if 0 < abs(p) <= size})


def _date(day: int) -> date:
    return date.fromordinal(min(max(day, FIRST_DAY), LAST_DAY) + EPOCH_ORDINAL)


def _month_index(day: int) -> int:
    when = _date(day)
    return when.year * 12 + when.month - 1


def _month_span(year: int, month: int) -> tuple[int, int]:
    begin = date(year, month, 1).toordinal() - EPOCH_ORDINAL
    length = _MONTH_DAYS[month - 1]
    if month == 2 and (year % 4 or (year % 100 == 0 and year % 400)):
        length = 28
    return begin, begin + length - 1


def _year_span(day: int) -> tuple[int, int]:
    year = _date(day).year
    return _month_span(year, 1)[0], _month_span(year, 12)[1]


def _months_in(begin: int, end: int) -> Iterator[tuple[int, int]]:
    while begin <= end:
        when = _date(begin)
        span = _month_span(when.year, when.month)
        yield span
        begin = span[1] + 1


def _from_both_ends(numbers: tuple[int, ...], begin: int, end: int) -> list[int]:
    """Days by their number in a span, negative from its end, ascending."""
    days = {begin + number - 1 if number > 0 else end + number + 1 for number in numbers}
    return sorted(day for day in days if begin <= day <= end)


def _ordinal_weekdays(by_day: tuple[tuple[int, int], ...], begin: int, end: int) -> list[int]:
    days: set[int] = set()
    for weekday, ordinal in by_day:
        head = begin + (weekday - begin - 3) % 7
        if ordinal == 0:
            days.update(range(head, end + 1, 7))
            continue
        tail = end - (end + 3 - weekday) % 7
        day = head + 7 * (ordinal - 1) if ordinal > 0 else tail + 7 * (ordinal + 1)
        if begin <= day <= end:
            days.add(day)
    return sorted(days)


def _weekday_fits(by_day: tuple[tuple[int, int], ...], day: int, begin: int, end: int) -> bool:
    weekday = (day + 3) % 7
    return any(
        weekday == wanted and ordinal in {0, (day - begin) // 7 + 1, -((end - day) // 7 + 1)}
        for wanted, ordinal in by_day
    )


def _week(day: int, wkst: int) -> tuple[int, int]:
    """Number of the week of `day`, and how many weeks its week year has; week 1 holds January 4."""
    year = _date(day).year
    if year < 2:
        day, year = day + CYCLE_DAYS, year + 400
    elif year > MAXYEAR - 2:
        day, year = day - CYCLE_DAYS, year - 400
    begin = _week_one(year, wkst)
    if day < begin:
        year, begin = year - 1, _week_one(year - 1, wkst)
    following = _week_one(year + 1, wkst)
    if day >= following:
        begin, following = following, _week_one(year + 2, wkst)
    return (day - begin) // 7 + 1, (following - begin) // 7


def _week_one(year: int, wkst: int) -> int:
    fourth = date(year, 1, 4).toordinal() - EPOCH_ORDINAL
    return fourth - (fourth + 3 - wkst) % 7
