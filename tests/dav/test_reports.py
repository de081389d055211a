"""Reports: multigets, the answers of queries, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ksync_server.dav import collections, queries
from ksync_server.dav.places import Kind
from ksync_server.wire import xml
from tests.dav.harness import Client, Row, calendar, card, component, event

D = "{DAV:}"
C = "{urn:ietf:params:xml:ns:caldav}"
A = "{urn:ietf:params:xml:ns:carddav}"
DATA = "<d:prop><d:getetag/><c:calendar-data/></d:prop>"
CARD = "<d:prop><d:getetag/><card:address-data/></d:prop>"
WITHIN = D + "number-of-matches-within-limits"


def hrefs(*paths: str) -> str:
    return "".join(f"<d:href>{xml.escape(path)}</d:href>" for path in paths)


def multiget(client: Client, path: str, *paths: str, prop: str = DATA, **headers: str) -> dict[str, Row]:
    return client.report(path, "c:calendar-multiget", prop + hrefs(*paths), **headers).rows()


def query(client: Client, path: str, filter_: str = "", prop: str = DATA, more: str = "") -> dict[str, Row]:
    inner = f'<c:filter><c:comp-filter name="VCALENDAR">{filter_}</c:comp-filter></c:filter>'
    return client.report(path, "c:calendar-query", prop + inner + more, depth="1").rows()


@pytest.mark.spec("RFC 4791 §7.9")
@pytest.mark.parametrize("depth", [None, "0", "1", "infinity"])
def test_a_multiget_answers_each_href_once_whatever_the_depth(client: Client, depth: str | None) -> None:
    path, other = client.make(), client.make()
    etag = client.put(path + "a.ics", event("a", "SUMMARY:é <&> ]]>")).etag
    client.put(other + "b.ics", event("b"))
    asked = [
        path + "a.ics",
        path + "a.ics",
        path + "none.ics",
        other + "b.ics",
        path,
        "/nowhere",
        path + "../a.ics",
        "http://example.com" + path + "a.ics",
        "%zz",
        path + "<&>",
    ]
    headers = {} if depth is None else {"depth": depth}
    rows = multiget(client, path, *asked, **headers)
    assert set(rows) == set(asked)
    assert {href for href, row in rows.items() if row.status == 404} == set(asked) - {path + "a.ics"}
    row = rows[path + "a.ics"]
    assert row.text(D + "getetag") == etag
    assert row.text(C + "calendar-data") == event("a", "SUMMARY:é <&> ]]>")


def test_absolute_and_lower_case_hrefs_are_the_same_object(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", event("a"))
    lower = path.replace(client.identity.sync_id, client.identity.sync_id.lower())
    for href in ("https://sync.example.org" + path + "a.ics", lower + "a.ics"):
        assert set(multiget(client, path, href)) == {path + "a.ics"}
    assert set(multiget(client, path, path + "a.ics", lower + "a.ics")) == {path + "a.ics"}


@pytest.mark.parametrize("count", [1, 9, 10, 11, 100, 101, 250])
def test_a_multiget_of_many_is_whole(client: Client, count: int) -> None:
    path = client.make()
    client.fill(path, 250)
    asked = [f"{path}e{number:06}.ics" for number in range(count)]
    rows = multiget(client, path, *reversed(asked))
    assert list(rows) == asked[::-1]
    assert all(row.text(C + "calendar-data") == "x\r\n" for row in rows.values())


def test_large_and_small_contents_come_in_one_answer(client: Client) -> None:
    path = client.make()
    texts = {
        f"{path}{size}.ics": event(f"u{size}", "DESCRIPTION:" + "x" * size)
        for size in (1, 20_000, 200_000, 900_000)
    }
    for href, text in texts.items():
        assert client.put(href, text).status == 201
    answer = client.report(path, "c:calendar-multiget", DATA + hrefs(*texts))
    assert answer.pieces > 1
    assert {href: row.text(C + "calendar-data") for href, row in answer.rows().items()} == texts
    found = {href: row.text(C + "calendar-data") for href, row in query(client, path).items()}
    assert found == texts


def test_too_many_hrefs_are_refused(make_client: Callable[..., Client]) -> None:
    client = make_client()
    path = client.make()
    most = client.store.settings.xml.max_hrefs
    inner = DATA + hrefs(*(f"{path}{number}" for number in range(most + 1)))
    answer = client.report(path, "c:calendar-multiget", inner)
    assert (answer.status, answer.precondition) == (403, WITHIN)


@pytest.mark.spec("RFC 6352 §8.7")
def test_an_address_book_multiget(client: Client) -> None:
    book = client.make(Kind.ADDRESSBOOK)
    client.put(book + "a.vcf", card("a", "Zoë", "EMAIL;TYPE=home:a@example.org", "item1.TEL:1"))
    inner = CARD + hrefs(book + "a.vcf", book + "b.vcf")
    rows = client.report(book, "card:addressbook-multiget", inner).rows()
    assert rows[book + "b.vcf"].status == 404
    assert "FN:Zoë" in rows[book + "a.vcf"].text(A + "address-data")
    names = '<card:prop name="email"/><card:prop name="TEL" novalue="yes"/>'
    part = f"<d:prop><card:address-data>{names}</card:address-data></d:prop>"
    rows = client.report(book, "card:addressbook-multiget", part + hrefs(book + "a.vcf")).rows()
    text = rows[book + "a.vcf"].text(A + "address-data")
    assert text.splitlines() == [
        "BEGIN:VCARD", "VERSION:3.0", "EMAIL;TYPE=home:a@example.org", "item1.TEL:", "END:VCARD"
    ]  # fmt: skip


# -- content as asked ---------------------------------------------------------------------------------

WEEKLY = event("w", "DURATION:PT1H", "RRULE:FREQ=WEEKLY", "SUMMARY:s", start="DTSTART:20260105T090000Z")


@pytest.mark.spec("RFC 4791 §9.6.1")
def test_part_of_an_object(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", WEEKLY)
    inner = '<c:comp name="VEVENT"><c:prop name="summary"/></c:comp>'
    comp = f'<c:comp name="VCALENDAR"><c:prop name="VERSION"/>{inner}</c:comp>'
    prop = f"<d:prop><c:calendar-data>{comp}</c:calendar-data></d:prop>"
    text = multiget(client, path, path + "a.ics", prop=prop)[path + "a.ics"].text(C + "calendar-data")
    assert (
        text
        == "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nBEGIN:VEVENT\r\nSUMMARY:s\r\nEND:VEVENT\r\nEND:VCALENDAR\r\n"
    )


@pytest.mark.spec("RFC 4791 §9.6.5")
def test_expand_in_every_report_that_answers_content(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", WEEKLY)
    inner = '<c:calendar-data><c:expand start="20260105T000000Z" end="20260120T000000Z"/></c:calendar-data>'
    prop = f"<d:prop>{inner}</d:prop>"
    for rows in (
        multiget(client, path, path + "a.ics", prop=prop),
        query(client, path, prop=prop),
        client.sync(path, props=inner).rows(),
    ):
        text = rows[path + "a.ics"].text(C + "calendar-data")
        starts = [line for line in text.splitlines() if line.startswith("DTSTART")]
        assert starts == [f"DTSTART:202601{day}T090000Z" for day in ("05", "12", "19")]
        assert "RRULE" not in text


def test_an_object_that_expands_to_too_much_costs_itself_only(make_client: Callable[..., Client]) -> None:
    client = make_client(max_instances=50)
    path = client.make()
    for number in range(7):
        client.put(f"{path}bad{number}.ics", event(f"bad{number}", "RRULE:FREQ=SECONDLY"))
    client.put(path + "good.ics", WEEKLY)
    inner = '<c:calendar-data><c:expand start="20260501T000000Z" end="20260601T000000Z"/></c:calendar-data>'
    rows = query(client, path, prop=f"<d:prop><d:getetag/>{inner}</d:prop>")
    assert rows[path + "good.ics"].text(C + "calendar-data").count("BEGIN:VEVENT") == 4
    assert all(rows[f"{path}bad{n}.ics"].refused == {C + "calendar-data": 507} for n in range(7))
    assert all(D + "getetag" in row.found for row in rows.values())


def test_an_answer_that_grows_too_large_says_so(make_client: Callable[..., Client]) -> None:
    client = make_client(max_answer_bytes=len(event("a")))
    path = client.make()
    for name in "ab":
        client.put(f"{path}{name}.ics", event(name))
    inner = '<c:calendar-data><c:expand start="20260501T000000Z" end="20260601T000000Z"/></c:calendar-data>'
    rows = query(client, path, prop=f"<d:prop>{inner}</d:prop>")
    assert [row.refused for row in rows.values()] == [{}, {C + "calendar-data": 507}]


def test_a_query_reads_large_objects_a_few_at_a_time(
    make_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of 200 objects of the largest size would be gigabytes in memory."""
    monkeypatch.setattr(queries, "_READ_AT_ONCE", 50_000)
    at_once: list[int] = []
    portions = queries._portions

    def counted(*given: Any) -> Iterator[list[Any]]:
        for some in portions(*given):
            at_once.append(len(some))
            yield some

    monkeypatch.setattr(queries, "_portions", counted)
    client = make_client()
    path, book = client.make(), client.make(Kind.ADDRESSBOOK)
    for number in range(6):
        client.put(f"{path}{number}.ics", event(f"e{number}", "DESCRIPTION:" + "x" * 20_000))
        large = card(f"c{number}", "x", "NOTE:" + "x" * 20_000)
        assert client.put(f"{book}{number}.vcf", large).status == 201
    rows = query(client, path, prop="<d:prop><c:calendar-data/></d:prop>")
    assert len(rows) == 6
    assert all("x" * 20_000 in row.text(C + "calendar-data").replace("\r\n ", "") for row in rows.values())
    answer = client.report(
        book, "card:addressbook-query", "<d:prop><card:address-data/></d:prop><card:filter/>"
    )
    assert len(answer.rows()) == 6
    assert at_once == [2] * 6


