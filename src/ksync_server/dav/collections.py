"""Calendars and address books as rows: find, list, create, change, delete.

Every change of a collection takes a change number first, which locks its row until commit. A deleted
collection leaves its home at once, in one statement; its objects are erased afterwards in small steps, so
that a large one stops nobody.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import sqlalchemy as sa

from ksync_server.dav.places import Kind
from ksync_server.errors import CALDAV, DAV, Forbidden, InsufficientStorage, MethodNotAllowed, NotFound
from ksync_server.store import blobs, changes
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Row, Write
from ksync_server.wire import ical, recurrence, xml
from ksync_server.wire.timezones import named_zone

TIMEZONE = CALDAV + "calendar-timezone"
TIMEZONE_ID = CALDAV + "calendar-timezone-id"
COMPONENTS = ("VEVENT", "VTODO", "VJOURNAL", "VFREEBUSY", "VAVAILABILITY")
MAX_NAME_BYTES = 255  # of a collection's name, UTF-8

_PURGED_AT_ONCE = 100  # objects erased in one transaction
_HIDDEN_AT_ONCE = 50  # collections taken out of their home in one transaction

_C = t.collection.c
_P = sa.bindparam
_COLUMNS = (_C.id, _C.kind, _C.account_id, _C.name, _C.seq, _C.components, _C.objects, _C.created_at)
_FIND = sa.select(*_COLUMNS).where(
    _C.account_id == _P("account_id"), _C.kind == _P("kind"), _C.name == _P("name")
)
_LIST = sa.select(*_COLUMNS).where(_C.account_id == _P("account_id"), _C.kind == _P("kind")).order_by(_C.id)
_COUNT = sa.select(sa.func.count()).where(_C.account_id == _P("account_id"), _C.kind == _P("kind"))
_LOCK_ACCOUNT = sa.select(t.account.c.id).where(t.account.c.id == _P("account_id")).with_for_update()
_NEW = (
    sa.insert(t.collection)
    .values(
        kind=_P("kind"),
        account_id=_P("account_id"),
        name=_P("name"),
        seq=1,
        pruned_seq=0,
        components=_P("components"),
        objects=0,
        created_at=_P("now"),
    )
    .returning(_C.id)
)
_HOLD = sa.select(_C.id).where(_C.id == _P("id_")).with_for_update()
_HIDE = sa.update(t.collection).where(_C.id == _P("id_")).values(account_id=None)
_HIDE_SOME = (
    sa.update(t.collection)
    .where(_C.id.in_(sa.select(_C.id).where(_C.account_id == _P("owner_id")).limit(_HIDDEN_AT_ONCE)))
    .values(account_id=None)
    .returning(_C.id)
)
_HIDDEN = (
    sa.select(_C.id).where(_C.account_id.is_(None), _C.kind != "drive").order_by(_C.id).limit(_P("most"))
)
_DROP = sa.delete(t.collection).where(_C.id == _P("id_"))
_SOME_OBJECTS = sa.select(t.object_.c.id).where(t.object_.c.collection_id == _P("id_")).limit(_PURGED_AT_ONCE)
_DROP_OBJECT = sa.delete(t.object_).where(t.object_.c.id == _P("id_")).returning(t.object_.c.blob_id)
_COUNT_OBJECTS = (
    sa.update(t.collection)
    .where(_C.id == _P("id_"))
    .values(objects=_C.objects + _P("by", type_=sa.BigInteger))
)

_V = t.collection_property.c
_PROPERTIES = sa.select(_V.name, _V.xml).where(_V.collection_id == _P("id_"))
_PROPERTIES_OF_HOME = (
    sa.select(_V.collection_id, _V.name, _V.xml)
    .select_from(t.collection_property.join(t.collection, _C.id == _V.collection_id))
    .where(_C.account_id == _P("account_id"), _C.kind == _P("kind"))
)
_DROP_PROPERTY = sa.delete(t.collection_property).where(_V.collection_id == _P("id_"), _V.name == _P("name"))
_DEAD_SIZE = sa.select(sa.func.coalesce(sa.func.sum(sa.func.length(_V.xml)), 0)).where(
    _V.collection_id == _P("id_")
)
_NEW_PROPERTY = sa.insert(t.collection_property).values(
    collection_id=_P("id_"), name=_P("name"), xml=_P("xml")
)
_DROP_FLOATING_INDEX = sa.delete(t.occurrence).where(
    t.occurrence.c.object_id.in_(
        sa.select(t.object_.c.id).where(t.object_.c.collection_id == _P("id_"), t.object_.c.floating)
    )
)


@dataclass(frozen=True, slots=True)
class Collection:
    """One calendar or address book."""

    id: int
    kind: Kind
    account_id: int
    name: str  # last segment of its URL
    seq: int  # number of its last change: ctag and sync position
    components: tuple[str, ...]  # calendar: what it takes; () = everything
    objects: int  # members
    created_at: int


def _collection(row: Row) -> Collection:
    number, kind, account_id, name, seq, components, objects, created_at = row
    return Collection(
        number, Kind(kind), account_id, name, seq, tuple(components.split()), objects, created_at
    )


# -- reading --------------------------------------------------------------------------------------


def find(tx: Read, account_id: int, kind: Kind, name: str) -> Collection | None:
    """The collection of that name in an account's home, or None."""
    row = tx.one(_FIND, {"account_id": account_id, "kind": kind.value, "name": name})
    return None if row is None else _collection(row)


