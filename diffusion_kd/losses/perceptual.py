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


def pseudo_huber(squared: Tensor, turn: float = 0.03) -> Tensor:
    """sqrt(d^2 + c^2) - c of squared distances d^2: squared below c = `turn`, straight above.

    Small errors keep their pull, and the great ones at pure noise do not drown those of the other timesteps.
    Source: Song & Dhariwal 2023 (improved consistency training), section 3.3.
    """
    return (squared + turn**2).sqrt() - turn
