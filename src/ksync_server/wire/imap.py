"""IMAP on the wire, for both roles: bytes in, values out (RFC 3501, RFC 9051, RFC 7888).

    bytes -> Framer -> Text, LiteralStart, LiteralData ...      lines and literals, a literal never held
                    -> values(pieces) -> atoms, strings, lists   what a line says
    bytes -> Answers -> Status, Data, Fetched, Body ...          all that a server says

An atom comes out as `str`, a string (quoted or literal) as `bytes`, a list as `list`, NIL as None: so an atom
`NIL` and a string "NIL" stay two things. Nothing here trusts its input: whatever it is, the answer is a value
or BadRequest, in time and memory that the limits bound.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from ksync_server.errors import BadRequest

Value = str | bytes | None | list["Value"]

_DEPTH = 24  # of parentheses; what we ask for needs 4
_SHORT = 500  # bytes of flags that are remembered
_LONGEST_NUMBER = 19  # digits: below 2^63

# -- lines and literals ---------------------------------------------------------------------------


# What a stream is cut into is not frozen: there is much of it, and that would double its cost.
@dataclass(slots=True)
class Text:
    """A piece of a line up to its end, or up to a literal; without CRLF and the literal's `{n}`."""

    data: bytes
    ends: bool  # the line is over, and with it the command or response


@dataclass(slots=True)
class LiteralStart:
    """`size` bytes follow; the sender waits for a continuation first where `waits`."""

    size: int
    waits: bool
    binary: bool = False  # literal8: may hold NUL


@dataclass(slots=True)
class LiteralData:
    """A piece of the literal, 1 byte or more; valid as long as the bytes that were fed."""

    data: memoryview


Event = Text | LiteralStart | LiteralData

_MARK = re.compile(rb"(~?)\{(\d{1,20})([+-]?)\}\Z")


class Framer:
    """Cuts a stream of bytes into lines and literals.

    Args:
        line_bytes: the longest line that is read, pieces between literals taken together.
        literals: the most literals in one line.
    """

    def __init__(self, *, line_bytes: int = 1 << 20, literals: int = 10_000) -> None:
        self._line_bytes = line_bytes
        self._most = literals
        self._held = bytearray()
        self._left = 0  # bytes of the literal that are still to come
        self._length = 0  # of the line so far
        self._literals = 0

    @property
    def is_between_lines(self) -> bool:
        """Whether nothing of a next line has been read."""
        return not (self._held or self._left or self._length or self._literals)

    @property
    def left(self) -> int:
        """Bytes of the literal that are still to come."""
        return self._left

    def skip(self) -> None:
        """The literal that was announced does not come this way."""
        self._left = 0

    def feed(self, data: bytes) -> Iterator[Event]:
        """What the next bytes say, in order; take all of it before feeding again.

        Raises:
            BadRequest: a line or a number of literals over the limit; the stream is of no use any more.

        Cost: one pass; a literal's bytes are not copied.
        """
        at, end = 0, len(data)
        while at < end:
            if self._left:
                piece = memoryview(data)[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                yield LiteralData(piece)
                continue
            stop = data.find(b"\n", at)
            if stop < 0:
                self._held += memoryview(data)[at:]
                self._check(len(self._held) - self._held.endswith(b"\r"))
                return
            if self._held:
                self._held += memoryview(data)[at:stop]
                line = bytes(self._held)
                self._held.clear()
            else:
                line = data[at:stop]
            at = stop + 1
            yield from self._line(line.removesuffix(b"\r"))

    def _line(self, line: bytes) -> Iterator[Event]:
        self._check(len(line))
        mark = _MARK.search(line) if line.endswith(b"}") else None
        if mark is None:
            self._length = self._literals = 0
            yield Text(line, True)
            return
        self._length += len(line)
        self._literals += 1
        if self._literals > self._most or len(mark[2]) > _LONGEST_NUMBER:
            raise BadRequest("Too many literals in one line, or too long a one.")
        yield Text(line[: mark.start()], False)
        size = int(mark[2])
        self._left = size
        yield LiteralStart(size, mark[3] == b"", mark[1] == b"~")

    def _check(self, more: int) -> None:
        if self._length + more > self._line_bytes:
            raise BadRequest(f"A line of more than {self._line_bytes} bytes.")


# -- values ---------------------------------------------------------------------------------------

# An atom may hold a section in brackets, as in BODY[HEADER.FIELDS (DATE)]<0>, and what servers put in flags
# and labels although they should not. The last alternative is what no value begins with.
_QUOTED = rb'"(?:[^"\\]++|\\.)*+'
_TOKEN = re.compile(
    rb"""([()] | %b" | %b\\?\Z | (?:[^\x00-\x20()"\[\x7f]++|\[[^\]\[]*\])+ | [^\x20])""" % (_QUOTED, _QUOTED),
    re.VERBOSE | re.DOTALL,
)
_WHOLE = re.compile(_QUOTED + b'"', re.DOTALL)
_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)
_OPEN, _CLOSE, _QUOTE, _BRACKET, _DELETE = b'()"[\x7f'


