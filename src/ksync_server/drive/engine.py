"""WsgiDAV over the drive's tree: MKCOL, LOCK, UNLOCK, PROPPATCH and the dispatch of COPY, MOVE, DELETE.

One request is one or more runs. A run reads one snapshot: WsgiDAV parses, asks our resources, and what it
wants changed is recorded. One transaction then checks that what the run saw is still so, decides conditions
and locks anew, and applies the record; if something moved meanwhile the run is repeated. An error, a status
>= 400 or a refused property discards the record.

WsgiDAV's paths are here percent-encoded and its Destination encoded twice, so that `?`, `;`, `#` and `%` in
names survive its URL handling. It never sees conditions: webdav.py decided them. Its XML answers are rendered
anew from what was recorded: ElementTree chooses prefixes and knows no inherited xml:lang.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, unquote
from xml.etree.ElementTree import Element as Stub

import sqlalchemy as sa
from wsgidav.dav_error import DAVError
from wsgidav.dav_provider import DAVProvider, _DAVResource
from wsgidav.mw.base_mw import BaseMiddleware
from wsgidav.request_server import RequestServer
from wsgidav.wsgidav_app import WsgiDAVApp

from ksync_server import errors, http, webdav
from ksync_server.drive import conditions, copying, erasing, locks, tree
from ksync_server.http import Request, Response
from ksync_server.settings import Settings
from ksync_server.store import blobs
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Write
from ksync_server.wire import headers as grammar
from ksync_server.wire import xml

_ALLOW = b"OPTIONS, GET, HEAD, PUT, PROPFIND, PROPPATCH, COPY, MOVE, DELETE, LOCK, UNLOCK"  # of what exists
_ATTEMPTS = 8
_PROTECTED = "{DAV:}cannot-modify-protected-property"
_MS = "{urn:schemas-microsoft-com:}"
_OC = "{http://owncloud.org/ns}"
# Properties that set the modification time; they are live, so no value is stored.
_TIMES = frozenset({"{DAV:}getlastmodified", "{DAV:}lastmodified", f"{_MS}Win32LastModifiedTime"})
# Every other DAV: name is ours or the standard's; displayname is the name that people see (RFC 4918 §15).
_DEAD_DAV = frozenset({"{DAV:}getcontentlanguage"})
_CHECKSUMS = f"{_OC}checksums"
_PROTECTED_OC = frozenset(f"{_OC}{name}" for name in ("checksums", "fileid", "id", "permissions", "size"))
_LAST_S = 253402300799  # the last second of the year 9999, and so of every date format

Path = tuple[str, ...]  # segments as the client wrote them
OpenView = Callable[[Read], tree.View]  # asks the gate; raises where it refuses
Environ = dict[str, Any]
StartResponse = Callable[..., object]

_SIZES = sa.select(t.node_property.c.name, sa.func.length(t.node_property.c.xml)).where(
    t.node_property.c.node_id == sa.bindparam("node_id")
)
_DROP_PROPERTY = sa.delete(t.node_property).where(
    t.node_property.c.node_id == sa.bindparam("node_id"), t.node_property.c.name == sa.bindparam("name")
)
_ADD_PROPERTY = sa.insert(t.node_property).values(
    node_id=sa.bindparam("node_id"), name=sa.bindparam("name"), xml=sa.bindparam("xml")
)


class _Stale(errors.KsyncError):
    """What a run saw is not so any more; nothing was applied."""


class _MembersLocked(errors.KsyncError):
    """Members of a tree are locked and their tokens were not submitted; nothing was applied."""

    def __init__(self, hrefs: list[str]) -> None:
        super().__init__()
        self.hrefs = hrefs


# -- one request ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Call:
    """A request as every run of it sees it."""

    request: Request
    settings: Settings
    open_view: OpenView
    view: tree.View
    given: webdav.Conditions
    destination: webdav.Destination | None  # of COPY and MOVE
    body: bytes  # what WsgiDAV gets to read
    instructions: tuple[webdav.Instruction, ...]  # of PROPPATCH
    owner_xml: str  # of LOCK: the owner element, self-contained
    now: int  # Unix seconds

    @property
    def drive_id(self) -> int:
        return self.view.grant.drive_id

    @property
    def account_id(self) -> int:
        return self.view.grant.account_id

    @property
    def lock_href(self) -> locks.Href:
        """How the root of a lock is written for this client."""
        return locks.seen(self.view, self.request.href)

    @property
    def mtime_ms(self) -> int | None:
        """The modification time that the client wants for what it makes."""
        return _milliseconds(grammar.parse_oc_mtime(self.request.headers.get("x-oc-mtime")))

    def check(self, tx: Read, place: tree.Place) -> None:
        """The conditions of the request.

        Raises:
            PreconditionFailed: one is false.
        """
        state = conditions.state(tx, self.request, self.view, place, self.now)
        webdav.check(self.given, state, conditions.resolver(tx, self.request, self.view, self.now))

    def require(self, tx: Read, place: tree.Place, *, deep: bool) -> None:
        """Whether the locks on a resource (deep: and on its members) are submitted.

        Raises:
            Locked: lock-token-submitted (RFC 4918 §16).
            _MembersLocked: the resource is open, members are not (RFC 4918 §9.6.1).
        """
        self._check_locks(locks.covering(tx, self.drive_id, place.chain, self.now))
        node = place.node
        if not deep or node is None or not node.folder:
            return
        members: dict[int, tuple[locks.Lock, ...]] = {}
        for lock in locks.inside(tx, self.drive_id, node.id, self.now):
            members[lock.node_id] = (*members.get(lock.node_id, ()), lock)
        closed = []
        for node_id, held in members.items():
            try:
                self._check_locks(held)
            except errors.Locked:
                below = tree.path_below(tx, node_id, node.id)
                closed.append(self.request.href((*place.segments, *(below or ()))))
        if closed:
            raise _MembersLocked(sorted(closed))

    def _check_locks(self, held: tuple[locks.Lock, ...]) -> None:
        state = webdav.ResourceState(True, locks=locks.states(held, self.lock_href))
        webdav.check_locks(self.given, self.account_id, state)


@dataclass(slots=True)
class _Work:
    """A record being applied, inside its transaction."""

    change: tree.Change
    places: dict[Path, tree.Place]
    prepared: copying.Prepared | None
    made: dict[Path, int] = field(default_factory=dict)  # nodes that earlier steps created
    detached: int | None = None  # a tree to erase after the transaction

    def node_id(self, path: Path) -> int:
        """The node at a path, or the one that an earlier step made there."""
        node = self.places[path].node
        return self.made[path] if node is None else node.id


Step = Callable[[_Work], None]


def _trace(place: tree.Place) -> tuple[object, ...]:
    """What must still be so when the record is applied: which nodes the path goes through."""
    return (place.missing, *(node.id for node in place.chain))


class _Run:
    """One run over a snapshot: what WsgiDAV saw, what it wants, what it answers."""

    def __init__(self, call: _Call, tx: Read) -> None:
        self.call = call
        self.tx = tx
        self.places: dict[Path, tree.Place] = {}
        self.required: list[tuple[Path, bool]] = []
        self.steps: list[Step] = []
        self.copied: tuple[tree.Node, bool] | None = None  # what COPY copies; with its members?
        self.replaced = False  # COPY, MOVE: something was at the destination
        self.discovered: list[locks.Lock] = []  # what LOCK answers
        self.patch: _Patch | None = None

    def place(self, path: Path) -> tree.Place:
        """Where a path leads in this snapshot."""
        found = self.places.get(path)
        if found is None:
            found = self.places[path] = tree.resolve(self.tx, self.call.view, path)
        return found

    def require(self, place: tree.Place, *, deep: bool = False) -> None:
        """`_Call.require`, now and again when the record is applied."""
        self.call.require(self.tx, place, deep=deep)
        self.required.append((place.segments, deep))

    def apply(self, tx: Write, prepared: copying.Prepared | None) -> int | None:
        """Apply the record inside a transaction.

        Returns:
            A node that left every tree: `erasing.purge` it after the transaction.

        Raises:
            _Stale: a path leads elsewhere than the run saw; nothing was changed.
            PreconditionFailed, Locked, _MembersLocked: decided anew here.
            ClientError: what the gate or the tree refuses.
        """
        call = self.call
        change = tree.begin(tx, call.view)
        change.view = call.open_view(tx)
        places = {path: tree.resolve(tx, call.view, path) for path in self.places}
        if any(_trace(places[path]) != _trace(seen) for path, seen in self.places.items()):
            raise _Stale
        call.check(tx, places[call.request.segments])
        for path, deep in self.required:
            call.require(tx, places[path], deep=deep)
        work = _Work(change, places, prepared)
        for step in self.steps:
            step(work)
        return work.detached

    def answer(self, status: int, headers: list[tuple[str, str]]) -> Response:
        """WsgiDAV's answer, with the bodies that it leaves to us."""
        call = self.call
        if call.request.method == "PROPPATCH" and self.patch is not None:
            place = self.place(call.request.segments)
            folder = place.node is not None and place.node.folder
            return http.xml(status, self.patch.answer(call.request.href(place.segments, folder=folder)))
        response = Response(status)
        if call.request.method == "LOCK":
            active = locks.discovery_xml(self.discovered, call.lock_href, call.now)
            body = f"<d:prop{xml.NAMESPACES}><d:lockdiscovery>{active}</d:lockdiscovery></d:prop>"
            response = http.xml(status, xml.DECLARATION + body)
        for name, value in headers:
            if name.lower() == "lock-token":
                response.set(b"lock-token", value)
        if call.mtime_ms is not None and call.request.method in ("MKCOL", "COPY", "MOVE"):
            response.set(b"x-oc-mtime", "accepted")
        return response

    # -- the tree ---------------------------------------------------------------------------------

    def make(self, path: Path, *, folder: bool) -> None:
        """Create an empty folder or file."""
        call = self.call
        tree.check_create(call.view, self.place(path))

        def step(work: _Work) -> None:
            place = work.places[path]
            if folder:
                made = tree.make_folder(work.change, place, mtime_ms=call.mtime_ms)
            else:
                made = tree.make_empty_file(work.change, place)
            work.made[path] = made.id

        self.steps.append(step)

    def delete(self, path: Path) -> None:
        """Put a resource into the deleted items."""
        place = self.place(path)
        tree.check_remove(self.call.view, place)
        self.require(place, deep=True)

        def step(work: _Work) -> None:
            work.detached = tree.delete(work.change, work.places[path])

        self.steps.append(step)

    def move(self, path: Path, to: Path) -> None:
        """Move a resource."""
        tree.check_remove(self.call.view, self.place(path))
        self._check_target(to)
        self.steps.append(lambda work: tree.move(work.change, work.places[path], work.places[to]))
        self._set_asked_mtime(to)

    def copy(self, path: Path, to: Path, *, deep: bool) -> None:
        """Copy a resource; `deep` with its members."""
        node = self.place(path).node
        assert node is not None, "WsgiDAV answered 404 where nothing is"
        self._check_target(to)
        self.copied = (node, deep)

        def step(work: _Work) -> None:
            assert work.prepared is not None
            copying.copy(work.change, work.places[path], work.places[to], work.prepared)

        self.steps.append(step)
        self._set_asked_mtime(to)

    def _check_target(self, to: Path) -> None:
        place = self.place(to)
        tree.check_create(self.call.view, place)
        self.replaced = place.node is not None

    def _set_asked_mtime(self, path: Path) -> None:
        mtime_ms = self.call.mtime_ms
        if mtime_ms is None:
            return

        def step(work: _Work) -> None:
            node = tree.resolve(work.change.tx, work.change.view, path).node
            assert node is not None, "an earlier step put it there"
            tree.set_mtime(work.change, node.id, mtime_ms)

        self.steps.append(step)

    # -- locks ------------------------------------------------------------------------------------

    def lock(self, path: Path, exclusive: bool, infinite: bool, timeout_s: int) -> str:
        """Take a lock; returns its token."""
        call, place = self.call, self.place(path)
        new = locks.Lock(
            token=locks.new_token(),
            node_id=0 if place.node is None else place.node.id,
            account_id=call.account_id,
            exclusive=exclusive,
            infinite=infinite,
            owner_xml=call.owner_xml,
            timeout_s=timeout_s,
            expires_at=call.now + timeout_s,
            root=call.view.lock_root(path),
        )
        self._check_conflicts(self.tx, place, new)

        def step(work: _Work) -> None:
            self._check_conflicts(work.change.tx, work.places[path], new)
            kept = replace(new, node_id=work.node_id(path))
            locks.create(work.change.tx, call.drive_id, kept, call.settings.drive, call.now)

        self.steps.append(step)
        self.discovered = [*locks.covering(self.tx, call.drive_id, place.chain, call.now), new]
        if place.missing:
            self.discovered = [lock for lock in self.discovered if lock is new or lock.infinite]
        return new.token

    def _check_conflicts(self, tx: Read, place: tree.Place, new: locks.Lock) -> None:
        call = self.call
        found = locks.conflicting(
            tx, call.drive_id, place, call.now, exclusive=new.exclusive, infinite=new.infinite
        )
        if found:
            hrefs = dict.fromkeys(call.lock_href(lock.root) for lock in found)
            raise errors.Locked("Another lock is in the way.", precondition=locks.NO_CONFLICT, hrefs=hrefs)

    def held(self, path: Path, token: str) -> locks.Lock | None:
        """The lock with this token, if it covers the resource at a path.

        One above the only folder that a client sees is none that it can refresh or release.
        """
        found = locks.covering(self.tx, self.call.drive_id, self.place(path).chain, self.call.now)
        lock = next((lock for lock in found if lock.token == token), None)
        folder = self.call.view.grant.folder
        if lock is not None and folder is not None and not tree.is_inside(self.tx, lock.node_id, folder.id):
            return None
        return lock

    def refresh(self, path: Path, token: str, timeout_s: int) -> None:
        """Let the lock live on."""
        now = self.call.now
        self.steps.append(lambda work: locks.refresh(work.change.tx, token, timeout_s, now))
        found = locks.covering(self.tx, self.call.drive_id, self.place(path).chain, now)
        self.discovered = [
            replace(lock, timeout_s=timeout_s, expires_at=now + timeout_s) if lock.token == token else lock
            for lock in found
        ]

    def release(self, token: str) -> None:
        """Give a lock up."""
        self.steps.append(lambda work: locks.release(work.change.tx, token))


