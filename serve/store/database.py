"""The connection to SQLite or PostgreSQL: URLs, transactions, and what goes wrong with them."""

import contextlib
import datetime
import pathlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy
from sqlalchemy import event, exc, orm
from sqlalchemy.dialects import postgresql, sqlite

from diffusion_kd import errors, files
from serve.store import migrations, tables
from serve.store.errors import StoreUnavailable

_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_WOULD_DO = "give sqlite:////absolute/path/service.db or postgresql://user:password@host:5432/name"
_BUSY_S = 30
"""How long a writer waits for another one of the same SQLite file."""

_CONNECT_S = 10


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Database:
    """A migrated database. Safe to use from many threads; each transaction has a connection to itself.

    url: sqlite:///path (its folder is made) or postgresql://...
    now: the clock; aware times.
    Raises ConfigError for a URL that cannot be used: unknown, refused, no permission, or of a newer release.
    """

    def __init__(self, url: str, *, now: Callable[[], datetime.datetime] = utc_now) -> None:
        self._now = now
        self._engine = _engine(url)
        self._writing_engine = self._engine.execution_options(begin="IMMEDIATE")
        try:
            migrations.upgrade(self._writing_engine)
        except exc.DBAPIError as error:
            self.close()
            raise errors.ConfigError(
                f"the database {self._engine.url.render_as_string(hide_password=True)} cannot be used: "
                f"{errors.first_line(error.orig or error)}; {_WOULD_DO}"
            ) from error
        except errors.ConfigError:
            self.close()
            raise

    def ping(self) -> None:
        """Raise StoreUnavailable unless the database answers."""
        with self._reading() as session:
            session.execute(sqlalchemy.select(sqlalchemy.literal(1)))

    def close(self) -> None:
        """Close the connections; later calls would open new ones."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[orm.Session]:
        with _translated(), orm.Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextlib.contextmanager
    def _writing(self) -> Iterator[orm.Session]:
        """One transaction: committed at the end of the block, undone by an exception.

        On SQLite it begins IMMEDIATE, so that it waits for its turn at the start. A transaction that begins by reading
        would have to turn into a writer later, and SQLite refuses that at once, without waiting, where another has
        written in between. It also makes read-then-write atomic: nobody else writes until it ends.
        """
        with _translated(), orm.Session(self._writing_engine, expire_on_commit=False) as session, session.begin():
            yield session


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
        cause = error.orig if isinstance(error, exc.DBAPIError) and error.orig else error
        raise StoreUnavailable(f"the database does not answer: {errors.first_line(cause)}; try again later") from error


def insert(session: orm.Session, table: type[tables.Base]) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that knows ON CONFLICT, which both dialects spell alike and SQLAlchemy's common one lacks."""
    return postgresql.insert(table) if session.get_bind().dialect.name == "postgresql" else sqlite.insert(table)


# --- engines ----------------------------------------------------------------------------------------


def _engine(text: str) -> sqlalchemy.Engine:
    url = _parsed(text)
    return _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url)


def _parsed(text: str) -> sqlalchemy.URL:
    """Messages do not repeat what cannot be parsed: a password may be in it."""
    try:
        url = sqlalchemy.make_url(text)
    except (exc.ArgumentError, ValueError):
        raise errors.ConfigError(f"the database URL is malformed; {_WOULD_DO}") from None
    if url.drivername not in _DRIVERS:
        raise errors.ConfigError(f"no database of the kind {url.drivername!r} is supported; {_WOULD_DO}")
    return url.set(drivername=_DRIVERS[url.drivername])


def _sqlite(url: sqlalchemy.URL) -> sqlalchemy.Engine:
    name = url.database or ":memory:"
    if name == ":memory:" or name.startswith("file:"):
        raise errors.ConfigError(
            f"the database {url} does not outlive the process or is not a plain path, and jobs must; {_WOULD_DO}"
        )
    path = pathlib.Path(name)
    files.check_folder(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.ConfigError(f"the folder {path.parent} cannot be made: {error.strerror}; {_WOULD_DO}") from None
    engine = sqlalchemy.create_engine(url, connect_args={"timeout": _BUSY_S})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """WAL: readers do not wait for the writer. FULL: what is committed survives a power cut, as a 202 promises."""
    connection.isolation_level = None  # The driver begins no transactions of its own; `_begin_sqlite` does.
    _enter_wal(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Turn a new file to WAL. While another start does the same, SQLite refuses at once, whatever the timeout."""
    give_up = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: sqlalchemy.Connection) -> None:
    connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('begin', 'DEFERRED')}")


def _postgresql(url: sqlalchemy.URL) -> sqlalchemy.Engine:
    arguments: dict[str, Any] = {} if "connect_timeout" in url.query else {"connect_timeout": _CONNECT_S}
    try:
        return sqlalchemy.create_engine(url, pool_pre_ping=True, connect_args=arguments)
    except ImportError as error:
        raise errors.ConfigError(f"PostgreSQL needs its driver ({error}): pip install 'psycopg[binary]'") from None
