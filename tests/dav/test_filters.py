"""Filters on objects: what is a filter, and what it matches."""

from __future__ import annotations

import datetime
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksync_server.dav import filters
from ksync_server.errors import CALDAV, CARDDAV, Forbidden
from ksync_server.wire import ical, recurrence, vcard, xml
from tests.dav.harness import calendar, card, component, event

UTC = datetime.UTC
VTIMEZONE = (
    "BEGIN:VTIMEZONE\r\nTZID:Home\r\nBEGIN:STANDARD\r\nDTSTART:19700101T000000\r\nTZOFFSETFROM:+0100\r\n"
    "TZOFFSETTO:+0100\r\nEND:STANDARD\r\nEND:VTIMEZONE\r\n"
)


def parse(inner: str) -> filters.CompFilter:
    markup = f"<c:filter{xml.NAMESPACES}>{inner}</c:filter>"
    return filters.parse_calendar_filter(xml.parse(markup.encode()))


def below(inner: str, kind: str = "VEVENT") -> str:
    return f'<c:comp-filter name="VCALENDAR">{comp(inner, kind)}</c:comp-filter>'


def comp(inner: str, kind: str = "VEVENT") -> str:
    return f'<c:comp-filter name="{kind}">{inner}</c:comp-filter>'


def text(value: str, **attributes: str) -> str:
    given_ = "".join(f' {name.replace("_", "-")}="{xml.escape(of)}"' for name, of in attributes.items())
    return f"<c:text-match{given_}>{xml.escape(value)}</c:text-match>"


def prop(name: str, inner: str = "") -> str:
    return f'<c:prop-filter name="{name}">{inner}</c:prop-filter>'


def param(name: str, inner: str = "") -> str:
    return f'<c:param-filter name="{name}">{inner}</c:param-filter>'


def span(start: str = "", end: str = "") -> str:
    sides = (f' start="{start}"' if start else "") + (f' end="{end}"' if end else "")
    return f"<c:time-range{sides}/>"


NONE = "<c:is-not-defined/>"


def matches(inner: str, content: str, *, zone: datetime.tzinfo = UTC) -> bool:
    found = ical.check_object(ical.parse(content.encode()))
    return filters.matches_calendar(parse(inner), found, zone, recurrence.Budget())


# -- what is a filter -----------------------------------------------------------------------------


@pytest.mark.spec("RFC 4791 §7.8")
@pytest.mark.parametrize(
    "inner",
    [
        "",
        '<c:comp-filter name="VEVENT"/>',
        '<c:comp-filter name="VCALENDAR"/><c:comp-filter name="VCALENDAR"/>',
        "<c:comp-filter/>",
        below("", "VCALENDAR"),
        below("", "VALARM"),
        below("", "STANDARD"),
        below('<c:comp-filter name="VEVENT"/>', "VTODO"),
        below('<c:comp-filter name="VALARM"/>', "VJOURNAL"),
        below('<c:comp-filter name="VTIMEZONE"/>'),
        f'<c:comp-filter name="VCALENDAR">{span("20260101T000000Z")}</c:comp-filter>',
        below(span("20260101T000000Z"), "VTIMEZONE"),
        below(span("20260101T000000Z"), "X-MINE"),
        below(span()),
        below(span("20260101T000000Z") * 2),
        below(span("20260101T000000Z", "20260101T000000Z")),
        below(span("20260102T000000Z", "20260101T000000Z")),
        below(span("20260101")),
        below(span("20260101T000000")),
        below(span("2026-01-01T00:00:00Z")),
        below(span("2026131T000000Z")),
        below(span("20260231T000000Z")),
        below(span("20260101T250000Z")),
        below(span("٢٠٢٦٠١٠١T000000Z")),
        below(span("20260101T000000Z") + NONE),
        below(prop("SUMMARY", span("20260101T000000Z"))),
        below(prop("SUMMARY", text("a") + text("b"))),
        below(prop("DTSTART", span("20260101T000000Z") + text("a"))),
        below(prop("SUMMARY", NONE + text("a"))),
        below(prop("SUMMARY", param("LANGUAGE", text("a") + text("b")))),
        below(prop("SUMMARY", param("LANGUAGE", NONE + NONE))),
        below("<c:prop-filter/>"),
        below(prop("SUMMARY", "<c:param-filter/>")),
        below(prop("SUMMARY", text("a", negate_condition="maybe"))),
        below("<c:nonsense/>"),
        below(text("a")),
        below('<c:comp-filter name="X-A">' * 5 + "</c:comp-filter>" * 5),
        below(prop("SUMMARY") * 201),
    ],
)
def test_what_is_no_filter_is_refused_as_such(inner: str) -> None:
    with pytest.raises(Forbidden) as refused:
        parse(inner)
    assert refused.value.precondition == CALDAV + "valid-filter"


