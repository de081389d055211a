"""One store for the tests of a module on each database, and accounts of their own for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ksync_server import settings
from ksync_server.store import schema
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database
from tests.dav.harness import Client, Store, make_account


@pytest.fixture(scope="module")
def store(module_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A migrated store that the tests of a module share."""
    folder: Path = tmp_path_factory.mktemp("dav")
    every = settings.Settings(
        database=settings.Database(url=module_database_url), blobs=settings.Blobs(path=folder / "blobs")
    )
    database = Database(every.database, threads=4)
    schema.migrate(database)
    blobs = Blobs(every.blobs, database)
    yield Store(database, blobs, every)
    blobs.close()
    database.close()


@pytest.fixture
def make_client(store: Store) -> Callable[..., Client]:
    """A program of a new account."""

    def make(name: str = "alice", **options: object) -> Client:
        identity = store.database.write(lambda tx: make_account(tx, name))
        return Client(store, identity, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def client(make_client: Callable[..., Client]) -> Client:
    """A program of a new account without collections."""
    return make_client()
