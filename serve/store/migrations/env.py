"""Run by Alembic, inside the transaction that `upgrade` has begun."""

from alembic import context

from serve.store import tables

# SQLite can alter little in place: batch mode copies the table.
context.configure(
    connection=context.config.attributes["connection"], target_metadata=tables.Base.metadata, render_as_batch=True
)
context.run_migrations()
