"""Filters of calendar-query and addressbook-query: parsed once, evaluated on parsed objects.

A calendar filter is decided within one instance: the component that lies in the time range is the one whose
properties must match (RFC 4791 §9.7.1), so a moved or renamed occurrence counts as itself.
"""

from __future__ import annotations

import datetime
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from ksync_server.errors import CALDAV, CARDDAV, Forbidden
from ksync_server.wire import ical, recurrence, vcard
from ksync_server.wire.contentline import Property
from ksync_server.wire.xml import Element

_COLLATIONS = ("i;ascii-casemap", "i;octet", "i;unicode-casemap")
_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}
_DEPTH = 4  # VCALENDAR > VEVENT > VALARM is all there is; one more for the standard's future
_COUNT = 200  # filters of one query: every one is tried on every candidate
_UTC = re.compile(r"\d{8}T\d{6}Z", re.ASCII)

# What may stand where (RFC 5545 §3.6, RFC 7953 §3.1); names not listed are extensions and may stand anywhere.
_INSIDE = {
    "VALARM": ("VEVENT", "VTODO"),
    "AVAILABLE": ("VAVAILABILITY",),
    "STANDARD": ("VTIMEZONE",),
    "DAYLIGHT": ("VTIMEZONE",),
    "VCALENDAR": (),
} | dict.fromkeys(["VTIMEZONE", *ical.OBJECT_KINDS], ("VCALENDAR",))
_TIMED_COMPONENTS = ical.OBJECT_KINDS | {"VALARM"}
_TIMED_PROPERTIES = frozenset(
    {
        "ACKNOWLEDGED",
        "COMPLETED",
        "CREATED",
        "DTEND",
        "DTSTAMP",
        "DTSTART",
        "DUE",
        "EXDATE",
        "LAST-MODIFIED",
        "RDATE",
        "RECURRENCE-ID",
    }
)

MatchType = Literal["contains", "equals", "starts-with", "ends-with"]
_MATCH_TYPES: dict[str, MatchType] = {
    "contains": "contains",
    "equals": "equals",
    "starts-with": "starts-with",
    "ends-with": "ends-with",
}


@dataclass(frozen=True, slots=True)
class TextMatch:
    """RFC 4791 §9.7.5, RFC 6352 §10.5.4. `text` is folded by the collation already."""

    text: str
    collation: str
    negate: bool
    kind: MatchType

    def matches(self, value: str) -> bool:
        """Whether one value satisfies it, negation not yet applied."""
        folded = fold(value, self.collation)
        if self.kind == "equals":
            return folded == self.text
        if self.kind == "starts-with":
            return folded.startswith(self.text)
        if self.kind == "ends-with":
            return folded.endswith(self.text)
        return self.text in folded


@dataclass(frozen=True, slots=True)
class ParamFilter:
    """RFC 4791 §9.7.3, RFC 6352 §10.5.2."""

    name: str
    is_not_defined: bool
    text: TextMatch | None


@dataclass(frozen=True, slots=True)
class TimeRange:
    """Half-open [start, end) in UTC; None = unbounded (RFC 4791 §9.9)."""

    start: datetime.datetime | None
    end: datetime.datetime | None


@dataclass(frozen=True, slots=True)
class PropFilter:
    """RFC 4791 §9.7.2, RFC 6352 §10.5.1."""

    name: str
    is_not_defined: bool
    time_range: TimeRange | None
    texts: tuple[TextMatch, ...]
    params: tuple[ParamFilter, ...]
    any_of: bool  # contacts: one condition suffices


@dataclass(frozen=True, slots=True)
class CompFilter:
    """RFC 4791 §9.7.1."""

    name: str
    is_not_defined: bool
    time_range: TimeRange | None
    props: tuple[PropFilter, ...]
    comps: tuple[CompFilter, ...]


@dataclass(frozen=True, slots=True)
class CardFilter:
    """RFC 6352 §10.5."""

    any_of: bool
    props: tuple[PropFilter, ...]


