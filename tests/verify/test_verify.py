"""`verify`: each fault is found and put right, and a healthy store has none, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from conformance.servers import S3
from ksync_server import settings
from ksync_server.drive import copying, erasing, tree
from ksync_server.errors import Conflict
from ksync_server.store import blobs, changes, schema
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database, Write
from ksync_server.store.s3 import S3Extents
from ksync_server.verify import CHECKS, Finding, rows, verify
from ksync_server.verify.finding import Look
from tests.drive.harness import make_drive

EXTENT = 1000
PAST = 1_600_000_000
Break = Callable[["World"], object]


@dataclass(frozen=True, slots=True)
class World:
    """A drive of alice and bob with files, copies and deleted items, and a calendar with a deleted event."""

    database: Database
    blobs: Blobs
    view: tree.View
    calendar: int

    def change(self, fn: Callable[[tree.Change], Any]) -> Any:
        return self.database.write(lambda tx: fn(tree.begin(tx, self.view)))

    def at(self, change: tree.Change, path: str) -> tree.Place:
        return tree.resolve(change.tx, self.view, tuple(path.split("/")))

    def put(self, path: str, content: bytes) -> tree.Node:
        stage = self.blobs.stage(10**6)
        stage.write(content)
        staged = stage.finish()
        node: tree.Node = self.change(lambda change: tree.put_file(change, self.at(change, path), staged))
        return node

    def mkdir(self, path: str) -> tree.Node:
        node: tree.Node = self.change(lambda change: tree.make_folder(change, self.at(change, path)))
        return node

    def delete(self, path: str) -> None:
        self.change(lambda change: tree.delete(change, self.at(change, path)))

    def copy(self, source: str, target: str) -> None:
        with self.database.read() as tx:
            node = tree.resolve(tx, self.view, tuple(source.split("/"))).node
        assert node is not None
        prepared = copying.prepare_copy(self.database, self.view, node, deep=True)
        self.change(
            lambda change: copying.copy(change, self.at(change, source), self.at(change, target), prepared)
        )

    def event(self, name: str, content: bytes = b"x" * 150) -> None:
        """PUT and DELETE of an object, as far as rows go."""
        stage = self.blobs.stage(10**6)
        stage.write(content)
        staged = stage.finish()

        def put(tx: Write) -> None:
            seq = changes.bump(tx, self.calendar)
            row = {
                "collection_id": self.calendar,
                "name": name,
                "uid": name,
                "component": "VEVENT",
                "seq": seq,
                "modified_at": 0,
                "created_at": 0,
                "size": len(content),
                "content_type": "text/calendar",
                "blob_id": blobs.publish(tx, staged),
            }
            number = tx.execute(sa.insert(t.object_).returning(t.object_.c.id), row).scalar_one()
            tx.execute(sa.delete(t.tombstone).where(t.tombstone.c.name == name))
            tx.execute(
                sa.update(t.collection).where(self.is_calendar).values(objects=t.collection.c.objects + 1)
            )
            packed = {
                "object_id": number,
                "seq": seq,
                "from_at": 0,
                "until_at": 1,
                "packed": b"",
                "complete": True,
            }
            tx.execute(sa.insert(t.occurrence), packed)

        self.database.write(put)

    def drop_event(self, name: str) -> None:
        def drop(tx: Write) -> None:
            seq = changes.bump(tx, self.calendar)
            gone = sa.delete(t.object_).where(t.object_.c.name == name).returning(t.object_.c.blob_id)
            blobs.release(tx, tx.execute(gone).scalar_one())
            tx.execute(
                sa.update(t.collection).where(self.is_calendar).values(objects=t.collection.c.objects - 1)
            )
            row = {"collection_id": self.calendar, "name": name, "seq": seq, "at": 0}
            tx.execute(sa.insert(t.tombstone), row)

        self.database.write(drop)

    @property
    def is_calendar(self) -> sa.ColumnElement[bool]:
        return t.collection.c.id == self.calendar

    def node(self, name: str) -> int:
        return int(self.one(sa.select(sa.func.min(t.node.c.id)).where(t.node.c.name == name)))

    def blob_of(self, name: str) -> int:
        return int(self.one(sa.select(sa.func.min(t.node.c.blob_id)).where(t.node.c.name == name)))

    def one(self, query: sa.Select[Any]) -> Any:
        with self.database.read() as tx:
            return tx.execute(query).scalar_one()

    def run(self, statement: sa.Executable, *parameters: Any) -> None:
        self.database.write(lambda tx: tx.execute(statement, *parameters))

    def run_unchecked(self, statement: sa.Executable) -> None:
        """Without foreign keys, as a fault of a disk or a person would."""
        off, on = "SET session_replication_role = replica", "SET session_replication_role = DEFAULT"
        if self.database.dialect == "sqlite":
            off, on = "PRAGMA foreign_keys=OFF", "PRAGMA foreign_keys=ON"
        with self.database.engine.connect() as connection:
            connection.exec_driver_sql(off)
            if connection.in_transaction():
                connection.commit()
            connection.execute(statement)
            connection.commit()
            connection.exec_driver_sql(on)
            connection.commit()

    def find(self, *, repair: bool = False, deep: bool = False) -> list[Finding]:
        return list(verify(self.database, self.blobs, repair=repair, deep=deep))


@pytest.fixture(scope="module")
def migrated(module_database_url: str) -> Iterator[Database]:
    database = Database(settings.Database(url=module_database_url), threads=8)
    schema.migrate(database)
    yield database
    database.close()


@pytest.fixture(params=["local"])
def world(request: pytest.FixtureRequest, migrated: Database, tmp_path: Path) -> Iterator[World]:
    def empty(tx: Write) -> None:
        for table in reversed(t.metadata.sorted_tables):
            if table is not t.store:
                tx.execute(sa.delete(table))

    migrated.write(empty)
    whole = settings.Settings(
        blobs=settings.Blobs(path=tmp_path / "blobs", inline_bytes=100, extent_bytes=EXTENT, reap_after_s=600)
    )
    if request.param == "s3":
        server: S3 = request.getfixturevalue("s3_server")
        given = server.settings(server.create(), tmp_path)
        given_path = Path(given.pop("credentials_file"))
        s3 = settings.S3(**given, credentials_file=given_path, extent_bytes=EXTENT)  # type: ignore[arg-type]
        whole = msgspec.structs.replace(whole, s3=s3)
    store = Blobs(whole.blobs, migrated, blobs.open_extents(whole))
    alice, _ = migrated.write(make_drive)

    def calendar(tx: Write) -> int:
        row = {"kind": "calendar", "account_id": alice.account_id, "name": "work", "created_at": 0}
        return int(tx.execute(sa.insert(t.collection).returning(t.collection.c.id), row).scalar_one())

    made = World(migrated, store, tree.View(alice, whole.drive, folders=False), migrated.write(calendar))
    made.mkdir("folder")
    made.put("folder/small", b"s" * 50)
    made.put("folder/large", os.urandom(2500))
    made.put("top", b"t" * 1200)
    made.put("top", b"u" * 1300)
    made.copy("folder", "copy")
    made.copy("top", "copy of top")
    made.delete("copy")
    made.event("kept.ics")
    made.event("gone.ics")
    made.drop_event("gone.ics")
    yield made
    store.close()


both_stores = pytest.mark.parametrize("world", ["local", "s3"], indirect=True)


def checks(found: list[Finding]) -> set[str]:
    return {each.check for each in found}


# -- faults ---------------------------------------------------------------------------------------


def _set(table: sa.Table, column: str, value: Any, where: Callable[[World], sa.ColumnElement[bool]]) -> Break:
    return lambda world: world.run(sa.update(table).where(where(world)).values({column: value}))


def _lock_of_nothing(world: World) -> None:
    row = {
        "token": "urn:uuid:1",
        "drive_id": world.view.grant.drive_id,
        "node_id": world.node("top"),
        "account_id": world.view.grant.account_id,
        "exclusive": True,
        "infinite": False,
        "timeout_s": 1,
        "expires_at": 0,
        "root": "/top",
    }
    world.run(sa.insert(t.lock), row)
    assert world.find() == []
    world.run_unchecked(sa.update(t.lock).values(node_id=999_999))


def _occurrences_of_nothing(world: World) -> None:
    world.run_unchecked(sa.update(t.occurrence).values(object_id=999_999))


def _unreferenced(world: World) -> None:
    def drop(tx: Write) -> None:
        change = tree.begin(tx, world.view)
        node = world.at(change, "copy of top").node
        assert node is not None
        tx.execute(sa.delete(t.node).where(t.node.c.id.in_([node.id, world_top])))
        tx.execute(
            sa.update(t.drive).values(used_bytes=t.drive.c.used_bytes - 2600, files=t.drive.c.files - 2)
        )
        tx.execute(
            sa.update(t.node).where(t.node.c.id == node.parent_id).values(entries=t.node.c.entries - 2)
        )

    world_top = world.node("top")
    world.database.write(drop)


def _tombstone(world: World) -> None:
    row = {"collection_id": world.calendar, "name": "kept.ics", "seq": 2, "at": 0}
    world.run(sa.insert(t.tombstone), row)


def _number_twice(world: World) -> None:
    seq = sa.select(t.tombstone.c.seq).scalar_subquery()
    world.run(sa.update(t.object_).where(t.object_.c.name == "kept.ics").values(seq=seq))


def _garbage(world: World) -> None:
    blob = world.blob_of("top")
    keys = sa.select(t.extent.c.key, sa.literal(int(time.time()))).where(t.extent.c.blob_id == blob)
    world.run(sa.insert(t.garbage).from_select(["key", "since"], keys))


def _overdue(world: World) -> None:
    world.put("old", b"o" * 1500)
    world.put("old", b"new")
    world.run(sa.update(t.garbage).values(since=PAST))


def _orphan(world: World) -> None:
    writer = world.blobs.extents.create("ab" * 16)
    writer.write(b"x" * 10)
    writer.finish()
    assert world.find() == []  # a young one is left alone
    world.blobs.settings = msgspec.structs.replace(world.blobs.settings, reap_after_s=0)


FAULTS: list[tuple[str, str, Break]] = [
    (
        "too many references",
        "blob-references",
        _set(t.blob, "refs", 99, lambda w: t.blob.c.id == w.blob_of("top")),
    ),
    (
        "too few references",
        "blob-references",
        _set(t.blob, "refs", 1, lambda w: t.blob.c.id == w.blob_of("top")),
    ),
    ("a blob of nothing", "blob-references", _unreferenced),
    ("size of an object", "sizes", _set(t.object_, "size", 7, lambda w: t.object_.c.name == "kept.ics")),
    ("no common folder", "drive-roots", _set(t.drive, "common_id", 999_999, lambda w: sa.true())),
    (
        "a folder as root",
        "drive-roots",
        lambda w: _set(t.drive_member, "root_id", w.node("folder"), _alice)(w),
    ),
    ("no deleted items", "drive-roots", _set(t.drive_member, "trash_id", 999_999, lambda w: _alice(w))),
    ("entries", "folder-entries", _set(t.node, "entries", 5, lambda w: t.node.c.name == "folder")),
    ("bytes of a drive", "drive-use", _set(t.drive, "used_bytes", 5, lambda w: sa.true())),
    ("files of a drive", "drive-use", _set(t.drive, "files", 5, lambda w: sa.true())),
    ("objects", "collection-objects", _set(t.collection, "objects", 5, lambda w: w.is_calendar)),
    ("number of a calendar", "collection-numbers", _set(t.collection, "seq", 1, lambda w: w.is_calendar)),
    (
        "number of a drive",
        "collection-numbers",
        _set(t.collection, "seq", 1, lambda w: t.collection.c.kind == "drive"),
    ),
    (
        "a visible folder marked as deleted",
        "deleted-nodes",
        lambda w: _set(t.node, "deleted_at", PAST, lambda w: t.node.c.id == w.node("folder"))(w),
    ),
    ("a change number twice", "numbers-twice", _number_twice),
    ("a deleted member", "living-tombstones", _tombstone),
    ("a lock of nothing", "locks-of-nothing", _lock_of_nothing),
    ("occurrences of nothing", "occurrences-of-nothing", _occurrences_of_nothing),
    (
        "a dead upload",
        "dead-stages",
        lambda w: w.run(sa.insert(t.stage), {"id": "a" * 16, "lease_until": PAST, "created_at": PAST}),
    ),
    ("garbage in use", "garbage-in-use", _garbage),
    ("garbage overdue", "garbage-overdue", _overdue),
    ("an orphan", "extents", _orphan),
]


def _alice(world: World) -> sa.ColumnElement[bool]:
    return t.drive_member.c.account_id == world.view.grant.account_id


@pytest.mark.parametrize(("check", "fault"), [each[1:] for each in FAULTS], ids=[each[0] for each in FAULTS])
def test_a_fault_is_found_and_put_right(world: World, check: str, fault: Break) -> None:
    fault(world)
    found = world.find()
    assert checks(found) == {check}
    assert not any(each.repaired or each.help for each in found)
    assert world.find() == found  # looking changes nothing
    repaired = world.find(repair=True)
    assert [(each.subject, each.text) for each in repaired] == [(each.subject, each.text) for each in found]
    assert all(each.repaired for each in repaired)
    assert world.find() == world.find(deep=True) == []
    audited = world.one(sa.select(t.audit.c.detail).where(t.audit.c.action == "verify.repair"))
    assert json.loads(audited)["count"] == len(found)


@both_stores
@pytest.mark.parametrize("fault", [_orphan, _overdue, _garbage, _unreferenced])
def test_faults_of_bytes_are_put_right_on_every_store(world: World, fault: Break) -> None:
    kept = {name: world.blob_of(name) for name in ("large",)}
    fault(world)
    assert world.find()
    assert all(each.repaired for each in world.find(repair=True))
    assert world.find(deep=True) == []
    with world.database.read() as tx:
        contents = [blobs.content(tx, blob) for blob in kept.values()]
    for content in contents:
        assert sum(map(len, world.blobs.read(content, 0, content.size, 100))) == content.size


def test_a_blob_of_nothing_leaves_its_bytes_to_the_reaper(world: World) -> None:
    world.run(sa.update(t.garbage).values(since=PAST))
    world.blobs.reap_garbage(100)
    _unreferenced(world)
    world.find(repair=True)
    assert world.one(sa.select(sa.func.count()).select_from(t.garbage)) == 2
    world.run(sa.update(t.garbage).values(since=PAST))
    assert world.blobs.reap_garbage(100) == 2


def test_a_file_of_the_wrong_size_is_put_right_before_its_drive_is_counted(world: World) -> None:
    world.run(sa.update(t.node).where(t.node.c.name == "top").values(size=7))
    assert checks(world.find()) == {"sizes", "drive-use"}
    (found,) = world.find(repair=True)
    assert (found.check, found.repaired) == ("sizes", True)
    assert world.find() == []


def test_a_member_whose_roots_are_lost_finds_the_old_ones_by_their_names(world: World) -> None:
    root = world.view.grant.root_id
    sync_id = world.one(sa.select(t.account.c.sync_id).where(t.account.c.id == world.view.grant.account_id))
    world.run(sa.update(t.node).where(t.node.c.id == root).values(name=f"root {sync_id}"))
    _set(t.drive_member, "root_id", 999_999, _alice)(world)
    assert all(each.repaired for each in world.find(repair=True))
    assert world.one(sa.select(t.drive_member.c.root_id).where(_alice(world))) == root


# -- what no repair brings back -------------------------------------------------------------------


def _lose_blob(world: World) -> None:
    world.run_unchecked(sa.update(t.node).where(t.node.c.name == "small").values(blob_id=999_999))
    world.run(
        sa.update(t.blob).values(
            refs=sa.select(sa.func.count())
            .select_from(t.node)
            .where(t.node.c.blob_id == t.blob.c.id)
            .scalar_subquery()
            + sa.select(sa.func.count())
            .select_from(t.object_)
            .where(t.object_.c.blob_id == t.blob.c.id)
            .scalar_subquery()
        )
    )
    world.find(repair=True)


def _no_blob(world: World) -> None:
    world.run(sa.update(t.node).where(t.node.c.name == "small").values(blob_id=None))
    world.find(repair=True)  # nothing holds its blob any more


def _lose_object(world: World) -> None:
    world.run_unchecked(sa.update(t.object_).values(blob_id=999_999))
    world.find(repair=True)


def _shorten_row(world: World) -> None:
    world.run(sa.update(t.blob).where(t.blob.c.id == world.blob_of("small")).values(content=b"s" * 49))


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("references-without-blob", _lose_blob),
        ("references-without-blob", _no_blob),
        ("references-without-blob", _lose_object),
        ("blob-sizes", _shorten_row),
    ],
)
def test_lost_content_is_told_with_what_to_do(world: World, check: str, fault: Break) -> None:
    fault(world)
    for repair in (False, True):
        found = world.find(repair=repair)
        assert checks(found) == {check}
        assert all(each.help and not each.repaired for each in found)


def _first_key(world: World) -> str:
    key: str = world.one(
        sa.select(t.extent.c.key).where(
            t.extent.c.blob_id == world.blob_of("large"), t.extent.c.position == 0
        )
    )
    return key


def _erase(world: World) -> None:
    world.blobs.extents.erase([_first_key(world)])


def _rewrite(content: Callable[[bytes], bytes]) -> Break:
    def rewrite(world: World) -> None:
        key = _first_key(world)
        old = b"".join(world.blobs.extents.read(key, 0, EXTENT, EXTENT))
        extents = world.blobs.extents
        extents.erase([key])
        if isinstance(extents, S3Extents):  # its writers take no more than an extent
            extents.put(key, content(old))
            return
        writer = extents.create(key)
        writer.write(content(old))
        writer.finish()

    return rewrite


@both_stores
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (_erase, "is missing on the store"),
        (_rewrite(lambda old: old[:-1]), f"has {EXTENT - 1} bytes in place of {EXTENT}"),
        (_rewrite(lambda old: old + b"x"), f"has {EXTENT + 1} bytes in place of {EXTENT}"),
    ],
)
def test_missing_and_misfitting_extents_mark_the_blob_and_name_what_holds_it(
    world: World, fault: Break, text: str
) -> None:
    fault(world)
    blob, node = world.blob_of("large"), world.node("large")
    found = world.find(repair=True)
    assert checks(found) == {"extents", "damaged"}
    assert text in found[0].text
    assert f"blob {blob}" in found[0].text
    assert f"file {node}" in found[1].text
    assert all(each.help and not each.repaired for each in found)


@both_stores
def test_changed_bytes_of_the_right_size_are_found_by_a_deep_look_alone(world: World) -> None:
    _rewrite(lambda old: old[:-1] + bytes([old[-1] ^ 1]))(world)
    assert world.find() == []
    (found,) = world.find(deep=True)
    assert (found.check, found.subject) == ("damaged", f"blob {world.blob_of('large')}")
    assert world.find() == [found]
    _rewrite(lambda old: old[:-1] + bytes([old[-1] ^ 1]))(world)  # the backup is put back
    assert world.find(deep=True) == []


def test_a_changed_row_is_found_by_a_deep_look(world: World) -> None:
    world.run(sa.update(t.blob).where(t.blob.c.id == world.blob_of("small")).values(content=b"S" * 50))
    assert world.find() == []
    assert checks(world.find(deep=True)) == {"damaged"}


def test_a_damaged_database_file_and_broken_references_are_found_by_a_deep_look(world: World) -> None:
    if world.database.dialect != "sqlite":
        assert world.find(deep=True) == []
        return
    world.run_unchecked(sa.insert(t.node_property).values(node_id=999_999, name="a", xml="b"))
    (found,) = world.find(deep=True)
    assert (found.check, found.repaired) == ("database-file", False)
    assert "node_property" in found.text


def test_a_folder_with_bytes_of_its_own_gives_them_up(world: World) -> None:
    folder = t.node.c.id == world.node("folder")
    world.run(sa.update(t.node).where(folder).values(blob_id=world.blob_of("top"), size=1300))
    assert checks(world.find()) == {"folders-with-content", "blob-references", "drive-use"}
    assert [each.check for each in world.find(repair=True)] == ["folders-with-content"]
    assert world.find() == []


# -- no false alarm -------------------------------------------------------------------------------


@both_stores
def test_a_healthy_store_has_no_finding(world: World) -> None:
    assert world.find() == world.find(deep=True, repair=True) == []
    assert world.one(sa.select(sa.func.count()).select_from(t.audit)) == 0


def test_copies_being_built_and_trees_being_erased_are_no_faults(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(250):
        world.put(f"folder/{number}", b"")
    with world.database.read() as tx:
        node = tree.resolve(tx, world.view, ("folder",)).node
    assert node is not None
    looks: list[list[Finding]] = []
    real = copying._copy_folder

    def looking(*arguments: Any) -> Any:
        looks.append(world.find())
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(copying, "_copy_folder", looking)
        prepared = copying.prepare_copy(world.database, world.view, node, deep=True)
    root, drive = prepared.root_id, world.view.grant.drive_id
    assert root is not None
    while not world.database.write(lambda tx: erasing._purge_step(tx, drive, root)):
        looks.append(world.find())
    assert len(looks) >= 2
    assert looks == [[]] * len(looks)
    assert world.find() == []


def test_collections_being_erased_are_no_faults(world: World) -> None:
    world.run(sa.update(t.collection).where(world.is_calendar).values(account_id=None))
    world.run(sa.delete(t.object_).where(t.object_.c.name == "none"))
    assert world.find() == []


@both_stores
def test_nothing_is_found_while_others_change_everything(world: World) -> None:
    over = threading.Event()

    def files(name: str) -> int:
        turns = 0
        world.mkdir(name)
        while not over.is_set():
            turns += 1
            path = f"{name}/{turns % 3}"
            try:
                world.put(path, os.urandom(1500 if turns % 2 else 50))
                world.copy(path, f"{name}/copy {turns % 4}")
                world.delete(path)
            except Conflict:  # the other thread was quicker
                continue
        return turns

    def events() -> int:
        turns = 0
        while not over.is_set():
            turns += 1
            world.event(f"{turns}.ics", os.urandom(120))
            if turns % 3:
                world.drop_event(f"{turns}.ics")
        return turns

    def reaping() -> int:
        turns = 0
        while not over.is_set():
            turns += 1
            world.run(sa.update(t.garbage).values(since=int(time.time()) - 700))
            world.blobs.reap()
        return turns

    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(files, name) for name in ("x", "y")]
        running += [pool.submit(events), pool.submit(reaping)]
        try:
            found = [each for _ in range(6) for each in world.find(repair=True)]
        finally:
            over.set()
        turns = [each.result(60) for each in running]
    assert found == []
    assert min(turns) >= 1
    assert world.find(deep=True) == []


def test_a_repair_waits_for_a_moment_when_nothing_moved(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between look and repair the drive changes twice: the right counts are those of the end."""
    world.run(sa.update(t.drive).values(used_bytes=5))
    left = [2]

    def looking(look: Look) -> Iterator[Any]:
        for found in rows.drive_use(look):
            if left[0]:
                left[0] -= 1
                world.put("late", os.urandom(100 + left[0]))
            yield found

    monkeypatch.setitem(CHECKS, "drive-use", looking)
    (found,) = world.find(repair=True)
    assert (found.check, found.repaired, left) == ("drive-use", True, [0])
    monkeypatch.undo()
    assert world.find() == []


def test_a_drive_that_never_rests_is_told_and_not_guessed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run(sa.update(t.drive).values(used_bytes=5))
    turns: list[int] = []

    def looking(look: Look) -> Iterator[Any]:
        for found in rows.drive_use(look):
            turns.append(1)
            world.put("late", os.urandom(100))
            yield found

    monkeypatch.setitem(CHECKS, "drive-use", looking)
    (found,) = world.find(repair=True)
    assert not found.repaired
    assert len(turns) > 1


def test_every_check_says_in_a_sentence_what_it_holds_to() -> None:
    others = {"references-without-blob", "folders-with-content", "blob-sizes", "damaged", "database-file"}
    assert {check for _, check, _ in FAULTS} | others == set(CHECKS)
    for check in CHECKS.values():
        assert (check.__doc__ or "").partition("\n")[0].endswith((".", ";"))
