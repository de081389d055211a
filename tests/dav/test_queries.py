"""Queries through the site: the examples of the standards, the index, zones, and what cannot be followed."""

from __future__ import annotations

import datetime
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from urllib.parse import unquote
from zoneinfo import ZoneInfo

import pytest
import radicale.item
import radicale.item.filter
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ksync_server import settings as configuration
from ksync_server.dav import collections, objects, occurrences, queries
from ksync_server.dav.places import Kind
from ksync_server.store import blobs
from ksync_server.store import tables as t
from ksync_server.store.database import Write
from ksync_server.wire import ical, recurrence, xml
from tests import costs
from tests.dav.harness import NOW, Answer, Client, Row, Store, calendar, card, component, event, make_account
from tests.dav.test_filters import alarm, asks, below, comp, param, prop, span, text

D = "{DAV:}"
C = "{urn:ietf:params:xml:ns:caldav}"
A = "{urn:ietf:params:xml:ns:carddav}"
ETAG = "<d:prop><d:getetag/></d:prop>"
FAST_S = 0.5
MANY_S = 3.0  # 1,000 objects that cannot be followed, on a machine that does other things, too


def ask(client: Client, path: str, inner: str, *, data: str = "", more: str = "") -> Answer:
    """A calendar-query; `inner` is the comp-filter of VCALENDAR."""
    wanted = f"<d:prop><d:getetag/>{data}</d:prop>" if data else ETAG
    return client.report(path, "c:calendar-query", f"{wanted}<c:filter>{inner}</c:filter>{more}", depth="1")


def names(answer: Answer, path: str) -> set[str]:
    return {href.removeprefix(path).removesuffix(".ics").removesuffix(".vcf") for href in answer.rows()}


def found(client: Client, path: str, inner: str, more: str = "") -> set[str]:
    return names(ask(client, path, inner, more=more), path)


def between(start: str, end: str, kind: str = "VEVENT") -> str:
    return below(span(start, end), kind)


MAY = between("20260501T000000Z", "20260601T000000Z")
JUNE = between("20260601T000000Z", "20260701T000000Z")


# -- the examples of RFC 4791 -----------------------------------------------------------------------

EASTERN = (
    "BEGIN:VTIMEZONE\r\nLAST-MODIFIED:20040110T032845Z\r\nTZID:US/Eastern\r\nBEGIN:DAYLIGHT\r\n"
    "DTSTART:20000404T020000\r\nRRULE:FREQ=YEARLY;BYDAY=1SU;BYMONTH=4\r\nTZNAME:EDT\r\nTZOFFSETFROM:-0500\r\n"
    "TZOFFSETTO:-0400\r\nEND:DAYLIGHT\r\nBEGIN:STANDARD\r\nDTSTART:20001026T020000\r\n"
    "RRULE:FREQ=YEARLY;BYDAY=-1SU;BYMONTH=10\r\nTZNAME:EST\r\nTZOFFSETFROM:-0400\r\nTZOFFSETTO:-0500\r\n"
    "END:STANDARD\r\nEND:VTIMEZONE\r\n"
)
TWO = "00959BC664CA650E933C892C@example.org"
THREE = "DC6C50A017428C5216A2F1CD@example.org"
APPENDIX_B = {
    "abcd1": EASTERN
    + component(
        "VEVENT",
        "74855313FA803DA593CD579A@example.org",
        "DTSTART;TZID=US/Eastern:20060102T100000",
        "DURATION:PT1H",
        "SUMMARY:Event #1",
        "Description:Go Steelers!",
    ),
    "abcd2": EASTERN
    + component(
        "VEVENT",
        TWO,
        "DTSTART;TZID=US/Eastern:20060102T120000",
        "DURATION:PT1H",
        "RRULE:FREQ=DAILY;COUNT=5",
        "SUMMARY:Event #2",
    )
    + component(
        "VEVENT",
        TWO,
        "DTSTART;TZID=US/Eastern:20060104T140000",
        "DURATION:PT1H",
        "RECURRENCE-ID;TZID=US/Eastern:20060104T120000",
        "SUMMARY:Event #2 bis",
    )
    + component(
        "VEVENT",
        TWO,
        "DTSTART;TZID=US/Eastern:20060106T140000",
        "DURATION:PT1H",
        "RECURRENCE-ID;TZID=US/Eastern:20060106T120000",
        "SUMMARY:Event #2 bis bis",
    ),
    "abcd3": EASTERN
    + component(
        "VEVENT",
        THREE,
        "ATTENDEE;PARTSTAT=ACCEPTED;ROLE=CHAIR:mailto:cyrus@example.org",
        "ATTENDEE;PARTSTAT=NEEDS-ACTION:mailto:lisa@example.org",
        "DTSTART;TZID=US/Eastern:20060104T100000",
        "DURATION:PT1H",
        "STATUS:TENTATIVE",
        "SUMMARY:Event #3",
        "X-ABC-GUID:E1CX5Dr-0007ym-Hz@example.org",
    ),
    "abcd4": component(
        "VTODO",
        "DDDEEB7915FA61233B861457@example.org",
        "DUE;VALUE=DATE:20060104",
        "STATUS:NEEDS-ACTION",
        *alarm(";RELATED=START:-PT10M"),
    ),
    "abcd5": EASTERN
    + component(
        "VTODO",
        "E10BA47467C5C69BB74E8720@example.org",
        "DUE;TZID=US/Eastern:20060106T120000",
        "STATUS:NEEDS-ACTION",
        *alarm(";RELATED=START:-PT10M"),
    ),
    "abcd6": component(
        "VTODO",
        "E10BA47467C5C69BB74E8722@example.org",
        "COMPLETED:20051223T122322Z",
        "DUE;VALUE=DATE:20051225",
        "STATUS:COMPLETED",
        *alarm(";RELATED=START:-PT10M"),
    ),
    "abcd7": component(
        "VTODO", "E10BA47467C5C69BB74E8725@example.org", "DUE;VALUE=DATE:20060101", "STATUS:CANCELLED"
    ),
    "abcd8": component(
        "VFREEBUSY",
        "76ef34-54a3d2@example.org",
        'ORGANIZER;CN="Bernard":mailto:bernard@example.org',
        "DTSTART:20060101T000000Z",
        "DTEND:20060108T000000Z",
        "FREEBUSY:20050531T230000Z/20050601T010000Z",
        "FREEBUSY;FBTYPE=BUSY-TENTATIVE:20060102T100000Z/20060102T120000Z",
        "FREEBUSY:20060103T100000Z/20060103T120000Z",
        "FREEBUSY:20060104T100000Z/20060104T120000Z",
        "FREEBUSY;FBTYPE=BUSY-UNAVAILABLE:20060105T100000Z/20060105T120000Z",
        "FREEBUSY:20060106T100000Z/20060106T120000Z",
    ),
}