def fold(text: str, collation: str) -> str:
    """The text as the collation compares it (RFC 4790 §9.2, RFC 5051)."""
    if collation == "i;octet":
        return text
    if text.isascii():
        return text.lower()
    if collation == "i;ascii-casemap":
        return text.translate(_ASCII_LOWER)
    return "".join(map(_folded_character, text))


@lru_cache(maxsize=8192)
def _folded_character(character: str) -> str:
    """One character without case and decomposed: composed and decomposed text are alike.

    Character by character, as RFC 5051 §2 has it: combining marks are not put in order, so what is part of a
    text is part of the folded text.
    """
    plain = unicodedata.normalize("NFKD", character)
    return unicodedata.normalize("NFKD", plain.upper().casefold())


# -- parsing --------------------------------------------------------------------------------------


class _Grammar:
    """The differences between the CalDAV and the CardDAV dialect of one filter language."""

    def __init__(self, namespace: str, default_collation: str) -> None:
        self.namespace = namespace
        self.default_collation = default_collation
        self.left = _COUNT

    def invalid(self, text: str) -> Forbidden:
        name = f"{CALDAV}valid-filter" if self.namespace == CALDAV else f"{CARDDAV}supported-filter"
        return Forbidden(text, precondition=name)

    def children(self, element: Element, *names: str) -> list[Element]:
        """The element's filter children; anything of our namespace that does not belong there is an error."""
        found = []
        for child in element.elements():
            local = child.tag.removeprefix(self.namespace)
            if local == child.tag:
                continue  # another namespace's extension: ignored (RFC 4918 §17)
            if local not in names:
                raise self.invalid(f"{local} is not allowed inside {element.tag}.")
            self.left -= 1
            if self.left < 0:
                raise self.invalid("Too many conditions in one filter.")
            found.append(child)
        return found

    def is_named(self, element: Element, name: str) -> bool:
        return element.tag == self.namespace + name

    def name_of(self, element: Element) -> str:
        name = element.get("name")
        if not name:
            raise self.invalid("A filter has no name.")
        return name.upper()

    def text_match(self, element: Element) -> TextMatch:
        collation = element.get("collation") or self.default_collation
        if collation == "default":
            collation = self.default_collation
        if collation not in _COLLATIONS:
            raise Forbidden(
                f"The collation {collation} is not supported.",
                precondition=f"{self.namespace}supported-collation",
            )
        negate = element.get("negate-condition") or "no"
        if negate not in ("yes", "no"):
            raise self.invalid("negate-condition is yes or no.")
        kind = _MATCH_TYPES.get(element.get("match-type") or "contains")
        if kind is None:
            raise self.invalid("match-type is equals, contains, starts-with or ends-with.")
        return TextMatch(fold(element.text, collation), collation, negate == "yes", kind)

    def param_filter(self, element: Element) -> ParamFilter:
        parts = self.children(element, "is-not-defined", "text-match")
        if len(parts) > 1:
            raise self.invalid("A param-filter has one condition at most.")
        text = self.text_match(parts[0]) if parts and self.is_named(parts[0], "text-match") else None
        return ParamFilter(self.name_of(element), bool(parts) and text is None, text)

    def prop_filter(self, element: Element) -> PropFilter:
        card = self.namespace == CARDDAV
        names = ("is-not-defined", "text-match", "param-filter") + (() if card else ("time-range",))
        parts = self.children(element, *names)
        absent = any(self.is_named(part, "is-not-defined") for part in parts)
        if absent and len(parts) > 1:
            raise self.invalid("is-not-defined stands alone.")
        texts = tuple(self.text_match(part) for part in parts if self.is_named(part, "text-match"))
        ranges = [_time_range(part, self) for part in parts if self.is_named(part, "time-range")]
        if not card and len(texts) + len(ranges) > 1:
            raise self.invalid("A prop-filter has one text-match or time-range at most.")
        name = self.name_of(element)
        if ranges and name not in _TIMED_PROPERTIES and not name.startswith("X-"):
            raise self.invalid(f"{name} is no time.")
        return PropFilter(
            name,
            absent,
            ranges[0] if ranges else None,
            texts,
            tuple(self.param_filter(part) for part in parts if self.is_named(part, "param-filter")),
            card and self.any_of(element),
        )

    def any_of(self, element: Element) -> bool:
        test = element.get("test") or "anyof"
        if test not in ("anyof", "allof"):
            raise self.invalid("test is anyof or allof.")
        return test == "anyof"

    def comp_filter(self, element: Element, depth: int, parent: str) -> CompFilter:
        if depth > _DEPTH:
            raise self.invalid("The filter is nested too deep.")
        name = self.name_of(element)
        if parent and parent not in _INSIDE.get(name, (parent,)):
            raise self.invalid(f"There is no {name} inside {parent}.")
        parts = self.children(element, "is-not-defined", "time-range", "prop-filter", "comp-filter")
        absent = any(self.is_named(part, "is-not-defined") for part in parts)
        if absent and len(parts) > 1:
            raise self.invalid("is-not-defined stands alone.")
        ranges = [_time_range(part, self) for part in parts if self.is_named(part, "time-range")]
        if len(ranges) > 1:
            raise self.invalid("A comp-filter has one time-range at most.")
        if ranges and name not in _TIMED_COMPONENTS:
            raise self.invalid(f"{name} has no time range.")
        return CompFilter(
            name,
            absent,
            ranges[0] if ranges else None,
            tuple(self.prop_filter(part) for part in parts if self.is_named(part, "prop-filter")),
            tuple(
                self.comp_filter(part, depth + 1, name)
                for part in parts
                if self.is_named(part, "comp-filter")
            ),
        )


