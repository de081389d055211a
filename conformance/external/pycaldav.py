"""python-caldav as a script of a user drives it: discovery, calendars, events, tasks, sync, free-busy."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import caldav
    from caldav.elements import dav, ical
    from caldav.lib import error

from conformance.target import Target

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own

ZURICH = ZoneInfo("Europe/Zurich")
TIMEZONE = """BEGIN:VTIMEZONE\r
TZID:Europe/Zurich\r
BEGIN:DAYLIGHT\r
DTSTART:19810329T020000\r
RRULE:FREQ=YEARLY;BYMONTH=3;BYDAY=-1SU\r
TZOFFSETFROM:+0100\r
TZOFFSETTO:+0200\r
TZNAME:CEST\r
END:DAYLIGHT\r
BEGIN:STANDARD\r
DTSTART:19961027T030000\r
RRULE:FREQ=YEARLY;BYMONTH=10;BYDAY=-1SU\r
TZOFFSETFROM:+0200\r
TZOFFSETTO:+0100\r
TZNAME:CET\r
END:STANDARD\r
END:VTIMEZONE\r
"""


def ics(*components: str, timezone: bool = False) -> str:
    head = "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//example.org//conformance//EN\r\n"
    return head + (TIMEZONE if timezone else "") + "".join(components) + "END:VCALENDAR\r\n"


def component(kind: str, *lines: str) -> str:
    return "".join(
        f"{line}\r\n" for line in (f"BEGIN:{kind}", "DTSTAMP:20260101T000000Z", *lines, f"END:{kind}")
    )


def event(summary: str, *lines: str, uid: str = "") -> str:
    return component("VEVENT", f"UID:{uid or uuid.uuid4()}", f"SUMMARY:{summary}", *lines)


def connect(target: Target, login: str = "", password: str = "", url: str = "") -> caldav.DAVClient:
    return caldav.DAVClient(
        url=url or f"{target.sync_url}/", username=login or target.login, password=password or target.password
    )


@pytest.fixture
def principal(target: Target) -> Iterator[caldav.Principal]:
    with connect(target) as client:
        yield client.principal()


@pytest.fixture
def calendar(principal: caldav.Principal) -> Iterator[caldav.Calendar]:
    made = principal.make_calendar(name=f"made {uuid.uuid4().hex[:8]}")
    yield made
    made.delete()


def summaries(found: list[caldav.CalendarObjectResource]) -> set[str]:
    return {str(thing.component["SUMMARY"]) for thing in found}


@pytest.mark.demo
@pytest.mark.parametrize(
    "form", ["login e-mail", "sync id", "sync id in lower case", "sync id at the sync host"]
)
def test_discovery_from_the_bare_host_with_every_name_of_the_account(target: Target, form: str) -> None:
    alice = target.account("alice")
    host = urlsplit(target.sync_url).hostname or ""
    sync_id = alice["sync_id"]
    names = {"login e-mail": alice["login"], "sync id": sync_id, "sync id in lower case": sync_id.lower()}
    login = names.get(form, f"{sync_id}@{'sync.localhost' if host in ('127.0.0.1', 'localhost') else host}")
    with connect(target, login) as client:
        principal = client.principal()
        assert f"/principals/{sync_id}/" in str(principal.url)
        assert principal.calendars()
        assert all(f"/calendars/{sync_id}/" in str(calendar.url) for calendar in principal.calendars())


@pytest.mark.parametrize("path", ["/", "/.well-known/caldav"])
def test_discovery_from_each_usual_address(target: Target, path: str) -> None:
    with connect(target, url=target.sync_url + path) as client:
        assert client.principal().calendar_home_set.url


def test_a_wrong_password_is_refused(target: Target) -> None:
    with connect(target, password="not the password") as client, pytest.raises(error.AuthorizationError):
        client.principal().calendars()


def test_a_calendar_is_made_renamed_coloured_listed_and_deleted(principal: caldav.Principal) -> None:
    calendar = principal.make_calendar(
        name="Ferien & Reisen \U0001f3d6", cal_id=f"own-{uuid.uuid4().hex[:8]}"
    )
    try:
        assert calendar.get_display_name() == "Ferien & Reisen \U0001f3d6"
        calendar.set_properties([dav.DisplayName("Vacances <\u00e9t\u00e9>")])
        calendar.set_properties([ical.CalendarColor("#FF2968FF")])
        properties = calendar.get_properties([dav.DisplayName(), ical.CalendarColor()])
        assert set(properties.values()) == {"Vacances <\u00e9t\u00e9>", "#FF2968FF"}
        assert str(calendar.url) in {str(other.url) for other in principal.calendars()}
    finally:
        calendar.delete()
    assert str(calendar.url) not in {str(other.url) for other in principal.calendars()}


def test_a_calendar_for_tasks_only_says_so(principal: caldav.Principal) -> None:
    calendar = principal.make_calendar(name="tasks", supported_calendar_component_set=["VTODO"])
    try:
        assert calendar.get_supported_components() == ["VTODO"]
        calendar.save_todo(summary="allowed")
        with pytest.raises(error.DAVError):
            calendar.save_event(ics(event("refused", "DTSTART:20260501T100000Z", "DTEND:20260501T110000Z")))
    finally:
        calendar.delete()


def test_an_event_with_a_time_zone_comes_back_as_it_was_sent(calendar: caldav.Calendar) -> None:
    sent = ics(
        event(
            "Z\u00fcrich \U0001f600",
            "DTSTART;TZID=Europe/Zurich:20260701T100000",
            "DURATION:PT1H",
            uid="zone",
        ),
        timezone=True,
    )
    saved = calendar.save_event(sent)
    again = calendar.event_by_url(saved.url)
    # python-caldav puts the parts of a rule into its own order before it sends them
    assert len(again.data.split()) == len(sent.split())
    assert str(again.component["SUMMARY"]) == "Z\u00fcrich \U0001f600"
    start = again.component["DTSTART"].dt
    assert start.astimezone(UTC) == datetime(2026, 7, 1, 8, tzinfo=UTC)


def test_a_recurring_event_is_found_and_expanded(calendar: caldav.Calendar) -> None:
    weekly = event(
        "weekly",
        "DTSTART;TZID=Europe/Zurich:20260302T090000",
        "DURATION:PT1H",
        "RRULE:FREQ=WEEKLY;COUNT=10",
        "EXDATE;TZID=Europe/Zurich:20260316T090000",
        uid="weekly",
    )
    moved = event(
        "moved",
        "RECURRENCE-ID;TZID=Europe/Zurich:20260323T090000",
        "DTSTART;TZID=Europe/Zurich:20260324T150000",
        "DURATION:PT1H",
        uid="weekly",
    )
    calendar.save_event(ics(weekly, moved, timezone=True))
    window = {"start": datetime(2026, 3, 1, tzinfo=UTC), "end": datetime(2026, 4, 7, tzinfo=UTC)}
    whole = calendar.search(event=True, expand=False, **window)
    assert len(whole) == 1
    expanded = calendar.search(event=True, server_expand=True, expand=False, **window)
    starts = sorted(
        item["DTSTART"].dt for found in expanded for item in found.icalendar_instance.walk("VEVENT")
    )
    assert starts == [
        datetime(2026, 3, 2, 8, tzinfo=UTC),
        datetime(2026, 3, 9, 8, tzinfo=UTC),
        datetime(2026, 3, 24, 14, tzinfo=UTC),
        datetime(2026, 3, 30, 7, tzinfo=UTC),  # summer time began on 29 March
        datetime(2026, 4, 6, 7, tzinfo=UTC),
    ]
    after = calendar.search(
        event=True, expand=False, start=datetime(2026, 6, 1, tzinfo=UTC), end=datetime(2026, 7, 1, tzinfo=UTC)
    )
    assert after == []


def test_an_all_day_event_is_found_on_its_days_alone(calendar: caldav.Calendar) -> None:
    calendar.save_event(ics(event("two days", "DTSTART;VALUE=DATE:20260810", "DTEND;VALUE=DATE:20260812")))

    def on(day: int) -> set[str]:
        start = datetime(2026, 8, day, 10, tzinfo=UTC)
        return summaries(
            calendar.search(event=True, start=start, end=start + timedelta(hours=1), expand=False)
        )

    assert [bool(on(day)) for day in (9, 10, 11, 12)] == [False, True, True, False]
    (found,) = calendar.events()
    assert found.component["DTSTART"].dt == date(2026, 8, 10)


def test_an_event_of_200_kb_is_kept(calendar: caldav.Calendar) -> None:
    text = "\u00e9\U0001f600x" * 30_000
    folded = "\r\n ".join(f"DESCRIPTION:{text}"[start : start + 20] for start in range(0, len(text) + 12, 20))
    saved = calendar.save_event(ics(event("large", "DTSTART:20260501T100000Z", folded)))
    assert len(saved.data.encode()) > 200_000
    assert str(calendar.event_by_url(saved.url).component["DESCRIPTION"]) == text


def test_tasks_are_kept_found_and_completed(calendar: caldav.Calendar) -> None:
    task = calendar.save_todo(summary="write the report", due=datetime(2026, 5, 4, 12, tzinfo=UTC))
    calendar.save_todo(summary="another", due=datetime(2027, 5, 4, 12, tzinfo=UTC))
    assert summaries(calendar.todos()) == {"write the report", "another"}
    early = calendar.search(
        todo=True, start=datetime(2026, 5, 1, tzinfo=UTC), end=datetime(2026, 6, 1, tzinfo=UTC)
    )
    assert summaries(early) == {"write the report"}
    task.complete()
    assert summaries(calendar.todos()) == {"another"}
    assert summaries(calendar.todos(include_completed=True)) == {"write the report", "another"}


def test_journals_are_kept(calendar: caldav.Calendar) -> None:
    calendar.save_journal(summary="a day", dtstart=date(2026, 2, 3), description="what happened")
    assert summaries(calendar.journals()) == {"a day"}
    assert calendar.events() == []


def test_search_by_text_and_uid(calendar: caldav.Calendar) -> None:
    for name in ("dentist", "dental check", "Lunch"):
        calendar.save_event(ics(event(name, "DTSTART:20260501T100000Z", uid=f"uid-{name}")))
    assert summaries(calendar.search(event=True, summary="dent")) == {"dentist", "dental check"}
    assert str(calendar.event_by_uid("uid-Lunch").component["SUMMARY"]) == "Lunch"
    with pytest.raises(error.NotFoundError):
        calendar.event_by_uid("uid-nobody")


def test_sync_tokens_show_what_changed_and_nothing_else(calendar: caldav.Calendar) -> None:
    kept, changed, gone = (
        calendar.save_event(ics(event(name, "DTSTART:20260501T100000Z")))
        for name in ("kept", "changed", "gone")
    )
    mine = calendar.objects_by_sync_token(load_objects=True)
    assert summaries(list(mine)) == {"kept", "changed", "gone"}
    assert mine.sync_token
    none = calendar.objects_by_sync_token(mine.sync_token)
    assert len(list(none)) == 0
    changed.data = changed.data.replace("SUMMARY:changed", "SUMMARY:changed twice")
    changed.save()
    gone.delete()
    added = calendar.save_event(ics(event("added", "DTSTART:20260501T100000Z")))
    updated, deleted = mine.sync()
    assert {str(thing.url) for thing in updated} == {str(changed.url), str(added.url)}
    assert {str(thing.url) for thing in deleted} == {str(gone.url)}
    assert summaries(list(mine)) == {"kept", "changed twice", "added"}
    assert kept.url in mine.objects_by_url()


def test_multiget_returns_what_is_asked_for(calendar: caldav.Calendar) -> None:
    saved = [calendar.save_event(ics(event(f"number {n}", "DTSTART:20260501T100000Z"))) for n in range(5)]
    found = list(calendar.multiget([thing.url for thing in saved[:3]]))
    assert summaries(found) == {"number 0", "number 1", "number 2"}


def test_free_busy_shows_busy_times(calendar: caldav.Calendar) -> None:
    calendar.save_event(ics(event("busy", "DTSTART:20260501T100000Z", "DTEND:20260501T113000Z")))
    calendar.save_event(
        ics(event("free", "DTSTART:20260501T120000Z", "DTEND:20260501T130000Z", "TRANSP:TRANSPARENT"))
    )
    answer = calendar.freebusy_request(datetime(2026, 5, 1, tzinfo=UTC), datetime(2026, 5, 2, tzinfo=UTC))
    (found,) = answer.icalendar_instance.walk("VFREEBUSY")
    periods = found["FREEBUSY"] if isinstance(found["FREEBUSY"], list) else [found["FREEBUSY"]]
    busy = [period for one in periods for period in getattr(one, "dts", [one])]
    starts = [(p.dt if hasattr(p, "dt") else p)[0] if not hasattr(p, "start") else p.start for p in busy]
    assert starts == [datetime(2026, 5, 1, 10, tzinfo=UTC)]


def test_saving_over_a_change_of_another_program_is_refused_when_asked(
    target: Target, calendar: caldav.Calendar
) -> None:
    saved = calendar.save_event(ics(event("first", "DTSTART:20260501T100000Z")))
    with connect(target) as client:
        refused = client.put(
            str(saved.url), ics(event("second")), {"If-None-Match": "*", "Content-Type": "text/calendar"}
        )
        assert refused.status == 412


def test_deleted_events_are_gone(calendar: caldav.Calendar) -> None:
    saved = calendar.save_event(ics(event("short", "DTSTART:20260501T100000Z")))
    saved.delete()
    assert calendar.events() == []
    with pytest.raises(error.NotFoundError):
        calendar.event_by_url(saved.url)
