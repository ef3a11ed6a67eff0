"""An image of the engine is the image of the library's own pipelines."""

from typing import Any

import diffusers
import pytest
import torch

from diffusion_kd.denoiser import Denoiser
from diffusion_kd.schedule import NoiseSchedule
from serve.engine import models
from serve.engine.trajectory import FewStepTrajectory, TeacherTrajectory
from tests import toys
from tests.serve.engine import doubles

pytestmark = pytest.mark.filterwarnings(doubles.NUMPY_2)
SCHEDULERS = ("DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "HeunDiscrete")
SHAPE = (1, toys.LATENT_CHANNELS, toys.LATENT_SIZE, toys.LATENT_SIZE)
CPU = torch.device("cpu")


def scheduler(name: str, kind: str = "epsilon") -> Any:
    """By its name in diffusers, on the betas of the toy."""
    config = toys.tiny_parts(kind).scheduler.config
    return getattr(diffusers, f"{name}Scheduler").from_config(config)


def denoiser(kind: Any = "epsilon") -> Denoiser:
    return Denoiser(torch.nn.Identity(), NoiseSchedule.from_scheduler(scheduler("DDIM", kind)), kind)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_teacher_s_image_is_its_pipeline_s(name: str, kind: str) -> None:
    ours = doubles.toy_models(scheduler(name, kind))
    wanted = [
        doubles.request(seeds=(3, 4), steps=7),
        doubles.request(prompt="a blue star", seeds=(5,), steps=4, guidance_scale=6.0),
        doubles.request(seeds=(2**32 - 1,), steps=6, guidance_scale=3.0, negative_prompt="a green ring"),
    ]
    with doubles.running(ours) as engine:
        tickets = [engine.submit(one) for one in wanted]
        for one, ticket in zip(wanted, tickets, strict=True):
            assert doubles.furthest(doubles.images(ticket), doubles.by_pipeline(ours, one)) <= 1


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_student_s_image_is_its_pipeline_s(steps: int) -> None:
    ours, wanted = doubles.toy_models(), doubles.request("turbo", seeds=(3, 4, 9), steps=steps)
    with doubles.running(ours) as engine:
        assert doubles.furthest(doubles.images(engine.submit(wanted)), doubles.by_pipeline(ours, wanted)) <= 1


def test_the_shipped_models_make_what_their_pipelines_make() -> None:
    ours = models.load_pair("shapes-teacher", "shapes-student", device="cpu", precision="fp32")
    few, many, guided = (
        doubles.request("turbo", prompt="a red circle", seeds=(1, 2), steps=2, size_px=(64, 64)),
        doubles.request(prompt="a blue star", seeds=(3,), steps=5, size_px=(64, 64)),
        doubles.request(
            prompt="a red circle", seeds=(1,), steps=4, size_px=(64, 64), guidance_scale=3.0, negative_prompt="a star"
        ),
    )
    with doubles.running(ours) as engine:
        tickets = [engine.submit(one) for one in (few, many, guided)]
        for one, ticket in zip((few, many, guided), tickets, strict=True):
            assert doubles.furthest(doubles.images(ticket), doubles.by_pipeline(ours, one)) <= 1


def test_a_negative_prompt_and_guidance_change_the_image() -> None:
    """Else the comparisons above would not see them."""
    with doubles.running(doubles.toy_models()) as engine:
        plain, guided, negative = (
            doubles.images(engine.submit(doubles.request(steps=4, **changes)))
            for changes in ({}, {"guidance_scale": 6.0}, {"guidance_scale": 6.0, "negative_prompt": "a green ring"})
        )
    assert doubles.furthest(plain, guided) > 3
    assert doubles.furthest(guided, negative) > 3


# --- trajectories by themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_is_in_use_is_not_shared(name: str) -> None:
    """Two images of one scheduler, in steps that interleave, are what each is alone."""
    shared = scheduler(name)

    def walk(seed: int, steps: int) -> TeacherTrajectory:
        return TeacherTrajectory(denoiser(), shared, steps, SHAPE, seed, CPU)

    def finish(one: TeacherTrajectory) -> torch.Tensor:
        while one.remaining:
            one.advance(0.5 * one.network_input())
        return one.x_t

    alone = [finish(walk(1, 5)), finish(walk(2, 9))]
    first, second = walk(1, 5), walk(2, 9)
    while first.remaining or second.remaining:
        for one in (first, second):
            if one.remaining:
                one.advance(0.5 * one.network_input())
    assert torch.equal(first.x_t, alone[0]) and torch.equal(second.x_t, alone[1])
    assert shared.timesteps.tolist() == scheduler(name).timesteps.tolist()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_clean_estimate_of_a_perfect_network_is_x0(name: str) -> None:
    """A network that knows x0 and says the noise for it: the estimate is x0 at each step, whatever a scheduler calls
    x_t."""
    x0 = torch.full(SHAPE, 0.5)
    one = TeacherTrajectory(denoiser(), scheduler(name), 8, SHAPE, 0, CPU)
    while one.remaining:
        at = one.timestep.round().long()
        eps = one._denoiser.schedule.noise_from(x0, one.network_input(), at)
        assert torch.allclose(one.x0_hat(eps), x0, atol=1e-3)
        one.advance(eps)
    assert torch.allclose(one.x_t, x0, atol=0.1)


def test_a_student_s_steps_are_x0_hat_sent_through_fresh_noise() -> None:
    kind = "sample"
    one = FewStepTrajectory(denoiser(kind), [999, 499], SHAPE, 7, CPU)
    generator = torch.Generator().manual_seed(7)
    first, second = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    assert torch.equal(one.x_t, first) and one.remaining == 2 and one.timestep.tolist() == [999]
    x0 = torch.full(SHAPE, 0.25)
    one.advance(x0)
    assert one.remaining == 1 and one.timestep.tolist() == [499]
    assert torch.allclose(one.x_t, one._denoiser.schedule.add_noise(x0, second, torch.tensor([499])))
    one.advance(x0)
    assert one.remaining == 0 and torch.equal(one.x_t, x0)
