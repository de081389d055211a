"""Put a backup in the place of a store, while the server runs.

Everything slow comes first and changes nothing that anybody sees: checksums, migration of a working copy of
the rows, missing extents. The switch is one transaction that no write is under way in: kill it anywhere and
the store is the old one or the new one. What must not go back in time does not: ids, log-in epochs,
revocations and the audit log of the replaced store are carried over. A new generation ends every ETag and
sync token.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ksync_server import settings as configuration
from ksync_server.errors import ConfigError, Unavailable
from ksync_server.store import holds, schema
from ksync_server.store import tables as t
from ksync_server.store.backup import Progress, counted_tables, insertion, last_ids, raise_id
from ksync_server.store.blobs import REAP, REAP_ORPHANS
from ksync_server.store.bundle import Bundle, State, explained, flush_folder
from ksync_server.store.database import Database, closed_to_writers
from ksync_server.store.extents import ExtentStore, LocalExtents

_COPIES = ".ksync-restore-"  # what names of working copies begin with
_PIECE = 1 << 20
_ROWS = 1000  # copied at once
_ADVISORY_LOCK = 7_205_759_404  # one restore at a time, on any node
_REAPER_S = 0.2  # between two looks at whether the reaper has ended
_WHAT = "Nothing was restored, the store is as it was"


@dataclass(slots=True)
class Restored:
    """What a restore did, and what the operator should look at."""

    state: str = ""
    taken_at: int = 0  # Unix seconds: later changes are gone
    generation: str = ""
    rows: int = 0
    extents_added: int = 0
    damaged: list[int] = field(default_factory=list)  # blobs whose bytes are not in the backup
    passwords_active: int = 0  # application and device passwords that work now
    passwords_revoked: int = 0  # stayed revoked, or were revoked because it was asked for
    passwords_revived: list[str] = field(default_factory=list)  # names: the replaced store did not have them
    mailboxes_gone: list[str] = field(default_factory=list)  # made since: address, and the folder of its mail
    accounts_reverted: list[str] = field(
        default_factory=list
    )  # sync ids: password, factor or state went back
    jobs_ready: int = 0
    locks_dropped: int = 0


def restore(
    database: Database,
    extents: ExtentStore,
    folder: Path,
    *,
    state: str | None = None,
    force: bool = False,
    check_bytes: bool = True,
    accept_damaged: bool = False,
    revoke_passwords: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Restored:
    """Make the store what it was when a backup was taken. Blocking; servers go on running.

    Args:
        state: its name; None = the newest.
        force: replace a store that has accounts.
        check_bytes: read every byte of the backup and compare; else sizes alone.
        accept_damaged: restore although bytes are missing or wrong; their blobs are marked as damaged.
        revoke_passwords: revoke every application password, as after an intrusion.

    Raises:
        ConfigError: no backup, one that is cut, altered or newer than this program, or a store in use without
            `force`; nothing is changed.
        InsufficientStorage, Unavailable: a disk or the database failed; the store is as it was.

    Cost: a read of the whole backup, then writes are refused for as long as it takes to write the rows: on
    SQLite the pages of the file, on PostgreSQL a DELETE and a COPY.
    """
    found = Bundle(folder).state(state)
    if found.manifest.schema > schema.SCHEMA:
        raise ConfigError(
            f"The backup has schema {found.manifest.schema}, this program knows {schema.SCHEMA}: update it."
        )
    found.check()
    with explained(_WHAT), _alone(database), _working_copy(database, found) as rows:
        schema.migrate(database)
        if not force and _is_used(database):
            raise ConfigError(
                "The store has accounts or collections: --force puts the backup in their place."
            )
        report = Restored(state=found.name, taken_at=found.manifest.began_at)
        with holds.hold(database) as hold:
            _wait_for_reaper(database)
            giver = _Giver(Bundle(folder), extents, progress)
            wanted = giver.check(rows, found, check_bytes=check_bytes)
            report.damaged = sorted(giver.damaged)
            if report.damaged and not accept_damaged:
                raise ConfigError(
                    f"The bytes of {len(report.damaged)} files are missing or wrong in the backup:"
                    " --accept-damaged restores the others."
                )
            report.extents_added = giver.give(wanted)
            hold.check()
            progress("switch", 0, 1)
            with _Switch(database, rows) as switch:
                giver.give_again(wanted)
                _merge(switch.live, switch.prepared, report, revoke=revoke_passwords)
                switch.publish()
            progress("switch", 1, 1)
    return report


def _is_used(database: Database) -> bool:
    with database.read() as tx:
        return any(tx.execute(sa.select(table.c.id).limit(1)).first() for table in (t.account, t.collection))


@contextlib.contextmanager
def _alone(database: Database) -> Iterator[None]:
    """One restore at a time."""
    busy = ConfigError("Another restore is under way.")
    if database.dialect == "sqlite":
        descriptor = os.open(database.path + ".restore", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise busy from None
            yield
        finally:
            os.close(descriptor)
    else:
        with database.connected() as connection:  # the lock ends with the session
            if not connection.execute(sa.select(sa.func.pg_try_advisory_lock(_ADVISORY_LOCK))).scalar():
                raise busy
            try:
                yield
            finally:
                connection.execute(sa.select(sa.func.pg_advisory_unlock(_ADVISORY_LOCK)))


@contextlib.contextmanager
def _working_copy(database: Database, state: State) -> Iterator[Path]:
    """The backup's rows in this program's schema, in a file of our own."""
    near = os.path.dirname(os.path.abspath(database.path)) if database.dialect == "sqlite" else None
    with _private_folder(near or tempfile.gettempdir()) as folder:
        path = folder / "rows.sqlite"
        shutil.copyfile(state.rows, path)
        path.chmod(0o600)
        copy = Database(configuration.Database(url=f"sqlite:///{path}", durability="normal"), threads=1)
        try:
            schema.migrate(copy)
            with copy.connected() as connection:
                sound = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar() == "ok"
                if not sound or connection.exec_driver_sql("PRAGMA foreign_key_check").first():
                    raise ConfigError(f"The rows of the backup {state.folder} do not fit together.")
        finally:
            copy.close()
        yield path


@contextlib.contextmanager
def _private_folder(near: str) -> Iterator[Path]:
    """Gone afterwards, where it was killed with the next restore: the hashes of passwords are in it."""
    for left in Path(near).glob(_COPIES + "*"):
        with contextlib.suppress(OSError), _locked(left) as descriptor:
            if os.fstat(descriptor).st_uid == os.geteuid():
                shutil.rmtree(left)
    with contextlib.ExitStack() as stack:
        while True:
            made = tempfile.TemporaryDirectory(prefix=_COPIES, dir=near, ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
            # A restore of another store may take it for one that was left, until it is locked.
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                stack.enter_context(_locked(folder))
                if folder.exists():
                    break
        yield folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Nobody else has it locked. Raises: OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def _wait_for_reaper(database: Database) -> None:
    """The hold keeps the reaper from starting; one that is at work ends within its lease."""
    running = sa.select(t.job.c.id).where(
        (t.job.c.kind == REAP) | (t.job.c.kind == REAP_ORPHANS),
        t.job.c.state == "running",
        t.job.c.lease_until > sa.bindparam("now"),
    )
    while database.fast(running, {"now": int(time.time())}):
        time.sleep(_REAPER_S)


# -- bytes ----------------------------------------------------------------------------------------


class _Giver:
    """Brings the extents of a backup into the store."""

    def __init__(self, bundle: Bundle, extents: ExtentStore, progress: Progress) -> None:
        self._bundle = bundle
        self._extents = extents
        self._files = extents if isinstance(extents, LocalExtents) else None
        self._progress = progress
        self._links = self._files is not None
        self._bytes = True  # whether the backup has them
        self._compare = True
        self.damaged: set[int] = set()

    def check(self, rows: Path, state: State, *, check_bytes: bool) -> list[tuple[str, int]]:
        """Compare each blob with its hash, or its size; returns the extents of the sound ones."""
        self._bytes, self._compare = state.manifest.has_bytes, check_bytes
        sound: list[tuple[str, int]] = []
        with contextlib.closing(sqlite3.connect(rows, isolation_level=None)) as raw:
            every = raw.execute(
                "SELECT id, size, sha256 FROM blob WHERE content IS NULL ORDER BY id"
            ).fetchall()
            for done, (blob, size, sha256) in enumerate(every, 1):
                named = raw.execute(
                    "SELECT key, size FROM extent WHERE blob_id = ? ORDER BY position", (blob,)
                ).fetchall()
                if self._is_sound(named, size, sha256 if check_bytes else None):
                    sound += named
                else:
                    self.damaged.add(blob)
                self._progress("checked", done, len(every))
            now = int(time.time())
            raw.executemany(
                "UPDATE blob SET damaged_at = coalesce(damaged_at, ?) WHERE id = ?",
                [(now, blob) for blob in self.damaged],
            )
        return sound

    def _is_sound(self, extents: list[tuple[str, int]], size: int, sha256: bytes | None) -> bool:
        hashed = hashlib.sha256()
        found = 0
        try:
            for key, length in extents:
                found += length
                if sha256 is not None:
                    for piece in self._pieces(key, length):
                        hashed.update(piece)
                elif self._bytes:
                    if self._bundle.extent(key).stat().st_size != length:
                        return False
                else:  # its last byte shows that it is there
                    sum(map(len, self._extents.read(key, max(length - 1, 0), length, 1)))
        except (FileNotFoundError, EOFError):
            return False
        return found == size and (sha256 is None or hashed.digest() == sha256)

    def _pieces(self, key: str, size: int) -> Iterator[bytes]:
        """Where the backup has no bytes, those of the store."""
        if not self._bytes:
            yield from self._extents.read(key, 0, size, _PIECE)
            return
        with self._bundle.extent(key).open("rb", buffering=0) as file:
            left = size
            while piece := file.read(_PIECE):
                left -= len(piece)
                yield piece
        if left:
            raise EOFError(key)

    def give(self, wanted: list[tuple[str, int]]) -> int:
        """Write what the store has not; returns how many extents that were."""
        if not self._bytes:
            return 0
        added = 0
        for done, (key, size) in enumerate(wanted, 1):
            if not self._has(key, size):
                if not (self._links and self._link(key)):
                    self._write(key, size)
                added += 1
            self._progress("extents", done, len(wanted))
        return added

    def give_again(self, wanted: list[tuple[str, int]]) -> None:
        """Inside the switch: what a reaper that began before the hold may still have taken."""
        if self._files is not None:
            self.give([each for each in wanted if not self._files.path(each[0]).exists()])

    def _has(self, key: str, size: int) -> bool:
        if self._files is not None:
            theirs, ours = self._files.path(key), self._bundle.extent(key)
            if not theirs.exists():
                return False
            # The backup's file was found sound; that of the store may be why it is restored.
            return theirs.samefile(ours) or (
                filecmp.cmp(theirs, ours, shallow=False) if self._compare else theirs.stat().st_size == size
            )
        return self._extents.size(key) == size

    def _link(self, key: str) -> bool:
        """Let the store share the backup's file, in the place of one that may be damaged."""
        assert self._files is not None
        path = self._files.path(key)
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            os.link(self._bundle.extent(key), part)
            part.replace(path)
        except OSError:  # another file system, or one without links
            self._links = False
            return False
        for folder in (path.parent, path.parent.parent, path.parent.parent.parent):
            flush_folder(folder)
        return True

    def _write(self, key: str, size: int) -> None:
        self._extents.erase([key])  # also what an interrupted restore left
        writer = self._extents.create(key)
        try:
            for piece in self._pieces(key, size):
                writer.write(piece)
            writer.finish()
        except BaseException:
            writer.abort()
            raise


