from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksync_server.wire import contentline, ical
from ksync_server.wire.ical import BadCalendar, CalendarLimits, Component, CompSelection
from tests import costs

CALDAV = "{urn:ietf:params:xml:ns:caldav}"

# what iOS sends with a place: commas in a URI, quoted parameters with \n, an emoji
APPLE = """BEGIN:VCALENDAR
VERSION:2.0
PRODID:-//Apple Inc.//iOS 17.5//EN
CALSCALE:GREGORIAN
BEGIN:VEVENT
UID:7E6F7A9C-EVENT@example.org
DTSTAMP:20240601T080000Z
DTSTART;TZID=Europe/Zurich:20240603T100000
SUMMARY:Réunion 🎉 à Genève
LOCATION:Café du Lac\\nRue du Rhône 1\\, Genève
X-APPLE-STRUCTURED-LOCATION;VALUE=URI;X-ADDRESS="Rue du Rhône 1\\n1204 Genève;
 Suisse";X-APPLE-RADIUS=70;X-TITLE=Café du Lac:geo:46.204400,6.143200
ATTENDEE;CN="Dupont, Jean; dit: \\"le grand\\"";ROLE=REQ-PARTICIPANT:mailto:jean@example.org
ATTENDEE;CN=George Herman ^'Babe^' Ruth^nJr ^^:mailto:babe@example.org
EXDATE;VALUE=DATE:20240610
EXDATE;TZID=Europe/Zurich:20240617T100000
BEGIN:VALARM
ACTION:DISPLAY
TRIGGER:-PT15M
END:VALARM
END:VEVENT
END:VCALENDAR
"""


def calendar(*parts: str, head: str = "VERSION:2.0\r\n") -> bytes:
    return ("BEGIN:VCALENDAR\r\n" + head + "".join(parts) + "END:VCALENDAR\r\n").encode()


def event(lines: str = "UID:1\r\nDTSTART:20240101T100000Z\r\n", kind: str = "VEVENT") -> str:
    return f"BEGIN:{kind}\r\n{lines}END:{kind}\r\n"


def refused(data: bytes, limits: CalendarLimits | None = None) -> str | None:
    limits = limits or CalendarLimits()
    with pytest.raises(BadCalendar) as caught:
        ical.check_object(ical.parse(data, limits), limits)
    assert caught.value.text
    return caught.value.precondition


# --- reading


def test_a_place_with_commas_and_quoted_parameters_survives_as_the_phone_sent_it() -> None:
    event = ical.parse(APPLE.encode()).children[0]
    place = event.first("X-APPLE-STRUCTURED-LOCATION")
    assert place is not None
    assert place.value == "geo:46.204400,6.143200"
    assert place.param("X-ADDRESS") == "Rue du Rhône 1\\n1204 Genève;Suisse"
    assert place.param("X-TITLE") == "Café du Lac"
    assert place.param("VALUE") == "URI"
    assert event.text("SUMMARY") == "Réunion 🎉 à Genève"
    assert event.text("LOCATION") == "Café du Lac\nRue du Rhône 1, Genève"
    assert ical.check_object(ical.parse(APPLE.encode())).uid == "7E6F7A9C-EVENT@example.org"


@pytest.mark.spec("RFC 6868 §3")
def test_carets_in_parameters_are_decoded() -> None:
    attendee = ical.parse(APPLE.encode()).children[0].all("ATTENDEE")[1]
    assert attendee.param("CN") == 'George Herman "Babe" Ruth\nJr ^'


def test_a_quoted_name_holds_comma_semicolon_and_colon() -> None:
    line = 'ATTENDEE;CN="Doe, J; a: b";X=1,"2,3":mailto:j@example.org'
    prop = contentline.LineReader().read(line)
    assert prop.params == (("CN", ("Doe, J; a: b",)), ("X", ("1", "2,3")))
    assert prop.value == "mailto:j@example.org"


def test_a_quote_that_never_closes_ends_at_the_first_colon() -> None:
    prop = contentline.LineReader().read('ATTENDEE;CN="Jean:mailto:j@example.org')
    assert (prop.name, prop.value) == ("ATTENDEE", "mailto:j@example.org")