def values(pieces: Iterable[bytes | Literal], *, most: int = 200_000) -> list[Value]:
    """What a line says: its pieces of text, and its literals between them.

    Args:
        pieces: text as bytes, literals wrapped in `Literal`.
        most: values in all.

    Raises:
        BadRequest: no IMAP: unbalanced or deep parentheses, a quote or bracket without its end, control
            characters, too many values.

    Spec: RFC 3501 §4, RFC 9051 §4.
    Cost: linear; half a microsecond for each value.
    """
    here: list[Value] = []
    stack: list[list[Value]] = []
    count = 0
    for piece in pieces:
        if isinstance(piece, Literal):
            here.append(piece.data)
            continue
        tokens = _TOKEN.findall(piece)
        count += len(tokens)
        if count > most:
            raise BadRequest(f"More than {most} values in one line.")
        if tokens and tokens[-1][0] == _QUOTE and not _WHOLE.fullmatch(tokens[-1]):
            raise BadRequest("A quoted string does not end.")
        for token in tokens:
            first = token[0]
            if first == _OPEN:
                stack.append(here)
                if len(stack) > _DEPTH:
                    raise BadRequest("Too deep parentheses.")
                here = []
            elif first == _CLOSE:
                if not stack:
                    raise BadRequest("A parenthesis is closed that was not opened.")
                inner, here = here, stack.pop()
                here.append(inner)
            elif first == _QUOTE:
                here.append(_ESCAPE.sub(rb"\1", token[1:-1]) if b"\\" in token else token[1:-1])
            elif first < 0x20 or first == _DELETE or (first == _BRACKET and len(token) == 1):
                raise BadRequest(f"No IMAP: {piece[:40]!r}")
            elif token in _NIL:
                here.append(None)
            else:
                here.append(str(token, "utf-8", "surrogateescape"))
    if stack:
        raise BadRequest("A parenthesis is not closed.")
    return here


_NIL = frozenset({b"NIL", b"nil", b"Nil"})


@dataclass(frozen=True, slots=True)
class Literal:
    """The bytes of a literal among the pieces of a line; None where they went elsewhere."""

    data: bytes | None


@dataclass(frozen=True, slots=True)
class Status:
    """OK, NO, BAD, BYE or PREAUTH; `tag` is empty where it is untagged."""

    tag: str
    word: str
    code: str  # upper case, such as TRYCREATE; "" = none
    arguments: tuple[Value, ...]  # of the code
    text: str


@dataclass(frozen=True, slots=True)
class Data:
    """Untagged data, such as `* 12 FETCH (...)`."""

    name: str  # upper case
    number: int | None
    values: list[Value]


NOTHING: Mapping[str, Value] = MappingProxyType({})


class Fetched(NamedTuple):
    """What a server says of a message: `* 12 FETCH (UID 5 FLAGS (\\Seen))`; None: nothing of that."""

    number: int
    uid: int | None = None
    flags: tuple[str, ...] | None = None  # as `flags` gives them
    received: datetime | None = None
    size: int | None = None
    others: Mapping[str, Value] = NOTHING  # all else; names in upper case


@dataclass(frozen=True, slots=True)
class Continue:
    """`+ ...`: go on."""

    text: str


Response = Status | Data | Fetched | Continue

_STATUS = re.compile(rb"(?:\*|([A-Za-z0-9.]{1,40})) (OK|NO|BAD|BYE|PREAUTH)(?: (.*))?\Z", re.I | re.DOTALL)
_CODE = re.compile(rb"\[([A-Za-z0-9_.-]{1,100})(?: ([^\]]*))?\] ?(.*)\Z", re.DOTALL)


