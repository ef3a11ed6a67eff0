"""Each rule on a history that shows the fault, and on a near miss that does not."""

import dataclasses
import io
import math
import pathlib

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from torch.utils import tensorboard

from diffusion_kd import errors
from eval import health, runs
from eval.health import Level

POINTS = 40


def _noisy(level: NDArray[np.float64] | float, noise: float = 0.03, points: int = POINTS) -> list[float]:
    drawn = np.random.default_rng(0).standard_normal(points)
    return list(level * np.ones(points) * (1 + noise * drawn))


def _curve(tag: str, values: list[float], stage: str = "training") -> runs.Curve:
    steps = range(1, len(values) + 1)
    return runs.Curve(
        stage, tag, tuple(800 * step for step in steps), tuple(values), tuple(1000.0 + 10 * step for step in steps)
    )


RUN = runs.Run(
    name="run",
    path=pathlib.Path("run"),
    kind=runs.Kind.DISTILL,
    stages=("training",),
    last_written_s=1000.0 + 10 * POINTS,
    active=False,
    finished=True,
    checkpoint=True,
    exported=pathlib.Path("run/student"),
)


def _healthy() -> dict[str, list[float]]:
    """The shape of the demo's curves."""
    fall = np.linspace(1, 0.6, POINTS)
    return {
        "adversarial_latent": _noisy(0.002, 0.5),
        "distillation": _noisy(0.017 * fall),
        "trajectory": _noisy(0.027 * fall),
        "student_gradient": _noisy(0.2, 0.2),
        "student_skipped": [0.0] * POINTS,
        "hinge_latent": _noisy(5.87, 0.005),
        "discriminator_gradient": _noisy(1.5, 0.2),
        "discriminator_skipped": [0.0] * POINTS,
    }


def _history(changed: dict[str, list[float]], run: runs.Run = RUN) -> runs.History:
    curves = tuple(_curve(tag, values) for tag, values in (_healthy() | changed).items())
    return runs.History(run, curves, (), ())


def _worries(history: runs.History) -> list[tuple[Level, str]]:
    found = health.judge(history)
    return [(finding.level, finding.tag) for finding in found if finding.level in (Level.BAD, Level.WATCH)]


def test_a_healthy_run_gives_no_worry_and_says_so() -> None:
    found = health.judge(_history({}))
    assert {finding.level for finding in found} == {Level.OK}
    assert any("Nothing in 8 curves" in finding.what for finding in found)
    assert health.summary(found) == "Nothing points to trouble."


# --- one curve --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("at", "level"), [(-1, Level.BAD), (5, Level.WATCH)])
def test_a_value_that_is_not_finite(at: int, level: Level) -> None:
    values = _healthy()["distillation"]
    values[at] = math.nan
    assert _worries(_history({"distillation": values})) == [(level, "distillation")]


def test_infinity_in_a_short_curve_is_said_too() -> None:
    history = runs.History(RUN, (_curve("distillation", [1.0, math.inf]),), (), ())
    found = health.judge(history)
    assert [finding.level for finding in found] == [Level.BAD, Level.UNKNOWN]
    assert "1 of 2 reports, first at 1,600 images" in found[0].what


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        (0.5, [(Level.BAD, "student_skipped")]),
        (0.02, [(Level.WATCH, "student_skipped")]),
        (0.008, []),
    ],
)
def test_skipped_steps(late: float, expected: list[tuple[Level, str]]) -> None:
    assert _worries(_history({"student_skipped": [0.0] * 30 + [late] * 10})) == expected


def test_steps_that_were_skipped_long_ago_are_no_worry() -> None:
    assert _worries(_history({"student_skipped": [0.4] * 2 + [0.0] * 38})) == []
    (finding,) = health.curve_findings([_curve("student_skipped", [0.4] * 2 + [0.0] * 34 + [0.3] * 4)])
    assert "skipped 5% of its steps, 12% of the last quarter's" in finding.what


