"""Runs on disk: which are found, that curves read back as they were written, and that nothing damaged is fatal."""

import json
import os
import pathlib
import shutil
import sys
import time

import accelerate
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator
from torch import nn
from torch.utils import tensorboard

from diffusion_kd import errors
from eval import runs
from training import checkpoint, health, loop, teacher

Written = dict[int, float]
NOW_S = 2_000_000_000.0


def _write(stage: pathlib.Path, points: dict[str, Written], grids: dict[int, int] | None = None) -> pathlib.Path:
    """An event file as a training leaves it. grids: images seen -> shade of a 16 x 8 picture."""
    before = set(stage.glob("*")) if stage.is_dir() else set()
    writer = tensorboard.SummaryWriter(str(stage), filename_suffix=f".{len(before)}")
    for tag, written in points.items():
        for step, value in written.items():
            writer.add_scalar(tag, value, step)
    for step, shade in (grids or {}).items():
        writer.add_image("samples", torch.full((3, 8, 16), shade, dtype=torch.uint8), step)
    writer.close()
    (new,) = set(stage.glob("*")) - before
    return new


def _age(folder: pathlib.Path, age_s: float) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (NOW_S - age_s, NOW_S - age_s))


def _history(folder: pathlib.Path) -> runs.History:
    (run,) = runs.find(folder)
    return runs.read(run)


def _curve_of(history: runs.History, tag: str) -> runs.Curve:
    (curve,) = [curve for curve in history.curves if curve.tag == tag]
    return curve


def _points(history: runs.History, tag: str) -> Written:
    curve = _curve_of(history, tag)
    return dict(zip(curve.images_seen, curve.values, strict=True))


# --- finding ----------------------------------------------------------------------------------------


def test_a_run_tells_what_it_holds(tmp_path: pathlib.Path) -> None:
    run = tmp_path / "mine" / "first"
    _write(run / "training", {"distillation": {16: 1.0}})
    (run / "training" / runs.CHECKPOINT).write_bytes(b"weights")
    (run / "config.yaml").write_text("seed: 3\n")
    (run / "student").mkdir()
    _age(run, 1000)
    (found,) = runs.find(tmp_path, now_s=NOW_S)
    assert (found.name, found.path, found.kind, found.stages) == ("mine/first", run, runs.Kind.DISTILL, ("training",))
    assert (found.config, found.exported) == ("seed: 3\n", run / "student")
    assert (found.checkpoint, found.active, found.finished) == (True, False, True)
    assert found.last_written_s == pytest.approx(NOW_S - 1000)


def test_a_teachers_stages_come_in_their_order_and_what_is_no_stage_does_not(tmp_path: pathlib.Path) -> None:
    for stage in ("unet", "vae", "contrastive", "encoder"):
        _write(tmp_path / "teacher" / stage, {stage: {16: 1.0}})
    (tmp_path / "teacher" / "origin.json").write_text("{}")
    (found,) = runs.find(tmp_path)
    assert (found.kind, found.stages) == (runs.Kind.TEACHER, ("contrastive", "vae", "unet"))
    assert (found.config, found.exported, found.checkpoint) == (None, None, False)


def test_the_run_that_wrote_last_comes_first(tmp_path: pathlib.Path) -> None:
    for name, age_s in (("a", 900), ("b", 10), ("c", 5000)):
        _write(tmp_path / name / "training", {"l1": {1: 1.0}})
        _age(tmp_path / name, age_s)
    assert [run.name for run in runs.find(tmp_path, now_s=NOW_S)] == ["b", "a", "c"]


def test_a_run_that_is_the_folder_itself_and_one_of_another_program(tmp_path: pathlib.Path) -> None:
    _write(tmp_path / "foreign", {"accuracy": {1: 0.5}})
    (found,) = runs.find(tmp_path)
    assert (found.name, found.kind, found.stages) == ("foreign", runs.Kind.OTHER, ("foreign",))
    (itself,) = runs.find(tmp_path / "foreign")
    assert itself.name == "."
    assert runs.read(itself).curves == runs.read(found).curves != ()