@pytest.fixture(scope="module")
def work(store: Store) -> tuple[Client, str]:
    """The calendar of RFC 4791 appendix B."""
    bernard = Client(store, store.database.write(lambda tx: make_account(tx, "bernard")))
    path = bernard.make()
    for name, content in APPENDIX_B.items():
        assert bernard.put(f"{path}{name}.ics", calendar(content)).status == 201
    return bernard, path


def contents(work: tuple[Client, str], inner: str, data: str) -> dict[str, list[str]]:
    """Unfolded lines of each object that a query answers."""
    client, path = work
    rows = ask(client, path, inner, data=data).rows()
    return {
        href.removeprefix(path).removesuffix(".ics"): row.text(C + "calendar-data")
        .replace("\r\n ", "")
        .splitlines()
        for href, row in rows.items()
    }


def cut(how: str, start: str, end: str) -> str:
    return f'<c:calendar-data><c:{how} start="{start}" end="{end}"/></c:calendar-data>'


def props(*of: str) -> str:
    return "".join(f'<c:prop name="{name}"/>' for name in of)


@pytest.mark.spec("RFC 4791 §7.8.1")
def test_example_of_partial_retrieval_by_time_range(work: tuple[Client, str]) -> None:
    wanted = props(
        "SUMMARY", "UID", "DTSTART", "DTEND", "DURATION", "RRULE", "RDATE", "EXDATE", "RECURRENCE-ID"
    )
    data = (
        f'<c:calendar-data><c:comp name="VCALENDAR">{props("VERSION")}<c:comp name="VEVENT">{wanted}</c:comp>'
        '<c:comp name="VTIMEZONE"/></c:comp></c:calendar-data>'
    )
    answer = contents(work, between("20060104T000000Z", "20060105T000000Z"), data)
    assert set(answer) == {"abcd2", "abcd3"}
    assert answer["abcd3"] == [
        "BEGIN:VCALENDAR",
        "VERSION:2.0",
        *EASTERN.splitlines(),
        "BEGIN:VEVENT",
        f"UID:{THREE}",
        "DTSTART;TZID=US/Eastern:20060104T100000",
        "DURATION:PT1H",
        "SUMMARY:Event #3",
        "END:VEVENT",
        "END:VCALENDAR",
    ]
    assert [line for line in answer["abcd2"] if line.startswith("SUMMARY")] == [
        "SUMMARY:Event #2",
        "SUMMARY:Event #2 bis",
        "SUMMARY:Event #2 bis bis",
    ]
    assert not [line for line in answer["abcd2"] if line.startswith(("DTSTAMP", "PRODID"))]


@pytest.mark.spec("RFC 4791 §7.8.2")
def test_example_of_partial_retrieval_of_recurring_events(work: tuple[Client, str]) -> None:
    data = cut("limit-recurrence-set", "20060103T000000Z", "20060105T000000Z")
    answer = contents(work, between("20060103T000000Z", "20060105T000000Z"), data)
    assert set(answer) == {"abcd2", "abcd3"}
    summaries = [line for line in answer["abcd2"] if line.startswith("SUMMARY")]
    assert summaries == ["SUMMARY:Event #2", "SUMMARY:Event #2 bis"]
    assert "RRULE:FREQ=DAILY;COUNT=5" in answer["abcd2"]
    assert answer["abcd3"] == calendar(APPENDIX_B["abcd3"]).splitlines()


