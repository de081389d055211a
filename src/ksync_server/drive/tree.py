"""The files of a drive: paths to nodes, and every change of the tree.

Functions take a transaction. Readers take `Read`; changes take a `Change`, which `begin` makes: the first
statement of every change is the drive's change number, so writers of one drive wait for each other and what
was resolved after `begin` stays true until commit.

Every node whose content or place changes gets a number of its own, so an ETag never names two contents.
Nothing is erased by a client: DELETE and overwriting moves put nodes into the member's deleted items.
"""

from __future__ import annotations

import re
import time
import unicodedata
from dataclasses import dataclass, replace
from enum import StrEnum

from ksync_server import settings as configuration
from ksync_server.auth.gate import DriveGrant
from ksync_server.drive import statements
from ksync_server.errors import BadRequest, Conflict, Forbidden, InsufficientStorage, NotFound, UriTooLong
from ksync_server.store import blobs, changes
from ksync_server.store.database import Database, Read, Row, Write

_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f/\ud800-\udfff\ufffe\uffff]")
_SMALL_TREE = 200  # nodes copied inside one transaction: some 4 ms
_PAGE = 200  # nodes of one step of a longer work: some 4 ms
_PURGED_AT_ONCE = 75  # nodes erased in one transaction, before the last look's members: 2 to 4 ms
_PURGE_LOOK = 50  # members read at once while erasing
_STAGE_S = 3600  # a hidden copy untouched for this long was abandoned


class Area(StrEnum):
    """Which tree a path lies in."""

    PRIVATE = "private"
    COMMON = "common"
    TRASH = "trash"


@dataclass(frozen=True, slots=True)
class Node:
    """A file or folder, as its row is."""

    id: int
    parent_id: int | None  # None: a root, which no client changes
    name: str  # NFC
    folder: bool
    seq: int  # number of the last content change
    size: int  # bytes
    content_type: str | None  # as given at PUT
    mtime_ms: int
    created_at: int
    blob_id: int | None  # None: a folder
    entries: int  # members of a folder
    deleted_at: int | None
    deleted_from_id: int | None
    deleted_name: str | None


