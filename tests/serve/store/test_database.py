"""URLs, migrations and transactions."""

import datetime
import pathlib
import sqlite3
from typing import Any

import pytest
import sqlalchemy
from alembic import autogenerate
from alembic.runtime import migration

from diffusion_kd import errors
from serve import store as store_module
from serve.store import database, tables


def test_migrations_and_tables_agree(database_url: str) -> None:
    store_module.Store(database_url).close()
    engine = sqlalchemy.create_engine(database_url)
    with engine.connect() as connection:
        context = migration.MigrationContext.configure(connection, opts={"compare_type": True})
        assert autogenerate.compare_metadata(context, tables.Base.metadata) == []
    engine.dispose()


def test_a_second_start_keeps_what_is_there(store: store_module.Store, other_store: store_module.Store) -> None:
    key, _ = store.create_key("kept", ["generate"], 5, None)
    assert other_store.get_key(key.id) == key


def test_several_starts_at_once_migrate_once(database_url: str, race: Any) -> None:
    stores = race(lambda _: store_module.Store(database_url), 6)
    key, secret = stores[0].create_key("first", ["generate"], None, None)
    assert [opened.find_key(secret) for opened in stores] == [key] * 6
    for opened in stores:
        opened.close()


def test_a_start_waits_for_another_that_makes_the_same_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite refuses a change to WAL at once while a new file is being written, whatever the timeout."""
    other = sqlite3.connect(tmp_path / "service.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        other.rollback()

    monkeypatch.setattr(database.time, "sleep", wait)
    store_module.Store(f"sqlite:///{tmp_path}/service.db").close()
    assert len(waits) == 1
    other.close()


def test_a_failed_migration_leaves_nothing(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sqlalchemy.create_engine(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE images (id INTEGER)")  # the last table to be made
    with pytest.raises(errors.ConfigError, match="images"):
        store_module.Store(database_url)
    with engine.connect() as connection:
        assert sqlalchemy.inspect(connection).get_table_names() == ["images"]
    engine.dispose()


def test_a_database_of_a_newer_release_is_refused(database_url: str) -> None:
    store_module.Store(database_url).close()
    engine = sqlalchemy.create_engine(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(errors.ConfigError, match=r"revision 9999.*up to 0002.*newer"):
        store_module.Store(database_url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite://", "does not outlive the process"),
        ("sqlite:///:memory:", "does not outlive the process"),
        ("sqlite:///file:x?mode=memory&uri=true", "does not outlive the process"),
        ("mysql://localhost/x", "'mysql'"),
        ("sqlite+aiosqlite:///x.db", r"'sqlite\+aiosqlite'"),
        ("service.db", "malformed"),
        ("", "malformed"),
        ("postgresql://someone:hunter2@127.0.0.1:1/x", "cannot be used.*refused"),
        ("postgresql://someone:hunter2@127.0.0.1:port/x", "malformed"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str, said: str) -> None:
    with pytest.raises(errors.ConfigError, match=said) as caught:
        store_module.Store(url)
    assert "give sqlite:////absolute/path" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_folder_that_is_a_file_and_a_file_that_is_no_database_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("not a database, and longer than the sixteen bytes of a header")
    with pytest.raises(errors.ConfigError, match="is a file"):
        store_module.Store(f"sqlite:///{tmp_path}/file/service.db")
    with pytest.raises(errors.ConfigError, match="not a database"):
        store_module.Store(f"sqlite:///{tmp_path}/file")


@pytest.mark.parametrize("url", ["postgres://u@h/d", "postgresql://u@h/d", "postgresql+psycopg://u@h/d"])
def test_postgresql_is_spoken_to_through_psycopg(url: str) -> None:
    assert database._parsed(url).drivername == "postgresql+psycopg"


def test_sqlite_is_durable_and_lets_readers_read(tmp_path: pathlib.Path) -> None:
    opened = store_module.Store(f"sqlite:///{tmp_path}/new/service.db")
    with opened._reading() as session:
        found = [
            session.execute(sqlalchemy.text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert found == ["wal", 2, 1, 30_000]
    with opened._writing() as session:
        assert session.scalar(sqlalchemy.select(tables.KeyRow)) is None  # reads, and yet nobody else writes
        opened.ping()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            _write_at_once(tmp_path / "new" / "service.db")
    opened.close()


def _write_at_once(path: pathlib.Path) -> None:
    connection = sqlite3.connect(path, timeout=0)
    try:
        connection.execute("DELETE FROM usage")
    finally:
        connection.close()


def test_an_exception_undoes_the_whole_transaction(store: store_module.Store, key_id: str) -> None:

    def fail_halfway() -> None:
        with store._writing() as session:
            session.execute(sqlalchemy.update(tables.KeyRow).values(name="changed"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    found = store.get_key(key_id)
    assert found is not None and found.name == "tester"


def test_a_database_that_does_not_answer_is_unavailable(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_S", 0.01)
    opened = store_module.Store(f"sqlite:///{tmp_path}/service.db")
    blocker = sqlite3.connect(tmp_path / "service.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(store_module.StoreUnavailable, match="locked"):
        opened.create_key("late", [], None, None)
    blocker.close()
    opened.close()


def test_ping_tells_a_database_that_is_gone(tmp_path: pathlib.Path) -> None:
    opened = store_module.Store(f"sqlite:///{tmp_path}/folder/service.db")
    opened.ping()
    opened.close()
    (tmp_path / "folder").rename(tmp_path / "moved")
    with pytest.raises(store_module.StoreUnavailable, match="unable to open"):
        opened.ping()


def test_times_without_a_zone_are_refused_and_others_come_back_in_utc(store: store_module.Store, key_id: str) -> None:
    far = datetime.timezone(datetime.timedelta(hours=9))
    late = datetime.datetime(2027, 1, 1, 8, 30, tzinfo=far)
    image = store_module.Image("i", key_id, None, "i.png", "image/png", late, late)
    store.add_image(image)
    found = store.get_image("i")
    assert found == image and found is not None
    assert found.expires_at.utcoffset() == datetime.timedelta(0) and found.expires_at.hour == 23
    with pytest.raises(sqlalchemy.exc.StatementError, match="no time zone"):
        store.spent_nanousd(key_id, datetime.datetime(2027, 1, 1))
