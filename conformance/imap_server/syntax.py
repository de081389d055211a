"""What a client may write (RFC 3501 §9 and its extensions), read strictly, and how a server writes it back."""

from __future__ import annotations

import base64
import binascii
import datetime
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import TypeVar

_ATOM = re.compile(rb'[^\x00-\x20\x7f-\xff(){%*"\\\]]+')
_ASTRING = re.compile(rb'[^\x00-\x20\x7f-\xff(){%*"\\]+')
_PATTERN = re.compile(rb'[^\x00-\x20\x7f-\xff(){"\\]+')
_QUOTED = re.compile(rb'"((?:[^\x00\r\n"\\]|\\["\\])*)"')
_LITERAL = re.compile(rb"~?\{(\d+)\+?\}\r\n")
_ITEM = re.compile(rb"[A-Za-z0-9.-]+")
_NUMBER = re.compile(rb"0|[1-9]\d*")
_FLAG = re.compile(rb'\\?[^\x00-\x20\x7f-\xff(){%*"\\\]]+')
_RANGE = r"(?:[1-9]\d*|\*)(?::(?:[1-9]\d*|\*))?"
_SET = re.compile(rf"{_RANGE}(?:,{_RANGE})*".encode())
_DATE_TIME = re.compile(rb'"([ \d]\d)-([A-Z][a-z]{2})-(\d{4}) (\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d)"')
_DATE = re.compile(rb'"?(\d{1,2})-([A-Z][a-z]{2})-(\d{4})"?')
_SECTION = re.compile(rb"\[([^\]\[]*)\]")
_PARTIAL = re.compile(rb"<(0|[1-9]\d*)\.([1-9]\d*)>")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
SYSTEM_FLAGS = ("\\Seen", "\\Answered", "\\Flagged", "\\Deleted", "\\Draft")
LARGEST_NUMBER = 2**32 - 1

T = TypeVar("T")
Range = tuple[int | None, int | None]  # None is `*`


class Malformed(Exception):
    """The client broke the grammar; the text says how."""


class Refused(Exception):
    """A right command that is answered NO; the text follows it."""


class Confused(Exception):
    """A right command that a rule answers with BAD."""


class Closed(Exception):
    """The connection ends here, on purpose."""