@dataclass(frozen=True, slots=True)
class View:
    """A drive as one member's program sees it."""

    grant: DriveGrant
    settings: configuration.Drive
    folders: bool  # whether the bare URL lists the two folders (DRV2)

    @property
    def above(self) -> tuple[str, ...]:
        """The way from the top of the drive to the one folder that is seen of it; () = all is seen."""
        folder = self.grant.folder
        if folder is None:
            return ()
        return ((self.settings.common_name,) if folder.common else ()) + folder.names

    def lock_root(self, segments: tuple[str, ...]) -> tuple[str, ...]:
        """A path of this view as the drive's locks keep it: from the top of the drive."""
        return (*self.above, *segments)

    def seen_root(self, root: tuple[str, ...]) -> tuple[str, ...]:
        """The root of a lock as this view may know it: one above its only folder holds that whole folder."""
        if self.grant.folder is None:
            return root
        if root and nfc(root[0]) == nfc(self.grant.name):
            root = root[1:]
        above = self.above
        return root[len(above) :] if tuple(map(nfc, root[: len(above)])) == above else ()

    def reserved(self, name: str) -> bool:
        """Whether no member of the private root may have this name: URLs mean something else by it."""
        return name in (self.settings.trash_name, self.settings.common_name, nfc(self.grant.name))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a path leads.

    `chain` holds the nodes on the way from the outermost folder down, as far as they exist; locks of
    infinite depth on any of them cover the place. Common documents lies inside the member's private root.
    """

    segments: tuple[str, ...]  # as the client wrote them: the stem of hrefs
    names: tuple[str, ...]  # the same in NFC
    area: Area
    chain: tuple[Node, ...]
    missing: int  # names at the end that do not exist; 0 = the place exists
    two_folders: bool = False  # the bare URL of a program that is shown the two folders

    @property
    def node(self) -> Node | None:
        """The resource at this path, or None."""
        return None if self.missing else self.chain[-1]

    @property
    def parent(self) -> Node | None:
        """The folder that holds the resource, or would; None: there is none."""
        if not self.missing:
            return self.chain[-2] if len(self.chain) > 1 else None
        return self.chain[-1] if self.missing == 1 and self.chain[-1].folder else None

    @property
    def name(self) -> str:
        """The last name of the path, "" at the bare URL."""
        return self.names[-1] if self.names else ""

    @property
    def fixed(self) -> bool:
        """Whether the resource is one that nobody creates, moves, renames or deletes."""
        return not self.missing and (not self.names or self.chain[-1].parent_id is None)


@dataclass(slots=True)
class Change:
    """A transaction that took its change numbers; see `begin`."""

    tx: Write
    view: View
    now: int  # Unix seconds
    first: int  # the first number it took
    _next: int
    _last: int

    def number(self) -> int:
        """A change number nobody else has.

        Cost: nothing for the numbers taken at the start, one update for each later one.
        """
        if self._next > self._last:
            self._last = changes.bump(self.tx, self.view.grant.collection_id, _PAGE)
            self._next = self._last - _PAGE + 1
        self._next += 1
        return self._next - 1

    def numbers(self, count: int) -> int:
        """The number before `count` fresh consecutive ones."""
        self._last = changes.bump(self.tx, self.view.grant.collection_id, count)
        self._next = self._last + 1
        return self._last - count

    @property
    def last(self) -> int:
        """The last number this transaction took."""
        return self._last


# -- rows -----------------------------------------------------------------------------------------


def node(row: Row) -> Node:
    """A row of `statements.COLUMNS` as a node."""
    values = list(row)
    values[3] = bool(values[3])
    return Node(*values)


# -- names ----------------------------------------------------------------------------------------


def nfc(name: str) -> str:
    """The name as it is stored."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def checked_name(name: str, settings: configuration.Drive) -> str:
    """A path segment as a stored name.

    Raises:
        BadRequest: empty, `.`, `..`, a slash, or a character that XML or a file system cannot carry.
        UriTooLong: more than `max_name_bytes` of UTF-8.
    """
    if _FORBIDDEN.search(name) or name in ("", ".", ".."):
        raise BadRequest("A name may not be empty, dots alone, or contain control characters.")
    name = nfc(name)
    if len(name) * 4 > settings.max_name_bytes and len(name.encode()) > settings.max_name_bytes:
        raise UriTooLong(f"A name may have at most {settings.max_name_bytes} bytes.")
    return name


def _numbered(name: str, number: int, settings: configuration.Drive) -> str:
    """`name (2).ext`, shortened to the longest name allowed."""
    stem, dot, extension = name.rpartition(".")
    if not stem or len(extension) > 16:
        stem, dot, extension = name, "", ""
    tail = f" ({number}){dot}{extension}"
    room = settings.max_name_bytes - len(tail.encode())
    return stem.encode()[: max(room, 0)].decode(errors="ignore") + tail


# -- reading --------------------------------------------------------------------------------------


def find(tx: Read, node_id: int) -> Node | None:
    """A node by its id."""
    row = tx.one(statements.BY_ID, {"id_": node_id})
    return node(row) if row else None


def get(tx: Read, node_id: int) -> Node:
    """A node by its id.

    Raises:
        NotFound: it is gone.
    """
    row = tx.one(statements.BY_ID, {"id_": node_id})
    if row is None:
        raise NotFound("It does not exist any more.")
    return node(row)


def list_page(tx: Read, parent_id: int, after: str = "", most: int = _PAGE) -> list[Node]:
    """Up to `most` members of a folder in name order, after the name `after`.

    Cost: one index range; the next page starts after the last name.
    """
    return [
        node(row) for row in tx.fast(statements.PAGE_OF, {"parent": parent_id, "after": after, "most": most})
    ]


