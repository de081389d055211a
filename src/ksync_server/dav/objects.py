"""Objects of calendars and address books: what may be stored, and the rows it becomes.

The bytes a client stores are the bytes returned (DAV4). What is read out of them goes into the
object's row: UID, component, a superset of its time span, and the searchable text of a contact.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import NamedTuple

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server.dav import collections, filters, occurrences
from ksync_server.dav.collections import Collection
from ksync_server.dav.places import Kind
from ksync_server.errors import (
    CALDAV,
    CARDDAV,
    BodyTooLarge,
    Conflict,
    Forbidden,
    InsufficientStorage,
    UriTooLong,
)
from ksync_server.store import blobs, changes
from ksync_server.store import tables as t
from ksync_server.store.blobs import Content, StagedBlob
from ksync_server.store.database import Read, Row, Write
from ksync_server.webdav import ABSENT, ResourceState
from ksync_server.wire import ical, recurrence, vcard
from ksync_server.wire.headers import parse_content_type, quote_segment

MAX_NAME_BYTES = 1000  # of an object's name, UTF-8: clients make it of the UID
MAX_UID_BYTES = 2000  # PostgreSQL indexes at most 2,700

_MEDIA_TYPES = {
    Kind.CALENDAR: ("text/calendar",),
    Kind.ADDRESSBOOK: ("text/vcard", "text/x-vcard", "text/directory"),
}
NAMESPACE = {Kind.CALENDAR: CALDAV, Kind.ADDRESSBOOK: CARDDAV}
SUPPORTED_DATA = {
    Kind.CALENDAR: CALDAV + "supported-calendar-data",
    Kind.ADDRESSBOOK: CARDDAV + "supported-address-data",
}

_O = t.object_.c
_P = sa.bindparam
COLUMNS = (
    _O.name,
    _O.seq,
    _O.size,
    _O.content_type,
    _O.modified_at,
    _O.created_at,
    _O.blob_id,
    _O.id,
    _O.uid,
    _O.component,
)
"""What a `StoredObject` is made of, in order."""

_FIND = sa.select(*COLUMNS).where(_O.collection_id == _P("collection_id"), _O.name == _P("name"))
_WITH_UID = sa.select(_O.name).where(_O.collection_id == _P("collection_id"), _O.uid == _P("uid"))
_NEW = sa.insert(t.object_).values(
    collection_id=_P("collection_id"),
    name=_P("name"),
    uid=_P("uid"),
    component=_P("component"),
    seq=_P("seq"),
    modified_at=_P("now"),
    created_at=_P("created_at"),
    size=_P("size"),
    content_type=_P("content_type"),
    blob_id=_P("blob_id"),
    first_at=_P("first_at"),
    last_at=_P("last_at"),
    recurring=_P("recurring", type_=sa.Boolean),
    floating=_P("floating", type_=sa.Boolean),
    folded=_P("folded"),
)
_CHANGE = (
    sa.update(t.object_)
    .where(_O.id == _P("id_"))
    .values(
        component=_P("component"),
        seq=_P("seq"),
        modified_at=_P("now"),
        size=_P("size"),
        content_type=_P("content_type"),
        blob_id=_P("blob_id"),
        first_at=_P("first_at"),
        last_at=_P("last_at"),
        recurring=_P("recurring", type_=sa.Boolean),
        floating=_P("floating", type_=sa.Boolean),
        folded=_P("folded"),
    )
)
_DROP = sa.delete(t.object_).where(_O.id == _P("id_"))
_RENAME = (
    sa.update(t.object_)
    .where(_O.id == _P("id_"))
    .values(collection_id=_P("collection_id"), name=_P("name"), seq=_P("seq"), modified_at=_P("now"))
)
_T = t.tombstone.c
_DROP_TOMBSTONE = sa.delete(t.tombstone).where(_T.collection_id == _P("collection_id"), _T.name == _P("name"))
_NEW_TOMBSTONE = sa.insert(t.tombstone).values(
    collection_id=_P("collection_id"), name=_P("name"), seq=_P("seq"), at=_P("now")
)


class StoredObject(NamedTuple):
    """One object's row, in the order of `COLUMNS`; renderers take the bare row alike."""

    name: str
    seq: int  # change number of its content: ETag and sync position
    size: int  # bytes
    content_type: str
    modified_at: int
    created_at: int
    blob_id: int
    id: int
    uid: str
    component: str  # VEVENT, VTODO ... or VCARD