@pytest.mark.spec("RFC 4791 §7.8.3")
def test_example_of_expanded_retrieval(work: tuple[Client, str]) -> None:
    data = cut("expand", "20060103T000000Z", "20060105T000000Z")
    answer = contents(work, between("20060103T000000Z", "20060105T000000Z"), data)
    assert set(answer) == {"abcd2", "abcd3"}
    times = [line for line in answer["abcd2"] if line.startswith(("DTSTART", "RECURRENCE-ID", "SUMMARY"))]
    assert sorted(times) == sorted(
        [
            "DTSTART:20060103T170000Z",
            "RECURRENCE-ID:20060103T170000Z",
            "SUMMARY:Event #2",
            "DTSTART:20060104T190000Z",
            "RECURRENCE-ID:20060104T170000Z",
            "SUMMARY:Event #2 bis",
        ]
    )
    assert not [
        line for lines in answer.values() for line in lines if line.startswith(("RRULE", "BEGIN:VTIMEZONE"))
    ]
    assert "DTSTART:20060104T150000Z" in answer["abcd3"]


@pytest.mark.spec("RFC 4791 §7.8.4")
def test_example_of_stored_free_busy(work: tuple[Client, str]) -> None:
    data = cut("limit-freebusy-set", "20060102T000000Z", "20060103T000000Z")
    answer = contents(work, between("20060102T000000Z", "20060103T000000Z", "VFREEBUSY"), data)
    assert set(answer) == {"abcd8"}
    assert [line for line in answer["abcd8"] if line.startswith("FREEBUSY")] == [
        "FREEBUSY;FBTYPE=BUSY-TENTATIVE:20060102T100000Z/20060102T120000Z"
    ]


OPEN_TASKS = prop("COMPLETED", "<c:is-not-defined/>") + prop(
    "STATUS", text("CANCELLED", negate_condition="yes")
)


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        pytest.param(
            below(comp(span("20060106T100000Z", "20060107T100000Z"), "VALARM"), "VTODO"),
            {"abcd5"},
            marks=pytest.mark.spec("RFC 4791 §7.8.5"),
        ),
        pytest.param(
            below(prop("UID", text(THREE, collation="i;octet"))),
            {"abcd3"},
            marks=pytest.mark.spec("RFC 4791 §7.8.6"),
        ),
        pytest.param(
            below(
                prop(
                    "ATTENDEE",
                    text("mailto:lisa@example.org", collation="i;ascii-casemap")
                    + param("PARTSTAT", text("NEEDS-ACTION", collation="i;ascii-casemap")),
                )
            ),
            {"abcd3"},
            marks=pytest.mark.spec("RFC 4791 §7.8.7"),
        ),
        pytest.param(below(""), {"abcd1", "abcd2", "abcd3"}, marks=pytest.mark.spec("RFC 4791 §7.8.8")),
        pytest.param(
            below(OPEN_TASKS, "VTODO"), {"abcd4", "abcd5"}, marks=pytest.mark.spec("RFC 4791 §7.8.9")
        ),
        # the server of the example refuses this one; ours supports every property
        pytest.param(
            below(prop("X-ABC-GUID", text("ABC", negate_condition="yes"))),
            {"abcd3"},
            marks=pytest.mark.spec("RFC 4791 §7.8.10"),
        ),
        (comp("", "VCALENDAR"), set(APPENDIX_B)),
        (below("", "VTIMEZONE"), {"abcd1", "abcd2", "abcd3", "abcd5"}),
        (below("<c:is-not-defined/>"), {"abcd4", "abcd5", "abcd6", "abcd7", "abcd8"}),
        (comp("<c:is-not-defined/>", "VCALENDAR"), set()),
    ],
)
def test_examples_without_data(work: tuple[Client, str], inner: str, expected: set[str]) -> None:
    assert found(*work, inner) == expected


@pytest.mark.spec("RFC 4791 §7.10")
def test_example_of_a_free_busy_query(work: tuple[Client, str]) -> None:
    client, path = work
    answer = client.report(path, "c:free-busy-query", span("20060104T140000Z", "20060105T220000Z"), depth="1")
    assert answer.status == 200
    lines = answer.text.replace("\r\n ", "").splitlines()
    assert [line for line in lines if line.startswith("FREEBUSY")] == [
        "FREEBUSY:20060104T190000Z/20060104T200000Z",
        "FREEBUSY:20060105T170000Z/20060105T180000Z",
        "FREEBUSY;FBTYPE=BUSY-TENTATIVE:20060104T150000Z/20060104T160000Z",
        "FREEBUSY;FBTYPE=BUSY-UNAVAILABLE:20060105T100000Z/20060105T120000Z",
    ]
    assert {"DTSTART:20060104T140000Z", "DTEND:20060105T220000Z", "BEGIN:VFREEBUSY"} <= set(lines)


# -- the index --------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that a query had to read, in order."""
    read: list[str] = []
    real = queries.CalendarQuery._evaluate

    def evaluate(self: queries.CalendarQuery, candidate: queries._Candidate, data: bytes) -> bool:
        read.append(candidate.object.name.removesuffix(".ics"))
        return real(self, candidate, data)

    monkeypatch.setattr(queries.CalendarQuery, "_evaluate", evaluate)
    return read


def settle(client: Client) -> None:
    """Wait until what was submitted is written."""
    for _ in range(8):  # PostgreSQL writes in a pool, SQLite in order
        client.store.database.write(lambda tx: None)


def wait_for_index(client: Client, path: str, count: int) -> None:
    place = path.split("/")[3]
    deadline = time.monotonic() + 20
    while True:
        with client.store.database.read() as tx:
            collection = collections.get(tx, client.identity.account_id, Kind.CALENDAR, place)
            rows = tx.execute(
                sa.select(sa.func.count())
                .select_from(t.occurrence.join(t.object_, t.object_.c.id == t.occurrence.c.object_id))
                .where(t.object_.c.collection_id == collection.id, t.object_.c.seq == t.occurrence.c.seq)
            ).scalar_one()
        if rows == count:
            return
        assert time.monotonic() < deadline, f"{rows} of {count} indexes"
        settle(client)


