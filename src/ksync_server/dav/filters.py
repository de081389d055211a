"""Filters of calendar-query and addressbook-query: parsed once, evaluated on parsed objects.

A calendar filter is decided within one instance: the component that lies in the time range is the one whose
properties must match (RFC 4791 §9.7.1), so a moved or renamed occurrence counts as itself.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ksync_server.errors import CALDAV, CARDDAV, Forbidden
from ksync_server.wire import ical, recurrence, vcard
from ksync_server.wire.contentline import Property
from ksync_server.wire.xml import Element

_COLLATIONS = ("i;ascii-casemap", "i;octet", "i;unicode-casemap")
_ASCII_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}
_DEPTH = 4  # VCALENDAR > VEVENT > VALARM is all there is; one more for the standard's future
_COUNT = 200  # filters of one query: every one is tried on every candidate

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
    if collation == "i;ascii-casemap":
        return text.translate(_ASCII_LOWER)
    return text.casefold()


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
        return PropFilter(
            self.name_of(element),
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

    def comp_filter(self, element: Element, depth: int) -> CompFilter:
        if depth > _DEPTH:
            raise self.invalid("The filter is nested too deep.")
        parts = self.children(element, "is-not-defined", "time-range", "prop-filter", "comp-filter")
        absent = any(self.is_named(part, "is-not-defined") for part in parts)
        if absent and len(parts) > 1:
            raise self.invalid("is-not-defined stands alone.")
        ranges = [_time_range(part, self) for part in parts if self.is_named(part, "time-range")]
        if len(ranges) > 1:
            raise self.invalid("A comp-filter has one time-range at most.")
        return CompFilter(
            self.name_of(element),
            absent,
            ranges[0] if ranges else None,
            tuple(self.prop_filter(part) for part in parts if self.is_named(part, "prop-filter")),
            tuple(self.comp_filter(part, depth + 1) for part in parts if self.is_named(part, "comp-filter")),
        )


def parse_utc(value: str | None) -> datetime.datetime | None:
    """A `date with UTC time` attribute; None where it is absent.

    Raises:
        ValueError: any other form.
    """
    if value is None:
        return None
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
    top = grammar.comp_filter(parts[0], 1)
    if top.time_range is not None:
        raise grammar.invalid("VCALENDAR has no time range.")
    return top


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
    """Whether any value matches; negated: whether none does (RFC 6352 §10.5.4)."""
    return any(match.matches(value) for value in values) != match.negate


def _param(condition: ParamFilter, prop: Property) -> bool:
    values = prop.param_values(condition.name)
    defined = bool(values) or prop.param(condition.name) is not None
    if condition.is_not_defined:
        return not defined
    return defined and (condition.text is None or _text(condition.text, values))


def _property(
    condition: PropFilter, found: list[Property], texts: list[str], in_range: Callable[[Property], bool]
) -> bool:
    """One prop-filter on the properties of its name; `texts` are their unescaped values."""
    if condition.is_not_defined or not found:
        return condition.is_not_defined and not found
    if condition.time_range is not None and not any(in_range(prop) for prop in found):
        return False
    conditions = [_text(match, texts) for match in condition.texts]
    conditions += [any(_param(param, prop) for prop in found) for param in condition.params]
    if not conditions:
        return True
    return any(conditions) if condition.any_of else all(conditions)


@dataclass(frozen=True, slots=True)
class _Calendar:
    """What deciding about one calendar object needs."""

    object: ical.CalendarObject
    zone: datetime.tzinfo
    budget: recurrence.Budget

    def inside(self, wanted: CompFilter, component: ical.Component) -> bool:
        """Properties and nested components of one component, its own time range apart."""
        return all(self.property(condition, component) for condition in wanted.props) and all(
            self.nested(child, component) for child in wanted.comps
        )

    def property(self, condition: PropFilter, component: ical.Component) -> bool:
        """One prop-filter on one component."""
        found = component.all(condition.name)
        return _property(
            condition, found, [prop.text() for prop in found], lambda prop: self.in_range(condition, prop)
        )

    def in_range(self, condition: PropFilter, prop: Property) -> bool:
        """The time-range of a prop-filter on one date property."""
        wanted = condition.time_range
        assert wanted is not None
        return recurrence.property_in_range(prop, self.object.calendar, wanted.start, wanted.end, self.zone)

    def nested(self, wanted: CompFilter, parent: ical.Component) -> bool:
        """A comp-filter below a component that is already chosen."""
        found = [child for child in parent.children if child.name == wanted.name]
        if wanted.is_not_defined:
            return not found
        if wanted.name == "VALARM" and wanted.time_range is not None:
            found = self.ringing(wanted.time_range, parent)
        return any(self.inside(wanted, child) for child in found)

    def ringing(self, wanted: TimeRange, parent: ical.Component) -> list[ical.Component]:
        """The alarms of a component that ring within a range."""
        alarms = recurrence.alarms(self.object, wanted.start, wanted.end, zone=self.zone, budget=self.budget)
        found = {id(alarm.alarm): alarm.alarm for alarm in alarms if alarm.component is parent}
        return list(found.values())

    def top(self, wanted: CompFilter) -> bool:
        """A comp-filter directly below VCALENDAR: time ranges are decided per instance."""
        found = [child for child in self.object.calendar.children if child.name == wanted.name]
        if wanted.is_not_defined or not found:
            return wanted.is_not_defined and not found
        if wanted.time_range is None:
            return any(self.inside(wanted, component) for component in found)
        if wanted.name != self.object.component:
            return False  # VTIMEZONE has no time of its own
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
    calendar = _Calendar(found, zone, budget)
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
    return _property(condition, found, [vcard.text_of(prop) for prop in found], lambda _: True)


# -- what the rows keep ---------------------------------------------------------------------------

_FOLDED = ("FN", "N", "NICKNAME", "EMAIL", "TEL", "ORG")  # what people search a contact by
_FOLDED_CHARACTERS = 2_000


def folded(card: vcard.Card) -> str:
    """The searchable text of a contact for its row: casefolded values, one a line, each behind its name.

    A prefilter only: what `may_match` lets pass is still decided on the card itself.
    """
    lines = [f"{name}:{vcard.text_of(prop)}".casefold() for name in _FOLDED for prop in card.all(name)]
    text = "\n".join(line.replace("\n", " ") for line in lines)
    return text if len(text) <= _FOLDED_CHARACTERS else ""  # "" = ask the card


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
    # Casefolding is coarser than every collation here, and a newline inside a value became a space.
    found = (match.text.casefold().replace("\n", " ") in text for match in condition.texts)
    return any(found) if condition.any_of else all(found)