@dataclass(frozen=True, slots=True)
class Prepared:
    """Content that passed every check that needs no other row, and what its row will say."""

    uid: str
    component: str
    content_type: str
    facts: occurrences.Facts
    folded: str  # contacts: searchable text


# -- reading --------------------------------------------------------------------------------------


def stored_object(row: Row) -> StoredObject:
    """An object of a row of `COLUMNS`."""
    return StoredObject(*row)


def find(tx: Read, collection_id: int, name: str) -> StoredObject | None:
    """The object of that name, or None."""
    row = tx.one(_FIND, {"collection_id": collection_id, "name": name})
    return None if row is None else StoredObject(*row)


def state(tx: Read, collection_id: int, found: StoredObject | None) -> ResourceState:
    """What conditions are tested against."""
    if found is None:
        return ABSENT
    return ResourceState(True, changes.etag(tx.generation, collection_id, found.seq), found.modified_at)


def etag(tx: Read, collection: Collection, seq: int) -> str:
    """The bare strong ETag of an object whose content last changed at `seq`."""
    return changes.etag(tx.generation, collection.id, seq)


def content(tx: Read, found: StoredObject) -> Content:
    """Where its bytes are, for reading them after the transaction."""
    return blobs.content(tx, found.blob_id)


def read(store: blobs.Blobs, where: Content) -> bytes:
    """The bytes of an object; blocking unless they are in a row."""
    if where.content is not None:
        return where.content
    return b"".join(store.read(where, 0, where.size, where.size))


# -- checks ---------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Whether an object can have this name.

    Raises:
        UriTooLong: longer than `MAX_NAME_BYTES`.
    """
    if len(name.encode()) > MAX_NAME_BYTES:
        raise UriTooLong(f"A name has at most {MAX_NAME_BYTES} bytes.")


def check_media_type(kind: Kind, content_type: str | None) -> None:
    """Whether a body declared so may be stored; one without a declaration may.

    Raises:
        Forbidden: supported-calendar-data or supported-address-data.

    Spec: RFC 4791 §5.3.2.1, RFC 6352 §6.3.2.1.
    """
    media_type, _ = parse_content_type(content_type)
    if media_type and media_type not in _MEDIA_TYPES[kind]:
        raise Forbidden(
            f"Objects here are {_MEDIA_TYPES[kind][0]}, not {media_type[:100]}.",
            precondition=SUPPORTED_DATA[kind],
        )


def too_large(kind: Kind, limit: int) -> BodyTooLarge:
    """The refusal of an object over `dav.max_object_bytes`."""
    return BodyTooLarge(
        f"An object has at most {limit} bytes.", precondition=NAMESPACE[kind] + "max-resource-size"
    )


def calendar_limits(limits: configuration.Dav) -> ical.CalendarLimits:
    """The settings as the reader takes them."""
    return ical.CalendarLimits(
        max_bytes=limits.max_object_bytes,
        max_line_bytes=limits.max_object_bytes,
        max_properties=limits.max_properties,
        max_attendees=limits.max_attendees,
        max_timezones=limits.max_timezones,
        max_dates=limits.max_dates,
    )


_ENDLESS = 1 << 40
STORED = ical.CalendarLimits(
    max_bytes=_ENDLESS,
    max_line_bytes=_ENDLESS,
    max_properties=_ENDLESS,
    max_components=_ENDLESS,
    max_attendees=_ENDLESS,
    max_timezones=_ENDLESS,
    max_dates=_ENDLESS,
    max_uid_characters=_ENDLESS,
)
"""Limits for reading what is stored: it passed those of its day, which may have been wider."""
STORED_CARD = vcard.CardLimits(_ENDLESS, _ENDLESS, _ENDLESS)


def budget(limits: configuration.Dav) -> recurrence.Budget:
    """What following one object's recurrence may cost in one request."""
    return recurrence.Budget(limits.recurrence_steps, limits.max_instances, limits.max_answer_bytes)


