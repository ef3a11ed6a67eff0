"""Perceptual distance in the maps of a feature network. Pure functions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


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
