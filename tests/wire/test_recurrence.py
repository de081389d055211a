from __future__ import annotations

from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from dateutil.rrule import rrulestr
from hypothesis import given, settings
from hypothesis import strategies as st

from ksync_server.wire import ical, recurrence
from ksync_server.wire.ical import CalendarObject
from ksync_server.wire.recurrence import Budget, Occurrence, TooManySteps
from tests import costs

PARIS = ZoneInfo("Europe/Paris")
TOKYO = ZoneInfo("Asia/Tokyo")


def obj(*parts: str, kind: str = "VEVENT", more: str = "") -> CalendarObject:
    body = "".join(f"BEGIN:{kind}\nUID:1\n{part}\nEND:{kind}\n" for part in parts)
    return ical.check_object(
        ical.parse(f"BEGIN:VCALENDAR\nVERSION:2.0\n{more}{body}END:VCALENDAR\n".encode())
    )


def utc(text: str) -> datetime:
    form = "%Y%m%dT%H%M%S" if "T" in text else "%Y%m%d"
    return datetime.strptime(text, form).replace(tzinfo=UTC)


def at(text: str) -> int:
    return int(utc(text).timestamp())


def spans(
    found: CalendarObject, start: str | None = None, end: str | None = None, zone: ZoneInfo = PARIS
) -> list[str]:
    return [_text(o) for o in _occurrences(found, start, end, zone)]


def _occurrences(
    found: CalendarObject, start: str | None, end: str | None, zone: ZoneInfo = PARIS
) -> list[Occurrence]:
    low, high = (None if text is None else utc(text) for text in (start, end))
    return list(recurrence.occurrences(found, low, high, zone=zone))


def _text(occurrence: Occurrence) -> str:
    begin, end = (datetime.fromtimestamp(t, UTC) for t in (occurrence.start, occurrence.end))
    return f"{begin:%Y%m%dT%H%M}/{end:%Y%m%dT%H%M}"


# --- the recurrence set


def test_a_daily_event_keeps_its_local_time_across_a_clock_change() -> None:
    daily = obj(
        "DTSTART;TZID=Europe/Paris:20240330T100000\nDTEND;TZID=Europe/Paris:20240330T110000\n"
        "RRULE:FREQ=DAILY;COUNT=3"
    )
    assert spans(daily) == [
        "20240330T0900/20240330T1000",
        "20240331T0800/20240331T0900",
        "20240401T0800/20240401T0900",
    ]


@pytest.mark.spec("RFC 5545 §3.3.5")
def test_a_skipped_time_counts_with_the_offset_before_and_a_doubled_one_is_the_first() -> None:
    gap = obj("DTSTART;TZID=Europe/Paris:20240330T023000\nRRULE:FREQ=DAILY;COUNT=3")
    assert [span[:13] for span in spans(gap)] == ["20240330T0130", "20240331T0130", "20240401T0030"]
    fold = obj("DTSTART;TZID=Europe/Paris:20241026T023000\nRRULE:FREQ=DAILY;COUNT=3")
    assert [span[:13] for span in spans(fold)] == ["20241026T0030", "20241027T0030", "20241028T0130"]


def test_instances_are_sorted_and_never_doubled_across_a_clock_change() -> None:
    hourly = obj("DTSTART;TZID=Europe/Paris:20240331T003000\nRRULE:FREQ=MINUTELY;INTERVAL=30;COUNT=12")
    starts = [o.start for o in _occurrences(hourly, None, None)]
    assert starts == sorted(set(starts))
    assert len(starts) == 10  # 02:00 and 02:30 do not exist: they fall on 03:00 and 03:30


@pytest.mark.spec("RFC 5545 §3.8.5.3")
def test_exact_and_nominal_durations_differ_across_a_clock_change() -> None:
    start = "DTSTART;TZID=Europe/Paris:20240329T120000\n"
    exact = obj(f"{start}DTEND;TZID=Europe/Paris:20240330T120000\nRRULE:FREQ=DAILY;COUNT=2")
    nominal = obj(f"{start}DURATION:P1D\nRRULE:FREQ=DAILY;COUNT=2")
    assert spans(exact)[1] == "20240330T1100/20240331T1100"
    assert spans(nominal)[1] == "20240330T1100/20240331T1000"


def test_a_whole_day_is_the_day_of_the_zone_that_is_asked_for() -> None:
    day = obj("DTSTART;VALUE=DATE:20240331\nRRULE:FREQ=YEARLY;COUNT=2")
    assert spans(day) == ["20240330T2300/20240331T2200", "20250330T2200/20250331T2200"]
    assert spans(day, zone=TOKYO)[0] == "20240330T1500/20240331T1500"
    assert [o.recurrence_id for o in _occurrences(day, None, None)] == [date(2024, 3, 31), date(2025, 3, 31)]
    assert all(o.all_day and not o.floating for o in _occurrences(day, None, None))


