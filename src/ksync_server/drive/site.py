"""The drive site: one owner for each verb, then a short walk through plain functions."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from ksync_server import settings as configuration
from ksync_server import webdav
from ksync_server.auth.gate import DriveGrant, DriveTarget, Identity, Service
from ksync_server.drive import conditions, listing, transfer, tree
from ksync_server.drive.engine import Engine
from ksync_server.errors import (
    Conflict,
    Forbidden,
    InsufficientStorage,
    MethodNotAllowed,
    NotFound,
    RangeNotSatisfiable,
)
from ksync_server.http import Request, Response
from ksync_server.store import blobs
from ksync_server.store.blobs import Blobs, Content, StagedBlob
from ksync_server.store.database import Database, Read, Write
from ksync_server.wire import headers as grammar

OWNERS = {
    "OPTIONS": "native",
    "GET": "native",
    "HEAD": "native",
    "PUT": "native",
    "PROPFIND": "native",
    "REPORT": "native",  # none applies to files: refused
    "MKCOL": "engine",
    "COPY": "engine",
    "MOVE": "engine",
    "DELETE": "engine",
    "LOCK": "engine",
    "UNLOCK": "engine",
    "PROPPATCH": "engine",
}
"""Which half answers a verb: our own code, or WsgiDAV. Nothing falls back to the other."""

ALLOW = ", ".join(verb for verb in OWNERS if verb != "REPORT").encode()
_CLASSES = b"1, 2, 3"

# Programs that people browse with (DRV2). ownCloud's and Nextcloud's sync clients (mirall) say
# Mozilla too.
_BROWSING = re.compile(
    r"Microsoft-WebDAV-MiniRedir|WebDAVFS/|WebDAVLib|gvfs|Cyberduck/|Mountain Duck/|RaiDrive|davfs2"
    r"|Mozilla/(?!.*mirall)"
)
_LAST_MS = 253_402_300_799_000  # the end of the year 9999, the last that HTTP can say
_NOSNIFF = (b"x-content-type-options", b"nosniff")
_SANDBOX = (
    b"content-security-policy",
    b"sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:",
)
_CACHE = (b"cache-control", b"private, no-cache")


class Gate(Protocol):
    """What the site asks of auth.gate.Gate."""

    def authorize(self, tx: Read, identity: Identity, target: DriveTarget, verb: str, /) -> DriveGrant:
        """Whether the identity may use the verb on the drive."""


class Services(Protocol):
    """What the site needs of app.Services."""

    @property
    def settings(self) -> configuration.Settings: ...
    @property
    def database(self) -> Database: ...
    @property
    def blobs(self) -> Blobs: ...
    @property
    def gate(self) -> Gate: ...


@dataclass(frozen=True, slots=True)
class _Found:
    """What a GET needs after its transaction."""

    view: tree.View
    place: tree.Place
    node: tree.Node
    etag: str
    unchanged: bool
    content: Content | None  # None: a folder, or unchanged
    state: webdav.ResourceState


class Site:
    """All drives of this installation; the request's context says which one (`drive_id`)."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._database = services.database
        self._gate = services.gate
        self._transfers = transfer.Transfers(services.settings, services.database, services.blobs)
        self._engine = Engine(services.settings, services.database)

    def close(self) -> None:
        """End the threads of this process."""
        self._engine.close()
        self._transfers.close()

    def public(self, request: Request) -> Response | None:
        """Nothing of a drive is shown without a log-in."""
        return None

    def service(self, request: Request) -> Service:
        """Every secret used here needs the scope `drive`."""
        return Service.DRIVE

    async def handle(self, request: Request, identity: Identity) -> Response:
        """Answer one request of an identity that passed the door.

        Raises:
            ClientError: the request is refused; nothing changed.
            ClientGone: the body ended early; nothing changed.

        Spec: RFC 4918, RFC 9110, RFC 4331.
        """
        owner = OWNERS.get(request.method)
        if owner is None:
            raise MethodNotAllowed("Files do not have this method.", headers=[(b"allow", ALLOW)])
        if owner == "engine":
            return await self._engine.handle(request, lambda tx: self._view(tx, request, identity))
        match request.method:
            case "GET" | "HEAD":
                return await self._get(request, identity)
            case "PUT":
                return await self._put(request, identity)
            case "PROPFIND":
                return await self._propfind(request, identity)
            case "REPORT":
                return await self._report(request, identity)
            case _:
                return await self._options(request, identity)

    # -- the door and the view --------------------------------------------------------------------

    def _view(self, tx: Read, request: Request, identity: Identity) -> tree.View:
        """Ask the gate, anew in every transaction, and choose what the program is shown."""
        drive_id: int = request.context["drive_id"]
        grant = self._gate.authorize(tx, identity, DriveTarget(drive_id), request.method)
        folders = grant.folder is None and shows_folders(self._settings.drive, request)
        return tree.View(grant, self._settings.drive, folders)

    # -- OPTIONS, REPORT --------------------------------------------------------------------------

    async def _options(self, request: Request, identity: Identity) -> Response:
        await self._database.hot(lambda tx: self._view(tx, request, identity))
        return Response(
            200,
            [
                (b"dav", _CLASSES),
                (b"allow", ALLOW),
                (b"ms-author-via", b"DAV"),
                (b"accept-ranges", b"bytes"),
                (b"content-length", b"0"),
            ],
        )

    async def _report(self, request: Request, identity: Identity) -> Response:
        await self._database.hot(lambda tx: self._view(tx, request, identity))
        raise Forbidden("Files have no reports.", precondition="{DAV:}supported-report")

    # -- PROPFIND ---------------------------------------------------------------------------------

    async def _propfind(self, request: Request, identity: Identity) -> Response:
        given = webdav.conditions(request) if "if" in request.headers else None
        now = int(time.time())
        depth = webdav.depth(request)
        # The door first: a body is not even parsed for who may not be here.
        await self._database.hot(lambda tx: self._view(tx, request, identity))
        find = webdav.parse_propfind(await webdav.read_xml(request, self._settings.xml))

        def open_place(tx: Read) -> tuple[tree.View, tree.Place]:
            view = self._view(tx, request, identity)
            place = tree.resolve(tx, view, request.segments)
            if place.missing:
                raise NotFound("There is nothing at this address.")
            if given is not None:
                state = conditions.state(tx, request, view, place, now)
                webdav.check_if(given, state, conditions.resolver(tx, request, view, now))
            return view, place

        return await listing.propfind(request, self._database, self._settings, find, depth, now, open_place)

    # -- GET, HEAD --------------------------------------------------------------------------------

    async def _get(self, request: Request, identity: Identity) -> Response:
        found = await self._database.hot(lambda tx: self._find(tx, request, identity))
        node = found.node
        if node.folder:
            return self._folder_page(request, found)
        head = [
            (b"etag", grammar.quote_etag(found.etag).encode()),
            (b"oc-etag", grammar.quote_etag(found.etag).encode()),
            (b"oc-fileid", str(node.id).encode()),
            (b"last-modified", grammar.http_date(node.mtime_ms // 1000).encode()),
            (b"accept-ranges", b"bytes"),
            _CACHE,
        ]
        if found.unchanged:
            return Response(304, head)
        assert found.content is not None
        kind = transfer.content_type(node.name, node.content_type)
        head += [_NOSNIFF, _SANDBOX]
        if transfer.is_active(kind):
            head.append((b"content-disposition", b"attachment"))
        return self._content(request, found, head, kind)

    def _find(self, tx: Read, request: Request, identity: Identity) -> _Found:
        view = self._view(tx, request, identity)
        place = tree.resolve(tx, view, request.segments)
        node = place.node
        if node is None:
            raise NotFound("There is nothing at this address.")
        given, now = webdav.conditions(request), int(time.time())
        state = conditions.state(tx, request, view, place, now, with_locks=bool(given.lists))
        resolve = conditions.resolver(tx, request, view, now)
        assert state.etag is not None
        if node.folder:
            webdav.check_if(given, state, resolve)
            return _Found(view, place, node, state.etag, False, None, state)
        unchanged = webdav.not_modified(given, state, resolve)
        assert node.blob_id is not None, "every file has a blob"
        content = None if unchanged else blobs.content(tx, node.blob_id)
        return _Found(view, place, node, state.etag, unchanged, content, state)

    def _folder_page(self, request: Request, found: _Found) -> Response:
        answer = Response(200, list(listing.PAGE_HEADERS))
        if request.method == "GET":
            answer.body = listing.page(request, self._database, found.view, found.place)
        return answer

    def _content(
        self, request: Request, found: _Found, head: list[tuple[bytes, bytes]], kind: str
    ) -> Response:
        """The whole file or the ranges asked for (RFC 9110 §14)."""
        content = found.content
        assert content is not None
        ranges = self._ranges(request, found, content.size)
        if ranges is None:
            head += [(b"content-type", kind.encode("latin-1")), _length(content.size)]
            return self._streamed(request, found, 200, head, [(b"", 0, content.size)])
        if len(ranges) == 1:
            ((start, end),) = ranges
            head += [
                (b"content-type", kind.encode("latin-1")),
                (b"content-range", f"bytes {start}-{end - 1}/{content.size}".encode()),
                _length(end - start),
            ]
            return self._streamed(request, found, 206, head, [(b"", start, end)])
        boundary = secrets.token_hex(16)
        parts = [
            (_part(boundary, kind, start, end, content.size, first=not number), start, end)
            for number, (start, end) in enumerate(ranges)
        ]
        parts.append((f"\r\n--{boundary}--\r\n".encode(), 0, 0))
        size = sum(len(before) + end - start for before, start, end in parts)
        head += [(b"content-type", f"multipart/byteranges; boundary={boundary}".encode()), _length(size)]
        return self._streamed(request, found, 206, head, parts)

    def _ranges(self, request: Request, found: _Found, size: int) -> tuple[tuple[int, int], ...] | None:
        value = request.headers.joined("range")
        if value is None or request.method != "GET" or not webdav.if_range(request, found.state):
            return None
        try:
            return grammar.parse_range(value, size)
        except RangeNotSatisfiable:
            if size == 0:
                return None  # an empty file has no ranges at all: players ask for bytes=0-
            raise

    def _streamed(
        self,
        request: Request,
        found: _Found,
        status: int,
        head: list[tuple[bytes, bytes]],
        parts: list[tuple[bytes, int, int]],
    ) -> Response:
        """An answer of parts: some bytes, then a range of the content."""
        content = found.content
        assert content is not None
        answer = Response(status, head)
        if request.method == "HEAD":
            return answer
        if content.content is not None:
            answer.body = b"".join([before + content.content[start:end] for before, start, end in parts])
            return answer
        account_id = found.view.grant.account_id
        self._transfers.check(account_id)
        answer.body = self._pieces(account_id, content, parts)
        return answer

    async def _pieces(
        self, account_id: int, content: Content, parts: list[tuple[bytes, int, int]]
    ) -> AsyncIterator[bytes]:
        with self._transfers.counted(account_id):
            for before, start, end in parts:
                if before:
                    yield before
                if end > start:
                    async for piece in self._transfers.pieces(content, start, end):
                        yield piece

    # -- PUT --------------------------------------------------------------------------------------

    async def _put(self, request: Request, identity: Identity) -> Response:
        """Check everything, stage the body, publish it in a transaction that checks again."""
        given = webdav.conditions(request)

        def allowed(tx: Read, view: tree.View, now: int) -> tree.Place:
            place = tree.resolve(tx, view, request.segments)
            _check_target(view, place, request)
            state = conditions.state(tx, request, view, place, now)
            webdav.check(given, state, conditions.resolver(tx, request, view, now))
            webdav.check_locks(given, view.grant.account_id, state)
            return place

        def before(tx: Read) -> tuple[tree.View, int, dict[str, bytes]]:
            view = self._view(tx, request, identity)
            place = allowed(tx, view, int(time.time()))
            transfer.check_upload(request.headers)
            limit, announced = transfer.limit_of(
                request,
                max_file_bytes=view.grant.max_file_bytes,
                max_chunked_bytes=view.grant.max_chunked_bytes,
            )
            _check_quota(tx, view, place, announced or 0)
            return view, limit, transfer.declared_digests(request.headers)

        view, limit, digests = await self._database.hot(before)
        mtime_ms = asked_mtime_ms(request)

        def publish(tx: Write, staged: StagedBlob) -> tuple[tree.Node, bool, str]:
            change = tree.begin(tx, view)
            change.view = self._view(tx, request, identity)
            place = allowed(tx, change.view, change.now)
            node = tree.put_file(
                change,
                place,
                staged,
                content_type=transfer.given_type(request.headers),
                mtime_ms=mtime_ms,
            )
            return node, bool(place.missing), conditions.etag(tx, view, node)

        node, created, etag = await self._transfers.upload(
            request.body,
            account_id=view.grant.account_id,
            limit=limit,
            digests=digests,
            publish=publish,
        )
        head = [
            (b"etag", grammar.quote_etag(etag).encode()),
            (b"oc-etag", grammar.quote_etag(etag).encode()),
            (b"oc-fileid", str(node.id).encode()),
            (b"last-modified", grammar.http_date(node.mtime_ms // 1000).encode()),
        ]
        if mtime_ms is not None:
            head.append((b"x-oc-mtime", b"accepted"))
        return Response(201 if created else 204, head)


def shows_folders(settings: configuration.Drive, request: Request) -> bool:
    """Whether the bare URL lists the two folders for this program (DRV2)."""
    if settings.root_view == "auto":
        return _BROWSING.search(request.peer.user_agent) is not None
    return settings.root_view == "folders"


def asked_mtime_ms(request: Request) -> int | None:
    """The modification time that X-OC-Mtime asks for, in milliseconds; None where absent or no sane time."""
    asked = grammar.parse_oc_mtime(request.headers.get("x-oc-mtime"))
    if asked is None or not 0 <= asked * 1000 <= _LAST_MS:
        return None
    return round(asked * 1000)


def _check_target(view: tree.View, place: tree.Place, request: Request) -> None:
    """Whether a file may be put at a place.

    Raises:
        MethodNotAllowed: a folder is there (RFC 4918 §9.7.2).
        Forbidden, Conflict, UriTooLong, InsufficientStorage: see `tree.check_create`.
    """
    if place.node is not None and place.node.folder:
        raise MethodNotAllowed("A folder is there.", headers=[(b"allow", ALLOW)])
    tree.check_create(view, place)
    if request.trailing_slash:
        raise Conflict("The address of a file does not end in a slash.")


def _check_quota(tx: Read, view: tree.View, place: tree.Place, announced: int) -> None:
    """Refuse what cannot fit before a byte of it is read; the publishing transaction decides."""
    available = tree.available_bytes(tx, view)
    replaced = place.node.size if place.node else 0
    if available is not None and announced > available + replaced:
        raise InsufficientStorage(
            f"The drive has {available} bytes left.", precondition="{DAV:}quota-not-exceeded"
        )


def _length(size: int) -> tuple[bytes, bytes]:
    return (b"content-length", str(size).encode())


def _part(boundary: str, kind: str, start: int, end: int, size: int, *, first: bool) -> bytes:
    """The head of one part of several ranges (RFC 9110 §14.6)."""
    lead = "" if first else "\r\n"
    return (
        f"{lead}--{boundary}\r\ncontent-type: {kind}\r\ncontent-range: bytes {start}-{end - 1}/{size}\r\n\r\n"
    ).encode("latin-1")