@pytest.mark.parametrize(("age_s", "active"), [(runs.ACTIVE_S - 1, True), (runs.ACTIVE_S + 1, False)])
def test_a_run_is_active_for_some_minutes(tmp_path: pathlib.Path, age_s: float, active: bool) -> None:
    _write(tmp_path / "training", {"l1": {1: 1.0}})
    _age(tmp_path, age_s)
    (found,) = runs.find(tmp_path, now_s=NOW_S)
    assert (found.active, found.finished) == (active, False)


def test_a_checkpoint_keeps_a_run_active_and_an_export_ends_it(tmp_path: pathlib.Path) -> None:
    _write(tmp_path / "training", {"l1": {1: 1.0}})
    _age(tmp_path, 5000)
    unfinished = tmp_path / "training" / (runs.CHECKPOINT + ".unfinished")
    unfinished.write_bytes(b"half")
    os.utime(unfinished, (NOW_S - 20, NOW_S - 20))
    assert runs.find(tmp_path, now_s=NOW_S)[0].active
    (tmp_path / "student").mkdir()
    os.utime(tmp_path / "student", (NOW_S - 10, NOW_S - 10))
    (found,) = runs.find(tmp_path, now_s=NOW_S)
    assert (found.active, found.finished) == (False, True)
    os.utime(tmp_path / "student", (NOW_S - 5000, NOW_S - 5000))
    (found,) = runs.find(tmp_path, now_s=NOW_S)
    assert (found.active, found.finished) == (True, False)


def test_checkpoints_in_folders_of_their_own(tmp_path: pathlib.Path) -> None:
    """One that is being written keeps the run active and is none yet; so is what a killed run left."""
    checkpoints = tmp_path / "training" / runs.CHECKPOINTS
    unfinished = checkpoints / ".step-000000100.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "state.pt").write_bytes(b"half")
    _write(tmp_path / "training", {"l1": {1: 1.0}})
    _age(tmp_path, 5000)
    os.utime(unfinished / "state.pt", (NOW_S - 20, NOW_S - 20))
    (found,) = runs.find(tmp_path, now_s=NOW_S)
    assert (found.active, found.checkpoint, found.stages) == (True, False, ("training",))
    unfinished.rename(checkpoints / "step-000000100")
    (found,) = runs.find(tmp_path, now_s=NOW_S)
    assert (found.active, found.checkpoint, found.last_written_s) == (True, True, NOW_S - 20)


