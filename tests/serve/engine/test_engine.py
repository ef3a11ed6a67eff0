"""The engine as a whole: who joins, who waits, who leaves, and that an image is the same in any company."""

import concurrent.futures
import contextlib
import io
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval import sampling
from serve.engine import encoding, errors, models
from serve.engine.engine import Engine, preview_steps
from serve.engine.lanes import Limits
from serve.engine.models import Model
from serve.engine.requests import ImageRequest, Ticket
from tests.serve.engine import doubles

PROMPTS = ("a red circle", "a blue star above a green ring", "a pink cross", "")
Pair = dict[str, Model]


@pytest.fixture
def toys() -> Pair:
    return doubles.toy_models()


@pytest.fixture
def counts() -> doubles.Counts:
    return doubles.Counts()


@pytest.fixture(scope="module")
def shapes() -> Pair:
    return models.load_pair("shapes-teacher", "shapes-student", device="cpu", precision="fp32")


def unet(pair: Pair, tier: str = "premium") -> Any:
    return pair[tier].parts.unet


# --- batching by steps ------------------------------------------------------------------------------


def test_a_request_joins_at_the_next_pass_and_leaves_when_it_is_done(toys: Pair, counts: doubles.Counts) -> None:
    timesteps: list[list[int]] = []
    with doubles.running(toys, counts) as engine:
        halt = doubles.Halt(unet(toys), 3)
        unet(toys).after = lambda given, made: (timesteps.append(given[1].tolist()), made)[1]
        long = engine.submit(doubles.request(steps=10))
        halt.wait()
        short = engine.submit(doubles.request(seeds=(1, 2), steps=2))
        halt.go.set()
        short.result(doubles.PATIENCE_S)
        long.result(doubles.PATIENCE_S)
    assert counts.rows("premium") == [1] * 3 + [3] * 2 + [1] * 5
    # Different timesteps share a pass: the fourth of ten steps and the first of two.
    assert timesteps[3] == [699, 999, 999] and timesteps[4] == [599, 499, 499]


def test_guided_and_unguided_images_share_a_pass(toys: Pair, counts: doubles.Counts) -> None:
    with doubles.running(toys, counts) as engine:
        halt = doubles.Halt(unet(toys))
        tickets = [engine.submit(doubles.request(steps=3))]
        halt.wait()
        tickets += [engine.submit(doubles.request(steps=2, guidance_scale=scale)) for scale in (1.0, 3.0)]
        halt.go.set()
        for ticket in tickets:
            ticket.result(doubles.PATIENCE_S)
    assert counts.rows("premium") == [1, 4, 4]


def test_no_more_images_share_a_pass_than_allowed(toys: Pair, counts: doubles.Counts) -> None:
    with doubles.running(toys, counts, max_batch=3) as engine:
        engine.submit(doubles.request(seeds=tuple(range(7)), steps=2)).result(doubles.PATIENCE_S)
    assert counts.rows("premium") == [3, 3, 3, 3, 1, 1]
    assert len(counts.waits) == 7


def test_sizes_do_not_share_a_pass(toys: Pair, counts: doubles.Counts) -> None:
    sizes: list[tuple[int, ...]] = []
    with doubles.running(toys, counts) as engine:
        halt = doubles.Halt(unet(toys))
        unet(toys).after = lambda given, made: (sizes.append(tuple(given[0].shape)), made)[1]
        tickets = [engine.submit(doubles.request(steps=1))]
        halt.wait()
        wide = doubles.request(seeds=(1, 2), steps=2, size_px=(32, 16))
        tickets += [engine.submit(wide), engine.submit(doubles.request(steps=2))]
        halt.go.set()
        found = [doubles.images(ticket) for ticket in tickets]
    assert [image.shape for image in found[1]] == [(16, 32, 3)] * 2
    assert sizes == [(1, 4, 8, 8), (2, 4, 8, 16), (1, 4, 8, 8), (2, 4, 8, 16), (1, 4, 8, 8)]


