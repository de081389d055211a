"""Every limit of a request, at a real socket: what just fits is taken, one more is refused."""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

from conformance.servers import Demo, demo

LIMITS = {
    "server.header_bytes": 4096,
    "server.header_timeout_s": 1.0,
    "server.idle_timeout_s": 1.0,
    "server.body_timeout_s": 1.0,
    "server.connections": 12,
    "server.workers": 1,
    "auth.password_bytes": 64,
    "xml.max_bytes": 2000,
    "xml.max_depth": 8,
    "xml.max_elements": 40,
    "xml.max_hrefs": 5,
    "dav.max_object_bytes": 4000,
    "dav.max_properties": 60,
    "dav.max_attendees": 3,
    "dav.max_timezones": 2,
    "dav.max_dates": 5,
    "dav.max_collections": 8,
    "dav.max_objects": 8,
    "dav.max_property_bytes": 300,
    "dav.recurrence_steps": 3000,
    "dav.max_instances": 50,
    "dav.max_answer_bytes": 5000,
    "dav.max_sync_rows": 3,
    "drive.max_file_bytes": 100_000,
    "drive.max_chunked_bytes": 50_000,
    "drive.max_files": 20,
    "drive.max_folder_entries": 6,
    "drive.max_name_bytes": 40,
    "drive.max_path_depth": 5,
    "drive.max_property_bytes": 300,
    "drive.max_properties": 3,
    "drive.max_locks": 2,
    "drive.transfers": 2,
}
XML = '<?xml version="1.0"?>'
DAV = 'xmlns:D="DAV:" xmlns:C="urn:ietf:params:xml:ns:caldav" xmlns:X="http://example.org/ns/"'


@dataclass
class Person:
    """Requests of one account over connections of their own."""

    server: Demo
    name: str
    numbers: Iterator[int]

    @property
    def account(self) -> Any:
        return self.server.account(self.name)

    @property
    def authorization(self) -> str:
        pair = f"{self.account['login']}:{self.account['password']}"
        return "Basic " + base64.b64encode(pair.encode()).decode()

    @property
    def place(self) -> tuple[str, int]:
        found = urlsplit(self.server.url)
        return found.hostname or "", found.port or 0

    @property
    def drive(self) -> str:
        return urlsplit(self.account["drives"][0]["url"]).path

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(*self.place, timeout=20)
        fields = {"Authorization": self.authorization, **{k.replace("_", "-"): v for k, v in headers.items()}}
        chunked = body is not None and not isinstance(body, str | bytes)
        content = body.encode() if isinstance(body, str) else body
        try:
            connection.request(method, path, content, fields, encode_chunked=chunked)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def calendar(self) -> str:
        path = f"/calendars/{self.account['sync_id']}/limits-{next(self.numbers)}/"
        assert self.ask("MKCALENDAR", path)[0] == 201
        return path

    def folder(self) -> str:
        path = f"{self.drive}limits-{next(self.numbers)}/"
        assert self.ask("MKCOL", path)[0] == 201
        return path

    def head(self, method: str, path: str, *fields: str) -> bytes:
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: localhost",
            f"Authorization: {self.authorization}",
            *fields,
        ]
        return "\r\n".join([*lines, "", ""]).encode()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.place, timeout=20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    settings = [f"{key}={value}" for key, value in LIMITS.items()]
    with demo(tmp_path_factory.mktemp("limits") / "data", settings=settings) as running:
        yield running


_numbers = itertools.count(1)


@pytest.fixture
def alice(server: Demo) -> Person:
    return Person(server, "alice", _numbers)


@pytest.fixture
def calendar(alice: Person) -> Iterator[str]:
    path = alice.calendar()
    yield path
    assert alice.ask("DELETE", path)[0] == 204


@pytest.fixture
def folder(alice: Person) -> Iterator[str]:
    path = alice.folder()
    yield path
    assert alice.ask("DELETE", path)[0] == 204


def event(uid: str, *lines: str, before: str = "") -> str:
    stamp = ["UID:" + uid, "DTSTAMP:20260101T000000Z", "DTSTART:20260101T100000Z", "DTEND:20260101T110000Z"]
    inner = "\r\n".join(["BEGIN:VEVENT", *stamp, *lines, "END:VEVENT"])
    return f"BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:x\r\n{before}{inner}\r\nEND:VCALENDAR\r\n"


