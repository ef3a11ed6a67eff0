"""Discriminator heads and the teacher as a feature network."""

import pytest
import torch

from diffusion_kd.networks import discriminator
from tests import toys


def maps(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, channels, 4, 4, generator=generator) for channels in (8, 16)]


def test_a_head_judges_every_token_of_its_map() -> None:
    logits = discriminator.Heads((8, 16), [5])(maps(), [torch.randn(3, 5)])
    assert [tuple(head.shape) for head in logits] == [(3, 16), (3, 16)]


def test_conditions_change_the_judgement() -> None:
    heads = toys.taught(discriminator.Heads((8, 16), [5, 3])).eval()
    torch.manual_seed(0)
    text, image = torch.randn(3, 5), torch.randn(3, 3)
    plain = heads(maps(), [text, image])
    for told in ([text.roll(1, 0), image], [text, image.roll(1, 0)]):
        assert not torch.allclose(heads(maps(), told)[0], plain[0], atol=1e-4)
    # Projection works on directions: the length of an embedding says nothing.
    assert torch.allclose(heads(maps(), [2 * text, 3 * image])[0], plain[0], atol=1e-5)


def test_a_fresh_head_pushes_the_student_nowhere_and_can_learn() -> None:
    heads, layers = discriminator.Heads((8, 16), [5]), [layer.requires_grad_() for layer in maps()]
    logits = heads(layers, [torch.randn(3, 5)])
    torch.stack([head.mean() for head in logits]).sum().backward()
    assert all(not head.any() for head in logits) and all(not layer.grad.any() for layer in layers)  # type: ignore[union-attr]
    assert all(head.project.weight.grad.any() for head in heads.heads)


def test_heads_without_conditions() -> None:
    logits = discriminator.Heads((8, 16), [])(maps(), [])
    assert [tuple(head.shape) for head in logits] == [(3, 16), (3, 16)]


def test_an_example_is_judged_alone() -> None:
    heads = toys.taught(discriminator.Heads((8, 16), [5])).eval()
    told = torch.randn(3, 5)
    together = heads(maps(), [told])
    alone = heads([layer[:1] for layer in maps()], [told[:1]])
    assert torch.allclose(together[0][:1], alone[0], atol=1e-5)


def test_convolutions_are_spectrally_normalised() -> None:
    head = discriminator.Head(8, 0)
    with torch.no_grad():
        for _ in range(50):
            head(maps()[0], None)
    weight = head.judge.weight.detach().flatten(1)
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1.0, abs=1e-2)


def test_the_teacher_as_features_of_noised_latents() -> None:
    parts = toys.tiny_parts()
    teacher, batch = parts.denoiser(), toys.tiny_batch(parts)
    network = discriminator.LatentFeatures(teacher)
    latents = batch.latents.clone().requires_grad_()
    layers = network(latents, torch.tensor([10, 250, 500, 900]), batch.cond)
    assert tuple(layer.shape[1] for layer in layers) == network.map_channels == (16, 32, 32)
    assert [tuple(layer.shape[2:]) for layer in layers] == [(8, 8), (4, 4), (4, 4)]
    sum(layer.square().mean() for layer in layers).backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    assert list(network.parameters()) == []


def test_reading_features_leaves_the_teacher_as_it_was() -> None:
    parts = toys.tiny_parts()
    teacher, batch = parts.denoiser(), toys.tiny_batch(parts)
    timesteps = torch.tensor([10, 250, 500, 900])
    before = teacher(batch.latents, timesteps, batch.cond)
    discriminator.LatentFeatures(teacher)(batch.latents, timesteps, batch.cond)
    assert torch.equal(teacher(batch.latents, timesteps, batch.cond), before)