def test_floating_times_are_those_of_the_zone_that_is_asked_for() -> None:
    floating = obj("DTSTART:20240101T100000\nDURATION:PT1H")
    assert spans(floating) == ["20240101T0900/20240101T1000"]
    assert spans(floating, zone=TOKYO) == ["20240101T0100/20240101T0200"]
    assert all(o.floating for o in _occurrences(floating, None, None))


@pytest.mark.parametrize(
    ("until", "count"),
    [
        ("20240103", 3),
        ("20240103T100000", 3),
        ("20240103T095959", 2),
        ("20240103T090000Z", 3),
        ("20240103T085959Z", 2),
    ],
)
def test_until_is_read_in_each_of_its_shapes(until: str, count: int) -> None:
    event = obj(f"DTSTART;TZID=Europe/Paris:20240101T100000\nRRULE:FREQ=DAILY;UNTIL={until}")
    assert len(spans(event)) == count


@pytest.mark.parametrize("until", ["20240103", "20240103T000000", "20240103T225959Z"])
def test_until_of_a_whole_day_event_is_a_day(until: str) -> None:
    assert len(spans(obj(f"DTSTART;VALUE=DATE:20240101\nRRULE:FREQ=DAILY;UNTIL={until}"))) == 3


@pytest.mark.spec("RFC 5545 §3.8.5.3")
def test_the_start_is_an_instance_even_if_the_rule_does_not_match_it_and_count_counts_it() -> None:
    event = obj("DTSTART:20240102T100000Z\nRRULE:FREQ=WEEKLY;BYDAY=MO;COUNT=3")
    assert [span[:8] for span in spans(event)] == ["20240102", "20240108", "20240115"]
    february_30 = obj("DTSTART:20240228T100000Z\nRRULE:FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30")
    assert [span[:8] for span in spans(february_30)] == ["20240228"]


@pytest.mark.spec("RFC 5545 §3.8.5.2")
def test_rdates_add_instances_and_periods_have_their_own_end() -> None:
    event = obj(
        "DTSTART;TZID=Europe/Paris:20240101T100000\nDURATION:PT1H\n"
        "RDATE;TZID=Europe/Paris:20240105T100000,20240101T100000\nRDATE;VALUE=DATE:20240106\n"
        "RDATE;VALUE=PERIOD:20240107T090000Z/PT3H,20240108T090000Z/20240108T093000Z"
    )
    assert spans(event) == [
        "20240101T0900/20240101T1000",
        "20240105T0900/20240105T1000",
        "20240106T0900/20240106T1000",
        "20240107T0900/20240107T1200",
        "20240108T0900/20240108T0930",
    ]


@pytest.mark.spec("RFC 5545 §3.8.5.1")
def test_exdates_take_away_instances_in_every_shape_clients_mix() -> None:
    event = obj(
        "DTSTART;TZID=Europe/Paris:20240101T100000\nRRULE:FREQ=DAILY;COUNT=6\n"
        "EXDATE;VALUE=DATE:20240102\nEXDATE;TZID=Europe/Paris:20240103T100000\n"
        "EXDATE:20240104T090000Z\nEXDATE:20240105T000000,nonsense"
    )
    assert [span[:8] for span in spans(event)] == ["20240101", "20240105", "20240106"]
    days = obj("DTSTART;VALUE=DATE:20240101\nRRULE:FREQ=DAILY;COUNT=3\nEXDATE:20240102T000000Z")
    assert [o.recurrence_id for o in _occurrences(days, None, None)] == [date(2024, 1, 1), date(2024, 1, 3)]


def test_an_exrule_takes_away_what_it_matches() -> None:
    event = obj("DTSTART:20240101T100000Z\nRRULE:FREQ=DAILY;COUNT=7\nEXRULE:FREQ=DAILY;INTERVAL=2")
    assert [span[:8] for span in spans(event)] == ["20240102", "20240104", "20240106"]


def test_two_rules_are_one_set_without_doubles() -> None:
    event = obj("DTSTART:20240101T100000Z\nRRULE:FREQ=DAILY;COUNT=3\nRRULE:FREQ=WEEKLY;COUNT=2")
    assert [span[:8] for span in spans(event)] == ["20240101", "20240102", "20240103", "20240108"]


WEEKLY = "DTSTART;TZID=Europe/Paris:20240101T100000\nDURATION:PT1H\nRRULE:FREQ=WEEKLY;COUNT=4"


