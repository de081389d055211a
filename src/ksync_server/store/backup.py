"""Take a backup while the server runs: one snapshot of the rows, and every extent that it names.

The rows are always a SQLite file: VACUUM INTO makes it of a SQLite store, a copy table by table in one
REPEATABLE READ transaction of a PostgreSQL store, so either restores into either. Extents never change: on
the file system of the store they are linked, elsewhere copied, and what the folder has already stays.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from ksync_server import __version__
from ksync_server import settings as configuration
from ksync_server.store import holds, schema
from ksync_server.store import tables as t
from ksync_server.store.bundle import (
    Bundle,
    Manifest,
    State,
    explained,
    extents_of,
    flush_file,
    flush_folder,
    sha256,
    write_file,
)
from ksync_server.store.database import Database, Read
from ksync_server.store.extents import ExtentStore, LocalExtents

Progress = Callable[[str, int, int], None]  # what, done, of how many

_PIECE = 1 << 20
_PARALLEL = 8  # files copied and flushed at once: a flush takes longer than the copy of a small one
_VACUUM_STEPS = 100_000  # of SQLite's machine between two reports of progress
_ROWS = 1000  # copied at once
_WHAT = "The backup was not made, earlier ones are as they were"


@dataclass(frozen=True, slots=True)
class Made:
    """A finished backup."""

    state: State
    copied: int  # extents that the folder did not have
    linked: int  # of those, the ones that share the store's file
    states_erased: int
    extents_erased: int


def create(
    database: Database,
    extents: ExtentStore,
    folder: Path,
    *,
    keep: int = 1,
    with_bytes: bool = True,
    key_file: Path | None = None,
    key_sets: Mapping[str, str] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Made:
    """Add a state to a folder of backups. Blocking; other processes go on reading and writing.

    Every write that was acknowledged before this began is in it.

    Args:
        keep: states that stay, this one included.
        with_bytes: False for rows and the names of the extents alone, where the bytes are safe elsewhere.
        key_file: put into the backup too, which then opens every account by itself.
        key_sets: fingerprints of the key sets in use, so that a restore beside another key file is noticed.

    Raises:
        ConfigError: an older schema, or a folder that is no backup or in use; nothing is changed.
        InsufficientStorage, Unavailable: a disk or the database failed; earlier states are as they were.

    Cost: one pass over the rows, one `stat` per extent, one copy of each new one that cannot be linked.
    """
    schema.require_current(database)
    bundle = Bundle(folder)
    with explained(_WHAT), bundle.opened(), holds.hold(database) as hold:
        began = int(time.time())
        with bundle.new_state(began) as part:
            rows = part / "rows.sqlite"
            snapshot(database, rows, progress)
            wanted = extents_of(rows)
            taken = _Taker(bundle, extents, progress)
            if with_bytes:
                taken.take(wanted)
            hold.check()
            if key_file is not None:
                write_file(part / "keys.toml", key_file.read_bytes())
            manifest = Manifest(
                began_at=began,
                ended_at=int(time.time()),
                database=database.dialect,
                program=__version__,
                rows_bytes=rows.stat().st_size,
                rows_sha256=sha256(rows),
                extents=len(wanted),
                extent_bytes=sum(size for _, size in wanted),
                has_bytes=with_bytes,
                keys_sha256=sha256(part / "keys.toml") if key_file is not None else None,
                key_sets=dict(key_sets or {}),
                **_described(rows, taken.lost),
            )
            state = bundle.publish(part, manifest)
        with explained("The backup is made, but earlier ones could not be erased"):
            states, erased = bundle.prune(max(keep, 1))
    return Made(state, taken.copied, taken.linked, states, erased)


def _described(rows: Path, lost: set[str]) -> dict[str, Any]:
    with _raw(rows) as raw:
        number, generation = raw.execute(
            "SELECT version_num, generation FROM alembic_version, store"
        ).fetchone()
        counts = {
            table.name: raw.execute(f'SELECT count(*) FROM "{table.name}"').fetchone()[0]  # noqa: S608
            for table in t.metadata.sorted_tables
        }
        damaged = {blob for (blob,) in raw.execute("SELECT id FROM blob WHERE damaged_at IS NOT NULL")}
        for key in lost:
            damaged.update(
                blob for (blob,) in raw.execute("SELECT blob_id FROM extent WHERE key = ?", (key,))
            )
    return {
        "schema": int(number),
        "generation": str(generation),
        "counts": counts,
        "damaged": sorted(damaged),
    }


# -- rows -----------------------------------------------------------------------------------------


def snapshot(database: Database, path: Path, progress: Progress = lambda what, done, total: None) -> None:
    """Write every row of one moment to a new SQLite file.

    Raises:
        Unavailable: the database does not answer.
        OSError, sqlite3.Error: the disk failed; a part of the file may be there.
    """
    if database.dialect == "sqlite":
        _vacuum(Path(database.path), path, progress)
    else:
        _export(database, path, progress)
    path.chmod(0o600)
    flush_file(path)


@contextlib.contextmanager
def _raw(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()


def _vacuum(source: Path, target: Path, progress: Progress) -> None:
    with _raw(source) as raw:
        pages, size = raw.execute("SELECT * FROM pragma_page_count, pragma_page_size").fetchone()

        def report() -> int:
            with contextlib.suppress(FileNotFoundError):
                progress("rows", min(target.stat().st_size, pages * size), pages * size)
            return 0

        raw.set_progress_handler(report, _VACUUM_STEPS)
        raw.execute("PRAGMA busy_timeout=60000")
        raw.execute("VACUUM INTO ?", (str(target),))
        progress("rows", 1, 1)


def _export(database: Database, target: Path, progress: Progress) -> None:
    """PostgreSQL: the same file, from rows that one snapshot sees."""
    empty = Database(configuration.Database(url=f"sqlite:///{target}", durability="normal"), threads=1)
    try:
        schema.migrate(empty)
    finally:
        empty.close()
    target.with_name(target.name + ".lock").unlink(missing_ok=True)
    with _raw(target) as raw, database.read() as tx:
        raw.execute("PRAGMA journal_mode=DELETE")  # one file, nothing beside it
        raw.execute("PRAGMA synchronous=OFF")  # flushed as a whole at its end
        raw.execute("PRAGMA foreign_keys=OFF")
        raw.execute("BEGIN")
        for done, table in enumerate(t.metadata.sorted_tables):
            progress("tables", done, len(t.metadata.sorted_tables))
            raw.execute(f'DELETE FROM "{table.name}"')  # noqa: S608 - a name of ours
            raw.executemany(insertion(table), _rows(tx, table))
        for name, last in last_ids(tx.connection).items():
            raise_id(raw, name, last)
        raw.execute("COMMIT")


def _rows(tx: Read, table: sa.Table) -> Iterator[tuple[Any, ...]]:
    streamed = tx.connection.execution_options(stream_results=True, yield_per=_ROWS)
    with streamed.execute(sa.select(table)) as result:
        for row in result:
            yield tuple(row)


def insertion(table: sa.Table) -> str:
    """SQLite's INSERT of a whole row."""
    names = ", ".join(f'"{column.name}"' for column in table.columns)
    marks = ", ".join("?" * len(table.columns))
    return f'INSERT INTO "{table.name}" ({names}) VALUES ({marks})'  # noqa: S608 - names of ours


