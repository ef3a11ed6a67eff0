"""The ablation: every variant can be run, and no result stands in for another's."""

import pathlib
from typing import Any

import pytest

from benchmarks import ablation
from diffusion_kd import errors, pipeline


def test_every_variant_of_the_ablation_is_valid() -> None:
    for variant in ablation.VARIANTS:
        ablation.settings(variant, 1, 3200)
    with pytest.raises(errors.ConfigError, match="images is 0"):
        ablation.settings("ADD", 0, 0)


def test_what_was_measured_otherwise_is_measured_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[str]] = []

    def measure(student: pathlib.Path, arguments: list[str]) -> ablation.Measures:
        measured.append(arguments)
        return {"1": {"prompt_accuracy": float(len(measured))}}

    monkeypatch.setattr(ablation, "measure", measure)
    asked = [["--prompts", "256"], ["--prompts", "256"], ["--prompts", "8"], ["--prompts", "256"]]
    found = [ablation.measured_once(tmp_path / "student", each)["1"]["prompt_accuracy"] for each in asked]
    assert found == [1, 1, 2, 1]
    assert measured == [["--prompts", "256"], ["--prompts", "8"]]


def test_the_untrained_teacher_can_be_read_as_a_student(tmp_path: pathlib.Path) -> None:
    folder = ablation.untrained(tmp_path)
    student = pipeline.load_student(str(folder))
    assert set(student.timesteps) == {1, 2, 3, 4}
    assert ablation.untrained(tmp_path) == folder


def test_a_student_of_another_length_is_distilled_anew(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    class Distilled:
        def __init__(self, config: Any, teacher: str, images: object, folder: pathlib.Path) -> None:
            self.config, self.folder = config, folder

        def run(self) -> None:
            lengths.append(self.config.training.images)
            (self.folder / "student").mkdir(parents=True)

    monkeypatch.setattr(ablation.distill, "Distillation", Distilled)
    monkeypatch.setattr(ablation.data.ShapesImages, "__init__", lambda self, count, seed: None)
    for images in (64, 3200, 64):
        ablation.student_of("ADD", 0, images, tmp_path)
    assert lengths == [64, 3200]
