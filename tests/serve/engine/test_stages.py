"""What the device does for a batch: prompts, passes and decoding, where memory ends and where numbers do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from serve.engine import encoding, errors, lanes, trajectory
from serve.engine.lanes import Limits
from tests.serve.engine import doubles

Network = doubles.Network
LONG = tuple(range(8))
"""Seeds of a request that fills a batch."""


def out_of_memory_above(most_rows: int) -> Callable[[int, Any], None]:
    """Of a network whose batches are that large at most; text encoders are given lists."""

    def before(call: int, given: Any) -> None:
        if len(given[0]) > most_rows:
            raise torch.OutOfMemoryError(f"{len(given[0])} rows, {most_rows} fit")

    return before


def error_for(prompt: str, models: Any) -> Callable[[int, Any], None]:
    """Of a U-Net that cannot bear one prompt."""
    find = doubles.rows_of(models, prompt)

    def before(call: int, given: Any) -> None:
        if bool(find(given).any()):
            raise ValueError("not this prompt")

    return before


def nan_for(prompt: str, models: Any) -> Callable[[Any, Any], Any]:
    """Of a U-Net that makes NaN of one prompt."""
    find = doubles.rows_of(models, prompt)

    def after(given: Any, made: Any) -> Any:
        spoilt = made[0].clone()
        spoilt[find(given)] = torch.nan
        return (spoilt,)

    return after


# --- out of memory ----------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    models, counts = doubles.toy_models(), doubles.Counts()
    with doubles.running(models, counts) as engine:
        unet: Any = models["premium"].parts.unet
        unet.before = out_of_memory_above(3)
        wanted = doubles.request(seeds=LONG, steps=5)
        assert doubles.furthest(doubles.images(engine.submit(wanted)), doubles.by_pipeline(models, wanted)) <= 1
        # 8 rows, then 4, then 2 at a time; later passes do not try again what did not fit.
        assert counts.out_of_memory == ["premium"] * 2
        assert engine._schedule.lanes["premium"].fits == 2
        assert engine._schedule.lanes["turbo"].fits == 8
        assert engine.healthy


def test_a_shrunken_batch_grows_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_PASSES_BEFORE_GROWTH", 10)
    models, counts = doubles.toy_models(), doubles.Counts()
    with doubles.running(models, counts) as engine:
        unet: Any = models["premium"].parts.unet
        unet.before = out_of_memory_above(4)
        engine.submit(doubles.request(seeds=LONG, steps=2)).result(doubles.PATIENCE_S)
        assert engine._schedule.lanes["premium"].fits == 4
        unet.before = lambda call, given: None
        engine.submit(doubles.request(steps=30)).result(doubles.PATIENCE_S)
        assert engine._schedule.lanes["premium"].fits == 8
        counts.clear()
        engine.submit(doubles.request(seeds=LONG, steps=2)).result(doubles.PATIENCE_S)
        assert counts.rows("premium") == [8, 8]


@pytest.mark.parametrize("part", ["text", "vae"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_so_are_batches_of_prompts_and_of_latents(part: str, guidance_scale: float) -> None:
    models, counts = doubles.toy_models(), doubles.Counts()
    prompts = ["a red circle", "a blue star", "a green ring", "a pink cross"]
    wanted = [
        doubles.request(prompt=prompt, guidance_scale=guidance_scale, negative_prompt=f"no {prompt}", previews=1)
        for prompt in prompts
    ]
    halt = doubles.Halt(models["premium"].parts.unet, 5)
    with doubles.running(models, counts) as engine:
        first = engine.submit(doubles.request(steps=6))
        halt.wait()
        network: Any = getattr(models["premium"].parts, part)
        network.before = out_of_memory_above(1)
        tickets = [engine.submit(one) for one in wanted]
        halt.go.set()
        for one, ticket in zip(wanted, tickets, strict=True):
            assert doubles.furthest(doubles.images(ticket), doubles.by_pipeline(models, one)) <= 1
        first.result(doubles.PATIENCE_S)
        assert counts.out_of_memory
        assert engine.healthy


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("can't allocate memory")])
def test_one_image_that_does_not_fit_fails_alone(problem: Exception) -> None:
    models = doubles.toy_models()
    with doubles.running(models) as engine:
        unet: Any = models["premium"].parts.unet

        def before(call: int, given: Any) -> None:
            if given[0].shape[-1] > 8:
                raise problem

        unet.before = before
        small = doubles.request(seeds=(1, 2), steps=6)
        tickets = [engine.submit(one) for one in (small, doubles.request(size_px=(32, 32)), small)]
        with pytest.raises(errors.OutOfMemory, match="not even one image"):
            tickets[1].result(doubles.PATIENCE_S)
        for ticket in (tickets[0], tickets[2], engine.submit(small)):
            assert doubles.furthest(doubles.images(ticket), doubles.by_pipeline(models, small)) <= 1


# --- what fails alone -------------------------------------------------------------------------------


def fails_alone(models: Any, engine: Any, poison: Any, kind: type[errors.Failed], halt: doubles.Halt) -> None:
    """`poison` fails with `kind`; the requests beside it, in the same passes, are right, as are those after it."""
    good = [doubles.request(seeds=(1, 2), steps=4), doubles.request(prompt="a blue star", steps=4, guidance_scale=3.0)]
    first = engine.submit(doubles.request(steps=2))
    halt.wait()
    tickets = [engine.submit(one) for one in (good[0], poison, good[1])]
    halt.go.set()
    with pytest.raises(errors.Failed) as caught:
        tickets[1].result(doubles.PATIENCE_S)
    assert type(caught.value) is kind
    for one, ticket in zip(good, (tickets[0], tickets[2]), strict=True):
        assert doubles.furthest(doubles.images(ticket), doubles.by_pipeline(models, one)) <= 1
    first.result(doubles.PATIENCE_S)
    assert doubles.images(engine.submit(good[0]))
    assert engine.healthy


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_an_image_of_nan_fails_alone(guidance_scale: float) -> None:
    models, poison = doubles.toy_models(), "a green ring"
    with doubles.running(models) as engine:
        halt = doubles.Halt(models["premium"].parts.unet)
        unet: Any = models["premium"].parts.unet
        unet.after = nan_for(poison, models)
        wanted = doubles.request(prompt=poison, steps=4, guidance_scale=guidance_scale)
        fails_alone(models, engine, wanted, errors.NotFinite, halt)


def test_an_image_that_raises_in_the_network_fails_alone() -> None:
    models, poison = doubles.toy_models(), "a green ring"
    with doubles.running(models) as engine:
        unet: Any = models["premium"].parts.unet
        halt = doubles.Halt(unet)
        both, raises = unet.before, error_for(poison, models)
        unet.before = lambda call, given: (both(call, given), raises(call, given))
        fails_alone(models, engine, doubles.request(prompt=poison, steps=4), errors.Failed, halt)


def test_a_prompt_that_cannot_be_read_fails_alone() -> None:
    models, poison = doubles.toy_models(), "a green ring"
    with doubles.running(models) as engine:
        text: Any = models["premium"].parts.text

        def before(call: int, given: Any) -> None:
            if poison in given[0]:
                raise ValueError("not this prompt")

        text.before = before
        halt = doubles.Halt(models["premium"].parts.unet)
        fails_alone(models, engine, doubles.request(prompt=poison, steps=4), errors.Failed, halt)


def test_all_who_asked_for_an_unreadable_prompt_are_told() -> None:
    models = doubles.toy_models()
    with doubles.running(models) as engine:
        halt = doubles.Halt(models["premium"].parts.unet)
        first = engine.submit(doubles.request(steps=2))
        halt.wait()
        text: Any = models["premium"].parts.text
        text.before = out_of_memory_above(0)
        tickets = [engine.submit(doubles.request(prompt="a green ring")) for _ in range(3)]
        halt.go.set()
        told = [ticket.future.exception(doubles.PATIENCE_S) for ticket in tickets]
        assert isinstance(told[0], errors.OutOfMemory)
        assert [str(error) for error in told[1:]] == ["the prompt could not be read"] * 2
        first.result(doubles.PATIENCE_S)


def test_a_step_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = trajectory.TeacherTrajectory.advance

    def raising(self: trajectory.TeacherTrajectory, prediction: torch.Tensor) -> None:
        if len(self._scheduler.timesteps) == 5:
            raise ValueError("not in five steps")
        advance(self, prediction)

    monkeypatch.setattr(trajectory.TeacherTrajectory, "advance", raising)
    models = doubles.toy_models()
    with doubles.running(models) as engine:
        halt = doubles.Halt(models["premium"].parts.unet)
        fails_alone(models, engine, doubles.request(steps=5), errors.Failed, halt)


def test_an_image_that_cannot_begin_fails_alone() -> None:
    """Latents of a size that there is not."""
    models = doubles.toy_models()
    with doubles.running(models) as engine:
        halt = doubles.Halt(models["premium"].parts.unet)
        fails_alone(models, engine, doubles.request(steps=4, size_px=(16, -16)), errors.Failed, halt)


def test_a_file_that_cannot_be_written_fails_alone() -> None:
    models = doubles.toy_models()
    with doubles.running(models) as engine:
        halt = doubles.Halt(models["premium"].parts.unet)
        wanted = doubles.request(steps=4, encoding=encoding.Encoding("jpeg"), about={"what": object()})
        fails_alone(models, engine, wanted, errors.Failed, halt)


# --- prompts ----------------------------------------------------------------------------------------


def test_a_prompt_is_read_once_and_then_costs_nothing() -> None:
    models, counts = doubles.toy_models(), doubles.Counts()
    with doubles.running(models, counts) as engine:
        wanted = doubles.request(seeds=(1, 2, 3), guidance_scale=2.0, negative_prompt="a star")
        first = engine.submit(wanted).result(doubles.PATIENCE_S)
        assert counts.hits == [False] * 6
        again = engine.submit(wanted).result(doubles.PATIENCE_S)
        assert counts.hits[6:] == [True] * 6
        text: Any = models["premium"].parts.text
        assert text.calls == 1
        assert first.compute.text_s > 0 and again.compute.text_s == 0
        # The other tier has the same text encoder.
        turbo = engine.submit(doubles.request("turbo")).result(doubles.PATIENCE_S)
        assert text.calls == 1 and turbo.compute.text_s == 0
        engine.submit(doubles.request(size_px=(32, 16))).result(doubles.PATIENCE_S)
        assert text.calls == 2


def test_without_a_cache_each_batch_reads_its_prompts() -> None:
    models = doubles.toy_models()
    with doubles.running(models, prompt_cache_bytes=0) as engine:
        for _ in range(2):
            assert engine.submit(doubles.request(seeds=(1, 2))).result(doubles.PATIENCE_S).compute.text_s > 0
        text: Any = models["premium"].parts.text
        assert text.calls == 2


# --- the same bytes in any company ------------------------------------------------------------------


def test_images_that_must_not_vary_share_no_call_of_a_network() -> None:
    models, counts = doubles.toy_models(), doubles.Counts()
    sizes: dict[str, set[int]] = {"unet": set(), "vae": set(), "text": set()}
    with doubles.running(models, counts, batch_invariant=True) as engine:
        for name, seen in sizes.items():
            network: Any = getattr(models["premium"].parts, name)
            network.before = lambda call, given, seen=seen: seen.add(len(given[0]))
        wanted = doubles.request(seeds=LONG, guidance_scale=3.0, negative_prompt="a star", previews=1)
        assert doubles.furthest(doubles.images(engine.submit(wanted)), doubles.by_pipeline(models, wanted)) <= 1
    assert sizes == {"unet": {2}, "vae": {1}, "text": {1}}  # guidance has two rows
    assert counts.rows("premium") == [16] * 3  # they share turns


def test_a_prompt_that_was_read_in_company_is_not_used_where_it_must_not_vary() -> None:
    models = doubles.toy_models()
    limits = {"premium": Limits(batch_invariant=True), "turbo": Limits()}
    text: Any = models["premium"].parts.text
    with doubles.running(models, limits=limits) as engine:
        for tier in ("turbo", "premium", "premium", "turbo"):
            engine.submit(doubles.request(tier)).result(doubles.PATIENCE_S)
        assert text.calls == 2


# --- costs ------------------------------------------------------------------------------------------


def test_what_the_requests_pay_for_is_what_the_device_did() -> None:
    models, counts = doubles.toy_models(), doubles.Counts()
    with doubles.running(models, counts, max_batch=3) as engine:
        tickets = [
            engine.submit(
                doubles.request(
                    tier,
                    prompt=prompt,
                    seeds=seeds,
                    guidance_scale=scale,
                    previews=previews,
                    negative_prompt=f"no {prompt}",
                )
            )
            for tier, scale, previews in (("premium", 4.0, 2), ("premium", 1.0, 0), ("turbo", 1.0, 0))
            for prompt in ("a red circle", "a blue star")
            for seeds in ((1,), (2, 3))
        ]
        paid = [ticket.result(doubles.PATIENCE_S).compute for ticket in tickets]
    assert sum(one.device_s for one in paid) == pytest.approx(counts.device_s(), rel=1e-9)
    assert sum(one.encode_s for one in paid) == pytest.approx(
        sum(seconds for _, stage, seconds in counts.stages if stage == "encode"), rel=1e-9
    )
    assert all(one.denoise_s > 0 and one.decode_s > 0 and one.encode_s > 0 and one.queue_s > 0 for one in paid)


def test_guidance_pays_for_two_rows() -> None:
    models = doubles.toy_models()
    with doubles.running(models) as engine:
        halt = doubles.Halt(models["turbo"].parts.unet)
        engine.submit(doubles.request("turbo"))  # both begin together after it
        halt.wait()
        plain, guided = (engine.submit(doubles.request(guidance_scale=scale)) for scale in (1.0, 4.0))
        halt.go.set()
        costs = [ticket.result(doubles.PATIENCE_S).compute for ticket in (plain, guided)]
    assert costs[1].denoise_s == pytest.approx(2 * costs[0].denoise_s)
