"""What must be true of the rows and the bytes when nothing is under way, asked with SQL of our own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

_VISIBLE = """
WITH RECURSIVE visible(id) AS (
  SELECT id FROM node WHERE parent_id IS NULL AND deleted_at IS NULL
  UNION ALL SELECT node.id FROM node JOIN visible ON node.parent_id = visible.id)
"""

# Each selects what is wrong; an answer without rows is the right one.
RULES = {
    "drive.used_bytes is the sum of its files": """
        SELECT d.id, d.used_bytes, (SELECT coalesce(sum(size), 0) FROM node WHERE drive_id = d.id) AS found
        FROM drive d WHERE d.used_bytes <> (SELECT coalesce(sum(size), 0) FROM node WHERE drive_id = d.id)""",
    "drive.files is the number of its nodes": """
        SELECT d.id, d.files FROM drive d WHERE d.files <> (SELECT count(*) FROM node n WHERE n.drive_id = d.id
        AND NOT (n.parent_id IS NULL AND n.deleted_at IS NULL))""",
    "node.entries is the number of its members": f"""{_VISIBLE}
        SELECT n.id, n.name, n.entries FROM node n JOIN visible v ON v.id = n.id WHERE n.folder
        AND n.entries <> (SELECT count(*) FROM node c WHERE c.parent_id = n.id)""",
    "files have a blob of their size, folders none": """
        SELECT n.id, n.name, n.size, b.size FROM node n LEFT JOIN blob b ON b.id = n.blob_id WHERE
        (n.folder AND n.blob_id IS NOT NULL) OR (NOT n.folder AND (b.id IS NULL OR b.size <> n.size))""",
    "objects have a blob of their size": """
        SELECT o.id, o.name, o.size FROM object o LEFT JOIN blob b ON b.id = o.blob_id
        WHERE b.id IS NULL OR b.size <> o.size""",
    "collection.objects is the number of its members": """
        SELECT c.id, c.name, c.objects FROM collection c
        WHERE c.objects <> (SELECT count(*) FROM object o WHERE o.collection_id = c.id)""",
    "blob.refs is the number of rows that hold it": """
        SELECT b.id, b.refs FROM blob b WHERE b.refs < 1 OR b.refs <> (SELECT count(*) FROM node n
        WHERE n.blob_id = b.id) + (SELECT count(*) FROM object o WHERE o.blob_id = b.id)""",
    "content and extents have the blob's size": """
        SELECT b.id, b.size FROM blob b WHERE b.size <> CASE WHEN b.content IS NULL
        THEN (SELECT coalesce(sum(e.size), 0) FROM extent e WHERE e.blob_id = b.id)
        ELSE length(b.content) END""",
    "an extent is not garbage too": "SELECT e.key FROM extent e JOIN garbage g ON g.key = e.key",
    "a name is a member or a tombstone": """
        SELECT t.collection_id, t.name FROM tombstone t JOIN object o
        ON o.collection_id = t.collection_id AND o.name = t.name""",
    "no change number is ahead of its collection": """
        SELECT c.id, c.seq FROM collection c WHERE c.seq < (SELECT coalesce(max(o.seq), 0) FROM object o
        WHERE o.collection_id = c.id) OR c.seq < (SELECT coalesce(max(t.seq), 0) FROM tombstone t
        WHERE t.collection_id = c.id)""",
    "no change number of a drive is ahead of its collection": """
        SELECT d.id FROM drive d JOIN collection c ON c.id = d.collection_id
        WHERE c.seq < (SELECT coalesce(max(n.seq), 0) FROM node n WHERE n.drive_id = d.id)""",
    "no change number is used twice": """
        SELECT collection_id, seq FROM object GROUP BY collection_id, seq HAVING count(*) > 1""",
    "a deleted tree lies in deleted items, or is hidden": """
        SELECT n.id FROM node n JOIN node p ON p.id = n.parent_id WHERE n.deleted_at > 0
        AND NOT EXISTS (SELECT 1 FROM drive_member m WHERE m.trash_id = p.id)""",
}


def _engine(url: str) -> sa.Engine:
    return sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=sa.pool.NullPool)


def broken(url: str) -> list[str]:
    """Rules that do not hold, each with its first rows; one snapshot."""
    engine = _engine(url)
    found = []
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
            for rule, statement in RULES.items():
                rows = connection.execute(sa.text(statement)).fetchmany(3)
                if rows:
                    found.append(f"{rule}: {[tuple(row) for row in rows]}")
            if engine.dialect.name == "sqlite":
                found += _check_file(connection)
    finally:
        engine.dispose()
    return found


def _check_file(connection: sa.Connection) -> Iterator[str]:
    """SQLite's own opinion of its file."""
    for (text,) in connection.execute(sa.text("PRAGMA integrity_check")):
        if text != "ok":
            yield f"integrity: {text}"
    for row in connection.execute(sa.text("PRAGMA foreign_key_check")):
        yield f"foreign key: {tuple(row)}"


def broken_bytes(url: str, blobs: Path) -> list[str]:
    """Blobs whose extents are missing or are not the content that was acknowledged, by their SHA-256."""
    engine = _engine(url)
    found = []
    try:
        with engine.connect() as connection:
            wanted = connection.execute(sa.text("SELECT id, sha256, content FROM blob")).all()
            extents: dict[int, list[str]] = {}
            for blob_id, key in connection.execute(
                sa.text("SELECT blob_id, key FROM extent ORDER BY blob_id, position")
            ):
                extents.setdefault(blob_id, []).append(key)
    finally:
        engine.dispose()
    for blob_id, sha256, content in wanted:
        made = hashlib.sha256(bytes(content) if content is not None else b"")
        for key in extents.get(blob_id, []):
            path = blobs / key[:2] / key[2:4] / key
            if not path.exists():
                found.append(f"blob {blob_id}: extent {key} is missing")
                break
            made.update(path.read_bytes())
        else:
            if made.digest() != bytes(sha256):
                found.append(f"blob {blob_id}: other bytes than were stored")
    return found


def named_extents(url: str) -> set[str]:
    """Keys that a blob or the garbage names."""
    engine = _engine(url)
    try:
        with engine.connect() as connection:
            rows = connection.execute(sa.text("SELECT key FROM extent UNION SELECT key FROM garbage"))
            return {str(row[0]) for row in rows}
    finally:
        engine.dispose()


def orphans(url: str, blobs: Path) -> tuple[set[str], set[str]]:
    """Reap as if every grace period had passed; returns (files nobody names, named ones without a file)."""
    from ksync_server import settings
    from ksync_server.store.blobs import Blobs
    from ksync_server.store.database import Database

    database = Database(settings.Database(url=url))
    store = Blobs(settings.Blobs(path=blobs, reap_after_s=-2.0), database)
    try:
        database.write(lambda tx: tx.execute(sa.text("UPDATE stage SET lease_until = 0")))
        while store.reap(most=100_000):
            pass
    finally:
        store.close()
        database.close()
    files = {path.name for path in blobs.glob("??/??/*") if path.is_file()}
    named = named_extents(url)
    return files - named, named - files
