"""Durable jobs."""

import datetime
from typing import Any

import pytest
import sqlalchemy

from serve import store as store_module
from serve.store import tables

LEASE_S = 60


@pytest.fixture
def add(store: store_module.Store, clock: Any) -> Any:
    """Queues jobs, one second after the other."""

    def add(key_id: str, *names: str, webhook: bool = False) -> None:
        for name in names:
            store.add_job(name, key_id, {"prompt": name}, "https://example.com" if webhook else None, most_queued=None)
            clock.forward(1)

    return add


def _claim(store: store_module.Store, owner: str = "a", limit: int = 10) -> list[str]:
    return [job.id for job in store.claim_jobs(owner, limit, LEASE_S)]


def _get(store: store_module.Store, job_id: str) -> store_module.Job:
    job = store.get_job(job_id, None)
    assert job is not None
    return job


def _finish(store: store_module.Store, job_id: str, owner: str = "a", **changes: Any) -> bool:
    given: dict[str, Any] = {
        "status": "succeeded",
        "answer": {"data": []},
        "error": None,
        "usage_of_it": None,
        "images": [],
    }
    return store.finish_job(job_id, owner, **(given | changes))


def _count(store: store_module.Store, table: type[tables.Base]) -> int:
    with store._reading() as session:
        return session.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(table)).scalar_one()


# --- adding and looking -----------------------------------------------------------------------------


def test_a_queued_job_is_there_for_another_process(
    store: store_module.Store, other_store: store_module.Store, key_id: str, clock: Any
) -> None:
    request = {"prompt": "a \x00 and a \ud800 and é", "seed": 2**32 - 1, "size": None}
    job = store.add_job("job", key_id, request, "https://example.com", most_queued=None)
    assert job == other_store.get_job("job", key_id) == other_store.get_job("job", None)
    assert (job.status, job.attempts, job.cancel_requested, job.created_at) == ("queued", 0, False, clock.time)
    assert job.request == request
    assert (job.started_at, job.finished_at, job.answer, job.error) == (None, None, None, None)


def test_a_job_is_unknown_to_other_keys(store: store_module.Store, key_id: str, add: Any) -> None:
    other, _ = store.create_key("other", [], None, None)
    add(key_id, "job")
    assert store.get_job("job", other.id) is None
    assert store.cancel_job("job", other.id) is None
    assert store.list_jobs(other.id, 10) == ([], False)


def test_a_job_that_is_sent_again_stands_as_it_was(store: store_module.Store, key_id: str, add: Any) -> None:
    add(key_id, "job")
    _claim(store)
    again = store.add_job("job", key_id, {"prompt": "job"}, None, most_queued=0)
    assert again == _get(store, "job") and again.status == "running"


def test_no_more_are_queued_than_may_be(store: store_module.Store, key_id: str) -> None:
    for name in ("a", "b"):
        store.add_job(name, key_id, {}, None, most_queued=2)
    with pytest.raises(store_module.TooManyJobs, match="2 jobs are queued"):
        store.add_job("c", key_id, {}, None, most_queued=2)
    assert store.queued_jobs() == 2 and store.get_job("c", None) is None
    store.claim_jobs("a", 1, LEASE_S)
    store.add_job("c", key_id, {}, None, most_queued=2)


def test_no_more_are_queued_than_may_be_at_once(
    store: store_module.Store, other_store: store_module.Store, key_id: str, race: Any
) -> None:
    def add_one(index: int) -> bool:
        try:
            (store, other_store)[index % 2].add_job(f"job{index}", key_id, {}, None, most_queued=3)
        except store_module.TooManyJobs:
            return False
        return True

    assert sum(race(add_one, 8)) == store.queued_jobs() == 3


def test_pages_are_newest_first_and_complete(store: store_module.Store, key_id: str, add: Any) -> None:
    other, _ = store.create_key("other", [], None, None)
    add(key_id, "a", "b")
    add(other.id, "x")
    for name in ("e", "c", "d"):  # at the same time: then by id
        store.add_job(name, key_id, {}, None, most_queued=None)
    seen: list[str] = []
    more = True
    while more:
        jobs, more = store.list_jobs(key_id, 2, seen[-1] if seen else None)
        seen += [job.id for job in jobs]
    assert seen == ["e", "d", "c", "b", "a"]
    assert [job.id for job in store.list_jobs(None, 10)[0]] == ["e", "d", "c", "x", "b", "a"]
    store.cancel_job("d", None)
    assert [job.id for job in store.list_jobs(key_id, 10, status="cancelled")[0]] == ["d"]