def test_links_are_not_followed(tmp_path: pathlib.Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    _write(outside / "secret" / "training", {"l1": {1: 1.0}})
    (outside / "secret.txt").write_text("password")
    _write(inside / "run" / "training", {"l1": {1: 1.0}})
    (inside / "linked").symlink_to(outside / "secret")
    (inside / "run" / "config.yaml").symlink_to(outside / "secret.txt")
    (inside / "run" / "student").symlink_to(outside)
    (found,) = runs.find(inside)
    assert (found.name, found.config, found.exported) == ("run", None, None)


def test_only_so_deep_and_nothing_hidden(tmp_path: pathlib.Path) -> None:
    deep = tmp_path.joinpath(*"abcd")
    _write(deep / "training", {"l1": {1: 1.0}})
    _write(tmp_path / ".student.old" / "training", {"l1": {1: 1.0}})
    assert [run.name for run in runs.find(tmp_path)] == ["a/b/c/d"]
    deep.rename(deep.parent / "x")
    (deep.parent / "d").mkdir()
    (deep.parent / "x").rename(deep / "e")
    assert runs.find(tmp_path) == []


def test_no_folder_and_one_that_cannot_be_read_are_passed_over(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs.find(tmp_path / "none") == []
    for name in ("closed", "open"):
        _write(tmp_path / name / "training", {"l1": {1: 1.0}})
    scandir = os.scandir

    def refuse(path: pathlib.Path) -> object:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [run.name for run in runs.find(tmp_path)] == ["open"]


# --- reading ----------------------------------------------------------------------------------------


def test_what_was_written_is_read_back(tmp_path: pathlib.Path) -> None:
    falling = {step * 16: 1 / step for step in range(1, 300)}
    odd = {16: float("nan"), 32: float("inf"), 48: -1.5}
    before_s = time.time()
    _write(tmp_path / "training", {"distillation": falling, "odd": odd}, {160: 10, 320: 200})
    history = _history(tmp_path)
    assert [curve.tag for curve in history.curves] == ["distillation", "odd"]
    assert _points(history, "distillation") == pytest.approx(falling)
    read = _points(history, "odd")
    assert np.isnan(read[16]) and read[32] == float("inf") and read[48] == -1.5
    curve = _curve_of(history, "distillation")
    assert curve.stage == "training"
    assert before_s - 1 <= curve.wall_s[0] <= curve.wall_s[-1] <= time.time() + 1
    assert [(grid.images_seen, grid.tag) for grid in history.grids] == [(160, "samples"), (320, "samples")]
    assert all(grid.png.startswith(b"\x89PNG") for grid in history.grids)
    assert history.grids[0].png != history.grids[1].png
    assert history.notes == ()


class _Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"l1": self.line(x).abs().mean(), "squared": self.line(x).square().mean()}


def test_a_training_that_was_resumed_reads_as_tensorboard_reads_it(tmp_path: pathlib.Path) -> None:
    """The first half, then the rest from its checkpoint: two event files that do not overlap."""
    module = _Toy()
    for images in (40, 80):
        config = loop.LoopConfig(images=images, batch_size=2, learning_rate=0.01, log_every_steps=4)
        loop.fit(
            accelerate.Accelerator(cpu=True),
            [loop.Learner("student", module, 0.01)],
            lambda place: {"x": torch.full((2, 2), 1.0 + place.step)},
            config,
            tmp_path / "training",
            averaged=module,
            on_report=lambda seen, progress: progress.picture("samples", torch.full((3, 8, 16), seen / 255), seen),
        )
    history = _history(tmp_path)
    tags = {"l1", "squared", "student_gradient", "student_skipped", "images_per_s"}
    assert {curve.tag for curve in history.curves} == tags
    assert (history.run.stages, history.run.checkpoint) == (("training",), True)
    oracle = event_accumulator.EventAccumulator(str(tmp_path / "training"), {"scalars": 0, "images": 0})
    oracle.Reload()
    for curve in history.curves:
        scalars = oracle.Scalars(curve.tag)
        assert curve.images_seen == tuple(scalar.step for scalar in scalars) == tuple(range(8, 81, 8))
        assert curve.values == tuple(scalar.value for scalar in scalars)
        assert curve.wall_s == tuple(scalar.wall_time for scalar in scalars)
    assert [grid.png for grid in history.grids] == [each.encoded_image_string for each in oracle.Images("samples")]


def _intervene(stage: pathlib.Path, *told: tuple[float, int, int | None, int]) -> None:
    """told: when, where, where to, and the attempt."""
    lines = []
    for time_s, images_seen, to_images, attempt in told:
        finding = {"level": "bad", "what": f"It fell ill at {images_seen}.", "advice": "", "stage": "", "tag": "l1"}
        watched = finding | {"level": "watch", "what": "Nothing much."}
        line = {"time_s": time_s, "images_seen": images_seen, "to_images": to_images, "attempt": attempt}
        lines.append(json.dumps(line | {"findings": [finding, watched]}) + "\n")
    (stage / runs.HEALTH).write_text("".join(lines))


def _write_at(stage: pathlib.Path, points: list[tuple[float, int]]) -> None:
    """Points (when, images seen) of one event file; the value is when."""
    writer = tensorboard.SummaryWriter(str(stage))
    for wall_s, step in points:
        writer.add_scalar("l1", wall_s, step, walltime=wall_s)
        writer.add_image("samples", torch.zeros(3, 8, 16), step, walltime=wall_s)
    writer.close()


def test_what_a_run_went_back_over_is_left_out(tmp_path: pathlib.Path) -> None:
    """From 4 to 2 after 40 s, then on to 5: within one file, at once, and only what was written before."""
    stage = tmp_path / "training"
    _write_at(stage, [(10, 1), (20, 2), (30, 3), (40, 4)])
    _intervene(stage, (41.0, 4, 2, 1))
    history = _history(tmp_path)
    assert _points(history, "l1") == {1: 10.0, 2: 20.0}
    assert [grid.images_seen for grid in history.grids] == [1, 2]
    shutil.rmtree(stage)
    _write_at(stage, [(10, 1), (20, 2), (30, 3), (40, 4), (50, 3), (60, 4), (70, 5)])
    _intervene(stage, (41.0, 4, 2, 1))
    assert _points(_history(tmp_path), "l1") == {1: 10.0, 2: 20.0, 3: 50.0, 4: 60.0, 5: 70.0}
    assert history.interventions == (runs.Intervention("training", 41.0, 4, 2, 1, "It fell ill at 4."),)


def test_an_account_is_read_as_far_as_it_can_be(tmp_path: pathlib.Path) -> None:
    """A run that was killed and came to the same point tells it twice; a line that is not whole is passed over."""
    stage = tmp_path / "training"
    _write(stage, {"l1": {1: 1.0}})
    _intervene(stage, (10.0, 4, 2, 1), (20.0, 4, 2, 1), (30.0, 8, None, 3))
    account = stage / runs.HEALTH
    account.write_text('[1]\n{"time_s": 3}\nnull\n\n' + account.read_text() + '{"time_s": 40.0, "images')
    found = [(each.time_s, each.to_images) for each in _history(tmp_path).interventions]
    assert found == [(20.0, 2), (30.0, None)]
    account.rename(tmp_path / "elsewhere")
    account.symlink_to(tmp_path / "elsewhere")
    assert _history(tmp_path).interventions == ()
    account.unlink()
    account.mkdir()
    assert _history(tmp_path).interventions == ()


def test_what_the_monitor_writes_is_what_is_read(tmp_path: pathlib.Path) -> None:
    stage = tmp_path / "training"
    _write(stage, {"l1": {1: 1.0}})
    monitor = health.Monitor("rollback", stage)
    for images_seen in (800, 1600):
        assert monitor.report(images_seen, {"student_skipped": 1.0}) is health.Decision.ROLL_BACK
    monitor.rolled_back(400)
    (told,) = _history(tmp_path).interventions
    assert (told.stage, told.images_seen, told.to_images, told.attempt) == ("training", 1600, 400, 1)
    assert told.why.startswith("The student skipped 100% of its steps")
    assert told.time_s == pytest.approx(time.time(), abs=60)


def test_the_names_are_those_of_training() -> None:
    assert (runs.CHECKPOINTS, runs.TEACHER_STAGES) == (checkpoint.FOLDER, teacher.STAGES)


def test_only_a_file_that_has_changed_is_read_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "training", {"l1": {1: 1.0, 2: 2.0}})
    whole = path.read_bytes()
    longer = _write(tmp_path / "other" / "training", {"l1": {1: 1.0, 2: 2.0, 3: 3.0}}).read_bytes()
    shutil.rmtree(tmp_path / "other")
    assert len(longer) > len(whole)
    (run,) = runs.find(tmp_path)
    first = runs.read(run)
    assert _points(first, "l1") == {1: 1.0, 2: 2.0}
    opened: list[pathlib.Path] = []
    events = runs._events
    monkeypatch.setattr(runs, "_events", lambda path, size: opened.append(path) or events(path, size))
    assert runs.read(run) == first
    assert opened == []
    with path.open("ab") as file:
        file.write(longer[len(whole) : -3])
    assert _points(runs.read(run), "l1") == {1: 1.0, 2: 2.0}
    with path.open("ab") as file:
        file.write(longer[-3:])
    assert _points(runs.read(run), "l1") == {1: 1.0, 2: 2.0, 3: 3.0}
    assert opened == [path, path]


