"""The tree of a drive: names, places, changes, deleted items, copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from ksync_server import settings
from ksync_server.auth.gate import DriveGrant
from ksync_server.drive import copying, erasing, tree
from ksync_server.errors import (
    BadRequest,
    ClientError,
    Conflict,
    Forbidden,
    InsufficientStorage,
    NotFound,
    UriTooLong,
)
from ksync_server.store import blobs
from ksync_server.store import tables as t
from tests.drive.harness import NOW, Drive

T = TypeVar("T")


class User:
    """A member who works on the drive, each step a transaction of its own."""

    def __init__(self, drive: Drive, grant: DriveGrant | None = None, **changed: object) -> None:
        self.drive = drive
        self.view = drive.view(grant, **changed)

    def change(self, fn: Callable[[tree.Change], T], now: int = NOW) -> T:
        return self.drive.database.write(lambda tx: fn(tree.begin(tx, self.view, now=now)))

    def resolve(self, path: str) -> tree.Place:
        with self.drive.database.read() as tx:
            return tree.resolve(tx, self.view, segments(path))

    def at(self, change: tree.Change, path: str) -> tree.Place:
        return tree.resolve(change.tx, self.view, segments(path))

    def put(self, path: str, content: bytes = b"content") -> tree.Node:
        staged = blobs.staged_bytes(content)
        return self.change(lambda change: tree.put_file(change, self.at(change, path), staged))

    def mkdir(self, path: str) -> tree.Node:
        return self.change(lambda change: tree.make_folder(change, self.at(change, path)))

    def delete(self, path: str, now: int = NOW) -> None:
        detached = self.change(lambda change: tree.delete(change, self.at(change, path)), now)
        if detached is not None:
            erasing.purge(self.drive.database, self.view.grant.drive_id, detached)

    def move(self, source: str, destination: str) -> None:
        self.change(lambda change: tree.move(change, self.at(change, source), self.at(change, destination)))

    def prepare(self, source: str, *, deep: bool = True) -> copying.Prepared:
        node = self.resolve(source).node
        assert node is not None
        return copying.prepare_copy(self.drive.database, self.view, node, deep=deep)

    def copy(self, source: str, destination: str, *, deep: bool = True) -> None:
        self.publish(source, destination, self.prepare(source, deep=deep))

    def publish(self, source: str, destination: str, prepared: copying.Prepared) -> None:
        self.change(
            lambda change: copying.copy(
                change, self.at(change, source), self.at(change, destination), prepared
            )
        )

    def names(self, path: str) -> list[str]:
        node = self.resolve(path).node
        assert node is not None
        with self.drive.database.read() as tx:
            return sorted(member.name for member in tree.list_page(tx, node.id, most=1000))

    def content(self, path: str) -> bytes:
        node = self.resolve(path).node
        assert node is not None
        assert node.blob_id is not None
        with self.drive.database.read() as tx:
            return blobs.content(tx, node.blob_id).content or b""

    def usage(self) -> tuple[int, int]:
        with self.drive.database.read() as tx:
            return tree.usage(tx, self.view.grant.drive_id)

    def count(self, table: sa.Table) -> int:
        with self.drive.database.read() as tx:
            return int(tx.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def segments(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part)


@pytest.fixture
def alice(drive: Drive) -> User:
    return User(drive)


@pytest.fixture
def bob(drive: Drive) -> User:
    return User(drive, drive.bob)


# -- names ----------------------------------------------------------------------------------------

LIMITS = settings.Drive()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a\0b", "a/b", "new\nline", "\x7f", "\x85", "\ufffe", "\ud800"]
)
def test_names_that_no_file_system_or_xml_carries_are_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        tree.checked_name(name, LIMITS)


def test_a_name_is_stored_composed_and_its_bytes_are_counted_then() -> None:
    assert tree.checked_name("cafe\u0301", LIMITS) == "caf\u00e9"
    assert tree.checked_name("e\u0301" * 127 + "z", LIMITS) == "\u00e9" * 127 + "z"
    with pytest.raises(UriTooLong):
        tree.checked_name("\u00e9" * 128, LIMITS)


@given(st.text())
def test_any_text_is_a_stored_name_or_a_client_error(text: str) -> None:
    try:
        name = tree.checked_name(text, LIMITS)
    except ClientError:
        return
    assert tree.checked_name(name, LIMITS) == name
    assert len(name.encode()) <= LIMITS.max_name_bytes


def test_every_nasty_name_can_be_put_found_moved_and_deleted(
    alice: User, nasty_names: tuple[str, ...]
) -> None:
    view = alice.view
    alice.mkdir("/to")
    for name in nasty_names:
        try:
            tree.checked_name(name, LIMITS)
        except BadRequest:
            continue
        staged = blobs.staged_bytes(name.encode())

        alice.change(
            lambda change, n=name, s=staged: tree.put_file(change, tree.resolve(change.tx, view, (n,)), s)
        )
        alice.change(
            lambda change, n=name: tree.move(
                change, tree.resolve(change.tx, view, (n,)), tree.resolve(change.tx, view, ("to", n))
            )
        )
    assert len(alice.names("/to")) >= 24
    alice.delete("/to")
    assert alice.names("/") == []


# -- places ---------------------------------------------------------------------------------------


def test_both_forms_of_a_path_are_the_same_place(alice: User) -> None:
    alice.put("/a.txt")
    short, long = alice.resolve("/a.txt"), alice.resolve("/Team files/a.txt")
    assert short.node == long.node
    assert long.segments == ("Team files", "a.txt")
    assert alice.resolve("/").node == alice.resolve("/Team files").node


def test_common_documents_are_one_folder_for_all_members_and_private_roots_are_not(
    alice: User, bob: User
) -> None:
    alice.put("/Common documents/shared.txt", b"for all")
    alice.put("/mine.txt")
    assert bob.content("/Team files/Common documents/shared.txt") == b"for all"
    assert bob.resolve("/mine.txt").node is None


@pytest.mark.parametrize("name", ["Deleted items", "Team files", "Common documents"])
def test_reserved_names_are_not_made_replaced_moved_or_deleted(alice: User, name: str) -> None:
    alice.put("/a.txt")
    for path in (f"/{name}", f"/Team files/{name}"):
        with pytest.raises(Forbidden):
            alice.put(path)
        with pytest.raises(Forbidden):
            alice.mkdir(path)
        with pytest.raises(Forbidden):
            alice.move("/a.txt", path)
        with pytest.raises((Forbidden, NotFound)):
            alice.delete(path)
        with pytest.raises((Forbidden, NotFound)):
            alice.move(path, "/elsewhere")
    assert alice.names("/") == ["a.txt"]


def test_reserved_names_are_free_in_deeper_folders(alice: User) -> None:
    alice.mkdir("/f")
    alice.mkdir("/f/Deleted items")
    assert alice.names("/f") == ["Deleted items"]


@pytest.mark.spec("RFC 4918 §9.7.1")
def test_a_missing_parent_or_a_file_as_parent_is_a_conflict(alice: User) -> None:
    with pytest.raises(Conflict):
        alice.put("/no/a.txt")
    alice.put("/file")
    with pytest.raises(Conflict):
        alice.put("/file/a.txt")
    assert alice.resolve("/file/a.txt").node is None


def test_limits_of_depth_and_members_are_exact(drive: Drive) -> None:
    user = User(drive, max_path_depth=3, max_folder_entries=2)
    user.mkdir("/a")
    user.mkdir("/a/b")
    user.mkdir("/a/b/c")
    with pytest.raises(UriTooLong):
        user.mkdir("/a/b/c/d")
    user.put("/a/b/d")
    with pytest.raises(InsufficientStorage):
        user.put("/a/b/e")
    user.put("/a/b/d", b"replacing is no new member")


# -- content and accounts -------------------------------------------------------------------------


def test_each_content_of_a_path_has_a_number_of_its_own(alice: User) -> None:
    seen = set()
    for content in (b"1", b"2", b"1"):
        seen.add(alice.put("/a", content).seq)
    alice.put("/b", b"3")
    alice.move("/b", "/a")
    node = alice.resolve("/a").node
    assert node is not None
    seen.add(node.seq)
    alice.mkdir("/f")
    alice.put("/f/x")
    alice.copy("/f", "/g")
    for path in ("/f/x", "/g/x"):
        node = alice.resolve(path).node
        assert node is not None
        seen.add(node.seq)
    assert len(seen) == 6


def test_usage_counts_files_folders_copies_and_deleted_items(alice: User) -> None:
    alice.put("/a", b"12345")
    alice.put("/a", b"123")
    alice.mkdir("/f")
    alice.copy("/a", "/f/a")
    assert alice.usage() == (6, 3)
    alice.delete("/f")
    assert alice.usage() == (6, 3)


@pytest.mark.spec("RFC 4331 §6")
def test_the_quota_is_exact_and_a_refused_put_leaves_the_old_content(drive: Drive) -> None:
    user = User(drive, replace(drive.alice, quota_bytes=10))
    user.put("/a", b"0123456789")
    with pytest.raises(InsufficientStorage) as caught:
        user.put("/a", b"0123456789+")
    assert caught.value.precondition == "{DAV:}quota-not-exceeded"
    with pytest.raises(InsufficientStorage):
        user.copy("/a", "/b")
    assert user.content("/a") == b"0123456789"
    assert user.usage() == (10, 1)
    user.put("/a", b"shorter")
    user.put("/b", b"")


def test_the_number_of_files_has_a_limit(drive: Drive) -> None:
    user = User(drive, max_files=2)
    user.put("/a")
    user.mkdir("/f")
    with pytest.raises(InsufficientStorage):
        user.put("/b")
    assert user.usage()[1] == 2


def test_replaced_content_is_released_and_shared_content_stays(alice: User) -> None:
    alice.put("/a", b"one")
    alice.copy("/a", "/b")
    assert alice.count(t.blob) == 1
    alice.put("/a", b"two")
    assert alice.content("/b") == b"one"
    alice.put("/b", b"three")
    assert alice.count(t.blob) == 2


# -- deleting -------------------------------------------------------------------------------------


def test_deleted_things_are_in_the_members_own_deleted_items_and_can_be_restored(
    alice: User, bob: User
) -> None:
    alice.mkdir("/Common documents/f")
    alice.put("/Common documents/f/a.txt", b"kept")
    bob.delete("/Common documents/f")
    assert alice.names("/Common documents") == []
    assert alice.names("/Deleted items") == []
    assert bob.content("/Deleted items/f/a.txt") == b"kept"
    deleted = bob.resolve("/Deleted items/f").node
    assert deleted is not None
    assert (deleted.deleted_at, deleted.deleted_name) == (NOW, "f")
    bob.move("/Deleted items/f", "/Common documents/f")
    assert alice.content("/Common documents/f/a.txt") == b"kept"
    restored = alice.resolve("/Common documents/f").node
    assert restored is not None
    assert restored.deleted_at is None


def test_things_of_one_name_all_stay_in_the_deleted_items(alice: User) -> None:
    for number in range(14):
        alice.put("/a.txt", str(number).encode())
        alice.delete("/a.txt")
    names = alice.names("/Deleted items")
    assert len(names) == 14
    assert {"a.txt", "a (2).txt", "a (9).txt"} <= set(names)
    assert {alice.content(f"/Deleted items/{name}") for name in names} == {
        str(number).encode() for number in range(14)
    }


def test_a_deleted_name_of_the_greatest_length_gets_a_number_that_fits(alice: User) -> None:
    name = "\u00e9" * 125 + ".txt"
    for _ in range(2):
        alice.put(f"/{name}")
        alice.delete(f"/{name}")
    assert all(len(found.encode()) <= 255 for found in alice.names("/Deleted items"))
    assert len(alice.names("/Deleted items")) == 2


def test_nothing_is_put_into_or_erased_from_the_deleted_items(alice: User) -> None:
    alice.put("/a")
    alice.delete("/a")
    for refused in (
        lambda: alice.put("/Deleted items/b"),
        lambda: alice.put("/Deleted items/a"),
        lambda: alice.mkdir("/Deleted items/b"),
        lambda: alice.move("/Deleted items/a", "/Deleted items/b"),
        lambda: alice.delete("/Deleted items/a"),
        lambda: alice.copy("/Deleted items", "/all"),
    ):
        with pytest.raises(Forbidden):
            refused()
    assert alice.names("/Deleted items") == ["a"]


def test_purging_over_webdav_can_be_allowed_and_gives_the_room_back(drive: Drive) -> None:
    user = User(drive, purge_over_webdav=True)
    user.mkdir("/f")
    for folder in ("/f/g", "/f/h"):
        user.mkdir(folder)
        for number in range(3):
            user.put(f"{folder}/{number}")
    user.delete("/f")
    user.delete("/Deleted items/f")
    assert user.usage() == (0, 0)
    assert user.count(t.blob) == 0
    assert user.names("/Deleted items") == []


def test_the_retention_job_erases_what_is_older_than_its_days_and_nothing_else(alice: User) -> None:
    day = 86400
    alice.mkdir("/old")
    for number in range(450):
        alice.put(f"/old/{number}", b"x")
    alice.put("/young")
    alice.put("/kept")
    alice.delete("/old", now=NOW)
    alice.delete("/young", now=NOW + day)
    database, limits = alice.drive.database, alice.view.settings
    assert erasing.expire_trash(database, limits, NOW + 30 * day) == 0
    assert erasing.expire_trash(database, limits, NOW + 30 * day + 1) == 1
    assert alice.names("/Deleted items") == ["young"]
    assert alice.usage() == (14, 2)
    assert alice.count(t.blob) == 2


# -- moving and copying ---------------------------------------------------------------------------


@pytest.mark.spec("RFC 4918 §9.9.3")
def test_what_a_move_or_copy_replaces_is_in_the_deleted_items(alice: User) -> None:
    alice.put("/a", b"a")
    alice.put("/b", b"b")
    alice.move("/a", "/b")
    assert alice.content("/b") == b"a"
    assert alice.content("/Deleted items/b") == b"b"
    alice.put("/c", b"c")
    alice.copy("/c", "/b")
    assert alice.content("/Deleted items/b (2)") == b"a"


def test_nothing_moves_or_is_copied_into_itself_or_over_its_own_folder(alice: User) -> None:
    alice.mkdir("/f")
    alice.mkdir("/f/g")
    for operation in (alice.move, alice.copy):
        for source, destination in (("/f", "/f/g/h"), ("/f", "/f"), ("/f/g", "/f"), ("/f", "/Team files/f")):
            with pytest.raises(Forbidden):
                operation(source, destination)
    with pytest.raises(Forbidden):
        alice.copy("/", "/Common documents/all")
    assert alice.names("/f") == ["g"]


@pytest.mark.spec("RFC 4918 §9.8.3")
def test_a_shallow_copy_of_a_folder_has_no_members(alice: User) -> None:
    alice.mkdir("/f")
    alice.put("/f/a")
    alice.copy("/f", "/g", deep=False)
    assert alice.names("/g") == []
    made = alice.resolve("/g").node
    assert made is not None
    assert made.entries == 0


def _grow(user: User, path: str, files: int) -> None:
    """A tree of folders with files, written as rows at once."""
    user.mkdir(path)
    for folder in ("", "/x", "/x/y", "/z"):
        if folder:
            user.mkdir(path + folder)
        for number in range(0, files, 100):
            names = range(number, min(number + 100, files))

            def fill(change: tree.Change, folder: str = folder, names: range = names) -> None:
                for name in names:
                    place = user.at(change, f"{path}{folder}/{name}")
                    tree.put_file(change, place, blobs.staged_bytes(f"{folder}{name}".encode()))

            user.change(fill)


def _property(user: User, path: str) -> None:
    node = user.resolve(path).node
    assert node is not None
    row = {"node_id": node.id, "name": "{urn:x}p", "xml": f"<p xmlns='urn:x'>{path}</p>"}
    user.drive.database.write(lambda tx: tx.execute(sa.insert(t.node_property).values(**row)))


def _properties(user: User, path: str) -> list[str]:
    node = user.resolve(path).node
    assert node is not None
    statement = sa.select(t.node_property.c.xml).where(t.node_property.c.node_id == node.id)
    with user.drive.database.read() as tx:
        return [row[0] for row in tx.execute(statement)]


@pytest.mark.spec("RFC 4918 §9.8.2")
@pytest.mark.parametrize("files", [3, 230])
def test_a_copied_tree_has_all_files_and_properties_and_no_byte_twice(alice: User, files: int) -> None:
    _grow(alice, "/t", files)
    for path in ("/t", "/t/x/y", "/t/x/y/1"):
        _property(alice, path)
    stored = alice.count(t.blob)
    alice.copy("/t", "/copy")
    for folder in ("", "/x", "/x/y", "/z"):
        assert alice.names(f"/copy{folder}") == alice.names(f"/t{folder}")
        original, made = alice.resolve(f"/t{folder}").node, alice.resolve(f"/copy{folder}").node
        assert original is not None
        assert made is not None
        assert original.entries == made.entries
    assert alice.content("/copy/x/y/1") == b"/x/y1"
    for path in ("", "/x/y", "/x/y/1"):
        assert _properties(alice, f"/copy{path}") == [f"<p xmlns='urn:x'>/t{path}</p>"]
    assert alice.count(t.blob) == stored
    count = alice.usage()[1]
    assert count == 2 * (4 + 4 * files)
    alice.put("/copy/z/1", b"changed")
    assert alice.content("/t/z/1") == b"/z1"


def test_a_tree_that_changes_while_it_is_copied_is_not_published_and_can_be_tried_again(alice: User) -> None:
    _grow(alice, "/t", 60)
    alice.put("/other")
    prepared = alice.prepare("/t")
    assert prepared.root_id is not None
    alice.put("/t/x/y/new")
    with pytest.raises(copying.SourceChanged):
        alice.publish("/t", "/copy", prepared)
    erasing.purge(alice.drive.database, alice.view.grant.drive_id, prepared.root_id)
    before = alice.usage()
    prepared = alice.prepare("/t")
    alice.put("/other", b"changes elsewhere do not matter")
    alice.publish("/t", "/copy", prepared)
    assert "new" in alice.names("/copy/x/y")
    assert alice.usage()[1] == before[1] + 4 + 241


def test_a_copy_over_the_quota_leaves_nothing_behind(drive: Drive) -> None:
    _grow(User(drive), "/t", 60)
    before = User(drive).usage()
    user = User(drive, replace(drive.alice, quota_bytes=before[0] + before[0] // 2))
    with pytest.raises(InsufficientStorage):
        user.copy("/t", "/copy")
    assert user.usage() == before
    assert user.names("/") == ["t"]


def test_an_abandoned_hidden_copy_is_erased_and_cannot_be_published_later(alice: User) -> None:
    _grow(alice, "/t", 60)
    before = alice.usage()
    prepared = alice.prepare("/t")
    assert alice.usage() != before
    database, limits = alice.drive.database, alice.view.settings
    with database.read() as tx:
        assert prepared.root_id is not None
        staged = tree.get(tx, prepared.root_id)
    assert staged.deleted_at is not None
    assert erasing.expire_trash(database, limits, staged.deleted_at + 3600) == 0
    assert erasing.expire_trash(database, limits, staged.deleted_at + 3601) == 1
    assert alice.usage() == before
    alice.put("/copy", b"stays")
    with pytest.raises(copying.SourceChanged):
        alice.publish("/t", "/copy", prepared)
    assert alice.content("/copy") == b"stays"


@pytest.mark.spec("RFC 4918 §7.5")
def test_locks_stay_behind_when_a_tree_moves_or_is_deleted(alice: User) -> None:
    alice.mkdir("/f")
    inside, outside = alice.put("/f/a"), alice.put("/b")
    for node in (inside, outside):
        row = {
            "token": f"urn:uuid:{node.id}",
            "drive_id": alice.view.grant.drive_id,
            "node_id": node.id,
            "account_id": alice.view.grant.account_id,
            "exclusive": True,
            "infinite": False,
            "timeout_s": 60,
            "expires_at": NOW + 60,
            "root": "/",
        }
        alice.drive.database.write(lambda tx, row=row: tx.execute(sa.insert(t.lock).values(**row)))
    alice.move("/f", "/g")
    assert alice.count(t.lock) == 1
    alice.delete("/b")
    assert alice.count(t.lock) == 0