def test_a_turbo_request_does_not_wait_for_a_premium_batch(toys: Pair, counts: doubles.Counts) -> None:
    limits = {"premium": Limits(), "turbo": Limits(weight=4)}
    with doubles.running(toys, counts, limits) as engine:
        halt = doubles.Halt(unet(toys), 10)
        premium = engine.submit(doubles.request(seeds=tuple(range(8)), steps=50))
        halt.wait()
        turbo = engine.submit(doubles.request("turbo", steps=4))
        halt.go.set()
        turbo.result(doubles.PATIENCE_S)
        assert not premium.over
        premium.result(doubles.PATIENCE_S)
    tiers = [tier for tier, *_ in counts.passes]
    assert tiers.index("turbo") == 10  # the pass that was on its way when it came, and no other
    last = len(tiers) - tiers[::-1].index("turbo")
    assert last <= 30  # four of them, and few of the other 40 between
    assert tiers.count("premium") == 50


def test_a_key_s_single_image_passes_another_s_flood(toys: Pair) -> None:
    done: list[str] = []
    with doubles.running(toys, max_batch=1, encode_threads=1) as engine:
        halt = doubles.Halt(unet(toys))
        flood = [engine.submit(doubles.request(key="flood", steps=1, seeds=(seed,))) for seed in range(40)]
        halt.wait()
        single = engine.submit(doubles.request(key="single", steps=1))
        for ticket in (*flood, single):
            ticket.future.add_done_callback(lambda _, ticket=ticket: done.append(ticket.request.key))
        halt.go.set()
        single.result(doubles.PATIENCE_S)
        for ticket in flood:
            ticket.cancel()
    assert done.index("single") == 2  # the one on its way, the next in the queue, then it


# --- cancelling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True])
def test_a_cancelled_request_takes_no_further_step(toys: Pair, counts: doubles.Counts, busy: bool) -> None:
    with doubles.running(toys, counts) as engine:
        halt = doubles.Halt(unet(toys), 3)
        ours = engine.submit(doubles.request(steps=50, seeds=(1, 2)))
        halt.wait()
        other = engine.submit(doubles.request(steps=6)) if busy else None
        ours.cancel()
        ours.cancel()
        with pytest.raises(errors.Cancelled):
            ours.result(0)
        halt.go.set()
        if other:
            other.result(doubles.PATIENCE_S)
        assert engine.drain(doubles.PATIENCE_S)
        doubles.until(lambda: not engine.active("premium"))
    assert counts.rows("premium") == [2, 2, 2] + [1] * (6 if busy else 0)
    assert sum(stage == "decode" for _, stage, _ in counts.stages) == busy  # nothing of it is decoded either


def test_a_request_that_is_cancelled_while_its_prompt_is_read_takes_no_step(toys: Pair) -> None:
    with doubles.running(toys) as engine:
        halt = doubles.Halt(toys["premium"].parts.text)
        ticket = engine.submit(doubles.request())
        halt.wait()
        ticket.cancel()
        halt.go.set()
        assert doubles.images(engine.submit(doubles.request(steps=2)))
    assert unet(toys).calls == 2


def test_a_cancelled_request_leaves_its_place_in_the_queue_at_once(toys: Pair, counts: doubles.Counts) -> None:
    with doubles.running(toys, counts, max_batch=1, max_queued=1) as engine:
        halt = doubles.Halt(unet(toys))
        tickets = [engine.submit(doubles.request())]
        halt.wait()
        waiting = engine.submit(doubles.request(steps=50))
        assert engine.queued("premium") == 1
        with pytest.raises(errors.Busy, match="takes 1"):
            engine.submit(doubles.request())
        waiting.cancel()
        assert engine.queued("premium") == 0  # while the device is still at its pass
        tickets.append(engine.submit(doubles.request()))
        assert engine.queued("premium") == 1
        halt.go.set()
        for ticket in tickets:
            ticket.result(doubles.PATIENCE_S)
    assert counts.rows("premium") == [1] * 6


