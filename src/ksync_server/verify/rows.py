"""Checks of rows against rows: references, counts, change numbers, and what belongs to nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa

from ksync_server.store import changes
from ksync_server.store import tables as t
from ksync_server.store.database import Read, Write
from ksync_server.verify.finding import Check, Look, Suspicion, between, every, first

_STAGE_REST_S = 7200  # the reaper comes round every hour: a lease that ended earlier than this was missed
_N, _B, _O, _C, _D = t.node.c, t.blob.c, t.object_.c, t.collection.c, t.drive.c
_LOST = "its content is lost: restore it from a backup, upload it again, or delete it"


def _count(table: sa.Table, condition: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
    return sa.select(sa.func.count()).select_from(table).where(condition).scalar_subquery()


# -- references -----------------------------------------------------------------------------------

_held = _count(t.node, _N.blob_id == _B.id) + _count(t.object_, _O.blob_id == _B.id)
_REFS = sa.select(_B.id, _B.refs, _held.label("held")).where(between(_B.id), _B.refs != _held)
_unheld = sa.and_(
    _B.id == sa.bindparam("blob"),
    ~sa.exists().where(_N.blob_id == _B.id),
    ~sa.exists().where(_O.blob_id == _B.id),
)


def blob_references(look: Look) -> Iterator[Suspicion]:
    """Every blob counts the files and objects that hold it; one that nobody holds is to go."""
    for blob, refs, held in look.pages(_B.id, _REFS):
        if held:

            def count(tx: Write, blob: int = blob, refs: int = refs, held: int = held) -> bool:
                same = sa.and_(_B.id == blob, _B.refs == refs, _held == held)
                return tx.execute(sa.update(t.blob).where(same).values(refs=held)).rowcount == 1

            yield Suspicion(f"blob {blob}", f"counts {refs} references, has {held}", look.fix(count))
        else:

            def drop(tx: Write, blob: int = blob) -> bool:
                keys = [
                    row[0] for row in tx.execute(sa.select(t.extent.c.key).where(t.extent.c.blob_id == blob))
                ]
                if tx.execute(sa.delete(t.blob).where(_unheld), {"blob": blob}).rowcount != 1:
                    return False
                tx.execute(sa.delete(t.garbage).where(t.garbage.c.key.in_(keys)))
                now = int(time.time())
                if keys:
                    tx.execute(sa.insert(t.garbage), [{"key": key, "since": now} for key in keys])
                return True

            yield Suspicion(f"blob {blob}", f"counts {refs} references, nothing holds it", look.fix(drop))


_MISSING_OF_NODE = (
    sa.select(_N.id, _N.drive_id)
    .select_from(t.node.outerjoin(t.blob, _N.blob_id == _B.id))
    .where(between(_N.id), _N.folder.is_(sa.false()), _B.id.is_(None))
)
_MISSING_OF_OBJECT = (
    sa.select(_O.id, _O.collection_id)
    .select_from(t.object_.outerjoin(t.blob, _O.blob_id == _B.id))
    .where(between(_O.id), _B.id.is_(None))
)


def references_without_blob(look: Look) -> Iterator[Suspicion]:
    """Every file and every object has a blob."""
    for node, drive in look.pages(_N.id, _MISSING_OF_NODE):
        yield Suspicion(f"file {node}", f"of drive {drive} has no blob", help=_LOST)
    for number, collection in look.pages(_O.id, _MISSING_OF_OBJECT):
        yield Suspicion(f"object {number}", f"of collection {collection} has no blob", help=_LOST)


_FULL_FOLDERS = sa.select(_N.id, _N.drive_id).where(
    between(_N.id), _N.folder.is_(sa.true()), sa.or_(_N.blob_id.is_not(None), _N.size != 0)
)


def folders_with_content(look: Look) -> Iterator[Suspicion]:
    """A folder has no bytes."""
    for node, drive in look.pages(_N.id, _FULL_FOLDERS):

        def empty(tx: Write, node: int = node) -> bool:
            folder = sa.and_(_N.id == node, _N.folder.is_(sa.true()))
            return tx.execute(sa.update(t.node).where(folder).values(blob_id=None, size=0)).rowcount == 1

        yield Suspicion(f"folder {node}", f"of drive {drive} has bytes of its own", look.fix(empty))


def _sizes(table: sa.Table) -> sa.Select[Any]:
    c = table.c
    joined = table.join(t.blob, c.blob_id == _B.id)
    return sa.select(c.id, c.size, _B.size, _B.id).select_from(joined).where(between(c.id), c.size != _B.size)


_SIZES_OF_NODES, _SIZES_OF_OBJECTS = _sizes(t.node), _sizes(t.object_)


def sizes(look: Look) -> Iterator[Suspicion]:
    """A file and an object are as large as their blob says."""
    for what, table, query in (("file", t.node, _SIZES_OF_NODES), ("object", t.object_, _SIZES_OF_OBJECTS)):
        for number, size, right, blob in look.pages(table.c.id, query):

            def set_size(
                tx: Write, table: sa.Table = table, n: int = number, b: int = blob, right: int = right
            ) -> bool:
                same = sa.and_(table.c.id == n, table.c.blob_id == b)
                return tx.execute(sa.update(table).where(same).values(size=right)).rowcount == 1

            yield Suspicion(f"{what} {number}", f"says {size} bytes, its blob {right}", look.fix(set_size))


# -- drives ---------------------------------------------------------------------------------------

_is_root = sa.and_(_N.parent_id.is_(None), _N.deleted_at.is_(None))
_USED = sa.select(
    _D.id,
    _D.collection_id,
    _C.seq,
    _D.used_bytes,
    _D.files,
    sa.select(sa.func.coalesce(sa.func.sum(_N.size), 0)).where(_N.drive_id == _D.id).scalar_subquery(),
    _count(t.node, sa.and_(_N.drive_id == _D.id, ~_is_root)),
).select_from(t.drive.join(t.collection, _C.id == _D.collection_id))
_DRIVES = sa.select(_D.id).order_by(_D.id)


def _unmoved(tx: Write, collection_id: int, seq: int) -> bool:
    """Lock a collection's row; whether nothing in it changed since it was read."""
    row = first(tx, sa.select(_C.seq).where(_C.id == collection_id).with_for_update())
    return row is not None and row[0] == seq


