from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta
from itertools import islice

import pytest
from dateutil.rrule import rrulestr
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from ksync_server.wire import rrule
from ksync_server.wire.rrule import FIRST_S, LAST_S, BadRule, Meter, OutOfSteps
from tests import costs

EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - wall clocks


def seconds(text: str) -> int:
    return int((datetime.strptime(text, "%Y%m%dT%H%M%S") - EPOCH).total_seconds())  # noqa: DTZ007


def found(rule: str, first: str = "19970902T090000", count: int = 12) -> list[str]:
    parsed = rrule.parse_rule(rule)
    last = LAST_S if parsed.until is None else seconds(parsed.until)
    starts = rrule.starts(parsed, seconds(first), Meter(100_000), last=last)
    return [f"{EPOCH + timedelta(seconds=at):%Y%m%d}" for at in islice(starts, count)]


def of(month: str, *days: int) -> list[str]:
    return [f"{month}{day:02}" for day in days]


# RFC 5545 §3.8.5.3: every example, all with DTSTART 1997-09-02 09:00 unless another is given
EXAMPLES = [
    ("FREQ=DAILY;COUNT=10", None, of("199709", *range(2, 12))),
    ("FREQ=DAILY;INTERVAL=2", None, of("199709", *range(2, 26, 2))),
    ("FREQ=DAILY;INTERVAL=10;COUNT=5", None, [*of("199709", 2, 12, 22), *of("199710", 2, 12)]),
    (
        "FREQ=WEEKLY;COUNT=10",
        None,
        [*of("199709", 2, 9, 16, 23, 30), *of("199710", 7, 14, 21, 28), "19971104"],
    ),
    (
        "FREQ=WEEKLY;INTERVAL=2;WKST=SU",
        None,
        [
            *of("199709", 2, 16, 30),
            *of("199710", 14, 28),
            *of("199711", 11, 25),
            *of("199712", 9, 23),
            *of("199801", 6, 20),
            "19980203",
        ],
    ),
    (
        "FREQ=WEEKLY;COUNT=10;WKST=SU;BYDAY=TU,TH",
        None,
        [*of("199709", 2, 4, 9, 11, 16, 18, 23, 25, 30), "19971002"],
    ),
    (
        "FREQ=WEEKLY;INTERVAL=2;COUNT=8;WKST=SU;BYDAY=TU,TH",
        None,
        [*of("199709", 2, 4, 16, 18, 30), *of("199710", 2, 14, 16)],
    ),
    (
        "FREQ=MONTHLY;COUNT=10;BYDAY=1FR",
        "19970905T090000",
        [
            "19970905",
            "19971003",
            "19971107",
            "19971205",
            "19980102",
            "19980206",
            "19980306",
            "19980403",
            "19980501",
            "19980605",
        ],
    ),
    (
        "FREQ=MONTHLY;INTERVAL=2;COUNT=10;BYDAY=1SU,-1SU",
        "19970907T090000",
        [
            "19970907",
            "19970928",
            "19971102",
            "19971130",
            "19980104",
            "19980125",
            "19980301",
            "19980329",
            "19980503",
            "19980531",
        ],
    ),
    (
        "FREQ=MONTHLY;COUNT=6;BYDAY=-2MO",
        "19970922T090000",
        ["19970922", "19971020", "19971117", "19971222", "19980119", "19980216"],
    ),
    (
        "FREQ=MONTHLY;BYMONTHDAY=-3",
        "19970928T090000",
        ["19970928", "19971029", "19971128", "19971229", "19980129", "19980226"],
    ),
    (
        "FREQ=MONTHLY;COUNT=10;BYMONTHDAY=2,15",
        None,
        [f"{month}{day}" for month in (199709, 199710, 199711, 199712, 199801) for day in ("02", "15")],
    ),
    (
        "FREQ=MONTHLY;COUNT=10;BYMONTHDAY=1,-1",
        "19970930T090000",
        [
            "19970930",
            "19971001",
            "19971031",
            "19971101",
            "19971130",
            "19971201",
            "19971231",
            "19980101",
            "19980131",
            "19980201",
        ],
    ),
    (
        "FREQ=MONTHLY;INTERVAL=18;COUNT=10;BYMONTHDAY=10,11,12,13,14,15",
        "19970910T090000",
        [*of("199709", 10, 11, 12, 13, 14, 15), *of("199903", 10, 11, 12, 13)],
    ),
    (
        "FREQ=MONTHLY;INTERVAL=2;BYDAY=TU",
        None,
        [*of("199709", 2, 9, 16, 23, 30), *of("199711", 4, 11, 18, 25)],
    ),
    (
        "FREQ=YEARLY;COUNT=10;BYMONTH=6,7",
        "19970610T090000",
        [f"{year}{month}10" for year in range(1997, 2002) for month in ("06", "07")],
    ),
    (
        "FREQ=YEARLY;INTERVAL=2;COUNT=10;BYMONTH=1,2,3",
        "19970310T090000",
        ["19970310", *(f"{year}{month}10" for year in (1999, 2001, 2003) for month in ("01", "02", "03"))],
    ),
    (
        "FREQ=YEARLY;INTERVAL=3;COUNT=10;BYYEARDAY=1,100,200",
        "19970101T090000",
        [
            "19970101",
            "19970410",
            "19970719",
            "20000101",
            "20000409",
            "20000718",
            "20030101",
            "20030410",
            "20030719",
            "20060101",
        ],
    ),
    ("FREQ=YEARLY;BYDAY=20MO", "19970519T090000", ["19970519", "19980518", "19990517"]),
    ("FREQ=YEARLY;BYWEEKNO=20;BYDAY=MO", "19970512T090000", ["19970512", "19980511", "19990517"]),
    ("FREQ=YEARLY;BYMONTH=3;BYDAY=TH", "19970313T090000", [*of("199703", 13, 20, 27), *of("199803", 5, 12)]),
    (
        "FREQ=YEARLY;BYDAY=TH;BYMONTH=6,7,8",
        "19970605T090000",
        [*of("199706", 5, 12, 19, 26), *of("199707", 3, 10, 17, 24, 31), *of("199708", 7, 14, 21)],
    ),
    (
        "FREQ=MONTHLY;BYDAY=FR;BYMONTHDAY=13",
        None,
        ["19980213", "19980313", "19981113", "19990813", "20001013"],
    ),
    (
        "FREQ=MONTHLY;BYDAY=SA;BYMONTHDAY=7,8,9,10,11,12,13",
        "19970913T090000",
        ["19970913", "19971011", "19971108", "19971213", "19980110"],
    ),
    (
        "FREQ=YEARLY;INTERVAL=4;BYMONTH=11;BYDAY=TU;BYMONTHDAY=2,3,4,5,6,7,8",
        "19961105T090000",
        ["19961105", "20001107", "20041102"],
    ),
    (
        "FREQ=MONTHLY;COUNT=3;BYDAY=TU,WE,TH;BYSETPOS=3",
        "19970904T090000",
        ["19970904", "19971007", "19971106"],
    ),
    (
        "FREQ=MONTHLY;BYDAY=MO,TU,WE,TH,FR;BYSETPOS=-2",
        "19970929T090000",
        ["19970929", "19971030", "19971127", "19971230", "19980129"],
    ),
    (
        "FREQ=WEEKLY;INTERVAL=2;COUNT=4;BYDAY=TU,SU;WKST=MO",
        "19970805T090000",
        of("199708", 5, 10, 19, 24),
    ),
    (
        "FREQ=WEEKLY;INTERVAL=2;COUNT=4;BYDAY=TU,SU;WKST=SU",
        "19970805T090000",
        of("199708", 5, 17, 19, 31),
    ),
    (
        "FREQ=MONTHLY;BYMONTHDAY=15,30;COUNT=5",
        "20070115T090000",
        ["20070115", "20070130", "20070215", "20070315", "20070330"],
    ),
]


