"""Brings a database to the tables of this release, from whatever older release left it."""

import pathlib

import alembic.command
import alembic.config
import alembic.runtime.migration
import alembic.script
import sqlalchemy

from diffusion_kd import errors
from serve.store import locks


def upgrade(engine: sqlalchemy.Engine) -> None:
    """Migrate to the newest tables, all or nothing. Of several processes that start at once, one does it.

    engine: on SQLite one whose transactions begin IMMEDIATE, which is what keeps a second process out there.
    Raises ConfigError for a database that a newer release has migrated.
    """
    with engine.begin() as connection:
        locks.hold(connection, locks.MIGRATION)
        config = _config(connection)
        _refuse_newer(connection, alembic.script.ScriptDirectory.from_config(config))
        alembic.command.upgrade(config, "head")


def _config(connection: sqlalchemy.Connection) -> alembic.config.Config:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(pathlib.Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _refuse_newer(connection: sqlalchemy.Connection, scripts: alembic.script.ScriptDirectory) -> None:
    known = {script.revision for script in scripts.walk_revisions()}
    stands = alembic.runtime.migration.MigrationContext.configure(connection).get_current_heads()
    unknown = sorted(set(stands) - known)
    if unknown:
        raise errors.ConfigError(
            f"the database {connection.engine.url.render_as_string(hide_password=True)} is at revision "
            f"{', '.join(unknown)}, and this release knows revisions up to {scripts.get_current_head()}: "
            "start the release that wrote it, or a newer one, or give another database"
        )
