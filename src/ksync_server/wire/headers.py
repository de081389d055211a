"""Grammars of header fields and request paths (RFC 9110, RFC 4918, RFC 3986, RFC 7240): no I/O."""

from __future__ import annotations

import base64
import binascii
import calendar
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from urllib.parse import quote, unquote_to_bytes

from ksync_server.errors import BadRequest, RangeNotSatisfiable

INFINITY = 1 << 30  # Depth: infinity
Depth = int

_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_SAFE = "!$&'()*+,;=:@~"  # pchar of RFC 3986 beyond the unreserved ones
_PLAIN = re.compile(r"[A-Za-z0-9._~!$'()*,=:@-]+")


# -- paths ----------------------------------------------------------------------------------------


def split_path(raw: bytes) -> tuple[tuple[str, ...], bool]:
    """A raw request path as decoded segments, and whether it ended in a slash.

    Split before decoding, so "%2F" stays inside its segment. A fragment is taken off, empty segments
    collapse.

    Raises:
        BadRequest: a bad percent escape, no UTF-8, a control character, or a dot segment (also encoded).

    Spec: RFC 3986 §3.3. Cost: linear.
    """
    path = raw.partition(b"#")[0].partition(b"?")[0]
    if not path.startswith(b"/"):
        raise BadRequest("The path does not start with a slash.")
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
    return quote(name, safe=_SAFE.replace("&", "").replace("+", "").replace(";", ""))


def quote_segment(name: str) -> str:
    """One path segment, percent-encoded; "/" inside becomes %2F. "&", "+" and ";" are escaped too, on which
    clients trip though the standard allows them bare."""
    if _PLAIN.fullmatch(name):
        return name
    return _quoted(name)


def join_path(segments: tuple[str, ...], trailing_slash: bool) -> str:
    """An absolute path of encoded segments."""
    path = "/" + "/".join([quote_segment(segment) for segment in segments])
    return path + "/" if trailing_slash and segments else path


