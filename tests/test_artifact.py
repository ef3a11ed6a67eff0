"""Models on disk: what is missing, broken or unknown is said in one sentence, and nothing is left half-written."""

import json
import pathlib
import shutil
import subprocess
import sys

import diffusers
import huggingface_hub
import numpy as np
import peft
import pytest
import safetensors.torch
import torch

from diffusion_kd import _torchvision, artifact, errors, pipeline
from diffusion_kd.networks import folders, lora, lora_file
from diffusion_kd.networks.parts import autoencoder_dtype
from tests import toys
from tests.test_pipeline import _PLAIN, PROMPTS, SEEDS, export


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
    def fail(folder: pathlib.Path, dtype: torch.dtype) -> None:
        raise error

    monkeypatch.setattr(folders, "load", fail)
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


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "variant-only"])
def test_a_download_takes_the_parts_alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    files = ["model_index.json", "sd_xl_base.safetensors", "vae_1_0/diffusion_pytorch_model.safetensors"]
    files += ["unet/config.json", "tokenizer/merges.txt", "unet/model.onnx", "unet/diffusion_pytorch_model.bin"]
    files += ["vae/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"]
    files += ["unet/diffusion_pytorch_model.safetensors"] if plain else []

    def download(name: str, **patterns: list[str]) -> str:
        for path in huggingface_hub.utils.filter_repo_objects(files, **patterns):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert artifact.resolve("owner/name") == tmp_path
    variant = "" if plain else ".fp16"
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "model_index.json",
        "unet/config.json",
        "tokenizer/merges.txt",
        "vae/diffusion_pytorch_model.safetensors",
        f"unet/diffusion_pytorch_model{variant}.safetensors",
    }


def test_an_export_does_not_tell_where_its_parts_came_from(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    artifact.save_pipeline(tmp_path / "again", parts=artifact.load(str(folder)))
    for path in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path


# --- exports: precision, LoRA, and what plain diffusers makes of them --------------------------------


def adapted(prediction_type: str = "v_prediction", alpha: float = 8.0, **options: object) -> artifact.Parts:
    """Toy parts whose U-Net carries an adapter of rank 4 that has learnt something, and the student's scheduler."""
    parts = toys.tiny_parts(prediction_type)
    torch.manual_seed(7)
    layers = [*lora.TARGETS, "conv1"]
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=layers, init_lora_weights=False, **options)
    parts.unet.add_adapter(config, adapter_name=lora.ADAPTER)
    return artifact.dataclasses.replace(parts, scheduler=artifact.student_scheduler(parts.scheduler, 4))


def described(prediction_type: str, **lineage: object) -> artifact.Distillation:
    return artifact.Distillation("add", pipeline.trained_timesteps(4), prediction_type, toys.IMAGE_SIZE_PX, lineage)