@pytest.mark.spec("RFC 5545 §3.8.5.3")
@pytest.mark.parametrize(("rule", "first", "days"), EXAMPLES)
def test_every_example_of_the_standard_gives_its_days(rule: str, first: str | None, days: list[str]) -> None:
    assert found(rule, first or "19970902T090000", len(days) + ("COUNT" in rule)) == days


@pytest.mark.spec("RFC 5545 §3.8.5.3")
def test_examples_with_until_give_their_days() -> None:
    assert len(found("FREQ=DAILY;UNTIL=19971224T000000", count=999)) == 113
    everyday = "FREQ=DAILY;UNTIL=20000131T140000;BYMONTH=1"
    by_weekday = "FREQ=YEARLY;UNTIL=20000131T140000;BYMONTH=1;BYDAY=SU,MO,TU,WE,TH,FR,SA"
    assert found(everyday, "19980101T090000", 999) == found(by_weekday, "19980101T090000", 999)
    assert len(found(everyday, "19980101T090000", 999)) == 93
    assert found(
        "FREQ=WEEKLY;INTERVAL=2;UNTIL=19971224T000000;WKST=SU;BYDAY=MO,WE,FR", "19970901T090000", 99
    ) == [
        *of("199709", 1, 3, 5, 15, 17, 19, 29),
        *of("199710", 1, 3, 13, 15, 17, 27, 29, 31),
        *of("199711", 10, 12, 14, 24, 26, 28),
        *of("199712", 8, 10, 12, 22),
    ]
    assert found("FREQ=MONTHLY;UNTIL=19971224T000000;BYDAY=1FR", "19970905T090000") == [
        "19970905",
        "19971003",
        "19971107",
        "19971205",
    ]
    weekly = found("FREQ=WEEKLY;UNTIL=19971007T000000;WKST=SU;BYDAY=TU,TH")
    assert weekly == found("FREQ=WEEKLY;COUNT=10;WKST=SU;BYDAY=TU,TH")
    assert len(found("FREQ=WEEKLY;UNTIL=19971224T000000", count=99)) == 17