def test_one_skipped_step_of_a_first_report_is_no_worry() -> None:
    assert health.curve_findings([_curve("student_skipped", [0.02])]) == []
    assert health.curve_findings([_curve("student_skipped", [0.5])])[0].level == Level.BAD


@pytest.mark.parametrize("tag", ["distillation", "trajectory"])
@pytest.mark.parametrize(("times", "level"), [(4.0, Level.BAD), (2.0, Level.WATCH), (1.3, None)])
def test_a_loss_that_climbs_from_its_best(tag: str, times: float, level: Level | None) -> None:
    path = np.concatenate([np.linspace(2, 1, 15), np.linspace(1, times, 10), np.full(15, times)])
    worries = _worries(_history({tag: _noisy(path)}))
    assert worries == ([(level, tag)] if level else [])


def test_where_a_long_loss_was_best_is_said() -> None:
    path = np.concatenate([np.linspace(2, 1, 1000), np.linspace(1, 3, 500), np.full(500, 3.0)])
    (finding,) = health.curve_findings([_curve("distillation", list(path))])
    assert "2.5 times the best" in finding.what
    assert abs(int(finding.what.split("about ")[1].split(" images")[0].replace(",", "")) - 800 * 900) < 800 * 150


def test_a_loss_as_noisy_as_its_climb_is_left_alone() -> None:
    path = np.concatenate([np.full(30, 1.0), np.full(10, 1.6)])
    assert _worries(_history({"distillation": _noisy(path, 0.03)})) == [(Level.WATCH, "distillation")]
    alternating = path * (1 + 0.5 * (-1) ** np.arange(POINTS))
    assert _worries(_history({"distillation": list(alternating)})) == []


@pytest.mark.parametrize("tag", ["kl", "r1", "accuracy"])
def test_what_may_rise_may_rise(tag: str) -> None:
    assert _worries(_history({tag: list(np.linspace(0.1, 5, POINTS))})) == []


def _spiked(norms: list[float], at: tuple[int, ...], times: float) -> list[float]:
    usual = float(np.median(norms))
    return [times * usual if index in at else norm for index, norm in enumerate(norms)]


@pytest.mark.parametrize(
    ("at", "times", "worries"),
    [((35,), 20.0, True), ((35,), 6.0, False), ((8,), 20.0, False), ((5, 8, 11), 20.0, True)],
    ids=["a late one", "too small", "one long ago", "many long ago"],
)
def test_gradient_spikes(at: tuple[int, ...], times: float, worries: bool) -> None:
    norms = _spiked(_healthy()["student_gradient"], at, times)
    assert _worries(_history({"student_gradient": norms})) == ([(Level.WATCH, "student_gradient")] if worries else [])


@pytest.mark.parametrize(("times", "worries"), [(20.0, True), (5.0, False)])
def test_a_gradient_that_grows(times: float, worries: bool) -> None:
    norms = _noisy(0.2 * np.concatenate([np.full(20, 1.0), np.linspace(1, times, 10), np.full(10, times)]))
    found = [finding for finding in health.judge(_history({"student_gradient": norms})) if "grown" in finding.what]
    assert [finding.level for finding in found] == ([Level.WATCH] if worries else [])


def test_plain_adds_first_climb_of_the_gradient_is_usual() -> None:
    norms = _noisy(np.concatenate([np.linspace(0.5, 9, 5), np.full(35, 9.0)]))
    assert _worries(_history({"student_gradient": norms})) == []


# --- the two networks -------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "level"), [(0.3, Level.BAD), (1.2, Level.WATCH), (2.5, None)])
def test_a_discriminator_that_has_won(end: float, level: Level | None) -> None:
    """Three heads: 6 is a guess."""
    hinge = _noisy(np.concatenate([np.linspace(5.9, end, 20), np.full(20, end)]), 0.01)
    assert _worries(_history({"hinge_latent": hinge})) == ([(level, "hinge_latent")] if level else [])