@pytest.mark.spec("RFC 5545 §3.1")
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_line_end_and_a_byte_order_mark_are_read_alike(end: str, mark: bytes) -> None:
    data = calendar(event()).decode().replace("\r\n", end).encode()
    assert ical.parse(mark + data) == ical.parse(calendar(event()))


@pytest.mark.spec("RFC 5545 §3.1")
def test_a_fold_inside_a_utf8_sequence_is_undone() -> None:
    data = calendar(event("UID:1\r\nSUMMARY:\xe9🎉\r\n")).replace(
        "🎉".encode(), b"\xf0\r\n \x9f\r\n\t\x8e\n \x89"
    )
    assert ical.parse(data).children[0].text("SUMMARY") == "é🎉"
    assert ical.parse(contentline.as_text(data).encode()) == ical.parse(data)


def test_text_for_a_report_is_the_stored_text_when_it_can_be() -> None:
    data = "SUMMARY:Réunion\r\n  🎉\r\n".encode()
    assert contentline.as_text(data).encode() == data


def test_lines_without_a_name_are_kept_and_never_found() -> None:
    found = ical.parse(calendar(event("UID:1\r\nno colon here\r\n:value\r\nÄ:1\r\n\r\n"))).children[0]
    assert [prop.name for prop in found.properties] == ["UID", "", "", ""]
    assert "no colon here\r\n" in ical.serialise(found)
    assert found.all("NO COLON HERE") == []


def test_a_name_seen_before_with_a_value_is_no_name_without_colon() -> None:
    reader = contentline.LineReader()
    assert [reader.read(line).name for line in ("SUMMARY:a", "SUMMARY", "SUMMARY:b")] == [
        "SUMMARY",
        "",
        "SUMMARY",
    ]


def test_names_are_found_in_any_case() -> None:
    found = ical.parse(
        b"begin:vcalendar\nbegin:vevent\nuid:1\ndtstart;value=date:20240101\nend:vevent\nend:vcalendar"
    )
    start = found.children[0].first("DTSTART")
    assert start is not None
    assert start.param("VALUE") == "date"


@pytest.mark.parametrize("character", ["\x00", "\x08", "\x0b", "\x0c", "\x1f", "\ufffe", "\uffff"])
def test_characters_that_xml_cannot_carry_are_refused(character: str) -> None:
    data = calendar(event(f"UID:1\r\nSUMMARY:a{character}b\r\n"))
    assert refused(data) == CALDAV + "valid-calendar-data"


def test_a_forbidden_character_hidden_by_a_fold_is_refused() -> None:
    data = calendar(event("UID:1\r\nSUMMARY:@\r\n")).replace(b"@", b"\xef\xbf\r\n \xbe")
    assert refused(data) == CALDAV + "valid-calendar-data"


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"])
def test_bytes_that_are_not_utf8_are_refused(bad: bytes) -> None:
    data = calendar(event("UID:1\r\nSUMMARY:@\r\n")).replace(b"@", bad)
    assert refused(data) == CALDAV + "valid-calendar-data"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n",
        b"hello",
        b"BEGIN:VCALENDAR\r\n",
        b"BEGIN:VCALENDAR\r\nBEGIN:VEVENT\r\nEND:VCALENDAR\r\nEND:VEVENT\r\n",
        b"END:VCALENDAR\r\n",
        b"BEGIN:VCARD\r\nEND:VCARD\r\n",
        b"UID:1\r\n" + calendar(event()),
        calendar(event()) + b"UID:1\r\n",
        calendar(event()) + calendar(event()),
        calendar(event())[:-18],
        event().encode(),
    ],
)
def test_what_is_not_one_whole_calendar_is_refused(data: bytes) -> None:
    assert refused(data) == CALDAV + "valid-calendar-data"


