"""CMMD: maximum mean discrepancy of CLIP embeddings."""

import numpy as np
from numpy.typing import NDArray

from eval import stats
from eval.metrics import mmd

SIGMA, SCALE = 10.0, 1000.0


def kernel(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """1000 exp(-|x - y|^2 / (2 sigma^2)) of vectors scaled to unit length."""
    one, other = (values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12) for values in (first, second))
    return np.asarray(SCALE * np.exp((one @ other.T - 1) / SIGMA**2))  # |x - y|^2 = 2 - 2 x . y


def jackknife(
    features: NDArray[np.generic],
    reference: NDArray[np.generic],
    groups: NDArray[np.int64],
    reference_groups: NDArray[np.int64] | None = None,
) -> stats.Jackknife:
    """1000 times the biased MMD^2 of unit vectors, and again without each group.

    The paper defines the unbiased estimate; its published code, and so every published number, has the biased one.
    The authors' network is CLIP ViT-L/14 at 336 px: with another it is another quantity, so the name tells the network.
    Source: Jayasumana et al. 2024, section 4.
    """
    return mmd.jackknife(features, reference, groups, reference_groups, kernel, unbiased=False)
