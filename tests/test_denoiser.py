"""The denoiser reads any prediction type, and guidance is what its formula says."""

import pytest
import torch
from torch import Tensor, nn

from diffusion_kd.denoiser import Denoiser
from diffusion_kd.schedule import NoiseSchedule
from diffusion_kd.shapes import model
from diffusion_kd.types import Conditioning, PredictionType
from tests.toys import tiny_parts


class Oracle(nn.Module):
    """A U-Net that knows the answer, in the prediction type asked for."""

    dtype = torch.float32

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *inputs: object, **options: object) -> tuple[Tensor]:
        return (self.answer,)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_gives_x0(kind: PredictionType) -> None:
    schedule = NoiseSchedule.from_scheduler(model.build_noise_scheduler("epsilon"))
    x0, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([20, 499, 999])
    answers = {"epsilon": noise, "v_prediction": schedule.velocity(x0, noise, timesteps), "sample": x0}
    denoiser = Denoiser(Oracle(answers[kind]), schedule, kind)  # type: ignore[arg-type]
    cond = Conditioning(torch.zeros(3, 4, 8), torch.zeros(3, 8), torch.zeros(3, 6))
    restored = denoiser(schedule.add_noise(x0, noise, timesteps), timesteps, cond)
    assert torch.allclose(restored, x0, atol=1e-4)


def guided_pair() -> tuple[Denoiser, Tensor, Tensor, Conditioning, Conditioning]:
    parts = tiny_parts()
    cond, uncond = (parts.text.encode([text] * 2, (16, 16)) for text in ("a red circle", ""))
    return parts.denoiser(), torch.randn(2, 4, 8, 8), torch.tensor([300, 800]), cond, uncond


def test_guidance_of_one_is_no_guidance() -> None:
    denoiser, x_t, timesteps, cond, uncond = guided_pair()
    plain = denoiser(x_t, timesteps, cond)
    assert torch.equal(denoiser.guided(x_t, timesteps, cond, uncond, 1), plain)
    drawn = denoiser.guided(x_t, timesteps, cond, uncond, torch.ones(2))
    assert torch.allclose(drawn, plain, atol=1e-5)


def test_guidance_extrapolates_for_each_example() -> None:
    denoiser, x_t, timesteps, cond, uncond = guided_pair()
    with_text, without = denoiser(x_t, timesteps, cond), denoiser(x_t, timesteps, uncond)
    assert not torch.allclose(with_text, without, atol=1e-3)
    weights = torch.tensor([0.0, 3.0])
    guided = denoiser.guided(x_t, timesteps, cond, uncond, weights)
    assert torch.allclose(guided[0], without[0], atol=1e-5)
    assert torch.allclose(guided[1], without[1] + 3 * (with_text[1] - without[1]), atol=1e-5)


def test_guiding_x0_is_guiding_the_prediction() -> None:
    """What samplers do to the raw prediction, the denoiser does to x0."""
    denoiser, x_t, timesteps, cond, uncond = guided_pair()
    raw = [
        denoiser.unet(
            x_t, timesteps, c.prompt_embeds, added_cond_kwargs={"text_embeds": c.pooled, "time_ids": c.time_ids}
        ).sample
        for c in (uncond, cond)
    ]
    expected = denoiser.schedule.x0_from(raw[0] + 5 * (raw[1] - raw[0]), x_t, timesteps, "v_prediction")
    assert torch.allclose(denoiser.guided(x_t, timesteps, cond, uncond, 5.0), expected, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_endpoint_is_that_of_diffusers_ddim(guidance_scale: float) -> None:
    denoiser, x_t, _, cond, uncond = guided_pair()
    scheduler, schedule = model.build_noise_scheduler("v_prediction"), denoiser.schedule
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    theirs, half_way = x_t, x_t
    for timestep in scheduler.timesteps:
        half_way = theirs if timestep == 499 else half_way
        now = torch.full((2,), int(timestep))
        x0 = denoiser.guided(theirs, now, cond, uncond, guidance_scale)
        velocity = schedule.velocity(x0, schedule.noise_from(x0, theirs, now), now)
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
    ends = denoiser.endpoint(x_t, torch.tensor([999, 999]), cond, uncond, guidance_scale, steps=4)
    assert torch.allclose(ends, theirs, atol=1e-4)
    # Each example starts at its own timestep.
    mixed = torch.stack([x_t[0], half_way[1]])
    ends = denoiser.endpoint(mixed, torch.tensor([999, 499]), cond, uncond, guidance_scale, steps=4)
    assert torch.allclose(ends, theirs, atol=1e-4)
    assert not ends.requires_grad
