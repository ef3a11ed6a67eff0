"""The entry point: its rows, its files, its table and its refusals."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import PIL.Image
import pytest
import torch
from torch import Tensor

from diffusion_kd import pipeline
from diffusion_kd.networks import features
from eval import grid, report, run, sampling


class Model(sampling.Sampler, Protocol):
    asked: list[tuple[int, float]]


ROW_KEYS = {
    "model", "steps", "guidance_scale", "prompt_accuracy", "prompt_accuracy_interval", "prompt_accuracy_seen",
    "prompt_accuracy_held_out", "prompt_accuracy_by", "frechet_distance", "frechet_distance_to_teacher", "clip_score",
    "lpips_to_teacher", "diversity", "diversity_ratio", "seconds_per_image",
}  # fmt: skip


@pytest.fixture(autouse=True)
def models(
    monkeypatch: pytest.MonkeyPatch, network: features.TextImageNetwork, painter: Model, noise_maker: Model
) -> tuple[Model, Model]:
    """The teacher paints, every student makes noise."""
    monkeypatch.setattr(pipeline, "load_teacher", lambda name: painter)
    monkeypatch.setattr(pipeline, "load_student", lambda name: noise_maker)
    monkeypatch.setattr(pipeline, "load_feature_network", lambda name: network)
    return painter, noise_maker


def _arguments(folder: pathlib.Path, *more: str) -> list[str]:
    return ["--prompts", "16", "--seed", "7", "--device", "cpu", "--out", str(folder / "report"), *more]


def _report(folder: pathlib.Path) -> Any:
    return json.loads((folder / "report" / "report.json").read_text())


def test_a_whole_report(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], models: tuple[Model, Model]
) -> None:
    assert run.main(_arguments(tmp_path, "--student", "mine", "--shipped-student", "shapes-student")) == 0
    written = _report(tmp_path)
    assert written["schema_version"] == 1
    rows = written["rows"]
    assert [(row["model"], row["steps"], row["guidance_scale"]) for row in rows] == [
        ("teacher", 50, 2.0),
        *(("teacher_few_steps", steps, scale) for steps in (1, 2, 4) for scale in (2.0, 1.0)),
        *(("student", steps, 0.0) for steps in (1, 2, 4)),
        *(("shipped_student", steps, 0.0) for steps in (1, 2, 4)),
    ]
    assert all(set(row) == ROW_KEYS for row in rows)
    assert [row["prompt_accuracy"] for row in rows] == [1] * 7 + [0] * 6
    assert rows[1]["lpips_to_teacher"] == 0
    teacher, student = models
    assert set(teacher.asked) == {(50, 2.0), *((steps, scale) for steps in (1, 2, 4) for scale in (2.0, 1.0))}
    assert set(student.asked) == {(1, 0.0), (2, 0.0), (4, 0.0)}
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[2:-1]] == [row["model"] for row in rows] + ["true"]
    step = 128 + grid.GAP_PX
    with PIL.Image.open(tmp_path / "report" / "samples.png") as sheet:
        assert sheet.size == (grid.CAPTION_PX + 7 * step, grid.HEADING_PX + 8 * step)


def test_each_row_is_of_the_model_that_it_names(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, painter: Model, noise_maker: Model
) -> None:
    monkeypatch.setattr(pipeline, "load_student", {"mine": noise_maker, "shipped": painter}.__getitem__)
    run.main(_arguments(tmp_path, "--student", "mine", "--shipped-student", "shipped", "--steps", "4"))
    assert {row["model"]: row["prompt_accuracy"] for row in _report(tmp_path)["rows"][-2:]} == {
        "student": 0,
        "shipped_student": 1,
    }


def test_the_protocol_says_what_was_measured(tmp_path: pathlib.Path) -> None:
    run.main(_arguments(tmp_path, "--student", "mine", "--steps", "2"))
    protocol = _report(tmp_path)["protocol"]
    expected = {
        "id": "shapes",
        "prompts": 16,
        "prompts_held_out": 4,
        "seed": 7,
        "image_seeds": {"first": 7, "last": 22},
        "resolution_px": 64,
        "feature_network": "toy",
        "models": {"teacher": "shapes-teacher", "teacher_few_steps": "shapes-teacher", "student": "mine"},
        "device": "cpu",
    }
    assert {key: protocol[key] for key in expected} == expected
    assert "FD[toy]" in protocol["metrics"]["frechet_distance"]
    assert protocol["versions"]["torch"] == torch.__version__


def test_the_table_is_aligned(tmp_path: pathlib.Path) -> None:
    run.main(_arguments(tmp_path))
    title, heading, *lines = report.table(_report(tmp_path)).splitlines()
    assert "16 prompts" in title
    for column in ("accuracy", "CLIP"):
        end = heading.index(column) + len(column)
        assert all(line[end - 1].isdigit() and line[end : end + 1] in ("", " ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1,zwei"], "--steps"),
        (["--steps", "0"], "--steps"),
        (["--steps", "2,2"], "--steps"),
        (["--prompts", "3"], "prompts must be at least 8"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--guidance-scale", "1"], "--guidance-scale must be above 1"),
        (["--guidance-scale", "nan"], "--guidance-scale must be above 1"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_bad_settings_end_in_one_sentence_and_code_2(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run.main(_arguments(tmp_path, *arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_model_ends_in_code_2(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert run.main(_arguments(tmp_path, "--teacher", "./nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_file_in_the_folder_s_place_ends_in_code_2_before_any_work(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], models: tuple[Model, Model]
) -> None:
    (tmp_path / "report").write_text("mine")
    assert run.main(_arguments(tmp_path)) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    assert (tmp_path / "report").read_text() == "mine"
    assert models[0].asked == []


def test_a_failure_leaves_the_earlier_report_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, painter: Model
) -> None:
    run.main(_arguments(tmp_path))
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert set(before) == {"report.json", "samples.png"}

    class Broken:
        def to(self, device: str) -> None: ...

        def __call__(
            self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float
        ) -> Tensor:
            level = torch.nan if steps == 2 and len(prompts) > 1 else 0.0
            return torch.full((len(prompts), 3, 64, 64), level)

    monkeypatch.setattr(pipeline, "load_student", lambda name: Broken())
    assert run.main(_arguments(tmp_path)) == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_second_report_replaces_the_first(tmp_path: pathlib.Path) -> None:
    run.main(_arguments(tmp_path))
    run.main(_arguments(tmp_path, "--steps", "2"))
    assert len(_report(tmp_path)["rows"]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="0"):
        run.parse(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in shown for name in run.Settings.__dataclass_fields__)