def get(tx: Read, account_id: int, kind: Kind, name: str) -> Collection:
    """`find`, for those who need it to be there.

    Raises:
        NotFound: there is none.
    """
    found = find(tx, account_id, kind, name)
    if found is None:
        raise NotFound("There is no such collection.")
    return found


def list_home(tx: Read, account_id: int, kind: Kind) -> list[Collection]:
    """Every collection of a home, oldest first."""
    return [_collection(row) for row in tx.fast(_LIST, {"account_id": account_id, "kind": kind.value})]


def properties(tx: Read, collection_id: int) -> dict[str, str]:
    """What clients stored on a collection: Clark name -> the whole element as self-contained markup."""
    return dict(tx.fast(_PROPERTIES, {"id_": collection_id}))


def home_properties(tx: Read, account_id: int, kind: Kind) -> dict[int, dict[str, str]]:
    """`properties` of every collection of a home by collection id; those without any are left out."""
    found: dict[int, dict[str, str]] = {}
    for number, name, text in tx.fast(_PROPERTIES_OF_HOME, {"account_id": account_id, "kind": kind.value}):
        found.setdefault(number, {})[name] = text
    return found


def zone(stored: Mapping[str, str]) -> datetime.tzinfo:
    """The time zone in which floating times of a calendar happen: the client's choice, else UTC.

    Args:
        stored: as `properties` gives them.

    Spec: RFC 4791 §5.2.2, RFC 7809 §5.2.
    """
    return _zone(stored.get(TIMEZONE, ""), stored.get(TIMEZONE_ID, ""))


@lru_cache(maxsize=256)
def _zone(timezone: str, timezone_id: str) -> datetime.tzinfo:
    component = _vtimezone(timezone)
    found = recurrence.zone_from(component) if component else None
    if found is None and timezone_id:
        found = named_zone(xml.parse(timezone_id.encode()).text.strip())
    return found or datetime.UTC


@lru_cache(maxsize=256)
def timezone_id(timezone: str) -> str | None:
    """The TZID inside a stored calendar-timezone property."""
    component = _vtimezone(timezone)
    return component.text("TZID") if component else None


def _vtimezone(timezone: str) -> ical.Component | None:
    """The VTIMEZONE of a stored calendar-timezone property; it was checked when it was stored."""
    return _first_timezone(xml.parse(timezone.encode()).text) if timezone else None


def _first_timezone(text: str) -> ical.Component | None:
    try:
        calendar = ical.parse(text.strip().encode())
    except ical.BadCalendar:
        return None
    return next((child for child in calendar.children if child.name == "VTIMEZONE"), None)


def zone_in(text: str) -> datetime.tzinfo | None:
    """The time zone of an iCalendar text with a VTIMEZONE; None where it has none."""
    component = _first_timezone(text)
    return recurrence.zone_from(component) if component else None


# -- changing -------------------------------------------------------------------------------------


def lock(tx: Write, account_id: int, kind: Kind, name: str, by: int = 1) -> Collection:
    """Take change numbers of a collection and with them its row, until commit.

    Args:
        by: how many numbers; `seq` of the result is the last one.

    Returns:
        The collection as it is now that nobody else can change it.

    Raises:
        NotFound: there is none, or it was deleted meanwhile; nothing was changed.
    """
    changes.bump(tx, get(tx, account_id, kind, name).id, by)
    return get(tx, account_id, kind, name)  # again: until the lock was ours, everything could change


def hold(tx: Write, collection_id: int) -> None:
    """Keep a collection from changing until commit, without a change number."""
    tx.scalar(_HOLD, {"id_": collection_id})


