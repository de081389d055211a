"""Radicale 3.9 over our store: MKCOL, MKCALENDAR, PROPPATCH, MOVE and DELETE of collections.

The engine parses nothing that comes from the network: it gets a canonical path, a body rewritten by our own
reader, and no header but Destination and Overwrite. It runs on a snapshot and *records* what it wants to
change; one write applies that if the collections it saw are unchanged, else it runs again. Any status from
400 on discards everything.

Names go in as hexadecimal digits (`/AB12345/cal-64656661756c74/`), so that no path rule of the engine meets a
client's characters.

Where the engine is wrong it is overridden here, by name; `tests/dav/test_engine.py` has one test for each:

    protected_properties     it stores getetag and answers 200; removing resourcetype destroys the collection
    property_values          it keeps only the text of a property: nested XML is lost
    property_names           it answers 400 to a property without a namespace
    property_limits          it takes a displayname of any size
    calendar_timezone        it takes any text as a time zone
    component_set            it takes any component name, and MOVE ignores the set
    resource_type            it makes a calendar among the address books
    uid_conflict             its no-uid-conflict names nothing
    delete_answer            it answers 200 with a multistatus instead of 204
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import radicale.app
import radicale.auth
import radicale.config
import radicale.item
import radicale.rights
import radicale.storage
from radicale import types as radicale_types

from ksync_server import settings as configuration
from ksync_server.auth.gate import HomeGrant
from ksync_server.dav import collections, objects
from ksync_server.dav.collections import Collection
from ksync_server.dav.objects import StoredObject
from ksync_server.dav.places import Kind, Level, Place
from ksync_server.errors import (
    CALDAV,
    CARDDAV,
    DAV,
    BadRequest,
    ClientError,
    Conflict,
    Forbidden,
    MethodNotAllowed,
    NotFound,
    PreconditionFailed,
    Unavailable,
)
from ksync_server.store.database import Database, Read, Write
from ksync_server.webdav import Instruction
from ksync_server.wire import ical, xml
from ksync_server.wire.xml import Element

_TRIES = 5  # runs of the engine before a busy collection answers 503
_PREFIX = {Kind.CALENDAR: "cal-", Kind.ADDRESSBOOK: "card-"}
_TAG = {Kind.CALENDAR: "VCALENDAR", Kind.ADDRESSBOOK: "VADDRESSBOOK"}
_TYPE = {Kind.CALENDAR: f"{CALDAV}calendar", Kind.ADDRESSBOOK: f"{CARDDAV}addressbook"}
RESOURCETYPE = f"{DAV}resourcetype"
COMPONENT_SET = f"{CALDAV}supported-calendar-component-set"
_CANNOT_MODIFY = f"{DAV}cannot-modify-protected-property"

Check = Callable[[Read], None]  # raises where the request's conditions are false


@dataclass(frozen=True, slots=True)
class Ask:
    """One request as the engine needs it.

    Args:
        check: run on the snapshot and again inside the write: the request's conditions.
        href: encoded href of the collection of the destination, for naming conflicts.
    """

    method: str
    grant: HomeGrant
    place: Place
    instructions: tuple[Instruction, ...] = ()
    destination: Place | None = None
    overwrite: bool = True
    check: Check = lambda tx: None
    href: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was done. `failed` lists refused properties: then nothing was done."""

    status: int
    failed: Mapping[str, tuple[int, str | None]] = field(default_factory=dict)  # name -> status, precondition
    collection_id: int | None = None  # of a deleted collection, for `collections.purge`


@dataclass(slots=True)
class _View:
    """What the engine sees and wants during one run."""

    tx: Read
    grant: HomeGrant
    created: list[str] = field(default_factory=list)  # engine paths
    changed: list[int] = field(default_factory=list)  # collection ids
    deleted: list[int] = field(default_factory=list)
    moved: list[tuple[StoredObject, Collection, Collection, str]] = field(default_factory=list)
    seen: dict[int, Collection] = field(default_factory=dict)  # by id


