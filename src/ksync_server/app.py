"""The edge of every request: id, peer, Host -> site, log-in, and the one place where errors become answers.

`build` wires every service from the settings; the command line uses it too.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from ksync_server import settings as configuration
from ksync_server import webdav
from ksync_server.auth import keys as keyring
from ksync_server.auth import offers as tiers
from ksync_server.auth.gate import Credentials, Gate, Identity, Service
from ksync_server.auth.memory import Memory
from ksync_server.dav import site as dav_site
from ksync_server.disk import Disk
from ksync_server.drive import site as drive_site
from ksync_server.errors import (
    BadRequest,
    ClientError,
    ClientGone,
    Forbidden,
    MisdirectedRequest,
    NotAuthenticated,
    NotImplementedHere,
)
from ksync_server.http import Body, Headers, Peer, Receive, Request, Response, Send, content_length, text, xml
from ksync_server.log import AccessLog, stamp
from ksync_server.metrics import Metrics
from ksync_server.networks import Networks, is_loopback
from ksync_server.networks import parse as parse_address
from ksync_server.store.blobs import Blobs, open_extents
from ksync_server.store.database import Database, begin_request
from ksync_server.wire import headers as grammar

log = logging.getLogger(__name__)

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_DRIVE_ID = re.compile(r"[1-9][0-9]{0,17}")
# What only a proxy or a gateway may say, and what a gateway's variables could be forged with.
_HOP_FIELDS = frozenset(
    b"forwarded remote-user script-name x-forwarded-for x-forwarded-host x-forwarded-port x-forwarded-prefix "
    b"x-forwarded-proto x-forwarded-server x-forwarded-user x-original-url x-real-ip x-remote-user "
    b"x-rewrite-url x-script-name".split()
)
_FORWARDING = ("x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded", "via", "x-real-ip")
_COMPRESSED_TYPES = (
    b"application/xml",
    b"text/xml",
    b"text/plain",
    b"text/calendar",
    b"text/vcard",
    b"text/html",
)
_COMPRESS_FROM = 1024  # smaller answers fit in one packet anyhow
_IN_THREAD_FROM = 128 * 1024  # compressing more than this at once would hold up other requests
_SMALL_REST = 64 * 1024  # an unread rest of this size is read, so that the connection can go on
_HTTPS_PORT = 443
_GONE = 499  # in the log only: the client left before the answer


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a request can need, made once per process."""

    settings: configuration.Settings
    database: Database
    blobs: Blobs
    keys: keyring.Keys
    offers: tiers.Offers
    gate: Gate

    def close(self) -> None:
        """Finish queued writes and end every thread."""
        self.gate.close()
        self.blobs.close()
        self.database.close()


def build(settings: configuration.Settings, memory: Memory | None = None) -> Services:
    """Wire the services of one process; call it after a fork, never before.

    Args:
        settings: the configuration.
        memory: of good account passwords, shared by all web processes; None = one of its own.

    Raises:
        ConfigError: a database, key file, offer table or S3 credentials that cannot be used.
    """
    keys = keyring.load(settings.auth.key_file)
    offers = tiers.load(settings.offers_file)
    extents = open_extents(settings)
    database = Database(settings.database, threads=settings.server.threads)
    return Services(
        settings,
        database,
        Blobs(settings.blobs, database, extents),
        keys,
        offers,
        Gate(settings, database, keys, offers, memory),
    )


class Site(Protocol):
    """A product: `dav.site.Site` or `drive.site.Site`."""

    def public(self, request: Request) -> Response | None:
        """An answer that needs no log-in, or None."""

    def service(self, request: Request) -> Service:
        """What the client's secret is used for."""

    async def handle(self, request: Request, identity: Identity) -> Response:
        """The answer to a request of a known account."""

    def close(self) -> None:
        """End its threads."""


def application(services: Services) -> App:
    """The ASGI application over services, with its sites."""
    return App(
        services,
        dav_site.Site(services),
        drive_site.Site(services),
        metrics=Metrics(),
        access=AccessLog(services.settings.log),
        disk=Disk(services.settings),
    )


# -- peers and hosts ------------------------------------------------------------------------------


