"""A teacher that shares its U-Net with a student: the adapters are off for it alone, and on again afterwards."""

import copy

import pytest
import torch
from torch import Tensor

from diffusion_kd.denoiser import Denoiser
from diffusion_kd.networks import lora
from tests import toys


class Pair:
    """A plain denoiser, and a teacher and a student that share another U-Net of the same weights.

    The student's adapters say something, as they do once it has learnt.
    """

    def __init__(self) -> None:
        parts = toys.tiny_parts()
        self.plain, self.student = copy.deepcopy(parts.denoiser()), parts.denoiser()
        self.teacher = lora.WithoutAdapters(parts.unet, self.student.schedule, self.student.prediction_type)
        lora.add(parts.unet, 4, 8)
        self.adapters = {name: weight for name, weight in parts.unet.named_parameters() if weight.requires_grad}
        torch.manual_seed(3)
        for weight in self.adapters.values():
            torch.nn.init.normal_(weight, std=0.3)


def estimate(denoiser: Denoiser) -> Tensor:
    """x0_hat of a fixed batch."""
    batch = toys.tiny_batch(toys.tiny_parts())
    estimated: Tensor = denoiser(batch.latents, torch.tensor([20, 400, 700, 999]), batch.cond)
    return estimated


def gradients(pair: Pair) -> dict[str, Tensor]:
    """The student's, of a fixed loss."""
    pair.student.zero_grad()
    estimate(pair.student).square().mean().backward()
    return {name: weight.grad.clone() for name, weight in pair.adapters.items() if weight.grad is not None}


def test_the_teacher_says_what_the_plain_network_says_and_the_student_does_not() -> None:
    pair = Pair()
    plain, student = estimate(pair.plain), estimate(pair.student)
    assert torch.equal(estimate(pair.teacher), plain)
    assert not torch.allclose(student, plain, atol=0.1)
    assert torch.equal(estimate(pair.student), student), "the teacher has left the adapters off"


def test_fresh_adapters_change_nothing_and_alone_learn() -> None:
    parts = toys.tiny_parts()
    plain = estimate(parts.denoiser())
    lora.add(parts.unet, 4, 8)
    assert torch.equal(estimate(parts.denoiser()), plain)
    learning = {name for name, weight in parts.unet.named_parameters() if weight.requires_grad}
    assert len(learning) == 2 * len(lora.layers(parts.unet)) > 0 and all("lora_" in name for name in learning)


def test_adapters_of_a_network_in_half_precision_learn_in_full() -> None:
    unet = toys.tiny_parts().unet.half()
    lora.add(unet, 4, 8)
    dtypes = {(weight.requires_grad, weight.dtype) for weight in unet.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.float16)}


def test_an_error_within_the_network_leaves_the_adapters_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    before = estimate(pair.student)

    def fail(*_: object) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(pair.teacher.unet.up_blocks[-1].resnets[0], "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            estimate(pair.teacher)
    assert torch.equal(estimate(pair.student), before)


def test_a_teachers_pass_leaves_the_students_gradient_as_it_is() -> None:
    """Before the student's pass, and between its forward and its backward pass."""
    alone = gradients(Pair())
    assert len(alone) == len(Pair().adapters) and all(bool(gradient.any()) for gradient in alone.values())
    pair = Pair()
    estimate(pair.teacher)
    beside = gradients(pair)
    pair.student.zero_grad()
    estimated = estimate(pair.student)
    estimate(pair.teacher)
    estimated.square().mean().backward()
    for name, weight in pair.adapters.items():
        assert torch.equal(beside[name], alone[name]), name
        assert weight.grad is not None and torch.equal(weight.grad, alone[name]), name