def resolve(tx: Read, view: View, segments: tuple[str, ...]) -> Place:
    """Follow a path from the top of the drive.

    At the top three names come first: the deleted items, the drive's name, Common documents; `/x` and
    `/<drive name>/x` are the same place.

    Raises:
        BadRequest, UriTooLong: a name that no resource can have.
        NotFound: the member's own folders are gone.

    Cost: one indexed row per name.
    """
    names = tuple(checked_name(segment, view.settings) for segment in segments)
    grant, rest = view.grant, names
    if grant.folder is not None:
        return _within(tx, view, segments, names)
    if names and names[0] == view.settings.trash_name:
        return _walk(tx, segments, names, names[1:], Area.TRASH, (get(tx, grant.trash_id),))
    root = get(tx, grant.root_id)
    if not names:
        return Place(segments, names, Area.PRIVATE, (root,), 0, two_folders=view.folders)
    if names[0] == nfc(grant.name):
        rest = names[1:]
    if rest and rest[0] == view.settings.common_name:
        common = get(tx, grant.common_id)
        return _walk(tx, segments, names, rest[1:], Area.COMMON, (root, common))
    return _walk(tx, segments, names, rest, Area.PRIVATE, (root,))


def _within(tx: Read, view: View, segments: tuple[str, ...], names: tuple[str, ...]) -> Place:
    """Follow a path from the only folder of the drive that is seen; none leads out of it.

    The chain begins at the top of the drive all the same: locks above the folder hold it too.

    Raises:
        NotFound: the folder is not there any more.
    """
    folder = view.grant.folder
    assert folder is not None
    chain: tuple[Node, ...] = (get(tx, view.grant.root_id),)
    if folder.common:
        chain += (get(tx, view.grant.common_id),)
    area = Area.COMMON if folder.common else Area.PRIVATE
    place = _walk(tx, segments, names, (*folder.names, *names), area, chain)
    at = len(chain) - 1 + len(folder.names)
    if len(place.chain) <= at or place.chain[at].id != folder.id or not place.chain[at].folder:
        raise NotFound("There is nothing here.")
    return place


def _walk(
    tx: Read,
    segments: tuple[str, ...],
    names: tuple[str, ...],
    rest: tuple[str, ...],
    area: Area,
    chain: tuple[Node, ...],
) -> Place:
    found = list(chain)
    for index, name in enumerate(rest):
        row = tx.one(statements.CHILD, {"parent": found[-1].id, "name": name}) if found[-1].folder else None
        if row is None:
            return Place(segments, names, area, tuple(found), len(rest) - index)
        found.append(node(row))
    return Place(segments, names, area, tuple(found), 0)


def is_inside(tx: Read, node_id: int, folder_id: int) -> bool:
    """Whether a node is the folder or lies anywhere below it.

    Cost: one indexed row per level.
    """
    at: int | None = node_id
    while at is not None:
        if at == folder_id:
            return True
        at = tx.scalar(statements.PARENT_ID, {"id_": at})
    return False


def path_below(tx: Read, node_id: int, folder_id: int) -> tuple[str, ...] | None:
    """The names that lead from a folder down to a node, or None when it lies elsewhere."""
    names: list[str] = []
    at = find(tx, node_id)
    while at is not None and at.id != folder_id:
        names.append(at.name)
        at = find(tx, at.parent_id) if at.parent_id is not None else None
    return tuple(reversed(names)) if at else None


def locked_inside(tx: Read, drive_id: int, folder_id: int) -> list[int]:
    """Nodes with lock rows (expired ones too) that are the folder or lie below it.

    Cost: one index range over the drive's locks, one walk up for each.
    """
    locked = tx.fast(statements.LOCKED_NODES, {"drive_id": drive_id})
    return [node_id for (node_id,) in locked if is_inside(tx, node_id, folder_id)]


