"""iCalendar (RFC 5545): bytes to frozen components and back, and the rules of CalDAV object resources.

The stored bytes are always the client's; what is read here only serves to check, index, filter and cut them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ksync_server.wire.contentline import (
    BadContent,
    LineReader,
    Params,
    Property,
    as_text,
    escape,
    fold,
    make_property,
    unfolded,
)
from ksync_server.wire.icaltime import BadTime, parse_duration, parse_moment
from ksync_server.wire.rrule import BadRule, parse_rule

__all__ = [
    "BadCalendar",
    "CalendarLimits",
    "CalendarObject",
    "CompSelection",
    "Component",
    "Params",
    "Property",
    "as_text",
    "calendar_of",
    "check_object",
    "escape",
    "make_property",
    "parse",
    "select",
    "serialise",
]

CALDAV = "{urn:ietf:params:xml:ns:caldav}"
VALID_DATA = CALDAV + "valid-calendar-data"
VALID_OBJECT = CALDAV + "valid-calendar-object-resource"
SUPPORTED_COMPONENT = CALDAV + "supported-calendar-component"
SUPPORTED_RSCALE = CALDAV + "supported-rscale"  # RFC 7529 §7.2
MAX_SIZE = CALDAV + "max-resource-size"
MAX_INSTANCES = CALDAV + "max-instances"
MAX_ATTENDEES = CALDAV + "max-attendees-per-instance"

OBJECT_KINDS = frozenset({"VEVENT", "VTODO", "VJOURNAL", "VFREEBUSY", "VAVAILABILITY"})
PRODID = "-//ksync-server//EN"


class BadCalendar(BadContent):
    """No calendar object that can be stored; `precondition` says which rule of RFC 4791 §5.3.2.1 failed."""


@dataclass(frozen=True, slots=True)
class Component:
    """BEGIN to END. Equal by content; `walk` gives itself first."""

    name: str  # upper case
    properties: tuple[Property, ...] = ()
    children: tuple[Component, ...] = ()

    def first(self, name: str) -> Property | None:
        """The first property of that (upper-case) name."""
        for prop in self.properties:
            if prop.name == name:
                return prop
        return None

    def all(self, name: str) -> list[Property]:
        """Every property of that (upper-case) name, in order."""
        return [prop for prop in self.properties if prop.name == name]

    def text(self, name: str) -> str | None:
        """The unescaped value of the first such property."""
        prop = self.first(name)
        return None if prop is None else prop.text()

    def walk(self) -> Iterator[Component]:
        """This component and everything inside it, depth first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, slots=True)
class CalendarLimits:
    """What one calendar object may hold."""

    max_bytes: int = 10 * 1024 * 1024  # octets as sent: inline attachments are the only large parts
    max_line_bytes: int = 10 * 1024 * 1024  # octets of one unfolded line: an attachment may be all of it
    max_properties: int = 20_000  # content lines: a yearlong daily series, each day changed, has some 10,000
    max_components: int = 5_000  # overrides, alarms and time zones together
    max_depth: int = 8  # nesting; RFC 5545 needs 3, Apple's and RFC 9073's parts 4
    max_attendees: int = 1_000  # of one component; each is a mail when invitations are sent
    max_timezones: int = 32  # VTIMEZONEs; real events name one to three
    max_dates: int = 2_000  # RDATE and EXDATE values together
    max_uid_characters: int = 1_000  # UIDs are indexed; the longest real ones have some 200


def parse(data: bytes, limits: CalendarLimits = CalendarLimits()) -> Component:
    """The one VCALENDAR in `data`.

    Args:
        data: an iCalendar stream; CRLF, LF or CR line ends, with or without byte order mark.
        limits: checked before anything is built from what exceeds them.

    Raises:
        BadCalendar: too large, not UTF-8, characters XML cannot carry, unbalanced, or not one VCALENDAR.

    Spec: RFC 5545 §3.1, §3.4; RFC 4791 §5.3.2.1.
    Cost: linear; some 1.5 µs per line, 10 MiB of attachments in some 50 ms.
    """
    if len(data) > limits.max_bytes:
        raise BadCalendar(f"The object has more than {limits.max_bytes} bytes.", MAX_SIZE)
    try:
        return _parsed(unfolded(data).split("\n"), len(data), limits)
    except BadCalendar:
        raise
    except BadContent as error:
        raise BadCalendar(error.text, VALID_DATA) from None


def _parsed(lines: list[str], size_bytes: int, limits: CalendarLimits) -> Component:
    if len(lines) > limits.max_properties and sum(map(bool, lines)) > limits.max_properties:
        raise BadCalendar(f"The object has more than {limits.max_properties} lines.", MAX_SIZE)
    if size_bytes > limits.max_line_bytes and any(len(s.encode()) > limits.max_line_bytes for s in lines):
        raise BadCalendar(f"A line has more than {limits.max_line_bytes} bytes.", MAX_SIZE)
    return _tree(lines, limits)


