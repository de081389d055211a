"""What Alembic runs for every migration: our metadata, on the connection that `schema.migrate` opened."""

from alembic import context

from ksync_server.store import tables

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=tables.metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
