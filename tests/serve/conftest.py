"""Services for the tests from outside: one that most of them share, and more with settings of their own."""

import contextlib
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.serve.live import Live, serving


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The service that most tests share. Its keys, and so its jobs and usage, are each test's own."""
    with serving(tmp_path_factory.mktemp("service")) as live:
        yield live


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service that takes one image at a time, lets one wait, and carries out one job at a time."""
    one = {"max_batch": 1, "max_queued": 1}
    folder = tmp_path_factory.mktemp("narrow")
    with serving(folder, premium_tier=one, turbo_tier=one, job_concurrency=1, max_queued_jobs=2) as narrow:
        yield narrow


@pytest.fixture
def user(live: Live) -> httpx.Client:
    """A client with a key that no other test has."""
    return live.user()


Start = Callable[..., Live]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts services with settings of their own, which end with the module."""
    with contextlib.ExitStack() as stack:
        yield lambda **given: stack.enter_context(serving(tmp_path_factory.mktemp("service"), **given))