class _Stale(Exception):
    """What the engine read has changed; it runs again."""


class Engine:
    """One Radicale application for a process; thread-safe.

    Args:
        protected: Clark names that clients cannot set.
    """

    def __init__(self, settings: configuration.Dav, database: Database, protected: Iterable[str]) -> None:
        self._settings = settings
        self._database = database
        self._protected = frozenset(protected) - {COMPONENT_SET, RESOURCETYPE}
        self._local = threading.local()
        self._application = _application(self._view)

    def _view(self) -> _View:
        view: _View = self._local.view
        return view

    def run(self, ask: Ask) -> Answer:
        """Carry out one request; blocking, for the pool.

        Raises:
            ClientError: refused; nothing was changed.

        Cost: one snapshot, one run of the engine, one write; more runs where a collection is busy.
        """
        failed = self._refused(ask)
        if failed:
            return Answer(207 if ask.method == "PROPPATCH" else 424, failed)
        for _ in range(_TRIES):
            with self._database.read() as tx:
                ask.check(tx)
                view = _View(tx, ask.grant)
                status = self._ask_engine(ask, view)
            with contextlib.suppress(_Stale):
                number = self._database.write(lambda tx, view=view: self._apply(tx, ask, view))  # type: ignore[misc]
                return Answer(204 if ask.method == "DELETE" else status, collection_id=number)
        raise Unavailable("The collection is being changed.", headers=[(b"retry-after", b"1")])

    # -- overrides before the engine ----------------------------------------------------------------

    def _refused(self, ask: Ask) -> dict[str, tuple[int, str | None]]:
        """Properties that cannot be set, each with status and precondition; the others fail with them."""
        failed: dict[str, tuple[int, str | None]] = {}
        making = ask.method in ("MKCOL", "MKCALENDAR")
        for each in ask.instructions:
            problem = self._problem(each, making=making)
            if problem is not None:
                failed[each.name] = problem
        if failed:
            for each in ask.instructions:
                failed.setdefault(each.name, (424, None))
        return failed

    def _problem(self, each: Instruction, *, making: bool) -> tuple[int, str | None] | None:
        if each.name in self._protected or (each.name in (COMPONENT_SET, RESOURCETYPE) and not making):
            return 403, _CANNOT_MODIFY  # protected_properties
        if not each.set:
            return None
        if each.name == collections.TIMEZONE and not _is_timezone(each.element):
            return 403, f"{CALDAV}valid-calendar-data"  # calendar_timezone
        if len(xml.serialise(each.element).encode()) > self._settings.max_property_bytes:
            return 507, None  # property_limits
        return None

    # -- the engine ---------------------------------------------------------------------------------

    def _ask_engine(self, ask: Ask, view: _View) -> int:
        environ = _environ(ask)
        handler = getattr(self._application, f"do_{ask.method}")
        self._local.view = view
        try:
            status, _, _, _ = handler(environ, "", _path(ask.grant, ask.place), ask.grant.sync_id, set(), {})
        finally:
            self._local.view = None
        if status >= 400:
            raise self._refusal(int(status), ask, view)
        return int(status)

    def _refusal(self, status: int, ask: Ask, view: _View) -> ClientError:
        """The engine's status as an error with the standard's precondition."""
        if status == 409 and ask.method == "MOVE":
            return self._conflict(ask, view)
        if status == 409 and ask.method == "MKCALENDAR":
            return Conflict("The name is taken.", precondition=f"{DAV}resource-must-be-null")
        if status == 405 and ask.method == "MKCOL":
            return MethodNotAllowed("The name is taken.", precondition=f"{DAV}resource-must-be-null")
        known: dict[int, type[ClientError]] = {
            403: Forbidden,
            404: NotFound,
            405: MethodNotAllowed,
            409: Conflict,
            412: PreconditionFailed,
        }
        return known.get(status, BadRequest)("This is not possible here.")

    def _conflict(self, ask: Ask, view: _View) -> ClientError:
        """uid_conflict: name the object that has the UID; else the target's collection is missing."""
        assert ask.destination is not None
        source = _find(view, ask.place)
        target = _find(view, ask.destination)
        if source is not None and target is not None:
            moved = objects.find(view.tx, source.id, ask.place.object)
            if moved is not None:
                name = ask.destination.object
                try:
                    objects.check_fits(view.tx, target, name, moved.uid, moved.component, ask.href)
                except ClientError as error:
                    return error
        return Conflict("The collection of the Destination does not exist.")

    # -- applying -----------------------------------------------------------------------------------

    def _apply(self, tx: Write, ask: Ask, view: _View) -> int | None:
        """What the engine recorded, in one transaction; the second and deciding look at conditions.

        Raises:
            _Stale: something it saw has changed.
            ClientError: a rule of ours refuses.
        """
        now = int(time.time())
        if view.created:
            self._create(tx, ask, now)
            return None
        by = 2 if ask.method == "MOVE" else 1
        locked = {number: _lock(tx, found, by) for number, found in sorted(view.seen.items())}
        ask.check(tx)
        for number in view.changed:
            put, removed = _values(ask.instructions)
            collections.change_properties(tx, locked[number], put, removed, self._settings.max_dead_bytes)
        for moved, source, target, name in view.moved:
            objects.move(
                tx,
                locked[source.id],
                moved,
                locked[target.id],
                name,
                href=ask.href,
                limit=self._settings.max_objects,
                now=now,
            )
        for number in view.deleted:
            collections.delete(tx, locked[number])
            return number
        return None

    def _create(self, tx: Write, ask: Ask, now: int) -> None:
        ask.check(tx)
        kind = ask.place.kind
        assert kind is not None
        stored, _ = _values(ask.instructions)
        stored.pop(RESOURCETYPE, None)
        sets = [each.element for each in ask.instructions if each.name == COMPONENT_SET]
        stored.pop(COMPONENT_SET, None)
        collections.create(
            tx,
            ask.grant.account_id,
            kind,
            ask.place.collection,
            components=_components(sets[-1]) if sets and kind is Kind.CALENDAR else (),
            stored=stored,
            dead_limit=self._settings.max_dead_bytes,
            limit=self._settings.max_collections,
            now=now,
        )