def prepare(kind: Kind, data: bytes, zone: datetime.tzinfo, limits: configuration.Dav) -> Prepared:
    """Check content by itself and read what its row will say.

    Args:
        zone: the collection's, for floating times.

    Raises:
        Forbidden: with the precondition that failed.
        BodyTooLarge: max-resource-size.

    Spec: RFC 4791 §4.1, §5.3.2.1; RFC 6352 §5.1, §6.3.2.1.
    Cost: some 1.5 µs per line, and for a rule with COUNT at most 20,000 steps; call it in the pool for
        large content.
    """
    if len(data) > limits.max_object_bytes:
        raise too_large(kind, limits.max_object_bytes)
    try:
        prepared = (_calendar if kind is Kind.CALENDAR else _card)(data, zone, limits)
    except (ical.BadCalendar, vcard.BadCard) as error:
        raise Forbidden(error.text, precondition=error.precondition) from None
    if len(prepared.uid.encode()) > MAX_UID_BYTES:
        name = "valid-calendar-object-resource" if kind is Kind.CALENDAR else "valid-address-data"
        raise Forbidden("The UID is too long.", precondition=NAMESPACE[kind] + name)
    return prepared


def _calendar(data: bytes, zone: datetime.tzinfo, limits: configuration.Dav) -> Prepared:
    allowed = calendar_limits(limits)
    found = ical.check_object(ical.parse(data, allowed), allowed)
    facts = occurrences.facts(found, zone, budget(limits))
    kind = f"text/calendar; charset=utf-8; component={found.component.lower()}"
    return Prepared(found.uid, found.component, kind, facts, "")


def _card(data: bytes, _: datetime.tzinfo, limits: configuration.Dav) -> Prepared:
    allowed = vcard.CardLimits(limits.max_object_bytes, limits.max_properties)
    card = vcard.check_card(vcard.parse(data, allowed), allowed)
    facts = occurrences.Facts(None, None, False, False)
    return Prepared(card.uid or "", "VCARD", "text/vcard; charset=utf-8", facts, filters.folded(card))


def check_fits(
    tx: Read, collection: Collection, name: str, uid: str, component: str, href: str, *, leaving: str = ""
) -> None:
    """Whether an object may take a name in a collection: its component, and its UID once only.

    Args:
        href: of the collection, encoded, to name the object in the way.
        leaving: name that the object gives up in this collection (MOVE).

    Raises:
        Forbidden: supported-calendar-component.
        Conflict: no-uid-conflict: another object has the UID, or the one of that name has another UID.

    Spec: RFC 4791 §5.3.2.1, RFC 6352 §6.3.2.1. Cost: two index look-ups.
    """
    if collection.components and component not in collection.components:
        raise Forbidden(
            f"This calendar does not take {component}.", precondition=CALDAV + "supported-calendar-component"
        )
    holder = tx.scalar(_WITH_UID, {"collection_id": collection.id, "uid": uid})
    if holder is None or (leaving and holder == leaving):
        holder = name if name != leaving and find(tx, collection.id, name) is not None else None
    elif holder == name:
        holder = None
    if holder is not None:
        raise Conflict(
            "Another object has this UID, or this object has another one.",
            precondition=NAMESPACE[collection.kind] + "no-uid-conflict",
            hrefs=(href + quote_segment(holder),),
        )


# -- changing -------------------------------------------------------------------------------------
# Each takes a collection that `collections.lock` returned in the same transaction: its `seq` is the number of
# this change.


