"""A database of its own for each test: on both kinds, or on SQLite where that makes no difference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ksync_server import settings
from ksync_server.store.database import Database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated store."""
    opened = Database(settings.Database(url=database_url))
    yield opened
    opened.close()


@pytest.fixture
def lite(sqlite_url: str) -> Iterator[Database]:
    """A migrated store on SQLite."""
    opened = Database(settings.Database(url=sqlite_url))
    yield opened
    opened.close()
