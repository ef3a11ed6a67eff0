"""Databases and picture folders to test against: SQLite and a local folder always, the others where one is named.

DIFFUSION_KD_TEST_POSTGRES: a PostgreSQL URL; each test has a schema of its own there.
DIFFUSION_KD_TEST_S3: http://endpoint|accesskey|secretkey|bucket; each test has a prefix of its own there.
"""

import concurrent.futures
import datetime
import os
import pathlib
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy

from serve import store as store_module

Race = Callable[[Callable[[int], Any], int], list[Any]]


class Clock:
    def __init__(self) -> None:
        self.time = datetime.datetime(2026, 5, 31, 23, 0, tzinfo=datetime.UTC)

    def __call__(self) -> datetime.datetime:
        return self.time

    def forward(self, seconds: float) -> datetime.datetime:
        self.time += datetime.timedelta(seconds=seconds)
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/service.db"
        return
    url = os.environ.get("DIFFUSION_KD_TEST_POSTGRES")
    if not url:
        pytest.skip("DIFFUSION_KD_TEST_POSTGRES names no database")
    schema = f"test_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
        yield f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{schema}"
        connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
    engine.dispose()


@pytest.fixture
def store(database_url: str, clock: Clock) -> Iterator[store_module.Store]:
    opened = store_module.Store(database_url, now=clock)
    yield opened
    opened.close()


@pytest.fixture
def other_store(store: store_module.Store, database_url: str, clock: Clock) -> Iterator[store_module.Store]:
    """The same database as another process sees it."""
    opened = store_module.Store(database_url, now=clock)
    yield opened
    opened.close()


@pytest.fixture
def key_id(store: store_module.Store) -> str:
    return store.create_key("tester", ["generate"], None, None)[0].id


@pytest.fixture
def race() -> Race:
    """Runs a function of 0..n-1 in n threads that start together; their results in that order."""

    def run(function: Callable[[int], Any], threads: int) -> list[Any]:
        barrier = threading.Barrier(threads)

        def wait_and_call(index: int) -> Any:
            barrier.wait()
            return function(index)

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return list(pool.map(wait_and_call, range(threads)))

    return run


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> store_module.ImageFolder:
    if request.param == "local":
        return store_module.ImageFolder(str(tmp_path / "images"))
    named = os.environ.get("DIFFUSION_KD_TEST_S3")
    if not named:
        pytest.skip("DIFFUSION_KD_TEST_S3 names no bucket")
    endpoint, key, secret, bucket = named.split("|")
    options = {"endpoint_url": endpoint, "key": key, "secret": secret}
    return store_module.ImageFolder(f"s3://{bucket}/test-{uuid.uuid4().hex}", options)
