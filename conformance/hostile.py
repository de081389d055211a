"""Input meant to hurt: each is answered in under 500 ms with 4xx or the right 2xx, and nothing else suffers."""

from __future__ import annotations

import time

import pytest

from conformance.client import NAMESPACES, Answer
from conformance.conftest import Collection
from conformance.rfc4791 import ZURICH, between, component, event, ics, query

LIMIT_S = 0.5
XML = {"Content-Type": "application/xml; charset=utf-8", "Depth": "0"}
WINDOW = ("20260501T000000Z", "20260601T000000Z")


def fine(answer: Answer, *statuses: int) -> None:
    """In time, and one of the statuses, or any 4xx."""
    assert answer.status in statuses or 400 <= answer.status < 500, (answer.status, answer.body[:300])
    assert answer.seconds < LIMIT_S, f"{answer.seconds:.2f} s"


def assert_usable(calendar: Collection) -> None:
    """The collection lists, syncs, answers queries; its answers are well-formed."""
    calendar.members()
    assert calendar.sync().rows is not None
    data = "<D:getetag/><C:calendar-data/>"
    assert query(calendar, between("VEVENT", *WINDOW), data).rows is not None
    assert calendar.client.request("GET", calendar / "good.ics").status == 200


@pytest.fixture
def victim(calendar: Collection) -> Collection:
    assert calendar.put("good.ics", ics(event("good"))).status == 201
    return calendar


def rules(*lines: str, start: str = "DTSTART:20260101T000000Z") -> str:
    return ics(event("hostile", start, "DURATION:PT1S", *lines))


RECURRENCES = {
    "secondly": rules("RRULE:FREQ=SECONDLY"),
    "secondly from year 1": rules("RRULE:FREQ=SECONDLY", start="DTSTART:00010101T000000Z"),
    "secondly with a large count": rules("RRULE:FREQ=SECONDLY;COUNT=1000000000"),
    "secondly until 2100": rules("RRULE:FREQ=SECONDLY;UNTIL=21000101T000000Z"),
    "never matches": rules("RRULE:FREQ=SECONDLY;BYMONTH=2;BYMONTHDAY=30"),
    "30 February": rules("RRULE:FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30"),
    "excluded by EXRULE": rules("RRULE:FREQ=MINUTELY", "EXRULE:FREQ=MINUTELY"),
    "excluded by EXRULE, secondly": rules("RRULE:FREQ=SECONDLY", "EXRULE:FREQ=SECONDLY"),
    "two rules": rules("RRULE:FREQ=YEARLY;COUNT=2", "RRULE:FREQ=SECONDLY;COUNT=100000000"),
    "interval of 0": rules("RRULE:FREQ=DAILY;INTERVAL=0"),
    "interval of many digits": rules("RRULE:FREQ=DAILY;INTERVAL=" + "9" * 400),
    "every part": rules(
        "RRULE:FREQ=YEARLY;BYMONTH=1,2,3,4,5,6,7,8,9,10,11,12;BYDAY=MO,TU,WE,TH,FR,SA,SU;BYHOUR="
        + ",".join(map(str, range(24)))
        + ";BYMINUTE="
        + ",".join(map(str, range(60)))
        + ";BYSECOND="
        + ",".join(map(str, range(60)))
    ),
    "set position": rules(
        "RRULE:FREQ=MONTHLY;BYDAY=MO,TU,WE,TH,FR;BYSETPOS=" + ",".join(map(str, range(1, 367)))
    ),
    "100,000 RDATE": rules("RDATE:" + ",".join(["20260101T000000Z"] * 100_000)),
    "100,000 EXDATE": rules("RRULE:FREQ=DAILY", "EXDATE:" + ",".join(["20260101T000000Z"] * 100_000)),
    "10,000 overrides": ics(
        event("hostile", "DTSTART:20260101T000000Z", "RRULE:FREQ=DAILY"),
        *(
            event(
                "hostile",
                f"RECURRENCE-ID:2026{1 + n % 12:02}{1 + n % 28:02}T{n % 24:02}{n % 60:02}00Z",
                "DTSTART:20260101T000000Z",
            )
            for n in range(10_000)
        ),
    ),
    "duration of ages": ics(
        event("hostile", "DTSTART:20260101T000000Z", "DURATION:P99999999999W", "RRULE:FREQ=DAILY")
    ),
    "year 9999": ics(event("hostile", "DTSTART:99991231T235959Z", "DURATION:P2D", "RRULE:FREQ=DAILY")),
    "leap second": ics(event("hostile", "DTSTART:20161231T235960Z")),
    "rule in the zone": ics(
        event("hostile", "DTSTART;TZID=Europe/Zurich:20260501T100000"),
        timezone=ZURICH.replace("FREQ=YEARLY;BYMONTH=3;BYDAY=-1SU", "FREQ=SECONDLY"),
    ),
}


