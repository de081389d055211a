"""One drive with two members on both databases, and programs that use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ksync_server import settings
from ksync_server.store import schema
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database
from tests.drive.harness import Client, Drive, make_drive


@pytest.fixture
def drive(database_url: str, tmp_path: Path) -> Iterator[Drive]:
    """A migrated store with one drive."""
    every = settings.Settings(
        database=settings.Database(url=database_url), blobs=settings.Blobs(path=tmp_path / "blobs")
    )
    database = Database(every.database, threads=4)
    schema.migrate(database)
    blobs = Blobs(every.blobs, database)
    alice, bob = database.write(make_drive)
    yield Drive(database, blobs, every, alice, bob)
    blobs.close()
    database.close()


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
