"""The gate on students of known vice. The shipped student, which is fast, stands for their teacher."""

import dataclasses
import pathlib

import pytest

from benchmarks import saboteurs
from diffusion_kd import pipeline
from eval import gate, images, run, stats, suites


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, gate.Verdict]:
    folder: pathlib.Path = tmp_path_factory.mktemp("saboteurs")
    plan, _ = run.plan(["--cache", str(folder), "--device", "cpu", "--out", str(folder / "out")])
    everything = plan.suite
    standard = suites.Suite("standard", tuple(everything.prompts[place] for place in everything.standard))
    plan = dataclasses.replace(plan, suite=standard)
    honest = pipeline.load_student("shapes-student")
    return saboteurs.judge(plan, images.Entrant("teacher", "shapes-student", honest, "honest", 1, 0.0))


@pytest.mark.parametrize("name", [name for name, metric in saboteurs.CAUGHT_BY.items() if metric])
def test_each_vice_fails_by_the_metric_that_should_see_it(verdicts: dict[str, gate.Verdict], name: str) -> None:
    verdict = verdicts[name]
    assert verdict.outcome is stats.Outcome.FAIL
    missed = {check.metric for check in verdict.checks if check.outcome is stats.Outcome.FAIL}
    assert saboteurs.CAUGHT_BY[name] in missed
    assert name in saboteurs.table(verdicts)


def test_a_swap_is_seen_by_what_reads_prompts_and_a_collapse_by_diversity_alone(
    verdicts: dict[str, gate.Verdict],
) -> None:
    failed = {
        name: {check.metric for check in verdict.checks if check.outcome is stats.Outcome.FAIL}
        for name, verdict in verdicts.items()
    }
    assert {"prompt_accuracy", "clip_score"} <= failed["swapped"]
    assert failed["collapsed"] == {"diversity"}


def test_the_teacher_at_other_seeds_misses_no_floor(verdicts: dict[str, gate.Verdict]) -> None:
    assert [check for check in verdicts["twin"].checks if check.outcome is stats.Outcome.FAIL] == []
