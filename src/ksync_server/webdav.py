"""The rules of RFC 4918 and RFC 9110 that calendars and files share, each decided here and nowhere else.

`check` is called twice for a request that changes something: before its body is read, so that a doomed upload
costs nothing, and again first inside the publishing transaction; the second decision counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ksync_server import settings as configuration
from ksync_server.errors import (
    BadGateway,
    BadRequest,
    BodyTooLarge,
    Conflict,
    Forbidden,
    Locked,
    PreconditionFailed,
    UnsupportedMedia,
)
from ksync_server.http import Request
from ksync_server.wire import headers, xml
from ksync_server.wire.headers import INFINITY, ETag
from ksync_server.wire.xml import Element

__all__ = ["INFINITY"]

D = "{DAV:}"


# -- request bodies -------------------------------------------------------------------------------


def limits(settings: configuration.Xml) -> xml.XmlLimits:
    """The settings as the reader takes them."""
    return xml.XmlLimits(settings.max_bytes, settings.max_depth, settings.max_elements)


_IN_THREAD_FROM = 64 * 1024  # bytes; a mebibyte of tiny elements takes 0.2 s, in which others must get on


async def read_xml(request: Request, settings: configuration.Xml) -> Element | None:
    """The body as one XML element, None for an empty one; declared length and chunks alike.

    A MKCOL may have a body of any type, so one that is neither XML nor said to be is not malformed there but
    of a type that means nothing (the Obsidian plugins probe with it and take no other answer).

    Args:
        request: its body is read here, and must not have been before.
        settings: the limits.

    Raises:
        BodyTooLarge: over the limit; before a byte is read when the length was declared.
        BadRequest: not well-formed, a DOCTYPE, too deep.
        UnsupportedMedia: a Content-Encoding, or a MKCOL with another type.
        ClientGone: cut off.

    Spec: RFC 4918 §8.2, §9.3. Cost: linear; in memory up to `settings.max_bytes`.
    """
    coding = request.headers.get("content-encoding")
    if coding is not None and coding.strip().lower() not in ("", "identity"):
        raise UnsupportedMedia("A compressed request body is not accepted.")
    body = await request.body.read(settings.max_bytes)
    if not body.strip():
        return None
    try:
        if len(body) > _IN_THREAD_FROM:
            return await asyncio.to_thread(xml.parse, body, limits(settings))
        return xml.parse(body, limits(settings))
    except BadRequest:
        kind, _ = headers.parse_content_type(request.headers.get("content-type"))
        if request.method == "MKCOL" and kind not in ("application/xml", "text/xml"):
            raise UnsupportedMedia("A body of this type means nothing here.") from None
        raise


@dataclass(frozen=True, slots=True)
class Propfind:
    """What a PROPFIND or REPORT asks for, in order, without repetitions.

    Raises:
        BadRequest: more than 500 properties, each of which would be in every row of the answer.
    """

    kind: Literal["prop", "allprop", "propname"]
    names: tuple[str, ...] = ()  # of prop, or of allprop's include

    def __post_init__(self) -> None:
        if len(self.names) > _MAX_NAMES:
            raise BadRequest(f"At most {_MAX_NAMES} properties can be asked for at once.")


_MAX_NAMES = 500  # the longest list of a real program has some 60


def parse_propfind(body: Element | None) -> Propfind:
    """The body of a PROPFIND; an empty one is allprop.

    Raises:
        BadRequest: another element, nothing inside, or more than one kind.

    Spec: RFC 4918 §9.1, §14.20.
    """
    if body is None:
        return Propfind("allprop")
    if body.tag != D + "propfind":
        raise BadRequest("The body of a PROPFIND is a propfind element.")
    kinds = [child for child in body.elements() if child.tag in (D + "prop", D + "allprop", D + "propname")]
    if len(kinds) != 1:
        raise BadRequest("A propfind has exactly one of prop, allprop and propname.")
    include = body.find(D + "include")
    if kinds[0].tag == D + "prop":
        return Propfind("prop", _names(kinds[0]))
    if kinds[0].tag == D + "propname":
        return Propfind("propname")
    return Propfind("allprop", _names(include) if include else ())


def _names(element: Element) -> tuple[str, ...]:
    return tuple(dict.fromkeys(child.tag for child in element.elements()))


@dataclass(frozen=True, slots=True)
class Instruction:
    """One property to set (`element` holds its value) or to remove."""

    set: bool
    name: str
    element: Element


def instructions(parts: Iterable[Element]) -> tuple[Instruction, ...]:
    """The properties of `set` and `remove` elements in document order (RFC 4918 §9.2).

    Raises:
        BadRequest: a set or remove without exactly one prop.
    """
    found: list[Instruction] = []
    for part in parts:
        if part.tag not in (D + "set", D + "remove"):
            continue
        props = part.all(D + "prop")
        if len(props) != 1:
            raise BadRequest("A set or remove has exactly one prop.")
        found += [Instruction(part.tag == D + "set", child.tag, child) for child in props[0].elements()]
    return tuple(found)


def parse_proppatch(body: Element | None) -> tuple[Instruction, ...]:
    """The body of a PROPPATCH.

    Raises:
        BadRequest: no body, another element, or nothing to do.

    Spec: RFC 4918 §9.2, §14.19.
    """
    if body is None or body.tag != D + "propertyupdate":
        raise BadRequest("The body of a PROPPATCH is a propertyupdate element.")
    found = instructions(body.elements())
    if not found:
        raise BadRequest("A propertyupdate sets or removes at least one property.")
    return found


def parse_mkcol(body: Element | None, root: str) -> tuple[Instruction, ...]:
    """The properties of an extended MKCOL (`root` {DAV:}mkcol) or MKCALENDAR body; none without a body.

    Raises:
        UnsupportedMedia: another element: a body this method gives no meaning (RFC 4918 §9.3).
        BadRequest: a remove, or a set without prop.

    Spec: RFC 5689 §3, RFC 4791 §5.3.1.
    """
    if body is None:
        return ()
    if body.tag != root:
        raise UnsupportedMedia(f"The body is not a {root} element.")
    found = instructions(body.elements())
    if not all(instruction.set for instruction in found):
        raise BadRequest("A new collection has no properties to remove.")
    return found


# -- answers --------------------------------------------------------------------------------------

OPEN = f"{xml.DECLARATION}<d:multistatus{xml.NAMESPACES}>"
CLOSE = "</d:multistatus>"
_REASONS = {
    200: "OK",
    201: "Created",
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    409: "Conflict",
    412: "Precondition Failed",
    413: "Content Too Large",
    422: "Unprocessable Content",
    423: "Locked",
    424: "Failed Dependency",
    500: "Internal Server Error",
    502: "Bad Gateway",
    507: "Insufficient Storage",
}


def status(code: int) -> str:
    """A status element."""
    return _STATUS.get(code) or f"<d:status>HTTP/1.1 {code} Error</d:status>"


_STATUS = {code: f"<d:status>HTTP/1.1 {code} {reason}</d:status>" for code, reason in _REASONS.items()}
OK = status(200)


def _href(href: str) -> str:
    # Nearly always plain; these three scans cost a fifth of the regular expression of escape.
    return href if href.isprintable() and "&" not in href and "<" not in href else xml.escape(href)


def propstat(code: int, inner: str, extra: str = "") -> str:
    """Properties (markup) that share one status; nothing where there are none."""
    if not inner:
        return ""
    return f"<d:propstat><d:prop>{inner}</d:prop>{status(code)}{extra}</d:propstat>"


def missing(names: Iterable[str]) -> str:
    """The 404 propstat of properties that a resource does not have."""
    return propstat(404, "".join([xml.empty(name) for name in names]))


def response(href: str, propstats: str) -> str:
    """One resource with its propstats; `href` is encoded already.

    A response has to hold something: without any propstat an empty one with 200 says so. Long listings whose
    properties are all there put the same markup around `OK` with one f-string of their own.

    Spec: RFC 4918 §14.24.
    """
    inner = propstats or f"<d:propstat><d:prop/>{OK}</d:propstat>"
    return f"<d:response><d:href>{_href(href)}</d:href>{inner}</d:response>"


def failed(href: str, code: int, precondition: str | None = None) -> str:
    """One resource with a status of its own, e.g. 404 in a sync answer or 423 in a DELETE."""
    error = f"<d:error>{xml.empty(precondition)}</d:error>" if precondition else ""
    return f"<d:response><d:href>{_href(href)}</d:href>{status(code)}{error}</d:response>"


def multistatus(responses: Iterable[str], tail: str = "") -> str:
    """A whole answer; `tail` is e.g. the sync-token element."""
    return f"{OPEN}{''.join(responses)}{tail}{CLOSE}"


def error_body(precondition: str, hrefs: Sequence[str] = (), text: str = "") -> bytes:
    """A `DAV:error` with the failed condition and a sentence for people.

    Spec: RFC 4918 §14.5, §16.
    """
    inner = "".join([f"<d:href>{_href(href)}</d:href>" for href in hrefs])
    # In a namespace of our own, which programs that look for conditions pass over (RFC 4918 §17).
    note = f'<k:message xmlns:k="urn:ksync:ns">{xml.escape(text)}</k:message>' if text else ""
    return (
        f"{xml.DECLARATION}<d:error{xml.NAMESPACES}>{xml.tag(precondition, inner)}{note}</d:error>"
    ).encode()


# -- conditions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LockState:
    """A lock that covers a resource, as conditions see it."""

    token: str
    root: str  # encoded href of what was locked
    account_id: int
    exclusive: bool = True


@dataclass(frozen=True, slots=True)
class ResourceState:
    """What conditions are tested against."""

    exists: bool
    etag: str | None = None  # bare, strong
    modified_at: int | None = None  # Unix seconds
    locks: tuple[LockState, ...] = ()  # own and inherited


ABSENT = ResourceState(False)
Resolve = Callable[[str], ResourceState]  # raw href of an If header's tagged list -> its state


@dataclass(frozen=True, slots=True)
class Conditions:
    """The conditions of one request, parsed once.

    `tokens` are the state tokens that the If header submits, wherever they stand (RFC 4918 §10.4.1).
    """

    match: Literal["*"] | tuple[ETag, ...] | None = None
    none_match: Literal["*"] | tuple[ETag, ...] | None = None
    modified_since: int | None = None
    unmodified_since: int | None = None
    lists: tuple[headers.IfList, ...] = ()
    tokens: frozenset[str] = field(default_factory=frozenset)


UNCONDITIONAL = Conditions()
_CONDITIONAL = ("if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "if")


def conditions(request: Request) -> Conditions:
    """Parse the conditional headers.

    Raises:
        BadRequest: one is malformed; a malformed date is ignored as the standard asks.

    Spec: RFC 9110 §13.1, RFC 4918 §10.4. Cost: five look-ups where there are none.
    """
    given = request.headers
    if not any(name in given for name in _CONDITIONAL):
        return UNCONDITIONAL
    match, none_match = given.joined("if-match"), given.joined("if-none-match")
    since, unsince = given.get("if-modified-since"), given.get("if-unmodified-since")
    lists = headers.parse_if(value) if (value := given.joined("if")) is not None else ()
    tokens = {test.token for one in lists for test in one.conditions if test.token is not None}
    return Conditions(
        None if match is None else headers.parse_etags(match),
        None if none_match is None else headers.parse_etags(none_match),
        None if since is None else headers.parse_http_date(since),
        None if unsince is None else headers.parse_http_date(unsince),
        lists,
        frozenset(tokens),
    )


def _matches(tags: Literal["*"] | tuple[ETag, ...], state: ResourceState, *, weak: bool) -> bool:
    if tags == "*":
        return state.exists
    return state.exists and any(tag.value == state.etag and (weak or not tag.weak) for tag in tags)


def _list_holds(one: headers.IfList, state: ResourceState) -> bool:
    for test in one.conditions:
        if test.token is not None:
            holds = any(lock.token == test.token for lock in state.locks)
        else:
            assert test.etag is not None
            holds = _matches((test.etag,), state, weak=False)
        if holds == test.negate:
            return False
    return True


def check_if(given: Conditions, state: ResourceState, resolve: Resolve | None) -> None:
    """The If header: at least one of its lists must hold for its resource.

    Args:
        given: the request's conditions.
        state: of the resource that the request addresses.
        resolve: the state of another resource by its raw href; without it, tagged lists never hold but with
            Not.

    Raises:
        PreconditionFailed: none does.

    Spec: RFC 4918 §10.4.3, §10.4.4. Cost: one `resolve` per tagged resource, at most 200.
    """
    if not given.lists:
        return
    known: dict[str, ResourceState] = {}
    for one in given.lists:
        tagged = state
        if one.resource is not None:
            if one.resource not in known:
                known[one.resource] = resolve(one.resource) if resolve else ABSENT
            tagged = known[one.resource]
        if _list_holds(one, tagged):
            return
    raise PreconditionFailed("No list of the If header holds.")


def check(given: Conditions, state: ResourceState, resolve: Resolve | None = None) -> None:
    """Every condition of a request that changes something, in the standard's order.

    If-Modified-Since means nothing here; If-Unmodified-Since means nothing beside If-Match or where there is
    no modification date. Dates are compared for equality: clients set our modification times and clocks go
    back, so an earlier one may be newer, and a write on top of it would be lost. Locks are `check_locks`.

    Args:
        given: the request's conditions.
        state: of the resource that the request addresses, whether it exists or not.
        resolve: for tagged lists of the If header, see `check_if`.

    Raises:
        PreconditionFailed: one is false.

    Spec: RFC 9110 §13.1, §13.2.2. Cost: none without conditions; pure over `state`, so it can be asked before
        the body and again inside the transaction that publishes.
    """
    if given.match is not None:
        if not _matches(given.match, state, weak=False):
            raise PreconditionFailed("If-Match: the resource is not in the state you expect.")
    elif (
        given.unmodified_since is not None
        and state.modified_at is not None
        and state.modified_at != given.unmodified_since
    ):
        raise PreconditionFailed("If-Unmodified-Since: the resource was changed.")
    if given.none_match is not None and _matches(given.none_match, state, weak=True):
        raise PreconditionFailed("If-None-Match: the resource exists.")
    check_if(given, state, resolve)


def not_modified(given: Conditions, state: ResourceState, resolve: Resolve | None = None) -> bool:
    """Whether a GET or HEAD is answered 304; a date has to be the very one, see `check`.

    Raises:
        PreconditionFailed: If-Match, If-Unmodified-Since or If is false.

    Spec: RFC 9110 §13.1.2, §13.1.3, §13.2.2.
    """
    check(replace(given, none_match=None), state, resolve)
    if given.none_match is not None:
        return _matches(given.none_match, state, weak=True)
    if given.modified_since is not None and state.modified_at is not None:
        return state.modified_at == given.modified_since
    return False


def if_range(request: Request, state: ResourceState) -> bool:
    """Whether a Range header counts: no If-Range, or one that names this very representation.

    A date never does: clients set our modification times, so two contents may share one, and a download
    that is resumed over the change would be neither.

    Raises:
        BadRequest: a malformed entity tag.

    Spec: RFC 9110 §13.1.5, §8.8.2.2.
    """
    value = request.headers.get("if-range")
    if value is None:
        return True
    if not value.lstrip().startswith(('"', "W/")):
        return False
    tags = headers.parse_etags(value)
    return len(tags) == 1 and _matches(tags, state, weak=False)


def check_locks(given: Conditions, account_id: int, *states: ResourceState) -> None:
    """Whether the request may change resources under these locks: for each resource, one of the locks that
    cover it was taken by this account and its token was submitted.

    Raises:
        Locked: lock-token-submitted, naming the root of a lock that stands in the way.

    Spec: RFC 4918 §6.4, §7, §16.
    """
    for state in states:
        if state.locks and not any(
            lock.account_id == account_id and lock.token in given.tokens for lock in state.locks
        ):
            raise Locked(
                "The resource is locked.",
                precondition=D + "lock-token-submitted",
                hrefs=(state.locks[0].root,),
            )


# -- COPY, MOVE, DELETE ---------------------------------------------------------------------------


def depth(request: Request, default: int = INFINITY) -> int:
    """The Depth header (RFC 4918 §10.2).

    Raises:
        BadRequest: not 0, 1 or infinity.
    """
    return headers.parse_depth(request.headers.get("depth"), default)


def tree_depth(request: Request, *, folder: bool) -> int:
    """Depth of a COPY, MOVE or DELETE: ignored for a file; a folder is copied with 0 or infinity, and moved
    or deleted with infinity only.

    Raises:
        BadRequest: another value (RFC 4918 §9.6.1, §9.8.3, §9.9.2).
    """
    if not folder:
        return 0
    wanted = depth(request)
    if wanted == INFINITY or (wanted == 0 and request.method == "COPY"):
        return wanted
    raise BadRequest(f"Depth of a {request.method} of a collection is {_allowed_depths(request.method)}.")


def _allowed_depths(method: str) -> str:
    return "0 or infinity" if method == "COPY" else "infinity"


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a COPY or MOVE goes, relative to the same site."""

    segments: tuple[str, ...]
    trailing_slash: bool
    overwrite: bool


