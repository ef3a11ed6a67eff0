"""Diversity on images whose distances are known."""

import pytest
import torch
from torch import Tensor

from diffusion_kd import errors
from eval.metrics import diversity


def _distance(images: Tensor, others: Tensor) -> Tensor:
    return (images - others).abs().flatten(1).mean(1)


def _levels(*levels: float) -> Tensor:
    return torch.stack([torch.full((3, 2, 2), level) for level in levels])


def test_every_pair_of_a_prompt_counts_once_and_no_other_pair() -> None:
    found = diversity.mean_pairwise_distances(_levels(0, 0.3, 0.9, -1, -1, 1), 3, _distance)
    assert found.tolist() == pytest.approx([(0.3 + 0.9 + 0.6) / 3, (0 + 2 + 2) / 3])


def test_equal_images_have_none() -> None:
    assert diversity.mean_pairwise_distances(_levels(0.5, 0.5), 2, _distance).tolist() == [0]


@pytest.mark.parametrize(("count", "each"), [(3, 1), (3, 2)])
def test_one_image_of_a_prompt_is_refused(count: int, each: int) -> None:
    with pytest.raises(errors.DataError, match="two at least"):
        diversity.mean_pairwise_distances(torch.zeros(count, 3, 2, 2), each, _distance)
