"""GET, HEAD, PUT and DELETE of objects: the client's bytes, strong ETags, every precondition."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from ksync_server.dav.places import Kind
from ksync_server.store import tables as t
from tests.dav.harness import Client, Store, calendar, card, component, event

C = "{urn:ietf:params:xml:ns:caldav}"
A = "{urn:ietf:params:xml:ns:carddav}"


def refs(store: Store) -> int:
    rows = store.database.fast(sa.select(sa.func.coalesce(sa.func.sum(t.blob.c.refs), 0)))
    return int(rows[0][0])


@pytest.mark.spec("RFC 4791 §5.3.4")
@pytest.mark.parametrize("size", [0, 20_000, 300_000])
def test_the_bytes_a_client_stores_are_the_bytes_returned(client: Client, size: int) -> None:
    text = event(
        "exact",
        'X-APPLE-STRUCTURED-LOCATION;VALUE=URI;X-ADDRESS="Rue 1, Genève":geo:46.204400,6.143200',
        "SUMMARY:folded text that goes on and on until it is longer than seventy-five\r\n  octets",
        "x-lower-case:kept" + "y" * size,
    ).replace("\r\nDTSTAMP", "\nDTSTAMP")
    path = client.make() + "exact.ics"
    put = client.put(path, text)
    assert put.status == 201
    got = client.send("GET", path)
    assert (got.status, got.body) == (200, text.encode())
    assert got.etag == put.etag
    assert got.etag.startswith('"')
    assert got.headers["content-type"] == "text/calendar; charset=utf-8; component=vevent"
    assert got.headers["x-content-type-options"] == "nosniff"
    head = client.send("HEAD", path)
    assert (head.status, head.body) == (200, b"")
    assert head.headers == got.headers
    assert int(head.headers["content-length"]) == len(text.encode())


def test_a_card_comes_back_and_vcard_4_is_kept(client: Client) -> None:
    book = client.make(Kind.ADDRESSBOOK)
    for version in ("3.0", "4.0"):
        text = card(
            f"u{version}", "Zoë", "item1.ADR;type=WORK;type=pref:;;Rue 1;Genève;;1204;", version=version
        )
        assert client.put(f"{book}{version}.vcf", text).status == 201
        got = client.send("GET", f"{book}{version}.vcf")
        assert got.body == text.encode()
        assert got.headers["content-type"] == "text/vcard; charset=utf-8"


def test_a_chunked_body_is_stored(client: Client) -> None:
    path = client.make() + "chunked.ics"
    text = event("chunked", "DESCRIPTION:" + "x" * 200_000)
    assert client.send("PUT", path, text, chunked=True).status == 201
    assert client.send("GET", path).body == text.encode()


@pytest.mark.spec("RFC 9110 §13.1")
def test_conditions_of_objects(client: Client) -> None:
    path = client.make() + "one.ics"
    first = client.put(path, event("one"), if_none_match="*").etag
    assert client.put(path, event("one"), if_none_match="*").status == 412
    assert client.put(path, event("one"), if_match='"other"').status == 412
    assert client.put(path + "2", event("two"), if_match=first).status == 412
    changed = client.put(path, event("one", "SUMMARY:x"), if_match=f'"other", {first}')
    assert changed.status == 204
    assert changed.etag != first
    assert client.put(path, event("one"), **{"if": f"([{first}])"}).status == 412
    assert client.send("DELETE", path, if_match=first).status == 412
    assert client.send("GET", path, if_none_match=changed.etag).status == 304
    assert client.send("GET", path, if_none_match=first).status == 200
    assert client.send("DELETE", path, **{"if": f"([{changed.etag}])"}).status == 204
    assert client.send("DELETE", path).status == 404
    assert client.send("GET", path).status == 404


@pytest.mark.spec("RFC 6638 §3.2.10")
def test_a_schedule_tag_condition_is_false_where_there_are_no_tags(client: Client) -> None:
    path = client.make() + "one.ics"
    client.put(path, event("one"))
    assert client.put(path, event("one"), if_schedule_tag_match='"x"').status == 412


def test_conditions_that_fail_cost_no_body(client: Client) -> None:
    path = client.make() + "one.ics"
    client.put(path, event("one"))
    request = client.request("PUT", path, {"if-none-match": "*"}, event("one").encode())

    async def send() -> bool:
        with pytest.raises(Exception, match="If-None-Match"):
            await client.site.handle(request, client.identity)
        return request.body.started

    assert not asyncio.run(send())


EMPTY_ZONE = component("VTIMEZONE", "x").replace("UID:x", "TZID:Here")


@pytest.mark.spec("RFC 4791 §5.3.2.1")
@pytest.mark.parametrize(
    ("content", "status", "precondition"),
    [
        ("nonsense", 403, "valid-calendar-data"),
        (event("x")[:-20], 403, "valid-calendar-data"),
        (b"\xff" + event("x").encode(), 403, "valid-calendar-data"),
        (event("x", "SUMMARY:a\ufffeb"), 403, "valid-calendar-data"),
        (event("x", start="DTSTART:nonsense"), 403, "valid-calendar-data"),
        (event("x", "RRULE:FREQ=NEVER"), 403, "valid-calendar-data"),
        (calendar(), 403, "valid-calendar-object-resource"),
        (calendar(EMPTY_ZONE), 403, "valid-calendar-object-resource"),
        (
            event("x").replace("VERSION:2.0", "VERSION:2.0\r\nMETHOD:PUBLISH"),
            403,
            "valid-calendar-object-resource",
        ),
        (calendar(component("VTODO", "a"), component("VTODO", "b")), 403, "valid-calendar-object-resource"),
        (
            calendar(component("VTODO", "a"), component("VJOURNAL", "a")),
            403,
            "valid-calendar-object-resource",
        ),
        (event("\U0001f600" * 900), 403, "valid-calendar-object-resource"),
        (calendar(component("VTODO", "todo")), 403, "supported-calendar-component"),
        (event("taken"), 409, "no-uid-conflict"),
        (
            event("x", *[f"ATTENDEE:mailto:a{n}@example.org" for n in range(11)]),
            403,
            "max-attendees-per-instance",
        ),
        (event("x", "SUMMARY:" + "x" * 5000), 413, "max-resource-size"),
    ],
    ids=range(16),
)
def test_what_is_no_calendar_object_is_refused_with_its_precondition(
    make_client: Callable[..., Client], content: str | bytes, status: int, precondition: str
) -> None:
    client = make_client(max_attendees=10, max_object_bytes=4000)
    path = client.make()
    assert client.send("PROPPATCH", path).status == 400  # no body at all
    name = path.rstrip("/").rpartition("/")[2]
    client.store.database.write(
        lambda tx: tx.execute(
            sa.update(t.collection).where(t.collection.c.name == name).values(components="VEVENT")
        )
    )
    client.put(path + "taken.ics", event("taken"))
    before = refs(client.store)
    answer = client.put(path + "new.ics", content)
    assert (answer.status, answer.precondition) == (status, C + precondition)
    assert client.send("GET", path + "new.ics").status == 404
    assert refs(client.store) == before
    if precondition == "no-uid-conflict":
        assert answer.hrefs == (path + "taken.ics",)


@pytest.mark.spec("RFC 6352 §6.3.2.1")
@pytest.mark.parametrize(
    ("content", "status", "precondition"),
    [
        ("nonsense", 403, "valid-address-data"),
        (card("x", "X")[:-12], 403, "valid-address-data"),
        (card("x", "X") + card("y", "Y"), 403, "valid-address-data"),
        (card("x", "X").replace("UID:x\r\n", ""), 403, "valid-address-data"),
        (card("x", "X", version="9.0"), 403, "supported-address-data"),
        (card("taken", "X"), 409, "no-uid-conflict"),
        (card("x", "X", "NOTE:" + "x" * 5000), 413, "max-resource-size"),
    ],
    ids=range(7),
)
def test_what_is_no_card_is_refused_with_its_precondition(
    make_client: Callable[..., Client], content: str, status: int, precondition: str
) -> None:
    client = make_client(max_object_bytes=4000)
    book = client.make(Kind.ADDRESSBOOK)
    client.put(book + "taken.vcf", card("taken", "T"))
    answer = client.put(book + "new.vcf", content)
    assert (answer.status, answer.precondition) == (status, A + precondition)
    assert client.send("GET", book + "new.vcf").status == 404


def test_an_object_cannot_change_its_uid(client: Client) -> None:
    path = client.make() + "one.ics"
    client.put(path, event("one"))
    answer = client.put(path, event("other"))
    assert (answer.status, answer.precondition, answer.hrefs) == (409, C + "no-uid-conflict", (path,))
    assert b"UID:one" in client.send("GET", path).body


@pytest.mark.parametrize(
    ("header", "value", "status", "precondition"),
    [
        ("content_type", "text/plain", 403, C + "supported-calendar-data"),
        ("content_type", "text/vcard", 403, C + "supported-calendar-data"),
        ("content_encoding", "gzip", 415, None),
        ("content_range", "bytes 0-3/10", 400, None),
    ],
)
def test_other_forms_of_content_are_refused(
    client: Client, header: str, value: str, status: int, precondition: str | None
) -> None:
    answer = client.put(client.make() + "a.ics", event("a"), **{header: value})
    assert (answer.status, answer.precondition) == (status, precondition)


def test_content_without_a_declared_type_is_taken(client: Client) -> None:
    assert client.send("PUT", client.make() + "a.ics", event("a")).status == 201


def test_objects_live_in_collections_only(client: Client) -> None:
    path = client.make()
    assert client.put(path, event("a")).status == 405
    assert client.put(path + "sub/one.ics", event("a")).status == 409
    assert client.put(client.home + "none/one.ics", event("a")).status == 409
    assert client.put(client.home + "loose.ics", event("a")).status == 405
    assert client.put("/loose.ics", event("a")).status == 404
    assert client.put("/", event("a")).status == 405
    assert client.send("GET", path).status == 405
    assert client.send("GET", client.home + "none/one.ics").status == 404
    assert client.send("GET", path + "sub/one.ics").status == 404
    assert client.send("DELETE", client.home).status == 403
    assert client.send("DELETE", "/").status == 403


NAMES = [
    "a:b",
    "a'b",
    "a,b",
    "a b",
    "a@b",
    "a+b",
    "a;b",
    "a?b",
    "a#b",
    "a%b",
    "é😀",
    "a&b",
    "a/b",
    "<a>",
    'a"b',
    "~x",
]


@pytest.mark.parametrize("name", NAMES)
def test_object_names_of_all_kinds(client: Client, name: str) -> None:
    path = client.make()
    place = path + quote(f"{name}.ics", safe="")
    put = client.put(place, event("uid"))
    assert put.status == 201
    (href,) = [href for href in client.propfind(path, "{DAV:}getetag", depth="1").rows() if href != path]
    assert client.prop(href, "{DAV:}getetag").text("{DAV:}getetag") == put.etag
    inner = f"<d:prop><d:getetag/></d:prop><d:href>{href.replace('&', '&amp;')}</d:href>"
    assert list(client.report(path, "c:calendar-multiget", inner).rows()) == [href]
    assert list(client.sync(path).rows()) == [href]
    assert client.send("DELETE", href).status == 204
    assert list(client.propfind(path, "{DAV:}getetag", depth="1").rows()) == [path]


def test_a_name_of_more_than_1000_bytes_is_refused(client: Client) -> None:
    path = client.make()
    assert client.put(path + "x" * 1000, event("a")).status == 201
    assert client.put(path + "x" * 1001, event("b")).status == 414
    assert client.put(path + quote("é" * 501), event("c")).status == 414


def test_replaced_and_deleted_content_leaves_nothing_behind(client: Client) -> None:
    before = refs(client.store)
    path = client.make() + "one.ics"
    for size in (10, 200_000, 10):
        client.put(path, event("one", "DESCRIPTION:" + "x" * size))
    assert refs(client.store) == before + 1
    client.send("DELETE", path)
    assert refs(client.store) == before


def test_a_refused_large_object_leaves_no_file(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", event("taken"))
    folder = client.store.settings.blobs.path
    before = {file for file in folder.rglob("*") if file.is_file()}
    answer = client.put(path + "b.ics", event("taken", "DESCRIPTION:" + "x" * 100_000))
    assert answer.precondition == C + "no-uid-conflict"
    assert {file for file in folder.rglob("*") if file.is_file()} == before
    assert client.store.database.fast(sa.select(sa.func.count()).select_from(t.stage))[0][0] == 0


def test_a_full_collection_takes_changes_but_nothing_new(make_client: Callable[..., Client]) -> None:
    client = make_client(max_objects=2)
    path = client.make()
    assert client.put(path + "a.ics", event("a")).status == 201
    assert client.put(path + "b.ics", event("b")).status == 201
    assert client.put(path + "c.ics", event("c")).status == 507
    assert client.put(path + "b.ics", event("b", "SUMMARY:x")).status == 204
    client.send("DELETE", path + "a.ics")
    assert client.put(path + "c.ics", event("c")).status == 201


@pytest.mark.spec("RFC 9110 §13.1.2")
def test_of_many_creators_at_once_exactly_one_wins(client: Client) -> None:
    path = client.make() + "race.ics"

    async def race() -> list[int]:
        answers = await asyncio.gather(
            *(client.asend("PUT", path, event("race", f"SUMMARY:{n}"), if_none_match="*") for n in range(10))
        )
        return sorted(answer.status for answer in answers)

    assert asyncio.run(race()) == [201] + [412] * 9


def test_writers_of_one_state_at_once_lose_nothing(client: Client) -> None:
    path = client.make() + "race.ics"
    etag = client.put(path, event("race")).etag

    async def race() -> list[int]:
        answers = await asyncio.gather(
            *(client.asend("PUT", path, event("race", f"SUMMARY:{n}"), if_match=etag) for n in range(10))
        )
        return sorted(answer.status for answer in answers)

    assert asyncio.run(race()) == [204] + [412] * 9