@pytest.mark.spec("RFC 4791 §7.5.1")
@pytest.mark.parametrize("collation", ["i;nonsense", "i;ASCII-casemap", "*", "i;ascii-numeric"])
def test_an_unknown_collation_is_refused_wherever_it_stands(collation: str) -> None:
    for inner in (text("a", collation=collation), param("X", text("a", collation=collation))):
        with pytest.raises(Forbidden) as refused:
            parse(below(prop("SUMMARY", inner)))
        assert refused.value.precondition == CALDAV + "supported-collation"
    inner = (
        '<card:prop-filter name="FN"><card:text-match collation="x">a</card:text-match></card:prop-filter>'
    )
    markup = f"<card:filter{xml.NAMESPACES}>{inner}</card:filter>"
    with pytest.raises(Forbidden) as refused:
        filters.parse_card_filter(xml.parse(markup.encode()))
    assert refused.value.precondition == CARDDAV + "supported-collation"


@pytest.mark.spec("RFC 4918 §17")
def test_elements_of_other_namespaces_inside_a_filter_are_ignored() -> None:
    inner = '<c:comp-filter name="VCALENDAR"><x:more xmlns:x="urn:x"/></c:comp-filter>'
    assert matches(inner, event("a"))


# -- properties and parameters ----------------------------------------------------------------------

MEETING = event(
    "m",
    "SUMMARY;LANGUAGE=de:Große Besprechung\\, Raum É",
    "STATUS:TENTATIVE",
    "CATEGORIES:work,team",
    "ATTENDEE;PARTSTAT=ACCEPTED;ROLE=CHAIR:mailto:cyrus@example.org",
    "ATTENDEE;PARTSTAT=NEEDS-ACTION:mailto:lisa@example.org",
    "CREATED:20260301T120000Z",
    "EXDATE:20260505T100000Z,20260507T100000Z",
    "X-WHEN:20260401T000000Z",
    "BEGIN:VALARM",
    "ACTION:DISPLAY",
    "TRIGGER:-PT15M",
    "END:VALARM",
)