class Cursor:
    """A position in one command. Literals stand in the text as `{n}` CRLF, their bytes apart.

    Args:
        line: the command without its last CRLF.
        literals: bytes of each literal, in order.
        utf8: whether ENABLE UTF8=ACCEPT was answered (RFC 6855).
    """

    def __init__(self, line: bytes, literals: Sequence[bytes] = (), *, utf8: bool = False) -> None:
        self._line = line
        self._literals = list(literals)
        self._utf8 = utf8
        self._at = 0
        self.ranges: list[Range] = []  # the set read last

    def at_end(self) -> bool:
        """Whether nothing is left."""
        return self._at == len(self._line)

    def end(self) -> None:
        """Refuse anything after this point."""
        if not self.at_end():
            raise Malformed(f"unexpected {self._line[self._at : self._at + 40]!r}")

    def rest(self) -> bytes:
        """What is left."""
        return self._line[self._at :]

    def peek(self, text: bytes) -> bool:
        """Whether `text` comes next, in any case."""
        return self._line[self._at : self._at + len(text)].upper() == text.upper()

    def take(self, text: bytes) -> bool:
        """Pass over `text` if it comes next."""
        found = self.peek(text)
        if found:
            self._at += len(text)
        return found

    def expect(self, text: bytes) -> None:
        """Pass over `text`, which must come next."""
        if not self.take(text):
            raise Malformed(f"expected {text!r} at {self._line[self._at : self._at + 40]!r}")

    def space(self) -> None:
        """Exactly one space."""
        self.expect(b" ")

    def _match(self, pattern: re.Pattern[bytes], what: str) -> re.Match[bytes]:
        found = pattern.match(self._line, self._at)
        if not found:
            raise Malformed(f"expected {what} at {self._line[self._at : self._at + 40]!r}")
        self._at = found.end()
        return found

    def atom(self) -> str:
        """An atom, as it is."""
        return self._match(_ATOM, "an atom")[0].decode("ascii")

    def word(self) -> str:
        """An atom in capitals: a command, an item or an option."""
        return self.atom().upper()

    def item(self) -> str:
        """The name of a FETCH item, up to a bracket."""
        return self._match(_ITEM, "an item")[0].decode("ascii").upper()

    def astring(self, atom: re.Pattern[bytes] = _ASTRING) -> bytes:
        """An atom, a quoted string or a literal (no NUL in it)."""
        if self.peek(b'"'):
            text = re.sub(rb"\\(.)", rb"\1", self._match(_QUOTED, "a quoted string")[1])
            if not self._utf8 and not text.isascii():
                raise Malformed("8-bit text in a quoted string without UTF8=ACCEPT")
            return text
        if self.peek(b"{"):
            text = self.literal()
            if b"\0" in text:
                raise Malformed("NUL in a literal that is a string")
            return text
        return self._match(atom, "a string")[0]

    def string(self) -> bytes:
        """A quoted string or a literal."""
        if not self.peek(b'"') and not self.peek(b"{"):
            raise Malformed("expected a quoted string or a literal")
        return self.astring()

    def literal(self) -> bytes:
        """The bytes of a literal, whatever they are."""
        self._match(_LITERAL, "a literal")
        return self._literals.pop(0)

    def text(self) -> str:
        """An astring in UTF-8: a login name, a password, a search key."""
        try:
            return self.astring().decode("utf-8")
        except UnicodeDecodeError as error:
            raise Malformed("a string that is not UTF-8") from error

    def mailbox(self) -> bytes:
        """A mailbox name as it is on the wire."""
        return self.astring()

    def pattern(self) -> bytes:
        """A mailbox name with wildcards (`list-mailbox`)."""
        return self.astring(_PATTERN)

    def number(self) -> int:
        """A number up to 63 bits, without leading zeros."""
        value = int(self._match(_NUMBER, "a number")[0])
        if value >= 2**63:
            raise Malformed("a number beyond 63 bits")
        return value

    def sequence_set(self) -> list[Range]:
        """Ranges of a set; zero is not a number of messages."""
        ranges: list[Range] = []
        for part in self._match(_SET, "a set of numbers")[0].decode().split(","):
            ends = [None if end == "*" else int(end) for end in part.split(":")]
            if any(end is not None and end > LARGEST_NUMBER for end in ends):
                raise Malformed("a number beyond 32 bits in a set")
            ranges.append((ends[0], ends[-1]))
        self.ranges = ranges
        return ranges

    def listed(self, one: Callable[[], T], *, empty: bool = False) -> list[T]:
        """`(a b c)`, each read by `one`; `()` only if `empty`."""
        self.expect(b"(")
        found: list[T] = []
        if empty and self.take(b")"):
            return found
        found.append(one())
        while not self.take(b")"):
            self.space()
            found.append(one())
        return found

    def flags(self) -> frozenset[str]:
        """A parenthesized list of flags that a client may set."""
        return frozenset(self.listed(self.flag, empty=True))

    def flag(self) -> str:
        """A flag that a client may set; system flags in their usual spelling."""
        flag = self._match(_FLAG, "a flag")[0].decode("ascii")
        if not flag.startswith("\\"):
            return flag
        for known in SYSTEM_FLAGS:
            if known.lower() == flag.lower():
                return known
        raise Malformed(f"{flag} is no flag that a client may set")

    def special_use(self) -> str:
        """An attribute such as `\\Sent` (RFC 6154)."""
        self.expect(b"\\")
        return "\\" + self.atom().capitalize()

    def date_time(self) -> datetime.datetime:
        """`"dd-Mon-yyyy hh:mm:ss +zzzz"`."""
        found = self._match(_DATE_TIME, "a date and time")
        day, month, year, hour, minute, second, sign, zone_hours, zone_minutes = (
            part.decode() for part in found.groups()
        )
        zone = datetime.timedelta(hours=int(zone_hours), minutes=int(zone_minutes))
        try:
            return datetime.datetime(
                int(year),
                MONTHS.index(month) + 1,
                int(day),
                int(hour),
                int(minute),
                int(second),
                tzinfo=datetime.timezone(zone if sign == "+" else -zone),
            )
        except ValueError as error:
            raise Malformed(f"no such date: {found[0]!r}") from error

    def date(self) -> datetime.date:
        """`dd-Mon-yyyy` of a search."""
        found = self._match(_DATE, "a date")
        try:
            return datetime.date(int(found[3]), MONTHS.index(found[2].decode()) + 1, int(found[1]))
        except ValueError as error:
            raise Malformed(f"no such date: {found[0]!r}") from error

    def section(self) -> bytes:
        """What stands between the brackets of BODY[...]."""
        return self._match(_SECTION, "a section in brackets")[1]

    def partial(self) -> tuple[int, int] | None:
        """`<offset.length>` after a section, or None."""
        if not self.peek(b"<"):
            return None
        found = self._match(_PARTIAL, "<offset.length>")
        return int(found[1]), int(found[2])