def zone(name: str) -> str:
    lines = ["BEGIN:VTIMEZONE", f"TZID:{name}", "BEGIN:STANDARD", "DTSTART:19700101T000000"]
    lines += ["TZOFFSETFROM:+0100", "TZOFFSETTO:+0100", "END:STANDARD", "END:VTIMEZONE", ""]
    return "\r\n".join(lines)


# -- time and connections -------------------------------------------------------------------------


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize(
    ("head", "status"),
    [(b"GET / HTTP/1.1\r\nHost: loc", b"408"), (b"", b""), (b"GET / HTTP/1.1\r\nX: " + b"y" * 5000, b"431")],
    ids=["header_timeout_s", "no request", "header_bytes"],
)
def test_a_head_is_bounded_in_time_and_size(alice: Person, head: bytes, status: bytes) -> None:
    with alice.connect() as connection:
        connection.sendall(head)
        assert read_all(connection)[9:12] == status


def test_a_kept_connection_and_a_stalled_upload_are_ended(alice: Person) -> None:
    """idle_timeout_s, body_timeout_s"""
    with alice.connect() as idle, alice.connect() as stalled:
        idle.sendall(alice.head("OPTIONS", "/"))
        stalled.sendall(alice.head("PUT", f"{alice.drive}stalled", "Content-Length: 10") + b"12345")
        assert read_all(idle).count(b"HTTP/1.1 200 ") == 1
        assert read_all(stalled).startswith(b"HTTP/1.1 408 ")
    assert alice.ask("GET", f"{alice.drive}stalled")[0] == 404


def test_connections_over_the_cap_wait_for_their_turn(alice: Person) -> None:
    """server.connections"""
    with contextlib.ExitStack() as stack:
        for _ in range(LIMITS["server.connections"] + 5):  # type: ignore[operator]
            stack.enter_context(alice.connect())
        assert alice.ask("OPTIONS", "/")[0] == 200, "those that say nothing are ended, then it is served"


def test_transfers_of_one_account_are_bounded(alice: Person, folder: str) -> None:
    """drive.transfers: uploads and downloads together"""
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(alice.connect()) for _ in range(2)]
        for at, connection in enumerate(running):
            request = alice.head("PUT", f"{folder}{at}", "Content-Length: 20000", "Expect: 100-continue")
            connection.sendall(request)
            assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        refused, _ = alice.ask("PUT", f"{folder}more", b"x" * 20_000)
        for connection in running:
            connection.sendall(b"x" * 20_000)
            assert connection.recv(1000).startswith(b"HTTP/1.1 201 ")
    assert refused == 503
    assert alice.ask("PUT", f"{folder}more", b"x" * 20_000)[0] == 201


def test_a_password_over_the_limit_is_a_wrong_one(alice: Person) -> None:
    """auth.password_bytes"""
    token = base64.b64encode(f"{alice.account['login']}:{'x' * 65}".encode()).decode()
    connection = http.client.HTTPConnection(*alice.place, timeout=20)
    connection.request("OPTIONS", "/", headers={"Authorization": f"Basic {token}"})
    assert connection.getresponse().status == 401
    connection.close()


# -- XML ------------------------------------------------------------------------------------------


def propfind(inner: str) -> str:
    return f"{XML}<D:propfind {DAV}><D:prop>{inner}</D:prop></D:propfind>"


def nested(depth: int) -> str:
    return propfind("<X:a>" * (depth - 2) + "</X:a>" * (depth - 2))


def padded(size: int) -> str:
    plain = propfind("<D:displayname/>")
    return plain.replace("<D:prop>", "<!--" + "x" * (size - len(plain) - 7) + "--><D:prop>")


@pytest.mark.parametrize(
    ("fits", "over", "status"),
    [
        (padded(2000), padded(2001), 413),
        (nested(8), nested(9), 400),
        (propfind("<X:a/>" * 38), propfind("<X:a/>" * 39), 400),
    ],
    ids=["xml.max_bytes", "xml.max_depth", "xml.max_elements"],
)
@pytest.mark.parametrize("place", ["sync", "drive"])
def test_xml_is_bounded(alice: Person, place: str, fits: str, over: str, status: int) -> None:
    path = "/" if place == "sync" else alice.drive
    assert alice.ask("PROPFIND", path, fits, Depth="0")[0] == 207
    assert alice.ask("PROPFIND", path, over, Depth="0")[0] == status


