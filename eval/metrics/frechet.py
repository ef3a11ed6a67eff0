"""Fréchet distance of two sets of feature vectors."""

import dataclasses
import math
from collections.abc import Callable
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_kd import errors
from eval import stats

Matrix = NDArray[np.float64]
_ROWS = 4096
"""Vectors that are held in double precision at a time."""


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """mean: (d,), float64. factor: (k, d), any matrix F whose F^T F is the covariance."""

    mean: Matrix
    factor: Matrix

    @classmethod
    def fit(cls, features: ArrayLike) -> Self:
        """To (N, d), N >= 2, of any real values, with an unbiased covariance. Raises DataError."""
        given = np.asarray(features)
        if given.ndim == 2 and len(given) >= given.shape[1]:
            return cls.of(_Moments.of(given))
        values = _checked(given)
        if len(values) < 2:
            raise errors.DataError(f"a Fréchet distance needs two vectors a set, not {len(values)}")
        mean: Matrix = values.mean(0)
        centred: Matrix = values - mean  # where N < d the vectors themselves are the smaller factor
        return cls(mean, centred / math.sqrt(len(values) - 1))

    @classmethod
    def of(cls, moments: "_Moments") -> Self:
        if moments.count < 2:
            raise errors.DataError(f"a Fréchet distance needs two vectors a set, not {moments.count}")
        mean = moments.total / moments.count
        covariance = (moments.outer - moments.count * np.outer(mean, mean)) / (moments.count - 1)
        return cls.from_covariance(mean + moments.origin, covariance)

    @classmethod
    def from_covariance(cls, mean: Matrix, covariance: Matrix) -> Self:
        """By Cholesky; a covariance that is not positive definite has a symmetric root, rounding below 0 cut off."""
        try:
            factor: Matrix = np.linalg.cholesky(covariance).T.astype(np.float64, copy=False)
            return cls(mean, factor)
        except np.linalg.LinAlgError:
            values, vectors = np.linalg.eigh(covariance)
            return cls(mean, np.sqrt(values.clip(min=0))[:, None] * vectors.T)


@dataclasses.dataclass(frozen=True)
class _Moments:
    """Sums over vectors minus `origin`, which keeps them small: (d,) and (d, d)."""

    origin: Matrix
    count: int
    total: Matrix
    outer: Matrix

    @classmethod
    def of(cls, features: NDArray[np.generic], origin: Matrix | None = None) -> "_Moments":
        known = _checked(features[:_ROWS]).mean(0) if origin is None else origin
        total, outer = np.zeros(len(known)), np.zeros((len(known), len(known)))
        for start in range(0, len(features), _ROWS):
            centred = _checked(features[start : start + _ROWS]) - known
            total += centred.sum(0)
            outer += centred.T @ centred
        return cls(known, len(features), total, outer)

    def without(self, part: "_Moments") -> "_Moments":
        return _Moments(self.origin, self.count - part.count, self.total - part.total, self.outer - part.outer)


def _checked(features: NDArray[np.generic]) -> Matrix:
    if features.ndim != 2:
        raise errors.DataError(f"feature sets must be (N, d) and (M, d), not {features.shape}")
    values = np.asarray(features, np.float64)
    if not np.isfinite(values).all():
        raise errors.DataError("the features hold NaN or infinity")
    return values


def distance(first: Gaussian, second: Gaussian) -> float:
    """Squared 2-Wasserstein distance, `|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))`.

    (S1 S2)^(1/2) is never formed: with F1^T F1 = S1 and F2^T F2 = S2 its trace is the sum of the singular values of
    F1 F2^T. They are the roots of the eigenvalues of F2 S1 F2^T, without the digits that squaring costs.
    Raises DataError for different d. Source: Heusel et al. 2017, equation 6.
    """
    if first.mean.shape != second.mean.shape:
        raise errors.DataError(f"feature sets must be (N, d) and (M, d), not d = {first.mean.size}, {second.mean.size}")
    shift = first.mean - second.mean
    cross = np.linalg.svdvals(first.factor @ second.factor.T).sum()
    return float(shift @ shift + (first.factor**2).sum() + (second.factor**2).sum() - 2 * cross)


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
    count = int(groups.max()) + 1
    rest = _leave_out(features, groups)
    if isinstance(reference, Gaussian) or reference_groups is None:
        known = reference if isinstance(reference, Gaussian) else Gaussian.fit(reference)
        whole, without = distance(rest(None), known), (distance(rest(group), known) for group in range(count))
    else:
        others = _leave_out(reference, reference_groups)
        whole = distance(rest(None), others(None))
        without = (distance(rest(group), others(group)) for group in range(count))
    return stats.Jackknife(whole, tuple(without) if count > 1 else ())


def _leave_out(features: NDArray[np.generic], groups: NDArray[np.int64]) -> Callable[[int | None], Gaussian]:
    """The Gaussian of a set without one group, or (None) of all of it; sums are taken once where N >= d."""
    if len(features) < features.shape[1]:
        return lambda group: Gaussian.fit(features if group is None else features[groups != group])
    whole = _Moments.of(features)

    def rest(group: int | None) -> Gaussian:
        if group is None:
            return Gaussian.of(whole)
        return Gaussian.of(whole.without(_Moments.of(features[groups == group], whole.origin)))

    return rest