def test_one_object_cannot_make_an_answer_too_large(make_client: Callable[..., Client]) -> None:
    """CVE-2025-59045: a large text, repeated by a rule, in as many instances as the client asks for."""
    client = make_client(max_answer_bytes=100_000)
    path = client.make()
    client.put(path + "large.ics", event("large", "RRULE:FREQ=HOURLY", "DESCRIPTION:" + "x" * 10_000))
    client.put(path + "small.ics", event("small"))
    inner = '<c:calendar-data><c:expand start="20260501T000000Z" end="20260601T000000Z"/></c:calendar-data>'
    rows = query(client, path, prop=f"<d:prop>{inner}</d:prop>")
    assert rows[path + "large.ics"].refused == {C + "calendar-data": 507}
    assert rows[path + "small.ics"].text(C + "calendar-data").count("BEGIN:VEVENT") == 1


@pytest.mark.parametrize(
    ("attributes", "precondition"),
    [
        ('content-type="application/json"', "supported-calendar-data"),
        ('version="3.0"', "supported-calendar-data"),
    ],
)
def test_other_forms_of_calendar_data_are_refused(client: Client, attributes: str, precondition: str) -> None:
    path = client.make()
    client.put(path + "a.ics", event("a"))
    prop = f"<d:prop><c:calendar-data {attributes}/></d:prop>"
    for name, rest in (
        ("c:calendar-multiget", hrefs(path + "a.ics")),
        ("c:calendar-query", '<c:filter><c:comp-filter name="VCALENDAR"/></c:filter>'),
        ("d:sync-collection", "<d:sync-token/><d:sync-level>1</d:sync-level>"),
    ):
        answer = client.report(path, name, prop + rest)
        assert (answer.status, answer.precondition) == (403, C + precondition)
    same = '<d:prop><c:calendar-data content-type="text/calendar" version="2.0"/></d:prop>'
    assert multiget(client, path, path + "a.ics", prop=same)[path + "a.ics"].refused == {}


