"""Distillation from the command line: a tiny teacher goes in, a student that plain code can load comes out."""

import json
import pathlib
import shutil
from typing import Any

import PIL.Image
import pytest
import torch

from diffusion_kd import artifact, errors, pipeline
from tests import toys
from tests.tiny import SHORT, arguments
from tests.training import processes
from training import distill


def test_a_folder_of_pictures_makes_a_student(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "run"
    distill.main(arguments(models, out, "--data", str(pictures)))
    student = pipeline.load_student(str(out / "student"))
    assert sorted(student.timesteps) == [1, 2, 3, 4]
    assert student(["picture 1"], [3], steps=2).shape == (1, 3, toys.IMAGE_SIZE_PX, toys.IMAGE_SIZE_PX)
    changed = artifact.load(str(out / "student")).unet.state_dict()
    original = artifact.load(str(models / "teacher")).unet.state_dict()
    assert any(not torch.equal(changed[name], original[name]) for name in original)
    lineage = artifact.read_distillation(str(out / "student")).lineage
    assert (
        lineage["teacher"] == str(models / "teacher") and lineage["config"]["objective"]["distillation_weight"] == 2.5
    )
    assert lineage["images_seen"] == 8 and lineage["data"].startswith("folder pictures, 5 images, captions ")
    assert (out / "config.yaml").is_file() and list((out / "training").glob("events*"))


def test_the_same_seed_makes_the_same_student(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for name in ("a", "b"):
        distill.main(arguments(models, tmp_path / name, "--data", str(pictures)))
    first, second = (artifact.load(str(tmp_path / name / "student")).unet.state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_finished_run_started_again_only_exports(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = arguments(models, tmp_path / "run", "--data", str(pictures))
    distill.main(command)
    weights = tmp_path / "run" / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(tmp_path / "run" / "student")
    distill.main(command)
    assert weights.read_bytes() == before


def test_a_folder_of_another_run_is_refused(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = arguments(models, tmp_path / "run", "--data", str(pictures))
    distill.main(command)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    for change, message in (
        (["--student", str(tmp_path / "run" / "student")], "a run with start = None"),
        (["objective.distillation_weight=1"], r"a run with objective\.distillation_weight = 2\.5, not 1\.0"),
        (["training.learning_rate=1e-3"], r"a run with training\.learning_rate = "),
        (["seed=1"], "a run with seed = 0, not 1"),
    ):
        with pytest.raises(errors.ConfigError, match=message):
            distill.main([*command, *change])
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    distill.main([*command, "training.images=10"])  # a longer run goes on
    (pictures / "metadata.jsonl").write_text('{"file_name": "0.jpg", "text": "another caption"}')
    with pytest.raises(errors.ConfigError, match="a run with data = "):
        distill.main(command)


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ([], False),
        (["feature_network=dinov2"], True),
        (["objective.adversarial_weight=0"], True),
        (["objective.adversarial_weight=0", "objective.trajectory_weight=1"], False),
        (["objective.adversarial_weight=0", "objective.trajectory_weight=1", "objective.distance_space=latent"], True),
    ],
)
def test_the_embedded_encoder_is_refused_only_where_it_would_look(settings: list[str], fits: bool) -> None:
    config = distill.configs.load(distill.DistillConfig, "shapes_add", settings)
    if fits:
        config.check_size(1024, shapes=False)
    else:
        with pytest.raises(errors.ConfigError, match="feature_network=dinov2"):
            config.check_size(1024, shapes=False)


def test_prompts_alone_let_the_teacher_make_the_pictures(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue star\n")
    out = tmp_path / "run"
    distill.main(arguments(models, out, "--prompts", str(tmp_path / "prompts.txt")))
    lines = (out / "teacher_images" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["a red circle", "a blue star"]
    assert artifact.resolve(str(out / "student")).is_dir()


def test_a_teacher_draws_prompts_at_the_size_asked_for(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """And the student is trained, and says that it draws, at that size."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    out, size_px = tmp_path / "run", 3 * toys.IMAGE_SIZE_PX // 2
    distill.main(arguments(models, out, "--prompts", str(tmp_path / "prompts.txt"), f"size_px={size_px}"))
    lines = (out / "teacher_images" / "metadata.jsonl").read_text().splitlines()
    names = [json.loads(line)["file_name"] for line in lines]
    assert len(set(names)) == 2
    for name in names:
        with PIL.Image.open(out / "teacher_images" / name) as drawn:
            assert drawn.size == (size_px, size_px)
    assert artifact.read_distillation(str(out / "student")).size_px == size_px
    assert pipeline.load_student(str(out / "student"))(["a red circle"], [0], steps=1).shape[-2:] == (size_px, size_px)


def test_a_student_goes_on_from_an_earlier_one(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    distill.main([*arguments(models, first, "--data", str(pictures)), "training.learning_rate=1e-2"])
    started = ["--data", str(pictures), "--student", str(first / "student")]
    distill.main([*arguments(models, second, *started), "training.learning_rate=1e-9", "training.ema_decay=0"])
    earlier, later = (artifact.load(str(run / "student")).unet.state_dict() for run in (first, second))
    original = artifact.load(str(models / "teacher")).unet.state_dict()
    assert all(torch.allclose(later[name], earlier[name], atol=1e-6) for name in original)
    assert not all(torch.allclose(later[name], original[name], atol=1e-3) for name in original)
    assert artifact.read_distillation(str(second / "student")).lineage["start"] == str(first / "student")


def test_a_start_of_another_kind_is_refused(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    artifact.save_pipeline(tmp_path / "epsilon", parts=toys.tiny_parts("epsilon"))
    elsewhere = toys.tiny_parts()
    torch.nn.init.normal_(elsewhere.vae.quant_conv.weight)
    artifact.save_pipeline(tmp_path / "elsewhere", parts=elsewhere)
    for start, message in (
        (str(tmp_path / "elsewhere"), "has another autoencoder than the teacher"),
        (str(tmp_path / "epsilon"), "predicts epsilon and the teacher v_prediction"),
        ("shapes-student", "not of the teacher's architecture"),
    ):
        with pytest.raises(errors.ModelError, match=message):
            distill.main(arguments(models, tmp_path / "run", "--data", str(pictures), "--student", start))
    assert not (tmp_path / "run" / "student").exists()


def test_a_time_limited_run_says_what_it_saw(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "run"
    distill.main([*arguments(models, out, "--data", str(pictures)), "training.time_limit_s=0.000001"])
    assert artifact.read_distillation(str(out / "student")).lineage["images_seen"] == 2


def test_the_teacher_is_loaded_once(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], artifact.load

    def count(name: str, **options: Any) -> artifact.Parts:
        loaded.append(name)
        return load(name, **options)

    monkeypatch.setattr(artifact, "load", count)
    distill.main(arguments(models, tmp_path / "run", "--data", str(pictures)))
    assert loaded == [str(models / "teacher")]


def test_a_teacher_of_another_size_needs_pictures_and_eyes_of_its_own(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(errors.ConfigError, match=r"16 px .* --data, or prompts with --prompts"):
        distill.main(arguments(models, tmp_path / "run"))
    command = ["--teacher", str(models / "teacher"), "--out", str(tmp_path / "run"), "--data", str(pictures)]
    with pytest.raises(errors.ConfigError, match="feature_network=dinov2"):
        distill.main([*command, *SHORT])
    assert not (tmp_path / "run").exists()


def test_bad_input_is_one_sentence_exit_code_two_and_nothing_written(
    models: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    for more, said in (
        (("--data", str(tmp_path / "empty")), "no metadata.jsonl"),
        (("objective.student_steps=5",), "must be 1, 2 or 4, not 5"),
    ):
        result = processes.run("-m", "training.distill", *arguments(models, out, *more))
        assert result.returncode == 2 and said in result.stderr
        assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
        assert not out.exists()
