"""Content lines: the grammar that iCalendar and vCard share.

A line is `[group.]NAME *(;PARAM=value[,value]) : value`, folded with CRLF and one blank. Unfolding is done on
bytes, since a fold may stand inside a UTF-8 sequence; everything after that is text.

Reading is lenient about one line and strict about the whole: a line that is no content line is kept as a
`Property` without a name (real exports hold such lines, and the client's bytes are stored anyway), but bytes
that are not UTF-8, or characters that XML 1.0 cannot carry, are refused: one of them would make every later
report on its collection unreadable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

FOLD_BYTES = 75
MAX_PARAMS = 100_000  # of one object; 20,000 lines of real objects have some 40,000, most of them alike

Params = tuple[tuple[str, tuple[str, ...]], ...]

_LINE_BREAK = re.compile(rb"\r+\n?")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_GROUPED_NAME = re.compile(r"(?:([A-Za-z0-9_-]+)\.)?([A-Za-z0-9_-]+)")
# possessive, so that an endless line without the closing quote stays linear
_QUOTED_HEAD = re.compile(r'((?:[^":]++|"[^"]*+")*+):')
_PARAM = re.compile(r';((?:[^";]++|"[^"]*+"|")*+)')
_PARAM_VALUE = re.compile(r'((?:[^",]++|"[^"]*+"|")*+)(,|$)')
_CARET = re.compile(r"\^([n^'])")
_CARET_MEANS = {"n": "\n", "^": "^", "'": '"'}
_ESCAPES = (("\\n", "\n"), ("\\N", "\n"), ("\\,", ","), ("\\;", ";"), ("\\:", ":"), ('\\"', '"'))
_SPLIT = {
    ",": re.compile(r"((?:[^,\\]++|\\.|\\$)*+)(,|$)", re.DOTALL),
    ";": re.compile(r"((?:[^;\\]++|\\.|\\$)*+)(;|$)", re.DOTALL),
}
# a fold followed by the rest of a UTF-8 sequence
_FOLD_IN_SEQUENCE = re.compile(rb"((?:\r?\n[ \t])+)([\x80-\xbf]+)")
# XML 1.0 §2.2: these and U+FFFE, U+FFFF (surrogates are no UTF-8) cannot be in a document
_FORBIDDEN_BYTES = bytes(set(range(0x20)) - {0x09, 0x0A, 0x0D})
_FORBIDDEN_SEQUENCES = (b"\xef\xbf\xbe", b"\xef\xbf\xbf")


class BadContent(ValueError):
    """Bytes that are no object of the kind they should be; nothing was kept.

    Args:
        text: one sentence for the person at the client.
        precondition: Clark name of the failed condition, e.g. `{DAV:}need-privileges`.
    """

    def __init__(self, text: str, precondition: str | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.precondition = precondition


@dataclass(frozen=True, slots=True)
class Property:
    """One content line. `value` is as sent, still escaped; `raw` is the whole unfolded line."""

    name: str  # upper case; "" for a line that is no content line
    params: Params  # names upper case, values unquoted and RFC 6868 decoded
    value: str
    raw: str
    group: str = ""  # vCard only: "item1" of item1.TEL

    def param(self, name: str) -> str | None:
        """First value of a parameter (`name` in upper case), None without it."""
        for key, values in self.params:
            if key == name:
                return values[0] if values else ""
        return None

    def param_values(self, name: str) -> tuple[str, ...]:
        """All values of a parameter, also of a repeated one (vCard `TYPE=a;TYPE=b`)."""
        return tuple(value for key, values in self.params if key == name for value in values)

    def text(self) -> str:
        """The value with its escapes undone (RFC 5545 §3.3.11, RFC 6350 §3.4)."""
        return unescape(self.value)

    def texts(self, separator: str = ",") -> list[str]:
        """The values of a list, each unescaped; `separator` is "," or ";" (structured values)."""
        return [unescape(part) for part in split(self.value, separator)]


def unfolded(data: bytes) -> str:
    """The text of `data` with folds undone and every line break as LF.

    Raises:
        BadContent: not UTF-8, or a character XML 1.0 cannot carry.

    Spec: RFC 5545 §3.1, RFC 6350 §3.2.
    Cost: a few linear passes.
    """
    data = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    if b"\r" in data:
        data = _LINE_BREAK.sub(b"\n", data)
    data = data.replace(b"\n ", b"").replace(b"\n\t", b"")
    if len(data.translate(None, _FORBIDDEN_BYTES)) != len(data):
        raise BadContent("The object holds a control character.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadContent(f"The object is not UTF-8: {error.reason} at byte {error.start}.") from None
    if any(sequence in data for sequence in _FORBIDDEN_SEQUENCES):
        raise BadContent("The object holds U+FFFE or U+FFFF, which XML cannot carry.")
    return text


def as_text(data: bytes) -> str:
    """Stored bytes as the text of a report's `calendar-data` or `address-data`.

    The same characters as the bytes, except that a fold inside a UTF-8 sequence, which no text can show,
    moves behind that sequence.

    Raises:
        BadContent: never for bytes that passed `unfolded`.

    Cost: one decode; more only for such folds.
    """
    for _ in range(4):  # a sequence has at most four octets, so at most three folds inside
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            data = _FOLD_IN_SEQUENCE.sub(rb"\2\1", data)
    return "".join(fold(line) for line in unfolded(data).split("\n") if line)


class LineReader:
    """Turns unfolded lines into properties; remembers the heads it has seen, since they repeat."""

    __slots__ = ("_grouped", "_heads", "_room")

    def __init__(self, *, grouped: bool = False, max_params: int = MAX_PARAMS) -> None:
        """`grouped`: names may carry a group, as in vCard; `max_params`: values of all heads together."""
        self._grouped = grouped
        self._room = max_params
        self._heads: dict[str, tuple[str, Params, str]] = {}

    def read(self, line: str) -> Property:
        """The property of one unfolded line; without a name if it is none.

        Raises:
            BadContent: the heads read so far hold more than `max_params` different parameter values.
        """
        head, colon, value = line.partition(":")
        known = self._heads.get(head)
        if known is None:
            if '"' in head:
                return self._quoted(line)
            known = self._heads[head] = self._head(head)
        if not colon:
            return Property("", (), line, line)
        return Property(known[0], known[1], value, line, known[2])

    def _quoted(self, line: str) -> Property:
        match = _QUOTED_HEAD.match(line)
        # a quote that never closes: the first colon ends the head, as clients that forget it mean
        end = match.end(1) if match else line.find(":")
        if end < 0:
            return Property("", (), line, line)
        name, params, group = self._head(line[:end])
        return Property(name, params, line[end + 1 :], line, group)

    def _head(self, head: str) -> tuple[str, Params, str]:
        self._room -= head.count(";") + head.count(",")
        if self._room < 0:
            raise BadContent("The object holds too many parameters.")
        name, semicolon, rest = head.partition(";")
        group = ""
        if self._grouped:
            match = _GROUPED_NAME.fullmatch(name)
            if match:
                group, name = match[1] or "", match[2]
        if _NAME.fullmatch(name) is None:
            return "", (), ""
        return name.upper(), read_params(";" + rest) if semicolon else (), group


def read_params(text: str) -> Params:
    """Parameters from `;NAME=value,"quoted value";...`.

    A bare word, as vCard 2.1 writes (`TEL;HOME:`), counts as a value of TYPE.

    Cost: linear.
    """
    params: list[tuple[str, tuple[str, ...]]] = []
    for match in _PARAM.finditer(text):
        name, equals, value = match[1].partition("=")
        if not equals:
            if name:
                params.append(("TYPE", (_param_value(name),)))
        elif '"' in value:
            params.append((name.upper(), tuple(_param_value(part) for part in _quoted_parts(value))))
        else:
            params.append((name.upper(), tuple(_param_value(part) for part in value.split(","))))
    return tuple(params)


def _quoted_parts(value: str) -> Iterator[str]:
    for match in _PARAM_VALUE.finditer(value):
        yield match[1]
        if not match[2]:
            return


def _param_value(part: str) -> str:
    if len(part) > 1 and part[0] == part[-1] == '"':
        part = part[1:-1]
    if "^" in part:
        part = _CARET.sub(lambda match: _CARET_MEANS[match[1]], part)
    return part


def write_params(params: Params) -> str:
    """`;NAME=value...`, quoted and RFC 6868 encoded where needed."""
    return "".join(f";{name}={','.join(map(_quoted_value, values))}" for name, values in params)


def _quoted_value(value: str) -> str:
    value = value.replace("^", "^^").replace("\n", "^n").replace('"', "^'")
    return f'"{value}"' if any(mark in value for mark in ",;:") else value


def make_property(name: str, value: str, params: Params = (), *, group: str = "") -> Property:
    """A property of our own; `value` is already escaped (see `escape`) and holds no line break."""
    head = f"{group}.{name}" if group else name
    return Property(name.upper(), params, value, f"{head}{write_params(params)}:{value}", group)


def unescape(value: str) -> str:
    """Text with `\\n`, `\\,`, `\\;`, `\\\\` (and the `\\:` of some vCards) undone; other backslashes stay."""
    if "\\" not in value:
        return value
    # after the split no part holds two backslashes in a row, so the replacements cannot meet
    return "\\".join(_unescape_part(part) if "\\" in part else part for part in value.split("\\\\"))


def _unescape_part(part: str) -> str:
    for escaped, meant in _ESCAPES:
        part = part.replace(escaped, meant)
    return part


def escape(text: str) -> str:
    """Text as a value: backslash, comma, semicolon and line breaks escaped (RFC 5545 §3.3.11)."""
    text = text.replace("\\", "\\\\").replace(",", "\\,").replace(";", "\\;")
    return text.replace("\r\n", "\\n").replace("\n", "\\n").replace("\r", "\\n")


def split(value: str, separator: str) -> list[str]:
    """The still escaped parts of a list or structured value. Cost: linear."""
    if separator not in value:
        return [value]
    if "\\" not in value:
        return value.split(separator)
    parts = []
    for match in _SPLIT[separator].finditer(value):
        parts.append(match[1])
        if not match[2]:
            break
    return parts


def fold(line: str) -> str:
    """One line with its CRLF, folded at 75 octets and never inside a UTF-8 sequence.

    Spec: RFC 5545 §3.1, RFC 6350 §3.2.
    Cost: linear.
    """
    if line.isascii():
        if len(line) <= FOLD_BYTES:
            return line + "\r\n"
        step = FOLD_BYTES - 1
        rest = (line[at : at + step] for at in range(FOLD_BYTES, len(line), step))
        return "\r\n ".join((line[:FOLD_BYTES], *rest)) + "\r\n"
    octets = line.encode("utf-8")
    if len(octets) <= FOLD_BYTES:
        return line + "\r\n"
    return "\r\n ".join(piece.decode("utf-8") for piece in _pieces(octets)) + "\r\n"


def _pieces(octets: bytes) -> Iterable[bytes]:
    at, room = 0, FOLD_BYTES
    while at < len(octets):
        end = at + room
        if end < len(octets):
            while octets[end] & 0xC0 == 0x80:
                end -= 1
        yield octets[at:end]
        at, room = end, FOLD_BYTES - 1
