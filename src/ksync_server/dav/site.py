"""The sync host: one owner for each verb and report, then a short walk through plain functions."""

from __future__ import annotations

import asyncio
import datetime
import time
from dataclasses import dataclass

from ksync_server import webdav
from ksync_server.auth.gate import HomeGrant, Identity, Service
from ksync_server.dav import collections, engine, objects, places, properties
from ksync_server.dav.places import Level, Place
from ksync_server.dav.propfind import Propfind
from ksync_server.dav.reports import Reports
from ksync_server.dav.services import Services
from ksync_server.errors import (
    CALDAV,
    DAV,
    BadRequest,
    BodyTooLarge,
    Conflict,
    Forbidden,
    MethodNotAllowed,
    NotFound,
    PreconditionFailed,
    UnsupportedMedia,
)
from ksync_server.http import Request, Response, xml
from ksync_server.store.blobs import Content, Stage, StagedBlob, staged_bytes
from ksync_server.store.database import Read, Write
from ksync_server.webdav import ABSENT, Conditions, ResourceState
from ksync_server.wire import headers as grammar
from ksync_server.wire import xml as markup

OWNERS = {
    "OPTIONS": "native",
    "GET": "native",
    "HEAD": "native",
    "PUT": "native",
    "PROPFIND": "native",
    "REPORT": "native",
    "DELETE": "native",  # of objects; engine: of collections
    "PROPPATCH": "engine",  # native where nothing can be set: everything but collections
    "MKCOL": "engine",
    "MKCALENDAR": "engine",
    "MOVE": "engine",
}
"""Which half answers a verb: our own code, or Radicale. Nothing falls back to the other. Every report
(sync-collection, calendar-query, calendar-multiget, free-busy-query, addressbook-query,
addressbook-multiget) is native."""

# Only what is implemented is said. No access-control: neither ACL nor its reports are there.
_CLASSES = b"1, 3, calendar-access, addressbook, extended-mkcol"
_ALLOW = {
    Level.OBJECT: "OPTIONS, GET, HEAD, PUT, DELETE, MOVE, PROPFIND, PROPPATCH, REPORT",
    Level.COLLECTION: "OPTIONS, DELETE, PROPFIND, PROPPATCH, REPORT",
}
_ALLOW_FIXED = "OPTIONS, PROPFIND, PROPPATCH, REPORT"
_ALLOW_ABSENT = {
    Level.OBJECT: "OPTIONS, PUT",
    Level.COLLECTION: "OPTIONS, MKCOL, MKCALENDAR",
}
_WELL_KNOWN = ("caldav", "carddav")
_IN_POOL_FROM = 64 * 1024  # bytes: larger objects are not parsed on the event loop
_SAFE = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"sandbox; default-src 'none'"),
    (b"cache-control", b"private, no-cache"),
]


@dataclass(frozen=True, slots=True)
class _Found:
    """What a GET needs after its transaction."""

    stored: objects.StoredObject
    etag: str
    unchanged: bool
    content: Content | None