@pytest.mark.parametrize(
    ("limits", "data"),
    [
        (CalendarLimits(max_bytes=50), calendar(event())),
        (CalendarLimits(max_line_bytes=50), calendar(event("UID:" + "é" * 30 + "\r\n"))),
        (CalendarLimits(max_properties=5), calendar(event())),
        (CalendarLimits(max_components=1), calendar(event())),
        (CalendarLimits(max_depth=1), calendar(event())),
    ],
)
def test_an_object_over_a_limit_of_size_is_refused(limits: CalendarLimits, data: bytes) -> None:
    assert refused(data, limits) == CALDAV + "max-resource-size"


def test_an_object_exactly_at_the_limits_is_read() -> None:
    data = calendar(event())
    limits = CalendarLimits(max_bytes=len(data), max_properties=7, max_components=2, max_depth=2)
    assert ical.parse(data, limits).children


@pytest.mark.parametrize(
    "line",
    [
        b"X" + b";a" * 500_000 + b":",
        b'X;B="' + b'a"' * 500_000 + b":",
        b'X;B="a"' + b',"a"' * 300_000 + b":",
        b'X;B="' + b"a" * 1_000_000,
        b"X;B=" + b'"":' * 300_000,
        b"a" * 1_000_000,
        b"BEGIN:" + b"A" * 1_000_000,
        b"\r\n ".join([b"DESCRIPTION:"] + [b"a"] * 250_000),
        b"DESCRIPTION:" + b"\\" * 1_000_001,
        b"DESCRIPTION:" + b"\r" * 1_000_000,
        b"CATEGORIES:" + b"\\," * 400_000,
    ],
)
def test_a_megabyte_of_malice_in_one_line_stays_linear(line: bytes) -> None:
    data = b"BEGIN:VCALENDAR\r\n" + line + b"\r\nEND:VCALENDAR\r\n"

    def read() -> None:
        try:
            found = ical.parse(data)
        except BadCalendar:
            return
        for prop in found.properties:
            prop.text()
            prop.texts()
        ical.serialise(found)

    costs.within(1, read)


# --- object resources


@pytest.mark.spec("RFC 4791 §5.3.2.1")
@pytest.mark.parametrize(
    ("data", "precondition"),
    [
        (calendar(), "valid-calendar-object-resource"),
        (calendar(event(), head="METHOD:REQUEST\r\n"), "valid-calendar-object-resource"),
        (calendar(event(), event(kind="VTODO")), "valid-calendar-object-resource"),
        (calendar(event("DTSTART:20240101\r\n")), "valid-calendar-object-resource"),
        (calendar(event("UID:\r\nDTSTART:20240101\r\n")), "valid-calendar-object-resource"),
        (calendar(event("UID:a\\nb\r\nDTSTART:20240101\r\n")), "valid-calendar-object-resource"),
        (calendar(event("UID:1\r\nUID:1\r\nDTSTART:20240101\r\n")), "valid-calendar-object-resource"),
        (
            calendar(event(), event("UID:2\r\nRECURRENCE-ID:20240101T100000Z\r\n")),
            "valid-calendar-object-resource",
        ),
        (calendar(event(), event()), "valid-calendar-object-resource"),
        (calendar(event(kind="VPOLL")), "supported-calendar-component"),
        (calendar(event("UID:1\r\n")), "valid-calendar-data"),
        (calendar(event("UID:1\r\nDTSTART:tomorrow\r\n")), "valid-calendar-data"),
        (calendar(event("UID:1\r\nDTSTART:20230229\r\n")), "valid-calendar-data"),
        (
            calendar(event("UID:1\r\nDTSTART:20230101\r\nRRULE:FREQ=DAILY;INTERVAL=0\r\n")),
            "valid-calendar-data",
        ),
        (calendar(event("UID:1\r\nDTSTART:20230101\r\nRRULE:COUNT=3\r\n")), "valid-calendar-data"),
        (calendar(event("UID:1\r\nDTSTART:20230101\r\nRRULE:FREQ=DAILY;UNTIL=x\r\n")), "valid-calendar-data"),
        (
            calendar(event("UID:1\r\nDTSTART:20230101\r\nRRULE:RSCALE=HEBREW;FREQ=YEARLY\r\n")),
            "supported-rscale",
        ),
    ],
)
def test_an_object_that_breaks_a_rule_names_the_rule(data: bytes, precondition: str) -> None:
    assert refused(data) == CALDAV + precondition


