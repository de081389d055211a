"""COPY: a small tree in one transaction, a large one built page by page where nobody sees it.

`prepare_copy` builds, `copy` makes visible: only a source that is still as it was read. No byte is copied:
files share their blobs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ksync_server.drive import erasing, statements, tree
from ksync_server.errors import Conflict, Forbidden, NotFound
from ksync_server.store import blobs
from ksync_server.store.database import Database, Write

_SMALL_TREE = 200  # nodes copied inside one transaction: some 4 ms


class SourceChanged(Conflict):
    """The tree being copied changed meanwhile; nothing was published, prepare it again."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A copy on its way: `root_id` is the hidden tree, or None where one transaction does it all."""

    source_id: int
    deep: bool
    root_id: int | None = None
    seen: int = 0  # no change up to this number touched the source since it was read


def prepare_copy(database: Database, view: tree.View, source: tree.Node, *, deep: bool) -> Prepared:
    """Build the copy of a large tree where nobody sees it. Blocking; outside any transaction.

    A small tree, a file, or a folder without its members (`deep` False) needs no preparation. What is
    prepared but not published by `copy` is to be given to `erasing.purge`; the retention job finds it
    otherwise.

    Raises:
        InsufficientStorage: quota or number of files; nothing stays.
        SourceChanged: the tree changed meanwhile; nothing stays.
        NotFound: the source is gone.

    Cost: transactions of at most 200 nodes each.
    """
    if not (source.folder and deep):
        return Prepared(source.id, deep)
    with database.read() as tx:
        seen = int(tx.scalar(statements.COLLECTION_SEQ, {"id_": view.grant.collection_id}) or 0)
        if tx.scalar(statements.SUBTREE_SIZE, {"id_": source.id, "most": _SMALL_TREE + 1}) <= _SMALL_TREE:
            return Prepared(source.id, deep)
    started = Prepared(source.id, deep, None, seen)
    prepared = database.write(lambda tx: _stage_folder(tree.begin(tx, view), started))
    root_id = prepared.root_id
    assert root_id is not None
    folders = [(source.id, root_id)]
    try:
        while folders:
            prepared = _copy_folder(database, view, prepared, folders)
    except BaseException:  # whatever ended it: nobody would see or finish the hidden copy
        erasing.purge(database, view.grant.drive_id, root_id)
        raise
    return prepared


def _stage_folder(change: tree.Change, prepared: Prepared) -> Prepared:
    _check_unchanged(change, prepared)
    source = tree.get(change.tx, prepared.source_id)
    tree.use(change, 0, 1)
    root_id = tree.insert(change, None, "", folder=True, mtime_ms=source.mtime_ms, deleted_at=change.now)
    change.tx.fast(statements.SET_ENTRIES, {"id_": root_id, "entries": source.entries})
    change.tx.fast(statements.COPY_PROPERTIES, {"id_": source.id, "to": root_id})
    return replace(prepared, root_id=root_id, seen=change.last)


def _copy_folder(
    database: Database, view: tree.View, prepared: Prepared, folders: list[tuple[int, int]]
) -> Prepared:
    """Copy the members of the last of `folders` page by page; its own folders are added there."""
    origin, target = folders.pop()
    after = ""

    def step(tx: Write) -> tuple[str, list[tuple[int, int]], int]:
        change = tree.begin(tx, view)
        _check_unchanged(change, prepared)
        tx.fast(statements.STAGE_BEAT, {"id_": prepared.root_id, "now": change.now})
        return *_copy_page(change, origin, target, after), change.last

    while True:
        after, found, seen = database.write(step)
        prepared = replace(prepared, seen=seen)
        folders += found
        if not after:
            return prepared


