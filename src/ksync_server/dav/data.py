"""The elements calendar-data and address-data: which part of an object a report answers, in which form."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ksync_server import settings as configuration
from ksync_server.dav import filters, objects, occurrences
from ksync_server.dav.places import Kind
from ksync_server.errors import CALDAV, CARDDAV, BadRequest, ClientError, Forbidden, InsufficientStorage
from ksync_server.wire import contentline, ical, recurrence, vcard
from ksync_server.wire.xml import Element

NAME = {Kind.CALENDAR: CALDAV + "calendar-data", Kind.ADDRESSBOOK: CARDDAV + "address-data"}

# What may be asked. Cards are answered in the version they were stored in: without a translation, 4.0 is not
# offered, since then programs would write it and Apple's could not read it.
_TYPES = {
    Kind.CALENDAR: (("text/calendar",), ("2.0",)),
    Kind.ADDRESSBOOK: (("text/vcard", "text/x-vcard"), ("3.0",)),
}
_DEPTH = 8  # comp elements inside each other
_RANGES = ("expand", "limit-recurrence-set", "limit-freebusy-set")


@dataclass(frozen=True, slots=True)
class Range:
    """Half-open [start, end) in UTC."""

    start: datetime.datetime
    end: datetime.datetime


@dataclass(frozen=True, slots=True)
class DataRequest:
    """What a report asks of each object's content. Without any restriction the stored bytes are answered."""

    kind: Kind
    selection: ical.CompSelection | None = None  # part of a calendar object
    props: Mapping[str, bool] | None = None  # part of a card: upper-case name -> without its value
    expand: Range | None = None
    limit_recurrence: Range | None = None
    limit_freebusy: Range | None = None

    @property
    def name(self) -> str:
        """Clark name of the element."""
        return NAME[self.kind]

    @property
    def whole(self) -> bool:
        """Whether the stored bytes are the answer."""
        return (self.selection, self.props, self.expand, self.limit_recurrence, self.limit_freebusy) == (
            None,
            None,
            None,
            None,
            None,
        )

    @property
    def needs_zone(self) -> bool:
        """Whether the answer depends on the time zone of floating times."""
        return bool(self.expand or self.limit_recurrence or self.limit_freebusy)


def find(kind: Kind, prop: Element | None) -> DataRequest | None:
    """What a report's `prop` element asks of the content; None where it does not ask for it.

    Raises:
        Forbidden: supported-calendar-data or supported-address-data: a media type or version we do not
            answer.
        BadRequest: malformed.

    Spec: RFC 4791 §9.6, RFC 6352 §10.4.
    """
    element = prop.find(NAME[kind]) if prop else None
    if element is None:
        return None
    types, versions = _TYPES[kind]
    media_type, version = element.get("content-type"), element.get("version")
    if (media_type is not None and media_type.strip().lower() not in types) or (
        version is not None and version.strip() not in versions
    ):
        raise Forbidden(
            f"Objects are answered as {types[0]} {versions[0]} only.",
            precondition=objects.SUPPORTED_DATA[kind],
        )
    return _calendar(element) if kind is Kind.CALENDAR else _card(element)


def _calendar(element: Element) -> DataRequest:
    comp = element.find(CALDAV + "comp")
    ranges = {name: _range(element.find(CALDAV + name)) for name in _RANGES}
    if ranges["expand"] and ranges["limit-recurrence-set"]:
        raise BadRequest("expand and limit-recurrence-set exclude each other.")
    return DataRequest(
        Kind.CALENDAR,
        selection=_selection(comp, _DEPTH) if comp else None,
        expand=ranges["expand"],
        limit_recurrence=ranges["limit-recurrence-set"],
        limit_freebusy=ranges["limit-freebusy-set"],
    )


def _range(element: Element | None) -> Range | None:
    if element is None:
        return None
    found = filters.parse_range(element, BadRequest)
    if found.start is None or found.end is None:
        raise BadRequest("The time range needs a start and an end.")
    return Range(found.start, found.end)


def _selection(element: Element, depth: int) -> ical.CompSelection:
    if depth == 0:
        raise BadRequest("calendar-data is nested too deep.")
    return ical.CompSelection(
        _name(element),
        all_props=element.find(CALDAV + "allprop") is not None,
        props=_props(element, CALDAV),
        all_comps=element.find(CALDAV + "allcomp") is not None,
        comps=tuple(_selection(child, depth - 1) for child in element.all(CALDAV + "comp")),
    )


def _card(element: Element) -> DataRequest:
    if not element.elements() or element.find(CARDDAV + "allprop") is not None:
        return DataRequest(Kind.ADDRESSBOOK)
    return DataRequest(Kind.ADDRESSBOOK, props=_props(element, CARDDAV))


def _props(element: Element, namespace: str) -> dict[str, bool]:
    return {_name(prop): prop.get("novalue") == "yes" for prop in element.all(namespace + "prop")}


def _name(element: Element) -> str:
    name = (element.get("name") or "").strip().upper()
    if not name:
        raise BadRequest("A component or property without its name.")
    return name


@dataclass(frozen=True, slots=True)
class Payload:
    """What is answered of one object's content: text, not yet escaped, or the error that stands for it."""

    text: str = ""
    error: ClientError | None = None


class Renderer:
    """Contents of the objects of one answer as asked; one thread at a time.

    Args:
        zone: for floating times.
    """

    def __init__(self, asked: DataRequest, zone: datetime.tzinfo, limits: configuration.Dav) -> None:
        self._asked = asked
        self._zone = zone
        self._allowance = occurrences.Allowance(objects.budget(limits))
        self._left_bytes = limits.max_answer_bytes

    @property
    def is_quick(self) -> bool:
        """Whether the event loop may call `payload`."""
        return self._asked.whole

    def payload(self, content: bytes) -> Payload:
        """One object's part of the answer; 507 for one with more instances than it may have, or where the
        whole answer became too large.

        Spec: RFC 4791 §9.6.1 to §9.6.7, RFC 6352 §10.4.2.
        Cost: none for the whole object; else one parse, and for expand at most the object's budget.
        """
        if self._asked.whole:
            return Payload(contentline.as_text(content))
        if self._left_bytes <= 0:
            return Payload(error=InsufficientStorage("The answer is too large."))
        try:
            text = self._render(content)
        except recurrence.TooManySteps:
            self._allowance.exhausted()
            return Payload(error=InsufficientStorage("The object has too many instances in this range."))
        self._left_bytes -= len(text)
        return Payload(text)

    def _render(self, content: bytes) -> str:
        asked = self._asked
        if asked.props is not None:
            return vcard.select(vcard.parse(content, objects.STORED_CARD), asked.props)
        calendar = ical.parse(content, objects.STORED)
        if asked.needs_zone:
            calendar = self._in_range(calendar)
        if asked.selection is not None and asked.selection.name == calendar.name:
            return ical.select(calendar, asked.selection)
        return ical.serialise(calendar)

    def _in_range(self, calendar: ical.Component) -> ical.Component:
        asked = self._asked
        found = ical.check_object(calendar, objects.STORED)
        if asked.limit_freebusy:
            calendar = recurrence.limit_freebusy_set(
                found, asked.limit_freebusy.start, asked.limit_freebusy.end, self._zone
            )
            found = ical.check_object(calendar, objects.STORED)
        chosen = asked.expand or asked.limit_recurrence
        if chosen is None:
            return calendar
        cut = recurrence.expand if asked.expand else recurrence.limit_recurrence_set
        budget = replace(self._allowance.budget, max_bytes=self._left_bytes)
        return cut(found, chosen.start, chosen.end, self._zone, budget)
