"""Fixtures that every test may use: databases, names that hurt, and a real server.

A missing PostgreSQL fails the tests that ask for it; nothing here skips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from conformance.names import CONTROL_NAMES, NASTY_NAMES
from conformance.servers import Demo, PostgreSQL, demo, postgresql



@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    """One PostgreSQL server for the whole run (KSYNC_TEST_PG may name one that runs already)."""
    with postgresql() as server:
        yield server


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'ksync.db'}"


@pytest.fixture
def postgresql_url(postgresql_server: PostgreSQL) -> Iterator[str]:
    """URL of an empty PostgreSQL database of this test's own."""
    with postgresql_server.database() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty database of this test's own, once on SQLite and once on PostgreSQL."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


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