def test_cancelling_what_is_done_changes_nothing(toys: Pair) -> None:
    with doubles.running(toys) as engine:
        ticket = engine.submit(doubles.request())
        before = ticket.result(doubles.PATIENCE_S)
        ticket.cancel()
        assert ticket.result(0) is before
        assert engine.healthy


# --- admission --------------------------------------------------------------------------------------


def test_what_is_refused_leaves_nothing_behind(toys: Pair) -> None:
    with doubles.running(toys, max_batch=1, max_queued=2) as engine:
        halt = doubles.Halt(unet(toys))
        first = engine.submit(doubles.request())
        halt.wait()
        with pytest.raises(errors.Busy) as caught:
            engine.submit(doubles.request(seeds=(1, 2, 3)))
        assert caught.value.retry_after_s >= 1
        assert engine.queued("premium") == 0 and engine._open == {first}
        both = engine.submit(doubles.request(seeds=(1, 2)))
        halt.go.set()
        assert len(both.result(doubles.PATIENCE_S).files) == 2


def test_a_wait_beyond_the_limit_is_refused_and_the_other_tier_is_not(toys: Pair) -> None:
    limits = {"premium": Limits(max_batch=1, max_wait_s=3), "turbo": Limits()}
    with doubles.running(toys, limits=limits) as engine:
        assert engine.predicted_wait_s("premium") == 0
        halt = doubles.Halt(unet(toys))
        first = engine.submit(doubles.request(steps=100))
        halt.wait()
        engine._schedule.lanes["premium"].estimates.row_s.value = 0.1
        assert engine.predicted_wait_s("premium") == pytest.approx(10, rel=0.1)
        with pytest.raises(errors.Busy, match="would let this wait for 10 s and admits waits of 3 s") as caught:
            engine.submit(doubles.request())
        assert caught.value.retry_after_s in (7, 8)
        quick = engine.submit(doubles.request("turbo"))
        first.cancel()
        halt.go.set()
        quick.result(doubles.PATIENCE_S)


def test_a_started_engine_knows_what_an_image_takes(toys: Pair) -> None:
    with doubles.running(toys) as engine:
        one, ten = (engine.predicted_device_s("premium", steps, guided=False) for steps in (1, 10))
        assert 0 < one < ten < 60
        assert one < engine.predicted_device_s("premium", 1, guided=True) < 60
        took_s = engine.submit(doubles.request(prompt="new", steps=10)).result(doubles.PATIENCE_S).compute.device_s
        assert took_s / 20 < ten < took_s * 20


# --- previews ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "previews", "expected"),
    [(50, 3, {38: 0, 25: 1, 12: 2}), (4, 3, {3: 0, 2: 1, 1: 2}), (2, 1, {1: 0}), (1, 0, {}), (99, 1, {49: 0})],
)
def test_previews_are_spread_evenly(passes: int, previews: int, expected: dict[int, int]) -> None:
    assert preview_steps(passes, previews) == expected


def test_each_preview_has_a_pass_of_its_own_and_none_is_the_result() -> None:
    for passes in range(1, 101):
        for previews in range(min(passes, 4)):
            due = preview_steps(passes, previews)
            assert list(due.values()) == list(range(previews)) and 0 not in due
            assert list(due) == sorted(due, reverse=True) and all(0 < left < passes for left in due)


@pytest.mark.parametrize(("tier", "steps"), [("premium", 4), ("premium", 9), ("turbo", 4)])
def test_previews_come_in_order_and_before_the_result(toys: Pair, tier: str, steps: int) -> None:
    seen: list[tuple[int, int]] = []
    with doubles.running(toys) as engine:
        wanted = doubles.request(tier, seeds=(1, 2, 3), steps=steps, previews=3)
        ticket = engine.submit(wanted, lambda index, number, file: seen.append((index, number)))
        ticket.future.add_done_callback(lambda _: seen.append((-1, -1)))
        ticket.result(doubles.PATIENCE_S)
        assert engine.drain(doubles.PATIENCE_S)
    assert seen[-1] == (-1, -1)
    for index in range(3):
        assert [number for image, number in seen if image == index] == [0, 1, 2]


