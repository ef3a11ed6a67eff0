"""Statistics against closed forms, published values and simulation."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from diffusion_kd import errors
from eval import stats
from eval.metrics import frechet


@pytest.mark.parametrize(
    ("successes", "total", "expected"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (5, 10, (0.2366, 0.7634)), (81, 263, (0.2553, 0.3662))],
)
def test_known_wilson_intervals(successes: int, total: int, expected: tuple[float, float]) -> None:
    """The last is Newcombe's 1998 example (81 of 263, table I)."""
    assert stats.wilson_interval(successes, total) == pytest.approx(expected, abs=5e-5)


def test_more_confidence_is_wider() -> None:
    low, high = stats.wilson_interval(5, 10)
    wider_low, wider_high = stats.wilson_interval(5, 10, confidence=0.99)
    assert wider_low < low < high < wider_high


# --- jackknife --------------------------------------------------------------------------------------


def _jackknife_of(statistic: object, values: NDArray[np.float64], groups: int) -> stats.Jackknife:
    labels = np.arange(len(values)) % groups
    without = tuple(float(statistic(values[labels != group])) for group in range(groups))  # type: ignore[operator]
    return stats.Jackknife(float(statistic(values)), without)  # type: ignore[operator]


def test_the_error_of_a_mean_is_the_textbook_s() -> None:
    values = np.random.default_rng(0).standard_normal(40)
    found = _jackknife_of(np.mean, values, 40)
    assert found.corrected == pytest.approx(values.mean(), abs=1e-12)
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(40))


def test_the_bias_of_a_variance_is_taken_away() -> None:
    values = np.random.default_rng(1).standard_normal(60)
    assert _jackknife_of(np.var, values, 60).corrected == pytest.approx(values.var(ddof=1), rel=1e-9)


def test_a_statistic_without_groups_has_no_interval() -> None:
    assert stats.Jackknife(2.0).interval() is None
    assert stats.Jackknife(2.0).corrected == 2
    assert math.isnan(stats.Jackknife(2.0).standard_error)


def test_the_interval_holds_the_truth_where_the_naive_bootstrap_excludes_its_own_estimate() -> None:
    """Two samples of one Gaussian: the truth is 0. `benchmarks.coverage` repeats this many times."""
    rng = np.random.default_rng(2)
    first, second = rng.standard_normal((2, 600, 48))
    groups = np.arange(600) % stats.GROUPS
    found = frechet.jackknife(first, second, groups, groups)
    low, high = found.interval() or (0, 0)
    assert low < 0 < high < found.whole
    resampled = []
    for _ in range(40):
        rows = rng.integers(0, 600, (2, 600))
        resampled.append(frechet.frechet_distance(first[rows[0]], second[rows[1]]))
    assert np.quantile(resampled, 0.025) > found.whole


# --- retention of set distances ---------------------------------------------------------------------


def _estimate(mean: float, spread: float, seed: int) -> stats.Jackknife:
    return stats.Jackknife(mean, tuple(mean + spread * np.random.default_rng(seed).standard_normal(20)))


@pytest.mark.parametrize("floor", [0.5, 0.9, 1.1, 1.4])
def test_the_interval_holds_exactly_the_floors_that_the_test_does_not_reject(floor: float) -> None:
    teacher, student = _estimate(1.0, 0.01, 0), _estimate(1.05, 0.01, 1)
    found = stats.jackknife_retention(teacher, student, floor, 100, confidence=0.9)
    low, high = found.interval
    assert low is not None and high is not None
    for edge, p_value in ((low, "p_below"), (high, "p_above")):
        at_the_edge = stats.jackknife_retention(teacher, student, edge, 100, confidence=0.9)
        assert getattr(at_the_edge, p_value) == pytest.approx(0.05, abs=1e-6)
    assert (found.p_below < 0.05) == (floor < low)
    assert (found.p_above < 0.05) == (floor > high)


