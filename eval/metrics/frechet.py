"""Fréchet distance of two sets of feature vectors."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_kd import errors


def frechet_distance(features: ArrayLike, reference: ArrayLike) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to two sets.

    `|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2))` with means m and covariances S.
    features (N, d), reference (M, d): any real values; N, M >= 2, and both may be smaller than d. Computed in float64.
    (S1 S2)^(1/2) is never formed: its trace is the sum of the singular values of `S1^(1/2) S2^(1/2)`. They are the
    roots of the eigenvalues of `S2^(1/2) S1 S2^(1/2)` without the digits that squaring costs where N < d.

    The estimate is too high by about 1/N: compare only values of equal N. Raises DataError for sets that do not match.
    Source: Heusel et al. 2017, equation 6.
    """
    first, second = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    _check(first, second)
    shift = first.mean(0) - second.mean(0)
    covariance, reference_covariance = _covariance(first), _covariance(second)
    cross = np.linalg.svdvals(_root(covariance) @ _root(reference_covariance)).sum()
    return float(shift @ shift + covariance.trace() + reference_covariance.trace() - 2 * cross)


def _covariance(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unbiased, (d, d)."""
    centred = features - features.mean(0)
    covariance: NDArray[np.float64] = centred.T @ centred / (len(features) - 1)
    return covariance


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Symmetric square root of a positive semi-definite matrix; eigenvalues below 0 are rounding."""
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root


def _check(first: NDArray[np.float64], second: NDArray[np.float64]) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise errors.DataError(f"feature sets must be (N, d) and (M, d), not {first.shape} and {second.shape}")
    if min(len(first), len(second)) < 2:
        raise errors.DataError(f"a Fréchet distance needs two vectors a set, not {len(first)} and {len(second)}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise errors.DataError("the features hold NaN or infinity")
