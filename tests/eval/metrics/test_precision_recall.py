"""Precision and recall of sets whose overlap is known."""

import pytest
import torch
from torch import Tensor

import diffusion_kd  # noqa: F401 - lets torchvision, which torch_fidelity imports, load
from diffusion_kd import errors
from eval.metrics import precision_recall


def _cluster(centre: float, count: int, seed: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)) + centre


def test_good_pictures_that_miss_a_mode_have_precision_and_no_recall_of_it() -> None:
    reference = torch.cat([_cluster(0, 100, 0), _cluster(50, 100, 1)])
    precision, recall = precision_recall.precision_recall(_cluster(0, 100, 2), reference)
    assert precision > 0.9
    assert 0.4 < recall <= 0.5


def test_bad_pictures_beside_good_ones_cost_precision_alone() -> None:
    made = torch.cat([_cluster(0, 100, 0), _cluster(50, 100, 1)])
    precision, recall = precision_recall.precision_recall(made, _cluster(0, 100, 2))
    assert 0.4 < precision <= 0.5
    assert recall > 0.9


def test_small_or_unlike_sets_are_refused() -> None:
    with pytest.raises(errors.DataError, match="4 vectors"):
        precision_recall.precision_recall(torch.zeros(3, 4), torch.zeros(9, 4))
    with pytest.raises(errors.DataError, match="must be"):
        precision_recall.precision_recall(torch.zeros(9, 4), torch.zeros(9, 5))