def drive_use(look: Look) -> Iterator[Suspicion]:
    """A drive counts the bytes and the number of its files and folders, deleted ones included."""
    for (drive,) in look.database.fast(_DRIVES):
        with look.database.read() as tx:
            row = first(tx, _USED.where(_D.id == drive))
        if row is None or (row[3], row[4]) == (row[5], row[6]):
            continue
        _, collection, seq, used, files, right_used, right_files = row

        def set_use(
            tx: Write,
            drive: int = drive,
            collection: int = collection,
            seq: int = seq,
            seen: tuple[int, int] = (used, files),
            right: tuple[int, int] = (int(right_used), right_files),
        ) -> bool:
            if not _unmoved(tx, collection, seq):
                return False
            same = sa.and_(_D.id == drive, _D.used_bytes == seen[0], _D.files == seen[1])
            values = {"used_bytes": right[0], "files": right[1]}
            return tx.execute(sa.update(t.drive).where(same).values(values)).rowcount == 1

        yield Suspicion(
            f"drive {drive}",
            f"counts {used} bytes in {files} files and folders, has {right_used} in {right_files}",
            look.fix(set_use),
        )


_child = t.node.alias("child")
_members = sa.select(sa.func.count()).select_from(_child).where(_child.c.parent_id == _N.id).scalar_subquery()
_ENTRIES = sa.select(_N.id, _N.drive_id, _N.entries, _members.label("members")).where(
    between(_N.id), _N.folder.is_(sa.true()), _N.entries != _members
)
_ONE_ENTRIES = sa.select(_N.entries, _members, _N.drive_id).where(_N.id == sa.bindparam("id_"))
_UP = sa.select(_N.parent_id, _N.deleted_at).where(_N.id == sa.bindparam("id_"))


def _detached(tx: Read, node: int) -> bool:
    """Whether it lies in a tree that nobody sees: a copy being built, or one being erased."""
    at = node
    while True:
        row = first(tx, _UP, {"id_": at})
        if row is None:
            return True
        if row[0] is None:
            return row[1] is not None
        at = row[0]


