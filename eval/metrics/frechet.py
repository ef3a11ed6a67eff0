"""Fréchet distance of two sets of feature vectors."""

import dataclasses
import functools
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_kd import errors
from eval import stats

Matrix = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and unbiased covariance (d, d) of a set of feature vectors, float64."""

    mean: Matrix
    covariance: Matrix

    @functools.cached_property
    def root(self) -> Matrix:
        """Symmetric square root of the covariance; eigenvalues below 0 are rounding."""
        values, vectors = np.linalg.eigh(self.covariance)
        root: Matrix = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
        return root

    @classmethod
    def fit(cls, features: ArrayLike) -> Self:
        """To (N, d), N >= 2, of any real values. Raises DataError."""
        return cls.of(_Moments.of(np.asarray(features)))

    @classmethod
    def of(cls, moments: "_Moments") -> Self:
        if moments.count < 2:
            raise errors.DataError(f"a Fréchet distance needs two vectors a set, not {moments.count}")
        mean = moments.total / moments.count
        covariance = (moments.outer - moments.count * np.outer(mean, mean)) / (moments.count - 1)
        return cls(mean + moments.origin, covariance)


@dataclasses.dataclass(frozen=True)
class _Moments:
    """Sums over vectors minus `origin`, which keeps them small: (d,) and (d, d). They add up and subtract exactly."""

    origin: Matrix
    count: int
    total: Matrix
    outer: Matrix

    @classmethod
    def of(cls, features: NDArray[np.generic], origin: Matrix | None = None) -> "_Moments":
        if features.ndim != 2:
            raise errors.DataError(f"feature sets must be (N, d) and (M, d), not {features.shape}")
        values = np.asarray(features, np.float64)
        if not np.isfinite(values).all():
            raise errors.DataError("the features hold NaN or infinity")
        origin = values.mean(0) if origin is None else origin
        centred = values - origin
        return cls(origin, len(values), centred.sum(0), centred.T @ centred)

    def without(self, part: "_Moments") -> "_Moments":
        return _Moments(self.origin, self.count - part.count, self.total - part.total, self.outer - part.outer)


def distance(first: Gaussian, second: Gaussian) -> float:
    """Squared 2-Wasserstein distance, `|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))`.

    (S1 S2)^(1/2) is never formed: its trace is the sum of the singular values of `S1^(1/2) S2^(1/2)`. They are the
    roots of the eigenvalues of `S2^(1/2) S1 S2^(1/2)` without the digits that squaring costs where N < d.
    Raises DataError for different d. Source: Heusel et al. 2017, equation 6.
    """
    if first.mean.shape != second.mean.shape:
        raise errors.DataError(f"feature sets must be (N, d) and (M, d), not d = {first.mean.size}, {second.mean.size}")
    shift = first.mean - second.mean
    cross = np.linalg.svdvals(first.root @ second.root).sum()
    return float(shift @ shift + first.covariance.trace() + second.covariance.trace() - 2 * cross)


def frechet_distance(features: ArrayLike, reference: ArrayLike) -> float:
    """`distance` of the Gaussians fitted to two sets, in float64.

    features (N, d), reference (M, d): any real values; N, M >= 2, and both may be smaller than d.
    The estimate is too high by about 1/N: compare only values of equal N. Raises DataError for sets that do not match.
    """
    return distance(Gaussian.fit(features), Gaussian.fit(reference))


def jackknife(
    features: NDArray[np.generic],
    reference: NDArray[np.generic] | Gaussian,
    groups: NDArray[np.int64],
    reference_groups: NDArray[np.int64] | None = None,
) -> stats.Jackknife:
    """`frechet_distance`, and again without each group of prompts.

    groups: (N,), from 0, none empty. reference_groups: (M,), where the reference has pictures of the same
    prompts: a group leaves both sets. None, or a Gaussian as reference: it stays whole and counts as known.
    """
    whole, count = _Moments.of(features), int(groups.max()) + 1
    known = reference if isinstance(reference, Gaussian) else Gaussian.fit(reference)
    paired = None if isinstance(reference, Gaussian) or reference_groups is None else _Moments.of(reference)

    def without(group: int) -> float:
        rest = Gaussian.of(whole.without(_Moments.of(features[groups == group], whole.origin)))
        if paired is None:
            return distance(rest, known)
        left_out = _Moments.of(reference[reference_groups == group], paired.origin)  # type: ignore[index]
        return distance(rest, Gaussian.of(paired.without(left_out)))

    return stats.Jackknife(distance(Gaussian.of(whole), known), tuple(map(without, range(count))) if count > 1 else ())
