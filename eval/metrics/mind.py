"""Monge inception distance: sliced Wasserstein distance of feature vectors."""

import numpy as np
from numpy.typing import NDArray

from diffusion_kd import errors
from eval import stats

PROJECTIONS, SEED = 1000, 2020
_AT_ONCE = 20
"""Directions at a time, which bounds the memory."""


def jackknife(
    features: NDArray[np.generic],
    reference: NDArray[np.generic],
    groups: NDArray[np.int64],
    reference_groups: NDArray[np.int64] | None = None,
    *,
    projections: int = PROJECTIONS,
    seed: int = SEED,
) -> stats.Jackknife:
    """`mind`, and again without each group, along the same directions."""
    count = int(groups.max()) + 1
    labels = np.full(len(reference), -1) if reference_groups is None else reference_groups

    def without(group: int) -> float:
        return mind(features[groups != group], reference[labels != group], projections=projections, seed=seed)

    whole = mind(features, reference, projections=projections, seed=seed)
    return stats.Jackknife(whole, tuple(map(without, range(count))) if count > 1 else ())


def mind(
    features: NDArray[np.generic],
    reference: NDArray[np.generic],
    *,
    projections: int = PROJECTIONS,
    seed: int = SEED,
) -> float:
    """3 d times the mean over random directions of the squared 2-Wasserstein distance of the projections.

    features (N, d), reference (M, d): as they come from the network. Sets of different size are compared by their
    quantiles; the authors' code thins the larger at random, which makes the same quantity noisier and a jackknife of it
    meaningless. Raises DataError for sets that do not match.
    Source: Berthet et al. 2026 (MIND), whose authors use Inception features and 1000 directions.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1] or not len(features):
        raise errors.DataError(f"feature sets must be (N, d) and (M, d), not {features.shape} and {reference.shape}")
    rng = np.random.default_rng(seed)
    dim, steps = features.shape[1], max(len(features), len(reference))
    directions = rng.standard_normal((dim, projections))
    directions /= np.linalg.norm(directions, axis=0)
    first, second = (np.asarray(values, np.float64) for values in (features, reference))
    squares = [
        np.square(_quantiles(first @ some, steps) - _quantiles(second @ some, steps)).mean(0)
        for some in np.split(directions, range(_AT_ONCE, projections, _AT_ONCE), axis=1)
    ]
    return float(3 * dim * np.concatenate(squares).mean())


def _quantiles(projected: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """(N, p) -> (steps, p): of each column, at the middles of `steps` equal shares; sorted values where steps = N."""
    places = ((np.arange(steps) + 0.5) * len(projected) / steps).astype(int)
    return np.asarray(np.sort(projected, axis=0)[places])