@pytest.mark.spec("RFC 6352 §8.6")
def test_a_version_that_would_need_a_translation_is_refused(client: Client) -> None:
    book = client.make(Kind.ADDRESSBOOK)
    prop = '<d:prop><card:address-data content-type="text/vcard" version="4.0"/></d:prop>'
    answer = client.report(book, "card:addressbook-multiget", prop)
    assert (answer.status, answer.precondition) == (403, A + "supported-address-data")


@pytest.mark.parametrize(
    "inner",
    [
        '<c:expand start="20260501T000000Z"/>',
        '<c:expand start="x" end="y"/>',
        '<c:expand start="20260501T000000Z" end="20260401T000000Z"/>',
        '<c:expand start="20260501T000000Z" end="20260601T000000Z"/>'
        '<c:limit-recurrence-set start="20260501T000000Z" end="20260601T000000Z"/>',
        "<c:comp/>",
        '<c:comp name="VCALENDAR"><c:prop/></c:comp>',
        '<c:comp name="X">' * 20 + "</c:comp>" * 20,
    ],
)
def test_malformed_calendar_data_is_refused(client: Client, inner: str) -> None:
    prop = f"<d:prop><c:calendar-data>{inner}</c:calendar-data></d:prop>"
    assert client.report(client.make(), "c:calendar-multiget", prop).status == 400


