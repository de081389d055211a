"""What a strict reader of RFC 4791 (CalDAV) expects, discovery and every report included."""

from __future__ import annotations

import uuid
from urllib.parse import unquote

import pytest

from conformance.client import CALDAV, CARDDAV, DAV, NAMESPACES, Answer, Client
from conformance.client import escaped as esc
from conformance.conftest import Collection, home, make_calendar
from conformance.target import Target

spec = pytest.mark.spec
ZURICH = (
    "BEGIN:VTIMEZONE\r\nTZID:Europe/Zurich\r\nBEGIN:DAYLIGHT\r\nDTSTART:19810329T020000\r\n"
    "RRULE:FREQ=YEARLY;BYMONTH=3;BYDAY=-1SU\r\nTZOFFSETFROM:+0100\r\nTZOFFSETTO:+0200\r\nEND:DAYLIGHT\r\n"
    "BEGIN:STANDARD\r\nDTSTART:19961027T030000\r\nRRULE:FREQ=YEARLY;BYMONTH=10;BYDAY=-1SU\r\n"
    "TZOFFSETFROM:+0200\r\nTZOFFSETTO:+0100\r\nEND:STANDARD\r\nEND:VTIMEZONE\r\n"
)


def ics(*components: str, timezone: str = "") -> str:
    head = "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//example.org//conformance//EN\r\n"
    return head + timezone + "".join(components) + "END:VCALENDAR\r\n"


def component(kind: str, uid: str, *lines: str) -> str:
    return "".join(
        f"{line}\r\n"
        for line in (f"BEGIN:{kind}", f"UID:{uid}", "DTSTAMP:20260101T000000Z", *lines, f"END:{kind}")
    )


def event(uid: str, *lines: str) -> str:
    return component("VEVENT", uid, *(lines or ("DTSTART:20260501T100000Z", "DTEND:20260501T110000Z")))


def put(calendar: Collection, name: str, content: str, **headers: str) -> Answer:
    answer = calendar.put(f"{name}.ics", content, **headers)
    assert answer.status in (201, 204), (name, answer.status, answer.body[:500])
    return answer


def query(calendar: Collection, filter_: str, props: str = "<D:getetag/>") -> Answer:
    wrapped = f'<C:comp-filter name="VCALENDAR">{filter_}</C:comp-filter>'
    return calendar.client.report(
        calendar.path, "C:calendar-query", f"<D:prop>{props}</D:prop><C:filter>{wrapped}</C:filter>"
    )


def found(answer: Answer) -> set[str]:
    return {unquote(row.path).rpartition("/")[2].removesuffix(".ics") for row in answer.rows}


def between(kind: str, start: str, end: str) -> str:
    return f'<C:comp-filter name="{kind}"><C:time-range start="{start}" end="{end}"/></C:comp-filter>'


# Discovery


@spec("RFC 4791 §5.1")
def test_options_says_calendar_access(calendar: Collection) -> None:
    put(calendar, "one", ics(event("one")))
    for path in ("/", home(calendar.client, "calendar"), calendar.path, calendar / "one.ics"):
        answer = calendar.client.request("OPTIONS", path)
        assert answer.status in (200, 204)
        classes = {part.strip() for part in answer.header("DAV").split(",")}
        assert {"1", "3", "calendar-access"} <= classes
        assert "REPORT" in answer.header("Allow")


@spec("RFC 6764 §5")
@pytest.mark.parametrize("path", ["/.well-known/caldav", "/.well-known/carddav", "/.well-known/caldav/"])
def test_well_known_leads_to_the_principal(sync: Client, path: str) -> None:
    for method in ("PROPFIND", "GET"):
        answer = sync.request(method, path, None, {"Depth": "0"})
        hops = 0
        while answer.status in (301, 302, 303, 307, 308):
            hops += 1
            assert hops < 6
            path = sync.path(answer.header("Location"))
            answer = sync.request("PROPFIND", path, None, {"Depth": "0"})
    (row,) = sync.propfind(path, "D:current-user-principal")
    assert row.properties[f"{DAV}current-user-principal"].findtext(f"{DAV}href")