@pytest.fixture(params=["v_prediction", "epsilon"])
def adapters(tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> pathlib.Path:
    """A LoRA's folder, beside its teacher's in float32."""
    artifact.save_pipeline(tmp_path / "teacher", parts=toys.tiny_parts(request.param), dtype=torch.float32)
    given = {"parts": adapted(request.param), "distillation": described(request.param, teacher="toys/teacher")}
    artifact.export_lora(tmp_path / "student", base=str(tmp_path / "teacher"), dtype=torch.float32, **given)
    return tmp_path / "student"


def plain_pictures(folder: pathlib.Path) -> np.ndarray:
    """By the code in the card of a folder, where this package cannot be imported: (3 step counts, B, H, W, 3)."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for written, true in (("path/to/this/folder", folder), ("path/to/teacher", folder.parent / "teacher")):
        code = code.replace(written, str(true))
    script = _PLAIN.partition("import diffusers")[0] + code + _SAMPLE
    missing = [] if _torchvision._library is None else list(_torchvision._OPERATORS)
    arguments = [str(folder.parent / "pictures.npy"), json.dumps(PROMPTS), json.dumps(SEEDS), json.dumps(missing)]
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=folder.parent)
    assert run.returncode == 0, run.stderr
    return np.load(arguments[0])  # type: ignore[no-any-return]


_SAMPLE = """
import numpy
pictures = []
for steps in (1, 2, 4):
    generators = [torch.Generator().manual_seed(seed) for seed in json.loads(sys.argv[3])]
    pictures.append(pipe(json.loads(sys.argv[2]), num_inference_steps=steps, guidance_scale=0, generator=generators,
                         output_type="np").images)
numpy.save(sys.argv[1], numpy.stack(pictures))
"""


def our_pictures(student: pipeline.FewStepPipeline) -> np.ndarray:
    stacked = torch.stack([student(PROMPTS, SEEDS, steps=steps) for steps in (1, 2, 4)])
    return ((stacked + 1) / 2).permute(0, 1, 3, 4, 2).numpy()  # type: ignore[no-any-return]


def few_step(parts: artifact.Parts) -> pipeline.FewStepPipeline:
    return pipeline.FewStepPipeline(parts, {int(n): t for n, t in pipeline.trained_timesteps(4).items()})


def test_plain_diffusers_draws_with_the_adapters_as_we_do(adapters: pathlib.Path) -> None:
    kind = artifact.read_distillation(str(adapters)).prediction_type
    theirs, fused = plain_pictures(adapters), our_pictures(pipeline.load_student(str(adapters)))
    unfused, teachers = our_pictures(few_step(adapted(kind))), our_pictures(few_step(toys.tiny_parts(kind)))
    assert np.abs(theirs - fused).max() < 1e-4
    assert np.abs(theirs - unfused).max() < 1e-4
    assert np.abs(theirs - teachers).max() > 0.05  # the adapters say something


def test_adapters_fused_into_a_pipeline_draw_the_same(tmp_path: pathlib.Path) -> None:
    parts = adapted()
    before = {name: weight.clone() for name, weight in parts.unet.state_dict().items()}
    artifact.export_student(
        tmp_path / "student", parts=parts, distillation=described("v_prediction"), dtype=torch.float32
    )
    theirs = plain_pictures(tmp_path / "student")
    assert np.abs(theirs - our_pictures(few_step(adapted()))).max() < 1e-4
    assert all(torch.equal(weight, before[name]) for name, weight in parts.unet.state_dict().items())
    assert artifact.read_distillation(str(tmp_path / "student")).base is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exports_hold_the_precision_that_was_asked_for(tmp_path: pathlib.Path, dtype: torch.dtype) -> None:
    given = {"parts": adapted(), "distillation": described("v_prediction"), "dtype": dtype}
    artifact.export_student(tmp_path / "full", **given)
    artifact.export_lora(tmp_path / "lora", base="owner/teacher", **given)
    for path in (tmp_path / "full" / "unet").glob("*.safetensors"), [tmp_path / "lora" / lora_file.NAME]:
        for file in path:
            stored = safetensors.torch.load_file(file)
            assert {weight.dtype for weight in stored.values()} == {dtype}


def test_a_lora_is_small_and_holds_its_scale_and_its_base(tmp_path: pathlib.Path) -> None:
    parts = adapted(alpha=8.0)
    (tmp_path / "teacher").mkdir()
    artifact.export_lora(
        tmp_path / "runs" / "lora",
        parts=parts,
        distillation=described("v_prediction"),
        base=str(tmp_path / "teacher"),
        dtype=torch.float32,
    )
    folder = tmp_path / "runs" / "lora"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "README.md",
        "distillation.json",
        "pytorch_lora_weights.safetensors",
        "scheduler/scheduler_config.json",
    ]
    stored = safetensors.torch.load_file(folder / lora_file.NAME)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = parts.unet.get_submodule(name)
    assert torch.equal(stored[f"unet.{name}.lora.down.weight"], layer.lora_A[lora.ADAPTER].weight)
    assert torch.equal(stored[f"unet.{name}.lora.up.weight"], 2 * layer.lora_B[lora.ADAPTER].weight)
    base = artifact.read_distillation(str(folder)).base
    assert base is not None and base["model"] == "../../teacher"
    assert lora_file.fits(toys.tiny_parts().unet, base["probe"]) and len(base["probe"]) >= 8


def test_a_lora_in_half_precision_still_draws_its_pictures(tmp_path: pathlib.Path) -> None:
    artifact.save_pipeline(tmp_path / "teacher", parts=toys.tiny_parts())
    artifact.export_lora(
        tmp_path / "student", parts=adapted(), distillation=described("v_prediction"), base=str(tmp_path / "teacher")
    )
    ours = our_pictures(pipeline.load_student(str(tmp_path / "student")))
    assert np.abs(ours - our_pictures(few_step(adapted()))).max() < 0.02


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 0.02), (torch.bfloat16, 0.2)])
def test_a_lora_loads_in_the_precision_asked_for(adapters: pathlib.Path, dtype: torch.dtype, most: float) -> None:
    parts = artifact.load(str(adapters), dtype=dtype)
    assert isinstance(parts.scheduler, diffusers.LCMScheduler)  # its own and not its base's
    assert {weight.dtype for weight in parts.unet.parameters()} == {dtype}
    exact = artifact.load(str(adapters)).unet.state_dict()
    for name, weight in parts.unet.state_dict().items():
        assert torch.allclose(weight.float(), exact[name], rtol=most / 4, atol=most / 40), name
    assert not any(weight.requires_grad for weight in parts.unet.parameters())


def test_a_lora_may_be_of_another_size_than_its_base(adapters: pathlib.Path) -> None:
    path = adapters / artifact.DISTILLATION_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size_px": 2 * toys.IMAGE_SIZE_PX}))
    assert pipeline.load_student(str(adapters)).size_px == 2 * toys.IMAGE_SIZE_PX


def test_a_base_is_found_beside_and_can_be_given(adapters: pathlib.Path, tmp_path: pathlib.Path) -> None:
    moved = tmp_path / "elsewhere" / "deep" / "student"
    shutil.copytree(adapters, moved)
    with pytest.raises(errors.ModelError, match=r"its base is not at .*/deep/student/\.\./teacher; put it there"):
        artifact.load(str(moved))
    given = artifact.load(str(moved), base=str(tmp_path / "teacher")).unet.state_dict()
    for place in (moved / "base", moved.parent / "teacher"):
        place.symlink_to(tmp_path / "teacher")
        found = artifact.load(str(moved)).unet.state_dict()
        assert all(torch.equal(found[name], given[name]) for name in given)
        place.unlink()


def test_a_lora_on_another_model_is_refused(adapters: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = toys.tiny_parts()
    for weight in other.unet.parameters():
        weight.mul_(1.1)
    artifact.save_pipeline(tmp_path / "other", parts=other)
    with pytest.raises(errors.ModelError, match=r"was not made for .*other.*lineage says 'toys/teacher'"):
        artifact.load(str(adapters), base=str(tmp_path / "other"))
    with pytest.raises(errors.ModelError, match="is a LoRA itself"):
        artifact.load(str(adapters), base=str(adapters))


def test_damaged_adapters_are_named(adapters: pathlib.Path) -> None:
    path = adapters / lora_file.NAME
    stored = safetensors.torch.load_file(path)
    key = sorted(stored)[0]
    for change, message in (
        ({key: torch.full_like(stored[key], float("nan"))}, "unet: .* holds NaN"),
        ({key: stored[key][:, :-1].contiguous()}, "cannot be loaded on"),
        ({"unet.elsewhere.lora.up.weight": stored[key].clone()}, "adapts elsewhere, which its base's U-Net has not"),
        ({"text_encoder.q.lora.up.weight": stored[key].clone()}, "no adapter of a U-Net"),
    ):
        safetensors.torch.save_file(stored | change, path)
        with pytest.raises(errors.ModelError, match=message):
            artifact.load(str(adapters))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(errors.ModelError, match="cannot be loaded on"):
        artifact.load(str(adapters))


def test_what_a_lora_file_cannot_hold_is_not_written(tmp_path: pathlib.Path) -> None:
    infinite = adapted()
    infinite.unet.get_submodule("mid_block.attentions.0.proj_in").lora_A[lora.ADAPTER].weight.data.fill_(1e6)
    for parts, message in (
        (toys.tiny_parts(), "carries no adapter"),
        (adapted(use_dora=True), "made with use_dora"),
        (adapted(rank_pattern={"to_q": 2}), "made with rank_pattern"),
        (
            infinite,
            r"mid_block\.attentions\.0\.proj_in\.lora\.down\.weight holds NaN or infinite values in torch\.float16",
        ),
    ):
        with pytest.raises(errors.ArtifactError, match=message):
            artifact.export_lora(
                tmp_path / "lora", parts=parts, distillation=described("v_prediction"), base="owner/teacher"
            )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_of_a_lora_leaves_the_old_one(adapters: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in adapters.rglob("*") if path.is_file()}

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(artifact.diffusers.LCMScheduler, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        artifact.export_lora(adapters, parts=adapted(), distillation=described("v_prediction"), base="owner/teacher")
    assert {path: path.read_bytes() for path in adapters.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in adapters.parent.iterdir()) == ["student", "teacher"]


def test_part_hashes_know_weights_and_configs(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    before = artifact.part_hashes(str(folder))
    assert before.keys() == set(folders.PARTS) and all(len(digest) == 64 for digest in before.values())
    (folder / "README.md").write_text("a note")
    assert artifact.part_hashes(str(folder)) == before
    path = folder / "unet" / "config.json"
    path.write_text(path.read_text() + "\n")
    after = artifact.part_hashes(str(folder))
    assert {part for part in before if after[part] != before[part]} == {"unet"}


# --- precision, variants, architectures, tiny decoders ---


def dtypes(parts: artifact.Parts) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of U-Net, autoencoder and text encoders; each has one."""
    found = [{weight.dtype for weight in part.parameters()} for part in (parts.unet, parts.vae, parts.text)]
    assert all(len(each) == 1 for each in found)
    unet, vae, text = (each.pop() for each in found)
    return unet, vae, text


def edit_json(path: pathlib.Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("upcast", [True, False], ids=["overflows", "does-not"])
def test_networks_come_in_the_precision_asked_for(folder: pathlib.Path, dtype: torch.dtype, upcast: bool) -> None:
    edit_json(folder / "vae" / "config.json", force_upcast=upcast)
    vae = torch.float32 if upcast and dtype == torch.float16 else dtype
    loaded, exact = artifact.load(str(folder), dtype=dtype), artifact.load(str(folder))
    assert dtypes(loaded) == (dtype, vae, dtype)
    images, wanted = (pipeline.TeacherPipeline(parts)(["a red circle"], [0], steps=2) for parts in (loaded, exact))
    assert 0 < float((images - wanted).abs().mean()) < 0.05
    assert dtypes(exact.to("cpu", dtype)) == (dtype, vae, dtype)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_frozen_teacher_in_half_precision_judges_in_float32(
    tmp_path: pathlib.Path, kind: str, dtype: torch.dtype
) -> None:
    """Given what a student in float32 is given: latents and conditioning of another precision than its own."""
    artifact.save_pipeline(tmp_path / "teacher", parts=toys.tiny_parts(kind))
    exact, half = (artifact.load(str(tmp_path / "teacher"), dtype=each) for each in (torch.float32, dtype))
    cond = exact.text.encode(["a red circle"], (16, 16))
    x_t, timesteps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300])
    wanted, judged = (parts.denoiser()(x_t, timesteps, cond) for parts in (exact, half))
    assert judged.dtype == torch.float32 and 0 < float((judged - wanted).abs().max()) < 0.05
    given = half.text.encode(["a red circle"], (16, 16))
    assert float((exact.denoiser()(x_t, timesteps, given) - wanted).abs().max()) < 0.05