# -- queries ------------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 4791 §7.8")
def test_a_query_answers_what_matches(client: Client) -> None:
    path = client.make()
    client.put(path + "may.ics", event("may"))
    client.put(path + "june.ics", event("june", start="DTSTART:20260601T100000Z"))
    client.put(path + "todo.ics", calendar(component("VTODO", "todo")))
    may = '<c:time-range start="20260501T000000Z" end="20260531T000000Z"/>'
    filter_ = f'<c:comp-filter name="VEVENT">{may}</c:comp-filter>'
    rows = query(client, path, filter_)
    assert set(rows) == {path + "may.ics"}
    assert rows[path + "may.ics"].text(C + "calendar-data") == event("may")
    assert set(query(client, path, '<c:comp-filter name="VTODO"/>')) == {path + "todo.ics"}
    assert len(query(client, path)) == 3
    for prop, names in (("<d:allprop/>", {D + "getetag"}), ("<d:propname/>", {D + "getetag"}), ("", set())):
        found = query(client, path, filter_, prop)[path + "may.ics"].found
        assert names <= set(found)


ZURICH = calendar(
    "BEGIN:VTIMEZONE\r\nTZID:Zone\r\nBEGIN:STANDARD\r\nDTSTART:19700101T000000\r\nTZOFFSETFROM:+1200\r\n"
    "TZOFFSETTO:+1200\r\nEND:STANDARD\r\nEND:VTIMEZONE\r\n"
)


@pytest.mark.spec("RFC 4791 §9.8")
def test_floating_times_follow_the_querys_zone_then_the_calendars_then_utc(client: Client) -> None:
    element = (
        f"<x:calendar-timezone xmlns:x='{C[1:-1]}'>{ZURICH.replace(chr(13), '&#13;')}</x:calendar-timezone>"
    )
    plain, zoned = client.make(), client.make(**{collections.TIMEZONE: element})
    span = '<c:time-range start="20260430T213000Z" end="20260430T230000Z"/>'
    filter_ = f'<c:comp-filter name="VEVENT">{span}</c:comp-filter>'
    for path in (plain, zoned):
        client.put(path + "a.ics", event("a", start="DTSTART:20260501T100000"))
    assert set(query(client, plain, filter_)) == set()
    assert set(query(client, zoned, filter_)) == {zoned + "a.ics"}
    brought = f"<c:timezone>{ZURICH.replace(chr(13), '&#13;')}</c:timezone>"
    assert set(query(client, plain, filter_, more=brought)) == {plain + "a.ics"}
    named = "<c:timezone-id>Etc/GMT-12</c:timezone-id>"
    assert set(query(client, plain, filter_, more=named)) == {plain + "a.ics"}
    inner = '<c:filter><c:comp-filter name="VCALENDAR"/></c:filter>'
    for bad, precondition in (
        ("<c:timezone>x</c:timezone>", "valid-calendar-data"),
        ("<c:timezone-id>Nowhere/Never</c:timezone-id>", "valid-timezone"),
    ):
        answer = client.report(plain, "c:calendar-query", DATA + inner + bad)
        assert (answer.status, answer.precondition) == (403, C + precondition)


