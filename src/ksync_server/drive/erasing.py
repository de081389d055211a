"""What is erased for good: deleted items past their days, abandoned copies, the files of a removed account.

A tree is detached first, then purged from below in short transactions; whoever is interrupted leaves the rest
to `expire_trash`.
"""

from __future__ import annotations

from functools import partial

from ksync_server import settings as configuration
from ksync_server.drive import statements, tree
from ksync_server.errors import Conflict, NotFound
from ksync_server.store import blobs, changes
from ksync_server.store.database import Database, Write

_PURGED_AT_ONCE = 75  # nodes erased in one transaction, before the last look's members: 2 to 4 ms
_PURGE_LOOK = 50  # members read at once while erasing
_STAGE_S = 3600  # a hidden copy untouched for this long was abandoned


def purge(database: Database, drive_id: int, node_id: int) -> None:
    """Erase a detached tree: rows, shares of bytes, the room it took. Blocking; outside any transaction.

    It may be interrupted anywhere: `expire_trash` goes on.

    Cost: transactions of at most 125 nodes each, 5 ms.
    """
    while not database.write(lambda tx: _purge_step(tx, drive_id, node_id)):
        pass


def _purge_step(tx: Write, drive_id: int, node_id: int) -> bool:
    """Erase some nodes from below; returns whether the tree is gone."""
    _lock_drive(tx, drive_id)
    top = tree.find(tx, node_id)
    if top is None:
        return True
    if top.parent_id is not None or top.deleted_at is None:
        raise Conflict("It was restored meanwhile.")
    erased = size = 0
    at = top
    while erased < _PURGED_AT_ONCE:
        members = tree.list_page(tx, at.id, most=_PURGE_LOOK)
        if not members:
            _erase(tx, at)
            erased += 1
            size += at.size
            if at.id == node_id:
                break
            assert at.parent_id is not None
            at = tree.get(tx, at.parent_id)
            continue
        for member in members:
            if not member.folder:
                _erase(tx, member)
                erased += 1
                size += member.size
        at = next((member for member in members if member.folder), at)
    tx.fast(statements.USE, {"id_": drive_id, "size": -size, "count": -erased})
    return at.id == node_id and tree.find(tx, node_id) is None


def _erase(tx: Write, gone: tree.Node) -> None:
    tx.fast(statements.DROP_NODE, {"id_": gone.id})
    if gone.blob_id is not None:
        blobs.release(tx, gone.blob_id)


def _lock_drive(tx: Write, drive_id: int) -> int:
    """`tree.begin` without a member: take a change number; returns it."""
    collection_id = tx.scalar(statements.DRIVE_COLLECTION, {"id_": drive_id})
    if collection_id is None:
        raise NotFound("The drive does not exist any more.")
    return changes.bump(tx, collection_id)


def expire_trash(database: Database, settings: configuration.Drive, now: int, *, most: int = 1000) -> int:
    """Erase what was deleted more than `trash_days` ago and what interrupted copies left. Blocking.

    Args:
        now: Unix seconds.
        most: how many deleted resources to take at once.

    Returns:
        How many deleted resources (files or whole trees) were erased. Safe in any number of processes.
    """
    before = now - settings.trash_days * 86400
    limits = {"before": before, "abandoned": now - _STAGE_S, "most": most}
    rows = database.fast(statements.EXPIRED, limits)
    erased = 0
    for node_id, drive_id in rows:
        if database.write(partial(_expire, drive_id=drive_id, node_id=node_id, before=before, now=now)):
            purge(database, drive_id, node_id)
            erased += 1
    return erased


def _expire(tx: Write, drive_id: int, node_id: int, before: int, now: int) -> bool:
    """Detach an expired node; False when it was restored or erased meanwhile."""
    seq = _lock_drive(tx, drive_id)
    found = tree.find(tx, node_id)
    if found is None or found.deleted_at is None:
        return False
    if found.parent_id is not None:
        if found.deleted_at >= before:
            return False
        tx.fast(statements.MEMBERS, {"id_": found.parent_id, "by": -1, "seq": seq, "mtime_ms": now * 1000})
    tx.fast(statements.RELOCATE, {"id_": node_id, "parent_id": None, "name": "", "seq": seq, "deleted_at": 0})
    return True


def erase_member(database: Database, account_id: int, sync_id: str) -> None:
    """Erase an account's own files in every drive it is or was a member of; blocking.

    Common documents stay, whoever put them there. It may be interrupted anywhere and called again;
    `expire_trash` ends what was begun.

    Cost: as `purge`.
    """
    names = {"root": f"root {sync_id}", "trash": f"trash {sync_id}"}
    for node_id, drive_id in database.fast(statements.ROOTS_OF, names):
        database.write(partial(_detach_root, drive_id=drive_id, node_id=node_id, account_id=account_id))
        purge(database, drive_id, node_id)


def _detach_root(tx: Write, drive_id: int, node_id: int, account_id: int) -> None:
    """Close a drive to its member and make one of its two roots a tree that `purge` takes."""
    seq = _lock_drive(tx, drive_id)
    tx.fast(statements.DROP_MEMBER, {"drive_id": drive_id, "account_id": account_id})
    tx.fast(statements.RELOCATE, {"id_": node_id, "parent_id": None, "name": "", "seq": seq, "deleted_at": 0})
    tx.fast(statements.USE, {"id_": drive_id, "size": 0, "count": 1})  # roots are not counted, trees are