def parse_utc(value: str | None) -> datetime.datetime | None:
    """A `date with UTC time` attribute; None where it is absent.

    Raises:
        ValueError: any other form.
    """
    if value is None:
        return None
    if _UTC.fullmatch(value) is None:
        raise ValueError("no time in UTC")
    return datetime.datetime.strptime(value, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)


def parse_range(element: Element, invalid: Callable[[str], Exception]) -> TimeRange:
    """`start` and `end` of time-range, expand, limit-recurrence-set ..., where at least one is there.

    Raises:
        Exception: what `invalid` makes of a sentence.
    """
    try:
        start, end = parse_utc(element.get("start")), parse_utc(element.get("end"))
    except ValueError:
        raise invalid("A time is written 20260131T080000Z.") from None
    if start is None and end is None:
        raise invalid("A time range needs a start or an end.")
    if start is not None and end is not None and end <= start:
        raise invalid("A time range ends after it starts.")
    return TimeRange(start, end)


def _time_range(element: Element, grammar: _Grammar) -> TimeRange:
    return parse_range(element, grammar.invalid)


def parse_calendar_filter(element: Element) -> CompFilter:
    """The `C:filter` of a calendar-query.

    Raises:
        Forbidden: valid-filter or supported-collation.

    Spec: RFC 4791 §7.8, §9.7.
    """
    grammar = _Grammar(CALDAV, "i;ascii-casemap")
    parts = grammar.children(element, "comp-filter")
    if len(parts) != 1 or grammar.name_of(parts[0]) != "VCALENDAR":
        raise grammar.invalid("A filter is one comp-filter of VCALENDAR.")
    return grammar.comp_filter(parts[0], 1, "")


def parse_card_filter(element: Element) -> CardFilter:
    """The `C:filter` of an addressbook-query.

    Raises:
        Forbidden: supported-filter or supported-collation.

    Spec: RFC 6352 §8.6, §10.5.
    """
    grammar = _Grammar(CARDDAV, "i;unicode-casemap")
    parts = grammar.children(element, "prop-filter")
    return CardFilter(grammar.any_of(element), tuple(grammar.prop_filter(part) for part in parts))


