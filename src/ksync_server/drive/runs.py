"""A run of a request over a snapshot: what is seen there, and the record of what WsgiDAV wants changed."""

from __future__ import annotations

from dataclasses import replace

from ksync_server import errors, http
from ksync_server.drive import copying, locks, tree
from ksync_server.drive.call import Call, Path, Stale, Step, Work
from ksync_server.drive.proppatch import Patch
from ksync_server.http import Response
from ksync_server.store.database import Read, Write
from ksync_server.wire import xml


def _trace(place: tree.Place) -> tuple[object, ...]:
    """What must still be so when the record is applied: which nodes the path goes through."""
    return (place.missing, *(node.id for node in place.chain))


class Run:
    """One run over a snapshot: what WsgiDAV saw, what it wants, what it answers."""

    def __init__(self, call: Call, tx: Read) -> None:
        self.call = call
        self.tx = tx
        self.places: dict[Path, tree.Place] = {}
        self.required: list[tuple[Path, bool]] = []
        self.steps: list[Step] = []
        self.copied: tuple[tree.Node, bool] | None = None  # what COPY copies; with its members?
        self.replaced = False  # COPY, MOVE: something was at the destination
        self.discovered: list[locks.Lock] = []  # what LOCK answers
        self.patch: Patch | None = None

    def place(self, path: Path) -> tree.Place:
        """Where a path leads in this snapshot."""
        found = self.places.get(path)
        if found is None:
            found = self.places[path] = tree.resolve(self.tx, self.call.view, path)
        return found

    def require(self, place: tree.Place, *, deep: bool = False) -> None:
        """`Call.require`, now and again when the record is applied."""
        self.call.require(self.tx, place, deep=deep)
        self.required.append((place.segments, deep))

    def apply(self, tx: Write, prepared: copying.Prepared | None) -> int | None:
        """Apply the record inside a transaction.

        Returns:
            A node that left every tree: `erasing.purge` it after the transaction.

        Raises:
            Stale: a path leads elsewhere than the run saw; nothing was changed.
            PreconditionFailed, Locked, MembersLocked: decided anew here.
            ClientError: what the gate or the tree refuses.
        """
        call = self.call
        change = tree.begin(tx, call.view)
        change.view = call.open_view(tx)
        places = {path: tree.resolve(tx, call.view, path) for path in self.places}
        if any(_trace(places[path]) != _trace(seen) for path, seen in self.places.items()):
            raise Stale
        call.check(tx, places[call.request.segments])
        for path, deep in self.required:
            call.require(tx, places[path], deep=deep)
        work = Work(change, places, prepared)
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

        def step(work: Work) -> None:
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

        def step(work: Work) -> None:
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

        def step(work: Work) -> None:
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

        def step(work: Work) -> None:
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

        def step(work: Work) -> None:
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

    # -- properties -------------------------------------------------------------------------------

    def attempt_update(self, path: Path, name: str) -> int:
        """Check the next update of PROPPATCH; returns its status."""
        if self.patch is None:
            self.patch = Patch(self.call, self.tx, self.place(path))
        return self.patch.attempt(name)

    def apply_update(self) -> None:
        """Record the next update of PROPPATCH; all were accepted."""
        assert self.patch is not None, "WsgiDAV applies what it attempted"
        self.steps.append(self.patch.apply())
