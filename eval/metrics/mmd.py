"""Squared maximum mean discrepancy of two sets of feature vectors: the core of KID and of CMMD."""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diffusion_kd import errors
from eval import stats

Kernel = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""(N, d), (M, d) -> (N, M)."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Sums:
    """Sums of kernel values between groups, (G, G) each: within the first set, within the second, between both.

    first_self, second_self: (G,), the part of a vector with itself. first_counts, second_counts: (G,), vectors.
    """

    first: NDArray[np.float64]
    second: NDArray[np.float64]
    between: NDArray[np.float64]
    first_self: NDArray[np.float64]
    second_self: NDArray[np.float64]
    first_counts: NDArray[np.int64]
    second_counts: NDArray[np.int64]

    def mmd(self, kept: NDArray[np.bool_], kept_reference: NDArray[np.bool_], *, unbiased: bool) -> float:
        """Of the kept groups. Source: Gretton et al. 2012, equations 3 (unbiased) and 5 (biased)."""
        n, m = int(self.first_counts[kept].sum()), int(self.second_counts[kept_reference].sum())
        within = self.first[np.ix_(kept, kept)].sum()
        within_other = self.second[np.ix_(kept_reference, kept_reference)].sum()
        between = self.between[np.ix_(kept, kept_reference)].sum()
        if unbiased:
            within = (within - self.first_self[kept].sum()) / (n * (n - 1))
            within_other = (within_other - self.second_self[kept_reference].sum()) / (m * (m - 1))
        else:
            within, within_other = within / n**2, within_other / m**2
        return float(within + within_other - 2 * between / (n * m))


def jackknife(
    features: NDArray[np.generic],
    reference: NDArray[np.generic],
    groups: NDArray[np.int64],
    reference_groups: NDArray[np.int64] | None,
    kernel: Kernel,
    *,
    unbiased: bool,
) -> stats.Jackknife:
    """MMD^2 of (N, d) and (M, d), and again without each group, from one pass over pairs of groups.

    groups: (N,), from 0. reference_groups: (M,), or None for a reference that stays whole.
    Memory is that of two groups. Raises DataError for sets that do not match or are smaller than 2.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise errors.DataError(f"feature sets must be (N, d) and (M, d), not {features.shape} and {reference.shape}")
    if min(len(features), len(reference)) < 2:
        raise errors.DataError(f"an MMD needs two vectors a set, not {len(features)} and {len(reference)}")
    count, fixed = int(groups.max()) + 1, reference_groups is None
    blocks = np.arange(len(reference)) % count if reference_groups is None else reference_groups
    sums = _sums(features, reference, groups, blocks, kernel, count)
    everyone = np.ones(count, bool)
    whole = sums.mmd(everyone, everyone, unbiased=unbiased)
    if count < 2:
        return stats.Jackknife(whole)
    left_out = ~np.eye(count, dtype=bool)
    without = (sums.mmd(kept, everyone if fixed else kept, unbiased=unbiased) for kept in left_out)
    return stats.Jackknife(whole, tuple(without))


def _sums(
    features: NDArray[np.generic],
    reference: NDArray[np.generic],
    groups: NDArray[np.int64],
    reference_groups: NDArray[np.int64],
    kernel: Kernel,
    count: int,
) -> _Sums:
    def part(values: NDArray[np.generic], labels: NDArray[np.int64], group: int) -> NDArray[np.float64]:
        return np.asarray(values[labels == group], np.float64)

    first, second, between = np.zeros((3, count, count))
    first_self, second_self = np.zeros((2, count))
    for i in range(count):
        mine, theirs = part(features, groups, i), part(reference, reference_groups, i)
        for j in range(count):
            other_theirs = part(reference, reference_groups, j)
            between[i, j] = kernel(mine, other_theirs).sum()
            if j > i:
                first[i, j] = first[j, i] = kernel(mine, part(features, groups, j)).sum()
                second[i, j] = second[j, i] = kernel(theirs, other_theirs).sum()
        own, other_own = kernel(mine, mine), kernel(theirs, theirs)
        first[i, i], second[i, i] = own.sum(), other_own.sum()
        first_self[i], second_self[i] = own.trace(), other_own.trace()
    counts = (np.bincount(labels, minlength=count) for labels in (groups, reference_groups))
    return _Sums(first, second, between, first_self, second_self, *counts)