def folder_entries(look: Look) -> Iterator[Suspicion]:
    """A folder counts its members."""
    for node, drive, entries, members in look.pages(_N.id, _ENTRIES):
        with look.database.read() as tx:
            row = first(tx, _ONE_ENTRIES, {"id_": node})
            if row is None or row[0] == row[1] or _detached(tx, node):
                continue

        def set_entries(tx: Write, node: int = node, drive: int = drive) -> bool:
            collection = tx.execute(sa.select(_D.collection_id).where(_D.id == drive)).scalar_one()
            changes.bump(tx, collection)  # the lock of every change of the drive
            row = first(tx, _ONE_ENTRIES, {"id_": node})
            if row is None or _detached(tx, node):
                return False
            return tx.execute(sa.update(t.node).where(_N.id == node).values(entries=row[1])).rowcount == 1

        text = f"of drive {drive} counts {entries} members, has {members}"
        yield Suspicion(f"folder {node}", text, look.fix(set_entries))


_ROOT = sa.select(_N.id).where(
    _N.id == sa.bindparam("id_"), _N.drive_id == sa.bindparam("drive"), _N.folder.is_(sa.true()), _is_root
)
_M = t.drive_member.c
_ROOTS = sa.select(_M.drive_id, _M.account_id, _M.root_id, _M.trash_id, t.account.c.sync_id).select_from(
    t.drive_member.join(t.account, _M.account_id == t.account.c.id)
)


def drive_roots(look: Look) -> Iterator[Suspicion]:
    """A drive has its Common documents, each member a private root and deleted items."""
    with look.database.read() as tx:
        wanted: list[tuple[str, int, int, str, sa.Table, sa.ColumnElement[bool], str]] = [
            (f"drive {drive}", drive, node, "common", t.drive, _D.id == drive, "common_id")
            for drive, node in every(tx, sa.select(_D.id, _D.common_id))
        ]
        for drive, account, root, trash, sync_id in every(tx, _ROOTS):
            where = sa.and_(_M.drive_id == drive, _M.account_id == account)
            subject = f"member {sync_id} of drive {drive}"
            wanted.append((subject, drive, root, f"root {sync_id}", t.drive_member, where, "root_id"))
            wanted.append((subject, drive, trash, f"trash {sync_id}", t.drive_member, where, "trash_id"))
        missing = [each for each in wanted if first(tx, _ROOT, {"id_": each[2], "drive": each[1]}) is None]
    for subject, drive, node, name, table, where, column in missing:
        fix = look.fix(_root_maker(drive, node, name, table, where, column))
        yield Suspicion(subject, f"{column} names node {node}, which is no root of the drive", fix)


def _root_maker(
    drive: int, node: int, name: str, table: sa.Table, where: sa.ColumnElement[bool], column: str
) -> Callable[[Write], bool]:
    """Name the root that is there under its usual name, else a new, empty one."""

    def make(tx: Write) -> bool:
        collection = tx.execute(sa.select(_D.collection_id).where(_D.id == drive)).scalar()
        if collection is None or first(tx, _ROOT, {"id_": node, "drive": drive}) is not None:
            return False
        seq = changes.bump(tx, collection)
        kept = sa.select(_N.id).where(
            _N.drive_id == drive, _N.name == name, _N.folder.is_(sa.true()), _is_root
        )
        number = tx.execute(kept).scalar()
        if number is None:
            now = int(time.time())
            row = {"drive_id": drive, "name": name, "folder": True, "seq": seq, "mtime_ms": now * 1000}
            insert = sa.insert(t.node).returning(_N.id)
            number = tx.execute(insert, {**row, "parent_id": None, "created_at": now}).scalar_one()
        same = sa.and_(where, table.c[column] == node)
        return tx.execute(sa.update(table).where(same).values({column: number})).rowcount == 1

    return make


_above = t.node.alias("above")
_STRAYS = (
    sa.select(_N.id, _N.drive_id)
    .select_from(t.node.join(_above, _N.parent_id == _above.c.id))
    .where(
        between(_N.id),
        _N.deleted_at.is_not(None),
        sa.or_(
            _above.c.parent_id.is_not(None),
            sa.exists().where(_D.common_id == _above.c.id),
            sa.exists().where(_M.root_id == _above.c.id),
        ),
    )
)


def deleted_nodes(look: Look) -> Iterator[Suspicion]:
    """What is marked as deleted lies in deleted items; elsewhere it would vanish when its time is up."""
    for node, drive in look.pages(_N.id, _STRAYS):
        with look.database.read() as tx:
            if _detached(tx, node):
                continue

        def keep(tx: Write, node: int = node, drive: int = drive) -> bool:
            collection = tx.execute(sa.select(_D.collection_id).where(_D.id == drive)).scalar_one()
            changes.bump(tx, collection)
            if first(tx, _STRAYS, {"low": node - 1, "high": node}) is None:
                return False
            values = {"deleted_at": None, "deleted_from_id": None, "deleted_name": None}
            return tx.execute(sa.update(t.node).where(_N.id == node).values(values)).rowcount == 1

        text = f"of drive {drive} is marked as deleted and lies in no deleted items"
        yield Suspicion(f"node {node}", text, look.fix(keep))


