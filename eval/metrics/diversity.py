"""Diversity: how different the images are that one prompt gives under different seeds."""

import itertools
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor

from diffusion_kd import errors
from eval.metrics import perceptual


def mean_pairwise_distance(images: Tensor, distance: perceptual.Distance) -> float:
    """Mean distance over all pairs of (k, 3, H, W) in [-1, 1], k >= 2. Raises DataError for fewer images."""
    if len(images) < 2:
        raise errors.DataError(f"diversity needs at least two images of a prompt, not {len(images)}")
    first, second = torch.tensor(list(itertools.combinations(range(len(images)), 2))).T
    return distance(images[first], images[second]).mean().item()


def diversity(groups: Iterable[Tensor], distance: perceptual.Distance) -> float:
    """Mean over prompts of `mean_pairwise_distance`. groups: the images of one prompt each.

    A ratio student / teacher below 1 tells of collapse. Artefacts add spread too: read it beside the Fréchet distance.
    Source: Zhu et al. 2017 (BicycleGAN), section 5.1.
    """
    return statistics.fmean(mean_pairwise_distance(images, distance) for images in groups)