def test_of_a_resumed_run_the_repeated_steps_count(tmp_path: pathlib.Path) -> None:
    """Killed after 50, it went on from a checkpoint at 25 and reports at other steps: 40 and 50 led nowhere."""
    _write(tmp_path / "training", {"l1": {10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0, 50: 5.0}}, {20: 1, 40: 2})
    _write(tmp_path / "training", {"l1": {30: 30.0, 45: 45.0}}, {45: 3})
    history = _history(tmp_path)
    assert _points(history, "l1") == {10: 1.0, 20: 2.0, 30: 30.0, 45: 45.0}
    assert [grid.images_seen for grid in history.grids] == [20, 45]


def test_of_two_points_at_one_step_the_later_counts(tmp_path: pathlib.Path) -> None:
    writer = tensorboard.SummaryWriter(str(tmp_path / "training"))
    for step, value, wall_s in ((20, 1.0, 50.0), (10, 2.0, 60.0), (20, 3.0, 70.0), (30, 4.0, 80.0)):
        writer.add_scalar("l1", value, step, walltime=wall_s)
    writer.close()
    curve = _curve_of(_history(tmp_path), "l1")
    assert (curve.images_seen, curve.values, curve.wall_s) == ((10, 20, 30), (2.0, 3.0, 4.0), (60.0, 70.0, 80.0))