@pytest.mark.demo
@spec("RFC 5397 §3")
def test_the_principal_names_its_homes_and_addresses(target: Target, sync: Client) -> None:
    alice = target.account("alice")
    (row,) = sync.propfind("/", "D:current-user-principal")
    principal = row.properties[f"{DAV}current-user-principal"].findtext(f"{DAV}href", "")
    assert sync.path(principal) == f"/principals/{alice['sync_id']}/"
    names = ("C:calendar-home-set", "A:addressbook-home-set", "C:calendar-user-address-set", "D:displayname")
    (row,) = sync.propfind(
        principal, *names, "D:principal-URL", "D:resourcetype", "D:principal-collection-set"
    )
    assert row.refused == {}
    addresses = {element.text for element in row.properties[f"{CALDAV}calendar-user-address-set"]}
    assert f"mailto:{alice['login']}" in addresses
    assert row.properties[f"{DAV}resourcetype"].find(f"{DAV}principal") is not None
    assert sync.path(row.properties[f"{CALDAV}calendar-home-set"].findtext(f"{DAV}href", "")) == (
        f"/calendars/{alice['sync_id']}/"
    )
    assert sync.path(row.properties[f"{CARDDAV}addressbook-home-set"].findtext(f"{DAV}href", "")) == (
        f"/addressbooks/{alice['sync_id']}/"
    )


@pytest.mark.demo
def test_any_case_of_the_sync_id_is_taken_and_upper_case_answered(target: Target, sync: Client) -> None:
    sync_id = target.account("alice")["sync_id"]
    rows = sync.propfind(f"/calendars/{sync_id.lower()}/", "D:displayname", depth="1")
    assert rows
    assert all(row.path.startswith(f"/calendars/{sync_id}/") for row in rows)


@pytest.mark.demo
def test_prepared_collections_are_there(target: Target) -> None:
    for name in ("alice", "bob", "carol", "dave"):
        account = target.account(name)
        client = Client(
            target.sync_url, account["login"], account["application_password"] or account["password"]
        )
        for kind in ("calendar", "addressbook"):
            assert len(client.members(home(client, kind))) >= 1, (name, kind)
        client.close()


# Calendars


@spec("RFC 4791 §5.3.1")
def test_mkcalendar_with_properties(sync: Client) -> None:
    zone = ics(timezone=ZURICH).replace("\r\n", "&#13;\n")
    made = make_calendar(
        sync,
        "<D:displayname>Ferien &amp; mehr \U0001f600</D:displayname>"
        "<C:calendar-description>d</C:calendar-description><I:calendar-color>#11223344</I:calendar-color>"
        f"<C:calendar-timezone>{zone}</C:calendar-timezone><I:calendar-order>7</I:calendar-order>"
        '<C:supported-calendar-component-set><C:comp name="VTODO"/></C:supported-calendar-component-set>',
    )
    try:
        names = ("D:displayname", "C:calendar-description", "I:calendar-color", "C:calendar-timezone")
        (row,) = sync.propfind(made.path, *names, "C:supported-calendar-component-set", "D:resourcetype")
        assert row.refused == {}
        assert row.text(f"{DAV}displayname") == "Ferien & mehr \U0001f600"
        assert row.text("{http://apple.com/ns/ical/}calendar-color") == "#11223344"
        assert "TZID:Europe/Zurich" in row.text(f"{CALDAV}calendar-timezone")
        comps = {c.get("name") for c in row.properties[f"{CALDAV}supported-calendar-component-set"]}
        assert comps == {"VTODO"}
        assert row.properties[f"{DAV}resourcetype"].find(f"{CALDAV}calendar") is not None
        assert made.put("event.ics", ics(event("event"))).preconditions == (
            f"{CALDAV}supported-calendar-component",
        )
        assert made.put("todo.ics", ics(component("VTODO", "todo"))).status == 201
    finally:
        sync.request("DELETE", made.path)


@spec("RFC 4791 §5.3.1.1")
def test_preconditions_of_mkcalendar(calendar: Collection) -> None:
    make = calendar.client.request
    answer = make("MKCALENDAR", calendar.path)
    assert answer.status in (403, 405, 409)
    assert answer.preconditions == (f"{DAV}resource-must-be-null",)
    answer = make("MKCALENDAR", calendar / "inner/")
    assert answer.status in (403, 409)
    assert f"{CALDAV}calendar-collection-location-ok" in answer.preconditions
    bad = f'<?xml version="1.0"?><C:mkcalendar {NAMESPACES}><D:set><D:prop>'
    bad += "<C:calendar-timezone>nonsense</C:calendar-timezone></D:prop></D:set></C:mkcalendar>"
    path = f"{home(calendar.client, 'calendar')}{uuid.uuid4()}/"
    assert make("MKCALENDAR", path, bad).status in (207, 403, 409, 424)
    assert make("PROPFIND", path, None, {"Depth": "0"}).status == 404, (
        "nothing is made of a failed MKCALENDAR"
    )
    assert make("MKCALENDAR", path, "<broken", {"Content-Type": "text/xml"}).status == 400