@pytest.mark.parametrize("case", RECURRENCES)
def test_recurrences_that_never_end(victim: Collection, case: str) -> None:
    fine(victim.put("hostile.ics", RECURRENCES[case]), 201, 204)
    start, end = WINDOW
    fine(query(victim, between("VEVENT", start, end)), 207)
    expand = f'<C:calendar-data><C:expand start="{start}" end="{end}"/></C:calendar-data>'
    fine(query(victim, between("VEVENT", start, end), expand), 207, 507)
    fine(
        victim.client.report(
            victim.path, "C:free-busy-query", f'<C:time-range start="{start}" end="{end}"/>'
        ),
        200,
    )
    far = between("VEVENT", "80000101T000000Z", "80000102T000000Z")
    fine(query(victim, far), 207)
    assert_usable(victim)


OBJECTS = {
    "11 MB": ics(event("hostile", "DTSTART:20260501T100000Z", "DESCRIPTION:" + "x" * 11_000_000)),
    "5 MB in one line": ics(event("hostile", "DTSTART:20260501T100000Z", "DESCRIPTION:" + "x" * 5_000_000)),
    "70,000 properties": ics(event("hostile", "DTSTART:20260501T100000Z", *["COMMENT:x"] * 70_000)),
    "50,000 parameters": ics(
        event("hostile", "DTSTART:20260501T100000Z", "SUMMARY" + ";X-P=1" * 50_000 + ":x")
    ),
    "1,000 time zones": ics(
        event("hostile", "DTSTART:20260501T100000Z"),
        timezone="".join(ZURICH.replace("Europe/Zurich", f"Zone/{n}") for n in range(1000)),
    ),
    "20,000 attendees": ics(
        event(
            "hostile",
            "DTSTART:20260501T100000Z",
            *(f"ATTENDEE:mailto:a{n}@example.org" for n in range(20_000)),
        )
    ),
    "deep nesting": ics(event("hostile", "DTSTART:20260501T100000Z", *["BEGIN:X"] * 5000, *["END:X"] * 5000)),
    "100,000 folds": ics(event("hostile", "DTSTART:20260501T100000Z", "DESCRIPTION:" + "\r\n x" * 100_000)),
    "U+FFFE": ics(event("hostile", "DTSTART:20260501T100000Z", "SUMMARY:a\ufffeb")),
    "U+0001": ics(event("hostile", "DTSTART:20260501T100000Z", "SUMMARY:a\x01b")),
    "NUL": ics(event("hostile", "DTSTART:20260501T100000Z", "SUMMARY:a\x00b")),
    "CDATA end": ics(event("hostile", "DTSTART:20260501T100000Z", "SUMMARY:]]> <x/> &amp;")),
    "a newline in the UID": ics(component("VEVENT", "a\\nb\r\n c", "DTSTART:20260501T100000Z")),
    "no UID": ics("BEGIN:VEVENT\r\nDTSTAMP:20260101T000000Z\r\nDTSTART:20260501T100000Z\r\nEND:VEVENT\r\n"),
    "long UID": ics(component("VEVENT", "u" * 100_000, "DTSTART:20260501T100000Z")),
    "slash UID": ics(component("VEVENT", "../../../etc/passwd", "DTSTART:20260501T100000Z")),
    "unknown zone": ics(event("hostile", "DTSTART;TZID=Nowhere/Never:20260501T100000")),
    "zone that is a path": ics(event("hostile", "DTSTART;TZID=../../../../etc/passwd:20260501T100000")),
}


@pytest.mark.parametrize("case", OBJECTS)
def test_objects_that_are_too_much(victim: Collection, case: str) -> None:
    fine(victim.put("hostile.ics", OBJECTS[case]), 201, 204)
    assert_usable(victim)


def test_bytes_that_are_not_utf_8(victim: Collection) -> None:
    content = (
        ics(event("hostile", "DTSTART:20260501T100000Z", "SUMMARY:@@"))
        .encode()
        .replace(b"@@", b"\xff\xfe\xe9")
    )
    fine(victim.put("hostile.ics", content), 201)
    assert_usable(victim)


def bomb() -> str:
    lines = ['<!ENTITY a0 "ha">'] + [f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10)]
    return f'<?xml version="1.0"?><!DOCTYPE D:propfind [{"".join(lines)}]><D:propfind xmlns:D="DAV:"><D:prop>&a9;</D:prop></D:propfind>'


