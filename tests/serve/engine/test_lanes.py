"""Queues, admission, turns and waits, with no network and a clock of our own."""

import random
from collections.abc import Iterable

import pytest

from serve.engine import errors, lanes
from serve.engine.lanes import Estimates, FairQueue, Lane, Limits
from tests.serve.engine import doubles

ROW_S = 0.01


def measured(lane: Lane, row_s: float = ROW_S) -> Lane:
    """A lane that knows what a row costs."""
    lane.estimates = Estimates()
    lane.estimates.row_s.observe(row_s)
    return lane


# --- the queue --------------------------------------------------------------------------------------


def test_a_flood_of_one_key_holds_nobody_else_back() -> None:
    queue, lane = FairQueue(), Lane("premium", Limits())
    queue.push(doubles.waiting(lane, 40, key="flood"))
    queue.push(doubles.waiting(lane, 1, key="single"))
    assert [queue.pop().request.key for _ in range(3)] == ["flood", "single", "flood"]
    assert len(queue) == len(list(queue)) == 38


def test_keys_take_turns_and_a_key_keeps_its_order() -> None:
    queue, lane = FairQueue(), Lane("premium", Limits())
    for key, count in (("a", 3), ("b", 2), ("c", 1)):
        queue.push(doubles.waiting(lane, count, key=key))
    order = [(sample.request.key, sample.index) for sample in (queue.pop() for _ in range(6))]
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert len(queue) == 0


def test_what_is_over_leaves_the_queue() -> None:
    queue, lane = FairQueue(), Lane("premium", Limits())
    first, second = doubles.waiting(lane, 2, key="a"), doubles.waiting(lane, 3, key="a")
    queue.push([*first, *second])
    first[0].ticket.cancel()
    queue.drop_over()
    assert list(queue) == second
    second[0].ticket.cancel()
    queue.drop_over()
    assert len(queue) == 0


# --- estimates --------------------------------------------------------------------------------------


def test_an_estimate_is_the_mean_and_then_follows_the_newest() -> None:
    estimate = lanes.Estimate()
    for value in (1.0, 2.0, 6.0):
        estimate.observe(value)
    assert estimate.value == pytest.approx(3)
    for _ in range(100):
        estimate.observe(10)
    assert estimate.value == pytest.approx(10, rel=1e-3)


def test_what_an_image_takes() -> None:
    estimates = Estimates()
    estimates.row_s.observe(0.1)
    estimates.decode_s.observe(0.5)
    assert estimates.image_s(20, 2) == pytest.approx(20 * 2 * 0.1 + 0.5)


# --- admission --------------------------------------------------------------------------------------


def test_an_idle_tier_takes_a_batch_and_a_queue() -> None:
    schedule = doubles.schedule(premium=Limits(max_batch=2, max_queued=3, max_wait_s=1e9))
    schedule.admit("premium", doubles.waiting(schedule.lanes["premium"], 5))
    with pytest.raises(errors.Busy, match="the premium tier has 5 images waiting and takes 3"):
        schedule.admit("premium", doubles.waiting(schedule.lanes["premium"]))


def test_all_images_of_a_request_are_admitted_or_none() -> None:
    lane = Lane("premium", Limits(max_batch=1, max_queued=4, max_wait_s=1e9))
    lane.admit(doubles.waiting(lane, 3), share=1)
    with pytest.raises(errors.Busy):
        lane.admit(doubles.waiting(lane, 3), share=1)
    assert len(lane.queue) == 3
    lane.admit(doubles.waiting(lane, 2), share=1)
    assert len(lane.queue) == 5


def test_an_image_on_its_way_takes_no_place_in_the_queue() -> None:
    lane = Lane("premium", Limits(max_batch=1, max_queued=1, max_wait_s=1e9))
    lane.admit(doubles.waiting(lane), share=1)
    lane.join()
    lane.admit(doubles.waiting(lane), share=1)
    with pytest.raises(errors.Busy):
        lane.admit(doubles.waiting(lane), share=1)


def test_too_long_a_wait_is_refused_and_says_for_how_long() -> None:
    """One image of 100 passes of 10 ms is on its way, and five wait: the next would start in 6 s."""
    lane = measured(Lane("premium", Limits(max_batch=1, max_wait_s=4)))
    for _ in range(6):
        lane.limits = Limits(max_batch=1, max_wait_s=1e9)
        lane.admit(doubles.waiting(lane, steps=100), share=1)
    lane.join()
    assert lane.predicted_wait_s(1, share=1) == pytest.approx(6)
    lane.limits = Limits(max_batch=1, max_wait_s=4)
    with pytest.raises(errors.Busy, match="would let this wait for 6 s and admits waits of 4 s") as caught:
        lane.admit(doubles.waiting(lane), share=1)
    assert caught.value.retry_after_s == 2  # by then the wait is 4 s
    with pytest.raises(errors.Busy) as caught:
        lane.admit(doubles.waiting(lane), share=0.5)
    assert caught.value.retry_after_s == 8  # with half of the device it is 12 s
    lane.limits = Limits(max_batch=1, max_wait_s=6.01)
    lane.admit(doubles.waiting(lane), share=1)


