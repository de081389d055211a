"""The site: discovery, what is advertised, methods, and the verbs of the engine as clients send them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import sqlalchemy as sa

from ksync_server.auth.gate import Service
from ksync_server.dav import collections, properties
from ksync_server.dav.places import Kind
from ksync_server.dav.site import OWNERS
from ksync_server.store import tables as t
from ksync_server.wire import xml
from tests.dav.harness import Client, Store, calendar, card, component, event, make_account

D = "{DAV:}"
C = "{urn:ietf:params:xml:ns:caldav}"


def allow(client: Client, path: str) -> set[str]:
    return set(client.send("OPTIONS", path).headers["allow"].split(", "))


@pytest.mark.spec("RFC 6764 §5")
@pytest.mark.parametrize("path", ["/.well-known/caldav", "/.well-known/carddav", "/.well-known/caldav/"])
@pytest.mark.parametrize("method", ["GET", "PROPFIND", "OPTIONS", "PUT", "HEAD"])
def test_well_known_addresses_lead_to_the_root_before_any_log_in(
    client: Client, path: str, method: str
) -> None:
    response = client.site.public(client.request(method, path))
    assert response is not None
    assert response.status == 301
    assert dict(response.headers)[b"location"] == b"/"


@pytest.mark.parametrize(
    "path", ["/", "/.well-known/other", "/.well-known", "/.well-known/caldav/x", "/calendars/"]
)
def test_nothing_else_is_public(client: Client, path: str) -> None:
    assert client.site.public(client.request("GET", path)) is None


def test_the_path_says_which_scope_a_secret_needs(client: Client) -> None:
    for path, service in (
        ("/calendars/AB12345/x/", Service.CALDAV),
        ("/addressbooks/AB12345/", Service.CARDDAV),
        ("/principals/AB12345/", Service.SYNC),
        ("/", Service.SYNC),
        ("/other", Service.SYNC),
    ):
        assert client.site.service(client.request("GET", path)) is service


def test_a_secret_for_contacts_opens_no_calendars(make_client: Callable[..., Client]) -> None:
    client = make_client()
    path = client.make()
    client.identity = replace(client.identity, scopes=frozenset({"carddav"}))
    assert client.propfind("/").status == 207
    assert client.propfind(client.books).status == 207
    for method in ("PROPFIND", "GET", "PUT", "DELETE", "REPORT", "OPTIONS"):
        body = "<d:x xmlns:d='DAV:'/>" if method == "REPORT" else ""
        assert client.send(method, path + "a.ics", body, depth="0").status == 403


@pytest.mark.spec("RFC 4791 §5.1")
@pytest.mark.spec("RFC 6352 §6.1")
def test_options_advertise_what_is_there_and_nothing_else(client: Client) -> None:
    path, book = client.make(), client.make(Kind.ADDRESSBOOK)
    client.put(path + "a.ics", event("a"))
    for place in ("/", client.principal, client.home, client.books, path, book, path + "a.ics"):
        answer = client.send("OPTIONS", place)
        assert answer.status == 200
        classes = answer.headers["dav"].split(", ")
        assert classes == ["1", "3", "calendar-access", "addressbook", "extended-mkcol"]


@pytest.mark.spec("RFC 9110 §9.3.7")
def test_allow_is_true_for_each_resource(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", event("a"))
    every = {*OWNERS, "POST", "COPY", "LOCK", "UNLOCK", "ACL", "SEARCH", "PATCH"}
    for place in ("/", client.principal, client.home, path, path + "a.ics"):
        allowed = allow(client, place)
        for method in every - allowed - {"MKCOL", "MKCALENDAR", "MOVE", "DELETE"}:
            answer = client.send(method, place)
            assert answer.status == 405, (method, place)
            assert set(answer.headers["allow"].split(", ")) == allowed
        for method in allowed - {"DELETE", "MOVE"}:
            assert client.send(method, place, depth="0").status != 405, (method, place)
    assert allow(client, path + "none.ics") == {"OPTIONS", "PUT"}
    assert allow(client, client.home + "none/") == {"OPTIONS", "MKCOL", "MKCALENDAR"}
    assert allow(client, path + "a.ics/b") == {"OPTIONS"}


# -- collections over the wire ------------------------------------------------------------------------


def setting(inner: str, root: str = "c:mkcalendar") -> str:
    return f"<{root}{xml.NAMESPACES}><d:set><d:prop>{inner}</d:prop></d:set></{root}>"


@pytest.mark.spec("RFC 4791 §5.3.1")
def test_a_calendar_is_made_changed_and_deleted(client: Client) -> None:
    path = client.home + "new/"
    body = setting(
        "<d:displayname>Ferien &amp; 😀</d:displayname><ical:calendar-color symbolic-color='red'>#112233FF"
        "</ical:calendar-color><c:supported-calendar-component-set><c:comp name='VTODO'/>"
        "</c:supported-calendar-component-set>"
    )
    assert client.send("MKCALENDAR", path, body).status == 201
    row = client.prop(path, D + "displayname", "{http://apple.com/ns/ical/}calendar-color")
    assert row.text(D + "displayname") == "Ferien & 😀"
    assert row.found["{http://apple.com/ns/ical/}calendar-color"].get("symbolic-color") == "red"
    assert client.put(path + "e.ics", event("e")).precondition == C + "supported-calendar-component"
    assert client.put(path + "t.ics", calendar(component("VTODO", "t"))).status == 201
    token = client.sync(path).token
    change = setting("<d:displayname>New</d:displayname>", "d:propertyupdate")
    assert client.send("PROPPATCH", path, change).rows()[path].found.keys() == {D + "displayname"}
    assert client.prop(path, D + "displayname").text(D + "displayname") == "New"
    assert client.sync(path).token != token, "other clients learn of it"
    answer = client.send("PROPPATCH", path, change, prefer="return=minimal")
    assert (answer.status, answer.headers["preference-applied"]) == (204, "return=minimal")
    assert client.send("DELETE", path).status == 204
    assert client.propfind(path).status == 404
    assert client.send("GET", path + "t.ics").status == 404
    assert client.send("DELETE", path).status == 404
    assert client.send("MKCALENDAR", path).status == 201
    assert client.sync(path).rows() == {}


@pytest.mark.spec("RFC 5689 §3")
def test_an_address_book_is_made(client: Client) -> None:
    path = client.books + "new/"
    kind = "<d:resourcetype><d:collection/><card:addressbook/></d:resourcetype>"
    body = setting(f"{kind}<d:displayname>Amis</d:displayname>", "d:mkcol")
    assert client.send("MKCOL", path, body).status == 201
    assert client.prop(path, D + "displayname").text(D + "displayname") == "Amis"
    assert client.put(path + "a.vcf", card("a", "A")).status == 201
    assert client.send("MKCOL", path, body).precondition == D + "resource-must-be-null"


@pytest.mark.spec("RFC 4791 §5.3.1.1")
def test_where_no_collection_can_be_made(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", event("a"))
    answer = client.send("MKCALENDAR", path)
    assert (answer.status, answer.precondition) == (409, D + "resource-must-be-null")
    answer = client.send("MKCALENDAR", path + "inner/")
    assert (answer.status, answer.precondition) == (403, C + "calendar-collection-location-ok")
    assert client.send("MKCOL", path + "inner/").status == 403
    assert client.send("MKCALENDAR", path + "a.ics").precondition == D + "resource-must-be-null"
    assert client.send("MKCALENDAR", client.home + "none/inner/").status == 409
    assert client.send("MKCALENDAR", client.home).status == 405
    assert client.send("MKCOL", "/").status == 405
    assert client.send("MKCOL", "/new").status == 404
    assert client.send("MKCALENDAR", path + "a/b/c").status == 409
    assert client.send("MKCALENDAR", client.home + "x", "<broken").status == 400
    assert client.send("MKCALENDAR", client.home + "x", "<d:other xmlns:d='DAV:'/>").status == 415
    assert client.send("MKCOL", client.home + "x", setting("", "d:mkcol"), if_match='"a"').status == 403


@pytest.mark.spec("RFC 5689 §3.3")
def test_a_property_that_cannot_be_set_fails_the_whole_and_is_named(client: Client) -> None:
    path = client.home + "new/"
    body = setting("<d:displayname>x</d:displayname><d:getetag>y</d:getetag>")
    answer = client.send("MKCALENDAR", path, body)
    assert answer.status == 424
    tree = xml.parse(answer.body)
    assert tree.tag == C + "mkcalendar-response"
    statuses = {
        child.tag: int(stat.find(D + "status").text.split()[1])  # type: ignore[union-attr]
        for stat in tree.all(D + "propstat")
        for child in stat.find(D + "prop").elements()  # type: ignore[union-attr]
    }
    assert statuses == {D + "getetag": 403, D + "displayname": 424}
    assert client.propfind(path).status == 404


@pytest.mark.spec("RFC 4918 §9.2")
def test_a_refused_proppatch_changes_nothing(client: Client) -> None:
    path = client.make()
    body = setting("<d:displayname>x</d:displayname><d:sync-token>y</d:sync-token>", "d:propertyupdate")
    row = client.send("PROPPATCH", path, body).rows()[path]
    assert row.refused == {D + "displayname": 424, D + "sync-token": 403}
    assert client.prop(path, D + "displayname").refused == {D + "displayname": 404}


@pytest.mark.spec("RFC 4918 §9.2.1")
def test_properties_of_everything_else_are_protected(client: Client) -> None:
    path = client.make()
    client.put(path + "a.ics", event("a"))
    body = setting("<d:displayname>x</d:displayname>", "d:propertyupdate")
    for place in ("/", client.principal, client.home, path + "a.ics"):
        row = client.send("PROPPATCH", place, body).rows()[place]
        assert row.refused == {D + "displayname": 403}
    assert client.send("PROPPATCH", path + "none.ics", body).status == 404
    assert client.send("PROPPATCH", client.home + "none/", body).status == 404


def test_what_is_computed_and_what_clients_set_do_not_overlap() -> None:
    for live in properties.LIVE.values():
        assert set(live) - properties.SETTABLE <= properties.PROTECTED
    assert not properties.PROTECTED & properties.SETTABLE


# -- MOVE -----------------------------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §9.9")
def test_an_object_moves_and_both_sides_sync(client: Client) -> None:
    path, other = client.make(), client.make()
    client.put(path + "a.ics", event("a"))
    here, there = client.sync(path).token, client.sync(other).token
    assert (
        client.send("MOVE", path + "a.ics", destination=f"https://sync.example.org{other}b.ics").status == 201
    )
    assert client.send("GET", other + "b.ics").body == event("a").encode()
    assert client.sync(path, here).rows()[path + "a.ics"].status == 404
    assert set(client.sync(other, there).rows()) == {other + "b.ics"}
    client.put(path + "c.ics", event("c"))
    answer = client.send("MOVE", path + "c.ics", destination=other + "b.ics")
    assert (answer.status, answer.precondition) == (409, C + "no-uid-conflict")
    assert client.send("MOVE", path + "c.ics", destination=other + "b.ics", overwrite="F").status == 412
    assert client.send("MOVE", path + "c.ics", destination=path + "d.ics").status == 201
    assert client.send("GET", path + "c.ics").status == 404
    assert client.send("GET", path + "d.ics").status == 200


def test_moves_that_lead_elsewhere_are_refused(make_client: Callable[..., Client]) -> None:
    client, bob = make_client(), make_client("bob")
    path, book = client.make(), client.make(Kind.ADDRESSBOOK)
    client.put(path + "a.ics", event("a"))
    for destination, status in (
        (book + "a.ics", 403),
        (client.home + "new/", 403),
        (path, 409),
        ("/", 409),
        (bob.make() + "a.ics", 404),
        (client.home + "none/a.ics", 409),
        ("https://other.example.org" + path + "b.ics", 502),
        (path + "a.ics", 403),
        (path + "x" * 1001, 414),
    ):
        answer = client.send("MOVE", path + "a.ics", destination=destination)
        assert answer.status == status, destination
    assert client.send("MOVE", path + "a.ics").status == 400
    assert client.send("MOVE", path, destination=client.home + "moved/").status == 403
    assert client.send("MOVE", path + "none.ics", destination=path + "b.ics").status == 404
    assert client.send("MOVE", client.home + "none/", destination=path + "b.ics").status == 404
    assert client.send("MOVE", path + "a.ics", destination=path + "b.ics", if_match='"x"').status == 412
    assert client.send("GET", path + "a.ics").status == 200


# -- rows -------------------------------------------------------------------------------------------------


def test_a_deleted_collection_is_erased_step_by_step_even_if_that_was_cut_off(client: Client) -> None:
    path = client.make()
    for number in range(3):
        client.put(f"{path}{number}.ics", event(f"u{number}"))
    client.fill(path, 250)
    database = client.store.database
    name = path.rstrip("/").rpartition("/")[2]
    number = database.fast(sa.select(t.collection.c.id).where(t.collection.c.name == name))[0][0]

    def delete(tx: collections.Write) -> None:
        collections.delete(tx, collections.lock(tx, client.identity.account_id, Kind.CALENDAR, name))

    database.write(delete)
    assert client.propfind(path).status == 404
    assert collections.purge_deleted(database) >= 1
    assert collections.purge_deleted(database) == 0
    for table in (t.collection.c.id, t.object_.c.collection_id, t.tombstone.c.collection_id):
        assert database.fast(sa.select(sa.func.count()).where(table == number))[0][0] == 0


def test_a_home_takes_so_many_collections(store: Store) -> None:
    client = Client(store, store.database.write(make_account), max_collections=2)
    client.make()
    assert client.send("MKCALENDAR", client.home + "two/").status == 201
    assert client.send("MKCALENDAR", client.home + "three/").status == 507
    kind = "<d:resourcetype><d:collection/><card:addressbook/></d:resourcetype>"
    assert client.send("MKCOL", client.books + "own/", setting(kind, "d:mkcol")).status == 201