@spec("RFC 4791 §5.2")
def test_properties_of_a_calendar(calendar: Collection) -> None:
    names = (
        "C:supported-calendar-component-set",
        "C:supported-calendar-data",
        "C:max-resource-size",
        "S:getctag",
    )
    names += (
        "C:supported-collation-set",
        "D:supported-report-set",
        "D:current-user-privilege-set",
        "D:owner",
    )
    (row,) = calendar.client.propfind(calendar.path, *names, "D:sync-token", "D:current-user-principal")
    assert row.refused == {}
    comps = {c.get("name") for c in row.properties[f"{CALDAV}supported-calendar-component-set"]}
    assert {"VEVENT", "VTODO", "VJOURNAL"} <= comps
    reports = {element.tag for element in row.properties[f"{DAV}supported-report-set"].iter()}
    wanted = {f"{CALDAV}{name}" for name in ("calendar-query", "calendar-multiget", "free-busy-query")}
    assert wanted <= reports
    privileges = {element.tag for element in row.properties[f"{DAV}current-user-privilege-set"].iter()}
    assert {f"{DAV}read", f"{DAV}write"} <= privileges
    assert int(row.text(f"{CALDAV}max-resource-size")) >= 1_000_000
    everything = calendar.client.propfind(calendar.path)[0]
    assert f"{CALDAV}supported-calendar-data" not in everything.properties


def test_a_calendar_is_deleted_with_everything_and_its_name_is_free_at_once(calendar: Collection) -> None:
    put(calendar, "one", ics(event("one")))
    assert calendar.client.request("DELETE", calendar.path).status == 204
    assert calendar.client.request("PROPFIND", calendar.path, None, {"Depth": "0"}).status == 404
    assert calendar.client.request("GET", calendar / "one.ics").status == 404
    assert calendar.client.request("MKCALENDAR", calendar.path).status == 201
    assert calendar.members() == set()
    put(calendar, "one", ics(event("one")))


def test_removing_the_resourcetype_is_refused_and_breaks_nothing(calendar: Collection) -> None:
    put(calendar, "one", ics(event("one")))
    for answer in (
        calendar.client.proppatch(calendar.path, "", "<D:resourcetype/>"),
        calendar.client.proppatch(calendar.path, "<D:resourcetype><D:collection/></D:resourcetype>"),
        calendar.client.proppatch(calendar.path, "<D:displayname>x</D:displayname>", "<D:resourcetype/>"),
    ):
        assert answer.status in (207, 403, 409)
        if answer.status == 207:
            assert answer.rows[0].refused[f"{DAV}resourcetype"] in (403, 409)
    assert calendar.members() == {"one.ics"}
    (row,) = calendar.client.propfind(calendar.path, "D:resourcetype")
    assert row.properties[f"{DAV}resourcetype"].find(f"{CALDAV}calendar") is not None


# Objects


@spec("RFC 4791 §5.3.4")
def test_an_object_comes_back_byte_for_byte_with_its_strong_etag(calendar: Collection) -> None:
    text = ics(
        event(
            "exact",
            "DTSTART;TZID=Europe/Zurich:20260501T100000",
            'X-APPLE-STRUCTURED-LOCATION;VALUE=URI;X-ADDRESS="Rue 1, Gen\u00e8ve";X-TITLE=Place:geo:46.204400,6.143200',
            'ATTENDEE;CN="Doe, \U0001f600 Jane";PARTSTAT=ACCEPTED:mailto:jane@example.org',
            "RRULE:FREQ=WEEKLY;BYDAY=MO;COUNT=3",
            "EXDATE;TZID=Europe/Zurich:20260504T100000",
            "SUMMARY:folded text that goes on and on until it is longer than seventy-five\r\n  octets of one line",
            "x-lower-case:kept",
        ),
        timezone=ZURICH,
    )
    answer = put(calendar, "exact", text)
    got = calendar.client.request("GET", calendar / "exact.ics")
    assert got.body == text.encode()
    assert got.etag == answer.etag
    assert got.etag.startswith('"')
    assert got.header("Content-Type").startswith("text/calendar")
    (row,) = calendar.client.propfind(
        calendar / "exact.ics", "D:getetag", "D:getcontentlength", "D:getcontenttype"
    )
    assert row.text(f"{DAV}getetag") == got.etag
    assert row.text(f"{DAV}getcontentlength") == str(len(text.encode()))