# -- rows -----------------------------------------------------------------------------------------


def _merge(live: Connection, prepared: sqlite3.Connection, report: Restored, *, revoke: bool) -> None:
    """Adapt the backup's rows to the present, and carry over what must not go back in time.

    `live` sees the store that is replaced, which nobody writes to any more.
    """
    now = int(time.time())
    run = prepared.execute
    generations = {run("SELECT generation FROM store").fetchone()[0]}
    generations.add(live.execute(sa.select(t.store.c.generation)).scalar_one())
    report.generation = next(new for new in iter(lambda: secrets.token_hex(3), "") if new not in generations)
    run("UPDATE store SET generation = ?, oldest_schema = ?", (report.generation, schema.SCHEMA))
    # Uploads, locks and counters of the past mean nothing now. Those of the present go on counting.
    run("DELETE FROM stage")
    report.locks_dropped = run("DELETE FROM lock").rowcount
    _replace(live, prepared, t.throttle)
    run("UPDATE job SET state = 'ready' WHERE state = 'running'")
    run("UPDATE job SET lease_until = NULL, fence = NULL, worker = NULL")
    report.jobs_ready = run("SELECT count(*) FROM job WHERE state = 'ready'").fetchone()[0]
    _merge_accounts(live, prepared, report)
    _merge_mailboxes(live, prepared, report)
    _merge_passwords(live, prepared, report, now, revoke=revoke)
    # A code that was used a moment ago stays used.
    run("UPDATE second_factor SET last_step = max(last_step, ?)", (now // 30,))
    for digest, used_at in live.execute(
        sa.select(t.recovery_code.c.digest, t.recovery_code.c.used_at).where(
            t.recovery_code.c.used_at.is_not(None)
        )
    ):
        run("UPDATE recovery_code SET used_at = coalesce(used_at, ?) WHERE digest = ?", (used_at, digest))
    _merge_garbage(live, prepared, now)
    _merge_audit(live, prepared, report, now)
    for name, last in last_ids(live).items():
        raise_id(prepared, name, last)
    report.rows = sum(
        run(f'SELECT count(*) FROM "{table.name}"').fetchone()[0]  # noqa: S608 - a name of ours
        for table in t.metadata.sorted_tables
    )


def _replace(live: Connection, prepared: sqlite3.Connection, table: sa.Table) -> None:
    prepared.execute(f'DELETE FROM "{table.name}"')  # noqa: S608 - a name of ours
    prepared.executemany(insertion(table), map(tuple, live.execute(sa.select(table))))


def _merge_accounts(live: Connection, prepared: sqlite3.Connection, report: Restored) -> None:
    """Results of log-ins that a worker remembers carry the epoch: no epoch of either store comes again."""
    c = t.account.c
    epochs = [prepared.execute("SELECT max(auth_epoch) FROM account").fetchone()[0] or 0]
    epochs.append(live.execute(sa.select(sa.func.max(c.auth_epoch))).scalar() or 0)
    prepared.execute("UPDATE account SET auth_epoch = ?", (max(epochs) + 1,))
    # Whoever was shut out stays out; taking that back is the operator's to say.
    out = live.execute(sa.select(c.sync_id).where(c.state == "suspended")).all()
    prepared.executemany(
        "UPDATE account SET state = 'suspended' WHERE sync_id = ? AND state = 'active'", map(tuple, out)
    )
    names = (c.sync_id, c.password_hash, c.second_factor, c.state)
    now = {row[0]: (row[1], bool(row[2]), row[3]) for row in live.execute(sa.select(*names))}
    then = prepared.execute("SELECT sync_id, password_hash, second_factor, state FROM account")
    report.accounts_reverted = sorted(
        sync_id
        for sync_id, password, factor, state in then
        if now and now.get(sync_id) != (password, bool(factor), state)
    )


def _merge_mailboxes(live: Connection, prepared: sqlite3.Connection, report: Restored) -> None:
    """A mailbox that was suspended stays so; mail of those made since is where no mailbox leads any more."""
    c = t.mailbox.c
    out = live.execute(sa.select(c.address_key).where(c.state == "suspended")).all()
    prepared.executemany("UPDATE mailbox SET state = 'suspended' WHERE address_key = ?", map(tuple, out))
    kept = {folder for (folder,) in prepared.execute("SELECT folder FROM mailbox")}
    now = live.execute(sa.select(c.address, c.folder).order_by(c.address)).all()
    report.mailboxes_gone = [f"{address}: {folder}" for address, folder in now if folder not in kept]


def _merge_passwords(
    live: Connection, prepared: sqlite3.Connection, report: Restored, now: int, *, revoke: bool
) -> None:
    """What was revoked stays revoked: it has leaked, or its device is lost."""
    used = live.execute(sa.select(t.account.c.id).limit(1)).first() is not None
    for table in (t.app_password, t.device_password):
        known: dict[str, int | None] = {
            row[0]: row[1] for row in live.execute(sa.select(table.c.lookup, table.c.revoked_at))
        }
        rows = table.name
        active = prepared.execute(f"SELECT lookup, name FROM {rows} WHERE revoked_at IS NULL").fetchall()  # noqa: S608 - a name of ours
        ends = {lookup: now if revoke else known.get(lookup) for lookup, _ in active}
        ended = [(at, lookup) for lookup, at in ends.items() if at is not None]
        prepared.executemany(f"UPDATE {rows} SET revoked_at = ? WHERE lookup = ?", ended)  # noqa: S608 - a name of ours
        report.passwords_revoked += len(ended)
        report.passwords_active += len(active) - len(ended)
        if used and not revoke:
            report.passwords_revived += sorted(name for lookup, name in active if lookup not in known)


def _merge_garbage(live: Connection, prepared: sqlite3.Connection, now: int) -> None:
    """Extents of the replaced store are erased in due time, not while somebody still reads them."""
    put = (
        "INSERT OR IGNORE INTO garbage (key, since) SELECT ?1, ?2"
        " WHERE NOT EXISTS (SELECT 1 FROM extent WHERE key = ?1)"
    )
    for keys in live.execute(sa.select(t.extent.c.key)).partitions(_ROWS):
        prepared.executemany(put, [(key, now) for (key,) in keys])
    for rows in live.execute(sa.select(t.garbage.c.key, t.garbage.c.since)).partitions(_ROWS):
        prepared.executemany(put, [(key, since) for key, since in rows])


def _merge_audit(live: Connection, prepared: sqlite3.Connection, report: Restored, now: int) -> None:
    """The log only grows: what was done since the backup was done."""
    c = t.audit.c
    columns = (c.id, c.at, c.actor, c.address, c.action, c.subject, c.detail)
    there = "SELECT 1 FROM audit WHERE id = ? AND at = ? AND actor = ? AND action = ? AND subject = ?"
    put = "INSERT INTO audit (at, actor, address, action, subject, detail) VALUES (?, ?, ?, ?, ?, ?)"
    for number, at, actor, address, action, subject, detail in live.execute(sa.select(*columns)):
        if prepared.execute(there, (number, at, actor, action, subject)).fetchone() is None:
            prepared.execute(put, (at, actor, address, action, subject, detail))
    said = json.dumps({"state": report.state, "taken_at": report.taken_at})
    prepared.execute(put, (now, "operator", "", "store.restore", report.generation, said))


class _Switch:
    """The moment at which the store becomes another one; nobody writes while it lasts."""

    live: Connection
    prepared: sqlite3.Connection

    def __init__(self, database: Database, rows: Path) -> None:
        self._database = database
        self._rows = rows
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Switch:
        with contextlib.ExitStack() as stack:
            self.live = stack.enter_context(closed_to_writers(self._database))
            self.prepared = stack.enter_context(
                contextlib.closing(sqlite3.connect(self._rows, isolation_level=None))
            )
            self.prepared.execute("PRAGMA synchronous=OFF")  # a copy that nobody needs after a crash
            self.prepared.execute("PRAGMA foreign_keys=OFF")
            self.prepared.execute("BEGIN")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.__exit__(*details)

    def publish(self) -> None:
        """Replace every row; durable when this returns."""
        if self.prepared.execute("PRAGMA foreign_key_check").fetchone():
            raise Unavailable("The rows do not fit together any more.")
        self.prepared.execute("COMMIT")
        if self._database.dialect == "sqlite":
            raw = self.live.connection.dbapi_connection
            assert isinstance(raw, sqlite3.Connection)
            raw.execute("ROLLBACK")  # of the look at what is replaced; the file lock keeps writers out
            self.prepared.backup(raw)
        else:
            self._copy()

    def _copy(self) -> None:
        tables = t.metadata.sorted_tables
        # Not TRUNCATE: readers of an older snapshot would find empty tables.
        for table in reversed(tables):
            self.live.execute(sa.delete(table))
        driver: Any = self.live.connection.dbapi_connection
        for table in tables:
            names = [column.name for column in table.columns]
            booleans = [at for at, each in enumerate(table.columns) if isinstance(each.type, sa.Boolean)]
            listed = ", ".join(f'"{name}"' for name in names)
            with driver.cursor().copy(f'COPY "{table.name}" ({listed}) FROM STDIN') as copy:
                for row in self.prepared.execute(f'SELECT {listed} FROM "{table.name}"'):  # noqa: S608
                    values = list(row)
                    for at in booleans:
                        values[at] = None if values[at] is None else bool(values[at])
                    copy.write_row(values)
        for name, last in self.prepared.execute("SELECT name, seq FROM sqlite_sequence WHERE seq > 0"):
            if name in {table.name for table in counted_tables()}:
                self.live.execute(
                    sa.text("SELECT setval(pg_get_serial_sequence(:name, 'id'), :last)"),
                    {"name": name, "last": last},
                )