@pytest.mark.parametrize(("hinge", "worries"), [([9.999] * POINTS, True), ([9.9] * POINTS, False)])
def test_a_discriminator_that_has_learnt_nothing(hinge: list[float], worries: bool) -> None:
    """Five heads. 9.9 of 10 is what healthy runs on shapes show (docs/recipes.md)."""
    assert _worries(_history({"hinge": hinge})) == ([(Level.WATCH, "hinge")] if worries else [])


def test_heads_are_counted_from_where_the_hinge_begins() -> None:
    assert health.heads(_curve("hinge", [9.9, 9.7, 5.0, 1.0])) == 5
    assert health.heads(_curve("hinge", [1.7, 1.4, 0.2])) == 1


@pytest.mark.parametrize("points", [health.FEWEST_POINTS - 1, health.FEWEST_POINTS])
def test_a_short_or_broken_hinge_is_not_judged_by_its_level(points: int) -> None:
    won = [6.0] * 3 + [0.1] * (points - 3)
    expected = [] if points < health.FEWEST_POINTS else [Level.BAD]
    assert [finding.level for finding in health.curve_findings([_curve("hinge", won)])] == expected
    (finding,) = health.curve_findings([_curve("hinge", [math.nan, *won])])
    assert (finding.level, finding.tag) == (Level.WATCH, "hinge") and "not a finite number" in finding.what


@pytest.mark.parametrize(("end", "level"), [(0.04, Level.BAD), (0.09, Level.WATCH), (0.11, None), (0.0, Level.BAD)])
def test_images_of_one_prompt_that_become_alike(end: float, level: Level | None) -> None:
    found = health.curve_findings([_curve("diversity", [0.1, 0.2, 0.2, 0.19, 0.2, end])])
    assert [(finding.level, finding.tag) for finding in found] == ([(level, "diversity")] if level else [])


def test_one_lucky_sample_sets_no_measure_for_diversity() -> None:
    """The best is the median of the three best; where nothing differed, nothing can become alike."""
    assert health.curve_findings([_curve("diversity", [0.2, 0.9, 0.2, 0.2])]) == []
    assert health.curve_findings([_curve("diversity", [0.0, 0.0, 0.0])]) == []
    assert health.curve_findings([_curve("diversity", [0.2])]) == []
    (finding,) = health.curve_findings([_curve("diversity", [0.2, 0.2, math.nan])])
    assert finding.level == Level.BAD and "not a finite number" in finding.what


# --- how the run stands -----------------------------------------------------------------------------


def test_a_run_without_an_export_has_stopped() -> None:
    stopped = dataclasses.replace(RUN, finished=False, exported=None)
    (finding,) = [each for each in health.judge(_history({}, stopped)) if each.level == Level.WATCH]
    assert "stopped, or hangs, at 32,000 images" in finding.what and "no student was exported" in finding.what
    assert "goes on from the checkpoint" in finding.advice
    lost = dataclasses.replace(stopped, checkpoint=False, kind=runs.Kind.TEACHER)
    (finding,) = [each for each in health.judge(_history({}, lost)) if each.level == Level.WATCH]
    assert "no teacher" in finding.what and "There is no checkpoint" in finding.advice


def test_a_run_that_went_on_after_its_export_and_stopped() -> None:
    (finding,) = [
        each
        for each in health.judge(_history({}, dataclasses.replace(RUN, finished=False)))
        if each.level == Level.WATCH
    ]
    assert "its student is from before it went on" in finding.what


@pytest.mark.parametrize(
    "run",
    [
        dataclasses.replace(RUN, active=True, finished=False, exported=None),
        dataclasses.replace(RUN, kind=runs.Kind.OTHER, finished=False, exported=None),
    ],
    ids=["goes on", "another program's"],
)
def test_a_run_that_goes_on_or_is_not_ours_has_not_stopped(run: runs.Run) -> None:
    assert _worries(_history({}, run)) == []