@spec("RFC 9110 §13.1")
def test_conditions_of_objects(calendar: Collection) -> None:
    etag = put(calendar, "one", ics(event("one")), If_None_Match="*").etag
    assert calendar.put("one.ics", ics(event("one")), If_None_Match="*").status == 412
    assert calendar.put("one.ics", ics(event("one")), If_Match='"other"').status == 412
    assert calendar.put("none.ics", ics(event("none")), If_Match=etag).status == 412
    newer = put(calendar, "one", ics(event("one", "DTSTART:20260601T100000Z")), If_Match=etag).etag
    send = calendar.client.request
    assert newer != etag
    assert send("DELETE", calendar / "one.ics", None, {"If-Match": etag}).status == 412
    assert send("GET", calendar / "one.ics", None, {"If-None-Match": newer}).status == 304
    assert send("DELETE", calendar / "one.ics", None, {"If-Match": newer}).status == 204
    assert send("DELETE", calendar / "one.ics").status == 404


@spec("RFC 4791 §5.3.2.1")
@pytest.mark.parametrize(
    ("content", "precondition"),
    [
        ("nonsense", "valid-calendar-data"),
        ("BEGIN:VCALENDAR\r\nVERSION:2.0\r\nBEGIN:VEVENT\r\nUID:x\r\n", "valid-calendar-data"),
        (ics(), "valid-calendar-object-resource"),
        (ics(timezone=ZURICH), "valid-calendar-object-resource"),
        (ics(event("a"), event("b")), "valid-calendar-object-resource"),
        (ics(event("a"), component("VTODO", "a")), "valid-calendar-object-resource"),
        (ics("METHOD:PUBLISH\r\n", event("a")), "valid-calendar-object-resource"),
        (ics(event("a", "DTSTART:nonsense")), "valid-calendar-data"),
        (ics(event("a", "DTSTART:20260501T100000Z", "RRULE:FREQ=NEVER")), "valid-calendar-data"),
        (ics(event("taken")), "no-uid-conflict"),
    ],
    ids=[
        "text",
        "cut",
        "empty",
        "zone only",
        "two uids",
        "two kinds",
        "method",
        "bad date",
        "bad rule",
        "uid",
    ],
)
def test_preconditions_of_put(calendar: Collection, content: str, precondition: str) -> None:
    put(calendar, "taken", ics(event("taken")))
    answer = calendar.put("new.ics", content)
    assert answer.status in (403, 409), (answer.status, answer.body[:300])
    given = {tag.rpartition("}")[2] for tag in answer.preconditions}
    alike = {"valid-calendar-data", "valid-calendar-object-resource"}
    assert given & (alike if precondition in alike else {precondition}), answer.body[:300]
    assert calendar.members() == {"taken.ics"}


@spec("RFC 4791 §5.3.2.1")
def test_other_media_types_and_places_are_refused(calendar: Collection) -> None:
    answer = calendar.put("new.ics", ics(event("a")), Content_Type="text/plain")
    assert answer.status in (403, 415)
    assert calendar.client.request("PUT", home(calendar.client, "calendar") + "loose.ics", b"x").status in (
        403,
        405,
        409,
    )
    assert calendar.client.request("PUT", calendar / "inner/one.ics", ics(event("a"))).status in (
        403,
        404,
        409,
    )
    assert calendar.client.request("PUT", calendar.path, ics(event("a"))).status in (403, 405, 409)
    assert calendar.members() == set()


@pytest.mark.parametrize(
    "name", ["a:b", "a'b", "a,b", "a b", "a@b", "a+b", "a;b", "a?b", "a#b", "a%b", "\u00e9\U0001f600", "a&b"]
)
def test_object_names_of_all_kinds(calendar: Collection, name: str) -> None:
    path = calendar / esc(f"{name}.ics")
    put_ = calendar.client.request("PUT", path, ics(event(name)), {"Content-Type": "text/calendar"})
    assert put_.status == 201, (put_.status, put_.body[:300])
    assert calendar.members() == {f"{name}.ics"}
    (row,) = query(calendar, '<C:comp-filter name="VEVENT"/>').rows
    inner = f"<D:prop><D:getetag/></D:prop><D:href>{row.href.replace('&', '&amp;')}</D:href>"
    (got,) = calendar.client.report(calendar.path, "C:calendar-multiget", inner).rows
    assert got.text(f"{DAV}getetag") == put_.etag
    (changed,) = [row for row in calendar.sync().rows if row.status is None]
    assert unquote(changed.path) == unquote(path)
    assert calendar.client.request("DELETE", row.path).status == 204