# -- properties -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Update:
    """One property that PROPPATCH sets or removes, and what becomes of it."""

    name: str  # Clark
    value: xml.Element | None  # None: remove
    status: int = 200
    precondition: str | None = None


class _Patch:
    """The updates of a PROPPATCH in document order, as WsgiDAV goes through them one by one."""

    def __init__(self, run: _Run, path: Path) -> None:
        self.updates = [_Update(i.name, i.element if i.set else None) for i in run.call.instructions]
        self._run = run
        self._path = path
        self._tried: list[Step] = []
        self._applied = 0
        node = run.place(path).node
        assert node is not None, "WsgiDAV answered 404 where nothing is"
        self._node = node
        self._sizes: dict[str, int] = dict(run.tx.fast(_SIZES, {"node_id": node.id}))

    def attempt(self, name: str) -> None:
        """Check the next update.

        Raises:
            DAVError: it is refused; its propstat says why, the others become 424 (RFC 4918 §9.2).
        """
        update = self.updates[len(self._tried)]
        assert update.name == name, "WsgiDAV and we read the same document"
        self._tried.append(self._step(update))
        if update.status != 200:
            raise DAVError(update.status)

    def apply(self) -> None:
        """Record the next update; WsgiDAV begins with it when all were accepted."""
        self._run.steps.append(self._tried[self._applied])
        self._applied += 1

    def _step(self, update: _Update) -> Step:
        """What to do for an update; sets its status where it is refused."""
        name, path = update.name, self._path
        if name in _TIMES and update.value is not None:
            mtime_ms = _time_ms(update.value.text)
            if mtime_ms is None:
                update.status = 409
            return lambda work: tree.set_mtime(work.change, work.node_id(path), mtime_ms or 0)
        if name == _CHECKSUMS and update.value is not None:
            return self._check_content(update, update.value)
        if name in _TIMES or name in _PROTECTED_OC or (name.startswith("{DAV:}") and name not in _DEAD_DAV):
            update.status, update.precondition = 403, _PROTECTED
            return lambda work: None
        if update.value is None:
            self._sizes.pop(name, None)
            return lambda work: _drop_property(work, path, name)
        source = xml.serialise(update.value)
        self._sizes[name] = len(source)
        limits = self._run.call.settings.drive
        if (
            len(source.encode()) > limits.max_property_bytes
            or len(self._sizes) > limits.max_properties
            or sum(self._sizes.values()) > limits.max_dead_bytes
        ):
            update.status = 507
        return lambda work: _set_property(work, path, name, source)

    def _check_content(self, update: _Update, value: xml.Element) -> Step:
        """rclone sends a checksum along with every time it sets: the right one changes nothing."""
        node = self._node
        given = {word.lower() for element in value.walk() for word in element.text.split()}
        if node.blob_id is None:
            update.status = 409
        else:
            content = blobs.content(self._run.tx, node.blob_id)
            if not given or not given <= {f"sha1:{content.sha1.hex()}", f"md5:{content.md5.hex()}"}:
                update.status = 409

        def step(work: _Work) -> None:
            now = work.places[self._path].node
            if now is None or now.blob_id != node.blob_id:
                raise _Stale

        return step

    def answer(self, href: str) -> str:
        """The multistatus: one propstat for each status (RFC 4918 §9.2.1)."""
        if any(update.status != 200 for update in self.updates):
            for update in self.updates:
                update.status = 424 if update.status == 200 else update.status
        groups: dict[tuple[int, str | None], dict[str, None]] = {}
        for update in self.updates:
            groups.setdefault((update.status, update.precondition), {})[update.name] = None
        propstats = [
            webdav.propstat(
                status,
                "".join(xml.empty(name) for name in names),
                f"<d:error>{xml.empty(precondition)}</d:error>" if precondition else "",
            )
            for (status, precondition), names in groups.items()
        ]
        return webdav.multistatus([webdav.response(href, "".join(propstats))])


