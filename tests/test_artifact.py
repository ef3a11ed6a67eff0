"""Models on disk: what is missing, broken or unknown is said in one sentence, and nothing is left half-written."""

import json
import pathlib
import shutil

import diffusers
import huggingface_hub
import pytest
import safetensors.torch
import torch

from diffusion_kd import artifact, errors
from tests import toys
from tests.test_pipeline import export


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    artifact.save_pipeline(tmp_path / "teacher", parts=toys.tiny_parts())
    return tmp_path / "teacher"


def test_a_saved_pipeline_comes_back_in_half_precision(folder: pathlib.Path) -> None:
    original, loaded = toys.tiny_parts(), artifact.load(str(folder))
    assert loaded.unet.dtype == loaded.vae.dtype == torch.float32
    for name, weight in original.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], weight.half().float())
    assert loaded.size_px == toys.IMAGE_SIZE_PX
    assert not any(weight.requires_grad for weight in loaded.unet.parameters())


@pytest.mark.parametrize(
    "part", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
)
def test_a_missing_part_is_named(folder: pathlib.Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(errors.ModelError, match=f"no {part}/"):
        artifact.load(str(folder))


def test_an_unknown_prediction_type_is_named(folder: pathlib.Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "flow"}))
    with pytest.raises(errors.ModelError, match="'flow'"):
        artifact.load(str(folder))


def test_weights_that_are_not_finite_are_named(folder: pathlib.Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(errors.ModelError, match=r"unet: conv_in\.weight holds NaN"):
        artifact.load(str(folder))


def test_a_cut_off_file_is_an_error_of_ours(folder: pathlib.Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(errors.ModelError, match="cannot be loaded"):
        artifact.load(str(folder))


@pytest.mark.parametrize("name", ["", "nowhere", "./nowhere", "a/b/c", __file__])
def test_an_unknown_name_says_what_would_do(name: str) -> None:
    with pytest.raises(errors.ModelError, match="shapes-teacher"):
        artifact.resolve(name)


def test_a_teacher_is_not_a_student(folder: pathlib.Path) -> None:
    with pytest.raises(errors.ArtifactError, match=r"no distillation\.json"):
        artifact.read_distillation(str(folder))


def test_distillation_comes_back(tmp_path: pathlib.Path) -> None:
    distillation = artifact.read_distillation(str(export(tmp_path / "student", "v_prediction")))
    assert distillation.student_timesteps["4"] == [999, 749, 499, 249]
    assert distillation.guidance_scale == 0 and distillation.lineage == {"teacher": "toy"}


def test_a_newer_schema_is_refused(tmp_path: pathlib.Path) -> None:
    path = export(tmp_path / "student", "v_prediction") / artifact.DISTILLATION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(errors.ArtifactError, match="version 99"):
        artifact.read_distillation(str(tmp_path / "student"))


@pytest.mark.parametrize("timesteps", [[999], {"four": [999]}, {"1": 999}, {}])
def test_malformed_timesteps_are_refused(tmp_path: pathlib.Path, timesteps: object) -> None:
    path = export(tmp_path / "student", "v_prediction") / artifact.DISTILLATION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"student_timesteps": timesteps}))
    with pytest.raises(errors.ArtifactError, match="is malformed"):
        artifact.read_distillation(str(tmp_path / "student"))