@spec("RFC 4918 §9.9")
def test_an_object_moves_to_another_calendar(calendar: Collection) -> None:
    other = make_calendar(calendar.client)
    try:
        put(calendar, "one", ics(event("one")))
        url = calendar.client.url(other / "moved.ics")
        answer = calendar.client.request("MOVE", calendar / "one.ics", None, {"Destination": url})
        assert answer.status == 201, (answer.status, answer.body[:300])
        assert (calendar.members(), other.members()) == (set(), {"moved.ics"})
        assert other.client.request("GET", other / "moved.ics").body == ics(event("one")).encode()
        put(calendar, "one", ics(event("one")))
    finally:
        calendar.client.request("DELETE", other.path)


# calendar-query


@pytest.fixture
def busy(calendar: Collection) -> Collection:
    """A calendar with one of each kind that time ranges treat differently."""
    objects = {
        "point": event("point", "DTSTART:20260510T100000Z"),
        "hour": event(
            "hour", "DTSTART:20260510T120000Z", "DTEND:20260510T130000Z", "SUMMARY:Lunch \u00c9t\u00e9"
        ),
        "duration": event("duration", "DTSTART:20260511T120000Z", "DURATION:PT90M", "LOCATION:Room 1"),
        "day": event("day", "DTSTART;VALUE=DATE:20260512", "SUMMARY:All day"),
        "days": event("days", "DTSTART;VALUE=DATE:20260514", "DTEND;VALUE=DATE:20260516"),
        "weekly": event(
            "weekly",
            "DTSTART;TZID=Europe/Zurich:20260105T090000",
            "DURATION:PT1H",
            "RRULE:FREQ=WEEKLY;BYDAY=MO",
        ),
        "due": component("VTODO", "due", "DUE:20260510T100000Z", "SUMMARY:Task"),
        "dateless": component("VTODO", "dateless", "SUMMARY:Some day"),
        "done": component(
            "VTODO", "done", "COMPLETED:20260520T100000Z", "CREATED:20260518T100000Z", "STATUS:COMPLETED"
        ),
        "diary": component("VJOURNAL", "diary", "DTSTART;VALUE=DATE:20260510"),
    }
    for name, content in objects.items():
        put(calendar, name, ics(content, timezone=ZURICH if name == "weekly" else ""))
    return calendar


@spec("RFC 4791 §9.9")
@pytest.mark.parametrize(
    ("kind", "start", "end", "expected"),
    [
        ("VEVENT", "20260510T000000Z", "20260511T000000Z", {"point", "hour"}),
        ("VEVENT", "20260510T100000Z", "20260510T100001Z", {"point"}),
        ("VEVENT", "20260510T130000Z", "20260510T140000Z", set()),
        ("VEVENT", "20260510T125959Z", "20260510T140000Z", {"hour"}),
        ("VEVENT", "20260511T060000Z", "20260511T070000Z", set()),
        ("VEVENT", "20260511T070000Z", "20260511T080000Z", {"weekly"}),
        ("VEVENT", "20260511T132900Z", "20260511T133000Z", {"duration"}),
        ("VEVENT", "20260511T133000Z", "20260511T140000Z", set()),
        ("VEVENT", "20260512T100000Z", "20260512T110000Z", {"day"}),
        ("VEVENT", "20260515T100000Z", "20260516T000000Z", {"days"}),
        ("VEVENT", "20260516T000000Z", "20260517T000000Z", set()),
        ("VEVENT", "20460103T000000Z", "20460109T000000Z", {"weekly"}),
        ("VTODO", "20260510T090000Z", "20260510T110000Z", {"due", "dateless"}),
        ("VTODO", "20260519T000000Z", "20260519T010000Z", {"dateless", "done"}),
        ("VTODO", "20270101T000000Z", "20270102T000000Z", {"dateless"}),
        ("VJOURNAL", "20260510T100000Z", "20260510T110000Z", {"diary"}),
        ("VJOURNAL", "20260511T000000Z", "20260512T000000Z", set()),
    ],
)
def test_time_ranges(busy: Collection, kind: str, start: str, end: str, expected: set[str]) -> None:
    assert found(query(busy, between(kind, start, end))) == expected