def destination(request: Request) -> Destination:
    """The Destination header on the site that the request came to.

    Raises:
        BadRequest: missing or malformed, or Overwrite is.
        BadGateway: another server, or another site of this one.
        Forbidden: the same place as the source.
        Conflict: inside the source, or around it: overwriting would delete what is to be moved.

    Spec: RFC 4918 §9.8.3, §9.8.5, §9.9.4, §10.3.
    """
    value = request.headers.get("destination")
    if value is None:
        raise BadRequest(f"{request.method} needs a Destination header.")
    place = _place(request, value)
    if place is None:
        raise BadGateway("The Destination is on another server or outside of this site.")
    target, slash = place
    overwrite = headers.parse_overwrite(request.headers.get("overwrite"))
    source = request.segments
    if target == source:
        raise Forbidden("Source and Destination are the same.")
    if target[: len(source)] == source:
        raise Conflict("The Destination is inside the source.")
    if source[: len(target)] == target:
        raise Conflict("The source is inside the Destination.")
    return Destination(target, slash, overwrite)


def local_segments(request: Request, href: str) -> tuple[str, ...] | None:
    """The path of an href (multiget, If header) relative to this site; None where it is elsewhere.

    Raises:
        BadRequest: malformed.

    Spec: RFC 4918 §8.3.
    """
    place = _place(request, href)
    return place[0] if place is not None else None


