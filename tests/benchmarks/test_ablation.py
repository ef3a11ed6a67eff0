"""The ablation: every variant can be run, and no result stands in for another's."""

import pathlib
import types
from typing import Any

import pytest

from benchmarks import ablation
from diffusion_kd import errors


def test_every_variant_of_the_ablation_is_valid() -> None:
    for variant in ablation.VARIANTS:
        ablation.settings(variant, 1, 3200)
    with pytest.raises(errors.ConfigError, match="images is 0"):
        ablation.settings("ADD", 0, 0)


def test_what_was_measured_otherwise_is_measured_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(exam: Any, teacher: Any, student: Any) -> ablation.Measures:
        measured.append((exam.protocol.prompts, teacher.entrant.guidance_scale))
        return {"1": {"prompt_accuracy": float(len(measured))}}

    monkeypatch.setattr(ablation, "measure", measure)
    monkeypatch.setattr(ablation.pipeline, "load_student", lambda name: None)
    found = []
    for prompts, guidance_scale in ((256, 2.0), (256, 2.0), (8, 2.0), (256, 3.0), (256, 2.0)):
        exam: Any = types.SimpleNamespace(protocol=types.SimpleNamespace(prompts=prompts))
        teacher: Any = types.SimpleNamespace(entrant=types.SimpleNamespace(guidance_scale=guidance_scale))
        found.append(ablation.measured_once(exam, teacher, tmp_path / "student")["1"]["prompt_accuracy"])
    assert measured == [(256, 2.0), (8, 2.0), (256, 3.0)] and found == [1, 1, 2, 3, 1]


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
