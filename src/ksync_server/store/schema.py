"""Bring a database to this program's schema, or refuse one that does not support it."""

from __future__ import annotations

import secrets

import sqlalchemy as sa

from ksync_server.store import tables as t
from ksync_server.store.database import Database, Write

SCHEMA = 1  # raised by every migration


def migrate(database: Database) -> None:
    """Create or upgrade every table; safe to call from several processes at once."""
    t.metadata.create_all(database.engine)
    database.write(_first_row)


def _first_row(tx: Write) -> None:
    if tx.execute(sa.select(t.store.c.id)).first() is None:
        tx.execute(
            sa.insert(t.store), {"id": 1, "generation": secrets.token_hex(3), "oldest_schema": SCHEMA}
        )
