"""Grammars of header fields and request paths (RFC 9110, RFC 4918, RFC 3986, RFC 7240): no I/O."""

from __future__ import annotations

import base64
import binascii
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from typing import Literal
from urllib.parse import quote, unquote_to_bytes

from ksync_server.errors import BadRequest, RangeNotSatisfiable

INFINITY = 1 << 30  # Depth: infinity
Depth = int

_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SAFE = "!$'()*,=:@~"  # pchar of RFC 3986 beyond the unreserved ones, without "&", "+" and ";"
_PLAIN = re.compile(r"[A-Za-z0-9._~!$'()*,=:@-]+")


# -- paths ----------------------------------------------------------------------------------------


def split_path(raw: bytes) -> tuple[tuple[str, ...], bool]:
    """A raw request path as decoded segments, and whether it ended in a slash.

    Split before decoding, so "%2F" stays inside its segment. Empty segments collapse.

    Args:
        raw: percent-encoded bytes from the first slash on; a query, if any, is left out.

    Raises:
        BadRequest: a fragment (cutting it off would address, and perhaps delete, another resource), a bad
            percent escape, no UTF-8, a control character, or a dot segment (also encoded).

    Spec: RFC 3986 §3.3, RFC 9112 §3.2. Cost: linear.
    """
    path = raw.partition(b"?")[0]
    if not path.startswith(b"/"):
        raise BadRequest("The path does not start with a slash.")
    if b"#" in raw:
        raise BadRequest('A path has no fragment; "#" inside a name is written %23.')
    if _PERCENT.search(path):
        raise BadRequest("The path holds a bad percent escape.")
    try:
        segments = tuple(unquote_to_bytes(part).decode("utf-8") for part in path.split(b"/") if part)
    except UnicodeDecodeError:
        raise BadRequest("The path is not UTF-8.") from None
    for segment in segments:
        if segment in (".", "..") or _CONTROL.search(segment):
            raise BadRequest("The path holds a dot segment or a control character.")
    return segments, path.endswith(b"/")


@lru_cache(maxsize=4096)
def _quoted(name: str) -> str:
    return quote(name, safe=_SAFE)


def quote_segment(name: str) -> str:
    """One path segment, percent-encoded; "/" inside becomes %2F.

    "&", "+" and ";" are escaped too, on which clients trip though the standard allows them bare.

    Args:
        name: a decoded name without lone surrogates.

    Spec: RFC 3986 §3.3. Cost: one regular expression for a plain name; the last 4,096 others are remembered.
    """
    if _PLAIN.fullmatch(name):
        return name
    return _quoted(name)


def is_plain(names: str) -> bool:
    """Whether `quote_segment` leaves every one of these names, one after the other, as it is."""
    return _PLAIN.fullmatch(names) is not None


def join_path(segments: tuple[str, ...], trailing_slash: bool) -> str:
    """An absolute path of encoded segments."""
    path = "/" + "/".join([quote_segment(segment) for segment in segments])
    return path + "/" if trailing_slash and segments else path