def test_sizes_are_told_exactly_in_half_precision(folder: pathlib.Path) -> None:
    cond = artifact.load(str(folder), dtype=torch.bfloat16).text.encode(["a red circle"], (1023, 2049))
    assert cond.time_ids.tolist() == [[1023, 2049, 0, 0, 1023, 2049]]


def test_an_autoencoder_that_does_not_say_is_taken_to_overflow() -> None:
    assert autoencoder_dtype({}, torch.float16) == torch.float32
    assert autoencoder_dtype({}, torch.bfloat16) == torch.bfloat16


def test_weights_too_large_for_float16_are_named(tmp_path: pathlib.Path) -> None:
    parts = toys.tiny_parts()
    parts.unet.conv_in.weight[0, 0, 0, 0] = 1e6
    artifact.save_pipeline(tmp_path / "teacher", parts=parts, dtype=torch.float32)
    assert artifact.load(str(tmp_path / "teacher"), dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    with pytest.raises(
        errors.ModelError, match=r"unet: conv_in\.weight holds NaN or infinite values in torch\.float16"
    ):
        artifact.load(str(tmp_path / "teacher"), dtype=torch.float16)


def test_a_folder_of_variants_alone_is_loaded(folder: pathlib.Path) -> None:
    plain = artifact.load(str(folder)).unet.state_dict()
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    loaded = artifact.load(str(folder)).unet.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in plain.items())


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], "fp16"),
        (["model.bf16.safetensors"], "bf16"),
        (["model.bf16.safetensors", "model.fp16.safetensors"], "fp16"),
        (["pytorch_model.bin"], None),
    ],
)
def test_the_variant_is_that_of_the_files(tmp_path: pathlib.Path, names: list[str], variant: str | None) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert folders._variant(tmp_path) == variant