@pytest.mark.spec("RFC 6352 §8.6.2")
def test_a_limited_card_query_says_that_it_was_cut(client: Client) -> None:
    book = client.make(Kind.ADDRESSBOOK)
    for number in range(5):
        client.put(f"{book}{number}.vcf", card(f"u{number}", f"Name {number}"))

    def asked(limit: str) -> str:
        return f"{CARD}<card:filter/><card:limit><card:nresults>{limit}</card:nresults></card:limit>"

    rows = client.report(book, "card:addressbook-query", asked("2")).rows()
    assert rows[book].status == 507
    assert rows[book].error == WITHIN
    assert len(rows) == 3
    assert book not in client.report(book, "card:addressbook-query", asked("5")).rows()
    for bad in ("0", "-1", "x", ""):
        assert client.report(book, "card:addressbook-query", asked(bad)).status == 400


@pytest.mark.spec("RFC 4791 §7.10")
def test_free_busy(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", event("a", "DURATION:PT1H"))
    span = '<c:time-range start="20260501T000000Z" end="20260502T000000Z"/>'
    answer = client.report(path, "c:free-busy-query", span)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/calendar; charset=utf-8"
    assert "FREEBUSY:20260501T100000Z/20260501T110000Z" in answer.text.replace("/PT1H", "/20260501T110000Z")
    for bad in ("", '<c:time-range start="20260501T000000Z"/>', '<c:time-range start="x" end="y"/>'):
        assert client.report(path, "c:free-busy-query", bad).status == 400


# -- refused --------------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 3253 §3.6")
def test_a_report_where_none_applies_is_refused_with_its_precondition(client: Client) -> None:
    path, book = client.make(), client.make(Kind.ADDRESSBOOK)
    client.put(path + "a.ics", event("a"))
    inner = DATA + '<c:filter><c:comp-filter name="VCALENDAR"/></c:filter>'
    for place, name in (
        (path, "d:expand-property"),
        (path, "card:addressbook-query"),
        (book, "c:calendar-query"),
        (book, "c:free-busy-query"),
        (client.home, "c:calendar-query"),
        (client.principal, "d:principal-property-search"),
        ("/", "d:principal-search-property-set"),
        (path + "a.ics", "c:calendar-query"),
    ):
        answer = client.report(place, name, inner)
        assert (answer.status, answer.precondition) == (403, D + "supported-report")
    assert client.report(path + "none.ics", "c:calendar-query", inner).status == 404
    assert client.report(client.home + "none/", "c:calendar-query", inner).status == 404
    assert client.send("REPORT", path).status == 400


@pytest.mark.parametrize(
    ("name", "inner", "precondition"),
    [
        ("c:calendar-query", DATA, C + "valid-filter"),
        ("c:calendar-query", DATA + "<c:filter/>", C + "valid-filter"),
    ],
)
def test_queries_without_a_filter_are_refused(
    client: Client, name: str, inner: str, precondition: str
) -> None:
    answer = client.report(client.make(), name, inner)
    assert (answer.status, answer.precondition) == (403, precondition)
    answer = client.report(client.make(Kind.ADDRESSBOOK), "card:addressbook-query", CARD)
    assert (answer.status, answer.precondition) == (403, A + "supported-filter")