def put(
    tx: Write,
    collection: Collection,
    name: str,
    prepared: Prepared,
    staged: StagedBlob,
    *,
    href: str,
    limit: int,
    now: int,
) -> bool:
    """Create or replace an object; its number is `collection.seq`.

    Args:
        href: of the collection, encoded.
        limit: `dav.max_objects`.

    Returns:
        Whether it is new.

    Raises:
        Forbidden, Conflict: as `check_fits`.
        InsufficientStorage: the collection is full.
        Unavailable: the staged bytes waited too long.
        In every case roll back.

    Cost: some 8 statements on rows found by index.
    """
    check_fits(tx, collection, name, prepared.uid, prepared.component, href)
    present = find(tx, collection.id, name)
    if present is None and collection.objects >= limit:
        raise InsufficientStorage(f"A collection holds at most {limit} objects.")
    values = {
        "component": prepared.component,
        "seq": collection.seq,
        "now": now,
        "size": staged.size,
        "content_type": prepared.content_type,
        "blob_id": blobs.publish(tx, staged),
        "first_at": prepared.facts.first_at,
        "last_at": prepared.facts.last_at,
        "recurring": prepared.facts.recurring,
        "floating": prepared.facts.floating,
        "folded": prepared.folded,
    }
    if present is not None:
        tx.fast(_CHANGE, {**values, "id_": present.id})
        blobs.release(tx, present.blob_id)
        occurrences.drop_index(tx, present.id)
        return False
    tx.fast(
        _NEW, {**values, "collection_id": collection.id, "name": name, "uid": prepared.uid, "created_at": now}
    )
    _arrive(tx, collection.id, name)
    return True


def remove(tx: Write, collection: Collection, present: StoredObject, *, now: int) -> None:
    """Delete an object; clients that sync learn it from its tombstone, numbered `collection.seq`."""
    tx.fast(_DROP, {"id_": present.id})  # the occurrence row goes with it
    blobs.release(tx, present.blob_id)
    _leave(tx, collection.id, present.name, collection.seq, now)


def move(
    tx: Write,
    source: Collection,
    present: StoredObject,
    target: Collection,
    name: str,
    *,
    href: str,
    limit: int,
    now: int,
) -> bool:
    """Give an object another name, in its own collection (locked with `by=2`) or another of its kind.

    The bytes stay; what has the name now is replaced.

    Args:
        href: of the target collection, encoded.

    Returns:
        Whether the name was free.

    Raises:
        Forbidden, Conflict: as `check_fits`, tested on the target.
        InsufficientStorage: the target is full.
        In every case roll back.

    Spec: RFC 4918 §9.9, RFC 4791 §5.3.2.1.
    """
    inside = source.id == target.id
    leaving = present.name if inside else ""
    check_fits(tx, target, name, present.uid, present.component, href, leaving=leaving)
    replaced = find(tx, target.id, name)
    if replaced is not None:
        tx.fast(_DROP, {"id_": replaced.id})
        blobs.release(tx, replaced.blob_id)
        collections.count_objects(tx, target.id, -1)
    elif not inside and target.objects >= limit:
        raise InsufficientStorage(f"A collection holds at most {limit} objects.")
    tx.fast(
        _RENAME,
        {"id_": present.id, "collection_id": target.id, "name": name, "seq": target.seq, "now": now},
    )
    occurrences.drop_index(tx, present.id)  # it carries the old number, and perhaps another time zone
    _leave(tx, source.id, present.name, source.seq - 1 if inside else source.seq, now)
    _arrive(tx, target.id, name)
    return replaced is None


def _arrive(tx: Write, collection_id: int, name: str) -> None:
    tx.fast(_DROP_TOMBSTONE, {"collection_id": collection_id, "name": name})
    collections.count_objects(tx, collection_id, 1)


def _leave(tx: Write, collection_id: int, name: str, seq: int, now: int) -> None:
    place = {"collection_id": collection_id, "name": name}
    tx.fast(_DROP_TOMBSTONE, place)
    tx.fast(_NEW_TOMBSTONE, {**place, "seq": seq, "now": now})
    collections.count_objects(tx, collection_id, -1)