@spec("RFC 4791 §9.9")
def test_open_ended_time_ranges(busy: Collection) -> None:
    after = '<C:comp-filter name="VEVENT"><C:time-range start="20260513T000000Z"/></C:comp-filter>'
    before = '<C:comp-filter name="VEVENT"><C:time-range end="20260201T000000Z"/></C:comp-filter>'
    assert found(query(busy, after)) == {"days", "weekly"}
    assert found(query(busy, before)) == {"weekly"}


@spec("RFC 4791 §9.7")
def test_property_and_parameter_filters(busy: Collection) -> None:
    def events(inner: str) -> set[str]:
        return found(query(busy, f'<C:comp-filter name="VEVENT">{inner}</C:comp-filter>'))

    def summary(match: str, collation: str = "i;ascii-casemap", negate: str = "no") -> set[str]:
        text = f'<C:text-match collation="{collation}" negate-condition="{negate}">{match}</C:text-match>'
        return events(f'<C:prop-filter name="SUMMARY">{text}</C:prop-filter>')

    assert summary("LUNCH") == {"hour"}
    assert summary("lunch", "i;octet") == set()
    assert summary("Lunch", "i;octet") == {"hour"}
    assert summary("\u00c9t\u00e9") == {"hour"}
    assert "day" in summary("lunch", negate="yes")
    assert "hour" not in summary("lunch", negate="yes")
    assert events('<C:prop-filter name="LOCATION"/>') == {"duration"}
    assert events('<C:prop-filter name="SUMMARY"><C:is-not-defined/></C:prop-filter>') >= {"point", "days"}
    zone = '<C:param-filter name="TZID"><C:text-match>Zurich</C:text-match></C:param-filter>'
    assert events(f'<C:prop-filter name="DTSTART">{zone}</C:prop-filter>') == {"weekly"}
    none = '<C:param-filter name="TZID"><C:is-not-defined/></C:param-filter>'
    assert "weekly" not in events(f'<C:prop-filter name="DTSTART">{none}</C:prop-filter>')
    uid = '<C:prop-filter name="UID"><C:text-match collation="i;octet">hour</C:text-match></C:prop-filter>'
    assert events(uid) == {"hour"}
    assert found(query(busy, '<C:comp-filter name="VTODO"/>')) == {"due", "dateless", "done"}
    assert found(query(busy, "")) == {name.removesuffix(".ics") for name in busy.members()}


@spec("RFC 4791 §7.8.9")
def test_the_usual_open_tasks_query(busy: Collection) -> None:
    status = '<C:prop-filter name="STATUS"><C:text-match negate-condition="yes">COMPLETED</C:text-match></C:prop-filter>'
    completed = '<C:prop-filter name="COMPLETED"><C:is-not-defined/></C:prop-filter>'
    assert found(query(busy, f'<C:comp-filter name="VTODO">{completed}</C:comp-filter>')) == {
        "due",
        "dateless",
    }
    assert "done" not in found(
        query(busy, f'<C:comp-filter name="VTODO">{completed}{status}</C:comp-filter>')
    )


@spec("RFC 4791 §9.6.5")
def test_expand_gives_each_instance_in_utc(busy: Collection) -> None:
    override = event(
        "weekly",
        "RECURRENCE-ID;TZID=Europe/Zurich:20260518T090000",
        "DTSTART;TZID=Europe/Zurich:20260519T150000",
        "DURATION:PT1H",
    )
    master = event(
        "weekly",
        "DTSTART;TZID=Europe/Zurich:20260105T090000",
        "DURATION:PT1H",
        "RRULE:FREQ=WEEKLY;BYDAY=MO",
        "EXDATE;TZID=Europe/Zurich:20260525T090000",
    )
    put(busy, "weekly", ics(master, override, timezone=ZURICH))
    data = '<C:calendar-data><C:expand start="20260511T000000Z" end="20260602T000000Z"/></C:calendar-data>'
    filter_ = between("VEVENT", "20260511T000000Z", "20260602T000000Z")
    rows = {row.path.rpartition("/")[2]: row for row in query(busy, filter_, data).rows}
    text = rows["weekly.ics"].text(f"{CALDAV}calendar-data")
    starts = sorted(line for line in text.splitlines() if line.startswith("DTSTART"))
    assert starts == ["DTSTART:20260511T070000Z", "DTSTART:20260519T130000Z", "DTSTART:20260601T070000Z"]
    assert "RRULE" not in text
    assert "VTIMEZONE" not in text
    ids = sorted(line for line in text.splitlines() if line.startswith("RECURRENCE-ID"))
    assert "RECURRENCE-ID:20260518T070000Z" in ids
    assert "DTSTART;VALUE=DATE:20260512" in rows["day.ics"].text(f"{CALDAV}calendar-data")