def test_a_folder_takes_no_base(folder: pathlib.Path) -> None:
    with pytest.raises(errors.ConfigError, match="base is 'elsewhere'; it must be left out"):
        artifact.load(str(folder), base="elsewhere")


@pytest.mark.parametrize("name", ["shapes-teacher", "folder"])
def test_an_architecture_is_the_model_without_weights(folder: pathlib.Path, name: str) -> None:
    asked = str(folder) if name == "folder" else name
    model = artifact.load(asked)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    planned = artifact.architecture(asked)
    for one, other in ((planned.unet, model.unet), (planned.vae, model.vae), (planned.text, model.text)):
        shapes = {key: weight.shape for key, weight in other.state_dict().items()}
        assert {key: weight.shape for key, weight in one.state_dict().items()} == shapes
        assert all(weight.is_meta and not weight.requires_grad for weight in one.parameters())
    assert planned.size_px == model.size_px and planned.scheduler.config == model.scheduler.config
    assert planned.text.tokenizers[0].get_vocab() == model.text.tokenizers[0].get_vocab()


def test_the_architecture_of_a_hub_model_takes_its_small_files_alone(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert artifact.architecture("owner/name").unet.conv_in.weight.is_meta
    files = ["unet/config.json", "tokenizer/merges.txt", "unet/diffusion_pytorch_model.safetensors"]
    taken = {
        path for patterns in asked for path in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns)
    }
    assert taken == {"unet/config.json", "tokenizer/merges.txt"}