class Proxies:
    """Which neighbours may say who the client is (HOST3)."""

    def __init__(self, trusted: tuple[str, ...]) -> None:
        self._networks = Networks("server.trusted_proxies", trusted)

    def trusts(self, address: str) -> bool:
        """Whether the address is one of ours."""
        return address in self._networks

    def client(self, address: str, forwarded: str | None) -> str:
        """The last address that none of our proxies has: what stands left of it anybody may have written."""
        for hop in reversed((forwarded or "").split(",")):
            if not self.trusts(address):
                break
            parsed = parse_address(hop.strip())
            if parsed is None:
                break
            address = str(parsed)
        return address


class Router:
    """Host header and path -> site (HOST1, HOST2, HOST4)."""

    def __init__(self, hosts: configuration.Hosts) -> None:
        self._sync = {name.lower() for name in hosts.sync}
        self._paths = {name.lower() for name in hosts.paths}
        self._suffix = "." + hosts.drive_suffix.lower().lstrip(".")

    def route(self, request: Request) -> tuple[str, Request]:
        """`sync` or `drive` with the request relative to that site; the drive's number is in the context.

        Raises:
            BadRequest: no host name.
            MisdirectedRequest: a host of nobody here.
        """
        match = _AUTHORITY.fullmatch(request.authority)
        if match is None:
            raise BadRequest("The Host is malformed.")
        name = match[1].lower().removesuffix(".")
        if name in self._sync:
            return "sync", request
        if name.endswith(self._suffix) and _DRIVE_ID.fullmatch(number := name.removesuffix(self._suffix)):
            request.context["drive_id"] = int(number)
            return "drive", request
        if name not in self._paths:
            raise MisdirectedRequest("This server does not serve that host.")
        segments = request.segments
        if len(segments) > 1 and segments[0] == "drives" and _DRIVE_ID.fullmatch(segments[1]):
            request.context["drive_id"] = int(segments[1])
            return "drive", request.under(f"/drives/{segments[1]}", 2)
        return "sync", request


# -- one request ----------------------------------------------------------------------------------


class _Exchange:
    """What is known of one request while it is answered."""

    __slots__ = (
        "account",
        "began",
        "body",
        "headers",
        "id",
        "method",
        "peer",
        "receive",
        "send",
        "sent",
        "site",
        "status",
    )

    def __init__(self, scope: Any, receive: Receive, send: Send) -> None:
        self.id = secrets.token_hex(8)
        self.began = time.perf_counter()
        self.method: str = scope["method"]
        self.headers = Headers(scope["headers"])
        self.receive = receive
        self.send = send
        self.peer: Peer | None = None
        self.body: Body | None = None
        self.site = "none"
        self.account: str | None = None
        self.status = 0
        self.sent = 0  # body bytes