def test_a_session_that_reported_nothing_leaves_the_others_as_they_are(tmp_path: pathlib.Path) -> None:
    _write(tmp_path / "training", {"l1": {10: 1.0, 20: 2.0}}, {20: 1})
    _write(tmp_path / "training", {})
    history = _history(tmp_path)
    assert _points(history, "l1") == {10: 1.0, 20: 2.0}
    assert [grid.images_seen for grid in history.grids] == [20]


def test_stages_keep_apart(tmp_path: pathlib.Path) -> None:
    _write(tmp_path / "vae", {"cells": {10: 1.0, 20: 2.0}})
    _write(tmp_path / "unet", {"cells": {10: 3.0}})
    history = _history(tmp_path)
    assert [(curve.stage, curve.values) for curve in history.curves] == [("vae", (1.0, 2.0)), ("unet", (3.0,))]


def test_a_file_that_ends_within_a_record_shows_what_is_whole(tmp_path: pathlib.Path) -> None:
    path = _write(tmp_path / "training", {"l1": {1: 1.0, 2: 2.0, 3: 3.0}})
    path.write_bytes(path.read_bytes()[:-5])
    going_on = _history(tmp_path)
    assert going_on.run.active
    assert _points(going_on, "l1") == {1: 1.0, 2: 2.0}
    assert going_on.notes == ()
    _age(tmp_path, 9000)
    (run,) = runs.find(tmp_path, now_s=NOW_S)
    (note,) = runs.read(run).notes
    assert "ends within a record" in note and path.name in note


@pytest.mark.parametrize("content", [b"not an event file at all, whatever it may be called", b"\0" * 400, b"\xff" * 7])
def test_a_file_that_is_none_is_said_and_skipped(tmp_path: pathlib.Path, content: bytes) -> None:
    _write(tmp_path / "training", {"l1": {1: 1.0}})
    (tmp_path / "training" / "events.out.tfevents.1.bad").write_bytes(content)
    _age(tmp_path, 9000)
    (run,) = runs.find(tmp_path, now_s=NOW_S)
    history = runs.read(run)
    assert _points(history, "l1") == {1: 1.0}
    (note,) = history.notes
    assert note.startswith("training/events.out.tfevents.1.bad ends within a record, or is damaged, after 0 bytes")


