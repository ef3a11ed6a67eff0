"""The noise schedule against closed forms and against diffusers' own schedulers."""

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_kd import errors, schedule
from diffusion_kd.schedule import NoiseSchedule

SDXL = diffusers.DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing"
)
ZERO_TERMINAL = diffusers.DDIMScheduler.from_config(
    SDXL.config, rescale_betas_zero_snr=True, prediction_type="v_prediction"
)


@pytest.fixture(params=[SDXL, ZERO_TERMINAL], ids=["sdxl", "zero_terminal"])
def scheduler(request: pytest.FixtureRequest) -> diffusers.DDIMScheduler:
    return request.param


def latents(seed: int, count: int = 4) -> torch.Tensor:
    return torch.randn((count, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def test_sdxl_tables_have_the_published_values() -> None:
    table = NoiseSchedule.from_scheduler(SDXL)
    for timestep, alpha, sigma in (
        (249, 0.8218, 0.5697),
        (499, 0.5269, 0.8499),
        (749, 0.2380, 0.9713),
        (999, 0.0683, 0.9977),
    ):
        assert table.alphas[timestep].item() == pytest.approx(alpha, abs=5e-5)
        assert table.sigmas[timestep].item() == pytest.approx(sigma, abs=5e-5)


def test_tables_are_float64_and_agree_with_diffusers(scheduler: diffusers.DDIMScheduler) -> None:
    table = NoiseSchedule.from_scheduler(scheduler)
    assert table.alphas.dtype == torch.float64
    assert torch.allclose(table.alphas**2, scheduler.alphas_cumprod.double(), atol=1e-5)


def test_variance_is_preserved(scheduler: diffusers.DDIMScheduler) -> None:
    table = NoiseSchedule.from_scheduler(scheduler)
    assert torch.allclose(table.alphas**2 + table.sigmas**2, torch.ones(1000, dtype=torch.float64), atol=1e-15)


def test_only_rescaled_betas_end_without_signal() -> None:
    assert not NoiseSchedule.from_scheduler(SDXL).zero_terminal_signal
    assert NoiseSchedule.from_scheduler(ZERO_TERMINAL).zero_terminal_signal


@given(st.integers(0, 998), st.integers(0, 2**32 - 1))
def test_x0_survives_every_prediction_type(timestep: int, seed: int) -> None:
    for scheduler in (SDXL, ZERO_TERMINAL):
        table = NoiseSchedule.from_scheduler(scheduler)
        x0, noise, when = latents(seed), latents(seed + 1), torch.full((4,), timestep)
        x_t = table.add_noise(x0, noise, when)
        alpha = table.at(when)[0].min().item()
        for prediction, kind in ((noise, "epsilon"), (table.velocity(x0, noise, when), "v_prediction"), (x0, "sample")):
            restored = table.x0_from(prediction, x_t, when, kind)  # type: ignore[arg-type]
            tolerance = 1e-5 if kind != "epsilon" else 3e-6 / alpha + 1e-5
            assert torch.allclose(restored, x0, atol=tolerance)
        if timestep > 0:
            assert torch.allclose(table.noise_from(x0, x_t, when), noise, atol=1e-3)


def test_noising_and_velocity_agree_with_diffusers(scheduler: diffusers.DDIMScheduler) -> None:
    table, when = NoiseSchedule.from_scheduler(scheduler), torch.tensor([0, 249, 700, 999])
    x0, noise = latents(0), latents(1)
    assert torch.allclose(table.add_noise(x0, noise, when), scheduler.add_noise(x0, noise, when), atol=1e-5)
    assert torch.allclose(table.velocity(x0, noise, when), scheduler.get_velocity(x0, noise, when), atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x0_agrees_with_diffusers(kind: str) -> None:
    sampler = diffusers.DDIMScheduler.from_config(SDXL.config, prediction_type=kind)
    sampler.set_timesteps(4)
    table, x_t, prediction = NoiseSchedule.from_scheduler(SDXL), latents(0, 1), latents(1, 1)
    for timestep in (249, 499, 749, 999):
        theirs = sampler.step(prediction, timestep, x_t).pred_original_sample
        ours = table.x0_from(prediction, x_t, torch.tensor([timestep]), kind)  # type: ignore[arg-type]
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-5)


def test_pure_noise_at_the_end_shows_nothing_of_the_image() -> None:
    table, when = NoiseSchedule.from_scheduler(SDXL), torch.tensor([998, 999])
    x0, noise = latents(0, 2), latents(1, 2)
    x_t = table.add_noise(x0, noise, when, pure_noise_at_end=True)
    assert torch.equal(x_t[1], noise[1])
    assert not torch.allclose(x_t[0], noise[0], atol=1e-2)


def test_at_the_end_the_x0_formula_keeps_the_finite_alpha() -> None:
    """The trap: betas rescaled to zero terminal signal divide an epsilon network's x0 by zero."""
    when, prediction, x_t = torch.tensor([999]), latents(0, 1), latents(1, 1)
    assert NoiseSchedule.from_scheduler(SDXL).x0_from(prediction, x_t, when, "epsilon").isfinite().all()
    assert NoiseSchedule.from_scheduler(ZERO_TERMINAL).x0_from(prediction, x_t, when, "v_prediction").isfinite().all()
    with pytest.raises(errors.ModelError, match="zero terminal signal"):
        NoiseSchedule.from_scheduler(ZERO_TERMINAL).x0_from(prediction, x_t, when, "epsilon")


def test_low_precision_predictions_are_converted_in_float32() -> None:
    table, when = NoiseSchedule.from_scheduler(SDXL), torch.tensor([999])
    prediction, x_t = latents(0, 1).half(), latents(1, 1).half()
    assert table.x0_from(prediction, x_t, when, "epsilon").dtype == torch.float32


@pytest.mark.parametrize(("steps", "expected"), [(1, (999,)), (2, (499, 999)), (4, (249, 499, 749, 999))])
def test_student_timesteps_are_those_of_trailing_spacing(steps: int, expected: tuple[int, ...]) -> None:
    assert schedule.student_timesteps(steps) == expected
    SDXL.set_timesteps(steps)
    assert tuple(SDXL.timesteps.tolist()) == expected[::-1]


@pytest.mark.parametrize("steps", [0, 3, 5, -1])
def test_other_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(errors.ConfigError, match=f"not {steps}"):
        schedule.student_timesteps(steps)


def test_unknown_betas_are_refused() -> None:
    cosine = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    with pytest.raises(errors.ModelError, match="squaredcos_cap_v2"):
        NoiseSchedule.from_scheduler(cosine)