def test_a_student_that_is_not_finite_is_not_written(tmp_path: pathlib.Path) -> None:
    parts = toys.tiny_parts()
    next(iter(parts.unet.parameters())).fill_(float("inf"))
    distillation = artifact.Distillation("add", {"1": [999]}, "v_prediction", 16, {})
    with pytest.raises(errors.ArtifactError, match="NaN or infinite"):
        artifact.export_student(tmp_path / "student", parts=parts, distillation=distillation)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_folder(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(artifact.diffusers.StableDiffusionXLPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        artifact.save_pipeline(folder, parts=toys.tiny_parts())
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["teacher"]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_the_old_folder_survives_a_failed_rename(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    rename, calls = pathlib.Path.rename, []

    def fail(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        calls.append(path)
        if len(calls) == fails_at:
            raise OSError("device busy")
        return rename(path, target)

    (folder / "mark").write_text("old")
    monkeypatch.setattr(pathlib.Path, "rename", fail)
    with pytest.raises(OSError, match="busy"):
        artifact.save_pipeline(folder, parts=toys.tiny_parts())
    monkeypatch.undo()
    assert (folder / "mark").read_text() == "old"
    assert artifact.load(str(folder)).size_px == toys.IMAGE_SIZE_PX
    artifact.save_pipeline(folder, parts=toys.tiny_parts())
    assert not (folder / "mark").exists()


def test_files_are_for_everyone_and_for_transformers_4(folder: pathlib.Path) -> None:
    weights = list(folder.rglob("*.safetensors"))
    assert len(weights) == 4 and {path.stat().st_mode & 0o777 for path in weights} == {0o644}
    for part in ("tokenizer", "tokenizer_2"):
        assert (folder / part / "vocab.json").is_file() and (folder / part / "merges.txt").is_file()


def test_weights_too_large_for_half_precision_are_not_written(tmp_path: pathlib.Path) -> None:
    parts = toys.tiny_parts()
    next(iter(parts.vae.parameters())).fill_(1e6)
    with pytest.raises(errors.ModelError, match="vae cannot be written"):
        artifact.save_pipeline(tmp_path / "teacher", parts=parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_missing_weights_are_named(folder: pathlib.Path, part: str) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    weights = safetensors.torch.load_file(path)
    missing = sorted(weights)[0]
    del weights[missing]
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(errors.ModelError, match=f"{part} lacks 1 weights"):
        artifact.load(str(folder))


@pytest.mark.parametrize(
    "error", [artifact.safetensors.SafetensorError("header too large"), OSError(), RuntimeError("\n")]
)
def test_every_library_error_is_a_sentence(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(folder: pathlib.Path) -> None:
        raise error

    monkeypatch.setattr(artifact, "_load_parts", fail)
    with pytest.raises(errors.ModelError, match=r"cannot be loaded: \w+"):
        artifact.load(str(folder))


def test_a_scheduler_without_prediction_type_is_refused(folder: pathlib.Path) -> None:
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(errors.ModelError, match="FlowMatchEulerDiscreteScheduler has no prediction_type"):
        artifact.load(str(folder))
    for content in ("[1]", '{"_class_name": "AutoencoderKL"}', '{"_class_name": "Nothing"}'):
        (folder / "scheduler" / "scheduler_config.json").write_text(content)
        with pytest.raises(errors.ModelError, match="diffusers has no scheduler"):
            artifact.load(str(folder))


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [("vae", "latent_channels", 9, "takes 4 channels"), ("unet", "addition_embed_type", "text", "SDXL U-Net")],
)
def test_a_unet_of_another_kind_is_refused(part: str, key: str, value: object, message: str) -> None:
    parts = toys.tiny_parts()
    getattr(parts, part).register_to_config(**{key: value})
    with pytest.raises(errors.ModelError, match=message):
        artifact._check_kind("toy", parts)


def test_a_shipped_name_without_weights_says_so(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(artifact.SHIPPED, "shapes-teacher", tmp_path / "nowhere")
    with pytest.raises(errors.ModelError, match="not in this installation"):
        artifact.resolve("shapes-teacher")


def test_a_download_takes_the_parts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["model_index.json", "sd_xl_base.safetensors", "vae_1_0/diffusion_pytorch_model.safetensors"]
    files += ["unet/config.json", "tokenizer/merges.txt", "unet/model.onnx", "unet/diffusion_pytorch_model.bin"]
    files += ["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"]
    taken: list[str] = []

    def download(name: str, **patterns: list[str]) -> str:
        taken.extend(huggingface_hub.utils.filter_repo_objects(files, **patterns))
        return "downloaded"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert artifact.resolve("owner/name") == pathlib.Path("downloaded")
    wanted = {
        "model_index.json",
        "unet/config.json",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert set(taken) == wanted


def test_an_export_does_not_tell_where_its_parts_came_from(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    artifact.save_pipeline(tmp_path / "again", parts=artifact.load(str(folder)))
    for path in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path