@pytest.mark.spec("RFC 5545 §3.8.4.4")
def test_an_override_replaces_its_instance_wherever_it_moved() -> None:
    moved = "RECURRENCE-ID:20240108T090000Z\nDTSTART:20240301T080000Z\nDURATION:PT2H"
    event = obj(WEEKLY, moved)
    assert [span[:8] for span in spans(event)] == ["20240101", "20240115", "20240122", "20240301"]
    assert spans(event, "20240107", "20240110") == []
    assert spans(event, "20240301", "20240302") == ["20240301T0800/20240301T1000"]
    shown = _occurrences(event, "20240301", None)[0]
    assert shown.component is event.overrides[0]
    assert shown.recurrence_id == datetime(2024, 1, 8, 9, tzinfo=UTC)


def test_an_override_named_by_a_date_replaces_the_instance_of_that_day() -> None:
    event = obj(WEEKLY, "RECURRENCE-ID;VALUE=DATE:20240108\nDTSTART;VALUE=DATE:20240109")
    assert [o.all_day for o in _occurrences(event, None, None)] == [False, True, False, False]


def test_an_override_nobody_expects_and_instances_alone_are_shown() -> None:
    stray = "RECURRENCE-ID:20250101T090000Z\nDTSTART:20250101T090000Z"
    assert spans(obj(WEEKLY, stray))[-1][:8] == "20250101"
    alone = obj(stray, stray.replace("2025", "2026"))
    assert [span[:8] for span in spans(alone)] == ["20250101", "20260101"]
    assert recurrence.is_recurring(alone)


@pytest.mark.spec("RFC 5545 §3.2.13")
def test_this_and_future_moves_every_later_instance() -> None:
    future = "RECURRENCE-ID;RANGE=THISANDFUTURE:20240115T090000Z\nDTSTART:20240114T120000Z\nDURATION:PT2H"
    event = obj(WEEKLY, future)
    assert spans(event) == [
        "20240101T0900/20240101T1000",
        "20240108T0900/20240108T1000",
        "20240114T1200/20240114T1400",
        "20240121T1200/20240121T1400",
    ]
    assert spans(event, "20240121", "20240122") == ["20240121T1200/20240121T1400"]
    last = _occurrences(event, "20240121", None)[0]
    assert last.recurrence_id == datetime(2024, 1, 22, 10, tzinfo=PARIS)
    single = "RECURRENCE-ID:20240122T090000Z\nDTSTART:20240122T100000Z"
    assert spans(obj(WEEKLY, future, single))[-1] == "20240122T1000/20240122T1000"


def test_a_series_shifted_far_back_stays_sorted_and_inside_its_bounds() -> None:
    future = "RECURRENCE-ID;RANGE=THISANDFUTURE:20240115T090000Z\nDTSTART:20231220T120000Z\nDURATION:PT2H"
    event = obj(WEEKLY, future)
    starts = [o.start for o in _occurrences(event, None, None)]
    assert starts == sorted(starts)
    first, last = recurrence.bounds(event, PARIS)
    assert first is not None
    assert last is not None
    assert first <= starts[0]
    assert starts[-1] <= last


# --- time ranges

RANGES = [
    # kind, properties, does [10:00, 12:00) match when they are at the hours given
    ("VEVENT", "DTSTART:{0}\nDTEND:{1}", [(8, 10, False), (8, 11, True), (11, 13, True), (12, 13, False)]),
    ("VEVENT", "DTSTART:{0}\nDURATION:PT1H", [(9, 0, False), (10, 0, True), (11, 0, True), (12, 0, False)]),
    ("VEVENT", "DTSTART:{0}\nDURATION:PT0S", [(9, 0, False), (10, 0, True), (11, 0, True), (12, 0, False)]),
    ("VEVENT", "DTSTART:{0}", [(9, 0, False), (10, 0, True), (11, 0, True), (12, 0, False)]),
    ("VTODO", "DTSTART:{0}\nDURATION:PT1H", [(8, 0, False), (9, 0, True), (11, 0, True), (12, 0, False)]),
    (
        "VTODO",
        "DTSTART:{0}\nDUE:{1}",
        [(8, 10, False), (8, 11, True), (11, 13, True), (10, 10, True), (12, 13, False)],
    ),
    ("VTODO", "DTSTART:{0}", [(9, 0, False), (10, 0, True), (12, 0, False)]),
    ("VTODO", "DUE:{0}", [(10, 0, False), (11, 0, True), (12, 0, True), (13, 0, False)]),
    (
        "VTODO",
        "CREATED:{0}\nCOMPLETED:{1}",
        [(8, 9, False), (8, 10, True), (8, 15, True), (12, 13, True), (13, 14, False)],
    ),
    ("VTODO", "COMPLETED:{0}", [(9, 0, False), (10, 0, True), (12, 0, True), (13, 0, False)]),
    ("VTODO", "CREATED:{0}", [(8, 0, True), (11, 0, True), (12, 0, False)]),
    ("VTODO", "SUMMARY:x", [(0, 0, True)]),
    ("VJOURNAL", "DTSTART:{0}", [(9, 0, False), (10, 0, True), (12, 0, False)]),
    ("VJOURNAL", "SUMMARY:x", [(0, 0, False)]),
    ("VFREEBUSY", "DTSTART:{0}\nDTEND:{1}", [(8, 9, False), (8, 10, True), (11, 13, True), (12, 13, False)]),
    ("VFREEBUSY", "FREEBUSY:{0}/{1},20300101T000000Z/PT1H", [(8, 10, False), (8, 11, True), (12, 13, False)]),
    ("VFREEBUSY", "SUMMARY:x", [(0, 0, False)]),
    ("VAVAILABILITY", "DTSTART:{0}\nDTEND:{1}", [(8, 10, False), (8, 11, True), (12, 13, False)]),
    ("VAVAILABILITY", "SUMMARY:x", [(0, 0, True)]),
]