@pytest.mark.parametrize("damage", [b"\x5a", b"\0"], ids=["noise", "zeros, as a crash leaves them"])
def test_damage_in_the_middle_keeps_what_is_before(tmp_path: pathlib.Path, damage: bytes) -> None:
    path = _write(tmp_path / "training", {"l1": {step: float(step) for step in range(1, 101)}})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + damage * (len(content) // 2))
    _age(tmp_path, 9000)
    (run,) = runs.find(tmp_path, now_s=NOW_S)
    history = runs.read(run)
    read = _points(history, "l1")
    assert 30 < len(read) < 70 and all(step == value for step, value in read.items())
    (note,) = history.notes
    assert "is damaged, after" in note and "what is whole is shown" in note


def test_a_record_that_does_not_decode_ends_the_file(tmp_path: pathlib.Path) -> None:
    path = _write(tmp_path / "training", {"first": {1: 1.0}, "spoiled": {1: 1.0}, "third": {1: 1.0}})
    path.write_bytes(path.read_bytes().replace(b"spoiled", b"\xff" * 7))
    _age(tmp_path, 9000)
    (run,) = runs.find(tmp_path, now_s=NOW_S)
    history = runs.read(run)
    assert [curve.tag for curve in history.curves] == ["first"]
    assert len(history.notes) == 1


def test_a_file_that_may_not_be_read_is_said_and_read_once_it_may(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "training", {"l1": {1: 1.0}})

    def refuse(*given: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "open", refuse)
        history = _history(tmp_path)
    assert history.curves == ()
    assert "cannot be read (Permission denied)" in history.notes[0]
    again = _history(tmp_path)
    assert _points(again, "l1") == {1: 1.0}
    assert again.notes == ()


def test_a_folder_that_is_begun_anew_is_read_anew(tmp_path: pathlib.Path) -> None:
    path = _write(tmp_path / "training", {"l1": dict.fromkeys(range(1, 50), 1.0)})
    assert len(_points(_history(tmp_path), "l1")) == 49
    other = _write(tmp_path / "elsewhere", {"l1": {1: 5.0}})
    path.unlink()
    other.rename(path)
    assert _points(_history(tmp_path), "l1") == {1: 5.0}
    path.unlink()
    (tmp_path / "training" / "events.out.tfevents.2").write_bytes(b"")
    assert _history(tmp_path).curves == ()


def test_a_run_that_vanishes_meanwhile_is_empty(tmp_path: pathlib.Path) -> None:
    _write(tmp_path / "run" / "training", {"l1": {1: 1.0}}, {1: 7})
    (run,) = runs.find(tmp_path)
    (grid,) = runs.read(run).grids
    shutil.rmtree(tmp_path / "run")
    assert runs.read(run).curves == ()
    with pytest.raises(errors.DataError, match="can no longer be read"):
        grid.png  # noqa: B018 - reading it is the test


def test_grids_are_spread_evenly_and_keep_both_ends(tmp_path: pathlib.Path) -> None:
    _write(tmp_path / "training", {}, {step: step % 256 for step in range(1, 201)})
    (run,) = runs.find(tmp_path)
    shown = [grid.images_seen for grid in runs.read(run, most_grids=5).grids]
    assert shown == [1, 51, 101, 150, 200]
    assert len(runs.read(run).grids) == runs.MOST_GRIDS
    with pytest.raises(errors.ConfigError, match="most_grids is 1"):
        runs.read(run, most_grids=1)


def test_without_tensorboard_the_error_names_the_extra(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "training", {"l1": {1: 1.0}})
    (run,) = runs.find(tmp_path)
    runs._event_class.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(errors.ConfigError, match=r"diffusion-kd\[train\]"):
        runs.read(run)


# --- showing ----------------------------------------------------------------------------------------


def _curve(values: list[float]) -> runs.Curve:
    steps = tuple(range(len(values)))
    return runs.Curve("training", "l1", steps, tuple(values), tuple(float(step) for step in steps))


def test_a_thinned_curve_keeps_its_ends_and_extremes() -> None:
    values = list(np.random.default_rng(0).standard_normal(10_000))
    values[4321], values[7777] = 50.0, -50.0
    thinned = runs.thin(_curve(values))
    assert len(thinned) <= 400
    assert (thinned.values[0], thinned.values[-1]) == (values[0], values[-1])
    assert (max(thinned.values), min(thinned.values)) == (50.0, -50.0)
    assert list(thinned.images_seen) == sorted(set(thinned.images_seen))
    assert all(values[step] == value for step, value in zip(thinned.images_seen, thinned.values, strict=True))
    assert thinned.wall_s == tuple(float(step) for step in thinned.images_seen)


def test_a_thinned_curve_still_shows_what_is_not_finite() -> None:
    values = [1.0] * 5000
    values[1234], values[3000:3500] = float("nan"), [float("inf")] * 500
    thinned = runs.thin(_curve(values), 100)
    assert len(thinned) <= 100
    assert 1234 in thinned.images_seen and 3000 in thinned.images_seen


def test_a_short_curve_is_left_alone() -> None:
    curve = _curve([1.0, 2.0, 3.0])
    assert runs.thin(curve, 5) is curve
    with pytest.raises(errors.ConfigError, match="most is 4"):
        runs.thin(curve, 4)
