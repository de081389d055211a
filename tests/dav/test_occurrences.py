"""The occurrence index: what a row says about time, and what the packed occurrences answer."""

from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksync_server.dav import collections, objects, occurrences
from ksync_server.dav.occurrences import Allowance, Index
from ksync_server.dav.places import Kind
from ksync_server.store.database import Write
from ksync_server.wire import ical, recurrence
from tests.dav.harness import Client, calendar, component, event

UTC = datetime.UTC
ZURICH = ZoneInfo("Europe/Zurich")
DAY = 86400
MAY = 1_777_593_600  # 2026-05-01
BUDGET = recurrence.Budget()


def read(content: str) -> ical.CalendarObject:
    return ical.check_object(ical.parse(content.encode()))


def made(content: str, start: int, end: int, *, budget: recurrence.Budget = BUDGET) -> Index:
    return occurrences.compute(read(content), 1, start, end, UTC, budget)


def when(at: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at, UTC)


def truth(content: str, start: int, end: int, zone: datetime.tzinfo = UTC) -> bool:
    found = recurrence.occurrences(read(content), when(start), when(end), zone=zone)
    return next(found, None) is not None


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("DTSTART:20260501T100000Z",), False),
        (("DTSTART;TZID=Europe/Zurich:20260501T100000",), False),
        (("DTSTART;TZID=Nowhere:20260501T100000",), True),
        (("DTSTART:20260501T100000",), True),
        (("DTSTART;VALUE=DATE:20260501",), True),
        (("DTSTART:20260501T100000Z", "DTEND:20260501T110000"), True),
        (("DTSTART:20260501T100000Z", "RRULE:FREQ=DAILY", "EXDATE:20260502T100000Z"), False),
        (("DTSTART:20260501T100000Z", "RRULE:FREQ=DAILY", "EXDATE:20260502T100000"), True),
        (("DTSTART:20260501T100000Z", "EXDATE:20260502T100000Z", "EXDATE:20260503T100000"), True),
        (("DTSTART:20260501T100000Z", "RDATE;VALUE=PERIOD:20260502T100000Z/20260502T110000"), True),
        (("DTSTART:20260501T100000Z", "RDATE;VALUE=PERIOD:20260502T100000Z/PT1H"), False),
    ],
)
def test_what_depends_on_the_time_zone_of_who_asks_is_floating(
    lines: tuple[str, ...], *, expected: bool
) -> None:
    found = read(calendar(component("VEVENT", "f", *lines)))
    assert occurrences.facts(found, UTC, BUDGET).floating is expected


def test_an_object_that_cannot_be_bounded_is_unbounded() -> None:
    found = read(event("s", "RRULE:FREQ=SECONDLY;COUNT=1000000000"))
    facts = occurrences.facts(found, UTC, BUDGET)
    assert (facts.last_at, facts.recurring) == (None, True)


SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=12)


@given(SPANS, st.integers(-5, 60), st.integers(1, 20), st.booleans())
def test_hits_are_the_overlaps_and_no_other(
    spans: list[tuple[int, int]], start: int, length: int, complete: bool
) -> None:
    spans = sorted((begin, begin + long) for begin, long in spans)
    end = start + length
    packed = occurrences.pack([begin for begin, _ in spans], [until for _, until in spans], 0, 50)
    index = Index(1, 0, 50, packed, complete)
    expected = any(
        (begin < end and until > start) if until > begin else start <= begin < end for begin, until in spans
    )
    found = index.hits(start, end)
    if expected:
        assert found is True
    else:
        assert found is (False if complete and start >= 0 and end <= 50 else None)


RULES = st.builds(
    lambda freq, interval, ending, more: f"RRULE:FREQ={freq};INTERVAL={interval}{ending}{more}",
    st.sampled_from(["DAILY", "WEEKLY", "MONTHLY", "YEARLY"]),
    st.integers(1, 5),
    st.sampled_from(["", ";COUNT=7", ";COUNT=400", ";UNTIL=20270301T000000Z", ";UNTIL=20260601T000000Z"]),
    st.sampled_from(["", ";BYDAY=MO,FR", ";BYMONTHDAY=31", ";BYHOUR=1,23", ";BYMONTH=2,5"]),
)
STARTS = st.sampled_from(
    [
        "DTSTART:20260101T100000Z",
        "DTSTART;TZID=Europe/Zurich:20260329T023000",
        "DTSTART;VALUE=DATE:20260228",
        "DTSTART:20251025T233000",
        "DTSTART;TZID=America/New_York:20200229T120000",
    ]
)
MORE = st.lists(
    st.sampled_from(
        [
            "EXDATE:20260502T100000Z",
            "EXDATE;VALUE=DATE:20260501",
            "RDATE:20260515T120000Z",
            "RDATE;VALUE=PERIOD:20260520T120000Z/P3D",
            "EXRULE:FREQ=MONTHLY",
        ]
    ),
    max_size=3,
    unique=True,
)
OVERRIDES = st.lists(
    st.sampled_from(
        [
            ("RECURRENCE-ID:20260501T100000Z", "DTSTART:20260620T100000Z", "DURATION:PT2H"),
            ("RECURRENCE-ID:20260601T100000Z", "DTSTART;VALUE=DATE:20260530"),
            (
                "RECURRENCE-ID;RANGE=THISANDFUTURE:20260510T100000Z",
                "DTSTART:20260510T160000Z",
                "DURATION:P2D",
            ),
        ]
    ),
    max_size=2,
    unique=True,
)
DURATIONS = st.sampled_from([(), ("DURATION:PT1H",), ("DURATION:P40D",), ("DURATION:PT0S",)])