@pytest.mark.spec("RFC 5545 §3.8.5.3")
def test_examples_within_a_day_give_their_times() -> None:
    def times(rule: str, count: int, last: str = "19970903T000000") -> list[str]:
        starts = rrule.starts(
            rrule.parse_rule(rule), seconds("19970902T090000"), Meter(10_000), last=seconds(last)
        )
        return [f"{EPOCH + timedelta(seconds=at):%H%M}" for at in islice(starts, count)]

    assert times("FREQ=HOURLY;INTERVAL=3", 9, "19970902T170000") == ["0900", "1200", "1500"]
    assert times("FREQ=MINUTELY;INTERVAL=15;COUNT=6", 9) == ["0900", "0915", "0930", "0945", "1000", "1015"]
    assert times("FREQ=MINUTELY;INTERVAL=90;COUNT=4", 9) == ["0900", "1030", "1200", "1330"]
    hours = ",".join(map(str, range(9, 17)))
    daily = times(f"FREQ=DAILY;BYHOUR={hours};BYMINUTE=0,20,40", 999, "19970910T000000")
    assert daily == times(f"FREQ=MINUTELY;INTERVAL=20;BYHOUR={hours}", 999, "19970910T000000")
    assert daily[:4] == ["0900", "0920", "0940", "1000"]
    assert daily[23:25] == ["1640", "0900"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "COUNT=1",
        "FREQ=",
        "FREQ=SOMETIMES",
        "FREQ=DAILY;INTERVAL=0",
        "FREQ=DAILY;INTERVAL=-1",
        "FREQ=DAILY;INTERVAL=" + "9" * 5000,
        "FREQ=DAILY;INTERVAL=\u0663",
        "FREQ=DAILY;COUNT=-1",
        "FREQ=DAILY;COUNT=x",
        "FREQ=DAILY;BYHOUR=24",
        "FREQ=DAILY;BYMINUTE=60",
        "FREQ=DAILY;BYSECOND=61",
        "FREQ=DAILY;BYMONTH=13",
        "FREQ=DAILY;BYMONTH=0",
        "FREQ=MONTHLY;BYMONTHDAY=0",
        "FREQ=MONTHLY;BYMONTHDAY=32",
        "FREQ=YEARLY;BYYEARDAY=-367",
        "FREQ=YEARLY;BYWEEKNO=54",
        "FREQ=YEARLY;BYSETPOS=0",
        "FREQ=YEARLY;BYDAY=99MO",
        "FREQ=YEARLY;BYDAY=XX",
        "FREQ=YEARLY;WKST=XX",
        "RSCALE=HEBREW;FREQ=YEARLY",
    ],
)
def test_a_rule_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(BadRule):
        rrule.parse_rule(text)


