"""PROPFIND: what each resource says of itself, and listings of any size."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable
from dataclasses import replace

import pytest
import sqlalchemy as sa

from ksync_server.dav import collections
from ksync_server.dav.places import Kind
from ksync_server.store import tables as t
from tests.dav.harness import Client, calendar, card, event

D = "{DAV:}"
C = "{urn:ietf:params:xml:ns:caldav}"
A = "{urn:ietf:params:xml:ns:carddav}"
CS = "{http://calendarserver.org/ns/}"
I = "{http://apple.com/ns/ical/}"  # noqa: E741
X = "{http://example.org/ns/}"


def href(client: Client, path: str, name: str) -> str:
    element = client.prop(path, name).found[name].find(D + "href")
    assert element is not None
    return element.text


@pytest.mark.spec("RFC 5397 §3")
@pytest.mark.spec("RFC 6764 §6")
def test_from_the_root_a_client_finds_principal_and_homes(client: Client) -> None:
    assert href(client, "/", D + "current-user-principal") == client.principal
    assert href(client, client.principal, C + "calendar-home-set") == client.home
    assert href(client, client.principal, A + "addressbook-home-set") == client.books
    assert href(client, client.principal, D + "principal-URL") == client.principal
    assert href(client, "/", D + "principal-collection-set") == "/principals/"
    for path in ("/principals/", client.home, client.books, client.make()):
        assert href(client, path, D + "current-user-principal") == client.principal


def test_hrefs_keep_the_prefix_that_the_client_used(make_client: Callable[..., Client]) -> None:
    client = make_client(base="/sync")
    assert href(client, "/sync/", D + "current-user-principal") == client.principal
    assert client.principal.startswith("/sync/principals/")


@pytest.mark.spec("RFC 3744 §4")
@pytest.mark.spec("RFC 4791 §6.2.1")
def test_the_principal_names_its_addresses(client: Client) -> None:
    names = (C + "calendar-user-address-set", CS + "email-address-set", D + "displayname", D + "resourcetype")
    row = client.prop(client.principal, *names, D + "group-membership", D + "resource-id", D + "owner")
    assert row.refused == {}
    addresses = {element.text for element in row.found[names[0]].elements()}
    assert addresses == {f"mailto:{client.identity.login_email}", client.principal}
    assert row.text(D + "displayname") == "Alice"
    assert row.found[D + "resourcetype"].find(D + "principal")


def test_any_case_of_the_sync_id_is_taken_and_upper_case_answered(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", event("a"))
    lower = path.replace(client.identity.sync_id, client.identity.sync_id.lower())
    assert set(client.propfind(lower, D + "getetag", depth="1").rows()) == {path, path + "a.ics"}
    assert set(client.sync(lower).rows()) == {path + "a.ics"}
    assert client.send("GET", lower + "a.ics").status == 200
    assert list(client.propfind(client.home.lower().replace("/calendars", "/calendars")).rows()) == [
        client.home
    ]


def test_homes_of_others_answer_like_homes_that_are_not_there(make_client: Callable[..., Client]) -> None:
    alice, bob = make_client("alice"), make_client("bob")
    theirs = bob.make()
    bob.put(theirs + "a.ics", event("a"))
    for path, nowhere in (
        (bob.home, "/calendars/ZZ99999/"),
        (theirs, "/calendars/ZZ99999/x/"),
        (theirs + "a.ics", "/calendars/ZZ99999/x/a.ics"),
        (bob.principal, "/principals/ZZ99999/"),
    ):
        for method in (
            "PROPFIND",
            "GET",
            "PUT",
            "DELETE",
            "OPTIONS",
            "MKCALENDAR",
            "REPORT",
            "PROPPATCH",
            "MOVE",
        ):
            body = (
                "<d:propertyupdate xmlns:d='DAV:'><d:set><d:prop><d:x/></d:prop></d:set></d:propertyupdate>"
            )
            sent = {"PROPPATCH": body, "REPORT": "<d:x xmlns:d='DAV:'/>"}.get(method, "")
            headers = {"depth": "0"} if method == "PROPFIND" else {}
            assert alice.send(method, path, sent, **headers) == alice.send(method, nowhere, sent, **headers)
            assert alice.send(method, path, sent, **headers).status == 404


def test_the_tree_lists_to_the_homes(client: Client) -> None:
    assert set(client.propfind("/", depth="1").rows()) == {
        "/",
        "/principals/",
        "/calendars/",
        "/addressbooks/",
    }
    assert set(client.propfind("/principals/", depth="1").rows()) == {"/principals/", client.principal}
    assert set(client.propfind("/calendars/", depth="1").rows()) == {"/calendars/", client.home}
    assert set(client.propfind(client.principal, depth="1").rows()) == {client.principal}
    assert client.propfind("/nothing/").status == 404
    assert client.propfind(client.principal + "x/").status == 404
    assert client.propfind(client.make() + "a/b").status == 404


# -- collections --------------------------------------------------------------------------------------


def reports(client: Client, path: str) -> set[str]:
    return {
        e.tag for e in client.prop(path, D + "supported-report-set").found[D + "supported-report-set"].walk()
    }


@pytest.mark.spec("RFC 4791 §5.2")
def test_properties_of_a_calendar(client: Client) -> None:
    path = client.make()
    names = (
        *(
            D + name
            for name in ("resourcetype", "owner", "current-user-privilege-set", "sync-token", "resource-id")
        ),
        *(C + f"supported-{name}" for name in ("calendar-component-set", "calendar-data", "collation-set")),
        *(
            C + name
            for name in ("max-resource-size", "min-date-time", "max-date-time", "max-attendees-per-instance")
        ),
        *(CS + "getctag", D + "creationdate", C + "schedule-calendar-transp"),
    )
    row = client.prop(path, *names)
    assert row.refused == {}
    assert {e.tag for e in row.found[D + "resourcetype"].elements()} == {D + "collection", C + "calendar"}
    assert {e.get("name") for e in row.found[names[5]].elements()} >= {"VEVENT", "VTODO", "VJOURNAL"}
    assert {e.text for e in row.found[names[7]].elements()} == {
        "i;ascii-casemap",
        "i;octet",
        "i;unicode-casemap",
    }
    privileges = {e.tag for e in row.found[D + "current-user-privilege-set"].walk()}
    assert privileges >= {D + name for name in ("read", "write", "bind", "unbind")} | {C + "read-free-busy"}
    assert row.text(D + "sync-token") == client.sync(path).token
    assert {
        C + "calendar-query",
        C + "calendar-multiget",
        C + "free-busy-query",
        D + "sync-collection",
    } <= reports(client, path)


@pytest.mark.spec("RFC 6352 §6.2")
def test_properties_of_an_address_book(client: Client) -> None:
    path = client.make(Kind.ADDRESSBOOK)
    names = (A + "supported-address-data", A + "max-resource-size", A + "supported-collation-set")
    row = client.prop(path, *names, D + "resourcetype", CS + "getctag", D + "sync-token")
    assert row.refused == {}
    assert {e.tag for e in row.found[D + "resourcetype"].elements()} == {D + "collection", A + "addressbook"}
    versions = [(e.get("content-type"), e.get("version")) for e in row.found[names[0]].elements()]
    assert versions == [("text/vcard", "3.0")]
    assert {A + "addressbook-query", A + "addressbook-multiget", D + "sync-collection"} <= reports(
        client, path
    )
    assert C + "calendar-query" not in reports(client, path)


def test_homes_say_that_collections_can_be_made(client: Client) -> None:
    for path in (client.home, client.books):
        row = client.prop(
            path, D + "current-user-privilege-set", D + "resourcetype", D + "supported-report-set"
        )
        assert D + "bind" in {e.tag for e in row.found[D + "current-user-privilege-set"].walk()}
        assert row.found[D + "supported-report-set"].elements() == []


def test_what_clients_stored_comes_back_whole(client: Client) -> None:
    colour = f'<x:calendar-color xmlns:x="{I[1:-1]}" symbolic-color="red">#FF0000FF</x:calendar-color>'
    nested = f'<x:dead xmlns:x="{X[1:-1]}"><x:a b="c">t<y:z xmlns:y="urn:y"/></x:a></x:dead>'
    transp = f'<x:schedule-calendar-transp xmlns:x="{C[1:-1]}"><x:transparent/></x:schedule-calendar-transp>'
    stored = {
        I + "calendar-color": colour,
        X + "dead": nested,
        C + "schedule-calendar-transp": transp,
        D + "displayname": "<x:displayname xmlns:x='DAV:'>Ferien &amp; 😀</x:displayname>",
    }
    path = client.make(**stored)
    row = client.prop(path, *stored)
    assert row.refused == {}
    assert row.text(D + "displayname") == "Ferien & 😀"
    assert row.found[I + "calendar-color"].get("symbolic-color") == "red"
    assert row.found[C + "schedule-calendar-transp"].find(C + "transparent")
    (inner,) = row.found[X + "dead"].elements()
    assert inner.get("b") == "c"
    assert inner.find("{urn:y}z")


ZONE = calendar("BEGIN:VTIMEZONE\r\nTZID:Europe/Zurich\r\nEND:VTIMEZONE\r\n")


@pytest.mark.spec("RFC 7809 §5.2")
def test_the_time_zone_has_a_name(client: Client) -> None:
    zone = f"<x:calendar-timezone xmlns:x='{C[1:-1]}'>{ZONE.replace(chr(13), '&#13;')}</x:calendar-timezone>"
    path = client.make(**{collections.TIMEZONE: zone})
    row = client.prop(path, collections.TIMEZONE, collections.TIMEZONE_ID)
    assert row.text(collections.TIMEZONE) == ZONE
    assert row.text(collections.TIMEZONE_ID) == "Europe/Zurich"
    assert client.prop(client.make(), collections.TIMEZONE_ID).refused == {collections.TIMEZONE_ID: 404}


@pytest.mark.spec("RFC 4918 §9.1.5")
def test_allprop_gives_the_basics_and_dead_properties_but_no_calendar_data(client: Client) -> None:
    dead = f"<x:dead xmlns:x='{X[1:-1]}'>kept</x:dead>"
    text = f"<x:calendar-description xmlns:x='{C[1:-1]}'>d</x:calendar-description>"
    path = client.make(**{X + "dead": dead, C + "calendar-description": text})
    client.put(path + "a.ics", event("a"))
    for body in ("", "<d:propfind xmlns:d='DAV:'><d:allprop/></d:propfind>"):
        rows = client.send("PROPFIND", path, body, depth="1").rows()
        assert set(rows[path].found) == {D + "resourcetype", D + "creationdate", X + "dead"}
        assert rows[path].refused == {}
        assert set(rows[path + "a.ics"].found) == {
            D + name
            for name in (
                "resourcetype",
                "creationdate",
                "getcontentlength",
                "getcontenttype",
                "getetag",
                "getlastmodified",
            )
        }
    include = f"<d:include><x:none xmlns:x='{X[1:-1]}'/><d:sync-token/></d:include>"
    body = f"<d:propfind xmlns:d='DAV:'><d:allprop/>{include}</d:propfind>"
    row = client.send("PROPFIND", path, body, depth="0").rows()[path]
    assert D + "sync-token" in row.found
    assert row.refused == {X + "none": 404}


@pytest.mark.spec("RFC 4918 §9.1.4")
def test_propname_names_what_is_there(client: Client) -> None:
    path = client.make(**{X + "dead": f"<x:dead xmlns:x='{X[1:-1]}'>kept</x:dead>"})
    client.put(path + "a.ics", event("a"))
    rows = client.send(
        "PROPFIND", path, "<d:propfind xmlns:d='DAV:'><d:propname/></d:propfind>", depth="1"
    ).rows()
    assert {X + "dead", D + "sync-token", C + "supported-calendar-data"} <= set(rows[path].found)
    assert {D + "getetag", D + "getcontenttype"} <= set(rows[path + "a.ics"].found)
    assert all(not element.children for row in rows.values() for element in row.found.values())


@pytest.mark.spec("RFC 8144 §2.1")
def test_minimal_leaves_out_what_is_missing(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", event("a"))
    for headers in ({"prefer": "return=minimal"}, {"brief": "t"}):
        answer = client.propfind(path, D + "getetag", X + "none", depth="1", **headers)
        assert all(row.refused == {} for row in answer.rows().values())
        assert len(answer.rows()) == 2
        assert answer.headers["preference-applied"] == "return=minimal"
    answer = client.propfind(path, D + "getetag", X + "none", depth="1")
    assert all(X + "none" in row.refused for row in answer.rows().values())
    answer = client.propfind(client.principal, C + "calendar-home-set", X + "none", prefer="return=minimal")
    assert answer.rows()[client.principal].refused == {}


@pytest.mark.spec("RFC 8144 §3")
def test_depth_noroot_leaves_out_the_collection_itself(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", event("a"))
    answer = client.propfind(path, D + "getetag", depth="1", prefer="depth-noroot")
    assert list(answer.rows()) == [path + "a.ics"]
    assert answer.headers["preference-applied"] == "depth-noroot"
    assert list(client.propfind(client.home, depth="1", prefer="depth-noroot").rows()) == [path]


@pytest.mark.spec("RFC 4918 §9.1.1")
def test_infinity_is_refused_with_its_precondition(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", event("a"))
    for place in ("/", client.principal, client.home, path):
        answer = client.propfind(place, depth="infinity")
        assert (answer.status, answer.precondition) == (403, D + "propfind-finite-depth")
    assert client.propfind(path + "a.ics", depth="infinity").status == 207


@pytest.mark.parametrize(
    "body",
    ["<d:propfind xmlns:d='DAV:'/>", "<x/>", "<d:propfind xmlns:d='DAV:'><d:prop></d:propfind>", "nonsense"],
)
def test_bodies_that_are_none_are_refused(client: Client, body: str) -> None:
    assert client.send("PROPFIND", client.home, body, depth="0").status == 400


# -- listings -----------------------------------------------------------------------------------------


def test_a_home_lists_its_collections_with_their_properties(client: Client) -> None:
    named = client.make(**{D + "displayname": "<x:displayname xmlns:x='DAV:'>One</x:displayname>"})
    plain = client.make()
    odd = client.make(name="a b'c,é")
    rows = client.propfind(client.home, D + "displayname", CS + "getctag", depth="1").rows()
    assert list(rows) == [client.home, named, plain, odd]
    assert rows[named].text(D + "displayname") == "One"
    assert rows[plain].refused == {D + "displayname": 404}
    assert client.propfind(client.books, depth="1").rows().keys() == {client.books}


def test_a_large_listing_is_whole_streamed_first_and_kept_afterwards(client: Client) -> None:
    path = client.make()
    client.fill(path, 1000)
    first = client.propfind(path, D + "getetag", depth="1")
    assert first.pieces > 1
    assert len(first.rows()) == 1001
    again = client.propfind(path, D + "getetag", depth="1")
    assert again.pieces == 1
    assert again.body == first.body
    packed = client.propfind(path, D + "getetag", depth="1", accept_encoding="gzip")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == first.body
    assert client.propfind(path, D + "getcontenttype", depth="1").body != first.body
    minimal = client.propfind(path, D + "getetag", depth="1", prefer="return=minimal")
    assert minimal.rows()[path].refused == {}


@pytest.mark.parametrize("change", ["put", "delete", "property"])
def test_a_kept_listing_is_not_given_after_a_change_by_another_worker(client: Client, change: str) -> None:
    path = client.make()
    client.fill(path, 600)
    for _ in range(2):
        client.propfind(path, D + "getetag", D + "displayname", depth="1")
    other = Client(client.store, client.identity)
    if change == "put":
        etag = other.put(path + "e000001.ics", event("e000001")).etag
    elif change == "delete":
        assert other.send("DELETE", path + "e000001.ics").status == 204
    else:
        prop = "<d:prop><d:displayname>New</d:displayname></d:prop>"
        body = f"<d:propertyupdate xmlns:d='DAV:'><d:set>{prop}</d:set></d:propertyupdate>"
        assert other.send("PROPPATCH", path, body).rows()[path].refused == {}
    rows = client.propfind(path, D + "getetag", D + "displayname", depth="1").rows()
    if change == "put":
        assert rows[path + "e000001.ics"].text(D + "getetag") == etag
    elif change == "delete":
        assert path + "e000001.ics" not in rows
    else:
        assert rows[path].text(D + "displayname") == "New"


def test_a_listing_during_which_something_changes_is_not_kept(client: Client) -> None:
    path = client.make()
    client.fill(path, 1000)

    async def race() -> None:
        listing = client.asend("PROPFIND", path, "", depth="1")
        change = client.asend("PUT", path + "e000500.ics", event("e000500"))
        await asyncio.gather(listing, change)

    asyncio.run(race())
    etag = client.send("HEAD", path + "e000500.ics").etag
    rows = client.send("PROPFIND", path, "", depth="1").rows()
    assert rows[path + "e000500.ics"].text(D + "getetag") == etag


def test_a_kept_listing_does_not_outlive_a_restore(client: Client) -> None:
    path = client.make()
    client.fill(path, 500)

    def listed() -> set[str]:
        rows = client.propfind(path, D + "getetag", depth="1").rows()
        return {row.text(D + "getetag") for name, row in rows.items() if name != path}

    before = listed()
    assert listed() == before, "kept now"
    client.store.database.write(lambda tx: tx.execute(sa.update(t.store).values(generation="beef")) and None)
    assert listed() == {'"beef-' + etag.partition("-")[2] for etag in before} != before


def test_a_listing_over_the_cache_is_whole_each_time(make_client: Callable[..., Client]) -> None:
    client = make_client(body_cache_bytes=1000)
    path = client.make()
    client.fill(path, 500)
    for _ in range(2):
        assert len(client.propfind(path, D + "getetag", depth="1").rows()) == 501


def test_an_object_describes_itself(client: Client) -> None:
    book = client.make(Kind.ADDRESSBOOK)
    put = client.put(book + "a.vcf", card("a", "A"))
    names = (
        D + "getetag",
        D + "getcontenttype",
        D + "getcontentlength",
        D + "getlastmodified",
        D + "creationdate",
    )
    row = client.prop(
        book + "a.vcf", *names, D + "resourcetype", D + "owner", D + "current-user-privilege-set"
    )
    assert row.refused == {}
    assert row.text(D + "getetag") == put.etag
    assert row.text(D + "getcontentlength") == str(len(card("a", "A")))
    assert row.found[D + "resourcetype"].elements() == []
    assert client.prop(book + "a.vcf", A + "address-data").refused == {A + "address-data": 404}


@pytest.mark.spec("RFC 3744 §5.4")
def test_a_program_that_may_only_read_is_told_so_in_every_place(client: Client) -> None:
    """A listing kept for a program that may write is not shown to one that may not."""
    calendar_, book = client.make(), client.make(Kind.ADDRESSBOOK)
    assert client.put(f"{calendar_}e.ics", event("e")).status == 201
    name = D + "current-user-privilege-set"

    def privileges(path: str, depth: str) -> set[str]:
        rows = client.propfind(path, name, depth=depth).rows().values()
        return {privilege.elements()[0].tag for row in rows for privilege in row.found[name].elements()}

    places = (client.home, client.books, calendar_, book, f"{calendar_}e.ics")
    for path in places:
        assert privileges(path, "0") & {D + "write", D + "bind"}, path
        assert privileges(path, "1") & {D + "write", D + "bind"}, path
    client.identity = replace(client.identity, read_only=True)
    reading = {D + "read", D + "read-current-user-privilege-set", C + "read-free-busy"}
    for path in (*places, "/", client.principal):
        for depth in "01":
            assert privileges(path, depth) <= reading, (path, depth)