# -- collections ----------------------------------------------------------------------------------

_objects = _count(t.object_, _O.collection_id == _C.id)
_OBJECTS = sa.select(_C.id, _C.seq, _C.objects, _objects.label("has")).where(
    between(_C.id), _C.kind != "drive", _C.account_id.is_not(None), _C.objects != _objects
)


def collection_objects(look: Look) -> Iterator[Suspicion]:
    """A calendar or address book counts its objects; one being erased does not."""
    for number, seq, counted, has in look.pages(_C.id, _OBJECTS):

        def set_objects(
            tx: Write, n: int = number, seq: int = seq, counted: int = counted, has: int = has
        ) -> bool:
            if not _unmoved(tx, n, seq):
                return False
            same = sa.and_(_C.id == n, _C.objects == counted, _C.account_id.is_not(None))
            return tx.execute(sa.update(t.collection).where(same).values(objects=has)).rowcount == 1

        yield Suspicion(f"collection {number}", f"counts {counted} objects, has {has}", look.fix(set_objects))


def _newest(
    column: sa.ColumnElement[Any], condition: sa.ColumnElement[bool], source: sa.FromClause
) -> sa.ColumnElement[int]:
    query = sa.select(sa.func.max(column)).select_from(source).where(condition)
    return sa.func.coalesce(query.scalar_subquery(), 0)


_NEWEST = sa.select(
    _C.id,
    _C.seq,
    _newest(_O.seq, _O.collection_id == _C.id, t.object_),
    _newest(t.tombstone.c.seq, t.tombstone.c.collection_id == _C.id, t.tombstone),
    _newest(_N.seq, _D.collection_id == _C.id, t.drive.join(t.node, _N.drive_id == _D.id)),
    _C.pruned_seq,
).where(between(_C.id))


def collection_numbers(look: Look) -> Iterator[Suspicion]:
    """A collection's change number is not behind that of any member."""
    for number, seq, *others in look.pages(_C.id, _NEWEST):
        newest = max(others)
        if seq >= newest:
            continue

        def raise_seq(tx: Write, n: int = number, newest: int = newest) -> bool:
            # One more than the newest: a client that holds its token must see that something changed.
            behind = sa.and_(_C.id == n, _C.seq < newest)
            return tx.execute(sa.update(t.collection).where(behind).values(seq=newest + 1)).rowcount == 1

        text = f"is at change {seq}, a member at {newest}"
        yield Suspicion(f"collection {number}", text, look.fix(raise_seq))


_T = t.tombstone.c
_numbered = sa.union_all(
    *(sa.select(c.collection_id, c.seq).where(between(c.collection_id)) for c in (_O, _T))
).subquery()
_TWICE = (
    sa.select(_numbered.c.collection_id, _numbered.c.seq, sa.func.count())
    .group_by(_numbered.c.collection_id, _numbered.c.seq)
    .having(sa.func.count() > 1)
)


def numbers_twice(look: Look) -> Iterator[Suspicion]:
    """Every member and every deletion has a change number of its own, so that a sync may stop behind any."""
    for number, seq, count in look.pages(_C.id, _TWICE):

        def renumber(tx: Write, n: int = number, seq: int = seq) -> bool:
            changes.bump(tx, n)  # the lock of every change of the collection
            same = {
                table: every(
                    tx, sa.select(table.c.name).where(table.c.collection_id == n, table.c.seq == seq)
                )
                for table in (t.object_, t.tombstone)
            }
            if sum(map(len, same.values())) < 2:
                return False
            for table, names in same.items():
                for (name,) in names:
                    row = sa.and_(table.c.collection_id == n, table.c.name == name)
                    tx.execute(sa.update(table).where(row).values(seq=changes.bump(tx, n)))
            return True

        yield Suspicion(f"collection {number}", f"gave the number {seq} to {count}", look.fix(renumber))


_ALIVE = (
    sa.select(_T.collection_id, _T.name)
    .select_from(t.tombstone.join(t.object_, (_O.collection_id == _T.collection_id) & (_O.name == _T.name)))
    .where(between(_T.collection_id))
)