def test_harmless_mistakes_of_a_rule_are_let_pass() -> None:
    assert rrule.parse_rule("freq=daily; count=3 ;X-A=1;;BYHOUR=") == rrule.parse_rule("FREQ=DAILY;COUNT=3")
    assert rrule.parse_rule("FREQ=MINUTELY;BYSECOND=60").by_second == (59,)


def test_by_weekno_alone_takes_the_weekday_of_the_start() -> None:
    assert found("FREQ=YEARLY;BYWEEKNO=20", "19970512T090000", 3) == ["19970512", "19980511", "19990517"]


def test_weekdays_with_and_without_ordinal_add_up() -> None:
    assert found("FREQ=MONTHLY;BYDAY=1MO,WE;COUNT=6", "20240101T090000") == of("202401", 1, 3, 10, 17, 24, 31)


# --- against another implementation

WEEKDAYS = st.sampled_from(["MO", "TU", "WE", "TH", "FR", "SA", "SU"])


def numbers(low: int, high: int, *, negative: bool = False, most: int = 3) -> st.SearchStrategy[str]:
    one = st.integers(low, high)
    if negative:
        one = one | st.integers(-high, -low)
    return st.lists(one, min_size=1, max_size=most).map(lambda found: ",".join(map(str, found)))


@st.composite
def rules_of_days(draw: st.DrawFn) -> str:
    """Rules of days that both read alike (BYWEEKNO with BYDAY, ordinals all or none) and that match some day:
    dateutil looks for one up to the year 9999."""
    freq = draw(st.sampled_from(["YEARLY", "MONTHLY", "WEEKLY", "DAILY"]))
    parts = [f"INTERVAL={draw(st.sampled_from([1, 1, 2, 3, 4, 5, 13]))}"]
    weekdays = st.lists(WEEKDAYS, min_size=1, max_size=3).map(",".join)
    by_day = weekdays
    if freq in {"MONTHLY", "YEARLY"}:
        ordinal = st.builds(lambda n, day: f"{n}{day}", st.sampled_from([-4, -2, -1, 1, 2, 3, 4]), WEEKDAYS)
        by_day |= st.lists(ordinal, min_size=1, max_size=3).map(",".join)
    which = draw(st.sampled_from(["", "", "BYDAY", "BYMONTHDAY", "BYYEARDAY", "BYWEEKNO", "13th"]))
    if which == "BYDAY":
        parts.append(f"BYDAY={draw(by_day)}")
    elif which == "BYMONTHDAY":
        parts.append(f"BYMONTHDAY={draw(numbers(1, 31, negative=True))}")
    elif which == "BYYEARDAY" and freq != "MONTHLY":
        parts.append(f"BYYEARDAY={draw(numbers(1, 365, negative=True, most=30))}")
    elif which == "BYWEEKNO" and freq == "YEARLY":
        parts.append(f"BYWEEKNO={draw(numbers(1, 53, negative=True))};BYDAY={draw(weekdays)}")
    elif which == "13th":
        parts.append(f"BYMONTHDAY={draw(numbers(1, 28, negative=True))};BYDAY={draw(weekdays)}")
    if which in {"", "BYDAY"} and draw(st.booleans()):
        # an interval of 2, 3 or 4 months can miss a month for ever
        parts[0] = "INTERVAL=1" if freq == "MONTHLY" else parts[0]
        parts.append(f"BYMONTH={draw(numbers(1, 12))}")
    for part, highest in (("BYHOUR", 23), ("BYMINUTE", 59), ("BYSECOND", 59)):
        if draw(st.integers(0, 3)) == 0:
            parts.append(f"{part}={draw(numbers(0, highest))}")
    if len(parts) > 1 and draw(st.integers(0, 3)) == 0:
        parts.append(f"BYSETPOS={draw(st.sampled_from(['1', '-1', '1,-1', '2,-1']))}")
    if draw(st.booleans()):
        parts.append(f"COUNT={draw(st.integers(1, 40))}")
    return ";".join([f"FREQ={freq}", *parts, f"WKST={draw(WEEKDAYS)}"])