@dataclass(slots=True)
class _Open:
    """A component whose END has not come yet."""

    name: str
    properties: list[Property] = field(default_factory=list)
    children: list[Component] = field(default_factory=list)


def _tree(lines: Iterable[str], limits: CalendarLimits) -> Component:
    read = LineReader().read
    root = _Open("")
    stack = [root]
    top = root
    components = 0
    for line in lines:
        if not line:
            continue
        prop = read(line)
        if prop.name == "BEGIN":
            components += 1
            if components > limits.max_components or len(stack) > limits.max_depth:
                raise BadCalendar("The object has too many or too deep components.", MAX_SIZE)
            top = _Open(prop.value.strip().upper())
            stack.append(top)
        elif prop.name == "END":
            if top is root or prop.value.strip().upper() != top.name:
                raise BadCalendar(f"END:{prop.value[:50]} without its BEGIN.", VALID_DATA)
            stack.pop()
            done = Component(top.name, tuple(top.properties), tuple(top.children))
            top = stack[-1]
            top.children.append(done)
        elif top is not root:
            top.properties.append(prop)
        elif line.strip():
            raise BadCalendar("Text outside BEGIN:VCALENDAR and END:VCALENDAR.", VALID_DATA)
    if top is not root:
        raise BadCalendar(f"END:{top.name} is missing: the object is cut off.", VALID_DATA)
    if len(root.children) != 1 or root.children[0].name != "VCALENDAR":
        raise BadCalendar("The object is not exactly one VCALENDAR.", VALID_DATA)
    return root.children[0]


# --- CalDAV object resources -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CalendarObject:
    """A checked calendar object resource: one UID, one kind."""

    uid: str
    component: str  # VEVENT, VTODO, VJOURNAL, VFREEBUSY or VAVAILABILITY
    calendar: Component
    master: Component | None  # None: only overrides, i.e. an invitation to single instances
    overrides: tuple[Component, ...]  # those with RECURRENCE-ID

    @property
    def components(self) -> tuple[Component, ...]:
        """The master, if any, and the overrides."""
        return self.overrides if self.master is None else (self.master, *self.overrides)

    @property
    def has_recurrence(self) -> bool:
        """Whether a RRULE or RDATE makes more than one instance of the master possible."""
        return self.master is not None and any(p.name in {"RRULE", "RDATE"} for p in self.master.properties)


def check_object(
    calendar: Component,
    limits: CalendarLimits = CalendarLimits(),
) -> CalendarObject:
    """A VCALENDAR as a calendar object resource.

    VERSION and PRODID may be missing: clients have sent objects without them, and none reads them.

    Raises:
        BadCalendar: with the precondition of RFC 4791 §5.3.2.1 that failed.

    Spec: RFC 4791 §4.1, §5.3.2.1.
    Cost: linear in the number of properties.
    """
    if calendar.first("METHOD") is not None:
        raise BadCalendar("A stored calendar object must not have a METHOD.", VALID_OBJECT)
    parts = [child for child in calendar.children if child.name != "VTIMEZONE"]
    kind = _kind(parts)
    uid = _uid(parts, limits)
    masters = [part for part in parts if part.first("RECURRENCE-ID") is None]
    if len(masters) > 1:
        raise BadCalendar("Two components of one UID are without RECURRENCE-ID.", VALID_OBJECT)
    _count(calendar, parts, limits)
    for part in parts:
        _times(part)
    return CalendarObject(
        uid=uid,
        component=kind,
        calendar=calendar,
        master=masters[0] if masters else None,
        overrides=tuple(part for part in parts if part.first("RECURRENCE-ID") is not None),
    )


def _kind(parts: list[Component]) -> str:
    kinds = {part.name for part in parts}
    if not kinds:
        raise BadCalendar("The object holds no event, task or journal entry.", VALID_OBJECT)
    unknown = kinds - OBJECT_KINDS
    if unknown:
        raise BadCalendar(f"Components of kind {min(unknown)[:50]} are not kept here.", SUPPORTED_COMPONENT)
    if len(kinds) > 1:
        raise BadCalendar(f"One object holds {' and '.join(sorted(kinds))}.", VALID_OBJECT)
    return kinds.pop()


def _uid(parts: list[Component], limits: CalendarLimits) -> str:
    uids = set()
    for part in parts:
        found = part.all("UID")
        if len(found) != 1:
            raise BadCalendar("Each component needs exactly one UID.", VALID_OBJECT)
        uids.add(found[0].text())
    if len(uids) != 1:
        raise BadCalendar("One object holds components of several UIDs.", VALID_OBJECT)
    uid = uids.pop()
    if not uid.strip():
        raise BadCalendar("The UID is empty.", VALID_OBJECT)
    if "\n" in uid or len(uid) > limits.max_uid_characters:
        raise BadCalendar("The UID holds a line break or is too long.", VALID_OBJECT)
    return uid


