from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksync_server.wire import icaltime, timezones
from ksync_server.wire.ical import Component, parse
from ksync_server.wire.icaltime import BadTime
from tests import costs

NOTHING = Component("VCALENDAR")

OUTLOOK = """BEGIN:VTIMEZONE
TZID:Company Time
BEGIN:STANDARD
DTSTART:16010101T030000
TZOFFSETFROM:+0200
TZOFFSETTO:+0100
RRULE:FREQ=YEARLY;INTERVAL=1;BYDAY=-1SU;BYMONTH=10
END:STANDARD
BEGIN:DAYLIGHT
DTSTART:16010101T020000
TZOFFSETFROM:+0100
TZOFFSETTO:+0200
RRULE:FREQ=YEARLY;INTERVAL=1;BYDAY=-1SU;BYMONTH=3
END:DAYLIGHT
END:VTIMEZONE
"""


def calendar(*lines: str) -> Component:
    return parse(f"BEGIN:VCALENDAR\n{''.join(lines)}END:VCALENDAR\n".encode())


def zone(text: str, name: str = "Company Time") -> object:
    return timezones.zone_of(name, calendar(text), UTC)


@pytest.mark.spec("RFC 5545 §3.2.19")
@pytest.mark.parametrize(
    ("tzid", "name"),
    [
        ("Europe/Paris", "Europe/Paris"),
        ("europe/paris", "Europe/Paris"),
        ('"Europe/Paris"', "Europe/Paris"),
        ("/freeassociation.sourceforge.net/Europe/Paris", "Europe/Paris"),
        ("/mozilla.org/20050126_1/America/Argentina/Buenos_Aires", "America/Argentina/Buenos_Aires"),
        ("/citadel.org/20210210_1/Asia/Tokyo", "Asia/Tokyo"),
        ("W. Europe Standard Time", "Europe/Berlin"),
        ("Romance Standard Time", "Europe/Paris"),
        ("Tokyo Standard Time", "Asia/Tokyo"),
    ],
)
def test_names_of_the_database_of_vendors_and_of_windows_are_known(tzid: str, name: str) -> None:
    assert timezones.zone_of(tzid, NOTHING) == ZoneInfo(name)


@pytest.mark.parametrize("tzid", ["UTC", "Etc/UTC", "GMT", "Z", "utc"])
def test_utc_in_each_spelling_is_utc_itself(tzid: str) -> None:
    found = timezones.zone_of(tzid, NOTHING, ZoneInfo("Asia/Tokyo"))
    assert found.utcoffset(datetime(2024, 1, 1)) == timedelta(0)  # noqa: DTZ001


@pytest.mark.parametrize(("tzid", "minutes"), [("GMT+0200", 120), ("UTC-03:30", -210), ("+01:00", 60)])
def test_offsets_as_names_are_fixed_zones(tzid: str, minutes: int) -> None:
    found = timezones.zone_of(tzid, NOTHING)
    assert found.utcoffset(None) == timedelta(minutes=minutes)


@pytest.mark.parametrize(
    "tzid",
    [
        "",
        "/",
        "../../etc/passwd",
        "Europe",
        "Europe/",
        "posixrules",
        "Mars/Olympus",
        "a" * 9_999,
        "\x00",
        "UTC+99",
    ],
)
def test_a_name_nobody_knows_is_the_default(tzid: str) -> None:
    default = ZoneInfo("Asia/Tokyo")
    assert timezones.zone_of(tzid, NOTHING, default) is default


def test_every_windows_name_means_a_zone_of_the_database() -> None:
    for name in timezones._WINDOWS:
        assert timezones.named_zone(name) is not None, name


@pytest.mark.spec("RFC 5545 §3.6.5")
def test_a_zone_nobody_knows_follows_its_own_rules() -> None:
    own, paris = zone(OUTLOOK), ZoneInfo("Europe/Berlin")
    assert isinstance(own, timezones.RuleZone)
    when = datetime(1997, 1, 1, tzinfo=UTC)
    while when.year < 2038:
        assert when.astimezone(own).replace(tzinfo=None) == when.astimezone(paris).replace(tzinfo=None)
        when += timedelta(hours=5 * 24 + 7)


@pytest.mark.parametrize("wall", ["20240331T013000", "20240331T023000", "20240331T033000", "20241027T013000"])
@pytest.mark.parametrize("fold", [0, 1])
def test_skipped_and_doubled_times_are_those_of_pep_495(wall: str, fold: int) -> None:
    own = zone(OUTLOOK)
    assert isinstance(own, timezones.RuleZone)
    for minutes in range(0, 180, 15):
        when = datetime.strptime(wall, "%Y%m%dT%H%M%S") + timedelta(minutes=minutes)  # noqa: DTZ007
        when = when.replace(fold=fold)
        berlin = when.replace(tzinfo=ZoneInfo("Europe/Berlin"))
        assert when.replace(tzinfo=own).utcoffset() == berlin.utcoffset()
        there, here = (berlin.astimezone(UTC).astimezone(z) for z in (own, ZoneInfo("Europe/Berlin")))
        assert (there.replace(tzinfo=None), there.fold) == (here.replace(tzinfo=None), here.fold)


def test_a_location_names_a_zone_whose_rules_are_then_not_needed() -> None:
    text = OUTLOOK.replace("TZID:Company Time", "TZID:Company Time\nX-LIC-LOCATION:Asia/Tokyo")
    assert zone(text) == ZoneInfo("Asia/Tokyo")