# -- requests -------------------------------------------------------------------------------------


def check_new(ask: Ask) -> None:
    """resource_type, component_set: whether what is to be made belongs where it is to be made.

    Raises:
        Forbidden: valid-resourcetype or supported-calendar-component.
        MethodNotAllowed: not below a home.

    Spec: RFC 5689 §3.3, RFC 4791 §5.3.1.1, RFC 6352 §6.3.1.
    """
    kind = ask.place.kind
    if kind is None:
        raise MethodNotAllowed("Collections are made below a home set.")
    wanted = {
        child.tag
        for each in ask.instructions
        if each.name == RESOURCETYPE
        for child in each.element.elements()
    }
    if ask.method == "MKCALENDAR":
        wanted |= {f"{DAV}collection", _TYPE[Kind.CALENDAR]}
    if wanted != {f"{DAV}collection", _TYPE[kind]}:
        raise Forbidden(
            f"Only a{'n address book' if kind is Kind.ADDRESSBOOK else ' calendar'} can be made here.",
            precondition=f"{DAV}valid-resourcetype",
        )
    for each in ask.instructions:
        if each.name == COMPONENT_SET:
            unknown = set(_components(each.element)) - set(collections.COMPONENTS)
            if unknown:
                raise Forbidden(
                    f"Calendars do not take {min(unknown)[:50]}.",
                    precondition=f"{CALDAV}supported-calendar-component",
                )


def _components(element: Element) -> tuple[str, ...]:
    names = [(comp.get("name") or "").strip().upper() for comp in element.all(f"{CALDAV}comp")]
    return tuple(dict.fromkeys(name for name in names if name))