def _times(part: Component) -> None:
    """What no program could place in time is refused before other clients receive it."""
    if part.name == "VEVENT" and part.first("DTSTART") is None:
        raise BadCalendar("An event needs a DTSTART.", VALID_DATA)
    try:
        for prop in part.properties:
            if prop.name in {"DTSTART", "DTEND", "DUE", "RECURRENCE-ID"}:
                parse_moment(prop.value)
            elif prop.name == "DURATION":
                parse_duration(prop.value)
            elif prop.name in {"RRULE", "EXRULE"}:
                until = parse_rule(prop.value).until
                if until is not None:
                    parse_moment(until)
    except BadTime as error:
        raise BadCalendar(f"{prop.name}: {error}", VALID_DATA) from None
    except BadRule as error:
        raise BadCalendar(error.text, SUPPORTED_RSCALE if error.rscale else VALID_DATA) from None


def _count(calendar: Component, parts: list[Component], limits: CalendarLimits) -> None:
    zones = sum(child.name == "VTIMEZONE" for child in calendar.children)
    if zones > limits.max_timezones:
        raise BadCalendar(f"The object holds more than {limits.max_timezones} time zones.", VALID_OBJECT)
    dates = 0
    for component in calendar.walk():
        for prop in component.properties:
            if prop.name in {"RDATE", "EXDATE"}:
                dates += 1 + prop.value.count(",")
    if dates > limits.max_dates:
        raise BadCalendar(f"The object holds more than {limits.max_dates} RDATE or EXDATE.", MAX_INSTANCES)
    for part in parts:
        if sum(prop.name == "ATTENDEE" for prop in part.properties) > limits.max_attendees:
            raise BadCalendar(f"More than {limits.max_attendees} attendees.", MAX_ATTENDEES)


# --- writing ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CompSelection:
    """The CALDAV:comp element of partial retrieval; one that selects nothing at all means everything.

    (RFC 4791 §9.6.1 does not say so, but its example in §7.8.1 answers `<C:comp name="VTIMEZONE"/>` with the
    whole component, and clients rely on it.)
    """

    name: str  # upper case
    all_props: bool = False
    props: Mapping[str, bool] = field(default_factory=dict)  # upper-case name -> novalue
    all_comps: bool = False
    comps: tuple[CompSelection, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the element stands without any selection inside."""
        return not (self.all_props or self.props or self.all_comps or self.comps)


def select(component: Component, selection: CompSelection) -> str:
    """The asked parts of a component as iCalendar text.

    Args:
        component: a VCALENDAR.
        selection: what the client asked for; its name is that of `component`.

    Spec: RFC 4791 §9.6.1 to §9.6.4.
    Cost: linear.
    """
    lines: list[str] = []
    _write_selected(component, selection, lines)
    return "".join(lines)


def _write_selected(component: Component, selection: CompSelection, lines: list[str]) -> None:
    if selection.whole:
        _write(component, lines)
        return
    lines.append(f"BEGIN:{component.name}\r\n")
    for prop in component.properties:
        if selection.all_props or prop.name in selection.props:
            lines.append(fold(_without_value(prop) if selection.props.get(prop.name) else prop.raw))
    by_name = {comp.name: comp for comp in selection.comps}
    for child in component.children:
        inner = by_name.get(child.name)
        if inner is not None:
            _write_selected(child, inner, lines)
        elif selection.all_comps:
            _write(child, lines)
    lines.append(f"END:{component.name}\r\n")


def _without_value(prop: Property) -> str:
    return prop.raw[: len(prop.raw) - len(prop.value)]


def serialise(component: Component) -> str:
    """A component as text: CRLF lines folded at 75 octets. Cost: linear."""
    lines: list[str] = []
    _write(component, lines)
    return "".join(lines)


def _write(component: Component, lines: list[str]) -> None:
    lines.append(f"BEGIN:{component.name}\r\n")
    lines.extend(fold(prop.raw) for prop in component.properties)
    for child in component.children:
        _write(child, lines)
    lines.append(f"END:{component.name}\r\n")


def calendar_of(children: Iterable[Component], *, method: str | None = None) -> Component:
    """A VCALENDAR of our own around `children`, e.g. the answer of a free-busy query."""
    head = [make_property("VERSION", "2.0"), make_property("PRODID", PRODID)]
    if method is not None:
        head.append(make_property("METHOD", method))
    return Component("VCALENDAR", tuple(head), tuple(children))
