"""vCard 2.1, 3.0 and 4.0: bytes to frozen cards, and the rules of CardDAV object resources.

The stored bytes are always the client's; what is read here only serves to check, index, filter and cut them.
"""

from __future__ import annotations

import quopri
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ksync_server.wire.contentline import (
    BadContent,
    LineReader,
    Property,
    as_text,
    fold,
    split,
    unescape,
    unfolded,
)

__all__ = [
    "BadCard",
    "Card",
    "CardLimits",
    "Property",
    "as_text",
    "check_card",
    "parse",
    "select",
    "serialise",
    "text_of",
    "texts_of",
    "values",
]

CARDDAV = "{urn:ietf:params:xml:ns:carddav}"
VALID_DATA = CARDDAV + "valid-address-data"
SUPPORTED_DATA = CARDDAV + "supported-address-data"
MAX_SIZE = CARDDAV + "max-resource-size"

VERSIONS = ("2.1", "3.0", "4.0")

# what vCard 2.1 programs write; a fixed list, since Python knows codecs that fail or take quadratic time
_CHARSETS = frozenset(
    {
        "iso-8859-1",
        "iso-8859-2",
        "iso-8859-15",
        "windows-1250",
        "windows-1251",
        "windows-1252",
        "shift_jis",
        "gbk",
    }
)
# quoted-printable can hide characters that no database or XML takes
_CONTROLS = dict.fromkeys([*set(range(0x20)) - {0x09, 0x0A, 0x0D}, 0xFFFE, 0xFFFF])


class BadCard(BadContent):
    """No vCard that can be stored; `precondition` says which rule of RFC 6352 §6.3.2.1 failed."""


@dataclass(frozen=True, slots=True)
class CardLimits:
    """What one vCard may hold."""

    max_bytes: int = 10 * 1024 * 1024  # octets as sent: a photo is the only large part
    max_properties: int = 20_000  # content lines: a group has one per member
    max_uid_characters: int = 1_000  # UIDs are indexed


@dataclass(frozen=True, slots=True)
class Card:
    """One vCard; `properties` are all lines between BEGIN and END, VERSION included."""

    properties: tuple[Property, ...]
    version: str  # "2.1", "3.0", "4.0"; "" when the card does not say
    uid: str | None
    fn: str  # "" without FN
    kind: str  # lower case: "individual", "group", "org", "location"; Apple's groups count

    def first(self, name: str) -> Property | None:
        """The first property of that (upper-case) name."""
        for prop in self.properties:
            if prop.name == name:
                return prop
        return None

    def all(self, name: str) -> list[Property]:
        """Every property of that (upper-case) name, whatever its group, in order."""
        return [prop for prop in self.properties if prop.name == name]


def parse(data: bytes, limits: CardLimits = CardLimits()) -> Card:
    """The one vCard in `data`.

    Raises:
        BadCard: too large, not UTF-8, characters XML cannot carry, or not exactly one vCard.

    Spec: RFC 6350 §3, RFC 2426 §4, vCard 2.1 (quoted-printable, bare types); RFC 6352 §5.1.
    Cost: linear; some 1.5 µs per line.
    """
    if len(data) > limits.max_bytes:
        raise BadCard(f"The card has more than {limits.max_bytes} bytes.", MAX_SIZE)
    try:
        lines = [line for line in unfolded(data).split("\n") if line.strip()]
        if len(lines) > limits.max_properties:
            raise BadCard(f"The card has more than {limits.max_properties} lines.", MAX_SIZE)
        properties = list(_properties(lines))
    except BadCard:
        raise
    except BadContent as error:
        raise BadCard(error.text, VALID_DATA) from None
    if len(properties) < 2 or not (_marks(properties[0], "BEGIN") and _marks(properties[-1], "END")):
        raise BadCard("The object is not one vCard from BEGIN:VCARD to END:VCARD.", VALID_DATA)
    inside = tuple(properties[1:-1])
    if any(prop.name in {"BEGIN", "END"} for prop in inside):
        raise BadCard("The object holds more than one vCard.", VALID_DATA)
    return _card(inside)


def _marks(prop: Property, name: str) -> bool:
    return prop.name == name and prop.value.strip().upper() == "VCARD"