def test_a_multiget_is_bounded(alice: Person, calendar: str) -> None:
    """xml.max_hrefs"""

    def multiget(count: int) -> int:
        hrefs = "".join(f"<D:href>{calendar}{at}.ics</D:href>" for at in range(count))
        body = f"{XML}<C:calendar-multiget {DAV}><D:prop><D:getetag/></D:prop>{hrefs}</C:calendar-multiget>"
        return alice.ask("REPORT", calendar, body, Depth="1")[0]

    assert [multiget(5), multiget(6)] == [207, 403]


# -- calendars ------------------------------------------------------------------------------------


def long(size: int) -> str:
    plain = event("long")
    return event("long", "DESCRIPTION:" + "x" * (size - len(plain) - len("DESCRIPTION:") - 2))


ATTENDEES = [f"ATTENDEE:mailto:a{at}@example.org" for at in range(4)]
OBJECTS = {
    "dav.max_object_bytes": (long(4000), long(4001)),
    "dav.max_properties": (event("p", *["X-A:1"] * 50), event("p", *["X-A:1"] * 51)),
    "dav.max_attendees": (event("a", *ATTENDEES[:3]), event("a", *ATTENDEES)),
    "dav.max_timezones": (
        event("z", before=zone("A") + zone("B")),
        event("z", before=zone("A") + zone("B") + zone("C")),
    ),
    "dav.max_dates": (
        event("d", *[f"RDATE:2026020{at}T100000Z" for at in range(1, 6)]),
        event("d", *[f"RDATE:2026020{at}T100000Z" for at in range(1, 7)]),
    ),
}


@pytest.mark.parametrize("limit", OBJECTS)
def test_an_object_is_bounded(alice: Person, calendar: str, limit: str) -> None:
    fits, over = OBJECTS[limit]
    assert alice.ask("PUT", f"{calendar}fits.ics", fits, Content_Type="text/calendar")[0] == 201
    status, text = alice.ask("PUT", f"{calendar}over.ics", over, Content_Type="text/calendar")
    assert status == (413 if limit == "dav.max_object_bytes" else 403), text
    assert "urn:ietf:params:xml:ns:caldav" in text, "a precondition says which"
    assert alice.ask("GET", f"{calendar}over.ics")[0] == 404


def test_a_collection_and_their_number_are_bounded(alice: Person, calendar: str) -> None:
    """dav.max_objects, dav.max_collections"""
    statuses = [
        alice.ask("PUT", f"{calendar}{at}.ics", event(f"n{at}"), Content_Type="text/calendar")[0]
        for at in range(9)
    ]
    assert statuses == [201] * 8 + [507]
    made = []
    while alice.ask("MKCALENDAR", path := f"/calendars/{alice.account['sync_id']}/c-{len(made)}/")[0] == 201:
        made.append(path)
        assert len(made) < LIMITS["dav.max_collections"]
    assert alice.ask("MKCALENDAR", path)[0] == 507
    for each in made:
        assert alice.ask("DELETE", each)[0] == 204


@pytest.mark.parametrize("place", ["sync", "drive"])
def test_a_dead_property_is_bounded(alice: Person, calendar: str, folder: str, place: str) -> None:
    """dav.max_property_bytes, drive.max_property_bytes, drive.max_properties"""
    path = calendar if place == "sync" else folder

    def patch(name: str, size: int) -> str:
        value = f"<D:set><D:prop><X:{name}>{'x' * size}</X:{name}></D:prop></D:set>"
        status, text = alice.ask(
            "PROPPATCH", path, f"{XML}<D:propertyupdate {DAV}>{value}</D:propertyupdate>"
        )
        assert status in (207, 403, 507), text
        return "taken" if status == 207 and " 200 " in text else "refused"

    assert [patch("a", 100), patch("a", 301)] == ["taken", "refused"]
    if place == "drive":
        assert [patch(name, 1) for name in "bcd"] == ["taken", "taken", "refused"]


