"""Change numbers: the one source of ETags, ctags and sync tokens.

A number comes from the collection's own row, locked until commit, so no change that commits late can hide
behind a token that a client already holds. Call `bump` first in the transaction, and several collections in
the order of their ids.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import sqlalchemy as sa

from ksync_server.errors import Forbidden, NotFound
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Write

_BUMP = (
    sa.update(t.collection)
    .where(t.collection.c.id == sa.bindparam("id_"))
    .values(seq=t.collection.c.seq + sa.bindparam("by", type_=sa.BigInteger))
    .returning(t.collection.c.seq)
)
_POSITION = sa.select(t.collection.c.seq, t.collection.c.pruned_seq).where(
    t.collection.c.id == sa.bindparam("id_")
)
_CHANGED = (
    sa.select(t.object_.c.name, t.object_.c.seq)
    .where(t.object_.c.collection_id == sa.bindparam("id_"), t.object_.c.seq > sa.bindparam("after"))
    .order_by(t.object_.c.seq)
    .limit(sa.bindparam("most"))
)
_DELETED = (
    sa.select(t.tombstone.c.name, t.tombstone.c.seq)
    .where(t.tombstone.c.collection_id == sa.bindparam("id_"), t.tombstone.c.seq > sa.bindparam("after"))
    .order_by(t.tombstone.c.seq)
    .limit(sa.bindparam("most"))
)
_OLD = (
    sa.select(t.tombstone.c.collection_id)
    .where(t.tombstone.c.at < sa.bindparam("before"))
    .distinct()
    .limit(100)
)
_OLDEST = (
    sa.select(t.tombstone.c.seq)
    .where(t.tombstone.c.collection_id == sa.bindparam("id_"), t.tombstone.c.at < sa.bindparam("before"))
    .order_by(t.tombstone.c.seq)
    .limit(500)
)
_PRUNED = (
    sa.update(t.collection)
    .where(t.collection.c.id == sa.bindparam("id_"), t.collection.c.pruned_seq < sa.bindparam("upto"))
    .values(pruned_seq=sa.bindparam("upto"))
)
_FORGET = sa.delete(t.tombstone).where(
    t.tombstone.c.collection_id == sa.bindparam("id_"), t.tombstone.c.seq <= sa.bindparam("upto")
)
_TOKEN = re.compile(r"urn:ksync:([0-9a-z]{1,32}):([0-9]{1,18}):([0-9]{1,18})(?::([0-9]{1,18}))?")


@dataclass(frozen=True, slots=True)
class Position:
    """How much of a collection's change log a client has seen.

    `base` is the number from which on it needs the log: its own position, except inside a truncated initial
    sync, which lists members by their last change and needs deletions only from the moment it began.
    """

    seq: int
    base: int


@dataclass(frozen=True, slots=True)
class ChangePage:
    """Changes after a position. `position` resumes after the last one here."""

    changed: tuple[str, ...]  # object names, oldest change first
    deleted: tuple[str, ...]
    position: Position
    truncated: bool


def bump(tx: Write, collection_id: int, by: int = 1) -> int:
    """Take the collection's next change numbers and lock its row until commit.

    Args:
        by: how many; every changed or deleted member gets a number of its own, so that a truncated sync can
            end after any row.

    Returns:
        The last number taken; the others are the `by - 1` before it.

    Raises:
        NotFound: the collection is gone.

    Cost: one update of one row.
    """
    row = tx.one(_BUMP, {"id_": collection_id, "by": by})
    if row is None:
        raise NotFound("The collection does not exist any more.")
    return int(row[0])


def etag(generation: str, collection_id: int, seq: int) -> str:
    """The bare strong ETag of a resource whose content last changed at `seq`."""
    return f"{generation}-{collection_id}-{seq}"


def sync_token(generation: str, collection_id: int, position: Position | int) -> str:
    """The position as a URI (RFC 6578 §3.2); a plain number is a complete position."""
    if isinstance(position, int):
        return f"urn:ksync:{generation}:{collection_id}:{position}"
    base = "" if position.base == position.seq else f":{position.base}"
    return f"urn:ksync:{generation}:{collection_id}:{position.seq}{base}"


def position(tx: Read, collection_id: int, token: str) -> Position:
    """What a client's token stands for; the empty token is everything.

    Raises:
        Forbidden: valid-sync-token; from another store or collection, from the future, or older than
            the change log (RFC 6578 §3.2).
        NotFound: the collection is gone.
    """
    row = tx.one(_POSITION, {"id_": collection_id})
    if row is None:
        raise NotFound("The collection does not exist any more.")
    seq, pruned = row
    if not token:
        return Position(0, seq)
    match = _TOKEN.fullmatch(token)
    if match and match[1] == tx.generation and int(match[2]) == collection_id:
        at = int(match[3])
        base = int(match[4] or at)
        if pruned <= base <= seq and at <= base:
            return Position(at, base)
    raise Forbidden("This sync token is not valid any more.", precondition="{DAV:}valid-sync-token")


def since(tx: Read, collection_id: int, start: Position, limit: int) -> ChangePage:
    """Members changed and deleted after a position, oldest change first, at most `limit` of both together.

    Raises:
        NotFound: the collection is gone.

    Spec: RFC 6578 §3.6. Cost: two index ranges, independent of the collection's size.
    """
    row = tx.one(_POSITION, {"id_": collection_id})
    if row is None:
        raise NotFound("The collection does not exist any more.")
    arguments = {"id_": collection_id, "after": start.seq, "most": limit + 1}
    changed = [(seq, name, False) for name, seq in tx.fast(_CHANGED, arguments)]
    arguments["after"] = start.base if start.seq == 0 else start.seq
    deleted = [(seq, name, True) for name, seq in tx.fast(_DELETED, arguments)]
    rows = sorted(changed + deleted)
    end = int(row[0])
    if len(rows) <= limit:
        return _page(rows, Position(end, end), False)
    rows = rows[:limit]
    last = rows[-1][0]
    return _page(rows, Position(last, max(last, start.base)), True)


def prune(database: Database, before: int) -> int:
    """Forget deletions made before a time; a token that would need them starts anew. Blocking.

    Args:
        before: Unix seconds.

    Returns:
        How many deletions were forgotten.

    Cost: one transaction for every 500.
    """
    forgotten = 0
    while numbers := database.fast(_OLD, {"before": before}):
        for (number,) in numbers:
            forgotten += database.write(lambda tx, n=number: _prune(tx, n, before))  # type: ignore[misc]
    return forgotten


def _prune(tx: Write, collection_id: int, before: int) -> int:
    rows = tx.fast(_OLDEST, {"id_": collection_id, "before": before})
    if rows:
        arguments = {"id_": collection_id, "upto": rows[-1][0]}
        tx.fast(_PRUNED, arguments)  # first: it locks the row that `bump` and every reader of a token ask
        tx.fast(_FORGET, arguments)
    return len(rows)


def _page(rows: list[tuple[int, str, bool]], position: Position, truncated: bool) -> ChangePage:
    return ChangePage(
        tuple(name for _, name, gone in rows if not gone),
        tuple(name for _, name, gone in rows if gone),
        position,
        truncated,
    )