def usage(tx: Read, drive_id: int) -> tuple[int, int]:
    """Bytes used and number of files and folders of a drive, the deleted items included.

    Raises:
        NotFound: the drive is gone.
    """
    row = tx.one(statements.DRIVE, {"id_": drive_id})
    if row is None:
        raise NotFound("The drive does not exist any more.")
    return int(row[0]), int(row[1])


def available_bytes(tx: Read, view: View) -> int | None:
    """Bytes that may still be stored, or None without a quota (RFC 4331 §3)."""
    if view.grant.quota_bytes is None:
        return None
    return max(view.grant.quota_bytes - usage(tx, view.grant.drive_id)[0], 0)


# -- what may be done -----------------------------------------------------------------------------


def check_create(view: View, place: Place) -> Node:
    """Whether something may be put at a place, existing or not; returns the folder it goes into.

    Raises:
        Forbidden: a reserved name, one of the fixed folders, inside the deleted items, or beside the two
            folders that the bare URL lists.
        Conflict: the folder it should go into does not exist (RFC 4918 §9.3.1, §9.7.1).
        UriTooLong: deeper than `max_path_depth`.
        InsufficientStorage: the folder is full.
    """
    if place.fixed:
        raise Forbidden("This folder belongs to the drive and cannot be replaced.")
    if place.area is Area.TRASH:
        raise Forbidden("Nothing can be put into the deleted items.")
    parent = place.parent
    if parent is None:
        raise Conflict("The folder it should go into does not exist.")
    if place.missing and place.area is Area.PRIVATE and len(place.chain) == 1 and view.reserved(place.name):
        raise Forbidden("This name belongs to the drive.")
    if place.missing and view.folders and len(place.names) == 1:
        # It would be made, and then not be among what this program is shown there.
        raise Forbidden(f"Please put it into the folder {view.grant.name}.")
    if len(view.above) + len(place.names) > view.settings.max_path_depth:
        raise UriTooLong(f"Folders may be {view.settings.max_path_depth} deep.")
    if place.missing and parent.entries >= view.settings.max_folder_entries:
        raise InsufficientStorage(f"A folder may have {view.settings.max_folder_entries} members.")
    return parent


def check_remove(view: View, place: Place) -> Node:
    """Whether the resource at a place may be deleted or moved away; returns it.

    Raises:
        NotFound: there is nothing.
        Forbidden: one of the fixed folders.
    """
    if place.node is None:
        raise NotFound("There is nothing at this address.")
    if place.fixed:
        raise Forbidden("This folder belongs to the drive and cannot be moved or deleted.")
    return place.node


# -- changing -------------------------------------------------------------------------------------


def begin(tx: Write, view: View, *, now: int | None = None) -> Change:
    """Take change numbers and lock the drive for this transaction; call it first.

    Raises:
        NotFound: the drive is gone.
    """
    count = 4  # what most changes need: the node, its folders
    last = changes.bump(tx, view.grant.collection_id, count)
    return Change(
        tx, view, int(time.time()) if now is None else now, last - count + 1, last - count + 1, last
    )


def _use(change: Change, size: int, count: int) -> None:
    """Account for bytes and nodes.

    Raises:
        InsufficientStorage: quota-not-exceeded, or too many files (RFC 4331 §6).
    """
    grant, settings = change.view.grant, change.view.settings
    row = change.tx.one(statements.USE, {"id_": grant.drive_id, "size": size, "count": count})
    if row is None:
        raise NotFound("The drive does not exist any more.")
    if size > 0 and grant.quota_bytes is not None and row[0] > grant.quota_bytes:
        raise InsufficientStorage(
            f"The drive has {grant.quota_bytes} bytes and they do not suffice.",
            precondition="{DAV:}quota-not-exceeded",
        )
    if count > 0 and row[1] > settings.max_files:
        raise InsufficientStorage(f"A drive may have {settings.max_files} files.")