def _copy_page(
    change: tree.Change, origin: int, target: int, after: str
) -> tuple[str, list[tuple[int, int]]]:
    """Copy up to a page of members; returns the name to go on after ("" = done) and the pairs of folders."""
    tx = change.tx
    span = {"parent": origin, "to": target, "after": after, "most": tree.PAGE, "now": change.now}
    rows = tx.fast(statements.COPY_PAGE, {**span, "base": change.numbers(tree.PAGE)})
    if not rows:
        return "", []
    for _, blob_id, _ in rows:
        if blob_id is not None:
            blobs.share(tx, blob_id)
    tree.use(change, sum(size for _, _, size in rows), len(rows))
    # The database's own order of names, which need not be Python's.
    last = str(tx.scalar(statements.LAST_NAME, {"id_": target}))
    span["last"] = last
    tx.fast(statements.COPY_PAGE_PROPERTIES, span)
    folders = tx.fast(statements.FOLDERS_OF, span) if any(folder for folder, _, _ in rows) else []
    return last if len(rows) == tree.PAGE else "", [(int(old), int(new)) for old, new in folders]


def copy(change: tree.Change, source: tree.Place, destination: tree.Place, prepared: Prepared) -> None:
    """Make the copy visible; what it replaces goes to the deleted items. No byte is copied.

    Both places were resolved in this transaction.

    Raises:
        NotFound: there is nothing at the source.
        SourceChanged: the source is not as it was when the hidden copy was built.
        Forbidden, Conflict, UriTooLong, InsufficientStorage: see `tree.check_create`, or the quota.

    Spec: RFC 4918 §9.8. Cost: 20 us per node of a small tree, else independent of its size.
    """
    origin = source.node
    if origin is None:
        raise NotFound("There is nothing at this address.")
    if source.area is tree.Area.TRASH and source.fixed:
        raise Forbidden("The deleted items cannot be copied as a whole.")
    if origin.id != prepared.source_id:
        raise SourceChanged("It changed while it was being copied.")
    if prepared.root_id is not None:
        _check_unchanged(change, prepared)
        staged = tree.find(change.tx, prepared.root_id)
        if staged is None or not staged.deleted_at:
            raise SourceChanged("The copy took too long; please try again.")
    folder = tree.make_room(change, source, destination)
    tree.touch(change, folder.id, 1)
    if prepared.root_id is not None:
        values = {"id_": prepared.root_id, "parent_id": folder.id, "name": destination.name}
        change.tx.fast(statements.RELOCATE, {**values, "seq": change.number()})
    else:
        _copy_inline(change, origin, folder.id, destination.name, deep=prepared.deep)


def _copy_inline(change: tree.Change, origin: tree.Node, folder_id: int, name: str, *, deep: bool) -> None:
    tree.use(change, origin.size, 1)
    if origin.blob_id is not None:
        blobs.share(change.tx, origin.blob_id)
    values = {
        "folder": origin.folder,
        "size": origin.size,
        "content_type": origin.content_type,
        "mtime_ms": origin.mtime_ms,
        "blob_id": origin.blob_id,
    }
    top = tree.insert(change, folder_id, name, **values)
    change.tx.fast(statements.COPY_PROPERTIES, {"id_": origin.id, "to": top})
    if not (origin.folder and deep):
        return
    change.tx.fast(statements.SET_ENTRIES, {"id_": top, "entries": origin.entries})
    folders = [(origin.id, top)]
    for source_id, target_id in folders:  # grows while it is walked
        after, found = _copy_page(change, source_id, target_id, "")
        folders += found
        while after:
            after, found = _copy_page(change, source_id, target_id, after)
            folders += found


def _check_unchanged(change: tree.Change, prepared: Prepared) -> None:
    """Whether other transactions since the last look changed anything below the source.

    A folder's number counts its members' coming, going and content, so nothing is missed.
    """
    if change.first == prepared.seen + 1:
        return
    span = {"after": prepared.seen, "before": change.first, "drive_id": change.view.grant.drive_id}
    for (node_id,) in change.tx.fast(statements.CHANGED_BETWEEN, span):
        if tree.is_inside(change.tx, node_id, prepared.source_id):
            raise SourceChanged("It changed while it was being copied; please try again.")
