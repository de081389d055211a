"""Radicale over our store: what it is trusted with, and each of its defects that is overridden."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest

from ksync_server import settings as configuration
from ksync_server import webdav
from ksync_server.auth import accounts
from ksync_server.auth.gate import HomeGrant
from ksync_server.dav import collections, engine, objects, places, properties
from ksync_server.dav.collections import Collection
from ksync_server.dav.engine import Answer, Ask, Engine
from ksync_server.dav.places import Kind
from ksync_server.errors import ClientError, InsufficientStorage, PreconditionFailed
from ksync_server.store import blobs, schema
from ksync_server.store.database import Database, Read, Write
from ksync_server.wire import xml

LIMITS = configuration.Dav(max_property_bytes=500, max_dead_bytes=1200, max_objects=10, max_collections=5)
COLOR = "{http://apple.com/ns/ical/}calendar-color"
NAME = "wörk 'x:y"


class House:
    """One account, its collections, and the engine."""

    def __init__(self, database: Database) -> None:
        self.database = database
        account = database.write(
            lambda tx: accounts.create_account(
                tx,
                login_email="alice@example.org",
                display_name="Alice",
                password_hash=None,
                sync_id="AB12345",
            )
        )
        self.grant = HomeGrant(account.id, account.sync_id)
        self.engine = Engine(LIMITS, database, properties.PROTECTED)

    def ask(self, method: str, path: str, body: str = "", *, to: str | None = None, **more: object) -> Ask:
        element = xml.parse(body.encode()) if body else None
        instructions: tuple[webdav.Instruction, ...] = ()
        if method == "PROPPATCH":
            instructions = webdav.parse_proppatch(element)
        elif method in ("MKCOL", "MKCALENDAR"):
            root = "{DAV:}mkcol" if method == "MKCOL" else "{urn:ietf:params:xml:ns:caldav}mkcalendar"
            instructions = webdav.parse_mkcol(element, root)
        destination = places.parse(tuple(to.split("/"))) if to else None
        place = places.parse(tuple(path.split("/")))
        return Ask(method, self.grant, place, instructions, destination, href="/target/", **more)  # type: ignore[arg-type]

    def run(self, method: str, path: str, body: str = "", *, to: str | None = None, **more: object) -> Answer:
        ask = self.ask(method, path, body, to=to, **more)
        if method in ("MKCOL", "MKCALENDAR"):
            engine.check_new(ask)
        return self.engine.run(ask)

    def calendar(self, name: str) -> Collection:
        with self.database.read() as tx:
            return collections.get(tx, self.grant.account_id, Kind.CALENDAR, name)

    def stored(self, name: str) -> dict[str, str]:
        with self.database.read() as tx:
            return collections.properties(tx, self.calendar(name).id)

    def names(self, kind: Kind = Kind.CALENDAR) -> list[str]:
        with self.database.read() as tx:
            return [found.name for found in collections.list_home(tx, self.grant.account_id, kind)]

    def put(self, calendar: str, name: str, uid: str, component: str = "VEVENT") -> bytes:
        data = (
            f"BEGIN:VCALENDAR\r\nVERSION:2.0\r\nPRODID:x\r\nBEGIN:{component}\r\nUID:{uid}\r\n"
            f"DTSTAMP:20260101T000000Z\r\nDTSTART:20260101T000000Z\r\nEND:{component}\r\nEND:VCALENDAR\r\n"
        ).encode()
        prepared = objects.prepare(Kind.CALENDAR, data, datetime.UTC, LIMITS)

        def write(tx: Write) -> None:
            locked = collections.lock(tx, self.grant.account_id, Kind.CALENDAR, calendar)
            staged = blobs.staged_bytes(data)
            objects.put(tx, locked, name, prepared, staged, href="/h/", limit=LIMITS.max_objects, now=1)

        self.database.write(write)
        return data


@pytest.fixture
def house(database_url: str, tmp_path: Path) -> Iterator[House]:
    database = Database(configuration.Database(url=database_url))
    schema.migrate(database)
    yield House(database)
    database.close()


def mkcalendar(*properties_: str) -> str:
    return (
        '<c:mkcalendar xmlns:d="DAV:" xmlns:c="urn:ietf:params:xml:ns:caldav"><d:set><d:prop>'
        f"{''.join(properties_)}</d:prop></d:set></c:mkcalendar>"
    )


def mkcol(types: str) -> str:
    return (
        '<d:mkcol xmlns:d="DAV:" xmlns:c="urn:ietf:params:xml:ns:caldav"'
        ' xmlns:card="urn:ietf:params:xml:ns:carddav"><d:set><d:prop>'
        f"<d:resourcetype><d:collection/>{types}</d:resourcetype></d:prop></d:set></d:mkcol>"
    )


def update(*parts: str) -> str:
    return f'<d:propertyupdate xmlns:d="DAV:" xmlns:i="http://apple.com/ns/ical/">{"".join(parts)}</d:propertyupdate>'


def setting(markup: str) -> str:
    return f"<d:set><d:prop>{markup}</d:prop></d:set>"


def refusal(house: House, *arguments: str, **more: str) -> ClientError:
    before = (house.names(), house.names(Kind.ADDRESSBOOK))
    with pytest.raises(ClientError) as caught:
        house.run(*arguments, **more)  # type: ignore[arg-type]
    assert (house.names(), house.names(Kind.ADDRESSBOOK)) == before
    return caught.value


@pytest.mark.spec("RFC 4791 §5.3.1")
def test_a_calendar_is_made_with_any_name_and_its_properties(house: House) -> None:
    body = mkcalendar(
        "<d:displayname>Wörk</d:displayname>",
        '<c:supported-calendar-component-set><c:comp name="VEVENT"/></c:supported-calendar-component-set>',
    )
    assert house.run("MKCALENDAR", f"calendars/AB12345/{NAME}", body).status == 201
    assert house.calendar(NAME).components == ("VEVENT",)
    assert xml.parse(house.stored(NAME)["{DAV:}displayname"].encode()).text == "Wörk"


@pytest.mark.spec("RFC 5689 §3")
def test_an_address_book_is_made_by_extended_mkcol(house: House) -> None:
    assert house.run("MKCOL", "addressbooks/AB12345/friends", mkcol("<card:addressbook/>")).status == 201
    assert "friends" in house.names(Kind.ADDRESSBOOK)


@pytest.mark.spec("RFC 4791 §5.3.1.1")
def test_a_taken_name_is_refused(house: House) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a")
    error = refusal(house, "MKCALENDAR", "calendars/AB12345/a")
    assert (error.status, error.precondition) == (409, "{DAV:}resource-must-be-null")
    error = refusal(house, "MKCOL", "calendars/AB12345/a", mkcol("<c:calendar/>"))
    assert (error.status, error.precondition) == (405, "{DAV:}resource-must-be-null")


@pytest.mark.spec("RFC 5689 §3.3")
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("MKCALENDAR", "addressbooks/AB12345/b", ""),
        ("MKCOL", "addressbooks/AB12345/b", mkcol("<c:calendar/>")),
        ("MKCOL", "calendars/AB12345/b", mkcol("<card:addressbook/>")),
        ("MKCOL", "calendars/AB12345/b", mkcol("")),
        ("MKCOL", "calendars/AB12345/b", ""),
    ],
)
def test_resource_type_belongs_to_its_home(house: House, method: str, path: str, body: str) -> None:
    error = refusal(house, method, path, body)
    assert (error.status, error.precondition) == (403, "{DAV:}valid-resourcetype")


def test_component_set_of_unknown_names_is_refused(house: House) -> None:
    body = mkcalendar(
        '<c:supported-calendar-component-set><c:comp name="VX"/></c:supported-calendar-component-set>'
    )
    error = refusal(house, "MKCALENDAR", "calendars/AB12345/b", body)
    assert error.precondition == "{urn:ietf:params:xml:ns:caldav}supported-calendar-component"


@pytest.mark.spec("RFC 4918 §9.2")
def test_property_values_keep_their_markup(house: House) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a")
    body = update(setting('<i:calendar-color symbolic-color="red">#F00</i:calendar-color><x><y>1</y></x>'))
    answer = house.run("PROPPATCH", "calendars/AB12345/a", body)
    assert (answer.status, dict(answer.failed)) == (207, {})
    stored = house.stored("a")
    assert xml.parse(stored[COLOR].encode()).get("symbolic-color") == "red"
    assert xml.parse(stored["x"].encode()).elements()[0].text == "1"
    assert house.calendar("a").seq == 2


def test_a_property_is_removed(house: House) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a", mkcalendar("<d:displayname>A</d:displayname>"))
    removal = update("<d:remove><d:prop><d:displayname/><d:never-there/></d:prop></d:remove>")
    assert house.run("PROPPATCH", "calendars/AB12345/a", removal).failed == {}
    assert house.stored("a") == {}


@pytest.mark.spec("RFC 4918 §9.2.1")
@pytest.mark.parametrize("name", ["d:resourcetype", "d:getetag", "d:sync-token", "d:current-user-principal"])
@pytest.mark.parametrize("part", ["set", "remove"])
def test_protected_properties_are_refused_and_nothing_else_is_done(
    house: House, name: str, part: str
) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a")
    body = update(
        setting("<d:displayname>A</d:displayname>"), f"<d:{part}><d:prop><{name}/></d:prop></d:{part}>"
    )
    answer = house.run("PROPPATCH", "calendars/AB12345/a", body)
    clark = "{DAV:}" + name[2:]
    assert answer.failed == {
        clark: (403, "{DAV:}cannot-modify-protected-property"),
        "{DAV:}displayname": (424, None),
    }
    assert house.stored("a") == {}
    assert house.calendar("a").kind is Kind.CALENDAR


def test_property_limits_refuse_a_large_value(house: House) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a")
    body = update(setting(f"<d:displayname>{'x' * 1000}</d:displayname>"))
    assert house.run("PROPPATCH", "calendars/AB12345/a", body).failed == {"{DAV:}displayname": (507, None)}


def test_properties_of_a_collection_have_a_limit_together(house: House) -> None:
    """A home is listed from memory: without it one account's properties could fill it."""
    house.run("MKCALENDAR", "calendars/AB12345/a")
    for number in range(4):
        body = update(setting(f'<e:p{number} xmlns:e="urn:example">{"x" * 300}</e:p{number}>'))
        if number < 3:
            assert house.run("PROPPATCH", "calendars/AB12345/a", body).failed == {}
        else:
            with pytest.raises(InsufficientStorage):
                house.run("PROPPATCH", "calendars/AB12345/a", body)
    assert set(house.stored("a")) == {f"{{urn:example}}p{number}" for number in range(3)}
    many = [f'<e:p{number} xmlns:e="urn:example">{"x" * 300}</e:p{number}>' for number in range(4)]
    with pytest.raises(InsufficientStorage):
        house.run("MKCALENDAR", "calendars/AB12345/b", mkcalendar(*many))
    assert "b" not in house.names()