# -- evaluation -----------------------------------------------------------------------------------


def _text(match: TextMatch, values: Iterable[str]) -> bool:
    """Whether any value matches; negated: whether none does (RFC 4791 §9.7.5, RFC 6352 §10.5.4)."""
    return any(match.matches(value) for value in values) != match.negate


def _param(condition: ParamFilter, prop: Property) -> bool:
    values = prop.param_values(condition.name)
    defined = bool(values) or prop.param(condition.name) is not None
    if condition.is_not_defined:
        return not defined
    return defined and (condition.text is None or _text(condition.text, values))


def _property(
    condition: PropFilter,
    found: list[Property],
    text_of: Callable[[Property], str],
    in_range: Callable[[Property], bool],
) -> bool:
    """One prop-filter on the properties of its name: whether one of them satisfies it by itself.

    Text and parameters are asked of the same property: the attendee who is lisa is the one who has not
    answered (RFC 4791 §7.8.7).
    """
    if condition.is_not_defined:
        return not found
    return any(_one_property(condition, prop, text_of, in_range) for prop in found)


def _one_property(
    condition: PropFilter,
    prop: Property,
    text_of: Callable[[Property], str],
    in_range: Callable[[Property], bool],
) -> bool:
    if condition.time_range is not None and not in_range(prop):
        return False
    if not condition.texts and not condition.params:
        return True
    text = text_of(prop) if condition.texts else ""
    results = [_text(match, (text,)) for match in condition.texts]
    results += [_param(param, prop) for param in condition.params]
    return any(results) if condition.any_of else all(results)


@dataclass(frozen=True, slots=True)
class _Calendar:
    """What deciding about one calendar object needs."""

    object: ical.CalendarObject
    zone: datetime.tzinfo
    budget: recurrence.Budget
    rings: dict[TimeRange, set[tuple[int, int]]] = field(default_factory=dict)  # what `ringing` found

    def inside(self, wanted: CompFilter, component: ical.Component) -> bool:
        """Properties and nested components of one component, its own time range apart."""
        return all(self.property(condition, component) for condition in wanted.props) and all(
            self.nested(child, component) for child in wanted.comps
        )

    def property(self, condition: PropFilter, component: ical.Component) -> bool:
        """One prop-filter on one component."""
        found = component.all(condition.name)
        return _property(condition, found, Property.text, lambda prop: self.in_range(condition, prop))

    def in_range(self, condition: PropFilter, prop: Property) -> bool:
        """The time-range of a prop-filter on one date property."""
        wanted = condition.time_range
        assert wanted is not None
        if "," in prop.value:  # EXDATE, RDATE
            values = [Property(prop.name, prop.params, text, "") for text in prop.value.split(",")]
        else:
            values = [prop]
        return any(
            recurrence.property_in_range(value, self.object.calendar, wanted.start, wanted.end, self.zone)
            for value in values
        )

    def nested(self, wanted: CompFilter, parent: ical.Component) -> bool:
        """A comp-filter below a component that is already chosen."""
        found = [child for child in parent.children if child.name == wanted.name]
        if wanted.is_not_defined:
            return not found
        if wanted.time_range is not None:  # of alarms: no other nested component has one
            ringing = self.ringing(wanted.time_range)
            found = [child for child in found if (id(parent), id(child)) in ringing]
        return any(self.inside(wanted, child) for child in found)

    def ringing(self, wanted: TimeRange) -> set[tuple[int, int]]:
        """The alarms that ring within a range, each with its component; computed once for all of them."""
        if wanted not in self.rings:
            alarms = recurrence.alarms(
                self.object, wanted.start, wanted.end, zone=self.zone, budget=self.budget
            )
            self.rings[wanted] = {(id(alarm.component), id(alarm.alarm)) for alarm in alarms}
        return self.rings[wanted]

    def top(self, wanted: CompFilter) -> bool:
        """A comp-filter directly below VCALENDAR: time ranges are decided per instance."""
        found = [child for child in self.object.calendar.children if child.name == wanted.name]
        if wanted.is_not_defined or not found:
            return wanted.is_not_defined and not found
        if wanted.time_range is None:
            return any(self.inside(wanted, component) for component in found)
        instances = recurrence.occurrences(
            self.object, wanted.time_range.start, wanted.time_range.end, zone=self.zone, budget=self.budget
        )
        tried: dict[int, bool] = {}
        for instance in instances:
            component = instance.component
            if id(component) not in tried:
                tried[id(component)] = self.inside(wanted, component)
            if tried[id(component)]:
                return True
        return False