def test_expansion_is_bounded_in_number_bytes_and_work(alice: Person, calendar: str) -> None:
    """dav.max_instances, dav.max_answer_bytes (checked after each object), dav.recurrence_steps"""
    series = {
        "few": ["RRULE:FREQ=DAILY;COUNT=10"],
        "many": ["RRULE:FREQ=DAILY;COUNT=51"],
        "large": ["RRULE:FREQ=DAILY;COUNT=10", "DESCRIPTION:" + "x" * 1000],
        "work": ["RRULE:FREQ=DAILY;BYDAY=MO,TU,WE,TH,FR;BYMONTH=1,2,3,4,5,6,7,8,9,10,11;COUNT=9000"],
    }
    for name, lines in series.items():
        status, text = alice.ask(
            "PUT", f"{calendar}{name}.ics", event(name, *lines), Content_Type="text/calendar"
        )
        assert status == 201, text

    def expand(*names: str, until: str = "20260401") -> tuple[int, int]:
        span = f'start="{until[:4]}0101T000000Z" end="{until}T000000Z"'
        inner = f"<D:prop><C:calendar-data><C:expand {span}/></C:calendar-data></D:prop>"
        inner += "".join(f"<D:href>{calendar}{name}.ics</D:href>" for name in names)
        body = f"{XML}<C:calendar-multiget {DAV}>{inner}</C:calendar-multiget>"
        status, text = alice.ask("REPORT", calendar, body)
        assert status == 207
        return text.count("BEGIN:VEVENT"), text.count(" 507 ")

    assert expand("few") == (10, 0)
    assert expand("many") == (0, 1)
    assert expand("large", "few") == (10, 1)
    assert expand("work", until="20260108") == (5, 0)
    assert expand("work", until="20500108") == (0, 1)


def test_a_sync_answer_is_cut_and_resumes(alice: Person, calendar: str) -> None:
    """dav.max_sync_rows"""
    for at in range(5):
        alice.ask("PUT", f"{calendar}{at}.ics", event(f"s{at}"), Content_Type="text/calendar")
    token, seen, cut = "", set(), []
    for _ in range(3):
        inner = (
            f"<D:sync-token>{token}</D:sync-token><D:sync-level>1</D:sync-level><D:prop><D:getetag/></D:prop>"
        )
        body = f"{XML}<D:sync-collection {DAV}>{inner}</D:sync-collection>"
        status, text = alice.ask("REPORT", calendar, body, Depth="0")
        assert status == 207
        token = text.rpartition("sync-token>")[0].rpartition("sync-token>")[2].partition("<")[0]
        seen |= {at for at in range(5) if f"/{at}.ics<" in text}
        cut.append(" 507 " in text)
    assert seen == set(range(5))
    assert cut == [True, False, False]


# -- drive ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "most"), [("declared", 100_000), ("chunked", 50_000)])
def test_a_file_is_bounded(alice: Person, folder: str, form: str, most: int) -> None:
    """drive.max_file_bytes, drive.max_chunked_bytes"""

    def put(name: str, size: int) -> int:
        body = bytes(size) if form == "declared" else (bytes(1000) for _ in range(size // 1000))
        extra = [b"x"] if size % 1000 and form == "chunked" else []
        return alice.ask("PUT", folder + name, body if form == "declared" else itertools.chain(body, extra))[
            0
        ]  # type: ignore[arg-type]

    assert [put("fits", most), put("over", most + 1)] == [201, 413]
    assert alice.ask("GET", f"{folder}over")[0] == 404


def test_names_and_depth_are_bounded(alice: Person, folder: str) -> None:
    """drive.max_name_bytes, drive.max_path_depth"""
    assert alice.ask("PUT", folder + "n" * 40, b"x")[0] == 201
    assert alice.ask("PUT", folder + "n" * 41, b"x")[0] == 414
    statuses, path = [], folder
    for _ in range(8):
        path += "d/"
        statuses.append(alice.ask("MKCOL", path)[0])
        if statuses[-1] != 201:
            break
    assert statuses[-1] == 414
    assert 1 < len(statuses) <= 6


def test_a_folder_a_drive_and_locks_are_bounded(server: Demo) -> None:
    """drive.max_folder_entries, drive.max_files (folders and deleted items count), drive.max_locks"""
    dave = Person(server, "dave", _numbers)
    folder = dave.folder()
    assert [dave.ask("PUT", f"{folder}{at}", b"x")[0] for at in range(7)] == [201] * 6 + [507]
    lock = f"{XML}<D:lockinfo {DAV}><D:lockscope><D:exclusive/></D:lockscope>"
    lock += "<D:locktype><D:write/></D:locktype></D:lockinfo>"
    assert [dave.ask("LOCK", f"{folder}{at}", lock)[0] for at in range(3)] == [200, 200, 507]
    statuses = []
    while 507 not in statuses:
        inner = f"{dave.drive}more-{len(statuses)}/"
        statuses.append(dave.ask("MKCOL", inner)[0])
        if statuses[-1] == 201:
            statuses += [dave.ask("PUT", f"{inner}{name}", b"x")[0] for name in range(5)]
        assert len(statuses) <= LIMITS["drive.max_files"]
    assert set(statuses) == {201, 507}