def test_the_index_is_made_once_and_then_answers(client: Client, evaluated: list[str]) -> None:
    path = client.make()
    client.put(path + "w.ics", event("w", "DURATION:PT1H", "RRULE:FREQ=WEEKLY"))
    client.put(path + "day.ics", event("day", start="DTSTART;VALUE=DATE:20260510"))
    client.put(path + "one.ics", event("one", "DURATION:PT1H"))
    assert found(client, path, MAY) == {"w", "day", "one"}
    assert sorted(evaluated) == ["day", "w"], "a single event with fixed times is decided by its row"
    wait_for_index(client, path, 2)
    evaluated.clear()
    assert found(client, path, MAY) == {"w", "day", "one"}
    assert found(client, path, JUNE) == {"w"}
    assert found(client, path, between("20260509T230000Z", "20260510T000000Z")) == set()
    assert found(client, path, below(span("20260601T000000Z"))) == {"w"}
    assert found(client, path, below(span(end="20260501T100001Z"))) == {"one", "w"}
    assert evaluated == []


def test_the_index_is_extended_when_a_range_leaves_its_horizon(client: Client, evaluated: list[str]) -> None:
    path = client.make()
    client.put(path + "y.ics", event("y", "RRULE:FREQ=YEARLY"))
    assert found(client, path, MAY) == {"y"}
    wait_for_index(client, path, 1)
    far = between("20460501T000000Z", "20460601T000000Z")
    assert found(client, path, far) == {"y"}
    assert evaluated == ["y", "y"]
    deadline = time.monotonic() + 20
    while evaluated:  # PostgreSQL writes it in a pool
        assert time.monotonic() < deadline
        settle(client)
        evaluated.clear()
        assert found(client, path, far) == {"y"}
    assert found(client, path, between("20460601T000000Z", "20460701T000000Z")) == set()
    assert evaluated == []


def test_a_changed_object_is_asked_anew(client: Client, evaluated: list[str]) -> None:
    path = client.make()
    client.put(path + "w.ics", event("w", "RRULE:FREQ=WEEKLY"))
    assert found(client, path, JUNE) == {"w"}
    wait_for_index(client, path, 1)
    client.put(path + "w.ics", event("w", "RRULE:FREQ=WEEKLY;COUNT=2"))
    assert found(client, path, JUNE) == set()
    client.put(path + "w.ics", event("w", "RRULE:FREQ=WEEKLY;BYDAY=MO", start="DTSTART:20260630T100000Z"))
    assert found(client, path, JUNE) == {"w"}
    client.send("DELETE", path + "w.ics")
    assert found(client, path, JUNE) == set()


def zone_of(offset: str) -> str:
    """A calendar with a VTIMEZONE of an invented name, as text of an element."""
    return calendar(
        f"BEGIN:VTIMEZONE\r\nTZID:Zone{offset}\r\nBEGIN:STANDARD\r\nDTSTART:19700101T000000\r\n"
        f"TZOFFSETFROM:{offset}\r\nTZOFFSETTO:{offset}\r\nEND:STANDARD\r\nEND:VTIMEZONE\r\n"
    ).replace("\r", "&#13;")


def move_to(client: Client, path: str, offset: str) -> None:
    element = f"<c:calendar-timezone>{zone_of(offset)}</c:calendar-timezone>"
    body = f"<d:propertyupdate{xml.NAMESPACES}><d:set><d:prop>{element}</d:prop></d:set></d:propertyupdate>"
    assert client.send("PROPPATCH", path, body).status == 207


LATE = between("20260510T230000Z", "20260511T000000Z")
FLOATING = {
    "series": event("series", "RRULE:FREQ=DAILY;COUNT=3", "DURATION:PT1H", start="DTSTART:20260509T223000"),
    "single": event("single", "DURATION:PT30M", start="DTSTART:20260510T233000"),
    "days": event("days", "RRULE:FREQ=WEEKLY", start="DTSTART;VALUE=DATE:20260511"),
    "exdate": event(
        "exdate",
        "RRULE:FREQ=DAILY;COUNT=1",
        "EXDATE:20260510T231500",
        "DURATION:PT5M",
        start="DTSTART:20260510T231500Z",
    ),
}


@pytest.mark.spec("RFC 4791 §5.2.2")
def test_floating_events_follow_the_time_zone_of_the_calendar(client: Client, evaluated: list[str]) -> None:
    path = client.make()
    for name, content in FLOATING.items():
        client.put(f"{path}{name}.ics", content)
    for offset, expected in (
        ("", {"series", "single"}),
        ("+0200", {"days", "exdate"}),
        ("-0100", {"series", "exdate"}),
        ("+0100", {"days", "exdate"}),
        ("+0000", {"series", "single"}),
    ):
        if offset:
            move_to(client, path, offset)
        assert found(client, path, LATE) == expected, offset
        wait_for_index(client, path, 4)
        evaluated.clear()
        assert found(client, path, LATE) == expected, offset
        assert evaluated == []