def create(
    tx: Write,
    account_id: int,
    kind: Kind,
    name: str,
    *,
    components: Iterable[str] = (),
    stored: Mapping[str, str] | None = None,
    dead_limit: int | None = None,
    limit: int,
    now: int,
) -> Collection:
    """A new, empty collection.

    Args:
        name: last segment of its URL.
        components: what a calendar takes; none = everything.
        stored: Clark name -> whole element; each checked by the caller.
        dead_limit: `dav.max_dead_bytes`, of all of them together.
        limit: `dav.max_collections`.
        now: Unix seconds.

    Raises:
        MethodNotAllowed: resource-must-be-null; the name is taken (RFC 4791 §5.3.1.1, RFC 5689 §3.3).
        Forbidden: the name cannot be one.
        InsufficientStorage: the home is full, or the properties are too large together.
        NotFound: the account is gone.
        In every case nothing was changed.
    """
    if "/" in name or not name.strip() or len(name.encode()) > MAX_NAME_BYTES:
        condition = CALDAV + "calendar-collection-location-ok" if kind is Kind.CALENDAR else None
        raise Forbidden("A collection cannot have this name.", precondition=condition)
    if tx.one(_LOCK_ACCOUNT, {"account_id": account_id}) is None:
        raise NotFound("There is no such account.")
    if find(tx, account_id, kind, name) is not None:
        raise MethodNotAllowed("The name is taken.", precondition=DAV + "resource-must-be-null")
    if int(tx.scalar(_COUNT, {"account_id": account_id, "kind": kind.value})) >= limit:
        raise InsufficientStorage(f"A home holds at most {limit} collections.")
    values = {"kind": kind.value, "account_id": account_id, "name": name, "now": now}
    number = tx.scalar(_NEW, {**values, "components": " ".join(dict.fromkeys(components))})
    for key, text in (stored or {}).items():
        tx.fast(_NEW_PROPERTY, {"id_": number, "name": key, "xml": text})
    _check_dead(tx, number, dead_limit)
    return get(tx, account_id, kind, name)


def _check_dead(tx: Write, collection_id: int, limit: int | None) -> None:
    if limit is not None and int(tx.scalar(_DEAD_SIZE, {"id_": collection_id})) > limit:
        raise InsufficientStorage(f"The properties of a collection may have {limit} characters together.")


def change_properties(
    tx: Write,
    collection: Collection,
    put: Mapping[str, str],
    removed: Iterable[str],
    dead_limit: int | None = None,
) -> None:
    """Store and remove properties of a collection that `lock` returned.

    Args:
        put: Clark name -> whole element, each checked by the caller.
        removed: Clark names; those that are not there do not matter.
        dead_limit: `dav.max_dead_bytes`, of all of them together.

    Raises:
        InsufficientStorage: they are too large together.

    Cost: two statements per property. A new time zone forgets the occurrences of floating objects.
    """
    for name in (*removed, *put):
        tx.fast(_DROP_PROPERTY, {"id_": collection.id, "name": name})
    for name, text in put.items():
        tx.fast(_NEW_PROPERTY, {"id_": collection.id, "name": name, "xml": text})
    if put:
        _check_dead(tx, collection.id, dead_limit)
    if {TIMEZONE, TIMEZONE_ID} & {*removed, *put}:
        tx.fast(_DROP_FLOATING_INDEX, {"id_": collection.id})


def count_objects(tx: Write, collection_id: int, by: int) -> None:
    """Add to the number of members."""
    tx.fast(_COUNT_OBJECTS, {"id_": collection_id, "by": by})


# -- deleting -------------------------------------------------------------------------------------


def delete(tx: Write, collection: Collection) -> None:
    """Take a collection that `lock` returned out of its home; `purge` erases the rest.

    Its name is free at once, and its id, and so every ETag and token it gave, is never used again.
    """
    tx.fast(_HIDE, {"id_": collection.id})


def purge(database: Database, collection_id: int) -> None:
    """Erase a deleted collection, a few objects at a time; blocking.

    Whatever interrupts it, `purge_deleted` goes on from there.
    """
    while database.write(lambda tx: _purge_some(tx, collection_id)):
        pass


def erase_home(database: Database, account_id: int) -> None:
    """Erase every calendar and address book of an account that is being erased; blocking.

    Whatever interrupts it, it can be called again, and `purge_deleted` ends what was begun.
    """
    while numbers := database.write(lambda tx: tx.fast(_HIDE_SOME, {"owner_id": account_id})):
        for (number,) in numbers:
            purge(database, number)


def purge_deleted(database: Database, *, most: int = 100) -> int:
    """Erase what interrupted deletions left; returns how many collections. For the periodic job."""
    numbers = [number for (number,) in database.fast(_HIDDEN, {"most": most})]
    for number in numbers:
        purge(database, number)
    return len(numbers)


def _purge_some(tx: Write, collection_id: int) -> bool:
    """Erase one step; False when nothing is left."""
    rows = tx.fast(_SOME_OBJECTS, {"id_": collection_id})
    for (number,) in rows:
        for (blob_id,) in tx.fast(_DROP_OBJECT, {"id_": number}):  # none: another process was faster
            blobs.release(tx, blob_id)
    if not rows:
        tx.fast(_DROP, {"id_": collection_id})
    return bool(rows)