class Site:
    """Calendars and contacts of every account."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._settings = services.settings
        self._database = services.database
        self._propfind = Propfind(services)
        self._reports = Reports(services)
        self._engine = engine.Engine(services.settings.dav, services.database, properties.PROTECTED)
        self._purges: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Nothing to end: the threads are the database's, and a job finishes what was being deleted."""

    def public(self, request: Request) -> Response | None:
        """The well-known addresses lead to the root, whatever the method and whoever asks (RFC 6764 §5)."""
        if request.segments[:1] != (".well-known",) or request.segments[1:] not in {
            (n,) for n in _WELL_KNOWN
        }:
            return None
        return Response(301, [(b"location", request.href((), folder=True).encode())])

    def service(self, request: Request) -> Service:
        """The scope that a secret needs for this path; the root and principals take either of both."""
        head = request.segments[:1]
        for kind in places.Kind:
            if head == (kind.segment,):
                return kind.service
        return Service.SYNC

    async def handle(self, request: Request, identity: Identity) -> Response:
        """Answer one request of an identity that passed the door.

        Raises:
            ClientError: the request is refused; nothing changed.
            ClientGone: the body ended early; nothing changed.

        Spec: RFC 4791, RFC 6352, RFC 6578, RFC 4918.
        """
        place = places.parse(request.segments)
        match request.method:
            case "REPORT":
                return await self._reports.answer(request, identity, place)
            case "PROPFIND":
                return await self._propfind.answer(request, identity, place)
            case "GET" | "HEAD":
                return await self._get(request, identity, place)
            case "PUT":
                return await self._put(request, identity, place)
            case "DELETE":
                return await self._delete(request, identity, place)
            case "OPTIONS":
                return await self._options(request, identity, place)
            case "PROPPATCH":
                return await self._proppatch(request, identity, place)
            case "MKCOL" | "MKCALENDAR":
                return await self._make(request, identity, place)
            case "MOVE":
                return await self._move(request, identity, place)
            case _:
                await self._database.hot(lambda tx: self._grant(tx, request, identity, place))
                raise _not_allowed(place)

    # -- the door, and what conditions are tested against ---------------------------------------------

    def _grant(self, tx: Read, request: Request, identity: Identity, place: Place) -> HomeGrant:
        """Ask the gate, anew in every transaction."""
        return self._services.gate.authorize(tx, identity, place.target(identity), request.method)

    def _state(self, tx: Read, grant: HomeGrant, place: Place) -> ResourceState:
        """A collection or an object of the identity's own as conditions see it."""
        if place.level not in (Level.COLLECTION, Level.OBJECT):
            return ResourceState(place.level is not Level.BELOW)
        assert place.kind is not None
        collection = collections.find(tx, grant.account_id, place.kind, place.collection)
        if collection is None:
            return ABSENT
        if place.level is Level.COLLECTION:
            return ResourceState(True)
        return objects.state(tx, collection.id, objects.find(tx, collection.id, place.object))

    def _check(
        self, tx: Read, request: Request, grant: HomeGrant, given: Conditions, state: ResourceState
    ) -> None:
        """Every condition of a request that changes something; there are no locks here.

        Raises:
            PreconditionFailed: one is false.
        """
        if "if-schedule-tag-match" in request.headers:
            raise PreconditionFailed("There are no schedule tags here.")
        webdav.check(given, state, lambda href: self._tagged(tx, request, grant, href))

    def _tagged(self, tx: Read, request: Request, grant: HomeGrant, href: str) -> ResourceState:
        """The state of a resource that an If header names."""
        try:
            segments = webdav.local_segments(request, href)
            place = places.parse(segments) if segments is not None else None
        except (BadRequest, NotFound):
            return ABSENT
        if place is None or (place.owner and place.owner.upper() != grant.sync_id):
            return ABSENT
        return self._state(tx, grant, place)

    # -- OPTIONS --------------------------------------------------------------------------------------

    async def _options(self, request: Request, identity: Identity, place: Place) -> Response:
        def allow(tx: Read) -> str:
            grant = self._grant(tx, request, identity, place)
            if self._state(tx, grant, place).exists:
                return _ALLOW.get(place.level, _ALLOW_FIXED)
            return _ALLOW_ABSENT.get(place.level, "OPTIONS")

        allowed = await self._database.hot(allow)
        return Response(200, [(b"dav", _CLASSES), (b"allow", allowed.encode()), (b"content-length", b"0")])

    # -- GET, HEAD ------------------------------------------------------------------------------------

    async def _get(self, request: Request, identity: Identity, place: Place) -> Response:
        """RFC 4791 §5.3.4: the bytes that were stored."""
        given = webdav.conditions(request)
        found = await self._database.hot(lambda tx: self._find(tx, request, identity, place, given))
        headers = [
            (b"etag", grammar.quote_etag(found.etag).encode()),
            (b"last-modified", grammar.http_date(found.stored.modified_at).encode()),
            *_SAFE,
        ]
        if found.unchanged:
            return Response(304, headers)
        headers += [
            (b"content-type", found.stored.content_type.encode()),
            (b"content-length", str(found.stored.size).encode()),
        ]
        if found.content is None:  # HEAD
            return Response(200, headers)
        if found.content.content is not None:
            return Response(200, headers, found.content.content)
        body = await self._services.blobs.pooled(objects.read, self._services.blobs, found.content)
        return Response(200, headers, body)

    def _find(
        self, tx: Read, request: Request, identity: Identity, place: Place, given: Conditions
    ) -> _Found:
        grant = self._grant(tx, request, identity, place)
        if place.level is not Level.OBJECT:
            if self._state(tx, grant, place).exists:
                raise _not_allowed(place)
            raise NotFound("There is nothing at this address.")
        assert place.kind is not None
        collection = collections.get(tx, grant.account_id, place.kind, place.collection)
        stored = objects.find(tx, collection.id, place.object)
        if stored is None:
            raise NotFound("There is no such object.")
        state = objects.state(tx, collection.id, stored)
        unchanged = webdav.not_modified(given, state, lambda href: self._tagged(tx, request, grant, href))
        assert state.etag is not None
        wanted = request.method == "GET" and not unchanged
        return _Found(stored, state.etag, unchanged, objects.content(tx, stored) if wanted else None)

    # -- PUT ------------------------------------------------------------------------------------------

    async def _put(self, request: Request, identity: Identity, place: Place) -> Response:
        """Create or replace an object; every check that needs no body comes before the body.

        Spec: RFC 4791 §5.3.2, RFC 6352 §6.3.2, RFC 9110 §9.3.4.
        """
        given = webdav.conditions(request)
        zone = await self._database.hot(lambda tx: self._may_put(tx, request, identity, place, given))
        assert place.kind is not None
        kind, limits = place.kind, self._settings.dav
        try:
            content = await request.body.read(limits.max_object_bytes)
        except BodyTooLarge:
            raise objects.too_large(kind, limits.max_object_bytes) from None
        if len(content) > _IN_POOL_FROM or b"COUNT=" in content:
            prepared = await self._database.pooled(objects.prepare, kind, content, zone, limits)
        else:
            prepared = objects.prepare(kind, content, zone, limits)
        staged, stage = await self._stage(content)

        def publish(tx: Write) -> tuple[bool, str]:
            grant = self._grant(tx, request, identity, place)
            collection = self._locked(tx, grant, place)
            present = objects.find(tx, collection.id, place.object)
            self._check(tx, request, grant, given, objects.state(tx, collection.id, present))
            href = places.collection(request, kind, grant.sync_id, collection.name)
            created = objects.put(
                tx,
                collection,
                place.object,
                prepared,
                staged,
                href=href,
                limit=limits.max_objects,
                now=int(time.time()),
            )
            return created, objects.etag(tx, collection, collection.seq)

        try:
            created, etag = await self._database.writing(publish)
        except (PreconditionFailed, Conflict, Forbidden, NotFound):
            # Certainly rolled back: leave nothing to the reaper. Of other failures nobody knows.
            if stage is not None:
                await self._services.blobs.pooled(stage.abort)
            raise
        return Response(201 if created else 204, [(b"etag", grammar.quote_etag(etag).encode())])

    def _may_put(
        self, tx: Read, request: Request, identity: Identity, place: Place, given: Conditions
    ) -> datetime.tzinfo:
        """What can be decided without the body; gives the time zone of the calendar."""
        grant = self._grant(tx, request, identity, place)
        if place.level is Level.BELOW:
            raise Conflict("Objects hold no objects.")
        if place.level is not Level.OBJECT:
            raise _not_allowed(place)
        assert place.kind is not None
        collection = collections.find(tx, grant.account_id, place.kind, place.collection)
        if collection is None:
            raise Conflict("There is no such collection.")
        objects.check_name(place.object)
        if (request.headers.get("content-encoding") or "identity").strip().lower() != "identity":
            raise UnsupportedMedia("A compressed request body is not accepted.")
        if "content-range" in request.headers:
            raise BadRequest("An object is replaced as a whole.")  # RFC 9110 §14.5
        objects.check_media_type(place.kind, request.headers.get("content-type"))
        self._check(
            tx,
            request,
            grant,
            given,
            objects.state(tx, collection.id, objects.find(tx, collection.id, place.object)),
        )
        return collections.zone(collections.properties(tx, collection.id))

    def _locked(self, tx: Write, grant: HomeGrant, place: Place) -> collections.Collection:
        assert place.kind is not None
        return collections.lock(tx, grant.account_id, place.kind, place.collection)

    async def _stage(self, content: bytes) -> tuple[StagedBlob, Stage | None]:
        """Bytes that a transaction can publish; large ones are on disk and given up through their stage."""
        blobs = self._services.blobs
        if len(content) <= blobs.settings.inline_bytes:
            return staged_bytes(content), None

        def write() -> tuple[StagedBlob, Stage]:
            stage = blobs.stage(len(content))
            try:
                stage.write(content)
                return stage.finish(), stage
            except BaseException:
                stage.abort()
                raise

        return await blobs.pooled(write)

    # -- DELETE ---------------------------------------------------------------------------------------

    async def _delete(self, request: Request, identity: Identity, place: Place) -> Response:
        if place.level is Level.COLLECTION:
            return await self._delete_collection(request, identity, place)
        given = webdav.conditions(request)

        def delete(tx: Write) -> None:
            grant = self._grant(tx, request, identity, place)
            if place.level is not Level.OBJECT:
                if self._state(tx, grant, place).exists:
                    raise Forbidden("This cannot be deleted.")
                raise NotFound("There is nothing at this address.")
            collection = self._locked(tx, grant, place)
            present = objects.find(tx, collection.id, place.object)
            if present is None:
                raise NotFound("There is no such object.")
            self._check(tx, request, grant, given, objects.state(tx, collection.id, present))
            objects.remove(tx, collection, present, now=int(time.time()))

        await self._database.writing(delete)
        return Response(204)

    async def _delete_collection(self, request: Request, identity: Identity, place: Place) -> Response:
        webdav.tree_depth(request, folder=True)
        ask = await self._ask(request, identity, place)
        answer = await self._database.pooled(self._engine.run, ask)
        if answer.collection_id is not None:
            purge = asyncio.create_task(self._purge(answer.collection_id))
            self._purges.add(purge)
            purge.add_done_callback(self._purges.discard)
        return Response(answer.status)

    async def _purge(self, collection_id: int) -> None:
        """Erase what is left of a deleted collection; the client does not wait for it."""
        await self._database.pooled(collections.purge, self._database, collection_id)

    # -- the engine's verbs ---------------------------------------------------------------------------

    async def _ask(
        self,
        request: Request,
        identity: Identity,
        place: Place,
        instructions: tuple[webdav.Instruction, ...] = (),
    ) -> engine.Ask:
        """A request for the engine, once the gate let it pass."""
        given = webdav.conditions(request)
        grant = await self._database.hot(lambda tx: self._grant(tx, request, identity, place))

        def check(tx: Read) -> None:
            self._grant(tx, request, identity, place)
            self._check(tx, request, grant, given, self._state(tx, grant, place))

        return engine.Ask(request.method, grant, place, instructions, check=check)

    async def _proppatch(self, request: Request, identity: Identity, place: Place) -> Response:
        """RFC 4918 §9.2: all or nothing."""
        body = await webdav.read_xml(request, self._settings.xml)
        instructions = webdav.parse_proppatch(body)
        ask = await self._ask(request, identity, place, instructions)
        if not (await self._database.hot(lambda tx: self._state(tx, ask.grant, place))).exists:
            raise NotFound("There is nothing at this address.")
        href = request.href(_canonical(request, place, identity), folder=place.level is not Level.OBJECT)
        if place.level is not Level.COLLECTION:
            return xml(207, properties.refuse(instructions, href))
        answer = await self._database.pooled(self._engine.run, ask)
        prefer = webdav.prefer(request)
        if prefer.minimal and not answer.failed:
            return Response(204, webdav.applied(prefer, minimal=True))
        propstats = _propstats(answer, instructions)
        return xml(207, webdav.multistatus([webdav.response(href, propstats)]))

    async def _make(self, request: Request, identity: Identity, place: Place) -> Response:
        """MKCALENDAR (RFC 4791 §5.3.1) and extended MKCOL (RFC 5689 §3)."""
        calendar = request.method == "MKCALENDAR"
        root = CALDAV + "mkcalendar" if calendar else DAV + "mkcol"
        instructions = webdav.parse_mkcol(await webdav.read_xml(request, self._settings.xml), root)
        ask = await self._ask(request, identity, place, instructions)
        if place.level is not Level.COLLECTION:
            raise await self._database.hot(lambda tx: self._misplaced(tx, ask))
        engine.check_new(ask)
        answer = await self._database.pooled(self._engine.run, ask)
        if answer.failed:
            name = CALDAV + "mkcalendar-response" if calendar else DAV + "mkcol-response"
            inner = _propstats(answer, instructions)
            body = f"{markup.DECLARATION}<{_opened(name)}>{inner}</{markup.name(name)}>"
            return xml(answer.status, body)
        return Response(201, [(b"cache-control", b"no-cache")])

    def _misplaced(self, tx: Read, ask: engine.Ask) -> Exception:
        """Why no collection can be made at a place that is no child of a home."""
        if self._state(tx, ask.grant, ask.place).exists:
            return MethodNotAllowed(
                "There is something already.",
                precondition=DAV + "resource-must-be-null",
                headers=[(b"allow", _allow(ask.place))],
            )
        parent = Place(Level.COLLECTION, ask.place.kind, ask.place.owner, ask.place.collection)
        if ask.place.level is Level.OBJECT and self._state(tx, ask.grant, parent).exists:
            location = CALDAV + "calendar-collection-location-ok" if ask.method == "MKCALENDAR" else None
            return Forbidden("Collections here hold no collections.", precondition=location)
        return Conflict("There is no such collection.")

    async def _move(self, request: Request, identity: Identity, place: Place) -> Response:
        """MOVE of an object to another name or collection of its kind (RFC 4918 §9.9)."""
        ask = await self._ask(request, identity, place)
        if place.level is not Level.OBJECT:
            if (await self._database.hot(lambda tx: self._state(tx, ask.grant, place))).exists:
                raise Forbidden("This cannot be moved.")
            raise NotFound("There is nothing at this address.")
        destination = webdav.destination(request)
        target = places.parse(destination.segments)
        if target.level is not Level.OBJECT or target.kind is not place.kind:
            raise Forbidden("An object can only be moved into a collection of its kind.")
        objects.check_name(target.object)
        await self._database.hot(lambda tx: self._grant(tx, request, identity, target))
        assert target.kind is not None
        ask = engine.Ask(
            ask.method,
            ask.grant,
            ask.place,
            destination=target,
            overwrite=destination.overwrite,
            check=ask.check,
            href=places.collection(request, target.kind, ask.grant.sync_id, target.collection),
        )
        answer = await self._database.pooled(self._engine.run, ask)
        return Response(answer.status)


def _not_allowed(place: Place) -> MethodNotAllowed:
    return MethodNotAllowed("This resource does not have this method.", headers=[(b"allow", _allow(place))])


def _allow(place: Place) -> bytes:
    return _ALLOW.get(place.level, _ALLOW_FIXED).encode()


def _canonical(request: Request, place: Place, identity: Identity) -> tuple[str, ...]:
    """The segments of a request with its sync id as it is answered."""
    if not place.owner:
        return request.segments
    return (request.segments[0], identity.sync_id, *request.segments[2:])


def _opened(name: str) -> str:
    return f"{markup.name(name)}{markup.NAMESPACES}"


def _propstats(answer: engine.Answer, instructions: tuple[webdav.Instruction, ...]) -> str:
    """What became of each property, those of one status and cause together."""
    groups: dict[tuple[int, str | None], list[str]] = {}
    for name in dict.fromkeys(each.name for each in instructions):
        groups.setdefault(answer.failed.get(name, (200, None)), []).append(name)
    found = []
    for (status, condition), names in groups.items():
        error = f"<d:error>{markup.empty(condition)}</d:error>" if condition else ""
        found.append(webdav.propstat(status, "".join([markup.empty(name) for name in names]), error))
    return "".join(found)
