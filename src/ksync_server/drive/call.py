"""What the runs of one request share: the request as each of them sees it, and the record that is applied.

Conditions and locks are decided by `Call`, in each run and again in the transaction that applies its record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ksync_server import errors, webdav
from ksync_server.drive import conditions, copying, locks, tree
from ksync_server.http import Request
from ksync_server.settings import Settings
from ksync_server.store.database import Read
from ksync_server.wire import headers as grammar

_LAST_S = 253402300799  # the last second of the year 9999, and so of every date format

Path = tuple[str, ...]  # segments as the client wrote them
OpenView = Callable[[Read], tree.View]  # asks the gate; raises where it refuses


class Stale(errors.KsyncError):
    """What a run saw is not so any more; nothing was applied."""


class MembersLocked(errors.KsyncError):
    """Members of a tree are locked and their tokens were not submitted; nothing was applied."""

    def __init__(self, hrefs: list[str]) -> None:
        super().__init__()
        self.hrefs = hrefs


@dataclass(frozen=True, slots=True)
class Call:
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
        return milliseconds(grammar.parse_oc_mtime(self.request.headers.get("x-oc-mtime")))

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
            MembersLocked: the resource is open, members are not (RFC 4918 §9.6.1).
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
            raise MembersLocked(sorted(closed))

    def _check_locks(self, held: tuple[locks.Lock, ...]) -> None:
        state = webdav.ResourceState(True, locks=locks.states(held, self.lock_href))
        webdav.check_locks(self.given, self.account_id, state)


@dataclass(slots=True)
class Work:
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


Step = Callable[[Work], None]


def milliseconds(seconds: float | None) -> int | None:
    """Unix seconds as they are stored; None for a time that no date format can say."""
    return round(seconds * 1000) if seconds is not None and 0 <= seconds <= _LAST_S else None