def test_counts_beyond_the_limits_are_refused() -> None:
    start = "UID:1\r\nDTSTART:20240101T100000Z\r\n"
    zones = "".join(event(f"TZID:{n}\r\n", "VTIMEZONE") for n in range(33))
    dates = "RDATE:" + ",".join(["20240101T100000Z"] * 2001)
    assert refused(calendar(zones, event())) == CALDAV + "valid-calendar-object-resource"
    assert refused(calendar(event(f"{start}{dates}\r\n"))) == CALDAV + "max-instances"
    attendees = "ATTENDEE:mailto:a@example.org\r\n" * 1001
    assert refused(calendar(event(start + attendees))) == CALDAV + "max-attendees-per-instance"
    assert refused(calendar(event("UID:" + "a" * 1001 + "\r\nDTSTART:20240101\r\n"))) is not None


@pytest.mark.spec("RFC 4791 §4.1")
def test_an_invitation_to_single_instances_is_an_object() -> None:
    one = "UID:1\r\nDTSTART:20240101T100000Z\r\nRECURRENCE-ID:20240101T100000Z\r\n"
    two = one.replace("0101T", "0102T")
    found = ical.check_object(ical.parse(calendar(event(one), event(two))))
    assert found.master is None
    assert len(found.overrides) == 2
    assert found.components == found.overrides
    assert not found.has_recurrence


@pytest.mark.parametrize("kind", ["VTODO", "VJOURNAL", "VFREEBUSY", "VAVAILABILITY"])
def test_each_kind_is_an_object_and_needs_no_start(kind: str) -> None:
    found = ical.check_object(ical.parse(calendar(event("UID:a:b,c/d%2F\r\n", kind), head="")))
    assert (found.component, found.uid) == (kind, "a:b,c/d%2F")


def test_what_real_clients_send_is_an_object() -> None:
    lines = (
        "UID:1\r\nDTSTART;TZID=Europe/Paris:20240101T100000\r\nRRULE:FREQ=DAILY;COUNT=9;X-A=1;\r\n"
        "EXDATE;VALUE=DATE:20240102\r\nEXDATE;TZID=Europe/Paris:20240103T100000\r\n"
        "RRULE:FREQ=SECONDLY\r\nGEO:46.2;6.1\r\n"
    )
    found = ical.check_object(ical.parse(calendar(event(lines))))
    assert found.has_recurrence


# --- writing

names = st.sampled_from(["SUMMARY", "X-WR-CALNAME", "DTSTART", "ATTENDEE", "URL"])
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"))
params = st.lists(
    st.tuples(st.sampled_from(["CN", "X-A"]), st.lists(texts, min_size=1).map(tuple)), max_size=3
)
properties = st.builds(
    lambda name, text, params: contentline.make_property(name, contentline.escape(text), tuple(params)),
    names,
    texts,
    params,
)
components: st.SearchStrategy[Component] = st.recursive(
    st.builds(Component, st.sampled_from(["VEVENT", "VALARM"]), st.lists(properties).map(tuple)),
    lambda inner: st.builds(
        Component, st.just("VEVENT"), st.lists(properties).map(tuple), st.lists(inner, max_size=2).map(tuple)
    ),
    max_leaves=4,
)


@settings(max_examples=20, deadline=None)
@given(st.lists(components, max_size=3))
def test_what_is_written_is_read_back_and_folded_at_75_octets(children: list[Component]) -> None:
    whole = ical.calendar_of(children)
    text = ical.serialise(whole)
    assert all(len(line.encode()) <= 75 for line in text.split("\r\n"))
    assert "\n" not in text.replace("\r\n", "")
    read = ical.parse(text.encode(), CalendarLimits(max_depth=20))
    assert ical.serialise(read) == text
    assert [part.name for part in read.walk()] == [part.name for part in whole.walk()]
    for made, found in zip(whole.walk(), read.walk(), strict=True):
        assert [p.text() for p in made.properties] == [p.text() for p in found.properties]
        assert [p.params for p in made.properties] == [p.params for p in found.properties]


