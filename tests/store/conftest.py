"""A migrated database per test, on both engines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ksync_server import settings
from ksync_server.store import schema
from ksync_server.store.database import Database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(settings.Database(url=database_url), threads=8)
    schema.migrate(database)
    yield database
    database.close()
