"""What webdav.py's rules are tested against: the state of a place of a drive, with its locks."""

from __future__ import annotations

from ksync_server import webdav
from ksync_server.drive import locks, tree
from ksync_server.errors import ClientError
from ksync_server.http import Request
from ksync_server.store import changes
from ksync_server.store.database import Read


def etag(tx: Read, view: tree.View, node: tree.Node) -> str:
    """The bare strong ETag of a file or folder."""
    return changes.etag(tx.generation, view.grant.collection_id, node.seq)


def state(
    tx: Read, request: Request, view: tree.View, place: tree.Place, now: int, *, with_locks: bool = True
) -> webdav.ResourceState:
    """A place as conditions see it.

    Locks of a place that does not exist are those that protect the folder it would go into.

    Args:
        now: Unix seconds; expired locks do not count.
        with_locks: False where neither a lock nor an If header matters.

    Cost: nothing without locks, else see `locks.covering`.
    """
    node = place.node
    held: tuple[webdav.LockState, ...] = ()
    if with_locks and (node is not None or place.parent is not None):
        found = locks.covering(tx, view.grant.drive_id, place.chain, now)
        held = locks.states(found, locks.seen(view, request.href))
    if node is None:
        return webdav.ResourceState(False, locks=held)
    return webdav.ResourceState(True, etag(tx, view, node), node.mtime_ms // 1000, held)


def resolver(tx: Read, request: Request, view: tree.View, now: int) -> webdav.Resolve:
    """The state of another resource that an If header names; one elsewhere does not exist.

    Spec: RFC 4918 §10.4.4.
    """

    def resolve(href: str) -> webdav.ResourceState:
        try:
            segments = webdav.local_segments(request, href)
            if segments is None:
                return webdav.ABSENT
            return state(tx, request, view, tree.resolve(tx, view, segments), now)
        except ClientError:
            return webdav.ABSENT

    return resolve