@pytest.mark.spec("RFC 4791 §9.7.2")
@pytest.mark.spec("RFC 4791 §9.7.5")
@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (prop("SUMMARY"), True),
        (prop("summary"), True),
        (prop("LOCATION"), False),
        (prop("LOCATION", NONE), True),
        (prop("SUMMARY", NONE), False),
        (prop("SUMMARY", text("BESPRECHUNG, raum")), True),
        (prop("SUMMARY", text("besprechung", collation="i;octet")), False),
        (prop("SUMMARY", text("Besprechung", collation="i;octet")), True),
        (prop("SUMMARY", text("é", collation="i;ascii-casemap")), False),
        (prop("SUMMARY", text("é", collation="i;unicode-casemap")), True),
        (prop("SUMMARY", text("e\u0301", collation="i;unicode-casemap")), True),
        (prop("SUMMARY", text("e\u0301", collation="i;octet")), False),
        (prop("SUMMARY", text("GROSSE", collation="i;unicode-casemap")), True),
        (prop("SUMMARY", text("", collation="default")), True),
        (prop("SUMMARY", text("nothing")), False),
        (prop("SUMMARY", text("nothing", negate_condition="yes")), True),
        (prop("SUMMARY", text("raum", negate_condition="yes")), False),
        (prop("LOCATION", text("raum", negate_condition="yes")), False),
        (prop("STATUS", text("CANCELLED", negate_condition="yes")), True),
        (prop("CATEGORIES", text("TEAM")), True),
        (prop("CATEGORIES", text("work,team")), True),
        (prop("SUMMARY", param("LANGUAGE")), True),
        (prop("SUMMARY", param("language", text("DE"))), True),
        (prop("SUMMARY", param("LANGUAGE", text("fr"))), False),
        (prop("SUMMARY", param("LANGUAGE", text("fr", negate_condition="yes"))), True),
        (prop("SUMMARY", param("LANGUAGE", NONE)), False),
        (prop("SUMMARY", param("ALTREP", NONE)), True),
        (prop("SUMMARY", param("ALTREP", text("x", negate_condition="yes"))), False),
        (prop("SUMMARY") + prop("LOCATION"), False),
        (prop("SUMMARY") + prop("STATUS", text("tentative")), True),
        (prop("ATTENDEE", text("mailto:lisa@example.org") + param("PARTSTAT", text("NEEDS-ACTION"))), True),
        (prop("ATTENDEE", text("mailto:cyrus@example.org") + param("PARTSTAT", text("NEEDS-ACTION"))), False),
        (prop("ATTENDEE", param("ROLE") + param("PARTSTAT", text("NEEDS-ACTION"))), False),
        (prop("ATTENDEE", param("ROLE", NONE) + param("PARTSTAT", text("NEEDS-ACTION"))), True),
        (prop("CREATED", span("20260301T120000Z", "20260301T120001Z")), True),
        (prop("CREATED", span("20260301T120001Z")), False),
        (prop("CREATED", span(end="20260301T120000Z")), False),
        (prop("CREATED", span(end="20260301T120001Z")), True),
        (prop("COMPLETED", span(end="20260301T120001Z")), False),
        (prop("EXDATE", span("20260507T000000Z", "20260508T000000Z")), True),
        (prop("EXDATE", span("20260506T000000Z", "20260507T000000Z")), False),
        (prop("X-WHEN", span("20260401T000000Z", "20260402T000000Z")), True),
        ('<c:comp-filter name="VALARM"/>', True),
        (f'<c:comp-filter name="VALARM">{NONE}</c:comp-filter>', False),
        (f'<c:comp-filter name="VALARM">{prop("ACTION", text("display"))}</c:comp-filter>', True),
        (f'<c:comp-filter name="VALARM">{prop("ACTION", text("audio"))}</c:comp-filter>', False),
        (f'<c:comp-filter name="PARTICIPANT">{NONE}</c:comp-filter>', True),
    ],
)
def test_conditions_on_one_event(inner: str, *, expected: bool) -> None:
    assert matches(below(inner), MEETING) is expected


@pytest.mark.spec("RFC 4791 §9.7.1")
def test_conditions_on_the_calendar_and_on_absent_components() -> None:
    assert matches('<c:comp-filter name="VCALENDAR"/>', MEETING)
    assert not matches(f'<c:comp-filter name="VCALENDAR">{NONE}</c:comp-filter>', MEETING)
    assert matches(f'<c:comp-filter name="vcalendar">{prop("VERSION", text("2.0"))}</c:comp-filter>', MEETING)
    assert not matches(f'<c:comp-filter name="VCALENDAR">{prop("METHOD")}</c:comp-filter>', MEETING)
    assert matches(below(NONE, "VTODO"), MEETING)
    assert not matches(below(NONE), MEETING)
    assert not matches(below("", "VTIMEZONE"), MEETING)
    zoned = MEETING.replace("BEGIN:VEVENT", VTIMEZONE + "BEGIN:VEVENT", 1)
    assert matches(below("", "VTIMEZONE"), zoned)
    assert matches(below('<c:comp-filter name="STANDARD"/>', "VTIMEZONE"), zoned)
    both = '<c:comp-filter name="VEVENT"/>' + f'<c:comp-filter name="VTODO">{NONE}</c:comp-filter>'
    assert matches(f'<c:comp-filter name="VCALENDAR">{both}</c:comp-filter>', MEETING)


# -- one instance -----------------------------------------------------------------------------------

SERIES = calendar(
    component(
        "VEVENT", "s", "DTSTART:20260504T100000Z", "DURATION:PT1H", "RRULE:FREQ=DAILY", "SUMMARY:usual"
    ),
    component(
        "VEVENT",
        "s",
        "RECURRENCE-ID:20260506T100000Z",
        "DTSTART:20260520T180000Z",
        "DURATION:PT1H",
        "SUMMARY:moved",
        "LOCATION:elsewhere",
    ),
)


