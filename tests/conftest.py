"""Fixtures that every test may use: databases, names that hurt, and a real server.

A missing PostgreSQL fails the tests that ask for it; nothing here skips.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conformance.names import CONTROL_NAMES, NASTY_NAMES
from conformance.servers import S3, Demo, PostgreSQL, demo, postgresql, s3
from ksync_server import settings
from ksync_server.store import schema
from ksync_server.store.database import Database


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    """One PostgreSQL server for the whole run (KSYNC_TEST_PG may name one that runs already)."""
    with postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """One S3 server for the whole run, a process of its own."""
    with s3() as server:
        yield server


def _migrated(url: str) -> str:
    database = Database(settings.Database(url=url))
    schema.migrate(database)
    database.close()
    return url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file that is copied and never used itself."""
    path = tmp_path_factory.mktemp("template") / "ksync.db"
    _migrated(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgresql_template(postgresql_server: PostgreSQL) -> str:
    """URL of a migrated PostgreSQL database that is copied and never used itself."""
    return _migrated(postgresql_server.create())


@pytest.fixture
def sqlite_url(tmp_path: Path, sqlite_template: Path) -> str:
    """URL of a migrated SQLite file of this test's own."""
    path = tmp_path / "ksync.db"
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture
def postgresql_url(postgresql_server: PostgreSQL, postgresql_template: str) -> Iterator[str]:
    """URL of a migrated PostgreSQL database of this test's own."""
    with postgresql_server.database(postgresql_template) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of a migrated database of this test's own, once on SQLite and once on PostgreSQL."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database without any table, once on SQLite (no file yet) and once on PostgreSQL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
    else:
        server: PostgreSQL = request.getfixturevalue("postgresql_server")
        with server.database() as url:
            yield url


@pytest.fixture(scope="module")
def new_database_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], str]]:
    """Make an empty `sqlite` or `postgresql` database that lives as long as the module's tests."""
    with ExitStack() as stack:

        def make(kind: str) -> str:
            if kind == "sqlite":
                return f"sqlite:///{tmp_path_factory.mktemp('database') / 'ksync.db'}"
            server: PostgreSQL = request.getfixturevalue("postgresql_server")
            return stack.enter_context(server.database())

        yield make


@pytest.fixture(params=["sqlite", "postgresql"], scope="module")
def module_database_url(request: pytest.FixtureRequest, new_database_url: Callable[[str], str]) -> str:
    """URL of a database that all tests of the module share, once on SQLite and once on PostgreSQL."""
    return new_database_url(request.param)


@pytest.fixture
def nasty_names() -> tuple[str, ...]:
    """Resource names, each legal, that break careless code: reserved, escaped, composed and long ones."""
    return NASTY_NAMES + CONTROL_NAMES


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """A real `ksync-server demo` process on a free port, shared by the tests of one module."""
    with demo(tmp_path_factory.mktemp("server") / "data") as running:
        yield running