def _properties(lines: Iterable[str]) -> Iterator[Property]:
    """The lines read; those of vCard 2.1 that a quoted-printable soft break cut are joined first."""
    read = LineReader(grouped=True).read
    rest: list[str] = []
    for line in lines:
        soft = line.endswith("=") and (bool(rest) or _quoted_printable(read(line)))
        if soft:
            rest.append(line[:-1])
        elif rest:
            yield read("".join((*rest, line)))
            rest.clear()
        else:
            yield read(line)
    if rest:
        yield read("".join(rest))


def _quoted_printable(prop: Property) -> bool:
    return any("QUOTED-PRINTABLE" in value.upper() for _, values in prop.params for value in values)


def _card(properties: tuple[Property, ...]) -> Card:
    seen: dict[str, str] = {}
    for prop in properties:
        if prop.name in {"VERSION", "UID", "FN", "KIND", "X-ADDRESSBOOKSERVER-KIND"}:
            seen.setdefault(prop.name, text_of(prop))
    kind = seen.get("KIND") or seen.get("X-ADDRESSBOOKSERVER-KIND") or "individual"
    return Card(
        properties=properties,
        version=seen.get("VERSION", "").strip(),
        uid=seen.get("UID"),
        fn=seen.get("FN", ""),
        kind=kind.strip().lower(),
    )


def check_card(card: Card, limits: CardLimits = CardLimits()) -> Card:
    """A card as an address object resource: a known VERSION and one UID.

    FN (or N) may be missing or empty: real address books hold cards with only an e-mail address.

    Raises:
        BadCard: with the precondition of RFC 6352 §6.3.2.1 that failed.

    Spec: RFC 6352 §5.1, §6.3.2.1.
    """
    if card.version not in VERSIONS:
        raise BadCard(
            "The card has no VERSION of 2.1, 3.0 or 4.0.", SUPPORTED_DATA if card.version else VALID_DATA
        )
    if len(card.all("UID")) != 1 or card.uid is None or not card.uid.strip():
        raise BadCard("The card needs exactly one UID.", VALID_DATA)
    if "\n" in card.uid or len(card.uid) > limits.max_uid_characters:
        raise BadCard("The UID holds a line break or is too long.", VALID_DATA)
    return card


# --- values ----------------------------------------------------------------------------------------


def text_of(prop: Property) -> str:
    """The value as people read it: quoted-printable (vCard 2.1) decoded, escapes undone."""
    return unescape(_decoded(prop))


def texts_of(prop: Property, separator: str = ",") -> list[str]:
    """The values of a list (",") or the parts of a structured value (";"), each unescaped."""
    return [unescape(part) for part in split(_decoded(prop), separator)]


def values(card: Card, name: str) -> list[str]:
    """The texts of every property of that name: what a text-match looks at (RFC 6352 §10.5.4)."""
    return [text_of(prop) for prop in card.properties if prop.name == name]


def _decoded(prop: Property) -> str:
    if not prop.params or not _quoted_printable(prop):
        return prop.value
    octets = quopri.decodestring(prop.value.encode("utf-8"))
    charset = (prop.param("CHARSET") or "").lower()
    text = octets.decode(charset if charset in _CHARSETS else "utf-8", "replace")
    return text.translate(_CONTROLS)


# --- writing ---------------------------------------------------------------------------------------


def select(card: Card, props: Mapping[str, bool]) -> str:
    """Partial address-data: the asked properties (upper-case name -> novalue), and VERSION always.

    An asked name selects the property in every group, as a filter does.

    Spec: RFC 6352 §10.4.2.
    Cost: linear.
    """
    lines = ["BEGIN:VCARD\r\n"]
    for prop in card.properties:
        if prop.name in props:
            novalue = props[prop.name] and prop.name != "VERSION"
            lines.append(fold(prop.raw[: len(prop.raw) - len(prop.value)] if novalue else prop.raw))
        elif prop.name == "VERSION":
            lines.append(fold(prop.raw))
    lines.append("END:VCARD\r\n")
    return "".join(lines)


def serialise(card: Card) -> str:
    """A card as text: CRLF lines folded at 75 octets."""
    return "".join(["BEGIN:VCARD\r\n", *(fold(prop.raw) for prop in card.properties), "END:VCARD\r\n"])
