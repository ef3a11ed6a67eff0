"""Work that is tried again while the store does not answer."""

import asyncio

import pytest

from serve import patience
from serve.store import StoreUnavailable


class Work:
    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self, given: str) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return given


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MOST_WAIT_S", 0.0)


@pytest.mark.parametrize("error", [StoreUnavailable("away"), OSError("away")])
def test_it_is_done_once_they_answer(error: Exception) -> None:
    work = Work(3, error)
    assert asyncio.run(patience.patiently(work, "given")) == "given" and work.calls == 4


def test_it_is_given_up_after_so_many_tries() -> None:
    work = Work(9, OSError("away"))
    with pytest.raises(OSError, match="away"):
        asyncio.run(patience.patiently(work, "given", tries=3))
    assert work.calls == 3


def test_other_errors_are_not_tried_again() -> None:
    work = Work(9, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        asyncio.run(patience.patiently(work, "given"))
    assert work.calls == 1