def response(pieces: list[bytes | Literal]) -> Response:
    """What a server says in one line.

    Raises:
        BadRequest: nothing that a server says.

    Spec: RFC 3501 §7.
    """
    first = pieces[0]
    assert isinstance(first, bytes)
    if first.startswith(b"+"):
        return Continue(_text(first[1:].strip()))
    status = _STATUS.match(first)
    if status is not None:
        return _status(status)
    if not first.startswith(b"* "):
        raise BadRequest(f"No answer of an IMAP server: {first[:40]!r}")
    found = values([first[2:], *pieces[1:]])
    number = None
    name, *rest = found or [None]
    if isinstance(name, str) and is_number(name):
        number = int(name)
        name, *rest = rest or [None]
    if not isinstance(name, str):
        raise BadRequest(f"No answer of an IMAP server: {first[:40]!r}")
    if number is not None and name.upper() == "FETCH" and len(rest) == 1:
        return _fetched(number, pairs(rest[0]))
    return Data(name.upper(), number, rest)


def _fetched(number_: int, named: dict[str, Value]) -> Fetched:
    return Fetched(
        number_,
        number(named.pop("UID")) if "UID" in named else None,
        flags(named.pop("FLAGS") or []) if "FLAGS" in named else None,
        internal_date(named.pop("INTERNALDATE")) if "INTERNALDATE" in named else None,
        number(named.pop("RFC822.SIZE")) if "RFC822.SIZE" in named else None,
        named,
    )


def _status(found: re.Match[bytes]) -> Status:
    tag, word, rest = found[1] or b"", found[2], found[3] or b""
    code = _CODE.match(rest) if rest.startswith(b"[") else None
    arguments: list[Value] = []
    if code is not None:
        rest = code[3]
        try:
            arguments = values([code[2] or b""])
        except BadRequest:  # free text in a code, which nobody needs
            arguments = []
    name = _text(code[1]).upper() if code else ""
    return Status(_text(tag), _text(word).upper(), name, tuple(arguments), _text(rest))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


@dataclass(slots=True)
class Body:
    """The literal that is a message's body, `size` bytes: they follow as memoryviews, then the Fetched."""

    size: int
    uid: int | None  # where the server said it before


# What all servers say of plain messages, at a fifth of the cost of `response`; anything else goes there.
_PLAIN_FETCH = re.compile(
    rb"""\*\x20(\d{1,10})\x20FETCH\x20\((?:(?:
        UID\x20(\d{1,10})
        | FLAGS\x20\(([\x20\x21\x23-\x27\x2a-\x5a\\\x5e-\x7e]{0,400})\)
        | INTERNALDATE\x20"([0-9A-Za-z:\x20+-]{1,40})"
        | RFC822\.SIZE\x20(\d{1,18})
    )(?:\x20|(?=\))))*+(?:\)|BODY\[\]\x20\{(\d{1,10})\})\r\n""",
    re.VERBOSE,
)
_BODY = re.compile(rb"(?:^|[ (])BODY\[[^\]]*\](?:<\d+>)?[ ]\Z", re.I)
_BODY_UID = re.compile(rb"[( ]UID (\d{1,10})[ )]", re.I)
_STREAMED: Mapping[str, Value] = MappingProxyType({"BODY[]": None})