def parse_destination(value: str) -> tuple[str | None, str | None, bytes]:
    """A Destination header as scheme, authority and raw path; split before anything is decoded.

    Raises:
        BadRequest: neither an http(s) URI nor an absolute path.

    Spec: RFC 4918 §10.3.
    """
    text = value.strip()
    raw = text.encode("latin-1", "replace")
    if text.startswith("/") and not text.startswith("//"):
        return None, None, _only_path(raw)
    match = re.fullmatch(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(/[^?#]*)?([?#].*)?", raw)
    if match is None or match[1].lower() not in (b"http", b"https"):
        raise BadRequest("The Destination is not an absolute URI.")
    return match[1].decode().lower(), match[2].decode("latin-1"), match[3] or b"/"


def _only_path(raw: bytes) -> bytes:
    return re.split(rb"[?#]", raw, maxsplit=1)[0]


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


_ETAG = re.compile(r'\s*(?:(W/)?"([^"]*)"|([^,"\s][^,"]*))\s*(?:,|$)')


def quote_etag(bare: str) -> str:
    """A bare strong ETag as it goes over the wire."""
    return f'"{bare}"'


def parse_etags(value: str) -> Literal["*"] | tuple[ETag, ...]:
    """If-Match or If-None-Match; junk without quotes (JoplinIgnore-1) is a tag that never matches.

    Raises:
        BadRequest: not a list.

    Spec: RFC 9110 §13.1.1. Cost: linear.
    """
    text = value.strip()
    if text == "*":
        return "*"
    found: list[ETag] = []
    at = 0
    while at < len(text):
        match = _ETAG.match(text, at)
        if match is None:
            raise BadRequest("An entity tag is malformed.")
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
    r'\s*(?:(\()|(\))|(Not)(?=[\s<\[])|<([^<>\s]*)>|\[\s*(W/)?"([^"]*)"\s*\])', re.IGNORECASE
)
_MAX_IF = 200  # conditions in one header: a client holds a handful of locks


def parse_if(value: str) -> tuple[IfList, ...]:
    """The If header's lists in order.

    Raises:
        BadRequest: malformed, or more than 200 conditions.

    Spec: RFC 4918 §10.4. Cost: linear.
    """
    lists: list[IfList] = []
    resource: str | None = None
    inside: list[IfCondition] | None = None
    negate = False
    count = 0
    at, text = 0, value.rstrip()
    while at < len(text):
        match = _IF_TOKEN.match(text, at)
        if match is None:
            raise BadRequest("The If header is malformed.")
        at = match.end()
        opened, closed, negation, uri, weak, tag = match.groups()
        if inside is None:
            if opened:
                inside = []
            elif uri is not None and not negation:
                resource = uri
            else:
                raise BadRequest("The If header is malformed.")
        elif closed:
            if not inside or negate:
                raise BadRequest("The If header holds an empty list.")
            lists.append(IfList(resource, tuple(inside)))
            inside = None
        elif negation and not negate:
            negate = True
        elif uri is not None or tag is not None:
            inside.append(IfCondition(negate, uri, None if tag is None else ETag(tag, bool(weak))))
            negate = False
            count += 1
        else:
            raise BadRequest("The If header is malformed.")
        if count > _MAX_IF:
            raise BadRequest("The If header is too long.")
    if inside is not None or not lists:
        raise BadRequest("The If header is malformed.")
    return tuple(lists)


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


def parse_range(value: str, size: int) -> tuple[tuple[int, int], ...] | None:
    """Byte ranges as half-open (start, end), in the order asked; None where the header is to be ignored.

    Raises:
        RangeNotSatisfiable: no range lies inside, or too many or overlapping ones are asked.

    Spec: RFC 9110 §14.1.2, §14.2, §17.15.
    """
    unit, equals, text = value.partition("=")
    if unit.strip().lower() != "bytes" or not equals:
        return None
    parts = text.split(",")
    found: list[tuple[int, int]] = []
    for part in parts:
        match = re.fullmatch(r"\s*([0-9]{0,18})-([0-9]{0,18})\s*", part)
        if match is None or not (match[1] or match[2]):
            return None
        if not match[1]:
            length = int(match[2])
            if length:
                found.append((max(size - length, 0), size))
            continue
        start, end = int(match[1]), int(match[2]) + 1 if match[2] else size
        if end <= start and match[2]:
            return None
        if start < size:
            found.append((start, min(end, size)))
    unsatisfiable = RangeNotSatisfiable(
        "No such range.", headers=[(b"content-range", f"bytes */{size}".encode())]
    )
    if not found or len(found) > _MAX_RANGES or any(end <= start for start, end in found):
        raise unsatisfiable
    ordered = sorted(found)
    if any(ordered[at][1] > ordered[at + 1][0] for at in range(len(ordered) - 1)):
        raise unsatisfiable
    return tuple(found)


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


@lru_cache(maxsize=4096)
def http_date(at: int) -> str:
    """Unix seconds as an IMF-fixdate (RFC 9110 §5.6.7)."""
    year, month, day, hour, minute, second, weekday, *_ = time.gmtime(at)
    return f"{_DAYS[weekday]}, {day:02} {_MONTHS[month - 1]} {year:04} {hour:02}:{minute:02}:{second:02} GMT"


def iso_date(at: int) -> str:
    """Unix seconds as RFC 3339, for creationdate."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def parse_http_date(value: str) -> int | None:
    """Unix seconds of any of the three date forms, None for anything else (RFC 9110 §5.6.7)."""
    for form in ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"):
        try:
            return calendar.timegm(time.strptime(value.strip(), form))
        except ValueError:
            continue
    return None


def parse_oc_mtime(value: str | None) -> float | None:
    """X-OC-Mtime in Unix seconds, fractions kept; None where absent or not a sane time."""
    if value is None or re.fullmatch(r"-?[0-9]{1,12}(\.[0-9]{1,9})?", value.strip()) is None:
        return None
    return float(value)


# -- negotiation ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prefer:
    """What the client would rather have (RFC 7240, RFC 8144)."""

    minimal: bool = False
    representation: bool = False
    depth_noroot: bool = False


def parse_prefer(prefer: str | None, brief: str | None = None) -> Prefer:
    """Prefer (joined) and Microsoft's Brief header; unknown preferences are ignored."""
    wanted = {part.partition(";")[0].strip().lower().replace(" ", "") for part in (prefer or "").split(",")}
    wanted = {part.replace('"', "") for part in wanted}
    return Prefer(
        minimal="return=minimal" in wanted or (brief or "").strip().lower() == "t",
        representation="return=representation" in wanted,
        depth_noroot="depth-noroot" in wanted,
    )


def accepts_gzip(value: str | None) -> bool:
    """Whether gzip is acceptable (RFC 9110 §12.5.3)."""
    for part in (value or "").split(","):
        coding, _, weight = part.strip().lower().partition(";")
        if coding.strip() in ("gzip", "*"):
            return re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", weight) is None
    return False


def parse_content_type(value: str | None) -> tuple[str, dict[str, str]]:
    """Media type in lower case and its parameters; "" where absent (RFC 9110 §8.3)."""
    kind, *rest = (value or "").split(";")
    parameters = {}
    for part in rest:
        name, equals, text = part.partition("=")
        if equals:
            parameters[name.strip().lower()] = text.strip().strip('"')
    return kind.strip().lower(), parameters
