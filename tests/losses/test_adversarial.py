"""Closed-form values of the adversarial losses."""

import pytest
import torch

from diffusion_kd.losses import adversarial


def test_hinge_of_the_discriminator() -> None:
    real, fake = (
        [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5]])],
        [torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0]])],
    )
    # real: (0 + 1) / 2 + 0.5; fake: (0 + 1) / 2 + 2
    assert adversarial.hinge_discriminator_loss(real, fake).item() == pytest.approx(1.0 + 2.5)


def test_a_discriminator_that_cannot_tell_loses_two_per_head() -> None:
    undecided = [torch.zeros(3, 5), torch.zeros(3, 2)]
    assert adversarial.hinge_discriminator_loss(undecided, undecided).item() == pytest.approx(4.0)


def test_the_generator_wants_every_head_up() -> None:
    logits = [torch.tensor([[1.0, 3.0]]), torch.tensor([[-1.0]])]
    assert adversarial.generator_loss(logits).item() == pytest.approx(-(2.0 - 1.0))


def test_r1_is_the_squared_gradient_at_the_input_features() -> None:
    """A linear head of mean judgement w . f has gradient w, whatever its weights' own gradient would be."""
    weight = torch.tensor([3.0, -4.0], requires_grad=True)
    features = torch.randn(5, 2, requires_grad=True)
    logits = (features @ weight)[:, None]
    penalty = adversarial.r1_penalty([logits], [features])
    assert penalty.item() == pytest.approx(25.0)
    penalty.backward()
    assert weight.grad is not None and torch.allclose(weight.grad, 2 * weight.detach())


def test_r1_does_not_depend_on_the_batch_size_and_sums_over_heads() -> None:
    weight = torch.tensor([1.0, 2.0])
    features = [torch.randn(count, 2, requires_grad=True) for count in (2, 2)]
    logits = [(maps @ weight)[:, None] for maps in features]
    assert adversarial.r1_penalty(logits, features).item() == pytest.approx(10.0)


def test_finite_differences() -> None:
    still, shaken = [torch.tensor([[1.0, 1.0]])], [torch.tensor([[1.0, 3.0]])]
    assert adversarial.finite_difference_penalty(still, still).item() == 0
    assert adversarial.finite_difference_penalty(still, shaken).item() == pytest.approx(2.0)


def test_r1_sums_over_the_tokens_of_a_head() -> None:
    """A head that judges each of N tokens by w . f has the gradient w at every token."""
    weight = torch.tensor([1.0, 2.0])
    features = torch.randn(3, 7, 2, requires_grad=True)
    assert adversarial.r1_penalty([features @ weight], [features]).item() == pytest.approx(7 * 5.0, rel=1e-5)