@pytest.mark.spec("RFC 4791 §9.8")
def test_the_zone_of_a_query_neither_uses_nor_changes_the_index(client: Client, evaluated: list[str]) -> None:
    path = client.make()
    for name, content in FLOATING.items():
        client.put(f"{path}{name}.ics", content)
    client.put(path + "fixed.ics", event("fixed", "RRULE:FREQ=DAILY", start="DTSTART:20260501T231000Z"))
    assert found(client, path, LATE) == {"series", "single", "fixed"}
    wait_for_index(client, path, 5)
    evaluated.clear()
    brought = f"<c:timezone>{zone_of('+0200')}</c:timezone>"
    assert found(client, path, LATE, brought) == {"days", "exdate", "fixed"}
    assert "fixed" not in evaluated
    assert found(client, path, LATE, brought) == {"days", "exdate", "fixed"}
    settle(client)
    assert found(client, path, LATE) == {"series", "single", "fixed"}
    evaluated.clear()
    assert found(client, path, LATE, "<c:timezone-id>UTC</c:timezone-id>") == {"series", "single", "fixed"}
    assert evaluated == [], "the zone it brings is the calendar's own"


def test_an_index_of_a_time_zone_that_changed_meanwhile_is_not_kept(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = client.make()
    client.put(path + "series.ics", FLOATING["series"])
    real = occurrences.compute

    def compute(*arguments: object) -> occurrences.Index:
        monkeypatch.setattr(occurrences, "compute", real)
        made = real(*arguments)  # type: ignore[arg-type]
        name = path.split("/")[3]

        def change(tx: Write) -> None:
            locked = collections.lock(tx, client.identity.account_id, Kind.CALENDAR, name)
            text_ = f"<x:calendar-timezone xmlns:x='{C[1:-1]}'>{zone_of('+0200')}</x:calendar-timezone>"
            collections.change_properties(tx, locked, {collections.TIMEZONE: text_}, ())

        client.store.database.write(change)
        return made

    monkeypatch.setattr(occurrences, "compute", compute)
    assert found(client, path, LATE) == {"series"}, "as when the query began"
    settle(client)
    assert found(client, path, LATE) == set()
    settle(client)
    assert found(client, path, LATE) == set()


def test_an_alarm_is_found_however_long_before_its_event_it_rings(client: Client) -> None:
    path = client.make()
    client.put(path + "early.ics", event("early", *alarm(":-P400D")))
    client.put(path + "late.ics", event("late", *alarm(":P400D")))
    client.put(path + "weekly.ics", event("weekly", "RRULE:FREQ=WEEKLY;COUNT=2", *alarm(":-P400D")))
    client.put(path + "none.ics", event("none"))
    ringing = below(comp(span("20250327T000000Z", "20250328T000000Z"), "VALARM"))
    assert found(client, path, ringing) == {"early", "weekly"}
    assert found(client, path, below(comp(span("20250403T000000Z", "20250404T000000Z"), "VALARM"))) == {
        "weekly"
    }
    assert found(client, path, below(comp(span("20270605T000000Z", "20270606T000000Z"), "VALARM"))) == {
        "late"
    }
    both = span("20260501T000000Z", "20260502T000000Z") + comp(span(end="20260101T000000Z"), "VALARM")
    assert found(client, path, below(both)) == {"early", "weekly"}


@pytest.mark.spec("RFC 4791 §9.9")
def test_tasks_are_found_by_every_row_of_their_table(client: Client) -> None:
    path = client.make()
    tasks: dict[str, tuple[str, ...]] = {
        "start-duration": ("DTSTART:20260510T100000Z", "DURATION:PT1H"),
        "start-due": ("DTSTART:20260510T100000Z", "DUE:20260510T110000Z"),
        "start": ("DTSTART:20260510T100000Z",),
        "due": ("DUE:20260510T100000Z",),
        "completed-created": ("COMPLETED:20260510T100000Z", "CREATED:20260509T100000Z"),
        "completed": ("COMPLETED:20260510T100000Z",),
        "created": ("CREATED:20260510T100000Z",),
        "nothing": (),
    }
    for name, lines in tasks.items():
        client.put(f"{path}{name}.ics", calendar(component("VTODO", name, *lines)))
    always = {"created", "nothing"}
    for start, end, expected in (
        ("20260510T100000Z", "20260510T100001Z", set(tasks) - {"due"}),
        ("20260510T093000Z", "20260510T100000Z", {"due", "completed", "completed-created", "nothing"}),
        ("20260510T110000Z", "20260510T120000Z", always | {"start-duration"}),
        ("20260509T110000Z", "20260509T120000Z", {"completed-created", "nothing"}),
        ("20270101T000000Z", "20270102T000000Z", always),
        ("20200101T000000Z", "20200102T000000Z", {"nothing"}),
    ):
        assert found(client, path, between(start, end, "VTODO")) == expected, start
    assert found(client, path, below("", "VTODO")) == set(tasks)
    assert found(client, path, MAY) == set()


# -- what cannot be followed --------------------------------------------------------------------------

UNFOLLOWABLE = {
    "endless": ("RRULE:FREQ=SECONDLY",),
    "endless-minutes": ("RRULE:FREQ=MINUTELY", "DURATION:PT1M"),
    "many": ("RRULE:FREQ=SECONDLY;COUNT=1000000000",),
    "never": ("RRULE:FREQ=SECONDLY;BYMONTH=2;BYMONTHDAY=30",),
    "february-30": ("RRULE:FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30",),
    "annihilated": ("RRULE:FREQ=MINUTELY", "EXRULE:FREQ=MINUTELY"),
    "annihilated-seconds": ("RRULE:FREQ=SECONDLY", "EXRULE:FREQ=SECONDLY"),
    "two-rules": ("RRULE:FREQ=DAILY;COUNT=3", "RRULE:FREQ=SECONDLY;COUNT=100000000"),
    "long": ("RRULE:FREQ=HOURLY", "DURATION:P2000D"),
    "alarms": ("RRULE:FREQ=SECONDLY", *alarm(":-P10D", "REPEAT:100000000", "DURATION:PT1S")),
}
STARTS = ("DTSTART:20250101T000000Z", "DTSTART:00010101T000000Z")
QUESTIONS = (
    MAY,
    below(span("20260501T000000Z")),
    below(span(end="20260501T000000Z")),
    below(span("20260501T000000Z", "20260601T000000Z") + prop("SUMMARY", text("x"))),
    below(comp(span("20260501T000000Z", "20260601T000000Z"), "VALARM")),
)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", UNFOLLOWABLE)
def test_a_rule_that_cannot_be_followed_is_answered_at_once(client: Client, name: str, start: str) -> None:
    path = client.make()
    client.put(path + "plain.ics", event("plain", "SUMMARY:x"))
    bad = event("bad", "SUMMARY:x", *UNFOLLOWABLE[name], start=start)
    assert costs.within(FAST_S, lambda: client.put(path + "bad.ics", bad)).status in (201, 204, 403)
    expand = cut("expand", "20260501T000000Z", "20260601T000000Z")
    limit = cut("limit-recurrence-set", "20260501T000000Z", "20260601T000000Z")
    actions: list[Callable[[], Answer]] = [
        lambda inner=inner: ask(client, path, inner) for inner in QUESTIONS
    ]
    actions += [lambda inner=inner: ask(client, path, inner) for inner in QUESTIONS[:1]]
    actions += [lambda: ask(client, path, MAY, data=expand), lambda: ask(client, path, MAY, data=limit)]
    actions.append(
        lambda: client.report(path, "c:free-busy-query", span("20260501T000000Z", "20260601T000000Z"))
    )
    for act in actions:
        answer = costs.within(FAST_S, act)
        assert answer.status in (200, 207, 403), answer.precondition
    assert "plain" in found(client, path, MAY)


def insert(client: Client, path: str, contents_: Iterator[tuple[str, str]]) -> None:
    """Objects in one transaction, as PUT would store them."""
    limits = client.store.settings.dav
    staged = [
        (name, content.encode(), objects.prepare(Kind.CALENDAR, content.encode(), datetime.UTC, limits))
        for name, content in contents_
    ]

    def write(tx: Write) -> None:
        for name, content, prepared in staged:
            locked = collections.lock(tx, client.identity.account_id, Kind.CALENDAR, path.split("/")[3])
            objects.put(
                tx, locked, name, prepared, blobs.staged_bytes(content), href=path, limit=100_000, now=NOW
            )

    client.store.database.write(write)


def test_a_calendar_full_of_such_rules_is_answered_and_right_about_the_others(client: Client) -> None:
    path = client.make()
    bad = ((f"bad{n}.ics", event(f"bad{n}", "RRULE:FREQ=SECONDLY", start=STARTS[0])) for n in range(1000))
    insert(client, path, bad)
    client.put(path + "weekly.ics", event("weekly", "RRULE:FREQ=WEEKLY;COUNT=2"))
    client.put(path + "may.ics", event("may"))
    client.put(path + "june.ics", event("june", start="DTSTART:20260615T100000Z"))
    for inner, others in ((MAY, {"weekly", "may"}), (JUNE, {"june"}), (MAY, {"weekly", "may"})):
        rows = costs.within(MANY_S, lambda inner=inner: found(client, path, inner))
        assert {name for name in rows if not name.startswith("bad")} == others
        assert len(rows) == 1000 + len(others)
        settle(client)


# -- against brute force and against Radicale ---------------------------------------------------------

RULES = st.builds(
    lambda freq, interval, ending: f"RRULE:FREQ={freq};INTERVAL={interval}{ending}",
    st.sampled_from(["DAILY", "WEEKLY", "MONTHLY", "YEARLY", "HOURLY"]),
    st.integers(1, 9),
    st.sampled_from(["", ";COUNT=5", ";COUNT=200", ";UNTIL=20260615T000000Z"]),
)
BEGINS = st.builds(
    lambda day, form: form.format(
        day=(datetime.date(2025, 6, 1) + datetime.timedelta(day)).strftime("%Y%m%d")
    ),
    st.integers(0, 500),
    st.sampled_from(
        [
            "DTSTART:{day}T100000Z",
            "DTSTART;TZID=Europe/Zurich:{day}T023000",
            "DTSTART;TZID=Pacific/Auckland:{day}T233000",
            "DTSTART;VALUE=DATE:{day}",
            "DTSTART:{day}T223000",
        ]
    ),
)
LENGTHS = st.sampled_from([(), ("DURATION:PT1H",), ("DURATION:P1D",), ("DURATION:P20D",)])
EVENTS = st.lists(st.tuples(BEGINS, st.one_of(st.none(), RULES), LENGTHS), min_size=1, max_size=6)
RANGES = st.builds(
    lambda at, length: (at, at + length),
    st.integers(1_735_000_000, 1_830_000_000),
    st.sampled_from([3600, 86400, 31 * 86400, 400 * 86400]),
)
SLOW = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def stamp(at: int) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y%m%dT%H%M%SZ")


def _is_too_long(
    obj: ical.CalendarObject, low: datetime.datetime, high: datetime.datetime, zone: ZoneInfo
) -> bool:
    budget = objects.budget(configuration.Dav())
    try:
        next(recurrence.occurrences(obj, low, high, zone=zone, budget=budget), None)
    except recurrence.TooManySteps:
        return True
    return False


@SLOW
@given(EVENTS, st.lists(RANGES, min_size=1, max_size=4), st.sampled_from(["UTC", "Asia/Tokyo"]))
@example(
    [("DTSTART:20250601T100000Z", "RRULE:FREQ=HOURLY;INTERVAL=2", ())], [(1769047201, 1769050801)], "UTC"
)
def test_queries_through_the_index_are_what_brute_force_finds(
    client: Client,
    drawn: list[tuple[str, str | None, tuple[str, ...]]],
    ranges: list[tuple[int, int]],
    zone: str,
) -> None:
    stored = f"<x:calendar-timezone-id xmlns:x='{C[1:-1]}'>{zone}</x:calendar-timezone-id>"
    path = client.make(**{collections.TIMEZONE_ID: stored})
    made = {
        f"e{number}": event(f"e{number}", *([rule] if rule else []), *length, start=begin)
        for number, (begin, rule, length) in enumerate(drawn)
    }
    for name, content in made.items():
        assert client.put(f"{path}{name}.ics", content).status == 201
    parsed = {name: ical.check_object(ical.parse(content.encode())) for name, content in made.items()}
    for start, end in ranges * 2:
        low, high = (datetime.datetime.fromtimestamp(at, datetime.UTC) for at in (start, end))
        expected = {
            name
            for name, obj in parsed.items()
            if next(recurrence.occurrences(obj, low, high, zone=ZoneInfo(zone)), None) is not None
        }
        answered = found(client, path, between(stamp(start), stamp(end)))
        assert expected <= answered
        # What takes more steps than a request may spend counts as a match.
        assert all(_is_too_long(parsed[name], low, high, ZoneInfo(zone)) for name in answered - expected)


WORDS = st.sampled_from(["lunch", "Lunch", "walk", "Té", ""])


@SLOW
@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 23), st.integers(1, 50), WORDS, st.booleans()),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 60),
    st.integers(1, 30),
    WORDS,
    st.booleans(),
    st.sampled_from(["", "range", "text", "both", "none"]),
)
def test_simple_events_are_found_as_radicale_finds_them(
    client: Client,
    drawn: list[tuple[int, int, int, str, bool]],
    day: int,
    days: int,
    word: str,
    negate: bool,
    shape: str,
) -> None:
    path = client.make()
    first = datetime.datetime(2026, 4, 1, tzinfo=datetime.UTC)
    made = {}
    for number, (after, hour, hours, summary, described) in enumerate(drawn):
        begin = first + datetime.timedelta(days=after, hours=hour)
        end = begin + datetime.timedelta(hours=hours)
        lines = [f"DTEND:{end:%Y%m%dT%H%M%SZ}", f"SUMMARY:{summary}", *(["LOCATION:x"] if described else [])]
        made[f"e{number}"] = event(f"e{number}", *lines, start=f"DTSTART:{begin:%Y%m%dT%H%M%SZ}")
    for name, content in made.items():
        client.put(f"{path}{name}.ics", content)
    low = first + datetime.timedelta(days=day)
    asked_range = span(f"{low:%Y%m%dT%H%M%SZ}", f"{low + datetime.timedelta(days=days):%Y%m%dT%H%M%SZ}")
    asked_text = prop("SUMMARY", text(word, negate_condition="yes" if negate else "no"))
    inner = {
        "": "",
        "range": asked_range,
        "text": asked_text,
        "both": asked_range + asked_text,
        "none": prop("LOCATION", "<c:is-not-defined/>"),
    }[shape]
    element = ET.fromstring(f"<c:filter{xml.NAMESPACES}>{below(inner)}</c:filter>")[0]
    expected = {
        name
        for name, content in made.items()
        if radicale.item.filter.comp_match(radicale.item.Item(collection_path="a/b", text=content), element)
    }
    assert found(client, path, below(inner)) == expected