@pytest.mark.spec("RFC 4791 §5.2.2")
def test_calendar_timezone_has_to_be_one(house: House) -> None:
    timezone = '<c:calendar-timezone xmlns:c="urn:ietf:params:xml:ns:caldav">{}</c:calendar-timezone>'
    house.run("MKCALENDAR", "calendars/AB12345/a")
    bad = house.run("PROPPATCH", "calendars/AB12345/a", update(setting(timezone.format("Europe/Paris"))))
    assert bad.failed == {collections.TIMEZONE: (403, "{urn:ietf:params:xml:ns:caldav}valid-calendar-data")}
    text = (
        "BEGIN:VCALENDAR\nVERSION:2.0\nPRODID:x\nBEGIN:VTIMEZONE\nTZID:X\nBEGIN:STANDARD\n"
        "DTSTART:19700101T000000\nTZOFFSETFROM:+0200\nTZOFFSETTO:+0200\nEND:STANDARD\nEND:VTIMEZONE\nEND:VCALENDAR\n"
    )
    assert house.run("PROPPATCH", "calendars/AB12345/a", update(setting(timezone.format(text)))).failed == {}
    assert collections.TIMEZONE in house.stored("a")


@pytest.mark.spec("RFC 4918 §9.9")
def test_move_keeps_the_bytes_and_tells_both_calendars(house: House) -> None:
    for name in ("a", "b"):
        house.run("MKCALENDAR", f"calendars/AB12345/{name}")
    data = house.put("a", "1.ics", "u1")
    assert (
        house.run("MOVE", "calendars/AB12345/a/1.ics", to=f"calendars/AB12345/b/é:{NAME}.ics").status == 201
    )
    with house.database.read() as tx:
        moved = objects.find(tx, house.calendar("b").id, f"é:{NAME}.ics")
        assert moved is not None
        assert objects.content(tx, moved).content == data
        assert objects.find(tx, house.calendar("a").id, "1.ics") is None
    assert (house.calendar("a").objects, house.calendar("b").objects) == (0, 1)


