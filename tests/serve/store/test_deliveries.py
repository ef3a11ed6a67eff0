"""The outbox of webhooks."""

import datetime
from typing import Any

import pytest
import sqlalchemy

from serve import store as store_module
from serve.store import tables

LEASE_S = 60


@pytest.fixture
def job_ids(store: store_module.Store, key_id: str) -> list[str]:
    """Three jobs that have ended, each with a message to send."""
    names = ["job0", "job1", "job2"]
    for name in names:
        store.add_job(name, key_id, {}, f"https://example.com/{name}", most_queued=None)
    for job in store.claim_jobs("worker", 3, LEASE_S):
        store.finish_job(job.id, "worker", "succeeded", {"data": []}, None, None, [])
    return names


def _claim(store: store_module.Store, owner: str = "a", limit: int = 10) -> list[store_module.Delivery]:
    return store.claim_deliveries(owner, limit, LEASE_S)


def test_a_message_says_what_became_of_the_job(store: store_module.Store, job_ids: list[str], clock: Any) -> None:
    first = min(_claim(store), key=lambda delivery: delivery.job_id)
    assert (first.job_id, first.url, first.event) == ("job0", "https://example.com/job0", "job.succeeded")
    assert first.payload == {
        "type": "job.succeeded",
        "timestamp": "2026-05-31T23:00:00+00:00",
        "data": {"id": "job0", "status": "succeeded"},
    }
    assert (first.attempts, first.next_at) == (1, clock.time)


def test_a_claimed_one_is_nobody_elses_until_its_lease_runs_out(
    store: store_module.Store, job_ids: list[str], clock: Any
) -> None:
    assert len(_claim(store, limit=2)) == 2
    assert len(_claim(store, "b")) == 1
    clock.forward(LEASE_S - 1)
    assert _claim(store, "c") == []
    clock.forward(1)
    assert [delivery.attempts for delivery in _claim(store, "c")] == [2, 2, 2]


def test_what_is_done_or_given_up_does_not_come_again(
    store: store_module.Store, job_ids: list[str], clock: Any
) -> None:
    done, failed, late = _claim(store)
    store.delivery_done(done.id)
    store.fail_delivery(failed.id, "410 Gone")
    clock.forward(LEASE_S)
    assert [delivery.id for delivery in _claim(store)] == [late.id]
    # A sender that was thought dead comes back: that changes nothing.
    store.retry_delivery(done.id, clock.time, "timed out")
    store.retry_delivery(failed.id, clock.time, "timed out")
    store.fail_delivery(done.id, "timed out")
    assert _claim(store) == []
    with store._reading() as session:
        rows = {row.id: (row.status, row.last_error) for row in session.scalars(sqlalchemy.select(tables.DeliveryRow))}
    assert rows[done.id] == ("delivered", None) and rows[failed.id] == ("failed", "410 Gone")


def test_a_retry_comes_when_it_is_due(store: store_module.Store, job_ids: list[str], clock: Any) -> None:
    first, *_ = _claim(store)
    due = clock.time + datetime.timedelta(seconds=5)
    store.retry_delivery(first.id, due, "503")
    assert _claim(store) == []
    clock.forward(5)
    again = _claim(store)
    assert [(delivery.id, delivery.attempts, delivery.next_at) for delivery in again] == [(first.id, 2, due)]


def test_those_that_wait_longest_come_first(store: store_module.Store, job_ids: list[str], clock: Any) -> None:
    for delivery, wait_s in zip(_claim(store), (30, 10, 20), strict=True):
        store.retry_delivery(delivery.id, clock.time + datetime.timedelta(seconds=wait_s), "503")
    start = clock.time
    clock.forward(30)
    waits = [(_claim(store, limit=1)[0].next_at - start).total_seconds() for _ in range(3)]
    assert waits == [10, 20, 30]


def test_a_released_one_is_due_at_once(store: store_module.Store, job_ids: list[str]) -> None:
    _claim(store, "a", 1)
    _claim(store, "b", 1)
    store.release_deliveries("a")
    assert len(_claim(store, "c")) == 2


def test_two_senders_never_get_the_same(
    store: store_module.Store, other_store: store_module.Store, key_id: str, race: Any
) -> None:
    for index in range(40):
        store.add_job(f"job{index}", key_id, {}, "https://example.com", most_queued=None)
        store.cancel_job(f"job{index}", None)

    def drain(index: int) -> list[str]:
        mine: list[str] = []
        while found := _claim((store, other_store)[index % 2], f"o{index}", 3):
            mine += [delivery.id for delivery in found]
        return mine

    taken = [each for part in race(drain, 4) for each in part]
    assert len(taken) == len(set(taken)) == 40
