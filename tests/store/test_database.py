"""Rows: durable group commit, isolation of failures, retries."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from ksync_server import settings
from ksync_server.errors import InsufficientStorage, NotFound, Unavailable
from ksync_server.store import changes, schema
from ksync_server.store import tables as t
from ksync_server.store.database import Database, Read, Write

_SEQ = sa.select(t.collection.c.seq).where(t.collection.c.id == sa.bindparam("id_"))
_NEW = sa.insert(t.collection).returning(t.collection.c.id)


def new_collection(database: Database, name: str = "a") -> int:
    values = {"kind": "calendar", "name": name, "created_at": 0}
    number: int = database.write(lambda tx: tx.execute(_NEW, values).scalar_one())
    return number


def seq(database: Database, collection: int) -> int:
    return int(database.fast(_SEQ, {"id_": collection})[0][0])


def test_concurrent_writers_lose_no_change_number(database: Database) -> None:
    collection = new_collection(database)
    numbers: list[int] = []

    def work() -> None:
        for _ in range(50):
            numbers.append(database.write(lambda tx: changes.bump(tx, collection)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 401))
    assert seq(database, collection) == 400


def test_a_failing_write_is_undone_and_harms_no_other_of_its_group(database: Database) -> None:
    collection = new_collection(database)
    gate = threading.Event()

    def wait(tx: Write) -> None:
        gate.wait(10)

    def fail(tx: Write) -> None:
        changes.bump(tx, collection, 100)
        raise KeyError("mine")

    first = database.submit(wait)
    failing = [database.submit(fail) for _ in range(3)]
    fine = [database.submit(lambda tx: changes.bump(tx, collection)) for _ in range(3)]
    gate.set()
    first.result(10)
    for future in failing:
        with pytest.raises(KeyError, match="mine"):
            future.result(10)
    assert sorted(future.result(10) for future in fine) == [1, 2, 3]
    assert seq(database, collection) == 3


def test_a_constraint_error_inside_a_group_rolls_back_only_its_own_write(database: Database) -> None:
    values = {"id": 5, "generation": "x", "oldest_schema": 1}
    insert = sa.insert(t.store)
    futures = [database.submit(lambda tx: tx.execute(insert, values)) for _ in range(4)]
    failures = [future.exception(10) for future in futures]
    assert sum(failure is None for failure in failures) == 1
    assert all(failure is None or isinstance(failure, sa.exc.IntegrityError) for failure in failures)


def test_errors_say_nothing_of_what_a_statement_was_given(database: Database) -> None:
    wrong, given = sa.text("SELECT no_such_column FROM store WHERE generation = :given"), "of nobody else"
    with database.read() as tx, pytest.raises(sa.exc.DBAPIError) as caught:
        tx.execute(wrong, {"given": given})
    logged = "".join(traceback.format_exception(caught.value))
    assert "no_such_column" in logged
    assert given not in logged


@pytest.mark.parametrize("many", [0, 1, 2, 63, 64, 65, 200])
def test_many_rows_are_all_there_and_each_as_it_was_given(database: Database, many: int) -> None:
    table = t.mail_budget
    insert = sa.insert(table).values({column: sa.bindparam(column.name) for column in table.c})
    rows = [{"key": f"key {number}", "since": number, "bytes": number * 10**12} for number in range(many)]
    database.write(lambda tx: tx.many(insert, iter(rows)))
    with database.read() as tx:
        found = {tuple(row) for row in tx.fast(sa.select(table))}
    assert found == {tuple(row.values()) for row in rows}


def test_a_snapshot_does_not_see_what_is_committed_after_it_began(database: Database) -> None:
    collection = new_collection(database)
    with database.read() as tx:
        before = tx.scalar(_SEQ, {"id_": collection})
        database.write(lambda tx: changes.bump(tx, collection))
        assert tx.scalar(_SEQ, {"id_": collection}) == before
    assert seq(database, collection) == before + 1


def test_a_read_cannot_write(database: Database) -> None:
    collection = new_collection(database)
    with pytest.raises((sa.exc.DBAPIError, sqlite3.Error, Unavailable)), database.read() as tx:
        tx.execute(sa.update(t.collection).values(seq=9))
    assert seq(database, collection) == 0


def test_the_event_loop_reads_and_writes(database: Database) -> None:
    collection = new_collection(database)

    async def scenario() -> tuple[int, int]:
        await asyncio.gather(*(database.writing(lambda tx: changes.bump(tx, collection)) for _ in range(20)))
        hot = await database.hot(lambda tx: tx.scalar(_SEQ, {"id_": collection}))
        pooled = await database.reading(lambda tx: tx.scalar(_SEQ, {"id_": collection}))
        return hot, pooled

    assert asyncio.run(scenario()) == (20, 20)


def test_a_missing_collection_is_not_found(database: Database) -> None:
    with pytest.raises(NotFound):
        database.write(lambda tx: changes.bump(tx, 12345))


def test_a_closed_database_refuses_writes(sqlite_url: str) -> None:
    database = Database(settings.Database(url=sqlite_url))
    schema.migrate(database)
    collection = new_collection(database)
    database.close()
    with pytest.raises(Unavailable):
        database.write(lambda tx: changes.bump(tx, collection))


def test_a_full_disk_fails_the_whole_group_and_loses_nothing_older(sqlite_url: str) -> None:
    database = Database(settings.Database(url=sqlite_url))
    schema.migrate(database)
    collection = new_collection(database)
    pages = database.fast(sa.text("PRAGMA page_count"))[0][0]
    insert = sa.insert(t.audit)
    filler = {"at": 0, "actor": "a", "action": "b", "subject": "x" * 200_000}

    def limit(tx: Write) -> None:
        tx.execute(sa.text(f"PRAGMA max_page_count={pages + 8}"))

    database.write(limit)
    gate = threading.Event()
    first = database.submit(lambda tx: gate.wait(10))
    bumps = [database.submit(lambda tx: changes.bump(tx, collection)) for _ in range(2)]
    large = database.submit(lambda tx: tx.execute(insert, filler))
    gate.set()
    for future in (first, *bumps, large):
        with pytest.raises(InsufficientStorage):
            future.result(10)
    assert seq(database, collection) == 0
    assert database.write(lambda tx: changes.bump(tx, collection)) == 1
    database.close()


def test_a_disk_that_only_reads_asks_for_patience_and_reads_go_on(sqlite_url: str) -> None:
    database = Database(settings.Database(url=sqlite_url))
    collection = new_collection(database)
    database.write(lambda tx: tx.execute(sa.text("PRAGMA query_only=ON")) and None)
    futures = [database.submit(lambda tx: changes.bump(tx, collection)) for _ in range(3)]
    for future in futures:
        failure = future.exception(10)
        assert isinstance(failure, Unavailable)
        assert b"retry-after" in dict(failure.headers)
    assert seq(database, collection) == 0
    database.close()
    again = Database(settings.Database(url=sqlite_url))
    assert again.write(lambda tx: changes.bump(tx, collection)) == 1
    again.close()


def test_a_file_system_that_was_mounted_read_only_asks_for_patience(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(settings.Database(url=sqlite_url))
    collection = new_collection(database)
    really = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if str(path).endswith(".lock"):
            raise OSError(errno.EROFS, "Read-only file system")
        return really(path, flags, mode)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(Unavailable):
            database.write(lambda tx: changes.bump(tx, collection))
        assert seq(database, collection) == 0, "reads go on"
    assert database.write(lambda tx: changes.bump(tx, collection)) == 1
    database.close()


def test_a_standby_that_only_reads_asks_for_patience(postgresql_url: str) -> None:
    database = Database(settings.Database(url=postgresql_url))
    collection = new_collection(database)
    name = database.fast(sa.text("SELECT current_database()"))[0][0]
    database.close()
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    database = Database(settings.Database(url=postgresql_url))
    with pytest.raises(Unavailable) as caught:
        database.write(lambda tx: changes.bump(tx, collection))
    assert b"retry-after" in dict(caught.value.headers)
    assert seq(database, collection) == 0
    database.close()


_CRASH = """
import sys, threading
from ksync_server import settings
from ksync_server.store import changes
from ksync_server.store.database import Database
database = Database(settings.Database(url=sys.argv[1]))
collection = int(sys.argv[2])
lock = threading.Lock()
def work():
    while True:
        number = database.write(lambda tx: changes.bump(tx, collection))
        with lock:
            print(number, flush=True)
