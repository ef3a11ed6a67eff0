"""The monitor on curves: a healthy one never goes back, each sickness is seen in time, a resumed one judges alike."""

import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from diffusion_kd import errors
from eval import runs
from eval.health import Level
from training import health
from training.health import Decision, Monitor

BATCH = 800
"""Images between two reports."""

Means = dict[str, float]


def _healthy(seed: int = 0) -> Iterator[Means]:
    """Reports as a run on shapes gives them, with the noise of its curves, without an end."""
    drawn = np.random.default_rng(seed)

    def noisy(level: float, noise: float) -> float:
        return float(level * (1 + noise * drawn.standard_normal()))

    for report in range(10**6):
        fall = 0.6 + 0.4 * math.exp(-report / 20)
        yield {
            "adversarial_latent": noisy(0.002, 0.5),
            "distillation": noisy(0.017 * fall, 0.05),
            "trajectory": noisy(0.027 * fall, 0.08),
            "student_gradient": abs(noisy(0.2, 0.2)),
            "student_skipped": 0.0,
            "hinge_latent": noisy(5.87, 0.005),
            "discriminator_gradient": abs(noisy(1.5, 0.2)),
            "discriminator_skipped": 0.0,
            "diversity": noisy(0.2, 0.05),
        }


def _feed(monitor: Monitor, count: int, change: Callable[[int, Means], Means] = lambda _, means: means) -> int | None:
    """Reports of a run that is healthy but for `change`, which is told how many have come. Returns which one, counted
    from 1, asked to go back; None if none of `count` did."""
    reports = _healthy()
    for report in range(1, count + 1):
        if monitor.report(BATCH * report, change(report, next(reports))) is Decision.ROLL_BACK:
            return report
    return None


# --- the healthy ------------------------------------------------------------------------------------


def test_a_healthy_run_is_left_alone() -> None:
    """Whatever the noise, from the first report to the thousandth."""
    for seed, reports in [(0, 1000), *((seed, 60) for seed in range(1, 21))]:
        monitor, ill = Monitor("rollback"), 0
        for report, means in zip(range(1, reports + 1), _healthy(seed), strict=False):
            assert monitor.report(BATCH * report, means) is Decision.GO_ON, (seed, report, monitor.findings)
            assert not [finding for finding in monitor.findings if finding.level == Level.BAD]
            ill += monitor.ill
        assert ill == 0


def test_plain_adds_first_reports_are_left_alone() -> None:
    """The student's gradient climbs to 5-14 within the first 200 steps and stays (docs/recipes.md); warm-up is slow."""
    monitor = Monitor("rollback")
    climbs = [0.5, 2.0, 6.0, 12.0]
    changed = {"adversarial": 2.0, "hinge": 9.9}

    def change(report: int, means: Means) -> Means:
        return means | changed | {"student_gradient": climbs[min(report, 4) - 1]}

    assert _feed(monitor, 60, change) is None
    assert monitor.findings == [] and not monitor.ill


def test_one_bad_report_is_waited_for() -> None:
    """Half of a report's steps skipped, a loss that is not finite, or three times as high, and then well again."""
    for tag, value in (("student_skipped", 0.5), ("distillation", math.nan), ("distillation", 0.04), ("diversity", 0)):
        monitor = Monitor("rollback")
        assert _feed(monitor, 60, lambda report, means: means | ({tag: value} if report == 30 else {})) is None  # noqa: B023
        assert not monitor.ill


# --- the sick ---------------------------------------------------------------------------------------


def _since(start: int, tag: str, value: Callable[[int, float], float]) -> Callable[[int, Means], Means]:
    """From report `start` on a curve is `value` of the reports since, 1 at first, and of what it would be."""
    return lambda report, means: (
        means if report < start else means | {tag: value(report - start + 1, means.get(tag, 0.0))}
    )


@pytest.mark.parametrize("start", [15, 400])
@pytest.mark.parametrize(
    ("tag", "value", "within"),
    [
        ("distillation", lambda n, usual: usual * 20, 1),
        ("distillation", lambda n, usual: usual * 4, 5),
        ("distillation", lambda n, usual: usual * 1.3**n, 10),
        ("trajectory", lambda n, usual: usual * 1.1**n, 18),
        ("distillation", lambda n, usual: math.nan, 2),
        ("distillation", lambda n, usual: math.inf, 2),
        ("student_skipped", lambda n, usual: 1.0, 1),
        ("discriminator_skipped", lambda n, usual: 0.3, 2),
        ("hinge_latent", lambda n, usual: 0.1, 5),
        ("hinge_latent", lambda n, usual: usual * 0.7**n, 11),
        ("diversity", lambda n, usual: 0.03, 2),
        ("diversity", lambda n, usual: usual * 0.8**n, 8),
        ("diversity", lambda n, usual: 0.0, 2),
    ],
    ids=[
        "far off",
        "four times",
        "diverges",
        "drifts",
        "NaN",
        "infinite",
        "all skipped",
        "some skipped",
        "D has won",
        "D is winning",
        "collapsed",
        "is collapsing",
        "black",
    ],
)
def test_each_sickness_is_seen_in_time(start: int, tag: str, value: Callable[[int, float], float], within: int) -> None:
    """Within so many reports, early in a run and late: how long it went well before does not delay it."""
    monitor, ill = Monitor("rollback"), []

    def change(report: int, means: Means) -> Means:
        ill.append(monitor.ill)  # after the report before
        return _since(start, tag, value)(report, means)

    asked = _feed(monitor, start + 30, change)
    assert asked is not None and 0 <= asked - start < within
    assert monitor.findings[0].level == Level.BAD and monitor.findings[0].tag == tag
    assert monitor.findings[0].advice and monitor.ill
    assert not any(ill[:start])