@pytest.mark.spec("RFC 4791 §9.7.1")
@pytest.mark.parametrize(
    ("start", "end", "summary", "expected"),
    [
        ("20260505T000000Z", "20260506T000000Z", "usual", True),
        ("20260505T000000Z", "20260506T000000Z", "moved", False),
        ("20260506T000000Z", "20260507T000000Z", "usual", False),
        ("20260506T000000Z", "20260507T000000Z", "moved", False),
        ("20260520T170000Z", "20260520T200000Z", "moved", True),
        ("20260520T170000Z", "20260520T200000Z", "usual", False),
        ("20260520T000000Z", "20260521T000000Z", "usual", True),
    ],
)
def test_range_and_properties_are_asked_of_the_same_instance(
    start: str, end: str, summary: str, *, expected: bool
) -> None:
    assert matches(below(span(start, end) + prop("SUMMARY", text(summary))), SERIES) is expected


def test_properties_without_a_range_are_asked_of_one_component() -> None:
    assert matches(below(prop("SUMMARY", text("moved")) + prop("LOCATION")), SERIES)
    assert not matches(below(prop("SUMMARY", text("usual")) + prop("LOCATION")), SERIES)
    assert matches(below(prop("LOCATION", NONE)), SERIES)


# -- time ranges ------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 4791 §9.9")
@pytest.mark.parametrize(
    ("lines", "start", "end", "expected"),
    [
        # the table of VTODO, row by row
        (["DTSTART:20260510T100000Z", "DURATION:PT1H"], "20260510T110000Z", "20260510T120000Z", True),
        (["DTSTART:20260510T100000Z", "DURATION:PT1H"], "20260510T110001Z", "20260510T120000Z", False),
        (["DTSTART:20260510T100000Z", "DURATION:PT1H"], "20260510T090000Z", "20260510T100000Z", False),
        (["DTSTART:20260510T100000Z", "DUE:20260510T110000Z"], "20260510T105959Z", "20260510T120000Z", True),
        (["DTSTART:20260510T100000Z", "DUE:20260510T110000Z"], "20260510T110000Z", "20260510T120000Z", False),
        (["DTSTART:20260510T100000Z", "DUE:20260510T110000Z"], "20260510T090000Z", "20260510T100000Z", False),
        (["DTSTART:20260510T100000Z"], "20260510T100000Z", "20260510T100001Z", True),
        (["DTSTART:20260510T100000Z"], "20260510T090000Z", "20260510T100000Z", False),
        (["DUE:20260510T100000Z"], "20260510T090000Z", "20260510T100000Z", True),
        (["DUE:20260510T100000Z"], "20260510T100000Z", "20260510T110000Z", False),
        (
            ["COMPLETED:20260520T100000Z", "CREATED:20260518T100000Z"],
            "20260519T000000Z",
            "20260519T010000Z",
            True,
        ),
        (
            ["COMPLETED:20260520T100000Z", "CREATED:20260518T100000Z"],
            "20260520T100000Z",
            "20260521T000000Z",
            True,
        ),
        (
            ["COMPLETED:20260520T100000Z", "CREATED:20260518T100000Z"],
            "20260520T100001Z",
            "20260521T000000Z",
            False,
        ),
        (
            ["COMPLETED:20260520T100000Z", "CREATED:20260518T100000Z"],
            "20260517T000000Z",
            "20260518T095959Z",
            False,
        ),
        (["COMPLETED:20260520T100000Z"], "20260520T100000Z", "20260520T110000Z", True),
        (["COMPLETED:20260520T100000Z"], "20260520T090000Z", "20260520T100000Z", True),
        (["COMPLETED:20260520T100000Z"], "20260520T100001Z", "20260520T110000Z", False),
        (["CREATED:20260518T100000Z"], "20270101T000000Z", "20270102T000000Z", True),
        (["CREATED:20260518T100000Z"], "20260518T090000Z", "20260518T100000Z", False),
        ([], "19700101T000000Z", "19700102T000000Z", True),
    ],
)
def test_tasks_in_a_range(lines: list[str], start: str, end: str, *, expected: bool) -> None:
    content = calendar(component("VTODO", "t", *lines))
    assert matches(below(span(start, end), "VTODO"), content) is expected