@spec("RFC 4791 §9.6.6")
def test_limit_recurrence_set_keeps_the_master_and_the_overrides_in_range_or_is_refused(
    calendar: Collection,
) -> None:
    master = event("w", "DTSTART:20260105T090000Z", "DURATION:PT1H", "RRULE:FREQ=WEEKLY")
    near = event(
        "w", "RECURRENCE-ID:20260112T090000Z", "DTSTART:20260112T150000Z", "DURATION:PT1H", "SUMMARY:near"
    )
    far = event(
        "w", "RECURRENCE-ID:20270104T090000Z", "DTSTART:20270104T150000Z", "DURATION:PT1H", "SUMMARY:far"
    )
    put(calendar, "w", ics(master, near, far))
    data = '<C:calendar-data><C:limit-recurrence-set start="20260101T000000Z" end="20260201T000000Z"/></C:calendar-data>'
    answer = query(calendar, between("VEVENT", "20260101T000000Z", "20260201T000000Z"), data)
    if answer.status == 207:
        text = answer.rows[0].text(f"{CALDAV}calendar-data")
        assert "RRULE" in text
        assert "SUMMARY:near" in text
        assert "SUMMARY:far" not in text
    else:
        assert answer.status == 403
        assert answer.preconditions


@spec("RFC 4791 §9.6.1")
def test_partial_calendar_data(calendar: Collection) -> None:
    put(
        calendar, "one", ics(event("one", "DTSTART:20260501T100000Z", "SUMMARY:kept", "DESCRIPTION:left out"))
    )
    data = (
        '<C:calendar-data><C:comp name="VCALENDAR"><C:prop name="VERSION"/><C:comp name="VEVENT">'
        '<C:prop name="UID"/><C:prop name="SUMMARY"/></C:comp></C:comp></C:calendar-data>'
    )
    (row,) = query(calendar, '<C:comp-filter name="VEVENT"/>', data).rows
    text = row.text(f"{CALDAV}calendar-data")
    assert "SUMMARY:kept" in text
    assert "UID:one" in text
    assert "left out" not in text


@spec("RFC 4791 §7.8.1")
@pytest.mark.parametrize(
    ("inner", "precondition"),
    [
        ("<D:prop><D:getetag/></D:prop>", "valid-filter"),
        ("<D:prop><D:getetag/></D:prop><C:filter/>", "valid-filter"),
        ('<D:prop><D:getetag/></D:prop><C:filter><C:comp-filter name="VEVENT"/></C:filter>', "valid-filter"),
        (
            '<D:prop><D:getetag/></D:prop><C:filter><C:comp-filter name="VCALENDAR"><C:comp-filter name="VEVENT">'
            '<C:time-range start="nonsense"/></C:comp-filter></C:comp-filter></C:filter>',
            "valid-filter",
        ),
        (
            '<D:prop><D:getetag/></D:prop><C:filter><C:comp-filter name="VCALENDAR"><C:comp-filter name="VEVENT">'
            '<C:time-range start="20260502T000000Z" end="20260501T000000Z"/></C:comp-filter></C:comp-filter></C:filter>',
            "valid-filter",
        ),
        (
            '<D:prop><D:getetag/></D:prop><C:filter><C:comp-filter name="VCALENDAR"><C:comp-filter name="VEVENT">'
            '<C:prop-filter name="SUMMARY"><C:text-match collation="i;nonsense">x</C:text-match></C:prop-filter>'
            "</C:comp-filter></C:comp-filter></C:filter>",
            "supported-collation",
        ),
        (
            '<D:prop><C:calendar-data content-type="application/json"/></D:prop>'
            '<C:filter><C:comp-filter name="VCALENDAR"/></C:filter>',
            "supported-calendar-data",
        ),
    ],
    ids=["none", "empty", "no VCALENDAR", "bad time", "backwards", "collation", "media type"],
)
def test_queries_that_are_none_are_refused(busy: Collection, inner: str, precondition: str) -> None:
    answer = busy.client.report(busy.path, "C:calendar-query", inner)
    assert answer.status in (400, 403), answer.status
    if answer.status == 403:
        assert answer.preconditions == (f"{CALDAV}{precondition}",)