for _ in range(8):
    threading.Thread(target=work).start()
"""


def test_kill_9_loses_no_acknowledged_write(database: Database, tmp_path: Path) -> None:
    collection = new_collection(database)
    url = database.settings.url
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", _CRASH, url, str(collection)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout
        seen = [int(process.stdout.readline()) for _ in range(200)]
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split(b"\n")
        seen += [int(line) for line in rest[:-1] if line]
        process.stdout.close()
        process.wait(10)
        assert seq(database, collection) >= max(seen)
        assert len(set(seen)) == len(seen)


def test_two_processes_share_the_sqlite_file_fairly(sqlite_url: str) -> None:
    database = Database(settings.Database(url=sqlite_url))
    schema.migrate(database)
    collection = new_collection(database)
    code = (
        "import sys\n"
        "from ksync_server import settings\n"
        "from ksync_server.store import changes\n"
        "from ksync_server.store.database import Database\n"
        "database = Database(settings.Database(url=sys.argv[1]))\n"
        "for _ in range(300):\n"
        "    database.write(lambda tx: changes.bump(tx, int(sys.argv[2])))\n"
        "database.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, sqlite_url, str(collection)], env=environment)
        for _ in range(3)
    ]
    for process in processes:
        assert process.wait(60) == 0
    assert seq(database, collection) == 900
    database.close()


_PID = sa.select(sa.func.pg_backend_pid())


def _cut(postgresql_url: str, pid: int) -> None:
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))


def _read(database: Database, fn: Callable[[Read], object]) -> None:
    with database.read() as tx:
        fn(tx)


@pytest.mark.parametrize("use", [_read, Database.write], ids=["read", "write"])
def test_a_connection_lost_in_a_transaction_asks_for_patience_and_the_next_one_works(
    postgresql_url: str, use: Callable[[Database, Callable[[Read], object]], object]
) -> None:
    database = Database(settings.Database(url=postgresql_url))

    def run(tx: Read) -> None:
        _cut(postgresql_url, tx.scalar(_PID))
        tx.scalar(_PID)

    with pytest.raises(Unavailable) as caught:
        use(database, run)
    assert b"retry-after" in dict(caught.value.headers)
    assert database.fast(_PID)
    assert database.write(lambda tx: tx.scalar(_PID))
    database.close()


def test_an_idle_connection_that_was_lost_asks_for_patience_and_the_next_one_works(
    postgresql_url: str,
) -> None:
    database = Database(settings.Database(url=postgresql_url))
    _cut(postgresql_url, database.fast(_PID)[0][0])
    with pytest.raises(Unavailable):
        database.fast(_PID)
    assert database.fast(_PID)
    database.close()


def test_nobody_else_on_the_machine_reads_the_sqlite_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.db"
    before = os.umask(0o022)
    try:
        database = Database(settings.Database(url=f"sqlite:///{path}"))
        schema.migrate(database)
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        database.close()
    finally:
        os.umask(before)
    assert modes
    assert set(modes.values()) == {0o600}, modes


def test_a_server_that_falls_silent_is_given_up_after_a_while_that_the_url_may_set(
    postgresql_url: str,
) -> None:
    mark = "&" if "?" in postgresql_url else "?"
    database = Database(settings.Database(url=f"{postgresql_url}{mark}connect_timeout=3"))
    with database.engine.connect() as connection:
        driver: Any = connection.connection.dbapi_connection
        found = driver.info.get_parameters()
    database.close()
    assert (found["connect_timeout"], found["tcp_user_timeout"]) == ("3", "30000")
    assert int(found["keepalives_idle"]) < 60


def test_a_closed_database_opens_no_connection_for_whoever_still_asks(database_url: str) -> None:
    database = Database(settings.Database(url=database_url), threads=1)
    assert database.generation
    database.close()
    found: list[BaseException] = []

    def ask() -> None:  # in a thread that has no connection yet
        try:
            database.fast(sa.select(t.store.c.id))
        except Unavailable as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(30)
    assert [error.text for error in found] == ["The server is stopping."]  # type: ignore[attr-defined]