def test_sdxl_base_has_an_architecture_and_no_weights() -> None:
    assert artifact.architecture("sdxl-base").size_px == 1024
    with pytest.raises(errors.ModelError, match="architecture without weights, which only --plan takes"):
        artifact.load("sdxl-base")


def test_an_architecture_that_is_not_sdxl_is_refused(folder: pathlib.Path) -> None:
    edit_json(folder / "unet" / "config.json", addition_embed_type=None)
    with pytest.raises(errors.ModelError, match="SDXL U-Net"):
        artifact.architecture(str(folder))
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(errors.ModelError, match="no readable configs"):
        artifact.architecture(str(folder))


def tiny_decoder(folder: pathlib.Path, *, latent_channels: int = toys.LATENT_CHANNELS, levels: int = 2) -> str:
    """A random tiny autoencoder for the toys' latents: 2 px a cell."""
    torch.manual_seed(0)
    diffusers.AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
    ).save_pretrained(folder)
    return str(folder)


def test_a_tiny_decoder_decodes_what_the_unet_makes(tmp_path: pathlib.Path) -> None:
    teacher = toys.tiny_parts()
    decoder = artifact.load_tiny_decoder(tiny_decoder(tmp_path), teacher)
    latents = torch.randn(2, toys.LATENT_CHANNELS, toys.LATENT_SIZE, toys.LATENT_SIZE).requires_grad_()
    images = decoder.decode(latents / decoder.config.scaling_factor, return_dict=False)[0]
    full = teacher.vae.decode(latents / teacher.vae.config.scaling_factor, return_dict=False)[0]
    assert images.shape == full.shape == (2, 3, toys.IMAGE_SIZE_PX, toys.IMAGE_SIZE_PX)
    images.square().mean().backward()
    assert latents.grad is not None and bool(latents.grad.any())
    assert not decoder.training and not any(weight.requires_grad for weight in decoder.parameters())
    assert artifact.load_tiny_decoder(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_tiny_decoder_counts_its_pictures_from_minus_one(tmp_path: pathlib.Path) -> None:
    """What its last layer makes as 0 is black and as 1 white, which are the autoencoder's -1 and 1."""
    decoder = artifact.load_tiny_decoder(tiny_decoder(tmp_path))
    last = decoder.decoder.layers[-1]
    last.weight.zero_()
    for made, seen in ((0.0, -1.0), (0.5, 0.0), (1.0, 1.0)):
        last.bias.fill_(made)
        assert decoder.decode(torch.randn(1, 4, 8, 8), return_dict=False)[0].unique().tolist() == [seen]


@pytest.mark.parametrize(("channels", "levels"), [(16, 2), (4, 3)], ids=["channels", "downscale"])
def test_a_tiny_decoder_of_other_latents_is_refused(tmp_path: pathlib.Path, channels: int, levels: int) -> None:
    name = tiny_decoder(tmp_path, latent_channels=channels, levels=levels)
    message = (
        f"latents of {channels} channels to {2 ** (levels - 1)} px a cell, and the teacher has 4 channels and 2 px"
    )
    with pytest.raises(errors.ModelError, match=message):
        artifact.load_tiny_decoder(name, toys.tiny_parts())


def test_what_is_no_tiny_decoder_says_what_would_do(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.ModelError, match=r"of the class AutoencoderKL\); give an AutoencoderTiny's"):
        artifact.load_tiny_decoder(str(folder / "vae"))
    with pytest.raises(errors.ModelError, match=r"is no tiny decoder .*madebyollin/taesdxl"):
        artifact.load_tiny_decoder(str(folder))
    name = pathlib.Path(tiny_decoder(tmp_path / "tiny"))
    (path,) = name.glob("*.safetensors")
    weights = safetensors.torch.load_file(path)
    weights["decoder.layers.0.bias"][0] = float("nan")
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    with pytest.raises(errors.ModelError, match=r"decoder\.layers\.0\.bias holds NaN"):
        artifact.load_tiny_decoder(str(name))