@pytest.mark.spec("RFC 4791 §9.9")
@pytest.mark.parametrize(("kind", "lines", "cases"), RANGES)
def test_each_row_of_the_time_range_tables(kind: str, lines: str, cases: list[tuple[int, int, bool]]) -> None:
    for first, second, matches in cases:
        hours = (f"20240101T{first:02}0000Z", f"20240101T{second:02}0000Z")
        found = obj(lines.format(*hours), kind=kind)
        hit = spans(found, "20240101T100000", "20240101T120000")
        assert bool(hit) is matches, (kind, lines, first, second)
        low, high = recurrence.bounds(found, PARIS)
        if matches:
            assert low is None or low < at("20240101T120000")
            assert high is None or high > at("20240101T100000")


@pytest.mark.spec("RFC 4791 §9.9")
def test_a_whole_day_event_matches_its_day_only() -> None:
    for kind in ("VEVENT", "VJOURNAL"):
        day = obj("DTSTART;VALUE=DATE:20240102", kind=kind)
        assert spans(day, "20240101T220000", "20240101T230000") == []
        assert spans(day, "20240101T220000", "20240101T230001")
        assert spans(day, "20240102T225959", None)
        assert spans(day, "20240102T230000", None) == []


def test_open_ranges_and_far_ranges_give_what_is_asked() -> None:
    endless = obj("DTSTART:00010101T100000Z\nRRULE:FREQ=DAILY")
    found = recurrence.occurrences(endless, utc("20240101"), None, zone=PARIS)
    assert [next(found).start for _ in range(2)] == [at("20240101T100000"), at("20240102T100000")]
    assert len(spans(endless, None, "00010103")) == 2
    assert spans(obj("DTSTART:20240101T100000Z"), "20240102", None) == []


def test_a_long_event_that_began_before_the_range_is_found() -> None:
    trip = obj("DTSTART;VALUE=DATE:20230101\nDTEND;VALUE=DATE:20240601\nRRULE:FREQ=YEARLY")
    assert len(spans(trip, "20240301", "20240302")) == 2
    nominal = obj("DTSTART:20230101T000000Z\nDURATION:P500D")
    assert len(spans(nominal, "20240301", "20240302")) == 1


def test_a_recurring_task_with_only_a_due_date_recurs_by_it() -> None:
    task = obj("DUE:20240101T100000Z\nRRULE:FREQ=DAILY;COUNT=3", kind="VTODO")
    assert [span[:8] for span in spans(task)] == ["20240101", "20240102", "20240103"]


@pytest.mark.spec("RFC 4791 §9.9")
def test_a_date_property_lies_in_a_range() -> None:
    found = obj("DTSTART:20240101T100000Z\nDTSTAMP:20240101T120000Z\nX-DAY:20240101\nX-BAD:soon")
    component = found.components[0]

    def inside(name: str, start: str | None, end: str | None) -> bool:
        prop = component.first(name)
        assert prop is not None
        low, high = (None if text is None else utc(text) for text in (start, end))
        return recurrence.property_in_range(prop, found.calendar, low, high, PARIS)

    assert inside("DTSTAMP", "20240101T120000", "20240101T120001")
    assert not inside("DTSTAMP", "20240101T110000", "20240101T120000")
    assert inside("X-DAY", "20240101T225959", None)
    assert not inside("X-DAY", "20240101T230000", None)
    assert not inside("X-BAD", None, None)


# --- bounds