def _ranges(wanted: CompFilter) -> int:
    """How often the filter asks when something happens."""
    return sum(map(_ranges, wanted.comps), int(wanted.time_range is not None))


def matches_calendar(
    wanted: CompFilter, found: ical.CalendarObject, zone: datetime.tzinfo, budget: recurrence.Budget
) -> bool:
    """Whether a calendar object satisfies the filter.

    Args:
        zone: for floating and DATE values: the query's or the collection's time zone.

    Raises:
        recurrence.TooManySteps: the budget ended before it was decided.

    Spec: RFC 4791 §9.7. Cost: the object's recurrence within the range, at most the budget.
    """
    if wanted.is_not_defined:
        return False
    ranges = max(1, _ranges(wanted))
    calendar = _Calendar(found, zone, replace(budget, max_steps=budget.max_steps // ranges))
    return all(calendar.property(condition, found.calendar) for condition in wanted.props) and all(
        calendar.top(comp) for comp in wanted.comps
    )


def matches_card(wanted: CardFilter, card: vcard.Card) -> bool:
    """Whether a vCard satisfies the filter; an empty filter matches all.

    Spec: RFC 6352 §10.5. A name with a group (`item1.TEL`) matches that group only.
    """
    if not wanted.props:
        return True
    results = (_card_property(condition, card) for condition in wanted.props)
    return any(results) if wanted.any_of else all(results)


def _card_property(condition: PropFilter, card: vcard.Card) -> bool:
    group, dot, name = condition.name.rpartition(".")
    found = card.all(name if dot else condition.name)
    if dot:
        found = [prop for prop in found if prop.group.upper() == group]
    return _property(condition, found, vcard.text_of, lambda _: True)


# -- what the rows keep ---------------------------------------------------------------------------

_FOLDED = ("FN", "N", "NICKNAME", "EMAIL", "TEL", "ORG")  # what people search a contact by
_FOLDED_CHARACTERS = 2_000


def folded(card: vcard.Card) -> str:
    """The searchable text of a contact for its row: folded values, one a line, each behind its name.

    A prefilter only: what `may_match` lets pass is still decided on the card itself.
    """
    values = [(name, _coarse(vcard.text_of(prop))) for name in _FOLDED for prop in card.all(name)]
    text = "\n".join(f"{name.lower()}:{value}" for name, value in values)
    return text if len(text) <= _FOLDED_CHARACTERS else ""  # "" = ask the card


def _coarse(text: str) -> str:
    """Folded at least as much as any collation folds; what is part of a text stays part of it."""
    return fold(text, "i;unicode-casemap").replace("\n", " ")


def may_match(wanted: CardFilter, text: str) -> bool:
    """Whether a contact with this `folded` text can satisfy the filter; True where the text cannot tell."""
    if not text or not wanted.props:
        return True
    results = (_may_match(condition, text) for condition in wanted.props)
    return any(results) if wanted.any_of else all(results)


def _may_match(condition: PropFilter, text: str) -> bool:
    decidable = (
        condition.name in _FOLDED
        and not condition.is_not_defined
        and not condition.params
        and condition.texts
        and not any(match.negate for match in condition.texts)
    )
    if not decidable:
        return True
    found = (_coarse(match.text) in text for match in condition.texts)
    return any(found) if condition.any_of else all(found)