def alarm(trigger: str, *lines: str) -> tuple[str, ...]:
    return ("BEGIN:VALARM", "ACTION:DISPLAY", "DESCRIPTION:x", f"TRIGGER{trigger}", *lines, "END:VALARM")


@pytest.mark.spec("RFC 4791 §9.9")
@pytest.mark.parametrize(
    ("lines", "start", "end", "expected"),
    [
        (alarm(":-P60D"), "20260302T095900Z", "20260302T100100Z", True),
        (alarm(":-P60D"), "20260430T000000Z", "20260503T000000Z", False),
        (alarm(":P90D"), "20260730T095900Z", "20260730T100100Z", True),
        (alarm(";RELATED=END:PT0S"), "20260501T110000Z", "20260501T110001Z", True),
        (alarm(";VALUE=DATE-TIME:20250101T000000Z"), "20250101T000000Z", "20250101T000001Z", True),
        (alarm(":-PT1H", "REPEAT:2", "DURATION:PT20M"), "20260501T093900Z", "20260501T094100Z", True),
        (alarm(":-PT1H", "REPEAT:2", "DURATION:PT20M"), "20260501T094100Z", "20260501T100000Z", False),
        ((*alarm(":-PT1H"), "RRULE:FREQ=YEARLY"), "20300501T090000Z", "20300501T090001Z", True),
    ],
)
def test_alarms_in_a_range(lines: tuple[str, ...], start: str, end: str, *, expected: bool) -> None:
    content = event("a", "DURATION:PT1H", *lines)
    ringing = f'<c:comp-filter name="VALARM">{span(start, end)}</c:comp-filter>'
    assert matches(below(ringing), content) is expected


def test_an_alarm_belongs_to_the_instance_that_has_it() -> None:
    content = calendar(
        component("VEVENT", "s", "DTSTART:20260504T100000Z", "RRULE:FREQ=DAILY"),
        component(
            "VEVENT", "s", "RECURRENCE-ID:20260506T100000Z", "DTSTART:20260506T120000Z", *alarm(":-PT5M")
        ),
    )
    ringing = '<c:comp-filter name="VALARM">{}</c:comp-filter>'
    assert matches(below(ringing.format(span("20260506T115500Z", "20260506T115501Z"))), content)
    assert not matches(below(ringing.format(span("20260505T000000Z", "20260506T000000Z"))), content)


def test_alarms_of_many_overrides_are_followed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [
        component(
            "VEVENT",
            "s",
            f"RECURRENCE-ID:202605{day:02}T100000Z",
            f"DTSTART:202605{day:02}T120000Z",
            *alarm(":-PT5M"),
        )
        for day in range(5, 30)
    ]
    master = component("VEVENT", "s", "DTSTART:20260504T100000Z", "RRULE:FREQ=DAILY")
    calls = []
    real = recurrence.alarms
    monkeypatch.setattr(recurrence, "alarms", lambda *a, **k: calls.append(1) or real(*a, **k))
    ringing = f'<c:comp-filter name="VALARM">{span("20300101T000000Z", "20300201T000000Z")}</c:comp-filter>'
    assert not matches(below(ringing), calendar(master, *overrides))
    assert len(calls) == 1


def test_several_ranges_share_one_budget() -> None:
    content = event("s", "RRULE:FREQ=SECONDLY", "DURATION:PT1S", "SUMMARY:x")
    never = prop("SUMMARY", text("never"))
    one = comp(span("20260601T000000Z", "20260602T000000Z") + never)
    found = ical.check_object(ical.parse(content.encode()))
    reached = []
    for count in (1, 30):
        wanted = parse(f'<c:comp-filter name="VCALENDAR">{one * count}</c:comp-filter>')
        with pytest.raises(recurrence.TooManySteps) as stopped:
            filters.matches_calendar(wanted, found, UTC, recurrence.Budget(60_000, 1_000_000))
        reached.append(stopped.value.complete_until or 0)
    assert reached[1] < reached[0]


# -- contacts ---------------------------------------------------------------------------------------


def card_filter(inner: str, test: str = "") -> filters.CardFilter:
    chosen = f' test="{test}"' if test else ""
    return filters.parse_card_filter(
        xml.parse(f"<card:filter{xml.NAMESPACES}{chosen}>{inner}</card:filter>".encode())
    )