@settings(max_examples=200, deadline=None)
@given(STARTS, RULES, DURATIONS, MORE, OVERRIDES, st.integers(-400, 900), st.sampled_from([1, 7, 31, 400]))
def test_row_and_index_say_what_the_recurrence_says(
    start: str,
    rule: str,
    duration: tuple[str, ...],
    more: list[str],
    overrides: list[tuple[str, ...]],
    day: int,
    days: int,
) -> None:
    content = calendar(
        component("VEVENT", "r", start, rule, *duration, *more),
        *(component("VEVENT", "r", *lines) for lines in overrides),
    )
    low = MAY + day * DAY + 5 * 3600
    high = low + days * DAY
    found = read(content)
    facts = occurrences.facts(found, ZURICH, BUDGET)
    for zone in (UTC, ZURICH) if facts.floating else (UTC,):
        index = occurrences.compute(found, 1, low, high, zone, BUDGET)
        expected = truth(content, low, high, zone)
        assert index.complete
        assert index.hits(low, high) is expected
        if expected:  # whatever the zone: floating rows are widened
            assert facts.first_at is None or facts.first_at < high
            assert facts.last_at is None or facts.last_at > low
        # every other range within the horizon, too
        for shift in (-300 * DAY, 33 * DAY, 600 * DAY):
            assert index.hits(low + shift, low + shift + DAY) is truth(
                content, low + shift, low + shift + DAY, zone
            )


def test_ranges_open_or_long_are_answered_where_the_horizon_suffices() -> None:
    weekly = event("w", "RRULE:FREQ=WEEKLY", "DURATION:PT1H")
    far = 1 << 62
    assert made(weekly, MAY + 400 * DAY, far).hits(MAY + 400 * DAY, far) is True
    assert made(weekly, -far, MAY + 400 * DAY).hits(-far, MAY + 400 * DAY) is True
    assert made(weekly, MAY, MAY + 10_000 * DAY).hits(MAY, MAY + 10_000 * DAY) is True
    ended = event("e", "RRULE:FREQ=WEEKLY;COUNT=3", "DURATION:PT1H")
    assert made(ended, MAY + 400 * DAY, far).hits(MAY + 400 * DAY, far) is None
    assert made(ended, -far, MAY - 400 * DAY).hits(-far, MAY - 400 * DAY) is None
    assert made(ended, MAY + 400 * DAY, MAY + 500 * DAY).hits(MAY + 400 * DAY, MAY + 500 * DAY) is False
    assert made(weekly, -62_135_596_800, -62_135_500_000).hits(-62_135_596_800, -62_135_500_000) is False
    assert made(weekly, 253_402_200_000, 253_402_300_799).complete


def test_what_cannot_be_followed_to_the_end_is_incomplete_and_says_nothing() -> None:
    for rule, budget in (("FREQ=SECONDLY", BUDGET), ("FREQ=MINUTELY", recurrence.Budget(1 << 30, 1 << 30))):
        index = made(event("s", f"RRULE:{rule}"), MAY, MAY + 31 * DAY, budget=budget)
        assert not index.complete
        assert index.packed == b""
        assert index.hits(MAY, MAY + 31 * DAY) is None


@pytest.mark.parametrize("rule", ["HOURLY;INTERVAL=2", "MINUTELY;INTERVAL=30", "SECONDLY;INTERVAL=600"])
@pytest.mark.parametrize("steps", [5_000, 50_000])
def test_an_index_reaches_as_far_as_the_budget_and_is_right_up_to_there(rule: str, steps: int) -> None:
    start, budget = MAY + 1, recurrence.Budget(steps, 1 << 30)  # a second after an occurrence
    index = made(
        event("s", f"RRULE:FREQ={rule}", start="DTSTART:20250601T100000Z"), start, start + 599, budget=budget
    )
    assert index.complete
    assert index.is_short
    assert index.hits(start, start + 599) is False
    assert index.hits(start, index.until_at + 1) in ({None} if index.until_at < start + 7200 else {True})


def test_the_allowance_shrinks_with_each_object_that_used_it_up() -> None:
    allowance = Allowance(recurrence.Budget(80_000, 7))
    steps = []
    for _ in range(40):
        steps.append((allowance.budget.max_steps, allowance.is_whole))
        allowance.exhausted()
    assert steps == [(80_000, True)] * 3 + [(4_000, False)] * 20 + [(400, False)] * 17
    assert allowance.budget.max_instances == 7


def test_an_index_of_another_version_is_not_kept(client: Client) -> None:
    path = client.make()
    client.put(path + "w.ics", event("w", "RRULE:FREQ=WEEKLY"))
    database = client.store.database
    name = path.split("/")[3]
    with database.read() as tx:
        collection = collections.get(tx, client.identity.account_id, Kind.CALENDAR, name)
        stored = objects.find(tx, collection.id, "w.ics")
    assert stored is not None
    index = Index(stored.seq, 0, 10, occurrences.pack([1], [2], 0, 10), True)
    old = Index(stored.seq - 1, 0, 10, b"", True)

    def keep(tx: Write) -> None:
        occurrences.put_index(tx, stored.id, old)
        assert occurrences.find_index(tx, stored.id) is None
        occurrences.put_index(tx, stored.id, index)
        occurrences.put_index(tx, stored.id, index)
        occurrences.put_index(tx, stored.id, old)
        assert occurrences.find_index(tx, stored.id) == index
        occurrences.put_index(tx, 1 << 40, index)

    database.write(keep)
    database.write(lambda tx: occurrences.drop_index(tx, stored.id))
    with database.read() as tx:
        assert occurrences.find_index(tx, stored.id) is None