def test_a_distance_that_may_be_zero_has_no_bounded_ratio() -> None:
    found = stats.jackknife_retention(_estimate(1.0, 0.01, 0), _estimate(0.001, 0.1, 1), 0.8, 100)
    assert found.interval == (None, None)


def test_a_student_that_copies_its_teacher_passes_with_certainty() -> None:
    teacher = _estimate(1.0, 0.01, 0)
    found = stats.jackknife_retention(teacher, teacher, 0.75, 100)
    assert found.value == pytest.approx(1)
    assert found.outcome(0.05) is stats.Outcome.PASS
    assert (
        stats.jackknife_retention(stats.Jackknife(0, (0.0,) * 20), stats.Jackknife(0, (0.0,) * 20), 0.75, 9).p_below
        == 0.5
    )


# --- retention of means over prompts ----------------------------------------------------------------


def _scores(share: float, count: int, seed: int) -> NDArray[np.float64]:
    """Exactly that share of ones."""
    return np.random.default_rng(seed).permutation((np.arange(count) < share * count).astype(float))


def test_three_outcomes() -> None:
    teacher = _scores(0.95, 400, 0)
    cases = {0.93: stats.Outcome.PASS, 0.5: stats.Outcome.FAIL, 0.83: stats.Outcome.INCONCLUSIVE}
    for share, outcome in cases.items():
        student = _scores(share, 400, 1)
        assert stats.bootstrap_retention(student, teacher, 0.87, pass_fail=True).outcome(0.05) is outcome


def test_a_few_perfect_prompts_prove_nothing() -> None:
    """Resampled alone they would have no spread, and pass."""
    found = stats.bootstrap_retention(np.ones(8), np.ones(8), 0.9, pass_fail=True)
    assert found.outcome(0.05) is stats.Outcome.INCONCLUSIVE
    assert found.interval[0] is not None and found.interval[0] < 0.9 < 1 <= (found.interval[1] or 0)
    assert (
        stats.bootstrap_retention(np.ones(100), np.ones(100), 0.9, pass_fail=True).outcome(0.05) is stats.Outcome.PASS
    )


def test_pairing_removes_what_prompts_have_in_common() -> None:
    rng = np.random.default_rng(3)
    teacher = rng.uniform(0.2, 0.4, 200)
    student = teacher - 0.01 + 0.001 * rng.standard_normal(200)
    paired = stats.bootstrap_retention(student, teacher, 0.9)
    shuffled = stats.bootstrap_retention(rng.permutation(student), teacher, 0.9)
    width, other = ((high or 9) - (low or 0) for low, high in (paired.interval, shuffled.interval))
    assert width < other / 10


def test_the_same_data_give_the_same_interval() -> None:
    one, other = _scores(0.9, 50, 0), _scores(0.8, 50, 1)
    assert stats.bootstrap_retention(one, other, 0.9) == stats.bootstrap_retention(one, other, 0.9)


def test_a_teacher_without_score_has_no_ratio() -> None:
    found = stats.bootstrap_retention(np.full(30, 0.1), np.linspace(-1, 1, 30), 0.9)
    assert found.outcome(0.05) is stats.Outcome.INCONCLUSIVE
    assert found.interval == (None, None)


@pytest.mark.parametrize("shapes", [((0,), (0,)), ((3,), (4,)), ((2, 2), (2, 2))])
def test_scores_that_are_no_pairs_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(errors.DataError, match="paired scores"):
        stats.bootstrap_retention(np.zeros(shapes[0]), np.zeros(shapes[1]), 0.9)


def test_holm_s_own_way() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_an_interval_of_a_mean_is_about_the_textbook_s() -> None:
    values = np.random.default_rng(4).standard_normal(300)
    low, high = stats.bootstrap_interval(values)
    reach = 1.96 * values.std() / math.sqrt(300)
    assert (low, high) == pytest.approx((values.mean() - reach, values.mean() + reach), abs=0.01)
