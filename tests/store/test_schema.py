"""Migrations lead to exactly the tables the statements are written for."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from ksync_server import settings
from ksync_server.errors import ConfigError
from ksync_server.store import schema, tables
from ksync_server.store.database import Database


def test_migrations_build_what_the_metadata_says(empty_database_url: str) -> None:
    database = Database(settings.Database(url=empty_database_url))
    schema.migrate(database)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"render_as_batch": True})
        assert compare_metadata(context, tables.metadata) == []
    database.close()


def test_a_second_migration_changes_nothing(database: Database) -> None:
    generation = database.generation
    schema.migrate(database)
    assert schema.current(database) == schema.SCHEMA
    again = Database(database.settings)
    assert again.generation == generation
    again.close()


def test_an_empty_database_is_refused_before_it_is_migrated(empty_database_url: str) -> None:
    database = Database(settings.Database(url=empty_database_url))
    with pytest.raises(ConfigError, match="ksync-server migrate"):
        schema.require_current(database)
    database.close()


def test_a_newer_schema_that_gave_up_this_program_is_refused(database: Database) -> None:
    def newer(oldest: int) -> None:
        with database.engine.begin() as connection:
            connection.execute(sa.text("UPDATE alembic_version SET version_num = '0099'"))
            connection.execute(sa.update(tables.store).values(oldest_schema=oldest))

    newer(oldest=schema.SCHEMA)
    assert schema.current(database) == 99
    newer(oldest=schema.SCHEMA + 1)
    with pytest.raises(ConfigError, match="update it"):
        schema.current(database)


def test_ids_of_collections_and_nodes_are_never_used_again(database: Database) -> None:
    def one(table: sa.Table, **values: object) -> int:
        insert = sa.insert(table).returning(table.c.id)
        number: int = database.write(lambda tx: tx.execute(insert, values).scalar_one())
        database.write(lambda tx: tx.execute(sa.delete(table).where(table.c.id == number)))
        return number

    values = {"kind": "calendar", "name": "a", "created_at": 0}
    assert one(tables.collection, **values) < one(tables.collection, **values)