def asks(name: str, *inner: str, test: str = "") -> str:
    chosen = f' test="{test}"' if test else ""
    return f'<card:prop-filter name="{name}"{chosen}>{"".join(inner)}</card:prop-filter>'.replace(
        "c:", "card:"
    )


PERSON = card(
    "p",
    "Émile Zola",
    "N:Zola;Émile;;;",
    "EMAIL;TYPE=work:emile@example.org",
    "EMAIL;TYPE=home:zola@example.com",
    "item1.TEL;TYPE=cell,voice:+33 1 23",
    "item1.X-ABLABEL:Phone",
    "item2.TEL:+49 9",
    "NOTE:two\\nlines",
)


@pytest.mark.spec("RFC 6352 §10.5")
@pytest.mark.parametrize(
    ("inner", "test", "expected"),
    [
        ("", "", True),
        ("", "allof", True),
        (asks("FN"), "", True),
        (asks("NICKNAME"), "", False),
        (asks("NICKNAME", NONE), "", True),
        (asks("FN", NONE), "", False),
        (asks("FN", text("ÉMILE")), "", True),
        (asks("FN", text("e\u0301mile")), "", True),
        (asks("FN", text("ÉMILE", collation="i;ascii-casemap")), "", True),
        (asks("FN", text("éMILE", collation="i;ascii-casemap")), "", False),
        (asks("FN", text("émile", collation="i;octet")), "", False),
        (asks("FN", text("émile", match_type="starts-with")), "", True),
        (asks("FN", text("zola", match_type="starts-with")), "", False),
        (asks("FN", text("zola", match_type="ends-with")), "", True),
        (asks("FN", text("émile", match_type="ends-with")), "", False),
        (asks("FN", text("émile zola", match_type="equals")), "", True),
        (asks("FN", text("émile", match_type="equals")), "", False),
        (asks("FN", text("émile", match_type="contains", negate_condition="yes")), "", False),
        (asks("FN", text("x", negate_condition="yes")), "", True),
        (asks("FN", text("x"), text("zola")), "", True),
        (asks("FN", text("x"), text("zola"), test="anyof"), "", True),
        (asks("FN", text("x"), text("zola"), test="allof"), "", False),
        (asks("FN", text("émile"), text("zola"), test="allof"), "", True),
        # both of one property, not one of each
        (asks("EMAIL", text("emile"), text("example.com"), test="allof"), "", False),
        (asks("EMAIL", text("zola"), text("example.com"), test="allof"), "", True),
        (asks("EMAIL", text("zola"), param("TYPE", text("home")), test="allof"), "", True),
        (asks("EMAIL", text("zola"), param("TYPE", text("work")), test="allof"), "", False),
        (asks("EMAIL", text("nobody"), param("TYPE", text("work")), test="anyof"), "", True),
        (asks("EMAIL", param("TYPE", NONE)), "", False),
        (asks("TEL", param("TYPE", NONE)), "", True),
        (asks("TEL", param("TYPE", text("VOICE", match_type="equals"))), "", True),
        (asks("TEL", text("+49")), "", True),
        (asks("item1.TEL", text("+49")), "", False),
        (asks("ITEM2.TEL", text("+49")), "", True),
        (asks("item3.TEL"), "", False),
        (asks("item3.TEL", NONE), "", True),
        (asks("NOTE", text("two\nlines")), "", True),
        (asks("N", text("zola;émile")), "", True),
        (asks("FN", text("x")) + asks("EMAIL", text("zola")), "", True),
        (asks("FN", text("x")) + asks("EMAIL", text("zola")), "anyof", True),
        (asks("FN", text("x")) + asks("EMAIL", text("zola")), "allof", False),
        (asks("FN", text("émile")) + asks("EMAIL", text("zola")), "allof", True),
    ],
)
def test_contacts(inner: str, test: str, *, expected: bool) -> None:
    wanted = card_filter(inner, test)
    found = vcard.parse(PERSON.encode())
    assert filters.matches_card(wanted, found) is expected
    assert filters.may_match(wanted, filters.folded(found)) or not expected