def _touch(change: Change, folder_id: int, by: int) -> None:
    change.tx.fast(
        statements.MEMBERS,
        {"id_": folder_id, "by": by, "seq": change.number(), "mtime_ms": change.now * 1000},
    )


def _insert(change: Change, parent_id: int | None, name: str, **values: object) -> int:
    parameters = {
        "drive_id": change.view.grant.drive_id,
        "parent_id": parent_id,
        "name": name,
        "seq": change.number(),
        "mtime_ms": change.now * 1000,
        "created_at": change.now,
        **values,
    }
    return int(change.tx.scalar(statements.INSERT, parameters))


def put_file(
    change: Change,
    place: Place,
    content: blobs.StagedBlob,
    *,
    content_type: str | None = None,
    mtime_ms: int | None = None,
) -> Node:
    """Create a file or replace the content of one.

    Args:
        content: staged bytes; published here.
        content_type: as the client gave it; None = guessed from the name when it is read.
        mtime_ms: what the client wants as modification time; None = now.

    Raises:
        Forbidden, Conflict, UriTooLong, InsufficientStorage: see `check_create`, or the quota.
        Conflict: a folder is there.
        Unavailable: the stage's lease ran out.

    Cost: some 8 indexed statements, and one for each extent.
    """
    parent = check_create(change.view, place)
    old = place.node
    if old is not None and old.folder:
        raise Conflict("A folder has this name.")
    _use(change, content.size - (old.size if old else 0), 0 if old else 1)
    values = {
        "size": content.size,
        "content_type": content_type,
        "mtime_ms": change.now * 1000 if mtime_ms is None else mtime_ms,
        "blob_id": blobs.publish(change.tx, content),
    }
    if old is None:
        _touch(change, parent.id, 1)
        return get(change.tx, _insert(change, parent.id, place.name, folder=False, **values))
    change.tx.fast(statements.CONTENT, {"id_": old.id, "seq": change.number(), **values})
    _touch(change, parent.id, 0)
    if old.blob_id is not None:
        blobs.release(change.tx, old.blob_id)
    return get(change.tx, old.id)


def make_folder(change: Change, place: Place, *, mtime_ms: int | None = None) -> Node:
    """Create an empty folder at a place where nothing is.

    Raises:
        Forbidden, Conflict, UriTooLong, InsufficientStorage: see `check_create`.
    """
    parent = check_create(change.view, place)
    if not place.missing:
        raise Conflict("Something has this name already.")
    _use(change, 0, 1)
    _touch(change, parent.id, 1)
    extra = {} if mtime_ms is None else {"mtime_ms": mtime_ms}
    return get(change.tx, _insert(change, parent.id, place.name, folder=True, **extra))


def make_empty_file(change: Change, place: Place) -> Node:
    """Create a file without a byte, as LOCK of an unmapped URL does (RFC 4918 §7.3).

    Raises:
        Forbidden, Conflict, UriTooLong, InsufficientStorage: see `put_file`.
    """
    return put_file(change, place, blobs.staged_bytes(b""))


def set_mtime(change: Change, node_id: int, mtime_ms: int) -> None:
    """Set the modification time a client wants; the content and its ETag stay."""
    change.tx.fast(statements.SET_MTIME, {"id_": node_id, "mtime_ms": mtime_ms})


def _drop_locks(change: Change, node_id: int) -> None:
    """Locks do not travel with a resource (RFC 4918 §7.5, §9.9)."""
    for locked in locked_inside(change.tx, change.view.grant.drive_id, node_id):
        change.tx.fast(statements.DROP_LOCKS, {"id_": locked})


