"""Locks between processes, held to the end of a transaction.

Only PostgreSQL needs them: on SQLite a writing transaction begins IMMEDIATE and so has the database to itself.
"""

import sqlalchemy
from sqlalchemy import orm

_SPACE = 0x646B64
"""Tells our advisory locks from those of other programs in the same database."""

MIGRATION, QUEUE, KEYS = 1, 2, 3


def hold(connection: sqlalchemy.Connection | orm.Session, lock: int) -> None:
    """Wait for a lock and hold it until the transaction ends."""
    bind = connection.get_bind() if isinstance(connection, orm.Session) else connection
    if bind.dialect.name == "postgresql":
        connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(_SPACE, lock)))