@st.composite
def rules_within_days(draw: st.DrawFn) -> str:
    """HOURLY, MINUTELY and SECONDLY, with those limits that dateutil passes in less than a second."""
    freq = draw(st.sampled_from(["HOURLY", "MINUTELY", "SECONDLY"]))
    parts = [f"FREQ={freq}", f"INTERVAL={draw(st.sampled_from([1, 2, 5, 7, 13]))}"]
    if freq == "HOURLY" and draw(st.booleans()):
        parts.append(f"BYDAY={draw(st.lists(WEEKDAYS, min_size=1, max_size=3).map(','.join))}")
    if freq == "MINUTELY" and draw(st.booleans()):
        parts.append(f"BYHOUR={draw(numbers(0, 23))}")
    if freq == "HOURLY" and draw(st.booleans()):
        parts.append(f"BYMINUTE={draw(numbers(0, 59))}")
    if draw(st.booleans()):
        parts.append(f"BYSECOND={draw(numbers(0, 59))}")
        if freq != "SECONDLY" and draw(st.booleans()):
            parts.append(f"BYSETPOS={draw(st.sampled_from(['1', '-1', '1,-1']))}")
    if draw(st.booleans()):
        parts.append(f"COUNT={draw(st.integers(1, 40))}")
    return ";".join(parts)


BEGINS = st.integers(seconds("19900101T000000"), seconds("20300101T000000"))


@settings(deadline=None, max_examples=200)
@given(rules_of_days(), BEGINS, st.integers(-50, 1500), st.integers(0, 1500))
def test_rules_of_days_agree_with_dateutil(rule: str, first: int, shift_days: int, days: int) -> None:
    _agree(rule, first, first + shift_days * 86_400 + shift_days % 3 - 1, days * 86_400)


@settings(deadline=None, max_examples=100)
@given(rules_within_days(), BEGINS, st.integers(-3_600, 100_000), st.integers(0, 100_000))
def test_rules_within_days_agree_with_dateutil(rule: str, first: int, shift_s: int, length_s: int) -> None:
    _agree(rule, first, first + shift_s, length_s)


def _agree(rule: str, first: int, after: int, length_s: int) -> None:
    begin = EPOCH + timedelta(seconds=first)
    low, high = EPOCH + timedelta(seconds=after), EPOCH + timedelta(seconds=after + length_s)
    try:
        oracle = rrulestr(rule, dtstart=begin)
    except ValueError:
        reject()  # dateutil refuses some of what can never happen
    expected = []
    for when in oracle:
        if when > high or len(expected) > 200:
            break
        if when >= low:
            expected.append(int((when - EPOCH).total_seconds()))
    mine = rrule.starts(rrule.parse_rule(rule), first, Meter(2_000_000), after=after, last=after + length_s)
    assert list(islice(mine, len(expected) + 1))[: len(expected)] == expected
    if len(expected) <= 200:
        assert next(mine, None) is None