# -- contacts ---------------------------------------------------------------------------------------


def contacts(client: Client, book: str, inner: str, *, test: str = "", limit: int = 0) -> dict[str, Row]:
    chosen = f' test="{test}"' if test else ""
    more = f"<card:limit><card:nresults>{limit}</card:nresults></card:limit>" if limit else ""
    body = (
        f"<d:prop><d:getetag/><card:address-data/></d:prop><card:filter{chosen}>{inner}</card:filter>{more}"
    )
    return client.report(book, "card:addressbook-query", body, depth="1").rows()


@pytest.mark.spec("RFC 6352 §8.6")
def test_contacts_are_found_by_what_they_hold(client: Client) -> None:
    book = client.make(Kind.ADDRESSBOOK)
    people = {
        "émile": card("1", "Émile Zola", "item1.TEL:+33 1", "EMAIL;TYPE=work:emile@example.org"),
        "jane": card("2", "Jane Doe", "NICKNAME:jd", "item2.TEL:+33 2", "NOTE:likes Zola"),
        "large": card("3", "Large", f"NICKNAME:{'x' * 5000}", "TEL:+44"),
    }
    for name, content in people.items():
        assert client.put(f"{book}{name}.vcf", content).status == 201

    def asked(inner: str, test: str = "") -> set[str]:
        rows = contacts(client, book, inner, test=test)
        for href, row in rows.items():
            name = unquote(href.removeprefix(book)).removesuffix(".vcf")
            assert row.text(A + "address-data") == people[name]
        return {unquote(href.removeprefix(book)).removesuffix(".vcf") for href in rows}

    assert asked("") == set(people)
    assert asked(asks("FN", text("zola"))) == {"émile"}
    assert asked(asks("FN", text("e\u0301MILE"))) == {"émile"}
    assert asked(asks("NOTE", text("zola"))) == {"jane"}
    assert asked(asks("FN", text("zola")) + asks("NOTE", text("zola"))) == {"émile", "jane"}
    assert asked(asks("FN", text("zola")) + asks("NOTE", text("zola")), "allof") == set()
    assert asked(asks("TEL", text("+33"))) == {"émile", "jane"}
    assert asked(asks("item1.TEL", text("+33"))) == {"émile"}
    assert asked(asks("NICKNAME", text("xxxx"))) == {"large"}
    assert asked(asks("NICKNAME", "<c:is-not-defined/>")) == {"émile"}
    assert asked(asks("EMAIL", param("TYPE", text("work", match_type="equals")))) == {"émile"}


