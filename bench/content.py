"""Events of the shape that real calendars hold: about 900 bytes, time zone, 30 % recurring, 60 % with alarm."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import sqlalchemy as sa

from bench.measure import Connection
from ksync_server.dav import collections, objects
from ksync_server.dav.places import Kind
from ksync_server.settings import Settings
from ksync_server.store import tables as t
from ksync_server.store.blobs import staged_bytes
from ksync_server.store.database import Database, Write

_ACCOUNT = sa.select(t.account.c.id).where(t.account.c.sync_id == sa.bindparam("sync_id"))
_FILLED_AT_ONCE = 250  # in one transaction

ZONE = (
    "BEGIN:VTIMEZONE\r\nTZID:Europe/Zurich\r\nBEGIN:DAYLIGHT\r\nDTSTART:19810329T020000\r\n"
    "RRULE:FREQ=YEARLY;BYMONTH=3;BYDAY=-1SU\r\nTZOFFSETFROM:+0100\r\nTZOFFSETTO:+0200\r\nEND:DAYLIGHT\r\n"
    "BEGIN:STANDARD\r\nDTSTART:19961027T030000\r\nRRULE:FREQ=YEARLY;BYMONTH=10;BYDAY=-1SU\r\n"
    "TZOFFSETFROM:+0200\r\nTZOFFSETTO:+0100\r\nEND:STANDARD\r\nEND:VTIMEZONE\r\n"
)
HEAD = "BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:-//example.org//bench//EN\r\n"
RULES = ("FREQ=WEEKLY;BYDAY=MO,WE", "FREQ=MONTHLY;BYMONTHDAY=15", "FREQ=YEARLY", "FREQ=DAILY;COUNT=20")


def event(number: int) -> str:
    """One VEVENT component; the same number gives the same bytes."""
    month, day, hour = 1 + number % 12, 1 + number % 28, 7 + number % 12
    lines = [
        "BEGIN:VEVENT",
        f"UID:bench-{number:06}@example.org",
        "DTSTAMP:20260101T000000Z",
        f"DTSTART;TZID=Europe/Zurich:2026{month:02}{day:02}T{hour:02}0000",
        f"DTEND;TZID=Europe/Zurich:2026{month:02}{day:02}T{hour:02}4500",
        f"SUMMARY:Meeting number {number} about something of importance",
        f"LOCATION:Room {number % 40}\\, second floor",
        "DESCRIPTION:An agenda of the usual length that says who brings what and where\r\n  to find the documents",
    ]
    if number % 10 < 3:
        lines.append(f"RRULE:{RULES[number % 4]}")
    if number % 10 < 6:
        lines += ["BEGIN:VALARM", "ACTION:DISPLAY", "TRIGGER:-PT15M", "DESCRIPTION:Reminder", "END:VALARM"]
    return "".join(f"{line}\r\n" for line in [*lines, "END:VEVENT"])


def calendar_object(number: int) -> bytes:
    return f"{HEAD}{ZONE}{event(number)}END:VCALENDAR\r\n".encode()


def put_all(
    connect: Callable[[], Connection], path: Callable[[int], str], content: Callable[[int], bytes], count: int
) -> None:
    """PUT `count` resources over four connections; each must be created."""
    over = threading.Event()

    def work(first: int) -> None:
        connection = connect()
        for number in range(first, count, 4):
            if over.is_set():
                break
            kind = {"Content-Type": "text/calendar" if path(number).endswith(".ics") else "text/plain"}
            status, body = connection.send(connection.prepare("PUT", path(number), content(number), kind))
            if status != 201:
                raise RuntimeError(f"PUT {path(number)}: {status} {body[:200]!r}")
        connection.close()

    with ThreadPoolExecutor(4) as pool:
        try:
            for job in [pool.submit(work, first) for first in range(4)]:
                job.result()
        finally:
            over.set()  # one that failed, or a signal, ends all


def fill_calendar(settings: Settings, path: str, count: int) -> None:
    """Store `count` events in a calendar of a running server, as its PUT stores them, hundreds at a time.

    Args:
        settings: of the server; its database is opened beside it.
        path: of the calendar, /calendars/<sync id>/<name>/.
    """
    _, _, sync_id, name, _ = path.split("/")
    database = Database(settings.database, threads=2)
    try:
        account_id = database.fast(_ACCOUNT, {"sync_id": sync_id})[0][0]
        for first in range(0, count, _FILLED_AT_ONCE):
            numbers = range(first, min(first + _FILLED_AT_ONCE, count))
            database.write(lambda tx, numbers=numbers: _fill(tx, settings, account_id, name, path, numbers))  # type: ignore[misc]
    finally:
        database.close()


def _fill(
    tx: Write, settings: Settings, account_id: int, name: str, path: str, numbers: Iterable[int]
) -> None:
    for number in numbers:
        content = calendar_object(number)
        objects.put(
            tx,
            collections.lock(tx, account_id, Kind.CALENDAR, name),
            f"bench-{number:06}.ics",
            objects.prepare(Kind.CALENDAR, content, datetime.UTC, settings.dav),
            staged_bytes(content),
            href=path,
            limit=settings.dav.max_objects,
            now=int(time.time()),
        )
