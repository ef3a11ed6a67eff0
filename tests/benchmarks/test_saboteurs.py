"""The gate on students of known vice. The shipped student, which is fast, stands for their teacher."""

import pathlib

import pytest

from benchmarks import saboteurs
from diffusion_kd import pipeline
from eval import gate, images, run, stats


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, gate.Verdict]:
    folder: pathlib.Path = tmp_path_factory.mktemp("saboteurs")
    plan, _ = run.plan(["--cache", str(folder), "--prompts", "400", "--device", "cpu", "--out", str(folder / "out")])
    honest = pipeline.load_student("shapes-student")
    return saboteurs.judge(plan, images.Entrant("teacher", "shapes-student", honest, "honest", 4, 0.0))


@pytest.mark.parametrize("name", [name for name, metric in saboteurs.CAUGHT_BY.items() if metric])
def test_each_vice_fails_by_the_metric_that_should_see_it(verdicts: dict[str, gate.Verdict], name: str) -> None:
    verdict = verdicts[name]
    assert verdict.outcome is stats.Outcome.FAIL
    # Of a third of the pictures: shown by itself, if not always after Holm's correction for the other floors.
    said = [check for check in verdict.checks if check.metric == saboteurs.CAUGHT_BY[name]]
    assert any(check.retention.p_above < 0.05 for check in said), [check.sentence() for check in said]
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