@pytest.mark.parametrize(
    ("lines", "first", "last"),
    [
        ("DTSTART:20240101T100000Z\nDURATION:PT1H", "20240101T100000", "20240101T110000"),
        ("DTSTART:20240101T100000Z\nRRULE:FREQ=DAILY", "20240101T100000", None),
        ("DTSTART:20240101T100000Z\nRRULE:FREQ=DAILY;COUNT=3", "20240101T100000", "20240103T100000"),
        ("DTSTART:20240101T100000Z\nRRULE:FREQ=DAILY;UNTIL=20240105", "20240101T100000", "20240105T235959"),
        ("DTSTART:20240101T100000Z\nRRULE:FREQ=SECONDLY;COUNT=999999999", "20240101T100000", None),
        (
            "DTSTART:20240101T100000Z\nRDATE:20230101T100000Z,20250101T100000Z",
            "20230101T100000",
            "20250101T100000",
        ),
    ],
)
def test_bounds_hold_everything_and_not_much_more(lines: str, first: str, last: str | None) -> None:
    low, high = recurrence.bounds(obj(lines), PARIS)
    assert low is not None
    assert at(first) - 1 <= low + 1 <= at(first)
    if last is None:
        assert high is None
    else:
        assert high is not None
        assert at(last) < high < at(last) + 3 * 86_400


@settings(deadline=None)
@given(
    st.sampled_from(["DTSTART:20240310T013000", "DTSTART;VALUE=DATE:20240310", "DTSTART:20240310T013000Z"]),
    st.sampled_from(["", "DURATION:P2D", "DURATION:PT90M"]),
    st.sampled_from(["DAILY", "WEEKLY", "MONTHLY", "YEARLY", "HOURLY"]),
    st.sampled_from(["", ";COUNT=5", ";UNTIL=20240401", ";BYDAY=MO;COUNT=4"]),
    st.sampled_from([PARIS, TOKYO, ZoneInfo("America/New_York"), ZoneInfo("Pacific/Apia")]),
    st.integers(-800, 800),
)
def test_no_instance_is_outside_the_bounds(
    start: str, duration: str, freq: str, more: str, zone: ZoneInfo, shift_hours: int
) -> None:
    moved = utc("20240310T013000") + timedelta(hours=shift_hours)
    override = f"RECURRENCE-ID:20240311T013000Z\nDTSTART:{moved:%Y%m%dT%H%M%S}Z\n{duration}"
    event = obj(f"{start}\n{duration}\nRRULE:FREQ={freq}{more}".replace("\n\n", "\n"), override)
    low, high = recurrence.bounds(event, PARIS)  # of another zone than the query's
    assert low is not None
    for number, occurrence in enumerate(recurrence.occurrences(event, None, None, zone=zone)):
        assert low < occurrence.start
        assert high is None or occurrence.end < high
        if number > 20:
            break


def test_bounds_of_a_task_without_dates_are_open() -> None:
    assert recurrence.bounds(obj("SUMMARY:x", kind="VTODO"), PARIS) == (None, None)


# --- budget

BOMBS = [
    "DTSTART:20240101T100000Z\nRRULE:FREQ=SECONDLY",
    "DTSTART:00010101T000000Z\nRRULE:FREQ=SECONDLY",
    "DTSTART:00010101T000000\nRRULE:FREQ=MINUTELY;COUNT=1000000000",
    "DTSTART:20240101T100000Z\nRRULE:FREQ=SECONDLY;UNTIL=21000101T000000Z",
    "DTSTART:20240101T100000Z\nRRULE:FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30",
    "DTSTART:20240101T100000Z\nRRULE:FREQ=SECONDLY;BYMONTH=2;BYMONTHDAY=30",
    "DTSTART:20240101T100000Z\nRRULE:FREQ=MINUTELY\nEXRULE:FREQ=MINUTELY",
    "DTSTART:20240101T100000Z\nRRULE:FREQ=SECONDLY\nEXRULE:FREQ=SECONDLY",
    "DTSTART:20240101T100000Z\nRRULE:FREQ=DAILY;COUNT=3\nRRULE:FREQ=DAILY;COUNT=100000000",
    "DTSTART;TZID=Europe/Paris:20240101T100000\nRRULE:FREQ=SECONDLY\nRDATE:20240101T100000Z",
    "DTSTART:99991231T235959Z\nDURATION:P99999999D\nRRULE:FREQ=DAILY",
    "DTSTART;TZID=Europe/Paris:00010101T000000\nDURATION:P99999999W\nRRULE:FREQ=DAILY;COUNT=9",
    "DTSTART;VALUE=DATE:99991231\nRRULE:FREQ=YEARLY",
    "DTSTART:20240101T100000Z\nRRULE:FREQ=DAILY\nBEGIN:VALARM\nTRIGGER:-P99999999W\nREPEAT:999999999\n"
    "DURATION:PT1S\nEND:VALARM",
    "DTSTART:20240101T100000Z\nRDATE:" + ",".join(["20240101T100000Z"] * 1999),
    *(
        f"DTSTART:20240101T100000Z\nRRULE:FREQ={freq};BYMONTHDAY=31;BYDAY=1MO;BYYEARDAY=-200"
        for freq in ("YEARLY", "MONTHLY", "WEEKLY", "DAILY", "HOURLY", "SECONDLY")
    ),
]