def _set_property(work: _Work, path: Path, name: str, source: str) -> None:
    _drop_property(work, path, name)
    work.change.tx.fast(_ADD_PROPERTY, {"node_id": work.node_id(path), "name": name, "xml": source})


def _drop_property(work: _Work, path: Path, name: str) -> None:
    work.change.tx.fast(_DROP_PROPERTY, {"node_id": work.node_id(path), "name": name})


def _time_ms(text: str) -> int | None:
    """A time as clients write it: Unix seconds (rclone) or an HTTP date (Windows)."""
    seconds = grammar.parse_oc_mtime(text)
    return _milliseconds(grammar.parse_http_date(text) if seconds is None else seconds)


def _milliseconds(seconds: float | None) -> int | None:
    """Unix seconds as they are stored; None for a time that no date format can say."""
    return round(seconds * 1000) if seconds is not None and 0 <= seconds <= _LAST_S else None


# -- WsgiDAV --------------------------------------------------------------------------------------


def _encoded(path: Path) -> str:
    """A path as WsgiDAV sees it: nothing in it means anything to URL functions."""
    return "/" + "/".join(quote(segment, safe="") for segment in path)


def _decoded(path: str) -> Path:
    return tuple(unquote(segment) for segment in path.split("/") if segment)


class _Resource(_DAVResource):  # type: ignore[misc]
    """What WsgiDAV may ask of a file or folder for the verbs it owns; native code answers all else."""

    def __init__(self, run: _Run, path: Path, folder: bool, environ: Environ) -> None:
        super().__init__(_encoded(path), folder, environ)
        self._run = run
        self._segments = path

    def get_content_length(self) -> int | None:
        raise NotImplementedError("GET and PROPFIND are native")

    def get_ref_url(self) -> str:
        return str(self.path)

    def get_href(self) -> str:
        return self._run.call.request.href(self._segments, folder=self.is_collection)

    def prevent_locking(self) -> bool:
        return not locks.lockable(self._run.place(self._segments))

    def create_collection(self, name: str) -> None:
        self._run.make((*self._segments, unquote(name)), folder=True)

    def create_empty_resource(self, name: str) -> _Resource:
        """LOCK of an unmapped URL. WsgiDAV does not ask for the folder's lock token here; we do."""
        path = (*self._segments, unquote(name))
        self._run.require(self._run.place(self._segments))
        self._run.make(path, folder=False)
        return _Resource(self._run, path, False, self.environ)

    def handle_delete(self) -> bool:
        self._run.delete(self._segments)
        return True

    def handle_move(self, dest_path: str) -> bool:
        """One step for source and target: WsgiDAV would delete the target first and could lose both."""
        self._run.move(self._segments, _decoded(dest_path))
        return True

    def handle_copy(self, dest_path: str, *, depth_infinity: bool) -> bool:
        """Depth 0 copies the folder alone; WsgiDAV would copy its members too."""
        self._run.copy(self._segments, _decoded(dest_path), deep=depth_infinity)
        return True

    def get_property_value(self, name: str) -> object:
        """Only LOCK asks; what it answers is rendered by `_Run.answer`."""
        return Stub(name)

    def set_property_value(self, name: str, value: object, *, dry_run: bool = False) -> None:
        run = self._run
        if run.patch is None:
            run.patch = _Patch(run, self._segments)
        if dry_run:
            run.patch.attempt(name)
        else:
            run.patch.apply()


