"""Bring a database to this program's schema, or refuse one that does not support it.

Expand, then contract: a migration only adds what the previous program can live with, and raises
`store.oldest_schema` once a program older than that would break it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ksync_server.errors import ConfigError
from ksync_server.store import tables as t
from ksync_server.store.database import Database, file_lock

SCHEMA = 3  # the newest revision's number; revisions are named 0001, 0002 ...
_ADVISORY_LOCK = 7_205_759_403  # any constant: several nodes may start at once


def migrate(database: Database) -> None:
    """Create or upgrade every table; safe to call from several processes and nodes at once.

    Raises:
        ConfigError: the database belongs to a newer program that gave up supporting this one.
        Unavailable: the database does not answer.
    """
    if current(database) == SCHEMA:
        return
    with _alone(database) as connection:
        check_supported(connection)
        _upgrade(connection)
        if connection.execute(sa.select(t.store.c.id)).first() is None:
            connection.execute(
                sa.insert(t.store),
                {"id": 1, "generation": secrets.token_hex(3), "oldest_schema": SCHEMA},
            )


def current(database: Database) -> int:
    """The database's schema number, 0 for an empty one; cheap, so that every start can ask.

    Raises:
        ConfigError: see `migrate`.
    """
    with database.connected() as connection:
        return check_supported(connection)


def require_current(database: Database) -> None:
    """Refuse to serve on an older schema.

    Raises:
        ConfigError: names the command that helps.
    """
    if current(database) < SCHEMA:
        raise ConfigError("The database has an older schema: run `ksync-server migrate` first.")


def check_supported(connection: Connection) -> int:
    """The schema number found; refuses a database that no longer supports this program."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return 0
    found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    number = int(found or 0)
    if number > SCHEMA:
        oldest = connection.execute(sa.select(t.store.c.oldest_schema)).scalar_one()
        if oldest > SCHEMA:
            raise ConfigError(f"The database has schema {number}, this program knows {SCHEMA}: update it.")
    return number


@contextlib.contextmanager
def _alone(database: Database) -> Iterator[Connection]:
    """One transaction that excludes every other writer and migration."""
    if database.dialect == "sqlite":
        with file_lock(database.path), database.engine.connect() as connection:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")  # batch mode renames tables
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.exec_driver_sql("ROLLBACK")
                raise
            connection.exec_driver_sql("COMMIT")
    else:
        with database.engine.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
            yield connection


def _upgrade(connection: Connection) -> None:
    # Alembic takes 0.4 s to import, and only a migration needs it.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "ksync_server:store/migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
