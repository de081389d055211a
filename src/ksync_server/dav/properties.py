"""PROPFIND of everything on the sync host: principals, homes, collections, objects.

One function per live property: a resource and what the request shares -> the element, or None where that
resource has no such property. Members of a collection are rendered from bare rows, in key-set pages.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ksync_server import settings as configuration
from ksync_server import webdav
from ksync_server.auth.gate import Identity
from ksync_server.dav import collections, data, places
from ksync_server.dav.collections import Collection
from ksync_server.dav.places import Kind, Level
from ksync_server.errors import CALDAV, CARDDAV, DAV
from ksync_server.http import Request
from ksync_server.store import changes
from ksync_server.store.database import Row
from ksync_server.wire import headers as grammar
from ksync_server.wire import xml

CS = "{http://calendarserver.org/ns/}"

# Reports by the resources that have them; supported-report-set and reports.py say the same.
COLLECTION_REPORTS = {
    Kind.CALENDAR: (
        DAV + "sync-collection",
        CALDAV + "calendar-query",
        CALDAV + "calendar-multiget",
        CALDAV + "free-busy-query",
    ),
    Kind.ADDRESSBOOK: (
        DAV + "sync-collection",
        CARDDAV + "addressbook-query",
        CARDDAV + "addressbook-multiget",
    ),
}

# Columns of an object's row, in the order of `objects.COLUMNS`.
_NAME, _SEQ, _SIZE, _TYPE, _MODIFIED, _CREATED, _BLOB, _ID = range(8)


@dataclass(frozen=True, slots=True)
class Asked:
    """What all resources of one answer share."""

    request: Request
    identity: Identity
    settings: configuration.Settings
    generation: str
    find: webdav.Propfind
    minimal: bool  # properties that a resource has not are left out

    def resource_id(self, kind: str, number: int) -> str:
        """A URN that names a resource wherever it moves (RFC 5842 §3.1)."""
        made = uuid.uuid5(uuid.NAMESPACE_URL, f"ksync:{self.generation}:{kind}:{number}")
        return f"<d:resource-id><d:href>{made.urn}</d:href></d:resource-id>"


@dataclass(frozen=True, slots=True)
class Listed:
    """A collection with what clients stored on it."""

    collection: Collection
    stored: Mapping[str, str]


def _href(name: str, href: str) -> str:
    return f"<{name}><d:href>{href}</d:href></{name}>"


def _privileges(*names: str) -> str:
    inner = "".join(f"<d:privilege><{name}/></d:privilege>" for name in names)
    return f"<d:current-user-privilege-set>{inner}</d:current-user-privilege-set>"


def _reports(names: Iterable[str]) -> str:
    inner = "".join(
        f"<d:supported-report><d:report>{xml.empty(name)}</d:report></d:supported-report>" for name in names
    )
    return f"<d:supported-report-set>{inner}</d:supported-report-set>"


_READ = ("d:read", "d:read-current-user-privilege-set")
_WRITE = ("d:write", "d:write-properties", "d:write-content")
_BIND = ("d:bind", "d:unbind")


def _rights(asked: Asked, *more: str, read: tuple[str, ...] = _READ) -> str:
    """What the identity may do: read, and more unless its secret only reads (RFC 3744 §5.5)."""
    return _privileges(*read, *(() if asked.identity.read_only else more))


_COLLATIONS = "".join(
    f"<{{0}}:supported-collation>{name}</{{0}}:supported-collation>"
    for name in ("i;ascii-casemap", "i;octet", "i;unicode-casemap")
)


# -- everywhere -----------------------------------------------------------------------------------

T = TypeVar("T")
Render = Callable[[T, Asked], str | None]


def _me(_: object, asked: Asked) -> str:
    return _href("d:current-user-principal", places.principal(asked.request, asked.identity.sync_id))


def _owner(_: object, asked: Asked) -> str:
    return _href("d:owner", places.principal(asked.request, asked.identity.sync_id))


def _principals(_: object, asked: Asked) -> str:
    return _href("d:principal-collection-set", asked.request.href((places.PRINCIPALS,), folder=True))


_EVERYWHERE: dict[str, Render[object]] = {
    DAV + "current-user-principal": _me,
    DAV + "principal-collection-set": _principals,
}
_FOLDER: dict[str, Render[object]] = {
    **_EVERYWHERE,
    DAV + "resourcetype": lambda *_: "<d:resourcetype><d:collection/></d:resourcetype>",
    DAV + "current-user-privilege-set": lambda *_: _privileges(*_READ),
    DAV + "supported-report-set": lambda *_: _reports(()),
}


# -- "/", principals, homes -----------------------------------------------------------------------


def _display_name(_: object, asked: Asked) -> str:
    return f"<d:displayname>{xml.escape(asked.identity.display_name)}</d:displayname>"


def _addresses(_: object, asked: Asked) -> str:
    hrefs = (f"mailto:{asked.identity.login_email}", places.principal(asked.request, asked.identity.sync_id))
    inner = "".join(f"<d:href>{xml.escape(href)}</d:href>" for href in hrefs)
    return f"<c:calendar-user-address-set>{inner}</c:calendar-user-address-set>"


def _email(_: object, asked: Asked) -> str:
    email = xml.escape(asked.identity.login_email)
    return f"<cs:email-address-set><cs:email-address>{email}</cs:email-address></cs:email-address-set>"


def _calendars(_: object, asked: Asked) -> str:
    return _href("c:calendar-home-set", places.home(asked.request, Kind.CALENDAR, asked.identity.sync_id))


def _books(_: object, asked: Asked) -> str:
    return _href(
        "card:addressbook-home-set", places.home(asked.request, Kind.ADDRESSBOOK, asked.identity.sync_id)
    )


_HOMES: dict[str, Render[object]] = {
    CALDAV + "calendar-home-set": _calendars,
    CARDDAV + "addressbook-home-set": _books,
}
_PRINCIPAL: dict[str, Render[object]] = {
    **_FOLDER,
    **_HOMES,
    DAV + "resourcetype": lambda *_: "<d:resourcetype><d:collection/><d:principal/></d:resourcetype>",
    DAV + "displayname": _display_name,
    DAV + "owner": _owner,
    DAV + "principal-URL": lambda _, asked: _href(
        "d:principal-URL", places.principal(asked.request, asked.identity.sync_id)
    ),
    DAV + "alternate-URI-set": lambda *_: "<d:alternate-URI-set/>",
    DAV + "group-member-set": lambda *_: "<d:group-member-set/>",
    DAV + "group-membership": lambda *_: "<d:group-membership/>",
    DAV + "resource-id": lambda _, asked: asked.resource_id("principal", asked.identity.account_id),
    CALDAV + "calendar-user-address-set": _addresses,
    CS + "email-address-set": _email,
}
_HOME: dict[str, Render[object]] = {
    **_FOLDER,
    DAV + "displayname": _display_name,
    DAV + "owner": _owner,
    DAV + "current-user-privilege-set": lambda _, asked: _rights(asked, *_BIND),
}


# -- collections ----------------------------------------------------------------------------------


def _collection_type(one: Listed, _: Asked) -> str:
    kind = "<c:calendar/>" if one.collection.kind is Kind.CALENDAR else "<card:addressbook/>"
    return f"<d:resourcetype><d:collection/>{kind}</d:resourcetype>"


def _components(one: Listed, _: Asked) -> str:
    names = one.collection.components or collections.COMPONENTS
    inner = "".join(f'<c:comp name="{xml.attribute(name)}"/>' for name in names)
    return f"<c:supported-calendar-component-set>{inner}</c:supported-calendar-component-set>"


def _ctag(one: Listed, asked: Asked) -> str:
    return f"<cs:getctag>{changes.etag(asked.generation, one.collection.id, one.collection.seq)}</cs:getctag>"


def _sync_token(one: Listed, asked: Asked) -> str:
    token = changes.sync_token(asked.generation, one.collection.id, one.collection.seq)
    return f"<d:sync-token>{token}</d:sync-token>"


def _timezone_id(one: Listed, _: Asked) -> str | None:
    stored = one.stored.get(collections.TIMEZONE_ID)
    if stored is not None:
        return stored
    name = collections.timezone_id(one.stored.get(collections.TIMEZONE, ""))
    return f"<c:calendar-timezone-id>{xml.escape(name)}</c:calendar-timezone-id>" if name else None


def _transp(one: Listed, _: Asked) -> str:
    opaque = "<c:schedule-calendar-transp><c:opaque/></c:schedule-calendar-transp>"
    return one.stored.get(CALDAV + "schedule-calendar-transp", opaque)


_COLLECTION: dict[str, Render[Listed]] = {
    **_EVERYWHERE,
    DAV + "resourcetype": _collection_type,
    DAV + "creationdate": lambda one, _: (
        f"<d:creationdate>{grammar.iso_date(one.collection.created_at)}</d:creationdate>"
    ),
    DAV + "owner": _owner,
    DAV + "supported-report-set": lambda one, _: _reports(COLLECTION_REPORTS[one.collection.kind]),
    DAV + "sync-token": _sync_token,
    DAV + "resource-id": lambda one, asked: asked.resource_id("collection", one.collection.id),
    CS + "getctag": _ctag,
}
_CALENDAR: dict[str, Render[Listed]] = {
    **_COLLECTION,
    DAV + "current-user-privilege-set": lambda _, asked: _rights(
        asked, *_WRITE, *_BIND, read=(*_READ, "c:read-free-busy")
    ),
    CALDAV + "supported-calendar-component-set": _components,
    CALDAV + "supported-calendar-data": lambda *_: (
        '<c:supported-calendar-data><c:calendar-data content-type="text/calendar" version="2.0"/>'
        "</c:supported-calendar-data>"
    ),
    CALDAV + "supported-collation-set": lambda *_: (
        f"<c:supported-collation-set>{_COLLATIONS.format('c')}</c:supported-collation-set>"
    ),
    CALDAV + "max-resource-size": lambda _, asked: (
        f"<c:max-resource-size>{asked.settings.dav.max_object_bytes}</c:max-resource-size>"
    ),
    CALDAV + "max-attendees-per-instance": lambda _, asked: (
        f"<c:max-attendees-per-instance>{asked.settings.dav.max_attendees}</c:max-attendees-per-instance>"
    ),
    CALDAV + "min-date-time": lambda *_: "<c:min-date-time>00010101T000000Z</c:min-date-time>",
    CALDAV + "max-date-time": lambda *_: "<c:max-date-time>99991231T235959Z</c:max-date-time>",
    CALDAV + "calendar-timezone-id": _timezone_id,
    CALDAV + "schedule-calendar-transp": _transp,
}
_ADDRESSBOOK: dict[str, Render[Listed]] = {
    **_COLLECTION,
    DAV + "current-user-privilege-set": lambda _, asked: _rights(asked, *_WRITE, *_BIND),
    CARDDAV + "supported-address-data": lambda *_: (
        '<card:supported-address-data><card:address-data-type content-type="text/vcard" version="3.0"/>'
        "</card:supported-address-data>"
    ),
    CARDDAV + "supported-collation-set": lambda *_: (
        f"<card:supported-collation-set>{_COLLATIONS.format('card')}</card:supported-collation-set>"
    ),
    CARDDAV + "max-resource-size": lambda _, asked: (
        f"<card:max-resource-size>{asked.settings.dav.max_object_bytes}</card:max-resource-size>"
    ),
}
LIVE = {Kind.CALENDAR: _CALENDAR, Kind.ADDRESSBOOK: _ADDRESSBOOK}
"""What the server computes for a collection, some of it only until a client sets it."""

SETTABLE = frozenset({DAV + "displayname", collections.TIMEZONE_ID, CALDAV + "schedule-calendar-transp"})
"""Computed only until a client sets them."""

# Stored properties that allprop leaves out, as their standards ask (RFC 4791 §5.2, RFC 6352 §6.2).
_NOT_IN_ALLPROP = frozenset(
    {
        CALDAV + "calendar-description",
        collections.TIMEZONE,
        collections.TIMEZONE_ID,
        CALDAV + "schedule-calendar-transp",
        CARDDAV + "addressbook-description",
    }
)

# -- objects --------------------------------------------------------------------------------------
# Every object has every one of these. Most are the same for all members of a collection; the others are
# markup around one value of the row.

_SAME: dict[str, Callable[[Asked], str]] = {
    DAV + "current-user-principal": lambda asked: _me(None, asked),
    DAV + "principal-collection-set": lambda asked: _principals(None, asked),
    DAV + "owner": lambda asked: _owner(None, asked),
    DAV + "resourcetype": lambda _: "<d:resourcetype/>",
    DAV + "current-user-privilege-set": lambda asked: _rights(asked, *_WRITE),
    DAV + "supported-report-set": lambda _: _reports(()),
}
_OWN_VALUE: dict[str, tuple[str, int, Callable[[Any], str] | None]] = {
    # markup, column, what is made of it (None: as it stands); ? = that of the collection
    DAV + "getetag": ('<d:getetag>"?%s"</d:getetag>', _SEQ, None),
    DAV + "getcontenttype": ("<d:getcontenttype>%s</d:getcontenttype>", _TYPE, None),
    DAV + "getcontentlength": ("<d:getcontentlength>%s</d:getcontentlength>", _SIZE, None),
    DAV + "getlastmodified": ("<d:getlastmodified>%s</d:getlastmodified>", _MODIFIED, grammar.http_date),
    DAV + "creationdate": ("<d:creationdate>%s</d:creationdate>", _CREATED, grammar.iso_date),
}
_OBJECT = frozenset({*_SAME, *_OWN_VALUE, DAV + "resource-id"})

PROTECTED = frozenset({*_CALENDAR, *_ADDRESSBOOK, *_OBJECT, *_PRINCIPAL}) - SETTABLE
"""Properties that no client can set or remove (RFC 4918 §9.2)."""

# Of every resource that has them (RFC 4918 §15).
_ALLPROP = (
    DAV + "resourcetype",
    DAV + "displayname",
    DAV + "creationdate",
    DAV + "getcontentlength",
    DAV + "getcontenttype",
    DAV + "getetag",
    DAV + "getlastmodified",
)


class Entries(Generic[T]):
    """Responses for resources of one sort; what is asked is looked up once.

    Args:
        live: renderer of each property.
    """

    def __init__(self, asked: Asked, live: Mapping[str, Render[T]]) -> None:
        self._asked = asked
        self._live = live
        self._kind = asked.find.kind
        names: Iterable[str] = asked.find.names
        if self._kind == "allprop":
            names = dict.fromkeys((*_ALLPROP, *names))
        self._wanted = [(name, live.get(name)) for name in names]
        self._missing: dict[tuple[str, ...], str] = {}

    def response(self, href: str, one: T, stored: Mapping[str, str] | None = None) -> str:
        """One resource.

        Args:
            href: encoded.
            stored: properties kept as markup; a live one of the same name goes first.
        """
        found: list[str] = []
        absent: list[str] = []
        if self._kind == "propname":
            return webdav.response(href, webdav.propstat(200, self._all_names(one, stored or {})))
        for name, render in self._wanted:
            text = render(one, self._asked) if render else stored.get(name) if stored else None
            if text is not None:
                found.append(text)
            elif self._kind == "prop" or name in self._asked.find.names:
                absent.append(name)
        if self._kind == "allprop" and stored:
            left_out = {*self._live, *_NOT_IN_ALLPROP, *_ALLPROP, *self._asked.find.names}
            found += [text for name, text in stored.items() if name not in left_out]
        missing = ""
        if absent and not self._asked.minimal:
            missing = self._missing.setdefault(tuple(absent), "") or webdav.missing(absent)
            self._missing[tuple(absent)] = missing
        if not found:
            return webdav.response(href, missing)
        return (
            f"<d:response><d:href>{href}</d:href><d:propstat><d:prop>{''.join(found)}</d:prop>"
            f"{webdav.OK}</d:propstat>{missing}</d:response>"
        )

    def _all_names(self, one: T, stored: Mapping[str, str]) -> str:
        names = [name for name, render in self._live.items() if render(one, self._asked) is not None]
        return "".join([xml.empty(name) for name in dict.fromkeys((*names, *stored))])


def fixed(asked: Asked, level: Level, href: str) -> str:
    """The response of a resource that every account has: "/", a branch, its principal, its homes."""
    live: Mapping[str, Render[object]]
    match level:
        case Level.PRINCIPAL:
            live = _PRINCIPAL
        case Level.HOME:
            live = _HOME
        case _:
            live = _FOLDER
    return Entries(asked, live).response(href, None)


class Collections:
    """Responses for collections of one home."""

    def __init__(self, asked: Asked, kind: Kind) -> None:
        self._asked = asked
        self._kind = kind
        self._entries = Entries(asked, LIVE[kind])

    def href(self, name: str) -> str:
        """Encoded, with its slash."""
        return places.collection(self._asked.request, self._kind, self._asked.identity.sync_id, name)

    def response(self, one: Listed) -> str:
        """One collection."""
        return self._entries.response(self.href(one.collection.name), one, one.stored)


class Objects:
    """Responses for members of one collection, from bare rows (`objects.COLUMNS`).

    What is asked becomes one template, so that a member costs a microsecond or two.

    Args:
        href: of the collection, encoded.
        wanted: what a report asks of the content; None where it does not.
    """

    def __init__(
        self, asked: Asked, collection: Collection, href: str, wanted: data.DataRequest | None = None
    ) -> None:
        self._data = wanted
        self._asked = asked
        self._collection = collection
        self._values: list[tuple[int, Callable[[Any], str] | None]] = []  # column, what is made of it
        names = self._names()
        inner = "".join([self._piece(name) for name in names if name in _OBJECT])
        absent = [name for name in names if name not in _OBJECT]
        missing = "" if asked.minimal or not absent else webdav.missing(absent)
        head = f"<d:response><d:href>{_literal(href)}%s</d:href>"
        self._head = head + webdav.propstat(200, inner)
        self._tail = f"{missing}</d:response>"
        nothing = "" if inner or missing else f"<d:propstat><d:prop/>{webdav.OK}</d:propstat>"
        self._whole = self._head + _literal(nothing + self._tail)

    def _names(self) -> Iterable[str]:
        find = self._asked.find
        if find.kind == "propname":
            return sorted(_OBJECT)
        if find.kind == "allprop":
            return dict.fromkeys((*(name for name in _ALLPROP if name in _OBJECT), *find.names))
        content = self._data.name if self._data else ""  # it is answered through `payload`
        return [name for name in find.names if name != content]

    def _piece(self, name: str) -> str:
        """Part of the template for one property."""
        if self._asked.find.kind == "propname":
            return _literal(xml.empty(name))
        if name in _SAME:
            return _literal(_SAME[name](self._asked))
        markup, column, make = _OWN_VALUE.get(name, ("%s", _ID, self._resource_id))
        if name == DAV + "getetag":
            prefix = changes.etag(self._asked.generation, self._collection.id, 0)[:-1]
            markup = markup.replace("?", prefix)
        self._values.append((column, make))
        return markup

    def _resource_id(self, number: int) -> str:
        return self._asked.resource_id("object", number)

    @property
    def columns(self) -> tuple[int, ...] | None:
        """Which of `objects.COLUMNS` `page` takes, in order; None where members need more than their rows."""
        if any(make for _, make in self._values):
            return None
        return (_NAME, *(column for column, _ in self._values))

    def page(self, rows: Sequence[Row]) -> str:
        """Many objects at once, from rows of `columns`."""
        if not grammar.is_plain("".join([row[0] for row in rows])):
            rows = [(grammar.quote_segment(row[0]), *row[1:]) for row in rows]
        whole = self._whole
        return "".join([whole % row for row in rows])

    def response(self, row: Row, payload: data.Payload | None = None) -> str:
        """One object."""
        values = (
            grammar.quote_segment(row[_NAME]),
            *[make(row[column]) if make else row[column] for column, make in self._values],
        )
        if payload is None or self._data is None:
            return self._whole % values
        if payload.error is not None:
            extra = webdav.propstat(payload.error.status, xml.empty(self._data.name))
        else:
            extra = webdav.propstat(200, xml.tag(self._data.name, xml.escape(payload.text)))
        return f"{self._head % values}{extra}{self._tail}"


def _literal(text: str) -> str:
    """Text as it stands in a template."""
    return text.replace("%", "%%")


def refuse(instructions: Sequence[webdav.Instruction], href: str) -> str:
    """The answer of a PROPPATCH where no property can be set (RFC 4918 §9.2.1)."""
    names = "".join([xml.empty(each.name) for each in instructions])
    error = f"<d:error>{xml.empty(DAV + 'cannot-modify-protected-property')}</d:error>"
    return webdav.multistatus([webdav.response(href, webdav.propstat(403, names, error))])
