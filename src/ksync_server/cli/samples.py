"""What the demo's calendars, address books and drives hold at first, as requests of any client."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass

CALENDAR = (b"content-type", b"text/calendar; charset=utf-8")
CARD = (b"content-type", b"text/vcard; charset=utf-8")
PLAIN = (b"content-type", b"text/plain; charset=utf-8")
ZONE = """\
BEGIN:VTIMEZONE
TZID:Europe/Zurich
BEGIN:DAYLIGHT
TZOFFSETFROM:+0100
TZOFFSETTO:+0200
TZNAME:CEST
DTSTART:19700329T020000
RRULE:FREQ=YEARLY;BYDAY=-1SU;BYMONTH=3
END:DAYLIGHT
BEGIN:STANDARD
TZOFFSETFROM:+0200
TZOFFSETTO:+0100
TZNAME:CET
DTSTART:19701025T030000
RRULE:FREQ=YEARLY;BYDAY=-1SU;BYMONTH=10
END:STANDARD
END:VTIMEZONE
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    on_drive: bool = False


def of(name: str, sync_id: str) -> Iterator[Sample]:
    """The requests that fill the account called `name`, in order."""
    today = datetime.datetime.now(datetime.UTC).date()
    monday = today - datetime.timedelta(days=today.weekday())
    if name == "alice":
        yield from _calendar(sync_id, monday)
        yield from _cards(sync_id)
        yield from _files()
    elif name == "carol":
        yield _event(sync_id, "dentist", "Dentist", monday + datetime.timedelta(days=3), "0830", "0900")
    elif name == "dave":
        yield _file("Readme.txt", "Files up to 64 MiB fit here, without a Content-Length up to 32 MiB.\n")


def _event(
    sync_id: str, uid: str, title: str, day: datetime.date, start: str, end: str, extra: str = ""
) -> Sample:
    date = day.strftime("%Y%m%d")
    body = f"""\
BEGIN:VCALENDAR
VERSION:2.0
PRODID:-//ksync-server//demo//EN
{ZONE}BEGIN:VEVENT
UID:{uid}@demo.example.org
DTSTAMP:20260101T000000Z
DTSTART;TZID=Europe/Zurich:{date}T{start}00
DTEND;TZID=Europe/Zurich:{date}T{end}00
SUMMARY:{title}
{extra}END:VEVENT
END:VCALENDAR
"""
    return _object(f"/calendars/{sync_id}/default/{uid}.ics", body, CALENDAR)


def _object(path: str, body: str, kind: tuple[bytes, bytes]) -> Sample:
    return Sample("PUT", path, body.replace("\n", "\r\n").encode(), (kind,))


def _calendar(sync_id: str, monday: datetime.date) -> Iterator[Sample]:
    def day(number: int) -> datetime.date:
        return monday + datetime.timedelta(days=number)

    yield _event(
        sync_id,
        "standup",
        "Stand-up",
        monday,
        "0915",
        "0930",
        "RRULE:FREQ=WEEKLY;BYDAY=MO,TU,WE,TH,FR\n"
        "BEGIN:VALARM\nACTION:DISPLAY\nDESCRIPTION:Stand-up\nTRIGGER:-PT5M\nEND:VALARM\n",
    )
    yield _event(
        sync_id,
        "review",
        "Review with Bob",
        day(2),
        "1400",
        "1500",
        "LOCATION:Room Léman\nORGANIZER;CN=Alice Example:mailto:alice@example.org\n"
        "ATTENDEE;CN=Bob Example;PARTSTAT=ACCEPTED:mailto:bob@example.org\n",
    )
    yield _event(sync_id, "train", "Train to Bern 🚆", day(8), "0704", "0812")
    birthday = day(11).strftime("%Y%m%d")
    yield _object(
        f"/calendars/{sync_id}/default/birthday.ics",
        f"""\
BEGIN:VCALENDAR
VERSION:2.0
PRODID:-//ksync-server//demo//EN
BEGIN:VEVENT
UID:birthday@demo.example.org
DTSTAMP:20260101T000000Z
DTSTART;VALUE=DATE:{birthday}
RRULE:FREQ=YEARLY
SUMMARY:Zoë's birthday
TRANSP:TRANSPARENT
END:VEVENT
END:VCALENDAR
""",
        CALENDAR,
    )
    due = day(4).strftime("%Y%m%d")
    yield _object(
        f"/calendars/{sync_id}/default/offer-task.ics",
        f"""\
BEGIN:VCALENDAR
VERSION:2.0
PRODID:-//ksync-server//demo//EN
BEGIN:VTODO
UID:offer-task@demo.example.org
DTSTAMP:20260101T000000Z
SUMMARY:Send the offer to the print shop
DUE;VALUE=DATE:{due}
PRIORITY:3
STATUS:NEEDS-ACTION
END:VTODO
END:VCALENDAR
""",
        CALENDAR,
    )


def _cards(sync_id: str) -> Iterator[Sample]:
    people = (
        ("bob", "Bob", "Example", "bob@example.org", "+41 22 555 01 02", "Lakeside Studio"),
        ("zoe", "Zoë", "Müller", "zoe@example.org", "+41 31 555 03 04", "Druckerei Müller"),
        ("ngozi", "Ngozi", "Okafor", "ngozi@example.org", "+44 20 5550 0105", ""),
    )
    for uid, given, family, email, phone, company in people:
        organization = f"ORG:{company}\n" if company else ""
        yield _object(
            f"/addressbooks/{sync_id}/default/{uid}.vcf",
            f"""\
BEGIN:VCARD
VERSION:3.0
UID:{uid}@demo.example.org
FN:{given} {family}
N:{family};{given};;;
EMAIL;TYPE=INTERNET:{email}
TEL;TYPE=WORK:{phone}
{organization}END:VCARD
""",
            CARD,
        )


def _file(path: str, text: str) -> Sample:
    return Sample("PUT", "/" + path, text.encode(), (PLAIN,), on_drive=True)


def _files() -> Iterator[Sample]:
    yield Sample("MKCOL", "/Notes", on_drive=True)
    yield _file("Notes/Ideas.txt", "1. A booklet about the lake\n2. Ask Zoë for paper samples\n")
    yield _file("Common%20documents/House%20rules.txt", "Water the plants on Fridays.\n")