def test_a_page_after_no_job_is_refused(store: store_module.Store, key_id: str, add: Any) -> None:
    other, _ = store.create_key("other", [], None, None)
    add(other.id, "theirs")
    for after in ("nothing", "theirs", "\x00"):
        with pytest.raises(store_module.UnknownCursor, match="there is no job"):
            store.list_jobs(key_id, 10, after)


# --- claiming ---------------------------------------------------------------------------------------


def test_a_claimed_job_runs_for_its_owner_alone(store: store_module.Store, key_id: str, add: Any, clock: Any) -> None:
    add(key_id, "job")
    (job,) = store.claim_jobs("a", 10, LEASE_S)
    assert job == _get(store, "job")
    assert (job.status, job.attempts, job.started_at) == ("running", 1, clock.time)
    assert _claim(store, "b") == [] and store.queued_jobs() == 0


def test_keys_take_turns_within_a_claim(store: store_module.Store, key_id: str, add: Any) -> None:
    second, third = (store.create_key(name, [], None, None)[0].id for name in ("second", "third"))
    add(key_id, "a1", "a2", "a3", "a4")
    add(second, "b1", "b2")
    add(third, "c1")
    assert _claim(store, limit=5) == ["a1", "b1", "c1", "a2", "b2"]
    assert _claim(store) == ["a3", "a4"]


@pytest.mark.parametrize("limit", [1, 3])
def test_a_flood_does_not_starve_a_single_request(
    store: store_module.Store, key_id: str, add: Any, clock: Any, limit: int
) -> None:
    single, _ = store.create_key("single", [], None, None)
    add(key_id, *(f"flood{index}" for index in range(9)))
    for job_id in _claim(store, limit=limit):
        _finish(store, job_id)
    add(single.id, "single")
    assert _claim(store, limit=limit)[0] == "single"


def test_keys_take_turns_between_claims(store: store_module.Store, key_id: str, add: Any, clock: Any) -> None:
    other, _ = store.create_key("other", [], None, None)
    add(key_id, *(f"a{index}" for index in range(9)))
    add(other.id, *(f"b{index}" for index in range(9)))
    served = ""
    for _ in range(4):
        served += "".join(job_id[0] for job_id in _claim(store, limit=3))
        clock.forward(1)
    assert served == "abababababab"


def test_an_abandoned_job_runs_again(store: store_module.Store, key_id: str, add: Any, clock: Any) -> None:
    add(key_id, "job")
    _claim(store)
    clock.forward(LEASE_S - 1)
    assert _claim(store, "b") == []
    clock.forward(1)
    (job,) = store.claim_jobs("b", 10, LEASE_S)
    assert (job.id, job.attempts, job.started_at) == ("job", 2, clock.time)


def test_a_renewed_job_is_not_abandoned(store: store_module.Store, key_id: str, add: Any, clock: Any) -> None:
    add(key_id, "job", "other")
    assert _claim(store, "a", 1) == ["job"] and _claim(store, "b") == ["other"]
    clock.forward(LEASE_S - 1)
    assert store.renew("a", LEASE_S) == []
    clock.forward(LEASE_S - 1)
    assert _claim(store, "c") == ["other"]


def test_a_job_that_nobody_is_at_is_abandoned_though_its_owner_lives(
    store: store_module.Store, key_id: str, add: Any, clock: Any
) -> None:
    add(key_id, "job", "dropped")
    _claim(store)
    clock.forward(LEASE_S - 1)
    store.renew("a", LEASE_S, {"job"})
    clock.forward(1)
    assert _claim(store, "a") == ["dropped"]


