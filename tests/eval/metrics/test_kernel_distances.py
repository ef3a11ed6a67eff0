"""KID and CMMD: against torch-fidelity, their definitions, and themselves without a group."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import diffusion_kd  # noqa: F401 - lets torchvision, which torch_fidelity imports, load
from diffusion_kd import errors
from eval.metrics import cmmd, kid, mmd

Features = NDArray[np.float64]


@pytest.fixture
def pair() -> tuple[Features, Features]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((60, 16)), rng.standard_normal((60, 16)) * 1.2 + 0.2


@pytest.fixture
def groups() -> NDArray[np.int64]:
    return np.arange(60) % 6


def test_kid_is_torch_fidelity_s_with_one_subset_of_everything(
    pair: tuple[Features, Features], groups: NDArray[np.int64]
) -> None:
    from torch_fidelity import metric_kid

    theirs = metric_kid.kid_features_to_metric(
        *map(torch.from_numpy, pair), kid_subsets=1, kid_subset_size=60, verbose=False
    )[metric_kid.KEY_METRIC_KID_MEAN]
    assert kid.jackknife(*pair, groups, groups).whole == pytest.approx(theirs, rel=1e-6)


def test_kid_of_halves_of_one_set_is_about_zero_on_both_sides() -> None:
    rng = np.random.default_rng(1)
    groups = np.arange(200) % 10
    found = [kid.jackknife(*rng.standard_normal((2, 200, 8)), groups, groups).whole for _ in range(30)]
    assert min(found) < 0 < max(found)  # unbiased: a distance that may be negative
    assert np.mean(found) == pytest.approx(0, abs=0.01)


def test_cmmd_by_its_definition(pair: tuple[Features, Features], groups: NDArray[np.int64]) -> None:
    one, other = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in pair)

    def mean_kernel(first: Features, second: Features) -> float:
        return float(np.exp(-((first[:, None] - second[None]) ** 2).sum(-1) / (2 * 10**2)).mean())

    expected = 1000 * (mean_kernel(one, one) + mean_kernel(other, other) - 2 * mean_kernel(one, other))
    assert cmmd.jackknife(*pair, groups, groups).whole == pytest.approx(expected, rel=1e-8)
    assert cmmd.jackknife(pair[0] * 7, pair[1], groups, groups).whole == pytest.approx(expected, rel=1e-8)


def test_cmmd_of_a_set_and_itself_is_zero(pair: tuple[Features, Features], groups: NDArray[np.int64]) -> None:
    assert cmmd.jackknife(pair[0], pair[0], groups, groups).whole == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("metric", [kid, cmmd])
def test_a_group_left_out_is_as_if_it_had_never_been(
    metric: object, pair: tuple[Features, Features], groups: NDArray[np.int64]
) -> None:
    features, reference = pair
    everyone = np.zeros(50, np.int64)
    for fixed in (False, True):
        found = metric.jackknife(features, reference, groups, None if fixed else groups)  # type: ignore[attr-defined]
        for group in range(6):
            rest, others = features[groups != group], reference if fixed else reference[groups != group]
            labels = everyone[: len(rest)], np.zeros(len(others), np.int64)
            alone = metric.jackknife(rest, others, *labels).whole  # type: ignore[attr-defined]
            assert found.without[group] == pytest.approx(alone, rel=1e-8)


def test_sets_of_different_size_and_order(pair: tuple[Features, Features]) -> None:
    features, reference = pair[0][:35], pair[1]
    one = kid.jackknife(features, reference, np.arange(35) % 5).whole
    assert kid.jackknife(features[::-1], reference[::-1], np.arange(35) % 7).whole == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((1, 3), (4, 3)), ((4,), (4,))])
def test_sets_that_cannot_be_compared_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    first, second = map(np.zeros, shapes)
    with pytest.raises(errors.DataError):
        mmd.jackknife(first, second, np.zeros(len(first), int), None, kid.kernel, unbiased=True)