@pytest.mark.spec("RFC 6352 §8.6.2")
def test_a_limit_across_pages_is_exact(client: Client) -> None:
    book = client.make(Kind.ADDRESSBOOK)
    count = queries._PAGE + 3
    limits = client.store.settings.dav

    def write(tx: Write) -> None:
        for number in range(count):
            content = card(f"u{number}", f"Name {number}").encode()
            prepared = objects.prepare(Kind.ADDRESSBOOK, content, datetime.UTC, limits)
            locked = collections.lock(tx, client.identity.account_id, Kind.ADDRESSBOOK, book.split("/")[3])
            staged = blobs.staged_bytes(content)
            objects.put(tx, locked, f"{number}.vcf", prepared, staged, href=book, limit=10_000, now=NOW)

    client.store.database.write(write)
    for limit in (1, queries._PAGE - 1, queries._PAGE, queries._PAGE + 1, count - 1, count, count + 1):
        rows = contacts(client, book, asks("FN", text("name")), limit=limit)
        cut = limit < count
        assert len(rows) == min(limit, count) + cut
        assert (book in rows) is cut
        if cut:
            assert rows[book].status == 507
            assert rows[book].error == D + "number-of-matches-within-limits"


# -- stored bytes -------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 5545 §3.1")
def test_a_fold_inside_a_character_is_answered_as_text(client: Client) -> None:
    path, book = client.make(), client.make(Kind.ADDRESSBOOK)
    folded = event("f", "SUMMARY:Caf@").encode().replace(b"@", b"\xc3\r\n \xa9")
    person = card("p", "Caf@").encode().replace(b"@", b"\xc3\r\n \xa9")
    assert client.put(path + "f.ics", folded).status == 201
    assert client.put(book + "p.vcf", person).status == 201
    assert client.send("GET", path + "f.ics").body == folded
    href = f"<d:href>{path}f.ics</d:href>"
    asked = "<d:prop><c:calendar-data/></d:prop>"
    for answer in (
        ask(
            client, path, below(prop("SUMMARY", text("Café", collation="i;octet"))), data="<c:calendar-data/>"
        ),
        client.report(path, "c:calendar-multiget", asked + href),
        client.sync(path, props="<c:calendar-data/>"),
    ):
        (row,) = answer.rows().values()
        value = row.text(C + "calendar-data")
        assert "SUMMARY:Café\r\n" in value.replace("\r\n ", "")
        assert value.encode().replace(b"\r\n ", b"") == folded.replace(b"\r\n ", b"")
    (row,) = contacts(client, book, asks("FN", text("café"))).values()
    assert "FN:Café\r\n" in row.text(A + "address-data").replace("\r\n ", "")


def test_content_that_cannot_be_read_stops_no_query(client: Client) -> None:
    path = client.make()
    client.fill(path, 3)
    client.put(path + "may.ics", event("may", "DURATION:PT1H"))
    assert found(client, path, MAY) == {"may"}
    assert found(client, path, below(prop("SUMMARY", "<c:is-not-defined/>"))) == {"may"}
    assert (
        client.report(path, "c:free-busy-query", span("20260501T000000Z", "20260601T000000Z")).status == 200
    )


@pytest.mark.parametrize(
    ("inner", "precondition"),
    [
        (comp("", "VEVENT"), "valid-filter"),
        (below(span("x")), "valid-filter"),
        (below(comp("", "VTODO")), "valid-filter"),
        (below(prop("SUMMARY", span("20260101T000000Z"))), "valid-filter"),
        (below(prop("SUMMARY", text("a", collation="i;x"))), "supported-collation"),
    ],
)
def test_what_is_no_query_is_refused_with_its_precondition(
    client: Client, inner: str, precondition: str
) -> None:
    answer = ask(client, client.make(), inner)
    assert (answer.status, answer.precondition) == (403, C + precondition)