def _values(instructions: Iterable[Instruction]) -> tuple[dict[str, str], list[str]]:
    """property_values: what to store (whole elements) and to remove; the last one for a name counts."""
    last = {each.name: each for each in instructions}
    put = {name: xml.serialise(each.element) for name, each in last.items() if each.set}
    return put, [name for name, each in last.items() if not each.set]


def _is_timezone(element: Element) -> bool:
    """Whether a calendar-timezone holds one VCALENDAR with one VTIMEZONE (RFC 4791 §5.2.2)."""
    try:
        calendar = ical.parse(element.text.strip().encode())
    except ical.BadCalendar:
        return False
    return [child.name for child in calendar.children] == ["VTIMEZONE"]


def _hex(name: str) -> str:
    return name.encode("utf-8").hex()


def _path(grant: HomeGrant, place: Place) -> str:
    """The engine's path of a collection or object."""
    assert place.kind is not None
    collection = f"/{grant.sync_id}/{_PREFIX[place.kind]}{_hex(place.collection)}"
    return f"{collection}/{_hex(place.object)}" if place.object else f"{collection}/"


def _environ(ask: Ask) -> dict[str, Any]:
    """A WSGI environ of our own making: nothing of the client's but what this method needs."""
    roots = {
        "MKCOL": f"{DAV}mkcol",
        "MKCALENDAR": f"{CALDAV}mkcalendar",
        "PROPPATCH": f"{DAV}propertyupdate",
    }
    body = b""
    if ask.instructions:
        body = xml.serialise(Element(roots[ask.method], (), tuple(_parts(ask.instructions)))).encode()
    environ = {
        "REQUEST_METHOD": ask.method,
        "CONTENT_LENGTH": str(len(body)),
        "CONTENT_TYPE": "application/xml; charset=utf-8",
        "wsgi.input": io.BytesIO(body),
        "HTTP_OVERWRITE": "T" if ask.overwrite else "F",
    }
    if ask.destination is not None:
        environ["HTTP_DESTINATION"] = _path(ask.grant, ask.destination)
    return environ


def _parts(instructions: Iterable[Instruction]) -> Iterator[Element]:
    """property_names: the instructions with neutral names, but for the two that the engine looks into."""
    for number, each in enumerate(instructions):
        known = each.name in (RESOURCETYPE, COMPONENT_SET)
        value = each.element if known else Element(f"{{urn:ksync:engine}}property{number}")
        prop = Element(f"{DAV}prop", (), (value,))
        yield Element(f"{DAV}{'set' if each.set else 'remove'}", (), (prop,))


# -- Radicale's plugins ---------------------------------------------------------------------------


def _lock(tx: Write, seen: Collection, by: int) -> Collection:
    try:
        found = collections.lock(tx, seen.account_id, seen.kind, seen.name, by)
    except NotFound:
        raise _Stale from None
    if (found.id, found.seq) != (seen.id, seen.seq + by):
        raise _Stale
    return found


def _find(view: _View, place: Place) -> Collection | None:
    assert place.kind is not None
    return collections.find(view.tx, view.grant.account_id, place.kind, place.collection)


def _application(view: Callable[[], _View]) -> radicale.app.Application:
    """A Radicale whose only state is what `view` returns during a run."""
    logging.getLogger("radicale").setLevel(logging.CRITICAL)

    class Storage(_Storage):
        def __init__(self, settings: radicale.config.Configuration) -> None:
            super().__init__(settings)
            self.view = view

    settings = radicale.config.load()
    settings.update(
        {
            "auth": {"type": _Auth, "delay": "0"},
            "rights": {"type": _Rights},
            "storage": {"type": Storage},
            "web": {"type": "none"},
            "server": {"delay_on_error": "0", "validate_path_value": "strict"},
        },
        "ksync",
        privileged=True,
    )
    return radicale.app.Application(settings)


class _Auth(radicale.auth.BaseAuth):  # type: ignore[misc]
    """Nobody logs in to the engine: the gate has decided."""

    def _login(self, login: str, password: str) -> str:
        return ""