@pytest.mark.spec("RFC 4791 §5.3.2.1")
def test_uid_conflict_of_a_move_names_the_other_object(house: House) -> None:
    for name in ("a", "b"):
        house.run("MKCALENDAR", f"calendars/AB12345/{name}")
    house.put("a", "1.ics", "same")
    house.put("b", "other name.ics", "same")
    error = refusal(house, "MOVE", "calendars/AB12345/a/1.ics", to="calendars/AB12345/b/1.ics")
    assert (error.status, error.precondition) == (409, "{urn:ietf:params:xml:ns:caldav}no-uid-conflict")
    assert error.hrefs == ("/target/other%20name.ics",)


def test_component_set_holds_for_a_move(house: House) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a")
    only = '<c:supported-calendar-component-set><c:comp name="VEVENT"/></c:supported-calendar-component-set>'
    house.run("MKCALENDAR", "calendars/AB12345/b", mkcalendar(only))
    house.put("a", "t.ics", "t", "VTODO")
    error = refusal(house, "MOVE", "calendars/AB12345/a/t.ics", to="calendars/AB12345/b/t.ics")
    assert error.precondition == "{urn:ietf:params:xml:ns:caldav}supported-calendar-component"


@pytest.mark.parametrize(
    ("source", "target", "status"),
    [("a/none.ics", "a/2.ics", 404), ("a/1.ics", "none/1.ics", 409), ("a", "b", 405)],
)
def test_move_without_source_or_target_collection_or_of_a_collection(
    house: House, source: str, target: str, status: int
) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a")
    house.put("a", "1.ics", "u1")
    error = refusal(house, "MOVE", f"calendars/AB12345/{source}", to=f"calendars/AB12345/{target}")
    assert error.status == status