def test_a_preview_that_is_slow_to_write_is_not_overtaken(toys: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file is held until three others, the result among them, are written."""
    seen: list[int] = []
    written, encode = threading.Semaphore(0), encoding.encode

    def slowly(*given: Any) -> bytes:
        if first.acquire(blocking=False):
            for _ in range(3):
                assert written.acquire(timeout=doubles.PATIENCE_S)
        file = encode(*given)
        written.release()
        return file

    with doubles.running(toys, encode_threads=4) as engine:
        first = threading.Semaphore(1)
        monkeypatch.setattr(encoding, "encode", slowly)
        wanted = doubles.request(steps=4, previews=3)
        ticket = engine.submit(wanted, lambda index, number, file: seen.append(number))
        ticket.result(doubles.PATIENCE_S)
        assert engine.drain(doubles.PATIENCE_S)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(("tier", "steps"), [("premium", 20), ("turbo", 4)])
def test_previews_are_nearer_to_the_image_step_by_step(shapes: Pair, tier: str, steps: int) -> None:
    previews: list[bytes] = []
    with doubles.running(shapes) as engine:
        wanted = doubles.request(tier, prompt="a red circle", seeds=(5,), steps=steps, size_px=(64, 64), previews=3)
        ticket = engine.submit(wanted, lambda index, number, file: previews.append(file))
        (final,) = doubles.images(ticket)
    distances = [float(np.abs(doubles.pixels(one).astype(int) - final).mean()) for one in previews]
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < distances[0] / 1.5 or tier == "turbo"


def test_a_listener_that_raises_fails_its_own_request(toys: Pair) -> None:
    def broken(index: int, number: int, file: bytes) -> None:
        raise ValueError("no")

    with doubles.running(toys) as engine:
        ticket = engine.submit(doubles.request(previews=1), broken)
        with pytest.raises(errors.Failed):
            ticket.result(doubles.PATIENCE_S)
        assert doubles.images(engine.submit(doubles.request(previews=1)))


def test_a_file_says_what_made_it(toys: Pair) -> None:
    with doubles.running(toys) as engine:
        wanted = doubles.request(seeds=(7, 8), about={"prompt": "赤い丸", "tier": "premium"})
        files = engine.submit(wanted).result(doubles.PATIENCE_S).files
    told: list[Any] = [getattr(Image.open(io.BytesIO(file)), "text", None) for file in files]
    assert told == [{"prompt": "赤い丸", "tier": "premium", "seed": seed} for seed in ("7", "8")]


# --- health -----------------------------------------------------------------------------------------


def test_one_request_alone_makes_no_sick_engine(toys: Pair) -> None:
    def broken(call: int, given: Any) -> None:
        raise RuntimeError("device-side assert")

    with doubles.running(toys) as engine:
        unet(toys).before = broken
        with pytest.raises(errors.Failed, match="could not be made"):
            engine.submit(doubles.request(seeds=tuple(range(10)))).result(doubles.PATIENCE_S)
        unet(toys).before = lambda call, given: None
        assert engine.healthy


def test_many_failures_in_a_row_are_a_sick_engine_and_a_success_a_healthy_one(toys: Pair) -> None:
    def broken(call: int, given: Any) -> None:
        raise RuntimeError("device-side assert")

    with doubles.running(toys) as engine:
        unet(toys).before = broken
        for failures in range(8):
            assert engine.healthy, failures
            with pytest.raises(errors.Failed, match="could not be made"):
                engine.submit(doubles.request()).result(doubles.PATIENCE_S)
        assert not engine.healthy
        unet(toys).before = lambda call, given: None
        assert doubles.images(engine.submit(doubles.request()))
        assert engine.healthy
    assert not engine.healthy  # its thread is gone


def test_the_thread_outlives_a_turn_that_raises(toys: Pair) -> None:
    class Broken(doubles.Counts):
        broken = False

        def passed(self, tier: str, rows: int, seconds: float) -> None:
            if self.broken:
                raise ValueError("an observer must not raise")

    counts = Broken()
    with doubles.running(toys, counts) as engine:
        counts.broken = True
        with pytest.raises(errors.Failed):
            engine.submit(doubles.request()).result(doubles.PATIENCE_S)
        assert unet(toys).calls == 1
        counts.broken = False
        assert doubles.images(engine.submit(doubles.request()))


# --- the end ----------------------------------------------------------------------------------------


def test_draining_finishes_what_runs_and_admits_nothing(toys: Pair) -> None:
    with doubles.running(toys, max_batch=1) as engine, concurrent.futures.ThreadPoolExecutor(1) as pool:
        halt = doubles.Halt(unet(toys))
        running, waiting = (engine.submit(doubles.request()) for _ in range(2))
        halt.wait()
        assert not engine.draining
        assert not engine.drain(0)
        draining = pool.submit(engine.drain, doubles.PATIENCE_S)
        with pytest.raises(errors.Draining) as caught:
            engine.submit(doubles.request())
        assert caught.value.retry_after_s > 0
        assert engine.draining and not draining.done()
        halt.go.set()
        assert draining.result()
        assert running.over and waiting.over
        assert doubles.images(running) and doubles.images(waiting)


def test_closing_cancels_what_is_left_and_ends_the_threads(toys: Pair, counts: doubles.Counts) -> None:
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(doubles.running(toys, counts, max_batch=1))
        halt = doubles.Halt(unet(toys), 2)
        running, waiting = (engine.submit(doubles.request(steps=50)) for _ in range(2))
        halt.wait()
        closer = threading.Thread(target=stack.close)
        closer.start()
        for ticket in (running, waiting):
            with pytest.raises(errors.Cancelled):
                ticket.result(doubles.PATIENCE_S)
        with pytest.raises(errors.Draining):
            engine.submit(doubles.request())
        halt.go.set()
        closer.join(doubles.PATIENCE_S)
        assert not closer.is_alive()
    assert counts.rows("premium") == [1, 1]
    assert set(threading.enumerate()) <= before
    engine.close()  # once more


def test_an_engine_that_never_started_closes(toys: Pair) -> None:
    engine = Engine(toys, {tier: Limits() for tier in toys})
    ticket = engine.submit(doubles.request())
    assert not engine.healthy
    engine.close()
    with pytest.raises(errors.Cancelled):
        ticket.result(0)


# --- many at once -----------------------------------------------------------------------------------


def test_eight_threads_are_all_answered(toys: Pair) -> None:
    """200 requests; some are cancelled on their way."""

    def ask(number: int) -> tuple[int, Ticket]:
        tier = "turbo" if number % 2 else "premium"
        ticket = engine.submit(doubles.request(tier, seeds=(number,), steps=1 + number % 3, key=str(number % 5)))
        if number % 10 == 0:
            ticket.cancel()
        return number, ticket

    with (
        doubles.running(toys, max_queued=1000, max_wait_s=1e9) as engine,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        asked = list(pool.map(ask, range(200)))
        outcomes = [ticket.future.exception(doubles.PATIENCE_S) for _, ticket in asked]
        assert all(isinstance(error, errors.Cancelled) for error in outcomes[::10])
        assert all(error is None for number, error in enumerate(outcomes) if number % 10)
        assert engine.drain(doubles.PATIENCE_S)
        assert not engine._open
        assert engine.queued("premium") == engine.queued("turbo") == 0
        doubles.until(lambda: engine.active("premium") == engine.active("turbo") == 0)


def various(rng: random.Random, **changes: Any) -> ImageRequest:
    """A request of either tier, of any kind."""
    tier = rng.choice(["turbo", "premium"])
    seeds = tuple(rng.randrange(2**32) for _ in range(rng.randint(1, 3)))
    wanted: dict[str, Any] = {"prompt": rng.choice(PROMPTS), "seeds": seeds, "steps": rng.randint(1, 4)} | changes
    if tier == "premium" and rng.random() < 0.5:
        wanted |= {"guidance_scale": rng.uniform(1.5, 7), "negative_prompt": rng.choice([None, *PROMPTS])}
    return doubles.request(tier, **wanted)


def test_an_image_is_the_same_in_any_company(toys: Pair) -> None:
    """200 requests of 40 kinds, that come when they like."""
    rng = random.Random(0)
    kinds = [various(rng) for _ in range(40)]
    alone = [doubles.by_pipeline(toys, one) for one in kinds]
    order = [number % 40 for number in range(200)]
    rng.shuffle(order)
    with doubles.running(toys, max_queued=1000, max_wait_s=1e9, max_batch=5) as engine:
        tickets: list[Ticket] = []
        for number, kind in enumerate(order):
            tickets.append(engine.submit(kinds[kind]))
            if rng.random() < 0.1:  # let some of it pass
                tickets[rng.randrange(number + 1)].result(doubles.PATIENCE_S)
        for kind, ticket in zip(order, tickets, strict=True):
            assert doubles.furthest(doubles.images(ticket), alone[kind]) <= 1
    assert doubles.furthest(alone[0][:1], alone[1][:1]) > 3  # else anything would do


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


@pytest.mark.parametrize("prompt_cache_bytes", [0, 1 << 28])
def test_batch_invariant_images_are_the_same_byte_for_byte(shapes: Pair, prompt_cache_bytes: int) -> None:
    rng = random.Random(1)
    kinds = [various(rng, size_px=(64, 64)) for _ in range(6)]
    order = [number % 6 for number in range(18)]
    rng.shuffle(order)
    with running_invariant(shapes, prompt_cache_bytes=0) as engine:
        alone = [engine.submit(one).result(doubles.PATIENCE_S).files for one in kinds]
    with running_invariant(shapes, prompt_cache_bytes=prompt_cache_bytes) as engine:
        tickets = [engine.submit(kinds[kind]) for kind in order]
        for kind, ticket in zip(order, tickets, strict=True):
            assert ticket.result(doubles.PATIENCE_S).files == alone[kind]


def test_so_they_are_with_two_threads(shapes: Pair) -> None:
    """Which no batch of a fixed shape gives: with several threads, the place in the batch changes the last bits."""
    kinds = [
        doubles.request(prompt=prompt, seeds=(seed,), steps=2, size_px=(64, 64)) for seed, prompt in enumerate(PROMPTS)
    ]
    with torch_threads(2), running_invariant(shapes, prompt_cache_bytes=0) as engine:
        alone = [engine.submit(one).result(doubles.PATIENCE_S).files for one in kinds[:2]]
        tickets = [engine.submit(one) for one in reversed(kinds[:3])]
        assert [ticket.result(doubles.PATIENCE_S).files for ticket in tickets[:0:-1]] == alone


def running_invariant(shapes: Pair, **options: Any) -> contextlib.AbstractContextManager[Engine]:
    return doubles.running(shapes, batch_invariant=True, max_queued=1000, max_wait_s=1e9, max_batch=5, **options)


def test_a_turn_that_fails_after_the_last_step_leaves_nobody_waiting(
    toys: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(images: torch.Tensor) -> None:
        raise RuntimeError("no pixels today")

    with doubles.running(toys) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(sampling, "to_uint8", broken)
            with pytest.raises(errors.Failed, match="could not be made"):
                engine.submit(doubles.request()).result(doubles.PATIENCE_S)
        assert doubles.images(engine.submit(doubles.request()))