class _LockManager:
    """WsgiDAV's lock manager over the rows of a run; nothing stays in memory (RFC 4918 §6)."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    def write_transaction(self, **_: object) -> contextlib.AbstractContextManager[None]:
        """The publishing transaction checks again, in every process; a mark in memory adds nothing."""
        return contextlib.nullcontext()

    def acquire(
        self,
        *,
        url: str,
        lock_scope: str,
        lock_depth: str,
        timeout: int,
        **_: object,
    ) -> dict[str, str]:
        exclusive, infinite = lock_scope == "exclusive", lock_depth == "infinity"
        return {"token": self._run.lock(_decoded(url), exclusive, infinite, timeout)}

    def is_url_locked_by_token(self, url: str, lock_token: str) -> bool:
        return self._run.held(_decoded(url), lock_token) is not None

    def is_token_locked_by_user(self, token: str, principal: str) -> bool:
        held = self._run.held(self._run.call.request.segments, token)
        return held is not None and str(held.account_id) == principal

    def refresh(self, token: str, *, timeout: int) -> dict[str, str]:
        """A lock is refreshed by who took it; WsgiDAV lets everybody."""
        path = self._run.call.request.segments
        held = self._run.held(path, token)
        if held is None or held.account_id != self._run.call.account_id:
            raise errors.Forbidden("The lock was taken by somebody else.")
        self._run.refresh(path, token, timeout)
        return {"root": _encoded(path)}

    def release(self, token: str) -> None:
        self._run.release(token)


class _Provider(DAVProvider):  # type: ignore[misc]
    """The drive as one run sees it. One for each run, so that no request can see another's."""

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self._run = run
        self.lock_manager = _LockManager(run)
        self.set_share_path("/")

    def get_resource_inst(self, path: str | None, environ: Environ) -> _Resource | None:
        if path is None:
            return None  # what WsgiDAV takes for the folder above the root
        segments = _decoded(path)
        node = self._run.place(segments).node
        return None if node is None else _Resource(self._run, segments, node.folder, environ)

    def ref_url_to_path(self, ref_url: str) -> str:
        return ref_url

    def resolve_provider(self, path: str) -> tuple[str, _Provider]:
        """A Destination is always on this drive: webdav.py has refused every other."""
        return "/", self