@given(texts)
def test_escapes_are_undone(text: str) -> None:
    assert contentline.unescape(contentline.escape(text)) == text


@given(st.lists(texts, min_size=1), st.sampled_from([",", ";"]))
def test_lists_are_split_at_separators_that_are_not_escaped(parts: list[str], separator: str) -> None:
    value = separator.join(contentline.escape(part) for part in parts)
    assert [contentline.unescape(part) for part in contentline.split(value, separator)] == parts


@given(st.binary(max_size=300))
def test_garbage_is_refused_and_nothing_else(data: bytes) -> None:
    for build in (lambda: data, lambda: b"BEGIN:VCALENDAR\r\n" + data + b"\r\nEND:VCALENDAR\r\n"):
        _only_bad_calendar(build)


@given(st.integers(0, len(APPLE.encode()) - 1), st.binary(max_size=2))
def test_one_changed_byte_is_read_or_refused(at: int, instead: bytes) -> None:
    data = APPLE.encode()
    _only_bad_calendar(lambda: data[:at] + instead + data[at + 1 :])


def _only_bad_calendar(build: Callable[[], bytes]) -> None:
    try:
        found = ical.check_object(ical.parse(build()))
    except BadCalendar:
        return
    text = ical.serialise(found.calendar)
    again = ical.check_object(ical.parse(text.encode()))
    assert again.uid == found.uid
    assert contentline.as_text(build())


# --- partial retrieval

PARTIAL = calendar(
    event("TZID:Europe/Paris\r\nBEGIN:STANDARD\r\nDTSTART:19701025T030000\r\nEND:STANDARD\r\n", "VTIMEZONE"),
    event(
        "UID:1\r\nSUMMARY:secret\r\nDTSTART:20240101T100000Z\r\nBEGIN:VALARM\r\nACTION:AUDIO\r\nEND:VALARM\r\n"
    ),
)


@pytest.mark.spec("RFC 4791 §9.6.1")
def test_partial_retrieval_gives_the_asked_parts_only() -> None:
    selection = CompSelection(
        "VCALENDAR",
        props={"VERSION": False},
        comps=(CompSelection("VEVENT", props={"UID": False, "SUMMARY": True}), CompSelection("VTIMEZONE")),
    )
    assert ical.select(ical.parse(PARTIAL), selection) == (
        "BEGIN:VCALENDAR\r\nVERSION:2.0\r\n"
        "BEGIN:VTIMEZONE\r\nTZID:Europe/Paris\r\n"
        "BEGIN:STANDARD\r\nDTSTART:19701025T030000\r\nEND:STANDARD\r\nEND:VTIMEZONE\r\n"
        "BEGIN:VEVENT\r\nUID:1\r\nSUMMARY:\r\nEND:VEVENT\r\nEND:VCALENDAR\r\n"
    )


@pytest.mark.spec("RFC 4791 §9.6.2")
def test_allprop_and_allcomp_give_everything() -> None:
    whole = ical.serialise(ical.parse(PARTIAL))
    assert (
        ical.select(ical.parse(PARTIAL), CompSelection("VCALENDAR", all_props=True, all_comps=True)) == whole
    )
    assert ical.select(ical.parse(PARTIAL), CompSelection("VCALENDAR")) == whole
    events = CompSelection("VCALENDAR", comps=(CompSelection("VEVENT", all_props=True),))
    assert "VALARM" not in ical.select(ical.parse(PARTIAL), events)


def test_a_folded_line_never_breaks_a_character() -> None:
    for text in ("é" * 100, "🎉" * 60, "a" * 74 + "é" * 40, "a" * 1000):
        folded = contentline.fold(text)
        lines = folded.removesuffix("\r\n").split("\r\n ")
        assert "".join(lines) == text
        assert len(lines[0].encode()) <= 75
        assert all(len(line.encode()) <= 74 for line in lines[1:])
