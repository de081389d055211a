"""One drive with two members on both databases, and the bytes they store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from ksync_server import settings
from ksync_server.auth.gate import DriveGrant
from ksync_server.drive import tree
from ksync_server.store import schema
from ksync_server.store import tables as t
from ksync_server.store.blobs import Blobs
from ksync_server.store.database import Database, Write

NOW = 1_700_000_000


@dataclass(frozen=True, slots=True)
class Drive:
    """A drive with its members alice and bob."""

    database: Database
    blobs: Blobs
    settings: settings.Settings
    alice: DriveGrant
    bob: DriveGrant

    def view(self, grant: DriveGrant | None = None, *, folders: bool = False, **changed: object) -> tree.View:
        """The drive as a member's program sees it, with some settings changed."""
        return tree.View(
            grant or self.alice, msgspec.structs.replace(self.settings.drive, **changed), folders
        )


def _insert(tx: Write, table: sa.Table, **values: object) -> int:
    result = tx.execute(sa.insert(table).values(**values).returning(table.c.id))
    return int(result.scalar_one())


def _root(tx: Write, drive_id: int) -> int:
    values = {"drive_id": drive_id, "name": "", "folder": True, "seq": 0, "mtime_ms": NOW * 1000}
    return _insert(tx, t.node, created_at=NOW, **values)


def make_drive(tx: Write, name: str = "Team files", *, quota_bytes: int | None = None) -> list[DriveGrant]:
    """A drive with two members; returns what the gate would grant each."""
    organization = _insert(tx, t.organization, name="Example", created_at=NOW)
    product = _insert(tx, t.product, organization_id=organization, offer="kdrive-team", created_at=NOW)
    collection = _insert(tx, t.collection, kind="drive", name=name, created_at=NOW)
    drive_id = _insert(
        tx, t.drive, product_id=product, collection_id=collection, name=name, common_id=0, created_at=NOW
    )
    common_id = _root(tx, drive_id)
    tx.execute(sa.update(t.drive).where(t.drive.c.id == drive_id).values(common_id=common_id))
    return [
        _member(tx, drive_id, collection, name, common_id, person, quota_bytes) for person in ("alice", "bob")
    ]


def _member(
    tx: Write, drive_id: int, collection: int, name: str, common_id: int, person: str, quota: int | None
) -> DriveGrant:
    email = f"{person}{drive_id}@example.org"
    account_id = _insert(
        tx,
        t.account,
        sync_id=f"{person[:2].upper()}{drive_id:05}",
        login_email=email,
        login_key=email,
        display_name=person,
        created_at=NOW,
    )
    root_id, trash_id = _root(tx, drive_id), _root(tx, drive_id)
    tx.execute(
        sa.insert(t.drive_member).values(
            drive_id=drive_id, account_id=account_id, root_id=root_id, trash_id=trash_id
        )
    )
    return DriveGrant(
        drive_id=drive_id,
        collection_id=collection,
        name=name,
        offer="kdrive-team",
        account_id=account_id,
        root_id=root_id,
        trash_id=trash_id,
        common_id=common_id,
        max_file_bytes=50 * 10**9,
        max_chunked_bytes=50 * 10**9,
        quota_bytes=quota,
        used_bytes=0,
    )


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
