"""Diversity: how different the images are that one prompt gives under different seeds."""

import itertools

import torch
from torch import Tensor

from diffusion_kd import errors
from eval.metrics import perceptual


def mean_pairwise_distances(images: Tensor, images_per_prompt: int, distance: perceptual.Distance) -> Tensor:
    """Mean distance over all pairs of images of the same prompt, (prompts,).

    images: (prompts * images_per_prompt, 3, H, W) in [-1, 1], those of a prompt beside one another.
    A ratio student / teacher below 1 tells of collapse. Artefacts add spread too: read it beside the Fréchet distance.
    Raises DataError for fewer than two images of a prompt. Source: Zhu et al. 2017 (BicycleGAN), section 5.1.
    """
    if images_per_prompt < 2 or len(images) % images_per_prompt:
        raise errors.DataError(
            f"diversity needs the same number of images of each prompt, two at least, "
            f"not {len(images)} images in groups of {images_per_prompt}"
        )
    pairs = torch.tensor(list(itertools.combinations(range(images_per_prompt), 2)))
    starts = torch.arange(0, len(images), images_per_prompt)
    first, second = ((starts[:, None] + pairs[:, side]).flatten() for side in (0, 1))
    found = distance(images[first], images[second]).reshape(len(starts), len(pairs))
    return found.mean(1)
