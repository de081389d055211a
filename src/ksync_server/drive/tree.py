"""The files of a drive: paths to nodes, and the changes of the tree; copying.py copies, erasing.py erases.

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
from dataclasses import dataclass
from enum import StrEnum

from ksync_server import settings as configuration
from ksync_server.auth.gate import DriveGrant
from ksync_server.drive import statements
from ksync_server.errors import BadRequest, Conflict, Forbidden, InsufficientStorage, NotFound, UriTooLong
from ksync_server.store import blobs, changes
from ksync_server.store.database import Read, Row, Write

_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f/\ud800-\udfff\ufffe\uffff]")
PAGE = 200  # nodes of one step of a longer work: some 4 ms


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
            self._last = changes.bump(self.tx, self.view.grant.collection_id, PAGE)
            self._next = self._last - PAGE + 1
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


def list_page(tx: Read, parent_id: int, after: str = "", most: int = PAGE) -> list[Node]:
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


def use(change: Change, size: int, count: int) -> None:
    """Account for bytes and nodes.

    Raises:
        NotFound: the drive is gone.
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


def touch(change: Change, folder_id: int, by: int) -> None:
    """Give a folder a new number and modification time, and `by` members more."""
    change.tx.fast(
        statements.MEMBERS,
        {"id_": folder_id, "by": by, "seq": change.number(), "mtime_ms": change.now * 1000},
    )


def insert(change: Change, parent_id: int | None, name: str, **values: object) -> int:
    """Write the row of a new node, `values` over what is usual; returns its id."""
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
    use(change, content.size - (old.size if old else 0), 0 if old else 1)
    values = {
        "size": content.size,
        "content_type": content_type,
        "mtime_ms": change.now * 1000 if mtime_ms is None else mtime_ms,
        "blob_id": blobs.publish(change.tx, content),
    }
    if old is None:
        touch(change, parent.id, 1)
        return get(change.tx, insert(change, parent.id, place.name, folder=False, **values))
    change.tx.fast(statements.CONTENT, {"id_": old.id, "seq": change.number(), **values})
    touch(change, parent.id, 0)
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
    use(change, 0, 1)
    touch(change, parent.id, 1)
    extra = {} if mtime_ms is None else {"mtime_ms": mtime_ms}
    return get(change.tx, insert(change, parent.id, place.name, folder=True, **extra))


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
        None, or the id of a detached node: call `erasing.purge` with it after the transaction.

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
    touch(change, target.parent_id, -1)
    _detach(change, target.id)
    return target.id


def _detach(change: Change, node_id: int) -> None:
    """Take a node out of every tree; `erasing.expire_trash` purges it if nobody does before."""
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
    touch(change, target.parent_id, -1)
    touch(change, trash_id, 1)
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


def make_room(change: Change, source: Place, destination: Place) -> Node:
    """Check a COPY or MOVE and put what is at the destination into the deleted items.

    Returns:
        The folder that the destination is in.

    Raises:
        Forbidden: one of the places lies inside the other.
        Forbidden, Conflict, UriTooLong, InsufficientStorage: see `check_create`.
    """
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
    folder = make_room(change, source, destination)
    _drop_locks(change, moved.id)
    change.tx.fast(
        statements.RELOCATE,
        {"id_": moved.id, "parent_id": folder.id, "name": destination.name, "seq": change.number()},
    )
    if moved.parent_id == folder.id:
        touch(change, folder.id, 0)
    else:
        touch(change, moved.parent_id, -1)
        touch(change, folder.id, 1)