BODIES = {
    "billion laughs": bomb(),
    "external entity": '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
    '<D:propfind xmlns:D="DAV:"><D:prop><x>&e;</x></D:prop></D:propfind>',
    "external DTD": '<?xml version="1.0"?><!DOCTYPE x SYSTEM "http://127.0.0.1:9/x.dtd"><D:propfind xmlns:D="DAV:"><D:allprop/></D:propfind>',
    "deep": "<a>" * 100_000,
    "deep and whole": '<D:propfind xmlns:D="DAV:"><D:prop>'
    + "<a>" * 50_000
    + "</a>" * 50_000
    + "</D:prop></D:propfind>",
    "100,000 properties": f"<D:propfind {NAMESPACES}><D:prop>"
    + "".join(f"<E:p{n}/>" for n in range(100_000))
    + "</D:prop></D:propfind>",
    "20 MB of text": f"<D:propfind {NAMESPACES}><D:prop><E:x>"
    + "x" * 20_000_000
    + "</E:x></D:prop></D:propfind>",
    "many attributes": "<a " + " ".join(f'b{n}="1"' for n in range(50_000)) + "/>",
    "many namespaces": "<a " + " ".join(f'xmlns:b{n}="urn:{n}"' for n in range(50_000)) + "/>",
    "no child": '<D:propfind xmlns:D="DAV:"/>',
    "UTF-16 cut": "\ufeff<",
    "UTF-7": '<?xml version="1.0" encoding="utf-7"?><D:propfind xmlns:D="DAV:"><D:allprop/></D:propfind>',
    "empty namespace": '<D:propfind xmlns:D="DAV:"><D:prop><x xmlns=""/></D:prop></D:propfind>',
    "processing instruction": '<?xml version="1.0"?><?x y?><D:propfind xmlns:D="DAV:"><D:allprop/></D:propfind>',
}


@pytest.mark.parametrize("case", BODIES)
@pytest.mark.parametrize("method", ["PROPFIND", "PROPPATCH", "REPORT", "MKCALENDAR"])
def test_xml_that_is_meant_to_hurt(victim: Collection, case: str, method: str) -> None:
    path = victim.path if method != "MKCALENDAR" else victim.path.rstrip("/") + "-new/"
    answer = victim.client.request(method, path, BODIES[case], XML)
    victim.client.close()
    fine(answer, 207)
    assert b"root:" not in answer.body
    assert_usable(victim)


@pytest.mark.parametrize("case", [case for case in BODIES if case != "100,000 properties"])
@pytest.mark.parametrize("method", ["PROPFIND", "PROPPATCH", "LOCK"])
def test_xml_that_is_meant_to_hurt_a_drive(folder: Collection, case: str, method: str) -> None:
    answer = folder.client.request(method, folder.path, BODIES[case], {**XML, "Depth": "0"})
    folder.client.close()
    fine(answer, 207)
    assert b"root:" not in answer.body
    assert folder.members() == set()


def test_a_multiget_of_100_000_names(victim: Collection) -> None:
    hrefs = "".join(f"<D:href>{victim.path}{n}.ics</D:href>" for n in range(100_000))
    answer = victim.client.report(victim.path, "C:calendar-multiget", f"<D:prop><D:getetag/></D:prop>{hrefs}")
    fine(answer)
    assert_usable(victim)


def test_a_displayname_of_2_mb(victim: Collection) -> None:
    fine(victim.client.proppatch(victim.path, f"<D:displayname>{'x' * 2_000_000}</D:displayname>"), 207)
    (row,) = victim.client.propfind(victim.path, "D:displayname")
    assert len(row.text("{DAV:}displayname")) < 100_000


@pytest.mark.parametrize(
    "ranges", [("00010101T000000Z", "99991231T235959Z"), ("19000101T000000Z", "21000101T000000Z")]
)
def test_an_expand_over_all_ages(victim: Collection, ranges: tuple[str, str]) -> None:
    victim.put(
        "daily.ics", ics(event("daily", "DTSTART:20260101T000000Z", "DURATION:PT1H", "RRULE:FREQ=DAILY"))
    )
    start, end = ranges
    expand = f'<C:calendar-data><C:expand start="{start}" end="{end}"/></C:calendar-data>'
    started = time.monotonic()
    answer = query(victim, between("VEVENT", start, end), expand)
    assert answer.status in (207, 403, 507)
    assert time.monotonic() - started < 10 * LIMIT_S
    assert_usable(victim)


def test_filters_of_10_000_conditions(victim: Collection) -> None:
    conditions = '<C:prop-filter name="SUMMARY"><C:text-match>x</C:text-match></C:prop-filter>' * 10_000
    fine(query(victim, f'<C:comp-filter name="VEVENT">{conditions}</C:comp-filter>'), 207)
    assert_usable(victim)


CARDS = {
    "11 MB": "NOTE:" + "x" * 11_000_000,
    "70,000 properties": "\r\n".join(["NOTE:x"] * 70_000),
    "U+FFFE": "NOTE:a\ufffeb",
    "NUL": "NOTE:a\x00b",
    "nested": "\r\n".join(["BEGIN:VCARD"] * 2000),
    "long name": "X-" + "N" * 500_000 + ":x",
}


@pytest.mark.parametrize("case", CARDS)
def test_cards_that_are_too_much(book: Collection, case: str) -> None:
    text = f"BEGIN:VCARD\r\nVERSION:3.0\r\nUID:hostile\r\nFN:x\r\nN:x;;;;\r\n{CARDS[case]}\r\nEND:VCARD\r\n"
    fine(book.put("hostile.vcf", text), 201)
    book.members()
    inner = "<D:prop><D:getetag/><A:address-data/></D:prop><A:filter/>"
    assert book.client.report(book.path, "A:addressbook-query", inner).rows is not None