class _Rights(radicale.rights.BaseRights):  # type: ignore[misc]
    """Everything inside the own home, whose owner the gate has checked; no untyped collections."""

    def authorization(self, user: str, user_groups: set[str], path: str) -> str:
        parts = [part for part in path.split("/") if part]
        if not parts:
            return "R"
        if parts[0] != user:
            return ""
        return "R" if len(parts) == 1 else "rw" if len(parts) == 2 else ""


class _Storage(radicale.storage.BaseStorage):  # type: ignore[misc]
    """The snapshot as the engine's storage."""

    _is_collision_free = True
    _supports_unicode = True
    _supports_trailing_whitespace = True
    _supports_problematic_chars = True
    view: Callable[[], _View]

    def discover(
        self,
        path: str,
        depth: str = "0",
        child_context_manager: Any = None,
        user_groups: Any = None,
    ) -> Iterator[Any]:
        view = self.view()
        parts = [part for part in path.split("/") if part]
        if len(parts) < 2:
            yield _Collection(view, "/".join(parts), None)
            return
        place = _place(parts)
        found = _find(view, place) if place else None
        if place is None or found is None:
            return
        view.seen.setdefault(found.id, found)
        collection = _Collection(view, "/".join(parts[:2]), found)
        if len(parts) == 2:
            yield collection
            return
        stored = objects.find(view.tx, found.id, place.object)
        if stored is not None:
            yield radicale.item.Item(
                collection=collection, href=parts[2], uid=stored.uid, text="", etag=str(stored.seq)
            )

    def create_collection(
        self, href: str, items: Any = None, props: Any = None
    ) -> tuple[_Collection, dict[str, Any], list[str]]:
        view = self.view()
        view.created.append(href)
        return _Collection(view, href.strip("/"), None), {}, []

    def move(self, item: Any, to_collection: Any, to_href: str) -> None:
        view = self.view()
        source: Collection = item.collection.stored
        found = objects.find(view.tx, source.id, bytes.fromhex(item.href).decode())
        assert found is not None
        view.moved.append((found, source, to_collection.stored, bytes.fromhex(to_href).decode()))

    @radicale_types.contextmanager  # type: ignore[untyped-decorator]
    def acquire_lock(self, mode: str, user: str = "", *args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    def verify(self) -> bool:
        return True


def _place(parts: list[str]) -> Place | None:
    """The place of an engine path."""
    for kind, prefix in _PREFIX.items():
        if parts[1].startswith(prefix):
            try:
                collection = bytes.fromhex(parts[1].removeprefix(prefix)).decode()
                name = bytes.fromhex(parts[2]).decode() if len(parts) > 2 else ""
            except ValueError:
                return None
            level = Level.OBJECT if name else Level.COLLECTION
            return Place(level, kind, parts[0], collection, name)
    return None


class _Collection(radicale.storage.BaseCollection):  # type: ignore[misc]
    """A collection of the snapshot, or (`stored` None) the root or a home."""

    def __init__(self, view: _View, path: str, stored: Collection | None) -> None:
        self._view = view
        self._path = path
        self.stored = stored

    @property
    def path(self) -> str:
        return self._path

    @property
    def etag(self) -> str:
        return f'"{self.stored.seq if self.stored else 0}"'

    @property
    def last_modified(self) -> str:
        return ""

    def get_meta(self, key: str | None = None) -> Any:
        meta = {} if self.stored is None else {"tag": _TAG[self.stored.kind]}
        return meta if key is None else meta.get(key)

    def set_meta(self, props: Mapping[str, str]) -> None:
        assert self.stored is not None
        self._view.changed.append(self.stored.id)

    def has_uid(self, uid: str) -> bool:
        return False  # uid_conflict: `objects.check_fits` decides inside the write, and names the other

    def get_all(self) -> Iterable[Any]:
        return ()

    def get_multi(self, hrefs: Iterable[str]) -> Iterable[Any]:
        return ()

    def delete(self, href: str | None = None) -> None:
        assert self.stored is not None
        assert href is None, "objects are deleted natively"
        self._view.deleted.append(self.stored.id)