class _Server(RequestServer):  # type: ignore[misc]
    """WsgiDAV's verbs; each override names what it mends."""

    def _evaluate_if_headers(self, res: object, environ: Environ) -> None:
        """Conditions are webdav.py's: WsgiDAV ignores `If-Match: *` where nothing is, and tests an If list
        against resources that it does not name."""

    def _check_write_permission(self, res: _Resource | None, depth: str, environ: Environ) -> None:
        """Locks are decided by webdav.py and locks.py: WsgiDAV refuses the holder of one of several shared
        locks, and locked members whose tokens were submitted."""
        if res is not None:
            res._run.require(res._run.place(res._segments), deep=depth == "infinity")

    def _send_response(
        self,
        environ: Environ,
        start_response: StartResponse,
        root_res: _Resource,
        success_code: int,
        error_list: list[tuple[str, DAVError]],
    ) -> list[bytes]:
        """201 where something new came to be: WsgiDAV says 204 for every COPY and MOVE that a provider does
        itself, and hides the errors it raised."""
        for _, error in error_list:
            raise error.src_exception or error
        copying = environ["REQUEST_METHOD"] in ("COPY", "MOVE")
        new = copying and not root_res._run.replaced
        start_response("201 Created" if new else "204 No Content", [("Content-Length", "0")])
        return [b""]


