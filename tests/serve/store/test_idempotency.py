"""Requests that are sent twice."""

from typing import Any

import pytest

from serve import store as store_module

LEASE_S, TTL_S = 30, 86_400


def _begin(store: store_module.Store, key_id: str, owner: str = "a", body: str = "hash", name: str = "once") -> str:
    return store.begin_idempotent(key_id, name, body, owner, LEASE_S, TTL_S).state


def test_the_first_works_the_next_wait_and_then_get_the_answer(store: store_module.Store, key_id: str) -> None:
    assert _begin(store, key_id) == "new"
    assert _begin(store, key_id, owner="b") == "running"
    assert _begin(store, key_id) == "running"
    assert store.complete_idempotent(key_id, "once", "a", {"created": 1}) is True
    found = store.begin_idempotent(key_id, "once", "hash", "b", LEASE_S, TTL_S)
    assert found == store_module.Idempotent("done", {"created": 1})


def test_another_body_is_a_conflict_before_and_after_the_answer(store: store_module.Store, key_id: str) -> None:
    _begin(store, key_id)
    assert _begin(store, key_id, body="other") == "conflict"
    store.complete_idempotent(key_id, "once", "a", {})
    assert _begin(store, key_id, body="other") == "conflict"


def test_keys_do_not_share_their_idempotency_keys(store: store_module.Store, key_id: str) -> None:
    other, _ = store.create_key("other", [], None, None)
    assert [_begin(store, each) for each in (key_id, other.id)] == ["new", "new"]
    assert _begin(store, key_id, name="twice") == "new"


def test_a_lease_that_ran_out_is_taken_over(store: store_module.Store, key_id: str, clock: Any) -> None:
    _begin(store, key_id)
    clock.forward(LEASE_S - 1)
    assert _begin(store, key_id, owner="b") == "running"
    clock.forward(1)
    assert _begin(store, key_id, owner="b") == "new"
    assert store.complete_idempotent(key_id, "once", "a", {"by": "a"}) is False
    store.forget_idempotent(key_id, "once", "a")
    assert _begin(store, key_id, owner="c") == "running"
    assert store.complete_idempotent(key_id, "once", "b", {"by": "b"}) is True
    assert store.begin_idempotent(key_id, "once", "hash", "c", LEASE_S, TTL_S).answer == {"by": "b"}


def test_a_renewed_lease_is_not(store: store_module.Store, key_id: str, clock: Any) -> None:
    _begin(store, key_id)
    clock.forward(LEASE_S - 1)
    store.renew("b", LEASE_S)
    store.renew("a", LEASE_S)
    clock.forward(LEASE_S - 1)
    assert _begin(store, key_id, owner="b") == "running"


def test_after_its_time_the_answer_is_forgotten(store: store_module.Store, key_id: str, clock: Any) -> None:
    _begin(store, key_id)
    store.complete_idempotent(key_id, "once", "a", {"by": "a"})
    clock.forward(TTL_S - 1)
    assert _begin(store, key_id) == "done"
    clock.forward(1)
    assert _begin(store, key_id, owner="b", body="other") == "new"
    assert _begin(store, key_id, owner="c", body="other") == "running"


def test_a_failed_request_is_done_anew(store: store_module.Store, key_id: str) -> None:
    _begin(store, key_id)
    store.forget_idempotent(key_id, "once", "a")
    assert _begin(store, key_id, owner="b", body="other") == "new"


def test_an_answer_is_not_forgotten_by_its_owner(store: store_module.Store, key_id: str) -> None:
    _begin(store, key_id)
    store.complete_idempotent(key_id, "once", "a", {})
    store.forget_idempotent(key_id, "once", "a")
    assert _begin(store, key_id) == "done"


@pytest.mark.parametrize("expired", [False, True])
def test_of_many_at_once_one_is_new(
    store: store_module.Store, other_store: store_module.Store, key_id: str, clock: Any, race: Any, expired: bool
) -> None:
    for turn in range(5):
        if expired:
            _begin(store, key_id, owner="dead", name=f"n{turn}")
            clock.forward(LEASE_S)
        states = race(
            lambda index, turn=turn: _begin((store, other_store)[index % 2], key_id, f"o{index}", name=f"n{turn}"), 8
        )
        assert sorted(states) == ["new"] + ["running"] * 7