def delete(change: Change, place: Place) -> int | None:
    """Move a resource to the member's deleted items; inside of them, take it out of sight for good.

    Returns:
        None, or the id of a detached node: call `purge` with it after the transaction.

    Raises:
        NotFound: there is nothing.
        Forbidden: a fixed folder, or inside the deleted items while purging over WebDAV is off.

    Spec: RFC 4918 §9.6. Cost: independent of the size of the tree.
    """
    target = check_remove(change.view, place)
    assert target.parent_id is not None
    if place.area is not Area.TRASH:
        to_trash(change, target)
        return None
    if not change.view.settings.purge_over_webdav:
        raise Forbidden("Deleted items are kept; this server does not let programs erase them.")
    _drop_locks(change, target.id)
    _touch(change, target.parent_id, -1)
    _detach(change, target.id)
    return target.id


def _detach(change: Change, node_id: int) -> None:
    """Take a node out of every tree; `expire_trash` purges it if nobody does before."""
    values = {"id_": node_id, "parent_id": None, "name": "", "seq": change.number(), "deleted_at": 0}
    change.tx.fast(statements.RELOCATE, values)


def to_trash(change: Change, target: Node) -> None:
    """Move a node with all below it to the member's deleted items, under a name that is free there."""
    assert target.parent_id is not None, "a root is never deleted"
    trash_id, settings = change.view.grant.trash_id, change.view.settings
    seq = change.number()
    name, attempt = target.name, 1
    while change.tx.one(statements.CHILD, {"parent": trash_id, "name": name}):
        attempt += 1
        # Many deletions of one name: the change number is free for certain.
        name = _numbered(target.name, attempt if attempt < 10 else seq, settings)
    _drop_locks(change, target.id)
    _touch(change, target.parent_id, -1)
    _touch(change, trash_id, 1)
    change.tx.fast(
        statements.RELOCATE,
        {
            "id_": target.id,
            "parent_id": trash_id,
            "name": name,
            "seq": seq,
            "deleted_at": change.now,
            "deleted_from_id": target.parent_id,
            "deleted_name": target.name,
        },
    )


def _make_room(change: Change, source: Place, destination: Place) -> Node:
    """Check a COPY or MOVE and put what is at the destination into the deleted items."""
    assert source.node is not None
    target = check_create(change.view, destination)
    if any(node.id == source.node.id for node in destination.chain):
        raise Forbidden("Nothing can go into itself.")
    if destination.node is not None:
        if any(node.id == destination.node.id for node in source.chain):
            raise Forbidden("A folder cannot be replaced by its own member.")
        to_trash(change, destination.node)
    return target


def move(change: Change, source: Place, destination: Place) -> None:
    """Move a resource with all below it; what it replaces goes to the deleted items.

    Both places were resolved in this transaction. Moving out of the deleted items restores.

    Raises:
        NotFound: there is nothing at the source.
        Forbidden, Conflict, UriTooLong, InsufficientStorage: see `check_remove` and `check_create`.

    Spec: RFC 4918 §9.9. Cost: independent of the size of the tree.
    """
    moved = check_remove(change.view, source)
    assert moved.parent_id is not None
    folder = _make_room(change, source, destination)
    _drop_locks(change, moved.id)
    change.tx.fast(
        statements.RELOCATE,
        {"id_": moved.id, "parent_id": folder.id, "name": destination.name, "seq": change.number()},
    )
    if moved.parent_id == folder.id:
        _touch(change, folder.id, 0)
    else:
        _touch(change, moved.parent_id, -1)
        _touch(change, folder.id, 1)


# -- copying --------------------------------------------------------------------------------------


class SourceChanged(Conflict):
    """The tree being copied changed meanwhile; nothing was published, prepare it again."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A copy on its way: `root_id` is the hidden tree, or None where one transaction does it all."""

    source_id: int
    deep: bool
    root_id: int | None = None
    seen: int = 0  # no change up to this number touched the source since it was read


