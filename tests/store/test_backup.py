"""Backup and restore: what is in it, what is refused, what a restore carries over, what a crash leaves."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from conformance.servers import S3
from ksync_server import settings
from ksync_server.errors import ConfigError, Forbidden, InsufficientStorage, KsyncError, Unavailable
from ksync_server.store import backup, blobs, bundle, changes, holds, schema
from ksync_server.store import restore as restoring
from ksync_server.store import tables as t
from ksync_server.store.database import Database, begin_request, closed_to_writers
from ksync_server.store.restore import Restored, restore

_EXTENT = 4096


class Store:
    """A store with one account, one calendar and some bytes; what a test does to it is short to write."""

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.database = Database(settings.Database(url=url), threads=4)
        schema.migrate(self.database)
        self.settings = settings.Blobs(
            path=folder / "blobs", inline_bytes=100, extent_bytes=_EXTENT, reap_after_s=0
        )
        self.blobs = blobs.Blobs(self.settings, self.database)
        self.calendar = 0

    def close(self) -> None:
        self.blobs.close()
        self.database.close()

    def insert(self, table: sa.Table, **values: object) -> Any:
        statement = sa.insert(table)
        return self.database.write(lambda tx: tx.execute(statement, values).inserted_primary_key[0])

    def run(self, statement: sa.Executable) -> None:
        self.database.write(lambda tx: tx.execute(statement) and None)

    def rows(self, table: sa.Table) -> list[tuple[object, ...]]:
        with self.database.read() as tx:
            return sorted(map(tuple, tx.execute(sa.select(table))), key=repr)

    def fill(self) -> None:
        self.account = self.insert(
            t.account,
            sync_id="AB12345",
            login_email="a@example.org",
            login_key="a@example.org",
            display_name="A",
            password_hash="old",
            auth_epoch=3,
            created_at=0,
        )
        self.calendar = self.insert(
            t.collection, kind="calendar", account_id=self.account, name="work", created_at=0
        )
        for number in range(3):
            self.put(f"small-{number}", b"x" * number)
        self.put("large", bytes(range(256)) * 50)  # 4 extents

    def put(self, name: str, content: bytes) -> None:
        stage = self.blobs.stage(1 << 20)
        for start in range(0, len(content), 1000):
            stage.write(content[start : start + 1000])
        staged = stage.finish()

        def publish(tx: blobs.Write) -> None:
            seq = changes.bump(tx, self.calendar)
            values = {
                "collection_id": self.calendar,
                "name": name,
                "uid": name,
                "component": "VEVENT",
                "seq": seq,
                "modified_at": 0,
                "created_at": 0,
                "size": staged.size,
                "content_type": "text/calendar",
                "blob_id": blobs.publish(tx, staged),
            }
            tx.execute(sa.insert(t.object_), values)

        self.database.write(publish)

    def remove(self, name: str) -> None:
        def delete(tx: blobs.Write) -> None:
            gone = sa.delete(t.object_).where(t.object_.c.name == name).returning(t.object_.c.blob_id)
            changes.bump(tx, self.calendar)
            blobs.release(tx, tx.execute(gone).scalar_one())

        self.database.write(delete)

    def contents(self) -> dict[str, bytes]:
        with self.database.read() as tx:
            rows = tx.execute(sa.select(t.object_.c.name, t.object_.c.blob_id)).all()
            found = {name: blobs.content(tx, blob) for name, blob in rows}
        return {
            name: b"".join(self.blobs.read(content, 0, content.size, 1000)) for name, content in found.items()
        }

    def back_up(self, folder: Path, **options: object) -> backup.Made:
        return backup.create(self.database, self.blobs.extents, folder, **options)  # type: ignore[arg-type]

    def restore(self, folder: Path, **options: object) -> Restored:
        return restore(self.database, self.blobs.extents, folder, **options)  # type: ignore[arg-type]


@pytest.fixture
def store(database_url: str, tmp_path: Path) -> Iterator[Store]:
    opened = Store(database_url, tmp_path / "store")
    opened.fill()
    yield opened
    opened.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "backup"


@pytest.fixture
def fresh(empty_database_url: str, tmp_path: Path) -> Iterator[Store]:
    """An empty store, once on SQLite and once on PostgreSQL: with `store` every pair of both."""
    opened = Store(empty_database_url, tmp_path / "fresh")
    yield opened
    opened.close()


def test_a_backup_restores_into_an_empty_store_of_either_database(
    store: Store, fresh: Store, folder: Path
) -> None:
    store.insert(t.organization, name="O", requires_second_factor=True, created_at=5)
    store.back_up(folder)
    before, objects, organizations = store.contents(), store.rows(t.object_), store.rows(t.organization)
    fresh.restore(folder)
    assert fresh.contents() == before
    assert fresh.rows(t.object_) == objects
    assert fresh.rows(t.organization) == organizations
    assert fresh.database.generation != store.database.generation
    number = fresh.insert(t.collection, kind="calendar", account_id=store.account, name="b", created_at=0)
    assert number > store.calendar


def test_everything_written_before_a_backup_began_is_in_it_while_others_write(
    store: Store, folder: Path
) -> None:
    done = threading.Event()
    acknowledged: list[str] = []

    def work(writer: int) -> None:
        for number in range(2000):
            if done.is_set():
                return
            name = f"w{writer}-{number}"
            store.put(name, b"y" * 200 if number % 20 == 0 else b"y")
            acknowledged.append(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while len(acknowledged) < 40:
        threads[0].join(0.001)
    before = set(acknowledged)
    store.back_up(folder)
    done.set()
    for thread in threads:
        thread.join()
    store.restore(folder, force=True)
    assert before <= set(store.contents())


def test_a_second_backup_copies_only_new_extents_and_forgets_what_no_state_names(
    store: Store, folder: Path
) -> None:
    assert store.back_up(folder).copied == 4
    store.remove("large")
    store.put("new", b"z" * _EXTENT * 2)
    made = store.back_up(folder, keep=2)
    assert (made.copied, made.extents_erased) == (2, 0)
    assert len(bundle.Bundle(folder).names()) == 2
    made = store.back_up(folder, keep=1)
    assert (made.copied, made.states_erased, made.extents_erased) == (0, 2, 4)
    store.restore(folder, force=True)
    assert store.contents()["new"] == b"z" * _EXTENT * 2


def test_an_earlier_state_can_be_chosen(store: Store, folder: Path) -> None:
    first = store.back_up(folder).state.name
    store.put("later", b"later")
    store.back_up(folder, keep=5)
    with pytest.raises(ConfigError, match="There is no state x"):
        store.restore(folder, state="x", force=True)
    store.restore(folder, state=first, force=True)
    assert "later" not in store.contents()


def test_extents_are_linked_or_copied_where_links_are_impossible(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = store.back_up(folder)
    assert made.linked == made.copied == 4

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    other = folder.with_name("other")
    made = store.back_up(other)
    assert (made.linked, made.copied) == (0, 4)
    before = store.contents()
    store.remove("large")
    store.blobs.extents.erase([bundle.extents_of(made.state.rows)[0][0]])
    assert store.restore(other, force=True).extents_added == 1
    assert store.contents() == before


def test_objects_are_copied_into_the_backup_and_out_of_it(
    sqlite_url: str, tmp_path: Path, s3_server: S3
) -> None:
    store, folder = Store(sqlite_url, tmp_path / "store"), tmp_path / "backup"
    given = s3_server.settings(s3_server.create(), tmp_path)
    remote = settings.Settings(blobs=store.settings, s3=settings.S3(**given, extent_bytes=_EXTENT))  # type: ignore[arg-type]
    store.blobs.close()
    objects = blobs.open_extents(remote)
    store.blobs = blobs.Blobs(store.settings, store.database, objects)

    def kept() -> dict[str, bytes]:
        listed = [each.key for each in objects.list_stored()]
        return {key: b"".join(objects.read(key, 0, objects.size(key) or 0, 1000)) for key in listed}

    store.fill()
    before, bytes_before = store.contents(), kept()
    made = store.back_up(folder)
    assert (made.copied, made.linked, len(bytes_before)) == (4, 0, 4)
    store.remove("large")
    lost = sorted(bytes_before)[0]
    objects.erase([lost])
    assert store.restore(folder, force=True).extents_added == 1
    assert (store.contents(), kept()) == (before, bytes_before)
    listed = store.back_up(tmp_path / "listed", with_bytes=False)
    assert not list((tmp_path / "listed").glob("extents/*"))
    store.restore(tmp_path / "listed", force=True)
    assert store.contents() == before
    objects.erase([lost])
    assert len(listed.state.manifest.counts) > 10
    with pytest.raises(ConfigError, match="missing or wrong"):
        store.restore(tmp_path / "listed", force=True)
    store.close()


# -- what is refused ------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [_cut, _alter, Path.unlink])
@pytest.mark.parametrize("part", ["states/*/rows.sqlite", "states/*/manifest.json", "extents/*/*/*"])
def test_a_cut_or_altered_backup_is_refused_and_the_store_is_as_it_was(
    store: Store, folder: Path, harm: Callable[[Path], None], part: str
) -> None:
    store.back_up(folder)
    store.put("later", b"later")
    before, generation = store.contents(), store.database.generation
    harm(next(folder.glob(part)))
    with pytest.raises(ConfigError):
        store.restore(folder, force=True)
    assert (store.contents(), store.database.generation) == (before, generation)


def test_a_backup_with_damaged_bytes_restores_the_rest_when_that_is_asked_for(
    store: Store, folder: Path
) -> None:
    store.back_up(folder)
    _alter(next(folder.glob("extents/*/*/*")))
    report = store.restore(folder, force=True, accept_damaged=True)
    assert len(report.damaged) == 1
    marked = sa.select(t.blob.c.id).where(t.blob.c.damaged_at.is_not(None))
    assert [row[0] for row in store.database.fast(marked)] == report.damaged


def test_a_store_that_lost_an_extent_says_so_in_the_backup(store: Store, folder: Path) -> None:
    key = store.database.fast(sa.select(t.extent.c.key))[0][0]
    store.blobs.extents.erase([key])
    made = store.back_up(folder)
    assert len(made.state.manifest.damaged) == 1


def test_a_store_in_use_is_replaced_only_with_force(store: Store, folder: Path) -> None:
    store.back_up(folder)
    with pytest.raises(ConfigError, match="--force"):
        store.restore(folder)


def test_a_folder_with_something_else_in_it_is_no_place_for_a_backup(store: Store, folder: Path) -> None:
    folder.mkdir()
    (folder / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="neither empty nor a backup"):
        store.back_up(folder)
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


def test_a_backup_of_a_newer_program_is_refused(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.back_up(folder)
    monkeypatch.setattr(schema, "SCHEMA", schema.SCHEMA - 1)
    with pytest.raises(ConfigError, match="update it"):
        store.restore(folder, force=True)


def test_the_key_file_is_in_the_backup_only_when_it_is_asked_for(store: Store, folder: Path) -> None:
    keys = store.folder / "keys.toml"
    keys.write_text("secret = 1\n")
    made = store.back_up(folder)
    assert not made.state.keys.exists()
    made = store.back_up(folder, key_file=keys)
    assert made.state.keys.read_text() == "secret = 1\n"
    assert made.state.keys.stat().st_mode & 0o777 == 0o600
    _alter(made.state.keys)
    with pytest.raises(ConfigError, match="altered"):
        store.restore(folder, force=True)


def test_rows_alone_restore_over_a_store_that_has_the_bytes(store: Store, folder: Path) -> None:
    before = store.contents()
    made = store.back_up(folder, with_bytes=False)
    assert (made.copied, made.state.manifest.extents) == (0, 4)
    store.put("later", b"later")
    store.restore(folder, force=True)
    assert store.contents() == before
    store.blobs.extents.erase([bundle.extents_of(made.state.rows)[0][0]])
    with pytest.raises(ConfigError, match="missing or wrong"):
        store.restore(folder, force=True, check_bytes=False)


# -- what a restore carries over ------------------------------------------------------------------


def test_old_tokens_and_etags_mean_nothing_after_a_restore(store: Store, folder: Path) -> None:
    other = Database(store.database.settings)  # another process, which has read before
    with other.read() as tx:
        old = tx.generation
        seq = tx.execute(sa.select(t.collection.c.seq)).scalar_one()
    token = changes.sync_token(old, store.calendar, seq)
    store.back_up(folder)
    store.restore(folder, force=True)
    for database in (store.database, other):
        with database.read() as tx:
            assert changes.etag(tx.generation, store.calendar, seq) != changes.etag(old, store.calendar, seq)
            with pytest.raises(Forbidden) as caught:
                changes.position(tx, store.calendar, token)
            assert caught.value.precondition == "{DAV:}valid-sync-token"
    other.close()


def test_ids_and_epochs_never_go_back(store: Store, folder: Path) -> None:
    store.back_up(folder)
    newest = store.insert(t.collection, kind="calendar", account_id=store.account, name="b", created_at=0)
    store.run(sa.update(t.account).values(auth_epoch=9, password_hash="new"))
    report = store.restore(folder, force=True)
    assert (
        store.insert(t.collection, kind="calendar", account_id=store.account, name="c", created_at=0) > newest
    )
    epoch, password = store.database.fast(sa.select(t.account.c.auth_epoch, t.account.c.password_hash))[0]
    assert (epoch, password) == (10, "old")
    assert report.accounts_reverted == ["AB12345"]


def test_an_account_that_was_suspended_since_stays_suspended(store: Store, folder: Path) -> None:
    store.back_up(folder)
    store.run(sa.update(t.account).values(state="suspended"))
    assert store.restore(folder, force=True).accounts_reverted == []
    assert store.database.fast(sa.select(t.account.c.state)) == [("suspended",)]


def _password(store: Store, lookup: str) -> None:
    store.insert(
        t.app_password,
        lookup=lookup,
        account_id=store.account,
        name=f"{lookup} phone",
        scopes="caldav",
        digest=b"",
        key_id="1",
        created_at=0,
    )


def _works(store: Store) -> list[str]:
    active = sa.select(t.app_password.c.lookup).where(t.app_password.c.revoked_at.is_(None))
    return sorted(row[0] for row in store.database.fast(active))


def test_what_was_revoked_since_the_backup_stays_revoked_and_the_rest_is_told(
    store: Store, folder: Path
) -> None:
    for lookup in ("kept", "revoked", "gone"):
        _password(store, lookup)
    store.back_up(folder)
    c = t.app_password.c
    store.run(sa.update(t.app_password).where(c.lookup == "revoked").values(revoked_at=7))
    store.run(sa.delete(t.app_password).where(c.lookup == "gone"))
    _password(store, "later")
    report = store.restore(folder, force=True)
    assert _works(store) == ["gone", "kept"]
    assert (report.passwords_active, report.passwords_revoked) == (2, 1)
    assert report.passwords_revived == ["gone phone"]
    store.restore(folder, force=True, revoke_passwords=True)
    assert _works(store) == []


def test_mailboxes_and_their_passwords_that_were_closed_since_stay_closed(store: Store, folder: Path) -> None:
    home = store.insert(t.organization, name="Example", created_at=0)

    def mailbox(name: str) -> int:
        address = f"{name}@example.org"
        keys = {"address": address, "address_key": address, "folder": f"f-{name}"}
        number = store.insert(t.mailbox, organization_id=home, created_at=0, **keys)
        password = {"name": f"{name} phone", "digest": b"", "key_id": "1", "created_at": 0}
        store.insert(t.device_password, lookup=name, mailbox_id=number, **password)
        return number

    numbers = [mailbox(name) for name in ("open", "shut", "lost")]
    store.back_up(folder)
    store.run(sa.update(t.mailbox).where(t.mailbox.c.id == numbers[1]).values(state="suspended"))
    lost = t.device_password.c.mailbox_id == numbers[2]
    store.run(sa.update(t.device_password).where(lost).values(revoked_at=7))
    mailbox("late")
    report = store.restore(folder, force=True)
    states = sa.select(t.mailbox.c.state).order_by(t.mailbox.c.id)
    assert store.database.fast(states) == [("active",), ("suspended",), ("active",)]
    revoked = sa.select(t.device_password.c.revoked_at).order_by(t.device_password.c.id)
    assert store.database.fast(revoked) == [(None,), (None,), (7,)]
    assert (report.passwords_active, report.passwords_revoked) == (2, 1)
    assert report.mailboxes_gone == ["late@example.org: f-late"]
    store.restore(folder, force=True, revoke_passwords=True)
    assert None not in {row[0] for row in store.database.fast(revoked)}


def test_locks_stages_and_claims_of_the_past_are_gone_and_the_audit_log_goes_on(
    store: Store, folder: Path
) -> None:
    store.insert(t.stage, id="00aa", lease_until=2**40, created_at=0)
    store.insert(t.job, kind="mail.notice", state="running", run_at=0, fence="f", lease_until=2**40)
    store.insert(t.audit, at=1, actor="operator", action="before", subject="s")
    store.back_up(folder)
    store.insert(t.audit, at=2, actor="operator", action="after", subject="s")
    counted = {
        "failures": 3,
        "since": 1,
        "strikes": 0,
        "blocked_until": 0,
        "trusted_until": 0,
        "kept_until": 9,
    }
    store.insert(t.throttle, key="k", seen=b"", **counted)
    store.restore(folder, force=True)
    assert store.rows(t.stage) == []
    assert store.database.fast(sa.select(t.job.c.state, t.job.c.fence, t.job.c.lease_until)) == [
        ("ready", None, None)
    ]
    actions = [row[0] for row in store.database.fast(sa.select(t.audit.c.action).order_by(t.audit.c.id))]
    assert actions == ["before", "after", "store.restore"]
    assert [row[0] for row in store.database.fast(sa.select(t.throttle.c.key))] == ["k"]


def test_extents_of_the_replaced_store_are_erased_in_due_time(store: Store, folder: Path) -> None:
    store.back_up(folder)
    store.put("later", b"w" * _EXTENT * 3)
    later = store.contents()["later"]
    with store.database.read() as tx:
        blob = tx.execute(sa.select(t.object_.c.blob_id).where(t.object_.c.name == "later")).scalar_one()
        read = blobs.content(tx, blob)
    store.restore(folder, force=True)
    assert b"".join(store.blobs.read(read, 0, read.size, 1000)) == later, "a download under way goes on"
    store.run(sa.update(t.garbage).values(since=0))
    assert store.blobs.reap() == 3
    assert store.contents()


# -- the reaper -----------------------------------------------------------------------------------


def test_the_reaper_erases_nothing_that_a_running_backup_needs(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store.contents()
    taken = backup.extents_of

    def meanwhile(rows: Path) -> list[tuple[str, int]]:
        """After the snapshot, before the extents are copied."""
        store.remove("large")
        store.run(sa.update(t.garbage).values(since=0))
        assert store.blobs.reap() == 0
        return taken(rows)

    monkeypatch.setattr(backup, "extents_of", meanwhile)
    store.back_up(folder)
    assert store.blobs.reap() == 4, "the hold has ended"
    store.restore(folder, force=True)
    assert store.contents() == before


def test_a_hold_that_was_lost_is_noticed(store: Store) -> None:
    with holds.hold(store.database) as hold:
        hold.check()
        store.run(sa.delete(t.stage))
        with pytest.raises(Unavailable):
            hold.check()


# -- failures -------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_previous_backup_whole(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store.contents()
    store.back_up(folder)
    store.put("later", b"v" * _EXTENT * 2)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", full)
        patched.setattr(os, "fdatasync", full)
        with pytest.raises(InsufficientStorage, match="earlier ones are as they were"):
            store.back_up(folder)
    assert not list(folder.glob("states/*.part"))
    store.restore(folder, force=True)
    assert store.contents() == before


def test_writes_are_refused_at_once_while_the_store_is_switched_and_reads_go_on(store: Store) -> None:
    other = Database(store.database.settings)
    with closed_to_writers(store.database):
        began = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            other.write(lambda tx: changes.bump(tx, store.calendar))
        assert time.monotonic() - began < 5
        assert b"retry-after" in dict(caught.value.headers)
        with other.read() as tx:
            assert tx.generation
    assert other.write(lambda tx: changes.bump(tx, store.calendar))
    other.close()


def test_a_request_that_began_before_a_restore_does_not_write_after_it(store: Store, folder: Path) -> None:
    store.back_up(folder)
    request = contextvars.copy_context()
    request.run(begin_request)
    request.run(lambda: store.database.generation)
    store.restore(folder, force=True)
    for use in (
        lambda: store.database.write(lambda tx: changes.bump(tx, store.calendar)),
        lambda: store.database.generation,
    ):
        with pytest.raises(Unavailable):
            request.run(use)
    assert store.database.write(lambda tx: changes.bump(tx, store.calendar))


_KILLED = """
import sys
from pathlib import Path
from ksync_server import settings
from ksync_server.store import restore
from ksync_server.store.database import Database
from ksync_server.store.extents import LocalExtents
database = Database(settings.Database(url=sys.argv[1]), threads=2)
extents = LocalExtents(Path(sys.argv[2]), 64 << 20)
def progress(what, done, total):
    print(what, done, flush=True)
