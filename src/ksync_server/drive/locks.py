"""Locks: rows that belong to nodes, so every process, both halves and both URLs of a place see the same ones.

A lock covers its node and, with infinite depth, all below it. It is submitted by naming its token, by the
account that took it; a token of somebody else opens nothing (RFC 4918 §6.4). Shared locks on one resource
are opened by any one of them.

Changes of locks belong into a transaction that `tree.begin` opened: it makes them wait for uploads that are
being published, and the other way round.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server import settings as configuration
from ksync_server.drive import tree
from ksync_server.errors import InsufficientStorage
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write
from ksync_server.webdav import LockState
from ksync_server.wire import xml

_SKEW_S = 3600  # what clocks of several nodes may differ by

NO_CONFLICT = "{DAV:}no-conflicting-lock"

Href = Callable[[tuple[str, ...]], str]  # a decoded path of this site, quoted as the client writes it


@dataclass(frozen=True, slots=True)
class Lock:
    """A write lock, as its row is."""

    token: str  # a URI
    node_id: int  # the root of the lock
    account_id: int  # who took it; nobody else can use it
    exclusive: bool
    infinite: bool  # Depth: infinity
    owner_xml: str  # the client's whole owner element, self-contained, or ""
    timeout_s: int
    expires_at: int  # Unix seconds; from then on it does not exist
    root: tuple[str, ...]  # decoded path that the client locked

    def covers(self, node_id: int) -> bool:
        """Whether it holds a node that it is rooted at or whose ancestor it is rooted at."""
        return self.infinite or self.node_id == node_id


# -- statements -----------------------------------------------------------------------------------

_L = t.lock.c
_P = sa.bindparam
_COLUMNS = (
    _L.token,
    _L.node_id,
    _L.account_id,
    _L.exclusive,
    _L.infinite,
    _L.owner_xml,
    _L.timeout_s,
    _L.expires_at,
    _L.root,
)
_ANY = sa.select(_L.token).where(_L.drive_id == _P("drive_id"), _L.expires_at > _P("now")).limit(1)
_OF_NODE = (
    sa.select(*_COLUMNS).where(_L.node_id == _P("node_id"), _L.expires_at > _P("now")).order_by(_L.token)
)
_OF_DRIVE = (
    sa.select(*_COLUMNS).where(_L.drive_id == _P("drive_id"), _L.expires_at > _P("now")).order_by(_L.token)
)
_COUNT = (
    sa.select(sa.func.count())
    .select_from(t.lock)
    .where(_L.account_id == _P("account_id"), _L.expires_at > _P("now"))
)
_INSERT = sa.insert(t.lock).values(
    token=_P("token"),
    drive_id=_P("drive_id"),
    node_id=_P("node_id"),
    account_id=_P("account_id"),
    exclusive=_P("exclusive", type_=sa.Boolean),
    infinite=_P("infinite", type_=sa.Boolean),
    owner_xml=_P("owner_xml"),
    timeout_s=_P("timeout_s"),
    expires_at=_P("expires_at"),
    root=_P("root"),
)
_REFRESH = (
    sa.update(t.lock)
    .where(_L.token == _P("token_"))
    .values(timeout_s=_P("timeout"), expires_at=_P("expires"))
)
_RELEASE = sa.delete(t.lock).where(_L.token == _P("token"))
_EXPIRE = sa.delete(t.lock).where(_L.drive_id == _P("drive_id"), _L.expires_at <= _P("now"))
_SHORTEN = (
    sa.update(t.lock)
    .where(_L.expires_at > _P("now", type_=sa.BigInteger) + _L.timeout_s + _SKEW_S)
    .values(expires_at=_P("now", type_=sa.BigInteger) + _L.timeout_s)
)


def _lock(row: tuple[object, ...]) -> Lock:
    token, node_id, account_id, exclusive, infinite, owner_xml, timeout_s, expires_at, root = row
    return Lock(
        str(token),
        int(str(node_id)),
        int(str(account_id)),
        bool(exclusive),
        bool(infinite),
        str(owner_xml),
        int(str(timeout_s)),
        int(str(expires_at)),
        tuple(str(root).split("/")) if root else (),
    )


# -- reading --------------------------------------------------------------------------------------


def on(tx: Read, node_id: int, now: int) -> tuple[Lock, ...]:
    """Living locks rooted at a node."""
    return tuple(_lock(row) for row in tx.fast(_OF_NODE, {"node_id": node_id, "now": now}))


def covering(tx: Read, drive_id: int, chain: Sequence[tree.Node], now: int) -> tuple[Lock, ...]:
    """Living locks that hold the last node of a chain: its own, and the infinite ones above it.

    For a resource that does not exist yet pass the chain of its parent: a lock on a folder, of whatever
    depth, protects its list of members (RFC 4918 §7.4).

    Cost: one row for a drive without locks, else one index range for each node of the chain.
    """
    if not chain or not tx.one(_ANY, {"drive_id": drive_id, "now": now}):
        return ()
    last = chain[-1].id
    found = [lock for node in chain for lock in on(tx, node.id, now)]
    return tuple(lock for lock in found if lock.covers(last))


def inside(tx: Read, drive_id: int, folder_id: int, now: int) -> tuple[Lock, ...]:
    """Living locks rooted below a folder, its own not included.

    Cost: one index range over the drive's locks, one walk up for each of them.
    """
    return tuple(
        lock
        for lock in _of_drive(tx, drive_id, now)
        if lock.node_id != folder_id and tree.is_inside(tx, lock.node_id, folder_id)
    )


def by_node(tx: Read, drive_id: int, now: int) -> dict[int, tuple[Lock, ...]]:
    """All living locks of a drive by the node they are rooted at, for listings.

    Cost: one index range; a drive has few locks.
    """
    found: dict[int, tuple[Lock, ...]] = {}
    for lock in _of_drive(tx, drive_id, now):
        found[lock.node_id] = (*found.get(lock.node_id, ()), lock)
    return found


def _of_drive(tx: Read, drive_id: int, now: int) -> list[Lock]:
    return [_lock(row) for row in tx.fast(_OF_DRIVE, {"drive_id": drive_id, "now": now})]


# -- rules ----------------------------------------------------------------------------------------


def seen(view: tree.View, href: Href) -> Href:
    """How the root of a lock is written for a view, which may see less of the drive than who took it."""
    return lambda root: href(view.seen_root(root))


def states(found: Sequence[Lock], href: Href) -> tuple[LockState, ...]:
    """Locks as webdav.py decides about them."""
    return tuple(LockState(lock.token, href(lock.root), lock.account_id, lock.exclusive) for lock in found)


def lockable(place: tree.Place) -> bool:
    """Whether a place takes locks: the drive's own folders do not.

    Common documents and the roots belong to everybody or to the drive; one program's lock there would shut
    out all others.
    """
    return not place.fixed


def conflicting(
    tx: Read, drive_id: int, place: tree.Place, now: int, *, exclusive: bool, infinite: bool
) -> tuple[Lock, ...]:
    """Living locks that forbid a new one at a place, whoever holds them.

    Spec: RFC 4918 §6.2, §7.7, §9.10.3 and the table of §9.10.5.
    """
    found = covering(tx, drive_id, place.chain, now)
    if place.missing:
        found = tuple(lock for lock in found if lock.infinite)
    elif infinite and place.chain[-1].folder:
        found += inside(tx, drive_id, place.chain[-1].id, now)
    return tuple(lock for lock in found if exclusive or lock.exclusive)


def new_token() -> str:
    """A lock token nobody can guess (RFC 4918 §6.5)."""
    return f"opaquelocktoken:{uuid.uuid4()}"


# -- changing -------------------------------------------------------------------------------------


def create(tx: Write, drive_id: int, lock: Lock, settings: configuration.Drive, now: int) -> None:
    """Store a lock that conflicts with none; the drive's expired ones are swept away.

    Raises:
        InsufficientStorage: the account holds `max_locks` already.
    """
    tx.fast(_EXPIRE, {"drive_id": drive_id, "now": now})
    if tx.scalar(_COUNT, {"account_id": lock.account_id, "now": now}) >= settings.max_locks:
        raise InsufficientStorage(f"An account may hold {settings.max_locks} locks.")
    tx.fast(
        _INSERT,
        {
            "token": lock.token,
            "drive_id": drive_id,
            "node_id": lock.node_id,
            "account_id": lock.account_id,
            "exclusive": lock.exclusive,
            "infinite": lock.infinite,
            "owner_xml": lock.owner_xml,
            "timeout_s": lock.timeout_s,
            "expires_at": lock.expires_at,
            "root": "/".join(lock.root),
        },
    )


def refresh(tx: Write, token: str, timeout_s: int, now: int) -> None:
    """Let a lock live for another `timeout_s` seconds from now (RFC 4918 §9.10.2)."""
    tx.fast(_REFRESH, {"token_": token, "timeout": timeout_s, "expires": now + timeout_s})


def release(tx: Write, token: str) -> None:
    """Remove a lock."""
    tx.fast(_RELEASE, {"token": token})


def shorten(tx: Write, now: int) -> int:
    """Let no lock live longer than was asked though the clock was set back; returns how many would have.

    A client that is still there refreshes its lock in time; one that has gone shuts nobody out for a day.

    Cost: every lock's row once.
    """
    return tx.execute(_SHORTEN, {"now": now}).rowcount


# -- rendering ------------------------------------------------------------------------------------

SUPPORTED_XML = (
    "<d:lockentry><d:lockscope><d:exclusive/></d:lockscope><d:locktype><d:write/></d:locktype></d:lockentry>"
    "<d:lockentry><d:lockscope><d:shared/></d:lockscope><d:locktype><d:write/></d:locktype></d:lockentry>"
)


def discovery_xml(found: Sequence[Lock], href: Href, now: int) -> str:
    """The content of DAV:lockdiscovery with the prefixes of wire.xml (RFC 4918 §15.8).

    Args:
        found: the locks that cover the resource.
        href: the quoted path of a decoded one, in the form that the client uses.
    """
    return "".join(
        "<d:activelock><d:locktype><d:write/></d:locktype>"
        f"<d:lockscope><d:{'exclusive' if lock.exclusive else 'shared'}/></d:lockscope>"
        f"<d:depth>{'infinity' if lock.infinite else '0'}</d:depth>{lock.owner_xml}"
        f"<d:timeout>Second-{min(max(lock.expires_at - now, 0), lock.timeout_s)}</d:timeout>"
        f"<d:locktoken><d:href>{xml.escape(lock.token)}</d:href></d:locktoken>"
        f"<d:lockroot><d:href>{xml.escape(href(lock.root))}</d:href></d:lockroot></d:activelock>"
        for lock in found
    )