@pytest.mark.spec("RFC 6352 §8.6")
@pytest.mark.parametrize(
    ("inner", "test"),
    [
        ("<card:prop-filter/>", ""),
        (asks("FN"), "both"),
        (asks("FN", text("a"), test="both"), ""),
        (asks("FN", text("a", match_type="like")), ""),
        (asks("FN", NONE, text("a")), ""),
        (asks("FN", "<c:time-range/>"), ""),
        ("<card:comp-filter name='VCARD'/>", ""),
        (
            asks(
                "FN",
                param(
                    "TYPE",
                    text("a"),
                )
                + "<card:nonsense/>",
            ),
            "",
        ),
    ],
)
def test_what_is_no_filter_of_contacts_is_refused_as_such(inner: str, test: str) -> None:
    with pytest.raises(Forbidden) as refused:
        card_filter(inner, test)
    assert refused.value.precondition == CARDDAV + "supported-filter"


COLLATIONS = st.sampled_from(["i;octet", "i;ascii-casemap", "i;unicode-casemap"])
TRICKY = st.text(
    st.one_of(
        st.sampled_from("aAbBßẞıİiIſsÅåÅéÉ\u0301\u0323\u0307ﬁΣσςµμ;,\\ \n:"),
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"),
    ),
    max_size=12,
)


@pytest.mark.spec("RFC 5051 §2")
@settings(deadline=None)
@given(TRICKY, TRICKY, TRICKY)
def test_what_is_part_of_a_text_is_part_of_it_in_every_collation(before: str, part: str, after: str) -> None:
    for collation in ("i;octet", "i;ascii-casemap", "i;unicode-casemap"):
        whole = filters.fold(before + part + after, collation)
        assert filters.fold(part, collation) in whole
        assert filters.fold(whole, collation) == whole
    assert filters.fold(part.upper(), "i;unicode-casemap") == filters.fold(part, "i;unicode-casemap") or any(
        len(character.upper()) != 1 for character in part
    )
    composed = unicodedata.normalize("NFC", part)
    if unicodedata.normalize("NFD", part) == unicodedata.normalize("NFKD", part) == part:
        assert filters.fold(composed, "i;unicode-casemap") == filters.fold(part, "i;unicode-casemap")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_prefilter_never_loses_a_contact(data: st.DataObject) -> None:
    names = st.sampled_from(["FN", "N", "EMAIL", "TEL", "NICKNAME", "ORG", "NOTE"])
    lines = data.draw(st.lists(st.tuples(names, TRICKY), max_size=4))
    written = [f"{name}:{ical.escape(value)}" for name, value in lines]
    fn = data.draw(TRICKY)
    found = vcard.parse(card("u", ical.escape(fn), *written).encode())
    values = [fn, *(value for _, value in lines)]

    def condition() -> filters.TextMatch:
        value = data.draw(st.sampled_from(values))
        low = data.draw(st.integers(0, len(value)))
        part = value[low : data.draw(st.integers(low, len(value)))]
        part = data.draw(st.sampled_from([part, part.swapcase(), part.upper(), data.draw(TRICKY)]))
        collation = data.draw(COLLATIONS)
        kind = data.draw(st.sampled_from(["contains", "equals", "starts-with", "ends-with"]))
        return filters.TextMatch(filters.fold(part, collation), collation, data.draw(st.booleans()), kind)

    props = tuple(
        filters.PropFilter(
            data.draw(names),
            False,
            None,
            tuple(condition() for _ in range(data.draw(st.integers(0, 2)))),
            (),
            data.draw(st.booleans()),
        )
        for _ in range(data.draw(st.integers(0, 3)))
    )
    wanted = filters.CardFilter(data.draw(st.booleans()), props)
    if filters.matches_card(wanted, found):
        assert filters.may_match(wanted, filters.folded(found))


def test_the_prefilter_rules_out_what_it_can_and_nothing_of_a_large_card() -> None:
    person = vcard.parse(PERSON.encode())
    wanted = card_filter(asks("FN", text("nobody")))
    assert not filters.may_match(wanted, filters.folded(person))
    assert filters.may_match(card_filter(asks("item1.TEL", text("nobody"))), filters.folded(person))
    large = vcard.parse(card("l", "x" * 3000).encode())
    assert filters.folded(large) == ""
    assert filters.may_match(wanted, "")