def test_a_queue_that_one_key_has_filled_lets_another_in_once() -> None:
    lane = Lane("premium", Limits(max_batch=1, max_queued=2, max_wait_s=1e9))
    lane.admit(doubles.waiting(lane, 3, key="flood"), share=1)
    lane.join()
    with pytest.raises(errors.Busy):
        lane.admit(doubles.waiting(lane, key="flood"), share=1)
    lane.admit(doubles.waiting(lane, key="single"), share=1)
    with pytest.raises(errors.Busy):
        lane.admit(doubles.waiting(lane, key="single"), share=1)
    assert [lane.queue.pop().request.key for _ in range(3)] == ["flood", "single", "flood"]


def test_the_wait_counts_to_the_turn_of_ones_key() -> None:
    """One image of 100 passes of 10 ms is on its way; a key has forty waiting, and another key's turn is second."""
    lane = measured(Lane("premium", Limits(max_batch=1, max_queued=100, max_wait_s=3)))
    lane.limits = Limits(max_batch=1, max_queued=100, max_wait_s=1e9)
    lane.admit(doubles.waiting(lane, 41, key="flood", steps=100), share=1)
    lane.join()
    assert lane.predicted_wait_s(1, 1, doubles.waiting(lane, key="flood", steps=100)[0]) == pytest.approx(41)
    assert lane.predicted_wait_s(1, 1, doubles.waiting(lane, key="single", steps=100)[0]) == pytest.approx(2)
    assert lane.predicted_wait_s(2, 1, doubles.waiting(lane, 2, key="single", steps=100)[0]) == pytest.approx(4)


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    lane = measured(Lane("premium", Limits(max_batch=1, max_queued=1, max_wait_s=1e9)), row_s=1e-4)
    lane.admit(doubles.waiting(lane, 2), share=1)
    with pytest.raises(errors.Busy) as caught:
        lane.admit(doubles.waiting(lane), share=1)
    assert caught.value.retry_after_s == 1


# --- joining and turns ------------------------------------------------------------------------------


def test_no_more_join_than_fit() -> None:
    lane = Lane("premium", Limits(max_batch=4))
    lane.queue.push(doubles.waiting(lane, 10))
    assert len(lane.join()) == 4
    assert lane.join() == []
    lane.shrink(2)
    assert lane.join() == []
    lane.active = lane.active[:1]
    assert len(lane.join()) == 1


def test_sizes_take_turns() -> None:
    lane = Lane("premium", Limits())
    small, large = doubles.waiting(lane, 2, size_px=(16, 16)), doubles.waiting(lane, 1, size_px=(32, 16))
    lane.active = [small[0], large[0], small[1]]
    assert [lane.turn() for _ in range(3)] == [small, large, small]
    assert set(lane.active) == {*small, *large}


def test_a_shrunken_batch_grows_again_after_many_passes() -> None:
    lane = Lane("premium", Limits(max_batch=8))
    lane.shrink(3)
    assert lane.fits == 3
    seen = []
    for _ in range(1000):
        lane.passed()
        seen.append(lane.fits)
    assert seen[100] == 3 and seen[250] == 6 and seen[-1] == 8
    lane.shrink(0)
    assert lane.fits == 1


# --- sharing the device -----------------------------------------------------------------------------


def saturate(
    schedule: lanes.Schedule, device_s: float, tiers: Iterable[str] = ("premium", "turbo")
) -> dict[str, float]:
    """Seconds of the device that each tier had, with `tiers` never out of work."""
    had_s, passed_s = dict.fromkeys(schedule.lanes, 0.0), 0.0
    while passed_s < device_s:
        for tier in tiers:
            if not len((busy := schedule.lanes[tier]).queue):
                schedule.admit(tier, doubles.waiting(busy, 4, steps=4 if tier == "turbo" else 50))
        lane = schedule.next()
        assert lane is not None
        seconds, _ = doubles.fake_turn(lane, ROW_S)
        had_s[lane.tier] += seconds
        passed_s += seconds
    return had_s


@pytest.mark.parametrize("weight", [1.0, 4.0, 10.0])
def test_busy_tiers_share_the_device_by_weight(weight: float) -> None:
    limits = {"max_wait_s": 1e9, "max_queued": 1000}
    schedule = doubles.schedule(
        premium=Limits(max_batch=8, weight=1, **limits),  # type: ignore[arg-type]
        turbo=Limits(max_batch=2, weight=weight, **limits),  # type: ignore[arg-type]
    )
    had_s = saturate(schedule, 100)
    assert had_s["turbo"] / had_s["premium"] == pytest.approx(weight, rel=0.1)


def test_a_lone_tier_has_the_whole_device() -> None:
    schedule = doubles.schedule(premium=Limits(weight=1), turbo=Limits(weight=3))
    premium, turbo = schedule.lanes["premium"], schedule.lanes["turbo"]
    assert schedule.next() is None
    assert schedule.share(premium) == 1
    schedule.admit("turbo", doubles.waiting(turbo))
    assert schedule.share(premium) == pytest.approx(1 / 4)
    assert schedule.share(turbo) == 1
    assert schedule.next() is turbo