# Other reports


@spec("RFC 4791 §7.9")
def test_multiget(busy: Collection) -> None:
    hrefs = [busy / "hour.ics", busy / "none.ics", busy.client.url(busy / "day.ics"), busy / "../x.ics"]
    inner = "<D:prop><D:getetag/><C:calendar-data/></D:prop>" + "".join(
        f"<D:href>{href}</D:href>" for href in hrefs
    )
    for depth in (None, "0", "1"):
        rows = {
            row.path: row
            for row in busy.client.report(busy.path, "C:calendar-multiget", inner, depth=depth).rows
        }
        assert (
            rows[busy / "hour.ics"].text(f"{DAV}getetag")
            == busy.client.request("GET", busy / "hour.ics").etag
        )
        assert "SUMMARY:All day" in rows[busy / "day.ics"].text(f"{CALDAV}calendar-data")
        assert rows[busy / "none.ics"].status == 404
        assert len(rows) >= 3


@spec("RFC 4791 §7.10")
def test_free_busy(busy: Collection) -> None:
    put(busy, "clear", ics(event("clear", "DTSTART:20260510T080000Z", "DURATION:PT1H", "TRANSP:TRANSPARENT")))
    put(busy, "off", ics(event("off", "DTSTART:20260510T090000Z", "DURATION:PT1H", "STATUS:CANCELLED")))
    put(busy, "maybe", ics(event("maybe", "DTSTART:20260510T150000Z", "DURATION:PT1H", "STATUS:TENTATIVE")))
    put(busy, "overlap", ics(event("overlap", "DTSTART:20260510T123000Z", "DURATION:PT1H")))
    answer = busy.client.report(
        busy.path, "C:free-busy-query", '<C:time-range start="20260510T000000Z" end="20260512T000000Z"/>'
    )
    assert answer.status == 200
    assert answer.header("Content-Type").startswith("text/calendar")
    text = answer.body.decode().replace("\r\n ", "")
    assert text.count("BEGIN:VFREEBUSY") == 1
    busy_lines = [line for line in text.splitlines() if line.startswith("FREEBUSY")]
    certain = ",".join(line.partition(":")[2] for line in busy_lines if "TENTATIVE" not in line).split(",")
    starts = sorted(period.partition("/")[0] for period in certain)
    assert starts == ["20260510T120000Z", "20260511T070000Z", "20260511T120000Z"]
    ends = {period.partition("/")[0]: period.partition("/")[2] for period in certain}
    assert ends["20260510T120000Z"] in ("20260510T133000Z", "PT1H30M"), "overlapping times are merged"
    assert [line.partition(":")[2].partition("/")[0] for line in busy_lines if "TENTATIVE" in line] == [
        "20260510T150000Z"
    ]


@spec("RFC 3253 §3.6")
@pytest.mark.parametrize(
    "name",
    ["D:unknown-report", "C:unknown", "A:addressbook-query", "D:version-tree", "E:mine", "C:calendar-query"],
)
def test_a_report_where_none_applies_is_refused_with_its_precondition(
    calendar: Collection, name: str
) -> None:
    place = home(calendar.client, "addressbook") if name == "C:calendar-query" else calendar.path
    answer = calendar.client.report(place, name, "<D:prop><D:getetag/></D:prop>")
    assert answer.status in (403, 409, 501), (answer.status, answer.body[:200])
    assert f"{DAV}supported-report" in answer.preconditions, answer.body[:300]


@spec("RFC 8144 §2.1")
def test_prefer_return_minimal_leaves_out_what_is_missing(calendar: Collection) -> None:
    put(calendar, "one", ics(event("one")))
    body = (
        f'<?xml version="1.0"?><D:propfind {NAMESPACES}><D:prop><D:getetag/><E:none/></D:prop></D:propfind>'
    )
    for header in ({"Prefer": "return=minimal"}, {"Brief": "t"}):
        answer = calendar.client.request("PROPFIND", calendar.path, body, {"Depth": "1", **header})
        assert all(row.refused == {} for row in answer.rows)
        assert len(answer.rows) == 2
        if "Prefer" in header:
            assert "return=minimal" in answer.header("Preference-Applied")