@pytest.mark.parametrize("limit", [1, 7])
def test_two_claimers_never_get_the_same_job(
    store: store_module.Store, other_store: store_module.Store, key_id: str, add: Any, race: Any, limit: int
) -> None:
    other, _ = store.create_key("other", [], None, None)
    for index in range(60):
        add((key_id, other.id)[index % 2], f"job{index}")

    def drain(index: int) -> list[str]:
        mine: list[str] = []
        while found := _claim((store, other_store)[index % 2], f"o{index}", limit):
            mine += found
        return mine

    taken = [each for part in race(drain, 6) for each in part]
    assert len(taken) == len(set(taken)) == 60


def test_two_claimers_never_take_over_the_same_job(
    store: store_module.Store, other_store: store_module.Store, key_id: str, add: Any, clock: Any, race: Any
) -> None:
    add(key_id, *(f"job{index}" for index in range(12)))
    _claim(store, "dead", 12)
    clock.forward(LEASE_S)
    taken = race(lambda index: _claim((store, other_store)[index % 2], f"o{index}", 5), 6)
    assert sorted(each for part in taken for each in part) == sorted(f"job{index}" for index in range(12))


# --- finishing --------------------------------------------------------------------------------------


def _everything(key_id: str, at: datetime.datetime) -> dict[str, Any]:
    usage = store_module.Usage(key_id, "turbo", 1, 20.0, 300, 900, at)
    image = store_module.Image("img", key_id, "job", "ab/img.png", "image/png", at, at + datetime.timedelta(hours=1))
    return {"answer": {"data": [{"url": "x"}]}, "usage_of_it": usage, "images": [image]}


def test_a_result_comes_with_usage_images_and_message(
    store: store_module.Store, key_id: str, add: Any, clock: Any
) -> None:
    add(key_id, "job", webhook=True)
    _claim(store)
    everything = _everything(key_id, clock.time)
    store.add_image(everything["images"][0])  # as an attempt that died may have left it
    ended = clock.forward(5)
    assert _finish(store, "job", **everything) is True
    job = _get(store, "job")
    assert (job.status, job.answer, job.error, job.finished_at) == ("succeeded", everything["answer"], None, ended)
    assert store.spent_nanousd(key_id, ended - datetime.timedelta(days=1)) == 300
    assert store.get_image("img") == everything["images"][0]
    assert [delivery.event for delivery in store.claim_deliveries("a", 10, 1)] == ["job.succeeded"]


def test_without_a_webhook_there_is_no_message(store: store_module.Store, key_id: str, add: Any) -> None:
    add(key_id, "job")
    _claim(store)
    assert _finish(store, "job", status="failed", answer=None, error={"code": "x"}) is True
    assert _get(store, "job").error == {"code": "x"}
    assert _count(store, tables.DeliveryRow) == 0


@pytest.mark.parametrize("lost_to", ["another", "nobody", "its own second try"])
def test_a_lost_owner_writes_nothing(
    store: store_module.Store, key_id: str, add: Any, clock: Any, lost_to: str
) -> None:
    add(key_id, "job", webhook=True)
    _claim(store)
    if lost_to == "another":
        clock.forward(LEASE_S)
        assert _claim(store, "b") == ["job"]
    elif lost_to == "nobody":
        store.release_jobs("a")
    else:
        _finish(store, "job", status="failed", answer=None, error={"code": "x"})
    before, messages = _get(store, "job"), _count(store, tables.DeliveryRow)
    assert _finish(store, "job", **_everything(key_id, clock.time)) is False
    assert _get(store, "job") == before
    assert [_count(store, table) for table in (tables.UsageRow, tables.ImageRow)] == [0, 0]
    assert _count(store, tables.DeliveryRow) == messages


def test_an_owner_whose_job_nobody_took_may_still_finish_it(
    store: store_module.Store, key_id: str, add: Any, clock: Any
) -> None:
    add(key_id, "job")
    _claim(store)
    clock.forward(10 * LEASE_S)
    assert _finish(store, "job") is True


def test_a_result_is_written_whole_or_not_at_all(store: store_module.Store, key_id: str, add: Any, clock: Any) -> None:
    add(key_id, "job", webhook=True)
    _claim(store)
    everything = _everything(key_id, clock.time)
    stray = store_module.Image("stray", "nobody", None, "s.png", "image/png", clock.time, clock.time)
    with pytest.raises(sqlalchemy.exc.IntegrityError):
        _finish(store, "job", **(everything | {"images": [everything["images"][0], stray]}))
    assert _get(store, "job").status == "running"
    counted = [_count(store, table) for table in (tables.UsageRow, tables.ImageRow, tables.DeliveryRow)]
    assert counted == [0, 0, 0]


