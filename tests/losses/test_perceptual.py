"""Perceptual distance on maps whose distance is known; `tests/eval/metrics` holds it against the `lpips` package."""

import pytest
import torch

from diffusion_kd.losses import perceptual


def test_orthogonal_channels_differ_by_two_at_each_position_and_length_does_not_count() -> None:
    maps = torch.zeros(2, 2, 1, 2)
    others = torch.zeros(2, 2, 1, 2)
    maps[:, 0] = 3  # both positions point along channel 0
    others[0, 1] = 5  # image 0: both along channel 1
    others[1, 0, 0, 0], others[1, 1, 0, 1] = 7, 7  # image 1: one along channel 0, one along channel 1
    assert perceptual.map_distance([maps], [others]).tolist() == pytest.approx([2, 1])


def test_depths_add_up() -> None:
    maps, others = [torch.ones(1, 1, 2, 2), torch.ones(1, 1, 3, 3)], [-torch.ones(1, 1, 2, 2), -torch.ones(1, 1, 3, 3)]
    assert perceptual.map_distance(maps, others).tolist() == pytest.approx([8])


def test_pseudo_huber_is_squared_for_small_distances_and_straight_for_great_ones() -> None:
    distances = torch.tensor([0.0, 1e-3, 2e-3, 10.0, 20.0], dtype=torch.float64)
    none, one, two, ten, twenty = perceptual.pseudo_huber(distances**2).tolist()
    assert none == 0
    assert two / one == pytest.approx(4, rel=1e-2)
    assert twenty - ten == pytest.approx(10, rel=1e-3)
