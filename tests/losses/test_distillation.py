"""Closed-form values and gradients of score distillation."""

import pytest
import torch

from diffusion_kd.losses import distillation
from diffusion_kd.schedule import NoiseSchedule
from diffusion_kd.shapes import model

SCHEDULE = NoiseSchedule.from_scheduler(model.build_noise_scheduler("epsilon"))


def test_weightings_have_the_papers_values() -> None:
    alpha, sigma = SCHEDULE.at(torch.tensor([0, 999]))
    assert torch.equal(distillation.weight("exp", alpha, sigma), alpha)
    for kind in ("sds", "nfsd"):
        first, last = distillation.weight(kind, alpha, sigma).flatten().tolist()  # type: ignore[arg-type]
        assert first == pytest.approx(17.1, abs=0.05)
        assert last == pytest.approx(0.034, abs=5e-4)


def test_loss_is_weighted_and_its_gradient_reaches_the_student_alone() -> None:
    student, target = torch.zeros(2, 1, 2, 2, requires_grad=True), torch.ones(2, 1, 2, 2, requires_grad=True)
    loss = distillation.distillation_loss(student, target, torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx(2.0)
    loss.backward()
    assert target.grad is None and student.grad is not None
    assert student.grad[1, 0, 0, 0] == pytest.approx(3 * student.grad[0, 0, 0, 0].item())


def test_sds_weighting_gives_the_gradient_of_score_distillation() -> None:
    """With c = alpha / (2 sigma) the gradient with respect to x0 is eps_hat - noise (up to the mean over elements)."""
    timesteps = torch.tensor([600])
    alpha, sigma = SCHEDULE.at(timesteps)
    student_x0 = torch.randn(1, 4, 8, 8, requires_grad=True)
    noise, eps_hat = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    x_t = SCHEDULE.add_noise(student_x0.detach(), noise, timesteps)
    target = SCHEDULE.x0_from(eps_hat, x_t, timesteps, "epsilon")
    distillation.distillation_loss(student_x0, target, distillation.weight("sds", alpha, sigma)).backward()
    assert student_x0.grad is not None
    assert torch.allclose(student_x0.grad * student_x0.numel(), eps_hat - noise, atol=1e-4)


@pytest.mark.parametrize("timestep", [150, 199, 200, 700])
def test_nfsd_target_is_the_published_direction(timestep: int) -> None:
    """Against the formula in eps: x0 - sigma/alpha * (delta_D + 7.5 * delta_C)."""
    when = torch.tensor([timestep])
    alpha, sigma = SCHEDULE.at(when)
    student_x0, noise, cond, uncond, negative = (torch.randn(1, 4, 8, 8) for _ in range(5))
    x_t = SCHEDULE.add_noise(student_x0, noise, when)
    eps_cond, eps_uncond, eps_negative = (SCHEDULE.noise_from(x0, x_t, when) for x0 in (cond, uncond, negative))
    delta_d = eps_uncond if timestep < 200 else eps_uncond - eps_negative
    expected = student_x0 - sigma / alpha * (delta_d + 7.5 * (eps_cond - eps_uncond))
    target = distillation.nfsd_target(student_x0, cond, uncond, negative, x_t, when, SCHEDULE)
    assert torch.allclose(target, expected, atol=1e-3)


def test_nfsd_target_is_detached() -> None:
    student_x0 = torch.randn(1, 4, 8, 8, requires_grad=True)
    others = [torch.randn(1, 4, 8, 8) for _ in range(4)]
    target = distillation.nfsd_target(student_x0, *others, torch.tensor([500]), SCHEDULE)
    assert not target.requires_grad