@pytest.mark.parametrize("sleeper", ["turbo", "premium"])
def test_a_tier_that_slept_starts_level(sleeper: str) -> None:
    """A long rest is not paid for: nobody starves after it, neither the sleeper nor the one that worked."""
    limits = Limits(max_batch=4, max_queued=1000, max_wait_s=1e9)
    schedule = doubles.schedule(premium=limits, turbo=limits)
    worker = {"turbo": "premium", "premium": "turbo"}[sleeper]
    saturate(schedule, 1000, tiers=[worker])
    both = saturate(schedule, 10)
    assert both["turbo"] == pytest.approx(both["premium"], rel=0.05)


def test_who_arrives_waits_for_one_pass_of_the_other_at_most() -> None:
    schedule = doubles.schedule(premium=Limits(), turbo=Limits(weight=4))
    premium, turbo = schedule.lanes["premium"], schedule.lanes["turbo"]
    schedule.admit("premium", doubles.waiting(premium, 8, steps=50))
    for _ in range(10):
        assert schedule.next() is premium
        doubles.fake_turn(premium, ROW_S)
    schedule.admit("turbo", doubles.waiting(turbo, steps=4))
    for _ in range(4):
        assert schedule.next() is turbo
        doubles.fake_turn(turbo, ROW_S)
    assert schedule.next() is premium


# --- predicted waits --------------------------------------------------------------------------------


def reality_s(schedule: lanes.Schedule, tier: str, ours: list[lanes.Sample]) -> float:
    """Seconds until the last of `ours`, queued now, starts."""
    passed_s, started = 0.0, set[int]()
    while len(started) < len(ours):
        lane = schedule.next()
        assert lane is not None
        seconds, joined = doubles.fake_turn(lane, ROW_S)
        started |= {id(sample) for sample in joined} & set(map(id, ours))
        if len(started) < len(ours):
            passed_s += seconds
        if lane.tier != tier and not len(lane.queue):  # the others stay busy
            schedule.admit(lane.tier, doubles.waiting(lane, 4, steps=4))
    return passed_s


@pytest.mark.parametrize("company", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_the_predicted_wait_is_within_a_factor_of_two(seed: int, company: bool) -> None:
    """A queue in the middle of its day; then one more request."""
    rng = random.Random(seed)
    batch = rng.choice([1, 4, 8])
    limits = Limits(max_batch=batch, max_queued=10_000, max_wait_s=1e9)
    schedule = doubles.schedule(premium=limits, turbo=limits)
    premium, turbo = measured(schedule.lanes["premium"]), measured(schedule.lanes["turbo"])

    def images(count: int) -> list[lanes.Sample]:
        return doubles.waiting(premium, count, steps=rng.randint(10, 50), guidance_scale=rng.choice([1.0, 5.0]))

    for _ in range(100 + rng.randrange(200)):
        while len(premium.queue) < batch:
            schedule.admit("premium", images(rng.randint(1, 3)))
        assert schedule.next() is premium
        doubles.fake_turn(premium, ROW_S)
    if company:
        schedule.admit("turbo", doubles.waiting(turbo, 4, steps=4))
    for _ in range(rng.randrange(2 * batch)):
        schedule.admit("premium", images(1))
    ours = images(rng.randint(1, 5))
    predicted_s = premium.predicted_wait_s(len(ours), schedule.share(premium), ours[0])
    schedule.admit("premium", ours)
    actual_s = reality_s(schedule, "premium", ours)
    assert predicted_s / 2 <= actual_s <= 2 * predicted_s


@pytest.mark.parametrize("passed", [0, 20, 45])
def test_a_batch_that_began_together_is_waited_for_as_a_whole(passed: int) -> None:
    lane = measured(Lane("premium", Limits(max_batch=8)))
    lane.queue.push(doubles.waiting(lane, 8, steps=50))
    for _ in range(passed + 1):
        doubles.fake_turn(lane, ROW_S)
    assert lane.predicted_wait_s(1, share=1) == pytest.approx((49 - passed) * 8 * ROW_S)
    lane.estimates.decode_s.observe(0.5)
    assert lane.predicted_wait_s(1, share=0.5) == pytest.approx(2 * ((49 - passed) * 8 * ROW_S + 8 * 0.5))
    lane.queue.push(doubles.waiting(lane, 2, steps=10, guidance_scale=5.0))
    # Those two join together with it.
    assert lane.predicted_wait_s(6, share=1) == pytest.approx((49 - passed) * 8 * ROW_S + 8 * 0.5)


def test_who_finds_room_does_not_wait() -> None:
    lane = measured(Lane("premium", Limits(max_batch=4)))
    lane.active = doubles.waiting(lane, 2)
    assert lane.predicted_wait_s(2, share=1) == 0
    assert lane.predicted_wait_s(3, share=1) > 0
    lane.shrink(3)  # what does not fit into memory is no room
    assert lane.predicted_wait_s(2, share=1) > 0