class Answers:
    """Cuts what a server sends into what it says.

    Args:
        line_bytes: the longest line, and the most bytes of literals in it that are no bodies.
    """

    def __init__(self, *, line_bytes: int = 1 << 20) -> None:
        self.expects_bodies = False  # they come in pieces; else a body is a literal like any other
        self._line_bytes = line_bytes
        self._framer = Framer(line_bytes=line_bytes)
        self._pieces: list[bytes | Literal] = []  # of the line so far
        self._literal: bytearray | None = None  # that is being read and is no body
        self._held = 0  # bytes of such literals in the line
        self._left = 0  # of the body that is being read
        self._plain: Fetched | None = None  # is said where the line ends after its body

    @property
    def is_between_lines(self) -> bool:
        """Whether nothing of a next line has been read."""
        return self._framer.is_between_lines and not self._pieces

    def feed(self, data: bytes) -> Iterator[Response | Body | memoryview]:
        """What the next bytes say, in order; take all of it before feeding again.

        Yields:
            a body's bytes as memoryviews of `data`.

        Raises:
            BadRequest: nothing that a server says; the stream is of no use any more.

        Cost: one pass; 2 us a plain message, and its body is not copied.
        """
        framer, pieces = self._framer, self._pieces
        at, end = 0, len(data)
        while at < end:
            if self._left:
                piece = memoryview(data)[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                yield piece
            elif self._plain is not None:
                plain, self._plain = self._plain, None
                if data.startswith(b")\r\n", at):
                    at += 3
                    pieces.clear()
                    yield plain
            elif (
                not pieces
                and framer.is_between_lines
                and (found := _PLAIN_FETCH.match(data, at)) is not None
                and (fetched := self._plainly(found)) is not None
            ):
                at = found.end()
                if (size := found[6]) is None:
                    yield fetched
                else:
                    pieces += (data[found.start() : found.start(6) - 1], Literal(None))
                    self._plain = fetched
                    self._left = int(size)
                    yield Body(self._left, fetched.uid)
            else:
                stop = at + framer.left if framer.left else data.find(b"\n", at) + 1
                part = data[at : stop or end]
                at += len(part)
                for event in framer.feed(part):
                    if (said := self._said(event)) is not None:
                        yield said

    def _plainly(self, found: re.Match[bytes]) -> Fetched | None:
        """What a line says that looks plain; None where it has to be looked at again."""
        number_, uid, flags_, date, size, body = found.groups()
        if body is not None and not self.expects_bodies:
            return None
        names = None
        if flags_ is not None and (names := _plain_flags(flags_)) is None:
            return None
        try:
            received = None if date is None else _moment(date)
        except _NO_DATE:
            return None
        return Fetched(
            int(number_),
            None if uid is None else int(uid),
            names,
            received,
            None if size is None else int(size),
            NOTHING if body is None else _STREAMED,
        )

    def _said(self, event: Event) -> Response | Body | None:
        """What a part of a line adds up to."""
        if isinstance(event, Text):
            self._pieces.append(event.data)
            if not event.ends:
                return None
            self._held = 0
            try:
                return response(self._pieces)
            finally:
                self._pieces.clear()
        if isinstance(event, LiteralData):
            assert self._literal is not None
            self._literal += event.data
        elif self._literal is None:
            head = self._pieces[-1]
            assert isinstance(head, bytes)
            if self.expects_bodies and _BODY.search(head):
                self._framer.skip()
                self._left = event.size
                self._pieces.append(Literal(None))
                uid = _BODY_UID.search(head)
                return Body(event.size, int(uid[1]) if uid else None)
            self._held += event.size
            if self._held > self._line_bytes:
                raise BadRequest(f"literals of {self._held} bytes that nobody asked for")
            self._literal = bytearray()
        if not self._framer.left:
            self._pieces.append(Literal(bytes(self._literal)))
            self._literal = None
        return None


@lru_cache(maxsize=1024)
def _plain_flags(text: bytes) -> tuple[str, ...] | None:
    """None where one is NIL."""
    names = text.split()
    return flags([each.decode("ascii") for each in names]) if _NIL.isdisjoint(names) else None


@dataclass(frozen=True, slots=True)
class Command:
    """What a client asks: tag, name (upper case, with UID in front where it has it) and arguments."""

    tag: str
    name: str
    values: list[Value]


_COMMAND = re.compile(
    rb"([^\x00-\x20()\{%*\"\\+\x7f-\xff]{1,100}) ((?:UID )?[A-Za-z][A-Za-z0-9-]{0,40})(?: (.*))?\Z",
    re.I | re.DOTALL,
)


def command(pieces: list[bytes | Literal]) -> Command:
    """What a client says in one line.

    Raises:
        BadRequest: no command.

    Spec: RFC 3501 §6, §9 (tag).
    """
    first = pieces[0]
    assert isinstance(first, bytes)
    found = _COMMAND.match(first)
    if found is None:
        raise BadRequest("A command is a tag, a name and arguments.")
    return Command(_text(found[1]), _text(found[2]).upper(), values([found[3] or b"", *pieces[1:]]))


def is_number(text: str) -> bool:
    """Whether an atom is a number below 2^63."""
    return text.isascii() and text.isdigit() and len(text) < _LONGEST_NUMBER


def number(value: Value) -> int:
    """An atom that must be a number.

    Raises:
        BadRequest: it is none.
    """
    if not isinstance(value, str) or not is_number(value):
        raise BadRequest(f"No number: {value!r:.40}")
    return int(value)


def string(value: Value) -> bytes:
    """What may stand as an atom or as a string; NIL is an atom here.

    Raises:
        BadRequest: a list.

    Spec: RFC 3501 §9, astring.
    """
    if isinstance(value, bytes):
        return value
    if value is None:
        return b"NIL"
    if isinstance(value, list):
        raise BadRequest("A string is needed.")
    return value.encode("utf-8", "surrogateescape")


def pairs(value: Value) -> dict[str, Value]:
    """A list of names and values, as FETCH and STATUS give it; names in upper case.

    Raises:
        BadRequest: it is none.
    """
    if not isinstance(value, list) or len(value) % 2:
        raise BadRequest("A list of names and values is needed.")
    found = {}
    for name, each in zip(value[::2], value[1::2], strict=True):
        if not isinstance(name, str):
            raise BadRequest("A list of names and values is needed.")
        found[name.upper()] = each
    return found


# -- what is written ------------------------------------------------------------------------------

_QUOTABLE = re.compile(rb"[\x01-\x09\x0b\x0c\x0e-\x7f]*\Z")


def quoted(data: bytes, *, utf8: bool = False) -> bytes | None:
    """A quoted string, None where only a literal can say it.

    Args:
        utf8: UTF8=ACCEPT is on, so UTF-8 may stand in quotes (RFC 6855 §3).
    """
    if _QUOTABLE.match(data) is None:
        try:
            if not utf8 or not data.decode("utf-8").isprintable():
                return None
        except UnicodeDecodeError:
            return None
    return b'"' + data.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def flags(value: Value) -> tuple[str, ...]:
    """Flags and keywords, sorted: system flags in the standard's capitals, without \\Recent, which none sets.

    Raises:
        BadRequest: no list of flags.
    """
    if not isinstance(value, list):
        raise BadRequest("A list of flags is needed.")
    known = tuple(string(each) for each in value)
    return (_flags if sum(map(len, known)) < _SHORT else _flags.__wrapped__)(known)


@lru_cache(maxsize=1024)
def _flags(found: tuple[bytes, ...]) -> tuple[str, ...]:
    names = (each.decode("utf-8", "surrogateescape") for each in found)
    return tuple(sorted({_SYSTEM_FLAGS.get(name.lower(), name) for name in names} - {"\\Recent", "\\*"}))


_SYSTEM_FLAGS = {
    name.lower(): name for name in ("\\Answered", "\\Deleted", "\\Draft", "\\Flagged", "\\Recent", "\\Seen")
}
_FLAG = re.compile(r"\\?[^\x00-\x20(){}%*\"\\\]\x7f-\U0010ffff]+\Z")


def is_flag(text: str) -> bool:
    """Whether it can be written as a flag or keyword.

    Spec: RFC 3501 §9, flag and atom.
    """
    return _FLAG.match(text) is not None


def sequence_set(numbers: Iterable[int], *, longest: int = 8000) -> Iterator[str]:
    """Numbers as sequence sets of at most `longest` characters: 1:5,7 ...; ascending."""
    parts: list[str] = []
    length = 0
    for first, last in _runs(sorted(set(numbers))):
        part = str(first) if first == last else f"{first}:{last}"
        if length + len(part) + 1 > longest and parts:
            yield ",".join(parts)
            parts, length = [], 0
        parts.append(part)
        length += len(part) + 1
    if parts:
        yield ",".join(parts)


def _runs(ordered: list[int]) -> Iterator[tuple[int, int]]:
    start = at = 0
    for each in ordered:
        if each == at + 1 and start:
            at = each
            continue
        if start:
            yield start, at
        start = at = each
    if start:
        yield start, at


def numbers(text: str, *, most: int = 1_000_000) -> list[int]:
    """A uid-set, in the order it is written.

    Raises:
        BadRequest: none, or more than `most` numbers.

    Spec: RFC 4315 §4.
    """
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        low, high = number(first), number(last or first)
        low, high = min(low, high), max(low, high)
        if high - low + len(found) >= most:
            raise BadRequest(f"More than {most} numbers.")
        found += range(low, high + 1)
    return found


_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH = {name.encode("ascii"): number for number, name in enumerate(_MONTHS, 1)}
_NO_DATE = (ValueError, KeyError, OverflowError)
_DATE = re.compile(rb" ?(\d{1,2})-([A-Za-z]{3})-(\d{4}) (\d\d):(\d\d):(\d\d)(?: ([+-])(\d\d)(\d\d))?\Z")


def internal_date(value: Value) -> datetime:
    """When a message was received, with its zone; UTC where it has none.

    Raises:
        BadRequest: no date and time.

    Spec: RFC 3501 §9, date-time.
    """
    text = string(value)
    try:
        return _moment(text)
    except _NO_DATE:
        raise BadRequest(f"No date and time: {text[:40]!r}") from None


@lru_cache(maxsize=10_000)  # a destination says again what was said by the source
def _moment(text: bytes) -> datetime:
    found = _DATE.match(text)
    if found is None:
        raise ValueError
    day, month, year, hour, minute, second, *offset = found.groups()
    zone = _zone(*offset) if offset[0] else UTC
    date = (int(year), _MONTH[month.title()], int(day), int(hour), int(minute), min(int(second), 59))
    moment = datetime(*date, tzinfo=zone)
    if not 1 < moment.year < 9999:
        moment.astimezone(UTC)  # at either end of time there is none
    return moment


@lru_cache(maxsize=256)
def _zone(sign: bytes, hours: bytes, minutes: bytes) -> timezone:
    ahead = timedelta(hours=int(hours), minutes=int(minutes))
    return timezone(-ahead if sign == b"-" else ahead)


def write_date(moment: datetime) -> bytes:
    """A date-time as APPEND takes it, in quotes."""
    day = f"{moment.day:02}-{_MONTHS[moment.month - 1]}-{moment.year:04}"
    clock = f"{moment.hour:02}:{moment.minute:02}:{moment.second:02}"
    return f'"{day} {clock} {_offset(moment.utcoffset())}"'.encode("ascii")


@lru_cache(maxsize=256)
def _offset(ahead: timedelta | None) -> str:
    return datetime(2000, 1, 1, tzinfo=timezone(ahead or timedelta())).strftime("%z")[:5]


# -- names of mailboxes ---------------------------------------------------------------------------


def decode_name(data: bytes, *, utf8: bool = False) -> str:
    """A mailbox's name as text that can be shown and kept.

    `encode_name` gives the same bytes for all but what no server should send: control characters, and bytes
    that are no ASCII. Those are read as UTF-8 where they are that; what is no modified UTF-7 stays as it is.

    Args:
        utf8: UTF8=ACCEPT is on: names are UTF-8 and `&` has no meaning.

    Spec: RFC 3501 §5.1.3, RFC 6855 §3.
    """
    plain = data.decode("utf-8", "backslashreplace")
    if utf8 or b"&" not in data:
        return plain
    try:
        name = _UTF7.sub(_decoded, plain)
        return name if encode_name(name) == data else plain
    except ValueError:
        return plain


def encode_name(name: str, *, utf8: bool = False) -> bytes:
    """A mailbox's name as a server has it; see `decode_name`."""
    if utf8 or all("\x20" <= mark <= "\x7e" and mark != "&" for mark in name):
        return name.encode("utf-8")
    written = _PLAIN.sub(lambda found: found[0].replace("&", "&-") if found[1] else _encoded(found[0]), name)
    return written.encode("ascii")


_UTF7 = re.compile(r"&([A-Za-z0-9+,]*)-")
_PLAIN = re.compile(r"([\x20-\x7e]+)|[^\x20-\x7e]+")


def _decoded(found: re.Match[str]) -> str:
    shifted = found[1]
    if not shifted:
        return "&"
    padded = shifted.replace(",", "/") + "=" * (-len(shifted) % 4)
    return b64decode(padded, validate=True).decode("utf-16-be")


def _encoded(text: str) -> str:
    return "&" + b64encode(text.encode("utf-16-be")).decode("ascii").rstrip("=").replace("/", ",") + "-"