def counted_tables() -> list[sa.Table]:
    """Tables whose ids are never used again."""
    return [table for table in t.metadata.sorted_tables if table.autoincrement_column is not None]


def last_ids(connection: sa.Connection) -> dict[str, int]:
    """The last id that each table gave away, whether its row still exists or not."""
    if connection.dialect.name == "sqlite":
        found = connection.execute(sa.text("SELECT name, seq FROM sqlite_sequence"))
        return {str(name): int(last) for name, last in found}
    last: dict[str, int] = {}
    for table in counted_tables():
        name = connection.execute(
            sa.text("SELECT pg_get_serial_sequence(:name, 'id')"), {"name": table.name}
        ).scalar()
        if name is not None:
            value, called = connection.execute(
                sa.text(f"SELECT last_value, is_called FROM {name}")  # noqa: S608 - from the catalogue
            ).one()
            last[table.name] = int(value) if called else 0
    return last


def raise_id(raw: sqlite3.Connection, table: str, last: int) -> None:
    """Make a SQLite file give away ids above `last` only."""
    found = raw.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
    if found is None:
        raw.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, last))
    elif found[0] < last:
        raw.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = ?", (last, table))


# -- extents --------------------------------------------------------------------------------------


class _Taker:
    """Brings extents into a backup."""

    def __init__(self, bundle: Bundle, extents: ExtentStore, progress: Progress) -> None:
        self._bundle = bundle
        self._extents = extents
        self._progress = progress
        self._files = extents if isinstance(extents, LocalExtents) else None
        self._links = self._files is not None  # until the first one shows that it cannot be done
        self.copied = 0
        self.linked = 0
        self.lost: set[str] = set()  # not in the store, or not whole

    def take(self, wanted: list[tuple[str, int]]) -> None:
        """Take what the folder has not; durable when this returns."""
        touched: set[Path] = set()
        missing = []
        for key, size in wanted:
            path = self._bundle.extent(key)
            try:
                if path.stat().st_size == size:
                    continue
                path.unlink()  # what a damaged store gave once
            except FileNotFoundError:
                pass
            missing.append((key, size))
            if path.parent not in touched:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                touched.update((path.parent, path.parent.parent, path.parent.parent.parent))
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="copy") as pool:
            try:
                for done, _ in enumerate(pool.map(self._take, missing), 1):
                    self._progress("extents", done, len(missing))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for folder in touched:
            flush_folder(folder)

    def _take(self, extent: tuple[str, int]) -> None:
        key, size = extent
        path = self._bundle.extent(key)
        try:
            if self._links and self._link(key, path):
                self.linked += 1
            else:
                self._copy(key, size, path)
            self.copied += 1
        except (FileNotFoundError, EOFError):
            self.lost.add(key)
            return
        if path.stat().st_size != size:
            self.lost.add(key)

    def _link(self, key: str, path: Path) -> bool:
        assert self._files is not None
        try:
            os.link(self._files.path(key), path)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            self._links = False
            return False
        return True

    def _copy(self, key: str, size: int, path: Path) -> None:
        part = path.with_suffix(".part")
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                for piece in self._extents.read(key, 0, size, _PIECE):
                    file.write(piece)
                file.flush()
                os.fdatasync(file.fileno())
            part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
