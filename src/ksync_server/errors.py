"""The error tree, and the one place where an error has a status and a precondition.

Raise deep, render once: code below raises these, `app.py` alone turns them into an answer.
`ClientError` carries text that the client may read. Anything that is not in this tree is a fault of
the program: the client gets 500 and an id, the log gets the traceback.
"""

from __future__ import annotations

from collections.abc import Iterable

DAV = "{DAV:}"
CALDAV = "{urn:ietf:params:xml:ns:caldav}"
CARDDAV = "{urn:ietf:params:xml:ns:carddav}"


class KsyncError(Exception):
    """Everything this program raises on purpose."""


class ConfigError(KsyncError):
    """A configuration that cannot be used; the text says where and why."""


class ClientGone(KsyncError):
    """The peer closed the connection; nothing can be answered and nothing was kept."""


class ClientError(KsyncError):
    """The request cannot be carried out, and the client can know why.

    Args:
        text: one sentence for the person at the client.
        precondition: Clark name of the failed condition, e.g. `{DAV:}valid-sync-token` (RFC 4918 §16).
        hrefs: raw hrefs named inside the precondition element, e.g. the locked root (RFC 4918 §16).
        headers: further response headers.
    """

    status = 400

    def __init__(
        self,
        text: str = "",
        *,
        precondition: str | None = None,
        hrefs: Iterable[str] = (),
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(text)
        self.text = text
        self.precondition = precondition
        self.hrefs = tuple(hrefs)
        self.headers = tuple(headers)


class BadRequest(ClientError):
    """The request is malformed (RFC 9110 §15.5.1)."""


class NotAuthenticated(ClientError):
    """No credentials, or credentials that open nothing; every cause answers alike (APP7)."""

    status = 401


class AppPasswordRequired(NotAuthenticated):
    """The right account password where only an application password is accepted (APP3)."""


class Forbidden(ClientError):
    """Known, but not allowed (RFC 9110 §15.5.4)."""

    status = 403


class NotFound(ClientError):
    """No such resource, or none that this identity may know of."""

    status = 404


class MethodNotAllowed(ClientError):
    """The resource does not have this method; `headers` carries Allow."""

    status = 405


class Conflict(ClientError):
    """The state of the resource is in the way, e.g. no parent (RFC 4918 §9.3.1)."""

    status = 409


class Gone(ClientError):
    """It existed once."""

    status = 410


class PreconditionFailed(ClientError):
    """A condition of the request is false (RFC 9110 §13)."""

    status = 412


class BodyTooLarge(ClientError):
    """More bytes than the limit; nothing is kept."""

    status = 413


class UriTooLong(ClientError):
    """A path or name longer than the limit."""

    status = 414


class UnsupportedMedia(ClientError):
    """A body of a type or encoding this method does not take."""

    status = 415


class RangeNotSatisfiable(ClientError):
    """No part of the asked range exists; `headers` carries Content-Range."""

    status = 416


class MisdirectedRequest(ClientError):
    """The Host belongs to no site of this server (HOST4)."""

    status = 421


class Unprocessable(ClientError):
    """Well formed, yet without a meaning here (RFC 4918 §11.2)."""

    status = 422


class Locked(ClientError):
    """A lock stands in the way and its token was not submitted (RFC 4918 §11.3)."""

    status = 423


class FailedDependency(ClientError):
    """Not done because something it depends on was not (RFC 4918 §11.4)."""

    status = 424


class TooManyRequests(ClientError):
    """Throttled; `headers` carries Retry-After."""

    status = 429


class HeaderTooLarge(ClientError):
    """A header section over the limit (RFC 6585 §5)."""

    status = 431


class NotImplementedHere(ClientError):
    """A method no site has (RFC 9110 §15.6.2)."""

    status = 501


class BadGateway(ClientError):
    """A Destination on another server (RFC 4918 §9.8.5)."""

    status = 502


class Unavailable(ClientError):
    """Try again: the store or a needed part does not answer; `headers` carries Retry-After."""

    status = 503


class InsufficientStorage(ClientError):
    """No room, by quota or by disk (RFC 4918 §11.5, RFC 4331 §6)."""

    status = 507


class RemoteError(KsyncError):
    """Another server failed us; see the subclasses for whether to try again."""


class Temporary(RemoteError):
    """Worth another try later."""


class Permanent(RemoteError):
    """Trying again will not help."""
