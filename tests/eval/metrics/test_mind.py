"""MIND against closed forms."""

import numpy as np
import pytest
from numpy.typing import NDArray

from diffusion_kd import errors
from eval.metrics import mind


def _features(count: int, dim: int = 24, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((count, dim))


def test_a_set_and_its_own_shuffle_are_no_distance_apart() -> None:
    assert mind.mind(_features(50), _features(50)[::-1]) == 0


def test_a_shift_costs_three_times_its_squared_length() -> None:
    shift = np.full(
        24, 0.5
    )  # along a random unit direction u the projections move by u . shift; E (u . shift)^2 = |s|^2/d
    found = mind.mind(_features(80) + shift, _features(80), projections=20_000)
    assert found == pytest.approx(3 * (shift**2).sum(), rel=0.02)


def test_scaling_multiplies_by_the_square_and_sides_may_be_swapped() -> None:
    one, other = _features(50), _features(50, seed=1) + 0.1
    assert mind.mind(3 * one, 3 * other) == pytest.approx(9 * mind.mind(one, other), rel=1e-9)
    assert mind.mind(other, one) == pytest.approx(mind.mind(one, other), rel=1e-12)


def test_one_dimension_is_the_squared_wasserstein_distance_times_three() -> None:
    one, other = _features(40, 1), _features(40, 1, seed=1)
    expected = 3 * ((np.sort(one[:, 0]) - np.sort(other[:, 0])) ** 2).mean()
    assert mind.mind(one, other, projections=3) == pytest.approx(expected, rel=1e-9)


def test_a_set_and_its_double_are_no_distance_apart() -> None:
    assert mind.mind(_features(40), np.tile(_features(40), (3, 1))) == 0


def test_sets_of_different_size_have_a_jackknife_that_means_something() -> None:
    """Thinning at random would draw anew for every group that is left out."""
    features, reference = _features(200), np.concatenate([_features(200, seed=1), _features(200, seed=2)])
    groups = np.arange(200) % 20
    found = mind.jackknife(features, reference, groups, np.tile(groups, 2))
    assert abs(found.corrected - found.whole) < 5 * found.whole
    assert found.standard_error < found.whole


def test_a_group_left_out_is_as_if_it_had_never_been() -> None:
    features, reference, groups = _features(40), _features(40, seed=1), np.arange(40) % 4
    found = mind.jackknife(features, reference, groups, groups)
    expected = [mind.mind(features[groups != g], reference[groups != g]) for g in range(4)]
    assert found.without == pytest.approx(expected, rel=1e-12)
    fixed = mind.jackknife(features, reference, groups)
    assert fixed.without == pytest.approx([mind.mind(features[groups != g], reference) for g in range(4)], rel=1e-12)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(errors.DataError, match="must be"):
        mind.mind(np.zeros((4, 3)), np.zeros((4, 2)))