@pytest.mark.parametrize(("quiet_s", "worries"), [(650.0, True), (550.0, False)])
def test_an_active_run_without_progress(quiet_s: float, worries: bool) -> None:
    """Reports came every 10 s."""
    active = dataclasses.replace(RUN, active=True, finished=False, last_written_s=RUN.last_written_s + quiet_s)
    found = [finding for finding in health.judge(_history({}, active)) if finding.level == Level.WATCH]
    assert ["reported nothing for 11 minutes" in finding.what for finding in found] == ([True] if worries else [])


@pytest.mark.parametrize(("quiet_s", "worries"), [(1600.0, True), (1400.0, False)])
def test_where_reports_are_rare_more_intervals_pass_first(quiet_s: float, worries: bool) -> None:
    """Reports came every 300 s, in one curve; a shorter one's last was earlier and counts for nothing."""
    wall_s = tuple(300.0 * step for step in range(POINTS))
    slow = dataclasses.replace(_curve("distillation", _noisy(1.0)), wall_s=wall_s)
    brief = dataclasses.replace(_curve("r1", [1.0, 1.0]), wall_s=(0.0, 300.0))
    active = dataclasses.replace(RUN, active=True, finished=False, last_written_s=wall_s[-1] + quiet_s)
    found = health.judge(runs.History(active, (brief, slow), (), ()))
    assert [finding.level for finding in found] == ([Level.WATCH] if worries else [Level.OK])


def test_of_a_run_without_reports_nothing_is_late() -> None:
    active = dataclasses.replace(RUN, active=True, finished=False)
    assert [finding.level for finding in health.judge(runs.History(active, (), (), ()))] == [Level.UNKNOWN]


def _intervention(time_s: float, images_seen: int, to_images: int | None) -> runs.Intervention:
    return runs.Intervention("training", time_s, images_seen, to_images, 1, f"It fell ill at {images_seen}.")


def test_roll_backs_are_told() -> None:
    backs = (_intervention(1.0, 8000, 7200), _intervention(2.0, 9600, 8800))
    history = dataclasses.replace(_history({}), interventions=backs[:1])
    (finding,) = [each for each in health.judge(history) if each.level == Level.WATCH]
    assert (
        finding.what == "The training rolled back once, last from 8,000 to 7,200 images, because: It fell ill at 8000."
    )
    (finding,) = health.judge(dataclasses.replace(history, interventions=backs))
    assert "rolled back 2 times, last from 9,600 to 8,800 images, because: It fell ill at 9600." in finding.what


@pytest.mark.parametrize(("time_s", "levels"), [(2e9, [Level.BAD, Level.WATCH]), (1.0, [Level.WATCH])])
def test_a_training_that_gave_up_says_so_until_it_goes_on(time_s: float, levels: list[Level]) -> None:
    """A report that was written later tells that it went on."""
    gave_up = (_intervention(0.5, 8000, 7200), _intervention(time_s, 9600, None))
    found = health.judge(dataclasses.replace(_history({}), interventions=gave_up))
    assert [finding.level for finding in found] == levels
    assert ("gave up at 9,600 images" in found[0].what) == (levels[0] == Level.BAD)


# --- the pictures -----------------------------------------------------------------------------------


def _png(pictures: NDArray[np.float64]) -> bytes:
    """pictures: (rows, 8, size, size, 3) in [0, 1]."""
    rows, columns, size = pictures.shape[:3]
    pixels = pictures.swapaxes(1, 2).reshape(rows * size, columns * size, 3)
    written = io.BytesIO()
    PIL.Image.fromarray((255 * pixels).round().astype(np.uint8)).save(written, "PNG")
    return written.getvalue()


def _pictures(likeness: float) -> NDArray[np.float64]:
    """Two rows; the second's pictures are alike to this share."""
    drawn = np.random.default_rng(0).random((2, 8, 16, 16, 3))
    drawn[1] = likeness * drawn[1, :1] + (1 - likeness) * drawn[1]
    return drawn


def _with_grids(folder: pathlib.Path, last: NDArray[np.float64]) -> runs.History:
    writer = tensorboard.SummaryWriter(str(folder / "training"))
    for step, pictures in ((800, _pictures(0.0)), (1600, last)):
        pixels = np.asarray(PIL.Image.open(io.BytesIO(_png(pictures))))
        writer.add_image("samples", pixels, step, dataformats="HWC")
    writer.close()
    (run,) = runs.find(folder)
    return dataclasses.replace(_history({}), grids=runs.read(run).grids)