@pytest.mark.parametrize("lines", BOMBS)
@pytest.mark.parametrize("window", [("20240101", "20240201"), (None, None), ("20990101", "20990201")])
def test_a_bomb_costs_its_budget_and_no_more(lines: str, window: tuple[str | None, str | None]) -> None:
    bomb = obj(lines)
    low, high = (None if text is None else utc(text) for text in window)
    budget = Budget(max_steps=20_000, max_instances=2_000)

    def ask_all() -> None:
        last = None
        with suppress(TooManySteps):
            for occurrence in recurrence.occurrences(bomb, low, high, zone=PARIS, budget=budget):
                assert last is None or last <= occurrence.start
                last = occurrence.start
        with suppress(TooManySteps):
            list(recurrence.alarms(bomb, low, high, zone=PARIS, budget=budget))
        recurrence.bounds(bomb, PARIS, budget)
        far = utc("20240101"), utc("20240201")
        for ask in (recurrence.expand, recurrence.limit_recurrence_set, recurrence.busy_periods):
            with suppress(TooManySteps):
                ask(bomb, *far, PARIS, budget)

    costs.within(1, ask_all)  # five questions, some 0.05 s each


def test_a_spent_budget_tells_up_to_when_the_answer_is_known() -> None:
    event = obj(
        "DTSTART:20240101T000000Z\nRRULE:FREQ=MINUTELY",
        "RECURRENCE-ID:20240101T000500Z\nDTSTART:20240101T003030Z",
    )
    found: list[int] = []
    asked = recurrence.occurrences(event, None, None, zone=PARIS, budget=Budget(max_steps=4_000))
    with pytest.raises(TooManySteps) as caught:
        found.extend(occurrence.start for occurrence in asked)
    known = caught.value.complete_until
    assert known is not None
    assert len(found) > 50
    assert at("20240101T003030") in found
    assert known <= found[-1] + 60
    minutes = {at("20240101") + 60 * n for n in range(500)} - {at("20240101T000500")}
    assert {start for start in minutes if start < known} <= set(found)


def test_too_many_instances_are_an_end_too() -> None:
    event = obj("DTSTART:20240101T000000Z\nDURATION:PT1M\nRRULE:FREQ=DAILY")
    window = utc("20240101"), utc("20240201")
    with pytest.raises(TooManySteps) as caught:
        recurrence.expand(event, *window, PARIS, Budget(max_instances=5))
    assert len(caught.value.known) == 5
    assert caught.value.complete_until == at("20240106")
    with pytest.raises(TooManySteps) as caught:
        recurrence.expand(event, *window, PARIS, Budget(max_bytes=500))
    assert 1 <= len(caught.value.known) < 10
    with pytest.raises(TooManySteps) as caught:
        recurrence.busy_periods(event, *window, PARIS, Budget(max_instances=5))
    assert len(caught.value.known) == 5
    alarm = "BEGIN:VALARM\nTRIGGER:PT0S\nREPEAT:99\nDURATION:PT1S\nEND:VALARM"
    ringing = obj(f"DTSTART:20240101T000000Z\n{alarm}")
    with pytest.raises(TooManySteps):
        list(recurrence.alarms(ringing, None, None, zone=PARIS, budget=Budget(max_instances=5)))


