"""Fréchet distance against its closed form, its invariances and other libraries."""

import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import diffusion_kd  # noqa: F401 - lets torchvision, which torch_fidelity imports, load
from diffusion_kd import errors
from eval.metrics import frechet

Features = NDArray[np.float64]


def _with_moments(count: int, mean: Features, variances: Features, seed: int) -> Features:
    """Random vectors whose sample mean and covariance are exactly `mean` and diag(variances)."""
    raw = np.random.default_rng(seed).standard_normal((count, len(mean)))
    raw -= raw.mean(0)
    white = np.linalg.qr(raw)[0] * np.sqrt(count - 1)
    return np.asarray(white * np.sqrt(variances) + mean)


def _pair(count: int = 60, other_count: int = 80, dim: int = 12) -> tuple[Features, Features]:
    rng = np.random.default_rng(0)
    mixing, other_mixing = rng.standard_normal((2, dim, dim))
    return rng.standard_normal((count, dim)) @ mixing, rng.standard_normal((other_count, dim)) @ other_mixing + 0.3


def test_closed_form_of_diagonal_covariances() -> None:
    rng = np.random.default_rng(1)
    mean, other_mean = rng.standard_normal((2, 16))
    variances, other_variances = rng.uniform(0.1, 4, (2, 16))
    measured = frechet.frechet_distance(
        _with_moments(100, mean, variances, 2), _with_moments(70, other_mean, other_variances, 3)
    )
    expected = ((mean - other_mean) ** 2).sum() + ((np.sqrt(variances) - np.sqrt(other_variances)) ** 2).sum()
    assert measured == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("count", "dim"), [(60, 12), (10, 40)])
def test_a_set_is_no_distance_from_itself_and_does_not_mind_order(count: int, dim: int) -> None:
    features, _ = _pair(count, count, dim)
    assert frechet.frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("dim", [12, 200])
def test_symmetric_with_more_and_with_fewer_vectors_than_dimensions(dim: int) -> None:
    features, reference = _pair(dim=dim)
    one_way = frechet.frechet_distance(features, reference)
    assert one_way > 1
    assert frechet.frechet_distance(reference, features) == pytest.approx(one_way, rel=1e-7)


def test_scaling_multiplies_by_the_square() -> None:
    features, reference = _pair()
    once = frechet.frechet_distance(features, reference)
    assert frechet.frechet_distance(3 * features, 3 * reference) == pytest.approx(9 * once, rel=1e-10)


def test_rotation_changes_nothing() -> None:
    features, reference = _pair()
    rotation = np.linalg.qr(np.random.default_rng(4).standard_normal((12, 12)))[0]
    once = frechet.frechet_distance(features, reference)
    assert frechet.frechet_distance(features @ rotation, reference @ rotation) == pytest.approx(once, rel=1e-10)


def test_translation_adds_its_squared_length() -> None:
    features, _ = _pair()
    shift = np.random.default_rng(5).standard_normal(12)
    assert frechet.frechet_distance(features + shift, features) == pytest.approx((shift**2).sum(), abs=1e-9)


def test_fewer_vectors_than_dimensions_embed_without_loss() -> None:
    features, reference = _pair(20, 25, 12)
    basis = np.linalg.qr(np.random.default_rng(6).standard_normal((300, 12)))[0]
    expected = frechet.frechet_distance(features, reference)
    assert frechet.frechet_distance(features @ basis.T, reference @ basis.T) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_torch_fidelity() -> None:
    from torch_fidelity import metric_fid

    features, reference = _pair(400, 300, 32)
    theirs = metric_fid.fid_statistics_to_metric(
        metric_fid.fid_features_to_statistics(torch.from_numpy(features)),
        metric_fid.fid_features_to_statistics(torch.from_numpy(reference)),
        verbose=False,
    )["frechet_inception_distance"]
    assert frechet.frechet_distance(features, reference) == pytest.approx(theirs, rel=1e-6)


def test_agrees_with_clean_fid() -> None:
    from cleanfid import fid

    features, reference = _pair(400, 300, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scipy's sqrtm, which we do not use
        theirs = fid.frechet_distance(
            features.mean(0), np.cov(features, rowvar=False), reference.mean(0), np.cov(reference, rowvar=False)
        )
    assert frechet.frechet_distance(features, reference) == pytest.approx(theirs, rel=1e-6)


def test_a_group_left_out_is_as_if_it_had_never_been() -> None:
    features, reference = _pair(60, 60, 8)
    groups = np.arange(60) % 6
    found = frechet.jackknife(features, reference, groups, groups)
    assert found.whole == pytest.approx(frechet.frechet_distance(features, reference), rel=1e-9)
    expected = [frechet.frechet_distance(features[groups != g], reference[groups != g]) for g in range(6)]
    assert found.without == pytest.approx(expected, rel=1e-8)
    fixed = frechet.jackknife(features, frechet.Gaussian.fit(reference), groups)
    assert fixed.without == pytest.approx(
        [frechet.frechet_distance(features[groups != g], reference) for g in range(6)], rel=1e-8
    )
    assert frechet.jackknife(features, reference, groups).without == pytest.approx(fixed.without, rel=1e-12)


def test_groups_far_from_zero_lose_no_digits() -> None:
    features, reference = _pair(60, 60, 8)
    groups = np.arange(60) % 6
    near, far = (frechet.jackknife(features + shift, reference + shift, groups, groups) for shift in (0, 1e4))
    assert far.without == pytest.approx(near.without, rel=1e-6)


def test_single_precision_features_are_measured_in_double() -> None:
    features, reference = (part.astype(np.float32) for part in _pair())
    exact = frechet.frechet_distance(features.astype(np.float64) + 1e4, reference.astype(np.float64) + 1e4)
    assert frechet.frechet_distance(features, reference) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((4, 3)), "must be"),
        (np.zeros(4), "must be"),
        (np.zeros((1, 2)), "two vectors"),
        (np.full((3, 2), np.nan), "NaN"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(features: Features, message: str) -> None:
    with pytest.raises(errors.DataError, match=message):
        frechet.frechet_distance(features, np.zeros((5, 2)))