_URI = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]+)(/[^?#]*)?([?#].*)?", re.DOTALL)
_ABSOLUTE_PATH = re.compile(rb"(/(?!/)[^?#]*)([?#].*)?", re.DOTALL)


def parse_destination(value: str) -> tuple[str | None, str | None, bytes]:
    """A Destination header, or any href, as scheme, authority and raw path; split before anything is decoded.

    Args:
        value: an http(s) URI or an absolute path (webdavclient3); header text is Latin-1 decoded bytes, text
            out of XML may hold any character.

    Returns:
        Scheme in lower case and authority as written (both None for a path), and the percent-encoded path.

    Raises:
        BadRequest: neither of both, or one with a query or a fragment: a name whose "?" or "#" was not
            escaped would otherwise end, and overwrite, elsewhere.

    Spec: RFC 4918 §10.3, §8.3. Cost: linear.
    """
    raw = _raw(value.strip())
    path = _ABSOLUTE_PATH.fullmatch(raw)
    if path is not None:
        scheme = authority = None
        target, rest = path[1], path[2]
    else:
        uri = _URI.fullmatch(raw)
        if uri is None or uri[1].lower() not in (b"http", b"https"):
            raise BadRequest("A Destination or href is an http URI or an absolute path.")
        scheme, authority = uri[1].decode().lower(), uri[2].decode("latin-1")
        target, rest = uri[3] or b"/", uri[4]
    if rest is not None:
        raise BadRequest(
            'A Destination or href has no query or fragment; "?" and "#" in a name are %3F and %23.'
        )
    return scheme, authority, target


def _raw(text: str) -> bytes:
    """The bytes that were meant: those of the header if they are UTF-8, else the characters as UTF-8."""
    try:
        raw = text.encode("latin-1")
        raw.decode("utf-8")
    except UnicodeError:
        return text.encode("utf-8", "replace")
    return raw


# -- authentication -------------------------------------------------------------------------------


def parse_basic(value: str | None) -> tuple[str, str] | None:
    """Name and secret of an Authorization header; None where it is not well-formed Basic.

    UTF-8 where it is that, else Latin-1 (Joplin sends both). Never raises.

    Spec: RFC 7617 §2.
    """
    if value is None:
        return None
    scheme, _, token = value.strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        decoded = base64.b64decode(token.strip().encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        return None
    try:
        text = decoded.decode("utf-8")
    except UnicodeDecodeError:
        text = decoded.decode("latin-1")
    name, colon, secret = text.partition(":")
    if not colon or "\0" in text:
        return None
    return name, secret


# -- conditions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ETag:
    """An entity tag without its quotes (RFC 9110 §8.8.3)."""

    value: str
    weak: bool = False


_ETAG = re.compile(r'(?:(W/)?"([^"]*+)"[ \t]*+|([^,"]++))(?:,|\Z)')
_MAX_ETAGS = 1_000  # a cache with every version it ever had
_BETWEEN = re.compile(r"[,\s]*+")  # a list may have empty elements (RFC 9110 §5.6.1)


def quote_etag(bare: str) -> str:
    """A bare strong ETag as it goes over the wire."""
    return f'"{bare}"'


def parse_etags(value: str) -> Literal["*"] | tuple[ETag, ...]:
    """If-Match or If-None-Match; junk without quotes (JoplinIgnore-1) is a tag that never matches.

    Raises:
        BadRequest: not a list, or more than 1,000 tags.

    Spec: RFC 9110 §13.1.1, §13.1.2. Cost: linear.
    """
    text = value.strip()
    if text == "*":
        return "*"
    found: list[ETag] = []
    at = 0
    while (at := _BETWEEN.match(text, at).end()) < len(text):  # type: ignore[union-attr]  # always matches
        match = _ETAG.match(text, at)
        if match is None or len(found) >= _MAX_ETAGS:
            raise BadRequest("An entity tag is malformed, or there are too many.")
        if match[2] is not None:
            found.append(ETag(match[2], bool(match[1])))
        else:
            found.append(ETag("\0" + match[3].strip(), True))
        at = match.end()
    return tuple(found)


@dataclass(frozen=True, slots=True)
class IfCondition:
    """One test inside a list of the If header."""

    negate: bool
    token: str | None  # state token (a URI)
    etag: ETag | None


@dataclass(frozen=True, slots=True)
class IfList:
    """Conditions that must all hold, for the tagged resource (raw href) or the request's own (None)."""

    resource: str | None
    conditions: tuple[IfCondition, ...]


_IF_TOKEN = re.compile(
    r"\s*+(?:(?P<open>\()|(?P<close>\))|(?P<not>Not)(?=[\s<\[])|<(?P<uri>[^<>\s]++)>"
    r'|\[\s*+(?P<weak>W/)?"(?P<tag>[^"]*+)"\s*+\])',
    re.IGNORECASE,
)
_MAX_IF = 200  # conditions in one header: a client holds a handful of locks


class _IfParser:
    """The lists read so far, and the one that is open."""

    def __init__(self) -> None:
        self.lists: list[IfList] = []
        self._resource: str | None = None
        self._dangling = False  # a tag without its list
        self._inside: list[IfCondition] | None = None
        self._negate = False
        self._count = 0

    def take(self, match: re.Match[str]) -> bool:
        """One token; False where the grammar has no place for it."""
        kind = match.lastgroup
        if self._inside is None:
            return self._outside(kind, match)
        if kind in ("uri", "tag"):
            etag = ETag(match["tag"], bool(match["weak"])) if kind == "tag" else None
            self._inside.append(IfCondition(self._negate, match["uri"], etag))
            self._negate = False
            self._count += 1
            return self._count <= _MAX_IF
        if self._negate or kind == "open" or (kind == "close" and not self._inside):
            return False
        if kind == "not":
            self._negate = True
        else:
            self.lists.append(IfList(self._resource, tuple(self._inside)))
            self._inside, self._dangling = None, False
        return True

    def _outside(self, kind: str | None, match: re.Match[str]) -> bool:
        if kind == "open":
            self._inside = []
            return True
        if kind != "uri" or self._dangling:
            return False
        self._resource, self._dangling = match["uri"], True
        return True

    @property
    def complete(self) -> bool:
        return self._inside is None and not self._dangling and bool(self.lists)


def parse_if(value: str) -> tuple[IfList, ...]:
    """The If header's lists in order.

    Raises:
        BadRequest: malformed, or more than 200 conditions.

    Spec: RFC 4918 §10.4. Cost: linear.
    """
    text = value.rstrip()
    parser = _IfParser()
    at = 0
    while at < len(text):
        match = _IF_TOKEN.match(text, at)
        if match is None or not parser.take(match):
            raise BadRequest("The If header is malformed, or has too many conditions.")
        at = match.end()
    if not parser.complete:
        raise BadRequest("The If header is malformed.")
    return tuple(parser.lists)


# -- DAV ------------------------------------------------------------------------------------------


def parse_depth(value: str | None, default: Depth) -> Depth:
    """0, 1 or INFINITY.

    Raises:
        BadRequest: anything else.

    Spec: RFC 4918 §10.2.
    """
    if value is None:
        return default
    depths = {"0": 0, "1": 1, "infinity": INFINITY}
    try:
        return depths[value.strip().lower()]
    except KeyError:
        raise BadRequest("Depth is 0, 1 or infinity.") from None


def parse_overwrite(value: str | None) -> bool:
    """Overwrite: T is the default (RFC 4918 §10.6).

    Raises:
        BadRequest: neither T nor F.
    """
    if value is None:
        return True
    flag = value.strip().upper()
    if flag not in ("T", "F"):
        raise BadRequest("Overwrite is T or F.")
    return flag == "T"


def parse_timeout(value: str | None, longest_s: int) -> int:
    """Seconds of a Timeout header, at most `longest_s`; the first choice that is understood counts.

    Spec: RFC 4918 §10.7.
    """
    for choice in (value or "").split(","):
        text = choice.strip().lower()
        if text == "infinite":
            return longest_s
        if text.startswith("second-") and text[7:].isascii() and text[7:].isdigit() and len(text) < 20:
            return max(1, min(int(text[7:]), longest_s))
    return longest_s


def parse_lock_token(value: str) -> str:
    """The token of a Lock-Token header, with or without its angle brackets (npm webdav leaves them off)."""
    text = value.strip()
    return text[1:-1].strip() if text.startswith("<") and text.endswith(">") else text


# -- ranges, dates, lengths -----------------------------------------------------------------------

_MAX_RANGES = 16


_RANGE = re.compile(r"[ \t]*+([0-9]{0,30})-([0-9]{0,30})[ \t]*+")


def parse_range(value: str, size: int) -> tuple[tuple[int, int], ...] | None:
    """Byte ranges of a Range header.

    Args:
        value: the header.
        size: of the representation in bytes.

    Returns:
        Half-open (start, end) in the order asked, overlapping ones joined and then by place; None where the
        header is to be ignored: another unit, malformed, or a suffix of nothing.

    Raises:
        RangeNotSatisfiable: no range lies inside, or more than 16 are asked.

    Spec: RFC 9110 §14.1.2, §14.2, §15.5.17. Cost: linear.
    """
    unit, equals, text = value.partition("=")
    if unit.strip().lower() != "bytes" or not equals:
        return None
    unsatisfiable = RangeNotSatisfiable(
        "No such range.", headers=[(b"content-range", f"bytes */{size}".encode())]
    )
    if text.count(",") >= _MAX_RANGES:
        raise unsatisfiable
    found: list[tuple[int, int]] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None or not (match[1] or match[2]):
            return None
        if not match[1]:
            if int(match[2]):
                found.append((max(size - int(match[2]), 0), size))
            continue
        start, end = int(match[1]), int(match[2]) + 1 if match[2] else size
        if match[2] and end <= start:
            return None
        if start < size:
            found.append((start, min(end, size)))
    if not found:
        raise unsatisfiable
    return _disjoint(found) if size else None


def _disjoint(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    ordered = sorted(ranges)
    if all(ordered[at][1] <= ordered[at + 1][0] for at in range(len(ordered) - 1)):
        return tuple(ranges)
    joined = [ordered[0]]
    for start, end in ordered[1:]:
        if start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return tuple(joined)


def parse_content_length(value: str) -> int:
    """A declared length in bytes.

    Raises:
        BadRequest: anything but 1 to 18 digits.
    """
    if re.fullmatch(r"[0-9]{1,18}", value) is None:
        raise BadRequest("Content-Length is not a number.")
    return int(value)


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


_EARLIEST, _LATEST = -62135596800, 253402300799  # years 1 to 9999: what both written forms can say


@lru_cache(maxsize=4096)
def http_date(at: int) -> str:
    """Unix seconds as an IMF-fixdate; times outside of the years 1 to 9999 as the nearest inside.

    Spec: RFC 9110 §5.6.7.
    """
    year, month, day, hour, minute, second, weekday, *_ = time.gmtime(min(max(at, _EARLIEST), _LATEST))
    return f"{_DAYS[weekday]}, {day:02} {_MONTHS[month - 1]} {year:04} {hour:02}:{minute:02}:{second:02} GMT"


@lru_cache(maxsize=4096)
def iso_date(at: int) -> str:
    """Unix seconds as RFC 3339, for creationdate; bounded like `http_date` (RFC 4918 §15.1)."""
    year, month, day, hour, minute, second, *_ = time.gmtime(min(max(at, _EARLIEST), _LATEST))
    return f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"


_TIME = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_DATES = (
    re.compile(
        r"[A-Za-z]{3}, (?P<day>[0-9]{1,2}) (?P<month>[A-Za-z]{3}) (?P<year>[0-9]{4}) " + _TIME + " GMT"
    ),
    re.compile(
        r"[A-Za-z]{6,9}, (?P<day>[0-9]{2})-(?P<month>[A-Za-z]{3})-(?P<year>[0-9]{2}) " + _TIME + " GMT"
    ),
    re.compile(r"[A-Za-z]{3} (?P<month>[A-Za-z]{3}) (?P<day>[ 0-9][0-9]) " + _TIME + " (?P<year>[0-9]{4})"),
)


def parse_http_date(value: str) -> int | None:
    """Unix seconds of any of the three date forms, None for anything else.

    A year of two digits is one of 1970 to 2069; a leap second is the second before it.

    Spec: RFC 9110 §5.6.7. Cost: three short regular expressions at most.
    """
    text = value.strip()
    match = next((found for form in _DATES if (found := form.fullmatch(text))), None)
    if match is None or match["month"].title() not in _MONTHS:
        return None
    year, second = int(match["year"]), int(match["second"])
    if len(match["year"]) == 2:
        year += 2000 if year < 70 else 1900
    try:
        moment = datetime(
            year,
            _MONTHS.index(match["month"].title()) + 1,
            int(match["day"]),
            int(match["hour"]),
            int(match["minute"]),
            59 if second == 60 else second,
            tzinfo=UTC,
        )
    except ValueError:
        return None
    return int(moment.timestamp())


def parse_oc_mtime(value: str | None) -> float | None:
    """X-OC-Mtime in Unix seconds, fractions kept; None where absent, no number, or past the year 9999."""
    if value is None or re.fullmatch(r"-?[0-9]{1,12}(\.[0-9]{1,9})?", value.strip(), re.ASCII) is None:
        return None
    seconds = float(value)
    return seconds if _EARLIEST <= seconds <= _LATEST else None


# -- negotiation ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prefer:
    """What the client would rather have (RFC 7240, RFC 8144)."""

    minimal: bool = False
    representation: bool = False
    depth_noroot: bool = False


def parse_prefer(prefer: str | None, brief: str | None = None) -> Prefer:
    """Prefer (joined) and Microsoft's Brief header; unknown preferences are ignored, the first of two counts.

    Spec: RFC 7240 §2, RFC 8144 §2.
    """
    wanted: dict[str, str] = {}
    for part in (prefer or "").split(","):
        name, _, value = part.partition(";")[0].partition("=")
        wanted.setdefault(name.strip().lower(), value.strip().strip('"').lower())
    return Prefer(
        minimal=wanted.get("return") == "minimal" or (brief or "").strip().lower() == "t",
        representation=wanted.get("return") == "representation",
        depth_noroot="depth-noroot" in wanted,
    )


_REFUSED = re.compile(r"[ \t]*+q[ \t]*+=[ \t]*+0(?:\.0*+)?[ \t]*+")


def accepts_gzip(value: str | None) -> bool:
    """Whether gzip is acceptable: named, or by "*" where it is not (RFC 9110 §12.5.3)."""
    weights: dict[str, str] = {}
    for part in (value or "").lower().split(","):
        coding, _, weight = part.partition(";")
        weights[coding.strip()] = weight
    weight = weights.get("gzip", weights.get("x-gzip", weights.get("*", "q=0")))
    return _REFUSED.fullmatch(weight) is None


_MAX_PARAMETERS = 32  # more are left out
_PARAMETER = re.compile(r';\s*+([^\s;="]++)\s*+=\s*+(?:"((?:[^"\\]|\\.)*+)"|([^;"]*+))', re.DOTALL)


def parse_content_type(value: str | None) -> tuple[str, dict[str, str]]:
    """Media type in lower case and its parameters, names in lower case; "" where absent (RFC 9110 §8.3.1)."""
    kind, semicolon, rest = (value or "").partition(";")
    parameters: dict[str, str] = {}
    for match in islice(_PARAMETER.finditer(semicolon + rest), _MAX_PARAMETERS):
        name, quoted, token = match.groups("")
        parameters.setdefault(name.lower(), re.sub(r"\\(.)", r"\1", quoted) or token.strip())
    return kind.strip().lower(), parameters