# --- against another implementation


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(["Europe/Paris", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"]),
    st.datetimes(datetime(1990, 1, 1), datetime(2039, 1, 1)),  # noqa: DTZ001 - wall clocks
    st.sampled_from(
        ["DAILY", "WEEKLY;BYDAY=MO,WE,SU", "MONTHLY;BYMONTHDAY=-1", "DAILY", "DAILY;BYHOUR=2,14;BYMINUTE=30"]
    ),
    st.integers(0, 400),
    st.integers(1, 200),
)
def test_zoned_series_agree_with_dateutil(
    name: str, first: datetime, rule: str, shift: int, days: int
) -> None:
    first = first.replace(microsecond=0)
    zone = ZoneInfo(name)
    event = obj(f"DTSTART;TZID={name}:{first:%Y%m%dT%H%M%S}\nRRULE:FREQ={rule}")
    low = (first + timedelta(days=shift)).replace(tzinfo=UTC)
    high = low + timedelta(days=days)
    walls = rrulestr(f"FREQ={rule}", dtstart=first).between(
        first, first + timedelta(days=shift + days + 2), inc=True
    )
    expected = {int(wall.replace(tzinfo=zone).timestamp()) for wall in [first, *walls]}
    expected = {start for start in expected if low.timestamp() <= start < high.timestamp()}
    found = [o.start for o in recurrence.occurrences(event, low, high, zone=PARIS)]
    assert found == sorted(expected)


# --- alarms


@pytest.mark.spec("RFC 4791 §9.9")
def test_alarms_ring_relative_to_start_and_end_again_and_at_a_fixed_time() -> None:
    def ringing(lines: str, start: str, end: str) -> list[str]:
        event = obj(
            "DTSTART;TZID=Europe/Paris:20240101T100000\nDURATION:PT1H\nRRULE:FREQ=DAILY\n"
            f"BEGIN:VALARM\nACTION:DISPLAY\n{lines}\nEND:VALARM"
        )
        found = recurrence.alarms(event, utc(start), utc(end), zone=PARIS)
        return sorted(f"{datetime.fromtimestamp(alarm.at, UTC):%dT%H%M}" for alarm in found)

    assert ringing("TRIGGER:-PT15M", "20240102", "20240104") == ["02T0845", "03T0845"]
    assert ringing("TRIGGER;RELATED=END:PT5M", "20240102", "20240103") == ["02T1005"]
    assert ringing("TRIGGER:-PT10M\nREPEAT:2\nDURATION:PT5M", "20240102T085200", "20240103") == [
        "02T0855",
        "02T0900",
    ]
    assert ringing("TRIGGER:-P7D", "20240102", "20240103") == ["02T0900"]
    assert ringing("TRIGGER;VALUE=DATE-TIME:20240102T120000Z", "20240102", "20240105") == ["02T1200"]
    assert ringing("TRIGGER:soon", "20240102", "20240105") == []
    assert ringing("ACTION:DISPLAY", "20240102", "20240105") == []


# --- expand and limit

EXPANDED = obj(
    "SUMMARY:Stand-up\nDTSTART;TZID=Europe/Paris:20240101T100000\nDTEND;TZID=Europe/Paris:20240101T110000\n"
    "RRULE:FREQ=DAILY;COUNT=4\nEXDATE;TZID=Europe/Paris:20240103T100000\nX-SEEN;TZID=Europe/Paris:20240101T090000",
    "RECURRENCE-ID;TZID=Europe/Paris:20240102T100000\nDTSTART;TZID=Europe/Paris:20240102T150000\nSUMMARY:Late",
    more="BEGIN:VTIMEZONE\nTZID:Europe/Paris\nEND:VTIMEZONE\n",
)


@pytest.mark.spec("RFC 4791 §9.6.5")
def test_expand_gives_single_instances_in_utc_without_recurrence_and_time_zones() -> None:
    found = recurrence.expand(EXPANDED, utc("20240101"), utc("20240105"), PARIS)
    text = ical.serialise(found)
    assert not any(word in text for word in ("RRULE", "EXDATE", "TZID", "VTIMEZONE"))
    first, second, third = found.children
    assert [prop.raw for prop in first.properties] == [
        "UID:1",
        "SUMMARY:Stand-up",
        "DTSTART:20240101T090000Z",
        "RECURRENCE-ID:20240101T090000Z",
        "DTEND:20240101T100000Z",
        "X-SEEN:20240101T080000Z",
    ]
    assert second.text("SUMMARY") == "Late"
    assert (second.text("RECURRENCE-ID"), second.text("DTSTART")) == ("20240102T090000Z", "20240102T140000Z")
    assert third.text("DTSTART") == "20240104T090000Z"


@pytest.mark.spec("RFC 4791 §9.6.5")
def test_expand_leaves_dates_and_floating_times_as_they_are() -> None:
    window = utc("20240101"), utc("20240104")
    days = recurrence.expand(
        obj("DTSTART;VALUE=DATE:20240101\nDTEND;VALUE=DATE:20240102\nRRULE:FREQ=DAILY"), *window, TOKYO
    )
    assert [prop.raw for prop in days.children[1].properties[1:]] == [
        "DTSTART;VALUE=DATE:20240102",
        "RECURRENCE-ID;VALUE=DATE:20240102",
        "DTEND;VALUE=DATE:20240103",
    ]
    floating = recurrence.expand(obj("DTSTART:20240101T100000\nRRULE:FREQ=DAILY"), *window, TOKYO)
    assert floating.children[1].text("DTSTART") == "20240102T100000"
    assert floating.children[1].text("RECURRENCE-ID") == "20240102T100000"
    once = recurrence.expand(obj("DTSTART:20240101T100000Z"), *window, TOKYO)
    assert once.children[0].first("RECURRENCE-ID") is None


def test_each_expanded_instance_is_an_object_of_its_own() -> None:
    found = recurrence.expand(EXPANDED, utc("20240101"), utc("20240105"), PARIS)
    again = ical.check_object(ical.parse(ical.serialise(found).encode()))
    assert spans(again) == spans(EXPANDED)


@pytest.mark.spec("RFC 4791 §9.6.6")
def test_limit_recurrence_set_keeps_the_master_and_the_overrides_that_matter() -> None:
    event = obj(
        WEEKLY,
        "RECURRENCE-ID:20240108T090000Z\nDTSTART:20240301T080000Z",
        "RECURRENCE-ID:20240115T090000Z\nDTSTART:20240115T100000Z",
        "RECURRENCE-ID;RANGE=THISANDFUTURE:20240122T090000Z\nDTSTART:20240122T100000Z",
    )

    def kept(start: str, end: str) -> list[str | None]:
        found = recurrence.limit_recurrence_set(event, utc(start), utc(end), PARIS)
        return [child.text("RECURRENCE-ID") for child in found.children]

    assert kept("20240108", "20240109") == [None, "20240108T090000Z"]
    assert kept("20240301", "20240302") == [None, "20240108T090000Z", "20240122T090000Z"]
    assert kept("20240115", "20240116") == [None, "20240115T090000Z"]
    assert kept("20231201", "20231202") == [None]


FREE_BUSY = obj(
    "DTSTAMP:20240101T000000Z\nFREEBUSY:20240101T080000Z/PT1H,20240102T080000Z/20240102T090000Z\n"
    "FREEBUSY;FBTYPE=FREE:20240101T100000Z/PT1H\nFREEBUSY;FBTYPE=BUSY-UNAVAILABLE:20240101T120000Z/PT1H",
    kind="VFREEBUSY",
)


@pytest.mark.spec("RFC 4791 §9.6.7")
def test_limit_freebusy_set_keeps_the_periods_in_the_range() -> None:
    found = recurrence.limit_freebusy_set(FREE_BUSY, utc("20240102"), utc("20240103"), PARIS)
    assert [prop.raw for prop in found.children[0].all("FREEBUSY")] == [
        "FREEBUSY:20240102T080000Z/20240102T090000Z"
    ]
    assert found.children[0].text("DTSTAMP") == "20240101T000000Z"


# --- free and busy


@pytest.mark.spec("RFC 4791 §7.10")
def test_busy_periods_follow_transparency_status_and_the_range() -> None:
    def busy(lines: str, kind: str = "VEVENT") -> list[tuple[int, int, str]]:
        found = obj(f"DTSTART:20231231T230000Z\nDURATION:PT2H\n{lines}".strip(), kind=kind)
        return recurrence.busy_periods(found, utc("20240101"), utc("20240102"), PARIS)

    hour = at("20240101"), at("20240101T010000")
    assert busy("") == [(*hour, "BUSY")]
    assert busy("STATUS:TENTATIVE") == [(*hour, "BUSY-TENTATIVE")]
    assert busy("STATUS:CANCELLED") == []
    assert busy("TRANSP:TRANSPARENT") == []
    assert busy("", "VTODO") == []
    assert recurrence.busy_periods(FREE_BUSY, utc("20240101"), utc("20240102"), PARIS) == [
        (at("20240101T080000"), at("20240101T090000"), "BUSY"),
        (at("20240101T120000"), at("20240101T130000"), "BUSY-UNAVAILABLE"),
    ]


@pytest.mark.spec("RFC 4791 §7.10")
def test_the_answer_of_a_free_busy_query_joins_periods_of_one_kind() -> None:
    day = at("20240101")
    periods = [
        (day + 7200, day + 9000, "BUSY"),
        (day, day + 3600, "BUSY"),
        (day + 3600, day + 7200, "BUSY"),
        (day, day + 60, "BUSY-TENTATIVE"),
    ]
    answer = recurrence.free_busy(periods, utc("20240101"), utc("20240102"), utc("20240101T120000"))
    found = ical.parse(ical.serialise(answer).encode()).children[0]
    assert [prop.raw for prop in found.properties] == [
        "DTSTAMP:20240101T120000Z",
        "DTSTART:20240101T000000Z",
        "DTEND:20240102T000000Z",
        "FREEBUSY:20240101T000000Z/20240101T023000Z",
        "FREEBUSY;FBTYPE=BUSY-TENTATIVE:20240101T000000Z/20240101T000100Z",
    ]