def living_tombstones(look: Look) -> Iterator[Suspicion]:
    """No name is told as deleted while it is a member."""
    for collection, name in look.pages(_T.collection_id, _ALIVE):

        def drop(tx: Write, collection: int = collection, name: str = name) -> bool:
            alive = sa.exists().where(_O.collection_id == collection, _O.name == name)
            same = sa.and_(_T.collection_id == collection, _T.name == name, alive)
            return tx.execute(sa.delete(t.tombstone).where(same)).rowcount == 1

        yield Suspicion(f"collection {collection}", f"{name!r} is a member and deleted", look.fix(drop))


# -- what belongs to nothing ----------------------------------------------------------------------

_L = t.lock.c
_LOCKS = (
    sa.select(_L.token, _L.node_id)
    .select_from(t.lock.outerjoin(t.node, (_L.node_id == _N.id) & (_L.drive_id == _N.drive_id)))
    .where(between(_L.token), _N.id.is_(None))
)


def locks_of_nothing(look: Look) -> Iterator[Suspicion]:
    """A lock is on a node of its drive."""
    for token, node in look.pages(_L.token, _LOCKS, ""):

        def drop(tx: Write, token: str = token) -> bool:
            here = sa.exists().where(_N.id == _L.node_id, _N.drive_id == _L.drive_id)
            return tx.execute(sa.delete(t.lock).where(_L.token == token, ~here)).rowcount == 1

        yield Suspicion(f"lock of node {node}", "is of nothing in its drive", look.fix(drop))


_X = t.occurrence.c
_OCCURRENCES = (
    sa.select(_X.object_id)
    .select_from(t.occurrence.outerjoin(t.object_, _X.object_id == _O.id))
    .where(between(_X.object_id), _O.id.is_(None))
)


def occurrences_of_nothing(look: Look) -> Iterator[Suspicion]:
    """A row of occurrences is of an object."""
    for (number,) in look.pages(_X.object_id, _OCCURRENCES):

        def drop(tx: Write, number: int = number) -> bool:
            gone = ~sa.exists().where(_O.id == _X.object_id)
            return tx.execute(sa.delete(t.occurrence).where(_X.object_id == number, gone)).rowcount == 1

        yield Suspicion(f"occurrences of object {number}", "are of nothing", look.fix(drop))


def dead_stages(look: Look) -> Iterator[Suspicion]:
    """The reaper ends uploads whose lease ran out."""
    before = int(time.time()) - _STAGE_REST_S
    c = t.stage.c
    with look.database.read() as tx:
        rows = every(tx, sa.select(c.id, c.lease_until).where(c.lease_until < before))
    for number, until in rows:

        def drop(tx: Write, number: str = number) -> bool:
            return tx.execute(sa.delete(t.stage).where(c.id == number, c.lease_until < before)).rowcount == 1

        yield Suspicion(f"upload {number}", f"ended at {until} and was not reaped", look.fix(drop))


# -- the database itself --------------------------------------------------------------------------


def database_file(look: Look) -> Iterator[Suspicion]:
    """With `deep`: SQLite finds no fault in its own file; PostgreSQL answers for its files itself."""
    if not look.deep or look.database.dialect != "sqlite":
        return
    with look.database.read() as tx:
        wrong = [text for (text,) in every(tx, sa.text("PRAGMA integrity_check(20)")) if text != "ok"]
        for table, number, other, _ in every(tx, sa.text("PRAGMA foreign_key_check")):
            wrong.append(f"row {number} of {table} refers to nothing in {other}")
    for text in wrong:
        yield Suspicion("database", text, help="the database file is damaged: restore from a backup")


CHECKS: dict[str, Check] = {
    "database-file": database_file,
    "references-without-blob": references_without_blob,
    "folders-with-content": folders_with_content,
    "blob-references": blob_references,
    "sizes": sizes,
    "drive-roots": drive_roots,
    "folder-entries": folder_entries,
    "drive-use": drive_use,
    "deleted-nodes": deleted_nodes,
    "collection-objects": collection_objects,
    "collection-numbers": collection_numbers,
    "living-tombstones": living_tombstones,
    "numbers-twice": numbers_twice,
    "locks-of-nothing": locks_of_nothing,
    "occurrences-of-nothing": occurrences_of_nothing,
    "dead-stages": dead_stages,
}