def prepare_copy(database: Database, view: View, source: Node, *, deep: bool) -> Prepared:
    """Build the copy of a large tree where nobody sees it. Blocking; outside any transaction.

    A small tree, a file, or a folder without its members (`deep` False) needs no preparation. What is
    prepared but not published by `copy` is to be given to `purge`; the retention job finds it otherwise.

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
    prepared = database.write(lambda tx: _stage_folder(begin(tx, view), started))
    root_id = prepared.root_id
    assert root_id is not None
    folders = [(source.id, root_id)]
    try:
        while folders:
            prepared = _copy_folder(database, view, prepared, folders)
    except BaseException:
        purge(database, view.grant.drive_id, root_id)
        raise
    return prepared


def _stage_folder(change: Change, prepared: Prepared) -> Prepared:
    _check_unchanged(change, prepared)
    source = get(change.tx, prepared.source_id)
    _use(change, 0, 1)
    root_id = _insert(change, None, "", folder=True, mtime_ms=source.mtime_ms, deleted_at=change.now)
    change.tx.fast(statements.SET_ENTRIES, {"id_": root_id, "entries": source.entries})
    change.tx.fast(statements.COPY_PROPERTIES, {"id_": source.id, "to": root_id})
    return replace(prepared, root_id=root_id, seen=change.last)


def _copy_folder(
    database: Database, view: View, prepared: Prepared, folders: list[tuple[int, int]]
) -> Prepared:
    """Copy the members of the last of `folders` page by page; its own folders are added there."""
    origin, target = folders.pop()
    after = ""

    def step(tx: Write) -> tuple[str, list[tuple[int, int]], int]:
        change = begin(tx, view)
        _check_unchanged(change, prepared)
        tx.fast(statements.STAGE_BEAT, {"id_": prepared.root_id, "now": change.now})
        return *_copy_page(change, origin, target, after), change.last

    while True:
        after, found, seen = database.write(step)
        prepared = replace(prepared, seen=seen)
        folders += found
        if not after:
            return prepared


def _copy_page(change: Change, origin: int, target: int, after: str) -> tuple[str, list[tuple[int, int]]]:
    """Copy up to a page of members; returns the name to go on after ("" = done) and the pairs of folders."""
    tx = change.tx
    span = {"parent": origin, "to": target, "after": after, "most": _PAGE, "now": change.now}
    rows = tx.fast(statements.COPY_PAGE, {**span, "base": change.numbers(_PAGE)})
    if not rows:
        return "", []
    for _, blob_id, _ in rows:
        if blob_id is not None:
            blobs.share(tx, blob_id)
    _use(change, sum(size for _, _, size in rows), len(rows))
    # The database's own order of names, which need not be Python's.
    last = str(tx.scalar(statements.LAST_NAME, {"id_": target}))
    span["last"] = last
    tx.fast(statements.COPY_PAGE_PROPERTIES, span)
    folders = tx.fast(statements.FOLDERS_OF, span) if any(folder for folder, _, _ in rows) else []
    return last if len(rows) == _PAGE else "", [(int(old), int(new)) for old, new in folders]


def copy(change: Change, source: Place, destination: Place, prepared: Prepared) -> None:
    """Make the copy visible; what it replaces goes to the deleted items. No byte is copied.

    Both places were resolved in this transaction.

    Raises:
        NotFound: there is nothing at the source.
        SourceChanged: the source is not as it was when the hidden copy was built.
        Forbidden, Conflict, UriTooLong, InsufficientStorage: see `check_create`, or the quota.

    Spec: RFC 4918 §9.8. Cost: 20 us per node of a small tree, else independent of its size.
    """
    origin = source.node
    if origin is None:
        raise NotFound("There is nothing at this address.")
    if source.area is Area.TRASH and source.fixed:
        raise Forbidden("The deleted items cannot be copied as a whole.")
    if origin.id != prepared.source_id:
        raise SourceChanged("It changed while it was being copied.")
    if prepared.root_id is not None:
        _check_unchanged(change, prepared)
        staged = find(change.tx, prepared.root_id)
        if staged is None or not staged.deleted_at:
            raise SourceChanged("The copy took too long; please try again.")
    folder = _make_room(change, source, destination)
    _touch(change, folder.id, 1)
    if prepared.root_id is not None:
        values = {"id_": prepared.root_id, "parent_id": folder.id, "name": destination.name}
        change.tx.fast(statements.RELOCATE, {**values, "seq": change.number()})
    else:
        _copy_inline(change, origin, folder.id, destination.name, deep=prepared.deep)


def _copy_inline(change: Change, origin: Node, folder_id: int, name: str, *, deep: bool) -> None:
    _use(change, origin.size, 1)
    if origin.blob_id is not None:
        blobs.share(change.tx, origin.blob_id)
    values = {
        "folder": origin.folder,
        "size": origin.size,
        "content_type": origin.content_type,
        "mtime_ms": origin.mtime_ms,
        "blob_id": origin.blob_id,
    }
    top = _insert(change, folder_id, name, **values)
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


def _check_unchanged(change: Change, prepared: Prepared) -> None:
    """Whether other transactions since the last look changed anything below the source.

    A folder's number counts its members' coming, going and content, so nothing is missed.
    """
    if change.first == prepared.seen + 1:
        return
    span = {"after": prepared.seen, "before": change.first, "drive_id": change.view.grant.drive_id}
    for (node_id,) in change.tx.fast(statements.CHANGED_BETWEEN, span):
        if is_inside(change.tx, node_id, prepared.source_id):
            raise SourceChanged("It changed while it was being copied; please try again.")


# -- erasing --------------------------------------------------------------------------------------


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
    top = find(tx, node_id)
    if top is None:
        return True
    if top.parent_id is not None or top.deleted_at is None:
        raise Conflict("It was restored meanwhile.")
    erased = size = 0
    at = top
    while erased < _PURGED_AT_ONCE:
        members = list_page(tx, at.id, most=_PURGE_LOOK)
        if not members:
            _erase(tx, at)
            erased += 1
            size += at.size
            if at.id == node_id:
                break
            assert at.parent_id is not None
            at = get(tx, at.parent_id)
            continue
        for member in members:
            if not member.folder:
                _erase(tx, member)
                erased += 1
                size += member.size
        at = next((member for member in members if member.folder), at)
    tx.fast(statements.USE, {"id_": drive_id, "size": -size, "count": -erased})
    return at.id == node_id and find(tx, node_id) is None


def _erase(tx: Write, gone: Node) -> None:
    tx.fast(statements.DROP_NODE, {"id_": gone.id})
    if gone.blob_id is not None:
        blobs.release(tx, gone.blob_id)


def _lock_drive(tx: Write, drive_id: int) -> int:
    """`begin` without a member: take a change number; returns it."""
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
        if database.write(lambda tx, d=drive_id, n=node_id: _expire(tx, d, n, before, now)):  # type: ignore[misc]
            purge(database, drive_id, node_id)
            erased += 1
    return erased


def _expire(tx: Write, drive_id: int, node_id: int, before: int, now: int) -> bool:
    """Detach an expired node; False when it was restored or erased meanwhile."""
    seq = _lock_drive(tx, drive_id)
    found = find(tx, node_id)
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
        database.write(lambda tx, d=drive_id, n=node_id: _detach_root(tx, d, n, account_id))  # type: ignore[misc]
        purge(database, drive_id, node_id)


def _detach_root(tx: Write, drive_id: int, node_id: int, account_id: int) -> None:
    """Close a drive to its member and make one of its two roots a tree that `purge` takes."""
    seq = _lock_drive(tx, drive_id)
    tx.fast(statements.DROP_MEMBER, {"drive_id": drive_id, "account_id": account_id})
    tx.fast(statements.RELOCATE, {"id_": node_id, "parent_id": None, "name": "", "seq": seq, "deleted_at": 0})
    tx.fast(statements.USE, {"id_": drive_id, "size": 0, "count": 1})  # roots are not counted, trees are