class _Bind(BaseMiddleware):  # type: ignore[misc]
    """The whole middleware stack: gives a request the provider of its run."""

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        provider = _Provider(environ["ksync.run"])
        environ["wsgidav.provider"] = environ["wsgidav.app"] = provider
        server = _Server(provider)
        yield from server(environ, start_response)


class _Nowhere(DAVProvider):  # type: ignore[misc]
    """WsgiDAV wants a provider when it is built; `_Bind` replaces it."""

    def get_resource_inst(self, path: str, environ: Environ) -> None:
        return None


def _application() -> WsgiDAVApp:
    return WsgiDAVApp(
        {
            "provider_mapping": {"/": _Nowhere()},
            "middleware_stack": [_Bind],
            "lock_storage": False,
            "property_manager": False,
            "http_authenticator": {"accept_basic": False, "accept_digest": False},
            "logging": {"enable": False},
            "verbose": 0,
        }
    )


# -- the engine -----------------------------------------------------------------------------------

_ERRORS: dict[int, type[errors.ClientError]] = {
    kind.status: kind
    for kind in (
        errors.BadRequest,
        errors.Forbidden,
        errors.NotFound,
        errors.MethodNotAllowed,
        errors.Conflict,
        errors.PreconditionFailed,
        errors.UnsupportedMedia,
        errors.Locked,
        errors.NotImplementedHere,
        errors.BadGateway,
    )
}