@given(st.text(max_size=60))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    for rule in (text, f"FREQ=DAILY;{text}"):
        try:
            parsed = rrule.parse_rule(rule)
        except BadRule:
            continue
        assert parsed.interval >= 1


# --- bombs

NOW = seconds("20240101T000000")
BOMBS = [
    "FREQ=SECONDLY",
    "FREQ=MINUTELY",
    "FREQ=SECONDLY;COUNT=1000000000",
    "FREQ=DAILY;COUNT=1000000000",
    "FREQ=WEEKLY;BYDAY=MO,TU;COUNT=1000000000",
    "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30",
    "FREQ=SECONDLY;BYMONTH=2;BYMONTHDAY=30",
    "FREQ=SECONDLY;BYMONTH=2;BYYEARDAY=200",
    "FREQ=DAILY;BYMONTH=2;BYYEARDAY=200",
    "FREQ=YEARLY;BYWEEKNO=53;BYMONTH=6",
    "FREQ=YEARLY;BYMONTHDAY=31;BYDAY=1MO",
    "FREQ=MINUTELY;INTERVAL=2;BYMINUTE=1",
    "FREQ=HOURLY;INTERVAL=24;BYHOUR=1",
    "FREQ=DAILY;INTERVAL=7;BYDAY=SU",
    "FREQ=SECONDLY;INTERVAL=9999999999",
    "FREQ=YEARLY;INTERVAL=9999999999",
    "FREQ=YEARLY;BYYEARDAY=" + ",".join(map(str, range(1, 367))),
    "FREQ=YEARLY;BYDAY=MO,TU,WE,TH,FR,SA,SU;BYSETPOS=-1;BYHOUR={h};BYMINUTE={m};BYSECOND={m}".format(
        h=",".join(map(str, range(24))), m=",".join(map(str, range(60)))
    ),
]


@pytest.mark.parametrize("first", [FIRST_S, NOW, LAST_S - 10 * 86_400])
@pytest.mark.parametrize("rule", BOMBS)
def test_a_bomb_costs_its_budget_and_no_more(rule: str, first: int) -> None:
    def follow(after: int, last: int) -> None:
        meter = Meter(50_000)
        with suppress(OutOfSteps):
            for at in rrule.starts(rrule.parse_rule(rule), first, meter, after=after, last=last):
                assert after <= at <= last
        assert meter.left > -100_000

    for window in ((FIRST_S, LAST_S), (NOW, NOW + 31 * 86_400)):
        costs.within(0.4, lambda window=window: follow(*window))  # some 0.05 s


def test_a_rule_of_year_one_is_cheap_to_ask_about_today() -> None:
    for rule in ("FREQ=DAILY", "FREQ=WEEKLY;BYDAY=MO,FR", "FREQ=MONTHLY", "FREQ=YEARLY", "FREQ=HOURLY"):
        meter = Meter(10_000)
        starts = rrule.starts(rrule.parse_rule(rule), FIRST_S, meter, after=NOW, last=NOW + 366 * 86_400)
        assert next(starts) >= NOW
        assert meter.left > 9_900


def test_count_is_kept_when_whole_periods_are_jumped_over() -> None:
    def last_of(rule: str) -> int:
        return max(rrule.starts(rrule.parse_rule(rule), FIRST_S, Meter(100), after=NOW))

    days = (NOW - FIRST_S) // 86_400
    assert last_of(f"FREQ=DAILY;COUNT={days + 3}") == NOW + 2 * 86_400
    assert last_of(f"FREQ=SECONDLY;INTERVAL=2;COUNT={(NOW - FIRST_S) // 2 + 2}") in range(NOW, NOW + 4)