@pytest.mark.parametrize(
    ("tag", "value", "within"),
    [
        ("distillation", lambda n, usual: usual * 4, 1),
        ("distillation", lambda n, usual: usual * 1.3**n, 2),
        ("student_skipped", lambda n, usual: 0.02, 1),
        ("student_gradient", lambda n, usual: usual * 20, 1),
        ("diversity", lambda n, usual: usual * 0.8**n, 4),
    ],
    ids=["four times", "diverges", "one skipped", "gradient", "is collapsing"],
)
def test_what_looks_bad_is_no_place_to_go_back_to(tag: str, value: Callable[[int, float], float], within: int) -> None:
    """Long before it is bad enough to go back for."""
    monitor = Monitor("rollback")
    _feed(monitor, 30 + within - 1, _since(30, tag, value))
    assert monitor.ill


@pytest.mark.parametrize(("times", "goes_back"), [(20, False), (200, True)])
def test_among_the_first_reports_it_takes_more(times: float, goes_back: bool) -> None:
    """A loss still finds its size; one beyond all bounds is no place to go back to all the same."""
    monitor = Monitor("rollback")
    asked = _feed(monitor, 5, _since(5, "distillation", lambda n, usual: usual * times))
    assert monitor.ill and (asked == 5) is goes_back


def test_a_report_without_a_number_does_not_make_the_judge_forget() -> None:
    """After forty good reports and one that is NaN, twenty times the usual is still far off."""
    monitor = Monitor("rollback")
    values = {30: lambda usual: math.nan, 31: lambda usual: 20 * usual}

    def change(report: int, means: Means) -> Means:
        return means | ({"distillation": values[report](means["distillation"])} if report in values else {})

    assert _feed(monitor, 31, change) == 31


def test_a_sickness_that_is_not_reported_again_counts_once() -> None:
    """Samples come with every fifth report: one bad one is not two, however many reports lie between."""
    monitor = Monitor("rollback")
    reports = _healthy()

    def feed(report: int, diversity: float) -> Decision:
        means = next(reports)
        if report % 5:
            del means["diversity"]
        return monitor.report(BATCH * report, means | ({} if report % 5 else {"diversity": diversity}))

    for report in range(1, 21):
        assert feed(report, 0.2) is Decision.GO_ON
    for report in range(21, 30):
        assert feed(report, 0.01) is Decision.GO_ON, report
    assert monitor.ill
    assert feed(30, 0.01) is Decision.ROLL_BACK


@pytest.mark.parametrize("mode", ["watch", "off"])
def test_only_who_was_asked_to_goes_back(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor(mode)
    with caplog.at_level(logging.WARNING):
        assert _feed(monitor, 60, _since(30, "student_skipped", lambda *_: 1.0)) is None
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if "bad: The student skipped" in line]) == (1 if mode == "watch" else 0)
    assert monitor.ill is (mode == "watch")


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match="health is 'auto'; it must be one of watch, rollback, off"):
        Monitor("auto")


# --- going back -------------------------------------------------------------------------------------

SICK = _since(30, "student_skipped", lambda *_: 1.0)


def test_going_back_cuts_the_curves_and_begins_another_attempt(tmp_path: pathlib.Path) -> None:
    monitor, fellow = Monitor("rollback", tmp_path), Monitor("rollback", tmp_path)
    assert _feed(monitor, 40, SICK) == 30
    for each in (monitor, fellow):
        each.rolled_back(BATCH * 25)
        assert (each.attempt, each.ill, each.findings) == (1, False, [])
    points = monitor.state_dict()["curves"]["student_skipped"]
    assert points["images_seen"] == [BATCH * report for report in range(1, 26)] and sum(points["values"]) == 0
    (line,) = (tmp_path / runs.HEALTH).read_text().splitlines()  # who has not judged writes nothing
    told = json.loads(line)
    assert (told["action"], told["attempt"]) == ("roll_back", 1)
    assert (told["images_seen"], told["to_images"]) == (BATCH * 30, BATCH * 25)
    assert told["findings"][0]["level"] == "bad" and "skipped" in told["findings"][0]["what"]
    for report in range(26, 60):
        assert monitor.report(BATCH * report, next(_healthy(report))) is Decision.GO_ON


