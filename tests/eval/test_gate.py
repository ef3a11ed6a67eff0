"""The quality floor on scores whose worth is known."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from diffusion_kd import errors
from eval import gate, measure, stats, suites

PASS, FAIL, INCONCLUSIVE = stats.Outcome.PASS, stats.Outcome.FAIL, stats.Outcome.INCONCLUSIVE


def _suite(each: int = 60) -> suites.Suite:
    kinds = (("cats", False), ("dogs", False), ("odd", True))
    return suites.Suite("x", tuple(suites.Prompt(f"{k}{n}", k, e, f"{k}{n}") for k, e in kinds for n in range(each)))


def _shares(suite: suites.Suite, **share: float) -> NDArray[np.float64]:
    """Exactly that share of ones in each category."""
    rng, scores = np.random.default_rng(0), np.zeros(len(suite.prompts))
    for name, wanted in share.items():
        places = np.array([index for index, prompt in enumerate(suite.prompts) if prompt.category == name])
        scores[rng.permutation(places)[: round(wanted * len(places))]] = 1
    return scores


def _evidence(accuracy: NDArray[np.float64], **changes: Any) -> gate.Evidence:
    scores: measure.Scores = {
        "prompt_accuracy": accuracy,
        "clip_score": accuracy * 0.1 + 0.2,
        "diversity": accuracy + 1,
    }
    fields: dict[str, Any] = {
        "sets": {},
        "scores": scores,
        "latency_s": (1.0,) * 10,
        "pictures": 400,
        "pictures_per_prompt": 2,
        "dimensions": 16,
    }
    return gate.Evidence(**fields | changes)


def _floor(*floors: tuple[str, str, float], min_prompts: int = 16) -> gate.FloorFile:
    return gate.FloorFile(0.95, min_prompts, tuple(gate.Floor(*each) for each in floors))


SUITE = _suite()
GOOD = _evidence(_shares(SUITE, cats=1, dogs=1, odd=0.9))


def test_an_equal_student_passes_and_every_slice_is_checked() -> None:
    floor = _floor(*(("prompt_accuracy", over, 0.8) for over in gate.OVER))
    verdict = gate.judge(floor, GOOD, GOOD, SUITE)
    assert verdict.outcome is PASS
    assert {check.slice for check in verdict.checks} == {"all prompts", "cats", "dogs", "all edge cases", "odd"}
    assert verdict.sentences() == []


def test_one_bad_slice_fails_the_whole_and_is_named_with_its_interval() -> None:
    student = _evidence(_shares(SUITE, cats=1, dogs=0.5, odd=0.9))
    verdict = gate.judge(
        _floor(("prompt_accuracy", "all", 0.7), ("prompt_accuracy", "category", 0.8)), student, GOOD, SUITE
    )
    assert verdict.outcome is FAIL
    assert [check.slice for check in verdict.checks if check.outcome is FAIL] == ["dogs"]
    (sentence,) = verdict.sentences()
    assert sentence.startswith("prompt_accuracy of dogs: retention 0.500 [0.39") and sentence.endswith(
        "missed by 0.300"
    )


def test_edge_cases_are_judged_apart() -> None:
    student = _evidence(_shares(SUITE, cats=1, dogs=1, odd=0.3))
    assert gate.judge(_floor(("prompt_accuracy", "all", 0.9)), student, GOOD, SUITE).outcome is PASS
    assert gate.judge(_floor(("prompt_accuracy", "edge_cases", 0.8)), student, GOOD, SUITE).outcome is FAIL


def test_too_few_prompts_never_pass_and_never_fail() -> None:
    small = _suite(8)
    floor = _floor(("prompt_accuracy", "category", 0.5))
    good = _evidence(_shares(small, cats=1, dogs=1))
    for share in (0, 1):
        verdict = gate.judge(floor, _evidence(_shares(small, cats=share, dogs=share)), good, small)
        assert verdict.outcome is INCONCLUSIVE
        assert "8 samples cannot decide it, 16 are needed" in verdict.sentences()[0]


def test_twenty_slices_of_an_equal_student_do_not_fail_by_chance() -> None:
    """At 5 % each, one of twenty would."""
    suite = suites.Suite(
        "x", tuple(suites.Prompt(f"{k}-{n}", f"k{k}", False, f"{k} {n}") for k in range(20) for n in range(30))
    )
    floor, failed, unadjusted = _floor(("prompt_accuracy", "category", 1.0)), 0, 0
    for seed in range(15):
        rng = np.random.default_rng(seed)
        student, teacher = (_evidence((rng.random(600) < 0.7).astype(float)) for _ in range(2))
        verdict = gate.judge(floor, student, teacher, suite)
        failed += verdict.outcome is FAIL
        unadjusted += any(check.retention.p_above < 0.05 for check in verdict.checks)
    assert failed <= 2
    assert unadjusted > 5


def _distance(mean: float, spread: float = 0.002) -> stats.Jackknife:
    return stats.Jackknife(mean, tuple(mean + spread * np.random.default_rng(int(mean * 100)).standard_normal(20)))


def test_a_distance_is_kept_the_other_way_round() -> None:
    teacher = _evidence(GOOD.scores["prompt_accuracy"], sets={"fd": _distance(1.0)})
    for distance, outcome in ((0.5, PASS), (1.1, PASS), (3.0, FAIL)):
        student = _evidence(GOOD.scores["prompt_accuracy"], sets={"fd": _distance(distance)})
        verdict = gate.judge(_floor(("fd", "all", 0.75)), student, teacher, SUITE)
        assert verdict.outcome is outcome
        assert verdict.checks[0].retention.value == pytest.approx(1 / distance, rel=0.1)


def test_a_covariance_of_too_few_pictures_is_not_decided() -> None:
    teacher = _evidence(GOOD.scores["prompt_accuracy"], sets={"fd": _distance(1.0), "kid": _distance(1.0)}, pictures=31)
    floors = (("fd", "all", 0.5), ("kid", "all", 0.5))
    verdict = gate.judge(_floor(*floors), teacher, teacher, SUITE)
    assert {check.metric: check.outcome for check in verdict.checks} == {"fd": INCONCLUSIVE, "kid": INCONCLUSIVE}
    enough = dataclasses.replace(teacher, pictures=32)
    assert gate.judge(_floor(*floors), enough, enough, SUITE).outcome is PASS


def test_latency_is_a_ratio_of_times() -> None:
    student = _evidence(GOOD.scores["prompt_accuracy"], latency_s=tuple(np.linspace(0.09, 0.11, 10)))
    verdict = gate.judge(_floor(("latency", "all", 4.0)), student, GOOD, SUITE)
    assert verdict.outcome is PASS
    assert verdict.checks[0].retention.value == pytest.approx(10)
    assert gate.judge(_floor(("latency", "all", 4.0)), GOOD, GOOD, SUITE).outcome is FAIL
    hasty = _evidence(GOOD.scores["prompt_accuracy"], latency_s=(0.01,))
    once = _evidence(GOOD.scores["prompt_accuracy"], latency_s=(1.0,))
    assert gate.judge(_floor(("latency", "all", 4.0)), hasty, once, SUITE).outcome is INCONCLUSIVE


def test_a_floor_that_cannot_be_measured_is_not_passed_over() -> None:
    """A student must not pass by being measured less."""
    verdict = gate.judge(_floor(("fd", "all", 0.9), ("prompt_accuracy", "all", 0.9)), GOOD, GOOD, SUITE)
    assert verdict.outcome is INCONCLUSIVE
    assert verdict.sentences() == ["fd of all: not measured here, so the floor of 0.9 is not shown to hold"]
    standard = suites.Suite("x", tuple(prompt for prompt in SUITE.prompts if not prompt.edge_case))
    plain = _evidence(GOOD.scores["prompt_accuracy"][:120])
    verdict = gate.judge(_floor(("prompt_accuracy", "edge_cases", 0.9)), plain, plain, standard)
    assert (verdict.outcome, len(verdict.checks)) == (INCONCLUSIVE, 1)


def test_each_step_count_can_fail_so_each_needs_more_evidence() -> None:
    scores = _shares(SUITE, cats=0.86, dogs=0.86)
    one, three = (
        gate.judge(_floor(("prompt_accuracy", "all", 0.93)), _evidence(scores), GOOD, SUITE, step_counts=count)
        for count in (1, 40)
    )
    assert (one.outcome, three.outcome) == (FAIL, INCONCLUSIVE)


def test_a_run_that_lost_something_does_not_pass_but_may_fail() -> None:
    floor, remark = _floor(("prompt_accuracy", "all", 0.9)), ["1 of 180 prompts were lost"]
    verdict = gate.judge(floor, GOOD, GOOD, SUITE, remark)
    assert verdict.outcome is INCONCLUSIVE
    assert verdict.sentences() == remark
    bad = _evidence(np.zeros(len(SUITE.prompts)))
    assert gate.judge(floor, bad, GOOD, SUITE, remark).outcome is FAIL


def test_prompts_without_a_score_are_left_out_of_both() -> None:
    accuracy = _shares(SUITE, cats=1, dogs=1)
    holes = accuracy.copy()
    holes[:30] = np.nan
    verdict = gate.judge(_floor(("prompt_accuracy", "category", 0.8)), _evidence(holes), _evidence(accuracy), SUITE)
    assert {check.slice: check.retention.samples for check in verdict.checks} == {"cats": 30, "dogs": 60}


@pytest.mark.parametrize(
    ("kept", "name"), [(1.2, "excellent"), (0.95, "excellent"), (0.949, "good"), (0.7, "acceptable"), (0.69, "poor")]
)
def test_bands(kept: float, name: str) -> None:
    assert gate.band(kept) == name


@pytest.mark.parametrize("path", sorted(gate.FLOORS.iterdir()), ids=lambda path: path.stem)
def test_the_shipped_floors_can_be_read(path: pathlib.Path) -> None:
    assert {each.metric for each in gate.load(path).floors} >= {"clip_score", "latency"}


GOOD_FILE: dict[str, Any] = {
    "confidence": 0.95, "min_prompts": 16, "floors": [{"metric": "fd", "over": "all", "retention": 0.8}]
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confidence": 95}, "confidence is 95"),
        ({"confidence": True}, "confidence is True"),
        ({"min_prompts": 0}, "min_prompts is 0"),
        ({"min_prompts": 1.9}, "min_prompts is 1.9"),
        ({"confidence": float("nan")}, "confidence is nan"),
        ({"floors": []}, "floors is"),
        ({"floors": [{"metric": "fd", "over": "all"}]}, "a floor has metric, over and retention"),
        ({"floors": [{"metric": "fdi", "over": "all", "retention": 0.8}]}, "metric is 'fdi'"),
        ({"floors": [{"metric": "fd", "over": "everywhere", "retention": 0.8}]}, "over is 'everywhere'"),
        ({"floors": [{"metric": "fd", "over": "category", "retention": 0.8}]}, "over all prompts only"),
        ({"floors": [{"metric": "fd", "over": "all", "retention": "high"}]}, "retention is 'high'"),
        ({"more": 1}, "must hold confidence, min_prompts and floors"),
    ],
)
def test_a_floor_that_is_none_is_refused(tmp_path: pathlib.Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "floor.yaml"
    path.write_text(yaml.safe_dump(GOOD_FILE | change))
    with pytest.raises(errors.ConfigError, match=message):
        gate.load(path)


def test_a_floor_file_that_cannot_be_read_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "floor.yaml").write_text("a: [")
    for name in ("nowhere.yaml", "floor.yaml"):
        with pytest.raises(errors.ConfigError, match="no floor can be read"):
            gate.load(tmp_path / name)