merge = restore._merge
def told(*arguments, **options):
    merge(*arguments, **options)
    print("merged", flush=True)
restore._merge = told
restore.restore(database, extents, Path(sys.argv[3]), force=True, progress=progress)
print("done", flush=True)
"""


@pytest.mark.parametrize("moment", ["extents", "merged", "merged+"])
def test_kill_9_in_the_middle_of_a_restore_leaves_the_old_store_or_the_new_one(
    store: Store, folder: Path, moment: str
) -> None:
    new = store.contents()
    store.back_up(folder)
    for number in range(30):
        store.put(f"later-{number}", b"u" * 90)
    store.remove("large")
    old, generation = store.contents(), store.database.generation
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, store.database.settings.url, str(store.settings.path), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith(moment.rstrip("+")):
            break
    if moment.endswith("+"):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.004)  # somewhere in the copy of the rows
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    found = store.contents()
    assert found in (old, new)
    assert (store.database.generation == generation) == (found == old)
    if found == old:
        assert store.database.write(lambda tx: changes.bump(tx, store.calendar)), "nothing is left closed"
        store.restore(folder, force=True)
    assert store.contents() == new


def test_the_rows_that_a_killed_restore_left_go_with_the_next_one(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = Path(store.database.path).parent if store.database.dialect == "sqlite" else tmp_path / "elsewhere"
    near.mkdir(exist_ok=True)
    monkeypatch.setattr("tempfile.tempdir", str(near))
    left, alive, link = (near / f".ksync-restore-{name}" for name in ("left", "alive", "link"))
    for each in (left, alive):
        each.mkdir()
        (each / "rows.sqlite").write_bytes(b"the rows")
    link.symlink_to(alive)
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # a restore of another store that is under way
    store.back_up(folder)
    store.restore(folder, force=True)
    os.close(descriptor)
    assert sorted(near.glob(".ksync-restore-*")) == [alive, link]
    assert (alive / "rows.sqlite").exists()


def test_one_restore_at_a_time(store: Store, folder: Path) -> None:
    store.back_up(folder)
    tried: list[BaseException] = []

    def another(what: str, done: int, total: int) -> None:
        if what == "switch":
            with pytest.raises(ConfigError, match="Another restore") as caught:
                store.restore(folder, force=True)
            tried.append(caught.value)

    store.restore(folder, force=True, progress=another)
    assert tried


def test_a_failing_restore_changes_nothing(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.back_up(folder)
    store.put("later", b"later")
    before, generation = store.contents(), store.database.generation

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("ksync_server.store.restore._merge_garbage", fail)
    with pytest.raises(KsyncError, match="the store is as it was"):
        store.restore(folder, force=True)
    assert (store.contents(), store.database.generation) == (before, generation)
    assert store.database.write(lambda tx: changes.bump(tx, store.calendar))


def test_two_restores_of_two_stores_that_begin_at_once_do_not_sweep_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making a folder and locking it another restore (of another store beside it) looks."""
    real = restoring._locked
    depth = [0]

    @contextlib.contextmanager
    def between(path: Path) -> Iterator[int]:
        if depth[0] == 0:  # we have just made it
            depth[0] = 1
            with restoring._private_folder(str(tmp_path)):
                pass
        with real(path) as descriptor:
            yield descriptor

    monkeypatch.setattr(restoring, "_locked", between)
    with restoring._private_folder(str(tmp_path)) as folder:
        (folder / "rows.sqlite").write_bytes(b"rows")
        assert folder.is_dir()