def members(ranges: Sequence[Range], present: Sequence[int], largest: int | None = None) -> list[int]:
    """Which of the ascending numbers `present` a set names. `*` is `largest`, or the largest of them."""
    if not present:
        return []
    largest = largest or present[-1]
    chosen: set[int] = set()
    for first, last in ranges:
        low, high = sorted((first or largest, last or largest))
        chosen.update(present[bisect_left(present, low) : bisect_right(present, high)])
    return sorted(chosen)


def compact(numbers: Sequence[int]) -> str:
    """Ascending or equal-length ordered numbers as a set: `1:3,7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}:{b}" for a, b in parts)


def date_time(moment: datetime.datetime) -> str:
    """INTERNALDATE as RFC 3501 writes it, day padded with a space."""
    return (
        f'"{moment.day:2d}-{MONTHS[moment.month - 1]}-{moment.year:04d}'
        f' {moment.hour:02d}:{moment.minute:02d}:{moment.second:02d} {moment.strftime("%z")[:5]}"'
    )


def string(text: bytes) -> bytes:
    """A quoted string where that is allowed, else a literal."""
    if text.isascii() and not re.search(rb"[\x00\r\n]", text) and len(text) < 1000:
        return b'"' + re.sub(rb'(["\\])', rb"\\\1", text) + b'"'
    return b"{%d}\r\n%s" % (len(text), text)


def to_utf7(name: str) -> bytes:
    """A mailbox name in modified UTF-7 (RFC 3501 §5.1.3), shortest form."""
    out = bytearray()
    for part in re.split(r"([^\x20-\x7e]+)", name):
        if part and not re.fullmatch(r"[\x20-\x7e]+", part):
            packed = base64.b64encode(part.encode("utf-16-be", "surrogatepass"))
            out += b"&" + packed.rstrip(b"=").replace(b"/", b",") + b"-"
        else:
            out += part.replace("&", "&-").encode("ascii")
    return bytes(out)


def from_utf7(name: bytes) -> str:
    """Undo `to_utf7`; anything but its exact output is refused.

    Raises:
        Malformed: 8-bit bytes, a bad or an unnecessary shift.
    """

    def unpack(found: re.Match[bytes]) -> bytes:
        packed = found[1].replace(b",", b"/")
        if not packed:
            return b"&"
        try:
            return (
                base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
                .decode("utf-16-be")
                .encode("utf-8")
            )
        except (binascii.Error, UnicodeDecodeError) as error:
            raise Malformed(f"not modified UTF-7: {name!r}") from error

    text = re.sub(rb"&([A-Za-z0-9+,]*)-", unpack, name).decode("utf-8", "replace")
    if to_utf7(text) != name:
        raise Malformed(f"not the one modified UTF-7 form of a name: {name!r}")
    return text
