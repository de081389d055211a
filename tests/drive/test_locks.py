"""Locks as rows: what they cover, what stands in the way of a new one, when they end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

from ksync_server.auth.gate import DriveGrant
from ksync_server.drive import locks, tree
from ksync_server.errors import InsufficientStorage
from ksync_server.store import blobs
from ksync_server.store.database import Read, Write
from ksync_server.wire import xml
from tests.drive.harness import NOW, Drive

T = TypeVar("T")


class Tree:
    """`/a/b/c.txt` of alice, and locks on it by path."""

    def __init__(self, drive: Drive) -> None:
        self.drive = drive
        self.view = drive.view()
        self.drive_id = drive.alice.drive_id
        for path in ("a", "a/b"):
            self.change(lambda change, path=path: tree.make_folder(change, self.at(change.tx, path)))
        content = blobs.staged_bytes(b"content")
        self.change(lambda change: tree.put_file(change, self.at(change.tx, "a/b/c.txt"), content))

    def change(self, fn: Callable[[tree.Change], T]) -> T:
        return self.drive.database.write(lambda tx: fn(tree.begin(tx, self.view, now=NOW)))

    def at(self, tx: Read, path: str) -> tree.Place:
        return tree.resolve(tx, self.view, tuple(path.split("/")) if path else ())

    def lock(
        self, path: str, *, exclusive: bool = True, infinite: bool = False, by: DriveGrant | None = None
    ) -> locks.Lock:
        def take(tx: Write) -> locks.Lock:
            place = self.at(tx, path)
            assert place.node is not None
            owner = (by or self.drive.alice).account_id
            lock = locks.Lock(
                locks.new_token(), place.node.id, owner, exclusive, infinite, "", 60, NOW + 60, place.segments
            )
            locks.create(tx, self.drive_id, lock, self.view.settings, NOW)
            return lock

        return self.drive.database.write(take)

    def covering(self, path: str, now: int = NOW) -> set[str]:
        with self.drive.database.read() as tx:
            found = locks.covering(tx, self.drive_id, self.at(tx, path).chain, now)
        return {lock.token for lock in found}

    def conflicts(self, path: str, *, exclusive: bool = True, infinite: bool = False) -> set[str]:
        with self.drive.database.read() as tx:
            place = self.at(tx, path)
            found = locks.conflicting(tx, self.drive_id, place, NOW, exclusive=exclusive, infinite=infinite)
        return {lock.token for lock in found}


@pytest.fixture
def files(drive: Drive) -> Tree:
    return Tree(drive)


@pytest.mark.spec("RFC 4918 §7.5")
def test_an_infinite_lock_covers_all_below_and_a_shallow_one_its_root_alone(files: Tree) -> None:
    deep = files.lock("a", infinite=True, exclusive=False)
    shallow = files.lock("a/b", exclusive=False)
    assert files.covering("a") == {deep.token}
    assert files.covering("a/b") == {deep.token, shallow.token}
    assert files.covering("a/b/c.txt") == {deep.token}


@pytest.mark.spec("RFC 4918 §7.4")
def test_a_place_where_nothing_is_has_the_locks_of_its_folder(files: Tree) -> None:
    shallow = files.lock("a/b")
    assert files.covering("a/b/new.txt") == {shallow.token}
    assert files.covering("a/new.txt") == set()


def test_both_addresses_of_a_place_share_their_locks(files: Tree) -> None:
    lock = files.lock("a/b")
    assert files.covering("Team files/a/b") == {lock.token}


def test_a_lock_in_common_documents_is_seen_by_every_member(files: Tree) -> None:
    files.change(lambda change: tree.make_folder(change, files.at(change.tx, "Common documents/shared")))
    lock = files.lock("Common documents/shared")
    with files.drive.database.read() as tx:
        place = tree.resolve(tx, files.drive.view(files.drive.bob), ("Common documents", "shared"))
        found = locks.covering(tx, files.drive_id, place.chain, NOW)
    assert found == (lock,)


@pytest.mark.spec("RFC 4918 §6.6")
def test_an_expired_lock_vanishes_on_its_second(files: Tree) -> None:
    lock = files.lock("a")
    assert files.covering("a", NOW + 59) == {lock.token}
    assert files.covering("a", NOW + 60) == set()


@pytest.mark.spec("RFC 4918 §9.10.2")
def test_a_refreshed_lock_lives_on_from_now(files: Tree) -> None:
    lock = files.lock("a")
    files.drive.database.write(lambda tx: locks.refresh(tx, lock.token, 100, NOW + 50))
    assert files.covering("a", NOW + 149) == {lock.token}
    assert files.covering("a", NOW + 150) == set()


def test_a_lock_outlives_a_clock_that_goes_back_and_its_holder_refreshes_it(files: Tree) -> None:
    lock, then = files.lock("a"), NOW - 86_400
    assert files.covering("a", then) == {lock.token}
    assert "<d:timeout>Second-60</d:timeout>" in locks.discovery_xml((lock,), "/".join, then)
    files.drive.database.write(lambda tx: locks.refresh(tx, lock.token, 60, then))
    assert files.covering("a", then + 59) == {lock.token}
    assert files.covering("a", then + 60) == set()


def test_a_lock_whose_holder_has_gone_shuts_nobody_out_for_as_long_as_the_clock_went_back(
    files: Tree,
) -> None:
    kept, then = files.lock("a"), NOW - 86_400
    shorten = files.drive.database.write(lambda tx: locks.shorten(tx, NOW - 600))
    assert shorten == 0, "nodes may differ by some minutes"
    assert files.drive.database.write(lambda tx: locks.shorten(tx, then)) == 1
    assert files.covering("a", then + 59) == {kept.token}
    assert files.covering("a", then + 60) == set()


def test_a_lock_ends_where_the_clock_goes_ahead_and_its_token_opens_nothing_any_more(files: Tree) -> None:
    files.lock("a")
    assert files.covering("a", NOW + 86_400) == set()
    other = files.lock("a/b", by=files.drive.bob)
    assert files.covering("a/b") >= {other.token}


def test_a_released_lock_is_gone(files: Tree) -> None:
    lock = files.lock("a")
    files.drive.database.write(lambda tx: locks.release(tx, lock.token))
    assert files.covering("a") == set()


@pytest.mark.spec("RFC 4918 §9.10.5")
@pytest.mark.parametrize(
    ("held", "asked", "conflict"),
    [(True, True, True), (True, False, True), (False, True, True), (False, False, False)],
)
def test_only_shared_locks_stand_beside_each_other(
    files: Tree, held: bool, asked: bool, conflict: bool
) -> None:
    lock = files.lock("a/b", exclusive=held)
    assert files.conflicts("a/b", exclusive=asked) == ({lock.token} if conflict else set())


@pytest.mark.spec("RFC 4918 §7.7")
def test_an_infinite_lock_conflicts_with_locks_below_and_a_shallow_one_does_not(files: Tree) -> None:
    inner = files.lock("a/b/c.txt")
    assert files.conflicts("a", infinite=True) == {inner.token}
    assert files.conflicts("a", infinite=True, exclusive=False) == {inner.token}
    assert files.conflicts("a", infinite=False) == set()


def test_a_new_member_conflicts_with_the_infinite_lock_above_and_not_with_the_shallow_one(
    files: Tree,
) -> None:
    files.lock("a/b")
    assert files.conflicts("a/b/new.txt") == set()
    deep = files.lock("a", infinite=True, exclusive=False)
    assert files.conflicts("a/b/new.txt") == {deep.token}


def test_locks_below_a_folder_are_found_without_its_own(files: Tree) -> None:
    files.lock("a")
    inner = files.lock("a/b/c.txt")
    with files.drive.database.read() as tx:
        folder = files.at(tx, "a").node
        assert folder is not None
        assert locks.inside(tx, files.drive_id, folder.id, NOW) == (inner,)


def test_a_listing_gets_all_locks_by_node(files: Tree) -> None:
    first = files.lock("a/b", exclusive=False)
    second = files.lock("a/b", exclusive=False, by=files.drive.bob)
    with files.drive.database.read() as tx:
        found = locks.by_node(tx, files.drive_id, NOW)
    assert {node: set(here) for node, here in found.items()} == {first.node_id: {first, second}}


def test_an_account_holds_a_bounded_number_of_locks_and_expired_ones_do_not_count(drive: Drive) -> None:
    files = Tree(drive)
    files.view = drive.view(max_locks=2)
    files.lock("a", exclusive=False)
    files.lock("a", exclusive=False)
    with pytest.raises(InsufficientStorage):
        files.lock("a", exclusive=False)
    files.lock("a", exclusive=False, by=drive.bob)
    later = locks.Lock("urn:x", 0, drive.alice.account_id, False, False, "", 60, NOW + 999, ("a",))

    def take(tx: Write) -> None:
        node = files.at(tx, "a").node
        assert node is not None
        kept = locks.Lock(**{**{f: getattr(later, f) for f in later.__slots__}, "node_id": node.id})
        locks.create(tx, files.drive_id, kept, files.view.settings, NOW + 60)

    drive.database.write(take)
    assert files.covering("a", NOW + 60) == {"urn:x"}


@pytest.mark.spec("RFC 4918 §9.9")
def test_locks_do_not_travel_with_what_they_locked(files: Tree) -> None:
    files.lock("a/b/c.txt")
    files.change(lambda change: tree.move(change, files.at(change.tx, "a/b"), files.at(change.tx, "moved")))
    assert files.covering("moved/c.txt") == set()
    with files.drive.database.read() as tx:
        assert locks.by_node(tx, files.drive_id, NOW) == {}


@pytest.mark.spec("RFC 4918 §6.5")
def test_tokens_are_uris_that_never_repeat() -> None:
    tokens = {locks.new_token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert all(token.startswith("opaquelocktoken:") for token in tokens)


def test_the_folders_of_the_drive_take_no_locks(files: Tree) -> None:
    with files.drive.database.read() as tx:
        assert not any(
            locks.lockable(files.at(tx, path))
            for path in ("", "Team files", "Common documents", "Deleted items")
        )
        assert locks.lockable(files.at(tx, "a"))
        assert locks.lockable(files.at(tx, "new"))


@pytest.mark.spec("RFC 4918 §15.8")
def test_lockdiscovery_tells_scope_depth_owner_time_token_and_root() -> None:
    owner = '<x:owner xmlns:x="DAV:">alice &amp; co</x:owner>'
    lock = locks.Lock("urn:x&y", 1, 2, False, True, owner, 60, NOW + 42, ("a b", "ü"))
    text = locks.discovery_xml([lock], lambda path: "/".join(("", *path)), NOW)
    active = xml.parse(f"<d:lockdiscovery{xml.NAMESPACES}>{text}</d:lockdiscovery>".encode()).elements()[0]
    found = {child.tag.removeprefix("{DAV:}"): child for child in active.elements()}
    assert found["lockscope"].elements()[0].tag == "{DAV:}shared"
    assert found["locktype"].elements()[0].tag == "{DAV:}write"
    assert found["depth"].text == "infinity"
    assert found["owner"].text == "alice & co"
    assert found["timeout"].text == "Second-42"
    assert found["locktoken"].elements()[0].text == "urn:x&y"
    assert found["lockroot"].elements()[0].text == "/a b/ü"