def test_observances_with_dates_and_an_end_are_followed() -> None:
    text = (
        "BEGIN:VTIMEZONE\nTZID:Company Time\n"
        "BEGIN:STANDARD\nDTSTART:20200101T000000\nTZOFFSETFROM:+0000\nTZOFFSETTO:+0100\nEND:STANDARD\n"
        "BEGIN:DAYLIGHT\nDTSTART:20210601T000000\nRDATE:20220601T000000\nTZOFFSETFROM:+0100\nTZOFFSETTO:+0300\n"
        "END:DAYLIGHT\n"
        "BEGIN:STANDARD\nDTSTART:20211001T000000\nRRULE:FREQ=YEARLY;UNTIL=20221001T000000Z\n"
        "TZOFFSETFROM:+0300\nTZOFFSETTO:+0100\nEND:STANDARD\nEND:VTIMEZONE\n"
    )
    own = zone(text)
    assert isinstance(own, timezones.RuleZone)

    def hours(day: str) -> float:
        offset = datetime.strptime(day, "%Y%m%d").replace(tzinfo=own).utcoffset()
        assert offset is not None
        return offset / timedelta(hours=1)

    days = ("20190101", "20200601", "20210701", "20211101", "20220701", "20221101")
    assert [hours(day) for day in days] == [0, 1, 3, 1, 3, 1]


@pytest.mark.parametrize(
    "observance",
    [
        "",
        "BEGIN:STANDARD\nEND:STANDARD\n",
        "BEGIN:STANDARD\nDTSTART:20200101T000000\nTZOFFSETTO:late\nEND:STANDARD\n",
        "BEGIN:STANDARD\nDTSTART:soon\nTZOFFSETTO:+0100\nEND:STANDARD\n",
    ],
)
def test_a_zone_without_rules_is_the_default(observance: str) -> None:
    assert zone(f"BEGIN:VTIMEZONE\nTZID:Company Time\n{observance}END:VTIMEZONE\n") is UTC


@pytest.mark.parametrize(
    "rule", ["FREQ=SECONDLY", "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30", "FREQ=DAILY;COUNT=999999999"]
)
def test_a_zone_with_endless_rules_costs_its_budget_and_no_more(rule: str) -> None:
    text = OUTLOOK.replace("FREQ=YEARLY;INTERVAL=1;BYDAY=-1SU;BYMONTH=10", rule)

    def ask() -> None:
        own = zone(text)
        assert isinstance(own, timezones.RuleZone)
        assert datetime(2024, 1, 1, tzinfo=own).utcoffset() is not None

    costs.within(0.5, ask)


def test_ten_thousand_observances_cost_no_more_than_four_hundred() -> None:
    one = "BEGIN:STANDARD\nDTSTART:20200101T000000\nTZOFFSETFROM:+0000\nTZOFFSETTO:+0100\nEND:STANDARD\n"
    text = f"BEGIN:VTIMEZONE\nTZID:Company Time\n{one * 3_000}END:VTIMEZONE\n"
    assert costs.within(1, lambda: zone(text)) is not None


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_refused(text: str) -> None:
    for read in (icaltime.parse_moment, icaltime.parse_duration, icaltime.parse_offset):
        for variant in (text, f"P{text}", f"2024{text}", f"+{text}"):
            try:
                read(variant)
            except BadTime:
                continue


@given(st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)), st.booleans())  # noqa: DTZ001
def test_a_time_is_written_as_it_is_read(when: datetime, in_utc: bool) -> None:
    text = f"{when.year:04}{when:%m%dT%H%M%S}{'Z' if in_utc else ''}"
    moment = icaltime.parse_moment(text)
    assert moment.text() == text
    value = moment.value()
    assert isinstance(value, datetime)
    assert value.replace(tzinfo=None) == when.replace(microsecond=0)
    assert icaltime.parse_moment(text[:8]).text() == text[:8]


@given(
    st.integers(-62_000_000_000, 253_000_000_000),
    st.sampled_from(["Europe/Paris", "Asia/Tokyo", "America/St_Johns"]),
)
def test_wall_clock_and_instant_are_inverse_but_for_doubled_hours(at: int, name: str) -> None:
    local = icaltime.wall_clock(at, ZoneInfo(name))
    assert at - icaltime.instant(local, ZoneInfo(name)) in (0, 3_600, 7_200)


def test_the_ends_of_the_calendar_are_no_error() -> None:
    for name in ("Asia/Tokyo", "America/New_York"):
        for text in ("00010101T000000", "99991231T235959"):
            moment = icaltime.parse_moment(text, ZoneInfo(name))
            assert icaltime.wall_clock(moment.at(UTC), ZoneInfo(name)) is not None
            assert icaltime.utc_text(moment.at(UTC))
    assert icaltime.utc_text(10**18).startswith("9999")


def test_a_rule_that_means_nothing_leaves_the_first_change_of_its_observance() -> None:
    own = zone(OUTLOOK.replace("RRULE:FREQ=YEARLY", "RRULE:FREQ=NEVER"))
    assert isinstance(own, timezones.RuleZone)
    assert own.utcoffset(datetime(2024, 1, 1)) == timedelta(hours=1)  # noqa: DTZ001