def test_of_two_that_finish_one_is_recorded(
    store: store_module.Store, other_store: store_module.Store, key_id: str, add: Any, clock: Any, race: Any
) -> None:
    add(key_id, *(f"job{index}" for index in range(6)), webhook=True)
    for job_id in _claim(store):
        usage = store_module.Usage(key_id, "turbo", 1, 1.0, 1, 1, clock.time)
        won = race(
            lambda index, job_id=job_id, usage=usage: _finish(
                (store, other_store)[index % 2], job_id, answer={"by": index}, usage_of_it=usage
            ),
            4,
        )
        assert sorted(won) == [False, False, False, True]
        assert _get(store, job_id).answer == {"by": won.index(True)}
    assert _count(store, tables.UsageRow) == _count(store, tables.DeliveryRow) == 6


# --- cancelling and draining ------------------------------------------------------------------------


def test_a_queued_job_is_cancelled_at_once(store: store_module.Store, key_id: str, add: Any, clock: Any) -> None:
    add(key_id, "job", webhook=True)
    assert store.cancel_job("job", key_id) == "cancelled"
    job = _get(store, "job")
    assert (job.status, job.finished_at, job.attempts) == ("cancelled", clock.time, 0)
    assert [delivery.event for delivery in store.claim_deliveries("a", 10, 1)] == ["job.cancelled"]
    assert store.cancel_job("job", key_id) == "already_finished"
    assert _claim(store) == [] and _count(store, tables.DeliveryRow) == 1


def test_the_owner_of_a_running_job_is_told(store: store_module.Store, key_id: str, add: Any) -> None:
    add(key_id, "job", "other", webhook=True)
    _claim(store)
    assert store.cancel_job("job", None) == store.cancel_job("job", None) == "cancellation_requested"
    assert store.renew("b", LEASE_S) == [] and store.renew("a", LEASE_S) == ["job"]
    assert _get(store, "job").cancel_requested and _get(store, "job").status == "running"
    assert _count(store, tables.DeliveryRow) == 0
    assert _finish(store, "job", status="cancelled", answer=None) is True
    assert store.renew("a", LEASE_S) == []
    assert store.cancel_job("job", None) == "already_finished"


def test_an_abandoned_job_that_was_to_be_cancelled_is(
    store: store_module.Store, key_id: str, add: Any, clock: Any
) -> None:
    add(key_id, "job", "other", webhook=True)
    _claim(store)
    store.cancel_job("job", None)
    clock.forward(LEASE_S)
    assert _claim(store, "b") == ["other"]
    assert _get(store, "job").status == "cancelled"
    assert [delivery.job_id for delivery in store.claim_deliveries("a", 10, 1)] == ["job"]
    assert _finish(store, "job") is False


def test_released_jobs_are_queued_in_their_old_place(store: store_module.Store, key_id: str, add: Any) -> None:
    add(key_id, "a1", "a2", "b1", "late")
    assert _claim(store, "a", 2) == ["a1", "a2"] and _claim(store, "b", 1) == ["b1"]
    store.cancel_job("a2", None)
    assert store.release_jobs("a") == 2
    assert [_get(store, name).status for name in ("a1", "a2", "b1")] == ["queued", "cancelled", "running"]
    jobs = store.claim_jobs("c", 10, LEASE_S)
    assert [(job.id, job.attempts) for job in jobs] == [("a1", 1), ("late", 1)]


def test_a_cancel_and_a_claim_at_once_agree(
    store: store_module.Store, other_store: store_module.Store, key_id: str, add: Any, race: Any
) -> None:
    for index in range(10):
        add(key_id, f"job{index}")
        said, claimed = race(
            lambda which, index=index: (
                store.cancel_job(f"job{index}", None) if which == 0 else _claim(other_store, "a")
            ),
            2,
        )
        job = _get(store, f"job{index}")
        if claimed:
            assert (said, job.status, job.cancel_requested) == ("cancellation_requested", "running", True)
        else:
            assert (said, job.status) == ("cancelled", "cancelled")
