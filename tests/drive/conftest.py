"""One drive with two members on both databases, and programs that use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from ksync_server import settings
from ksync_server.store import schema
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database, Write
from tests.drive.harness import Client, Drive, make_drive


@pytest.fixture(scope="module")
def migrated(module_database_url: str) -> Iterator[Database]:
    """A store that the tests of a module share, each of which finds it empty."""
    database = Database(settings.Database(url=module_database_url), threads=4)
    schema.migrate(database)
    yield database
    database.close()


def _empty(tx: Write) -> None:
    for table in reversed(t.metadata.sorted_tables):
        if table is not t.store:
            tx.execute(sa.delete(table))


@pytest.fixture
def drive(migrated: Database, tmp_path: Path) -> Iterator[Drive]:
    """An empty store with one drive."""
    every = settings.Settings(database=migrated.settings, blobs=settings.Blobs(path=tmp_path / "blobs"))
    migrated.write(_empty)
    blobs = Blobs(every.blobs, migrated)
    alice, bob = migrated.write(make_drive)
    yield Drive(migrated, blobs, every, alice, bob)
    blobs.close()


@pytest.fixture
def make_client(drive: Drive) -> Iterator[Callable[..., Client]]:
    """Programs of members, each with a site of its own over the one store."""
    made: list[Client] = []

    def make(**options: Any) -> Client:
        made.append(Client(drive, **options))
        return made[-1]

    yield make
    for client in made:
        client.site.close()


@pytest.fixture
def client(make_client: Callable[..., Client]) -> Client:
    """A program of alice that is shown the drive folder at the bare URL."""
    return make_client()
