"""Perceptual distance of image pairs, in the maps of any feature network or through the `lpips` package."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_kd import errors
from diffusion_kd.networks import features

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images (B, 3, H, W) in [-1, 1] -> (B,), 0 for equal images."""


def map_distance(maps: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Squared distance of feature maps whose channels have unit length at each position; (B,), in [0, 4 * depths].

    maps, others: one (B, C_k, h_k, w_k) for each depth. Averaged over positions, summed over depths.
    Source: Zhang et al. 2018 (LPIPS), equation 1, with w_l = 1: no weights learnt from human judgements.
    """
    depths = [
        (functional.normalize(one, dim=1) - functional.normalize(other, dim=1)).square().sum(1).mean((1, 2))
        for one, other in zip(maps, others, strict=True)
    ]
    return torch.stack(depths).sum(0)


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