class App:
    """The ASGI application of a web process."""

    def __init__(
        self,
        services: Services,
        sync: Site,
        drive: Site,
        *,
        metrics: Metrics,
        access: AccessLog,
        disk: Disk,
    ) -> None:
        self._services = services
        self._server = services.settings.server
        self._sites: dict[str, Site] = {"sync": sync, "drive": drive}
        self._router = Router(services.settings.hosts)
        self._proxies = Proxies(self._server.trusted_proxies)
        self.metrics = metrics
        self.disk = disk
        self._access = access
        self._unnamed_proxy = False
        self._on_loop = services.database.dialect == "sqlite"
        realm = services.settings.auth.realm.replace("\\", "").replace('"', "")
        self._challenge = f'Basic realm="{realm}", charset="UTF-8"'

    def close(self) -> None:
        """End what the sites run."""
        for site in self._sites.values():
            site.close()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request; whatever happens, exactly one line is logged."""
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, receive, send)
        begin_request()
        try:
            response = await self._answer(exchange, scope)
            await self._deliver(exchange, response)
        except ClientGone:
            exchange.status = exchange.status or _GONE
        except Exception:
            # The answer has begun: ending the connection is the only honest word left.
            log.exception("answer broken off", extra={"id": exchange.id, "site": exchange.site})
        finally:
            self._record(exchange)

    def _record(self, exchange: _Exchange) -> None:
        seconds = time.perf_counter() - exchange.began
        self.metrics.answered(exchange.site, exchange.method, exchange.status, seconds)
        if self._access.enabled:
            fields = {
                "at": stamp(time.time()),
                "level": "info",
                "event": "request",
                "id": exchange.id,
                "method": exchange.method,
                "site": exchange.site,
                "status": exchange.status,
                "bytes": exchange.sent,
                "ms": round(seconds * 1000, 1),
                "account": exchange.account,
                "address": exchange.peer.address if exchange.peer else None,
            }
            self._access.write(fields)

    # -- from request to response -----------------------------------------------------------------

    async def _answer(self, exchange: _Exchange, scope: Any) -> Response:
        try:
            return await self._handle(exchange, scope)
        except ClientGone:
            raise
        except ClientError as error:
            return self._refusal(exchange, error)
        except Exception:
            return self._fault(exchange)

    async def _handle(self, exchange: _Exchange, scope: Any) -> Response:
        request = self._request(exchange, scope)
        if scope["raw_path"] == b"*":
            return Response(200)
        if request.method in ("TRACE", "CONNECT"):
            raise NotImplementedHere("This method is not available.")
        exchange.site, request = self._router.route(request)
        if not request.peer.secure and self._server.redirect_https_port:
            return self._to_https(request, scope)
        site = self._sites[exchange.site]
        public = site.public(request)
        if public is not None:
            return public
        peer = request.peer
        if not (
            peer.secure or self._server.allow_plain_http or self._is_local(peer, scope, exchange.headers)
        ):
            # No challenge: it would make the client send its password in the clear.
            raise Forbidden("Passwords are accepted over HTTPS only: use https:// in the address.")
        identity = await self._identify(request, site.service(request))
        exchange.account = identity.sync_id
        if self.disk.check(request.method, request.body.length, has_body=request.has_body):
            request.body.guard = self.disk.check_running
        return await site.handle(request, identity)

    def _to_https(self, request: Request, scope: Any) -> Response:
        """Where the same thing is encrypted; for any method, with the method kept (RFC 9110 §15.4.9)."""
        name = request.authority
        if match := _AUTHORITY.fullmatch(name):
            name = match[1]
        port = self._server.redirect_https_port
        place = f"https://{name}" + ("" if port == _HTTPS_PORT else f":{port}")
        place += scope["raw_path"].decode("latin-1") + (f"?{request.query}" if request.query else "")
        status = 301 if request.method in ("GET", "HEAD") else 308
        return Response(status, [(b"location", place.encode("latin-1"))])

    def _request(self, exchange: _Exchange, scope: Any) -> Request:
        """The request as sites see it.

        Raises:
            BadRequest: path, query or length is malformed.
        """
        headers = exchange.headers
        exchange.peer, scheme, authority = self._seen_from_outside(scope, headers)
        exchange.body = Body(exchange.receive, content_length(headers))
        raw_path: bytes = scope["raw_path"]
        segments, trailing_slash = ((), False) if raw_path == b"*" else grammar.split_path(raw_path)
        return Request(
            method=exchange.method,
            segments=segments,
            trailing_slash=trailing_slash,
            query=scope["query_string"].decode("latin-1"),
            headers=Headers(
                [pair for pair in headers.raw if pair[0] not in _HOP_FIELDS and b"_" not in pair[0]]
            ),
            peer=exchange.peer,
            body=exchange.body,
            scheme=scheme,
            authority=authority,
            id=exchange.id,
        )

    def _seen_from_outside(self, scope: Any, headers: Headers) -> tuple[Peer, str, str]:
        """Peer, scheme and authority as the client knows them: through trusted proxies, no others."""
        client = scope.get("client")
        address = str(client[0]) if client else ""
        scheme: str = scope["scheme"]
        authority = headers.get("host") or ""
        if self._proxies.trusts(address):
            # Each proxy appends: the last word is that of the neighbour that we trust.
            scheme = _last(headers.joined("x-forwarded-proto")).lower() or scheme
            authority = _last(headers.joined("x-forwarded-host")) or authority
            address = self._proxies.client(address, headers.joined("x-forwarded-for"))
        elif not self._unnamed_proxy and "x-forwarded-for" in headers and is_loopback(address):
            self._unnamed_proxy = True  # said once: every client would look like this machine
            log.warning("a proxy that server.trusted_proxies does not name", extra={"address": address})
        if address.startswith("::ffff:"):
            address = address.removeprefix("::ffff:")
        secure = scheme == "https"
        return Peer(address, secure, headers.get("user-agent") or ""), scheme if secure else "http", authority

    def _is_local(self, peer: Peer, scope: Any, headers: Headers) -> bool:
        """Whether plain HTTP stays on this machine.

        A proxy's own address is not its client's: one here that forwards and does not say for whom may serve
        the world.
        """
        neighbour = str(scope["client"][0]) if scope.get("client") else ""
        if self._proxies.trusts(neighbour) and any(name in headers for name in _FORWARDING):
            last = _last(headers.joined("x-forwarded-for"))
            if parse_address(last) is None:
                return False
        return is_loopback(peer.address)

    async def _identify(self, request: Request, service: Service) -> Identity:
        gate = self._services.gate
        # Joined: of two fields a proxy could have looked at the other one, so they are none.
        pair = grammar.parse_basic(request.headers.joined("authorization"))
        credentials = Credentials(*pair) if pair else None

        def recognise() -> Identity | None:
            return gate.recognise(credentials, request.peer, service=service)

        on_loop = self._on_loop or credentials is None
        identity = recognise() if on_loop else await self._services.database.pooled(recognise)
        if identity is None:
            # argon2 has threads of its own: a flood of log-ins holds up nobody who is known.
            identity = await asyncio.wrap_future(gate.queued(credentials, request.peer, service=service))
        return identity

    # -- errors -----------------------------------------------------------------------------------

    def _refusal(self, exchange: _Exchange, error: ClientError) -> Response:
        if isinstance(error, NotAuthenticated):
            # One answer for every cause, whatever text the error carries (APP7).
            response = text(401, "Log in with your name and an application password or your password.\n")
            response.set(b"www-authenticate", self._challenge)
            return response
        if error.status >= 500:
            extra = {"id": exchange.id, "site": exchange.site, "status": error.status}
            log.warning("request failed", extra=extra, exc_info=error.__cause__)
        if error.precondition is not None:
            response = xml(error.status, webdav.error_body(error.precondition, error.hrefs, error.text))
        else:
            response = text(error.status, error.text + "\n" if error.text else "")
        response.headers += error.headers
        return response

    def _fault(self, exchange: _Exchange) -> Response:
        log.exception("fault", extra={"id": exchange.id, "site": exchange.site, "method": exchange.method})
        return text(500, f"Something went wrong here. Please name this id to the operator: {exchange.id}\n")

    # -- from response to bytes -------------------------------------------------------------------

    async def _deliver(self, exchange: _Exchange, response: Response) -> None:
        """Send an answer, then take care of what the client still sends."""
        stream = None if isinstance(response.body, bytes) else response.body
        try:
            first = [b""]  # a list, so that whoever sends the piece can let go of it
            if stream is not None and exchange.method != "HEAD":
                # What fails before the first piece can still be answered in full.
                try:
                    first = [await anext(stream, b"")]
                except ClientGone:
                    raise
                except ClientError as error:
                    response = self._refusal(exchange, error)
                except Exception:
                    response = self._fault(exchange)
            await self._send(exchange, response, first)
        finally:
            if stream is not None and hasattr(stream, "aclose"):
                await stream.aclose()

    async def _send(self, exchange: _Exchange, response: Response, first: list[bytes]) -> None:
        coder = await self._compress(exchange, response)
        rest = self._unread(exchange, response)
        self._finish_headers(exchange, response, rest)
        start = {"type": "http.response.start", "status": response.status, "headers": response.headers}
        await self._put(exchange, start)
        exchange.status = response.status
        body = response.body
        if exchange.method == "HEAD" or response.status in (204, 304):
            body = b""
        if isinstance(body, bytes):
            await self._put_body(exchange, body, more=rest is not None)
        else:
            await self._stream(exchange, first, body, coder)
        if rest is not None:
            await self._drain(rest)
            if not rest.complete and not response.close:
                return  # the connection ends: it cannot be told where the next request begins
        if rest is not None or not isinstance(body, bytes):
            await self._put_body(exchange, b"", more=False)

    async def _stream(
        self, exchange: _Exchange, first: list[bytes], body: AsyncIterator[bytes], coder: _Coder | None
    ) -> None:
        piece: bytes | None = first.pop()
        while piece is not None:
            if coder is not None and piece:
                piece = coder.piece(piece)
            if piece:
                await self._put_body(exchange, piece, more=True)
            piece = await anext(body, None)
        if coder is not None:
            await self._put_body(exchange, coder.end(), more=True)

    async def _put(self, exchange: _Exchange, message: dict[str, Any]) -> None:
        try:
            await exchange.send(message)
        except OSError:
            raise ClientGone from None

    async def _put_body(self, exchange: _Exchange, piece: bytes, *, more: bool) -> None:
        await self._put(exchange, {"type": "http.response.body", "body": piece, "more_body": more})
        exchange.sent += len(piece)

    def _finish_headers(self, exchange: _Exchange, response: Response, rest: Body | None) -> None:
        headers = response.headers
        headers.append((b"x-request-id", exchange.id.encode("ascii")))
        names = {name for name, _ in headers}
        if b"x-content-type-options" not in names:
            headers.append((b"x-content-type-options", b"nosniff"))
        if exchange.account is not None and b"cache-control" not in names:
            # Some proxies keep answers without asking whose they are, 404 by default (RFC 9110 §15.1).
            headers.append((b"cache-control", b"private, no-cache"))
        bodiless = response.status in (204, 304)
        if isinstance(response.body, bytes) and not bodiless and b"content-length" not in names:
            headers.append((b"content-length", str(len(response.body)).encode("ascii")))
        if rest is not None and not (rest.length is not None and rest.length - rest.received <= _SMALL_REST):
            response.close = True
        if response.close:
            headers.append((b"connection", b"close"))

    @staticmethod
    def _unread(exchange: _Exchange, response: Response) -> Body | None:
        """The request's body where the client may still be sending it."""
        body = exchange.body
        if body is None or body.complete or body.received == body.length:
            return None
        if not body.started and (exchange.headers.get("expect") or "").lower() == "100-continue":
            # It waits for our word before it sends: nothing to read now, and no telling what would follow.
            response.close = True
            return None
        return body

    async def _drain(self, body: Body) -> None:
        """Read on for a while: a client that is cut off while it sends never sees why (413 above all)."""
        body.guard = None  # what is thrown away needs no room
        left = self._server.drain_bytes
        try:
            async with asyncio.timeout(self._server.drain_s):
                while left >= 0 and (piece := await body.chunk()) is not None:
                    left -= len(piece)
        except (TimeoutError, ClientGone):
            pass

    async def _compress(self, exchange: _Exchange, response: Response) -> _Coder | None:
        """Compress a whole answer, or give the coder for a streamed one."""
        kind = b""
        for name, value in response.headers:
            if name in (b"content-encoding", b"etag", b"content-range"):
                return None
            if name == b"content-type":
                kind = value.partition(b";")[0]
        if kind not in _COMPRESSED_TYPES:
            return None
        body = response.body
        if isinstance(body, bytes) and len(body) < _COMPRESS_FROM:
            return None
        response.headers.append((b"vary", b"accept-encoding"))
        if not grammar.accepts_gzip(exchange.headers.joined("accept-encoding")):
            return None
        response.set(b"content-encoding", b"gzip")
        if not isinstance(body, bytes):
            return _Coder()
        if len(body) < _IN_THREAD_FROM:
            response.body = _gzip(body)
        else:
            response.body = await asyncio.get_running_loop().run_in_executor(None, _gzip, body)
        return None


def _last(value: str | None) -> str:
    return (value or "").rpartition(",")[2].strip()


def _gzip(body: bytes) -> bytes:
    return zlib.compress(body, 1, 31)


class _Coder:
    """gzip of a stream, flushed after each piece so that the client can work while we do."""

    __slots__ = ("_stream",)

    def __init__(self) -> None:
        self._stream = zlib.compressobj(1, zlib.DEFLATED, 31)

    def piece(self, piece: bytes) -> bytes:
        return self._stream.compress(piece) + self._stream.flush(zlib.Z_SYNC_FLUSH)

    def end(self) -> bytes:
        return self._stream.flush()
