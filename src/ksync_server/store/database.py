"""One interface over SQLite and PostgreSQL: `read() -> tx`, `write(fn) -> result`.

- SQLite: one writer thread per process commits queued writes in groups, one disk flush for all, under a file
  lock that every process of the machine shares (command line included). Readers never wait.
- PostgreSQL: one transaction per write, tried again after a serialisation failure or deadlock.

A restore replaces every row in one transaction and changes the store's generation. Each transaction reads
the generation it belongs to, none is remembered: after `begin_request`, a request whose transactions would
belong to two generations is refused and tries again, in whatever process or node it runs.

Statements are Core expressions built once at module level; `fast` runs them on the raw cursor. Values come
back as the driver gives them: a Boolean is 0/1 on SQLite, True/False on PostgreSQL; use it for truth only.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import fcntl
import itertools
import os
import queue
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from ksync_server import settings as configuration
from ksync_server.errors import ClientError, ConfigError, InsufficientStorage, Unavailable

T = TypeVar("T")
Row = tuple[Any, ...]
Parameters = Mapping[str, Any]

_RETRIED = frozenset({"40001", "40P01"})  # serialization_failure, deadlock_detected
_RETRIES = 8
_GENERATION = "SELECT generation FROM store"
# PostgreSQL: one round trip. The table lock is what a restore takes for itself alone: it waits for the writes
# under way, and those that come meanwhile are told so at once.
_BEGIN_READ = f"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {_GENERATION}"
_BEGIN_WRITE = f"BEGIN; LOCK TABLE store IN ROW EXCLUSIVE MODE NOWAIT; {_GENERATION}"
# libpq: a server that is gone without a word (a cut cable) would hold a thread for hours. The URL may differ.
_PATIENCE = {
    "connect_timeout": 10,  # seconds
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,  # milliseconds
}
_AT_ONCE = 64  # rows of one INSERT
_GROUP_S = 0.02  # a group takes no further write after this, so that an idle writer waits little


class _Seen:
    """The one generation of the store that a request lives in; None until its first transaction."""

    __slots__ = ("generation",)

    def __init__(self) -> None:
        self.generation: str | None = None

    def check(self, generation: str) -> None:
        """Refuse what belongs to another generation.

        Raises:
            Unavailable: the store was restored since the request began.
        """
        if self.generation is None:
            self.generation = generation
        elif self.generation != generation:
            raise being_restored()


_seen: contextvars.ContextVar[_Seen | None] = contextvars.ContextVar("seen", default=None)


def begin_request() -> None:
    """From here on all transactions of this task, and of what it runs in the pool, are of one generation."""
    _seen.set(_Seen())


def being_restored() -> Unavailable:
    """What a client is told while a backup takes the place of what it read."""
    return Unavailable("A backup is being restored.", headers=[(b"retry-after", b"5")])


class _Text(NamedTuple):
    """A statement compiled for one dialect."""

    sql: str
    names: tuple[str, ...]  # positional order (SQLite); () = by name
    defaults: dict[str, Any]


class Read:
    """One snapshot of the rows, for one thread and not longer than the `with` or call it came from."""

    __slots__ = ("_cursor", "_database", "_generation", "connection")

    def __init__(self, database: Database, connection: Connection, generation: str | None = None) -> None:
        self._database = database
        self._generation = generation
        self.connection = connection
        self._cursor = connection.connection.cursor()

    def fast(self, statement: sa.Executable, parameters: Parameters | None = None) -> list[Row]:
        """All rows of a module-level statement, run on the raw cursor (2 to 3 times cheaper than `execute`).

        Not for `IN (...)` lists of varying length: those go through `execute`.
        """
        text = self._database.compiled(statement)
        self._cursor.execute(text.sql, _arguments(text, parameters or {}))
        return list(self._cursor.fetchall()) if self._cursor.description else []

    def one(self, statement: sa.Executable, parameters: Parameters | None = None) -> Row | None:
        """The first row of `fast`, or None."""
        rows = self.fast(statement, parameters)
        return rows[0] if rows else None

    def scalar(self, statement: sa.Executable, parameters: Parameters | None = None) -> Any:
        """The first value of the first row, or None."""
        row = self.one(statement, parameters)
        return row[0] if row else None

    def execute(
        self, statement: sa.Executable, parameters: Parameters | Sequence[Parameters] | None = None
    ) -> sa.CursorResult[Any]:
        """Run any Core statement with typed results."""
        result: sa.CursorResult[Any] = self.connection.execute(statement, parameters)
        return result

    @property
    def generation(self) -> str:
        """The store's generation in this snapshot, part of every ETag and sync token.

        Cost: 3 us on SQLite at its first use, nothing on PostgreSQL.
        """
        if self._generation is None:
            row = self._cursor.execute(_GENERATION).fetchone()
            assert row is not None, "a migrated store has one row"
            self._generation = str(row[0])
        return self._generation

    @property
    def dialect(self) -> str:
        """sqlite or postgresql."""
        return self._database.dialect


class Write(Read):
    """A transaction that may change rows; commits when the function that got it returns."""

    __slots__ = ()

    def many(self, statement: sa.Executable, rows: Iterable[Parameters]) -> None:
        """A module-level `INSERT ... VALUES (...)` of each row, on the raw cursor.

        Cost: on SQLite one step for up to 64 rows, because the interpreter's lock changes hands at each.
        """
        text = self._database.compiled(statement)
        values = [_arguments(text, row) for row in rows]
        if not text.names:
            self._cursor.executemany(text.sql, values)
            return
        at = 0
        while left := len(values) - at:
            many = min(1 << left.bit_length() - 1, _AT_ONCE)  # few lengths, so few statements to prepare
            group = ", (" + ", ".join("?" * len(text.names)) + ")"
            some = itertools.chain.from_iterable(values[at : at + many])
            self._cursor.execute(text.sql + group * (many - 1), list(some))
            at += many


def _arguments(text: _Text, parameters: Parameters) -> Any:
    if text.names:
        defaults = text.defaults
        return [parameters[name] if name in parameters else defaults[name] for name in text.names]
    return {**text.defaults, **parameters}


class Database:
    """The rows of one installation, for one process. Open it after a fork, never before."""

    def __init__(self, settings: configuration.Database, *, threads: int = 8) -> None:
        self._settings = settings
        url = sa.make_url(settings.url)
        self.dialect = url.get_backend_name()
        if self.dialect not in ("sqlite", "postgresql"):
            raise ConfigError(f"database.url: {self.dialect} is not supported")
        self._texts: dict[sa.Executable, _Text] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rows")
        if self.dialect == "sqlite":
            if not url.database:
                raise ConfigError("database.url: a file is needed")
            self._path = url.database
            self._engine = _sqlite_engine(self._path, settings)
            self._writer: _SqliteWriter | None = _SqliteWriter(self)
        else:
            self._engine = sa.create_engine(
                url.set(drivername="postgresql+psycopg"),
                pool_size=threads + 2,
                max_overflow=4,
                pool_timeout=settings.busy_timeout_s,
                pool_recycle=1800,
                hide_parameters=True,  # in errors, which are logged
                connect_args={name: value for name, value in _PATIENCE.items() if name not in url.query},
            )
            self._writer = None
        driver = self._engine.dialect.loaded_dbapi
        # Raw cursors raise the driver's own errors, connections those of SQLAlchemy.
        self._failures = (
            sa.exc.OperationalError,
            sa.exc.InterfaceError,
            sa.exc.InternalError,  # a standby that only reads
            driver.OperationalError,
            driver.InterfaceError,
            driver.InternalError,
        )
        self._autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._local = threading.local()
        self._all_held: list[Connection] = []
        self._closed = False
        sa.event.listen(self._engine, "do_connect", self._before_connecting)

    def _before_connecting(self, *_: object) -> None:
        """A thread that outlives `close` must not open what nobody would close any more."""
        if self._closed:
            raise Unavailable("The server is stopping.", headers=[(b"retry-after", b"5")])

    # -- opening ----------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """For migrations and tests."""
        return self._engine

    @property
    def path(self) -> str:
        """SQLite: the database file."""
        return self._path

    @property
    def settings(self) -> configuration.Database:
        """The settings it was opened with."""
        return self._settings

    @contextlib.contextmanager
    def connected(self) -> Iterator[Connection]:
        """A connection outside any transaction, which needs no table to be there.

        Raises:
            Unavailable: the database does not answer.
        """
        with self._translated(), self._autocommit.connect() as connection:
            yield connection

    @property
    def generation(self) -> str:
        """The store's generation at this moment; inside a transaction ask that one.

        Raises:
            Unavailable: the database does not answer.
        """
        with self.read() as tx:
            return tx.generation

    def close(self) -> None:
        """End the threads and connections of this process; queued writes are finished first."""
        if self._writer:
            self._writer.close()
        self._pool.shutdown(wait=True)
        self._closed = True
        while self._all_held:
            self._all_held.pop().close()
        self._engine.dispose()

    def compiled(self, statement: sa.Executable) -> _Text:
        """The statement's text for this dialect; compiled at its first use."""
        text = self._texts.get(statement)
        if text is None:
            compiled = statement.compile(dialect=self._engine.dialect)  # type: ignore[attr-defined]
            names = tuple(compiled.positiontup or ()) if self.dialect == "sqlite" else ()
            defaults = {
                key: value
                for key, value in compiled.construct_params(_check=False).items()
                if not compiled.binds[key].required
            }
            text = self._texts[statement] = _Text(str(compiled), names, defaults)
        return text

    # -- reading ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def read(self) -> Iterator[Read]:
        """A snapshot: every statement inside sees the same committed state.

        Never keep it open across a send to a client.

        Raises:
            Unavailable: the database does not answer.
        """
        if self.dialect == "sqlite":
            connection = self._held()
            raw = connection.connection.dbapi_connection
            assert isinstance(raw, sqlite3.Connection)
            if raw.in_transaction:  # inside another read of this thread: the same snapshot
                yield Read(self, connection)
                return
            with self._translated():
                raw.execute("BEGIN")
                try:
                    tx = Read(self, connection)
                    if (seen := _seen.get()) is not None:
                        seen.check(tx.generation)
                    yield tx
                finally:
                    raw.execute("ROLLBACK")
        else:
            with self._translated(), self._transaction(_BEGIN_READ) as (connection, generation):
                yield Read(self, connection, generation)

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[tuple[Connection, str]]:
        """PostgreSQL: a transaction that belongs to one generation; commits where the block ends well."""
        with self._autocommit.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
            # Several statements cannot be prepared, and psycopg prepares what comes often.
            cursor = raw.execute(begin, prepare=False)
            while cursor.nextset():
                pass
            generation = str(cursor.fetchone()[0])
            if (seen := _seen.get()) is not None:
                seen.check(generation)
            yield connection, generation
            raw.execute("COMMIT")  # without it the pool rolls back what it gets

    def fast(self, statement: sa.Executable, parameters: Parameters | None = None) -> list[Row]:
        """Rows of a single statement outside any transaction: the cheapest read there is."""
        with self._translated():
            if self.dialect == "sqlite":
                return Read(self, self._held()).fast(statement, parameters)
            with self._autocommit.connect() as connection:
                return Read(self, connection).fast(statement, parameters)

    def _held(self) -> Connection:
        """SQLite: this thread's own read connection."""
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._autocommit.connect()
            connection.exec_driver_sql("PRAGMA query_only=ON")
            self._all_held.append(connection)
        return connection

    async def hot(self, fn: Callable[[Read], T]) -> T:
        """Run a read of a few indexed rows: on the event loop with SQLite, in the pool with PostgreSQL."""
        if self.dialect == "sqlite":
            with self.read() as tx:
                return fn(tx)
        return await self.reading(fn)

    async def reading(self, fn: Callable[[Read], T]) -> T:
        """Run a longer read in the pool, in one snapshot."""

        def run() -> T:
            with self.read() as tx:
                return fn(tx)

        return await self.pooled(run)

    async def pooled(self, fn: Callable[..., T], *arguments: Any) -> T:
        """Run blocking work that is no transaction (hashing, an engine) in the same bounded pool."""
        run = contextvars.copy_context().run
        return await asyncio.get_running_loop().run_in_executor(self._pool, run, fn, *arguments)

    # -- writing ----------------------------------------------------------------------------------

    def submit(self, fn: Callable[[Write], T]) -> Future[T]:
        """Queue a write; the future is done once it is durable or has failed without a trace."""
        if self._writer:
            return self._writer.submit(fn)
        return self._pool.submit(contextvars.copy_context().run, self._postgresql_write, fn)

    def write(self, fn: Callable[[Write], T]) -> T:
        """Run `fn` in a transaction and wait until it is durable.

        `fn` takes at most 5 ms, has no effect outside the transaction, and may run more than once. An error
        it raises rolls its changes back and comes out here. Never call it inside another `fn`.

        Raises:
            InsufficientStorage: the disk is full; nothing of the group was kept.
            Unavailable: the database does not answer, only reads, or was restored since the request began.
        """
        if self._writer:
            return self._writer.submit(fn).result()
        return self._postgresql_write(fn)

    async def writing(self, fn: Callable[[Write], T]) -> T:
        """`write` for the event loop. A cancelled caller does not undo a write that already began."""
        return await asyncio.wrap_future(self.submit(fn))

    def _postgresql_write(self, fn: Callable[[Write], T]) -> T:
        for attempt in range(_RETRIES):
            try:
                with self._translated(), self._transaction(_BEGIN_WRITE) as (connection, generation):
                    return fn(Write(self, connection, generation))
            except Exception as error:  # the driver's or SQLAlchemy's form of the same failure
                state = getattr(getattr(error, "orig", error), "sqlstate", None)
                if state not in _RETRIED or attempt == _RETRIES - 1:
                    raise
            time.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311 - spreads retries, no secret
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Driver failures as errors that a client may see; retried states pass through."""
        try:
            yield
        except sa.exc.TimeoutError as error:
            raise Unavailable("The database is busy.", headers=[(b"retry-after", b"5")]) from error
        except self._failures as error:
            original = getattr(error, "orig", error)
            if getattr(original, "sqlstate", None) in _RETRIED:
                raise
            raise _failure(original) from error


def _failure(error: BaseException | None) -> Exception:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL or getattr(error, "sqlstate", None) == "53100":
        return InsufficientStorage("The server's disk is full.")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
        return Unavailable("The database does not answer.", headers=[(b"retry-after", b"10")])
    if code == sqlite3.SQLITE_CANTOPEN or getattr(error, "sqlstate", "") is None:
        return Unavailable("The database does not answer.", headers=[(b"retry-after", b"10")])
    state = getattr(error, "sqlstate", None)
    if state == "55P03":  # lock_not_available: see _BEGIN_WRITE
        return being_restored()
    if state and (state[:2] in ("08", "57", "53") or state == "25006"):  # 25006: a standby only reads
        return Unavailable("The database does not answer.", headers=[(b"retry-after", b"10")])
    return error if isinstance(error, Exception) else Unavailable("The database does not answer.")


# -- SQLite ---------------------------------------------------------------------------------------


def _sqlite_engine(path: str, settings: configuration.Database) -> Engine:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if not os.path.exists(path):
        # Nobody else on the machine reads it; SQLite gives the files beside it the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    synchronous = {"full": "FULL", "normal": "NORMAL"}.get(settings.durability)
    if synchronous is None:
        raise ConfigError("database.durability: full or normal")
    engine = sa.create_engine(
        f"sqlite:///{path}",
        poolclass=sa.pool.NullPool,  # every thread holds its own connection
        hide_parameters=True,  # in errors, which are logged
        connect_args={
            "check_same_thread": False,
            "timeout": settings.busy_timeout_s,
            "cached_statements": 512,
        },
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(raw: sqlite3.Connection, record: object) -> None:
        raw.isolation_level = None  # this module says BEGIN and COMMIT, nobody else
        # The first connection turns the file to WAL, which needs it alone: the lock keeps others away.
        if raw.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            with file_lock(path):
                raw.execute("PRAGMA journal_mode=WAL")
        raw.execute(f"PRAGMA synchronous={synchronous}")
        raw.execute("PRAGMA foreign_keys=ON")
        raw.execute("PRAGMA cache_size=-16384")

    return engine


@contextlib.contextmanager
def file_lock(path: str, *, patient: bool = True) -> Iterator[None]:
    """The lock that all writing processes share, opened anew: descriptors must not be inherited.

    Raises:
        Unavailable: a restore has it, and the caller is not `patient`.
    """
    descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not patient and _is_switching(path):
                raise being_restored() from None
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_switching(path: str) -> bool:
    """Whether a restore has or waits for the file lock; one that was killed has let go of its mark."""
    try:
        descriptor = os.open(path + ".switch", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def closed_to_writers(database: Database) -> Iterator[Connection]:
    """A transaction for a restore: it begins when no write is under way, and those that come are refused.

    On SQLite it is a snapshot under the file lock, for a look and then a copy of pages over the same
    connection; on PostgreSQL it commits where the block ends well.

    Raises:
        Unavailable: the database does not answer.
    """
    if database.dialect == "sqlite":
        mark = os.open(database.path + ".switch", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(mark, fcntl.LOCK_EX)
            with file_lock(database.path), database.connected() as connection:
                connection.exec_driver_sql("BEGIN")
                yield connection
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            os.close(mark)
    else:
        with database.connected() as connection:
            connection.exec_driver_sql("BEGIN")
            connection.exec_driver_sql("LOCK TABLE store IN EXCLUSIVE MODE")
            yield connection
            connection.exec_driver_sql("COMMIT")


# The disk fails, not one write: nobody of the group may be told that it worked.
_OF_ALL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)


class _Member(NamedTuple):
    """A queued write."""

    fn: Callable[[Write], Any]
    future: Future[Any]
    seen: _Seen | None  # of the request it belongs to


class _SqliteWriter:
    """The only thread of this process that writes.

    BEGIN IMMEDIATE alone starves processes (one got 1 transaction in 3 s where others got 1,000); the file
    lock in front of it is fair, and keeps commits and checkpoints of several processes apart.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._queue: queue.SimpleQueue[_Member | None] = queue.SimpleQueue()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, fn: Callable[[Write], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._start:
            if self._closed:
                raise Unavailable("The server is stopping.", headers=[(b"retry-after", b"5")])
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
                self._thread.start()
            self._queue.put(_Member(fn, future, _seen.get()))
        return future

    def close(self) -> None:
        with self._start:
            self._closed = True
            thread = self._thread
        if thread:
            self._queue.put(None)
            thread.join()

    def _run(self) -> None:
        connection: Connection | None = None
        while (first := self._queue.get()) is not None:
            try:
                connection = connection or self._database.engine.connect().execution_options(
                    isolation_level="AUTOCOMMIT"
                )
            except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
                first.future.set_exception(_failure(getattr(error, "orig", error)))
                continue
            self._group(connection, first)
        if connection:
            connection.close()

    def _group(self, connection: Connection, first: _Member) -> None:
        raw = connection.connection.dbapi_connection
        assert isinstance(raw, sqlite3.Connection)
        taken: list[Future[Any]] = []
        outcomes: list[tuple[Any, BaseException | None]] = []
        try:
            with file_lock(self._database.path, patient=False):
                raw.execute("BEGIN IMMEDIATE")
                tx = Write(self._database, connection)
                for member in self._members(first):
                    if member.future.set_running_or_notify_cancel():
                        taken.append(member.future)
                        outcomes.append(self._run_one(raw, tx, member))
                raw.execute("COMMIT")
        except BaseException as error:  # the group is lost: nobody in it may be told that it worked
            with contextlib.suppress(sqlite3.Error):
                if raw.in_transaction:
                    raw.execute("ROLLBACK")
            if not taken and first.future.set_running_or_notify_cancel():
                taken.append(first.future)
            failure = _failure(getattr(error, "orig", error))
            if not isinstance(failure, ClientError):
                failure = Unavailable("The database does not answer.", headers=[(b"retry-after", b"10")])
            failure.__cause__ = error
            for future in taken:
                future.set_exception(failure)
            return
        for future, (result, problem) in zip(taken, outcomes, strict=True):
            if problem is None:
                future.set_result(result)
            else:
                future.set_exception(problem)

    def _members(self, first: _Member) -> Iterator[_Member]:
        yield first
        until = time.monotonic() + _GROUP_S
        for _ in range(self._database.settings.group_writes - 1):
            if time.monotonic() > until:
                return
            try:
                member = self._queue.get_nowait()
            except queue.Empty:
                return
            if member is None:
                self._queue.put(None)
                return
            yield member

    @staticmethod
    def _run_one(raw: sqlite3.Connection, tx: Write, member: _Member) -> tuple[Any, BaseException | None]:
        raw.execute("SAVEPOINT one")
        try:
            if member.seen is not None:
                member.seen.check(tx.generation)
            result = member.fn(tx)
        except BaseException as error:  # handed to whoever waits for this write, whatever it is
            original = getattr(error, "orig", error)
            code = getattr(original, "sqlite_errorcode", 0) & 0xFF
            if not raw.in_transaction or code in _OF_ALL:
                raise
            raw.execute("ROLLBACK TO one")
            raw.execute("RELEASE one")
            return None, error
        raw.execute("RELEASE one")
        return result, None
