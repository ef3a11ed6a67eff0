"""Diversity with a distance that is easy to add up."""

import pytest
import torch
from torch import Tensor

from diffusion_kd import errors
from eval.metrics import diversity


def _gap(images: Tensor, others: Tensor) -> Tensor:
    """Distance of flat images: the difference of their levels."""
    return (images - others).abs().mean((1, 2, 3))


def _flat(*levels: float) -> Tensor:
    return torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def test_mean_over_all_pairs() -> None:
    assert diversity.mean_pairwise_distance(_flat(0, 0.1, 0.4), _gap) == pytest.approx((0.1 + 0.4 + 0.3) / 3)


def test_mean_over_prompts_not_over_prompts_together() -> None:
    assert diversity.diversity([_flat(0, 0.2), _flat(0.9, 0.9)], _gap) == pytest.approx(0.1)


def test_one_image_has_no_diversity() -> None:
    with pytest.raises(errors.DataError, match="at least two"):
        diversity.mean_pairwise_distance(_flat(0), _gap)