@pytest.mark.parametrize(("likeness", "level"), [(0.9, Level.BAD), (0.6, Level.WATCH), (0.3, None)])
def test_pictures_that_become_alike(tmp_path: pathlib.Path, likeness: float, level: Level | None) -> None:
    history = _with_grids(tmp_path, _pictures(likeness))
    assert _worries(history) == ([(level, "samples")] if level else [])
    if level:
        worst = health.judge(history)[0]
        assert "in row 2 of the grid at 1,600 images" in worst.what
        assert f"{1 - likeness:.0%} as much" in worst.what


def test_grids_that_are_gone_or_of_another_shape_are_left_out(tmp_path: pathlib.Path) -> None:
    history = _with_grids(tmp_path, _pictures(1.0)[:1])
    assert _worries(history) == []
    history = _with_grids(tmp_path / "again", _pictures(1.0))
    for path in (tmp_path / "again" / "training").iterdir():
        path.unlink()
    assert _worries(history) == []


def test_the_difference_of_pictures_in_closed_form() -> None:
    """Half of a row is black and half white: 16 of 28 pairs differ, by 1. A grey row differs in nothing."""
    pictures = np.zeros((2, 8, 4, 4, 3))
    pictures[0, ::2], pictures[1] = 1.0, 0.5
    assert health.row_differences(_png(pictures)) == pytest.approx((16 / 28, 0.0))
    large = pictures.repeat(32, 2).repeat(32, 3)  # 128 px, compared at 64
    assert health.row_differences(_png(large)) == pytest.approx((16 / 28, 0.0))


@pytest.mark.parametrize(
    ("png", "said"),
    [
        (b"no picture", "is no picture"),
        (_png(np.zeros((1, 7, 4, 4, 3))), "28 x 4 px; it must hold 8"),
        (_png(np.zeros((2, 8, 8, 8, 3)))[:50], "is no picture"),
    ],
    ids=["no picture", "seven columns", "half a file"],
)
def test_what_is_no_grid_is_refused(png: bytes, said: str) -> None:
    with pytest.raises(errors.DataError, match=said):
        health.row_differences(png)


# --- the verdict ------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [0, 1, health.FEWEST_POINTS - 1])
def test_too_little_to_judge_by_is_said(points: int) -> None:
    """Even where the few points would break a rule."""
    curves = (_curve("distillation", [4.0**step for step in range(points)]),)
    found = health.judge(runs.History(RUN, curves, (), ()))
    assert [finding.level for finding in found] == [Level.UNKNOWN]
    assert f"{points} point{'' if points == 1 else 's'}," in found[0].what
    assert health.summary(found) == health.summary([]) == "Too early to judge."


def test_the_worst_comes_first_and_makes_the_sentence() -> None:
    climbing = list(np.concatenate([np.full(30, 1.0), np.full(10, 2.0)]))
    history = _history({"trajectory": climbing, "student_skipped": [0.9] * POINTS, "hinge_latent": [0.01] * POINTS})
    found = health.judge(history)
    assert [finding.level for finding in found[:3]] == [Level.BAD, Level.BAD, Level.WATCH]
    assert health.summary(found).startswith("In trouble: ") and health.summary(found).endswith("(and 1 more).")
    watched = [finding for finding in found if finding.level != Level.BAD]
    assert health.summary(watched).startswith("Worth a look: trajectory has climbed")


def test_stages_are_judged_apart() -> None:
    climbing = list(np.concatenate([np.full(30, 1.0), np.full(10, 4.0)]))
    found = health.curve_findings([_curve("cells", climbing, "vae"), _curve("cells", _noisy(1.0), "unet")])
    assert [(finding.stage, finding.level) for finding in found if finding.level == Level.BAD] == [("vae", Level.BAD)]