def _client_error(error: DAVError) -> Exception:
    """WsgiDAV's error as ours; its 500 is a fault of the program."""
    kind = _ERRORS.get(error.value)
    if kind is None:
        return RuntimeError(f"WsgiDAV: {error.value} {error.context_info}")
    text = str(error.context_info or "")
    allow = [(b"allow", _ALLOW)] if error.value == 405 else []
    condition = error.err_condition.condition_code if error.err_condition else None
    return kind("" if text.startswith("/") else text, precondition=condition, headers=allow)


class Engine:
    """Answers the methods that WsgiDAV owns, for every drive of this process."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._application = _application()
        # Copies and purges of large trees take long: not in the pool that answers requests.
        self._trees = ThreadPoolExecutor(2, thread_name_prefix="trees")

    def close(self) -> None:
        """Wait for running copies and purges; what is cut off, `erasing.expire_trash` finishes."""
        self._trees.shutdown(wait=True, cancel_futures=True)

    async def handle(self, request: Request, open_view: OpenView) -> Response:
        """Carry out a request whose verb is the engine's.

        Args:
            open_view: asked before the body is read and again in the transaction that changes something.

        Raises:
            ClientError: refused; nothing was changed.
            Unavailable: others kept changing the same paths; nothing was changed.
            ClientGone: the body was cut off; nothing was changed.

        Cost: one read and one write transaction, 0.5 ms of WsgiDAV; COPY of a large tree more, in the
        background of others.
        """
        call = await self._call(request, open_view)
        for _ in range(_ATTEMPTS):
            try:
                run, answer = await self._database.pooled(self._attempt, call)
                if run.steps:
                    await self._publish(run)
            except (_Stale, copying.SourceChanged):
                continue
            except _MembersLocked as error:
                return http.xml(207, webdav.multistatus(webdav.failed(href, 423) for href in error.hrefs))
            return answer
        raise errors.Unavailable("Others are changing it; try again.", headers=[(b"retry-after", b"1")])

    async def _call(self, request: Request, open_view: OpenView) -> _Call:
        """Read and check what does not depend on a snapshot; the door and conditions before the body."""
        view = await self._database.hot(open_view)
        destination = webdav.destination(request) if request.method in ("COPY", "MOVE") else None
        given = webdav.conditions(request)
        now = int(time.time())
        call = _Call(request, self._settings, open_view, view, given, destination, b"", (), "", now)
        if not request.has_body:
            return call
        await self._database.hot(
            lambda tx: call.check(tx, tree.resolve(tx, view, request.segments)),
        )
        if request.method not in ("LOCK", "PROPPATCH"):
            return replace(call, body=await request.body.read(self._settings.xml.max_bytes))
        document = await webdav.read_xml(request, self._settings.xml)
        if document is None:
            return call
        if request.method == "LOCK":
            return self._lock_call(call, document)
        found = webdav.parse_proppatch(document)
        updates = [(f"d:{'set' if one.set else 'remove'}", xml.empty(one.name)) for one in found]
        inner = "".join(f"<{how}><d:prop>{name}</d:prop></{how}>" for how, name in updates)
        body = f"<d:propertyupdate{xml.NAMESPACES}>{inner}</d:propertyupdate>"
        return replace(call, body=body.encode(), instructions=found)

    def _lock_call(self, call: _Call, document: xml.Element) -> _Call:
        """LOCK with what WsgiDAV knows; other elements are ignored (RFC 4918 §17)."""
        known = [child for child in document.elements() if child.tag in ("{DAV:}lockscope", "{DAV:}locktype")]
        owner = document.find("{DAV:}owner")
        owner_xml = "" if owner is None else xml.serialise(owner)
        most = self._settings.drive.max_lock_owner_bytes
        if len(owner_xml.encode()) > most:
            raise errors.BodyTooLarge(f"The owner of a lock may have {most} bytes.")
        body = xml.serialise(replace(document, children=tuple(known))).encode()
        return replace(call, body=body, owner_xml=owner_xml)

    def _attempt(self, call: _Call) -> tuple[_Run, Response]:
        """One run. Blocking.

        Raises:
            ClientError, _MembersLocked: refused.
        """
        with self._database.read() as tx:
            run = _Run(call, tx)
            place = run.place(call.request.segments)
            call.check(tx, place)
            started: list[tuple[str, list[tuple[str, str]]]] = []

            def start_response(status: str, headers: list[tuple[str, str]], _: object = None) -> None:
                started.append((status, headers))

            try:
                for _ in self._application(self._environ(run, place), start_response):
                    pass
            except DAVError as error:
                if error.src_exception is not None:
                    raise error.src_exception from None
                raise _client_error(error) from None
            status, headers = started[-1]
            code = int(status[:3])
            if code >= 400:
                raise _client_error(DAVError(code))
            return run, run.answer(code, headers)

    def _environ(self, run: _Run, place: tree.Place) -> Environ:
        """The request for WsgiDAV: canonical, and nothing that the client could smuggle in."""
        call, request = run.call, run.call.request
        environ: Environ = {
            "REQUEST_METHOD": request.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": _encoded(request.segments),
            "QUERY_STRING": "",
            "SERVER_NAME": "drive",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_HOST": "drive",
            "CONTENT_LENGTH": str(len(call.body)),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(call.body),
            "wsgidav.auth.user_name": str(call.account_id),
            "wsgidav.conditions.if": {},
            "wsgidav.ifLockTokenList": sorted(call.given.tokens),
            "ksync.run": run,
        }
        if call.destination is not None:
            environ["HTTP_DESTINATION"] = quote(_encoded(call.destination.segments))
            environ["HTTP_OVERWRITE"] = "T" if call.destination.overwrite else "F"
        if request.method in ("COPY", "MOVE", "DELETE"):
            folder = place.node is not None and place.node.folder
            depth = webdav.tree_depth(request, folder=folder)
            environ["HTTP_DEPTH"] = "infinity" if depth == webdav.INFINITY else "0"
        elif request.method == "LOCK":
            depths = {0: "0", webdav.INFINITY: "infinity"}
            environ["HTTP_DEPTH"] = depths.get(webdav.depth(request), "1")
            longest = self._settings.drive.lock_seconds
            asked = grammar.parse_timeout(request.headers.get("timeout"), longest)
            environ["HTTP_TIMEOUT"] = f"Second-{asked}"
        elif request.method == "UNLOCK" and (token := request.headers.get("lock-token")):
            environ["HTTP_LOCK_TOKEN"] = grammar.parse_lock_token(token)
        return environ

    async def _publish(self, run: _Run) -> None:
        """Apply what a run recorded, all of it or nothing.

        A caller that is cancelled meanwhile leaves a hidden copy to `erasing.expire_trash`: the write may
        still be on its way to make it visible.
        """
        database, view = self._database, run.call.view
        prepared: copying.Prepared | None = None
        if run.copied is not None:
            node, deep = run.copied
            prepare = functools.partial(copying.prepare_copy, database, view, node, deep=deep)
            prepared = await asyncio.get_running_loop().run_in_executor(self._trees, prepare)
        try:
            detached = await database.writing(lambda tx: run.apply(tx, prepared))
        except errors.KsyncError:
            if prepared is not None and prepared.root_id is not None:
                self._erase(view, prepared.root_id)
            raise
        if detached is not None:
            self._erase(view, detached)

    def _erase(self, view: tree.View, node_id: int) -> None:
        self._trees.submit(erasing.purge, self._database, view.grant.drive_id, node_id)