def test_a_checkpoint_from_before_does_not_undo_the_attempt() -> None:
    """The same process goes back twice to what was written at first."""
    monitor = Monitor("rollback")
    _feed(monitor, 20)
    before = monitor.state_dict()
    for attempt in (1, 2):
        assert monitor.report(BATCH * 30, {"student_skipped": 1.0}) is Decision.ROLL_BACK
        monitor.load_state_dict(before)
        monitor.rolled_back(BATCH * 20)
        assert monitor.attempt == attempt


def test_after_three_times_it_gives_up_on_every_process(tmp_path: pathlib.Path) -> None:
    monitor, fellow = Monitor("rollback", tmp_path), Monitor("rollback")
    for _ in range(health.MOST_ROLL_BACKS):
        assert _feed(monitor, 40, SICK) == 30
        monitor.rolled_back(BATCH * 10)
        fellow.rolled_back(BATCH * 10)
    assert monitor.attempt == fellow.attempt == 3
    assert _feed(monitor, 40, SICK) == 30
    said = r"fell ill again after 3 roll-backs, at 24,000 images: The student skipped .*Lower the learning rate.*Begin"
    with pytest.raises(errors.TrainingError, match=said):
        monitor.rolled_back(BATCH * 10)
    with pytest.raises(errors.TrainingError, match=r"after 3 roll-backs\. The main process says why"):
        fellow.rolled_back(BATCH * 10)
    told = [json.loads(line) for line in (tmp_path / runs.HEALTH).read_text().splitlines()]
    assert [each["action"] for each in told] == ["roll_back"] * 3 + ["stop"]
    assert [each["attempt"] for each in told] == [1, 2, 3, 3] and told[-1]["to_images"] is None


def test_an_account_that_cannot_be_written_ends_no_training(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / runs.HEALTH).mkdir()
    monitor = Monitor("rollback", tmp_path)
    _feed(monitor, 40, SICK)
    with caplog.at_level(logging.WARNING):
        monitor.rolled_back(BATCH * 10)
    assert "could not be written (Is a directory)" in caplog.text and monitor.attempt == 1


@pytest.mark.parametrize("broken", [3, 20, 31, 33])
def test_a_resumed_run_judges_as_the_unbroken_one(broken: int, tmp_path: pathlib.Path) -> None:
    """Also in the midst of a sickness, and through a file."""
    reports = _healthy()
    sick = _since(30, "hinge_latent", lambda *_: 0.1)
    told = [sick(report, next(reports)) for report in range(1, 41)]
    unbroken = Monitor("rollback")
    whole = [(unbroken.report(BATCH * n, means), unbroken.findings, unbroken.ill) for n, means in enumerate(told, 1)]
    assert Decision.ROLL_BACK in [decision for decision, _, _ in whole]
    first = Monitor("rollback")
    for n, means in enumerate(told[:broken], 1):
        first.report(BATCH * n, means)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = Monitor("rollback")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.ill == first.ill
    rest = [
        (resumed.report(BATCH * n, means), resumed.findings, resumed.ill)
        for n, means in enumerate(told[broken:], broken + 1)
    ]
    assert rest == whole[broken:]


# --- diversity --------------------------------------------------------------------------------------


def test_diversity_in_closed_form() -> None:
    """Of four seeds two are black and two white: 4 of 6 pairs differ, by the full range; the other prompt's by none."""
    samples = torch.full((2, 4, 3, 8, 8), -1.0)
    samples[0, :2] = 1.0
    assert health.diversity(samples) == pytest.approx((4 / 6 + 0) / 2)
    large = samples.repeat_interleave(16, -1).repeat_interleave(16, -2)
    assert health.diversity(large) == pytest.approx(1 / 3)
    samples[0, 0, 0, 0, 0] = math.nan
    assert math.isnan(health.diversity(samples))
    with pytest.raises(errors.DataError, match="two at least"):
        health.diversity(samples.nan_to_num()[:, :1])


def test_samples_are_looked_at(tmp_path: pathlib.Path) -> None:
    """The prompts' own pictures stay as different as they were; those of one prompt become one."""
    drawn = torch.rand(4, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monitor = Monitor("rollback")
    assert [monitor.report(BATCH * n, {"diversity": health.diversity(drawn)}) for n in (1, 2)] == [Decision.GO_ON] * 2
    collapsed = {"diversity": health.diversity(drawn[:, :1].expand_as(drawn))}
    assert monitor.report(BATCH * 3, collapsed) is Decision.GO_ON and monitor.ill
    assert monitor.report(BATCH * 4, collapsed) is Decision.ROLL_BACK
    assert "under different seeds they differ 0.00% as much" in monitor.findings[0].what