def _place(request: Request, href: str) -> tuple[tuple[str, ...], bool] | None:
    """Segments relative to the request's site and whether a slash ends them; None where it is elsewhere."""
    scheme, authority, raw = headers.parse_destination(href)
    if authority is not None and _origin(scheme, authority) != _origin(request.scheme, request.authority):
        return None
    segments, slash = headers.split_path(raw)
    base = headers.split_path(request.base.encode("ascii"))[0] if request.base else ()
    return (segments[len(base) :], slash) if segments[: len(base)] == base else None


def _origin(scheme: str | None, authority: str) -> tuple[str, str]:
    """Host and port as one comparable value, "" for the port that the scheme has anyway.

    So a proxy that speaks TLS for us may hand on either scheme. Credentials in front of the host are no part
    of it (RFC 3986 §3.2.1).
    """
    authority = authority.rpartition("@")[2]
    name, colon, port = authority.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()):
        name, port = authority.removesuffix(":"), ""
    default = {"http": "80", "https": "443"}.get(scheme or "")
    return name.lower().removesuffix("."), "" if port == default else port


# -- preferences ----------------------------------------------------------------------------------


def prefer(request: Request) -> headers.Prefer:
    """The Prefer and Brief headers (RFC 7240, RFC 8144)."""
    return headers.parse_prefer(request.headers.joined("prefer"), request.headers.get("brief"))


def applied(
    wanted: headers.Prefer, *, minimal: bool = False, noroot: bool = False
) -> list[tuple[bytes, bytes]]:
    """Response headers that say which preferences were honoured, and that others would be answered otherwise.

    Args:
        wanted: what the request prefers.
        minimal: whether the answer would honour return=minimal.
        noroot: whether it would honour depth-noroot.

    Spec: RFC 7240 §2, §3; RFC 8144 §2, §3.
    """
    names = []
    if wanted.minimal and minimal:
        names.append(b"return=minimal")
    if wanted.depth_noroot and noroot:
        names.append(b"depth-noroot")
    vary = (b"vary", b"prefer, brief")
    return [(b"preference-applied", b", ".join(names)), vary] if names else [vary]


def too_large(limit: int) -> BodyTooLarge:
    """The refusal of a body over a limit in bytes."""
    return BodyTooLarge(f"At most {limit} bytes are accepted here.")