@pytest.mark.spec("RFC 4918 §10.6")
def test_overwrite_f_protects_the_target(house: House) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a")
    house.put("a", "1.ics", "u1")
    house.put("a", "2.ics", "u2")
    with pytest.raises(PreconditionFailed):
        house.run("MOVE", "calendars/AB12345/a/1.ics", to="calendars/AB12345/a/2.ics", overwrite=False)


@pytest.mark.spec("RFC 4918 §9.6")
def test_delete_answer_is_204_and_the_name_is_free_again(house: House) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a")
    house.put("a", "1.ics", "u1")
    old = house.calendar("a").id
    answer = house.run("DELETE", "calendars/AB12345/a")
    assert (answer.status, answer.collection_id) == (204, old)
    assert refusal(house, "DELETE", "calendars/AB12345/a").status == 404
    house.run("MKCALENDAR", "calendars/AB12345/a")
    assert house.calendar("a").id != old


def test_a_change_between_the_engine_and_the_write_makes_it_run_again(house: House) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a")
    runs: list[int] = []

    def check(tx: Read) -> None:
        # The first look happens before the engine runs: change the collection behind its back once.
        runs.append(1)
        if len(runs) == 1:
            house.put("a", "1.ics", "u1")

    body = update(setting("<d:displayname>A</d:displayname>"))
    ask = house.ask("PROPPATCH", "calendars/AB12345/a", body, check=check)
    assert house.engine.run(ask).status == 207
    assert len(runs) >= 2
    assert "{DAV:}displayname" in house.stored("a")


def test_a_false_condition_inside_the_write_changes_nothing(house: House) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a")
    looks: list[int] = []

    def check(tx: Read) -> None:
        looks.append(1)
        if len(looks) > 1:
            raise PreconditionFailed("changed")

    ask = house.ask("DELETE", "calendars/AB12345/a", check=check)
    with pytest.raises(PreconditionFailed):
        house.engine.run(ask)
    assert "a" in house.names()


def test_another_account_has_nothing_here(house: House) -> None:
    house.run("MKCALENDAR", "calendars/AB12345/a")
    other = house.database.write(
        lambda tx: accounts.create_account(
            tx, login_email="bob@example.org", display_name="Bob", password_hash=None, sync_id="BC23456"
        )
    )
    house.grant = HomeGrant(other.id, other.sync_id)
    assert refusal(house, "DELETE", "calendars/BC23456/a").status == 404
