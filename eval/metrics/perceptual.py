"""Perceptual distance of image pairs, in the maps of any feature network or through the `lpips` package."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_kd import errors
from diffusion_kd.losses.perceptual import map_distance
from diffusion_kd.networks import features

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images (B, 3, H, W) in [-1, 1] -> (B,), 0 for equal images."""


def from_features(network: features.FeatureNetwork) -> Distance:
    """The distance in a feature network's maps. Its calls raise DataError for images out of [-1, 1]."""

    def distance(images: Tensor, others: Tensor) -> Tensor:
        _check(images, others)
        return map_distance(network(images).maps, network(others).maps)

    return distance


def from_lpips(module: Distance) -> Distance:
    """The distance of `lpips.LPIPS(net=...)`, or of any callable that takes the same images, flattened to (B,).

    Its calls raise DataError for images out of [-1, 1]. Images in [0, 1] cannot be told from bright ones: they pass,
    and the distance comes out too small.
    """

    def distance(images: Tensor, others: Tensor) -> Tensor:
        _check(images, others)
        return module(images, others).flatten()

    return distance


def _check(images: Tensor, others: Tensor) -> None:
    if images.shape != others.shape:
        raise errors.DataError(f"images to compare must match, not {tuple(images.shape)} and {tuple(others.shape)}")
    low, high = torch.stack([*images.aminmax(), *others.aminmax()]).aminmax()
    if not (low >= -1.01 and high <= 1.01):
        raise errors.DataError(f"images must lie in [-1, 1]; these lie in [{low:.3g}, {high:.3g}]")
