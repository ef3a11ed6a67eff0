"""Fine-tuning a teacher: it learns what it is shown, its other parts stay, and a distillation takes what comes out."""

import json
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_kd import artifact, errors, schedule
from diffusion_kd.networks import lora, sdxl
from diffusion_kd.objectives.base import Batch
from diffusion_kd.types import Conditioning
from eval import runs
from tests import original_naming, tiny, toys
from training import distill, finetune, teacher

SHORT = [
    "training.images=32",
    "training.batch_size=4",
    "training.accumulate=2",
    "training.warmup_images=0",
    "training.log_every_steps=2",
    "sample_steps=2",
    "precision=fp32",
    "frozen_precision=fp32",
    "gradient_checkpointing=false",
]


def tune(models: pathlib.Path, pictures: pathlib.Path, out: pathlib.Path, *more: str) -> artifact.Parts:
    teacher.main(["--teacher", str(models / "teacher"), "--data", str(pictures), "--out", str(out), *SHORT, *more])
    return artifact.load(str(out / "teacher"))


def changed(parts: artifact.Parts, original: artifact.Parts) -> list[str]:
    ours, theirs = parts.unet.state_dict(), original.unet.state_dict()
    return [name for name in theirs if not torch.allclose(ours[name], theirs[name], atol=1e-6)]


@pytest.mark.parametrize(("rank", "kept"), [(0, "fp32"), (0, "bf16"), (4, "fp32")])
def test_a_teacher_learns_and_can_be_distilled(
    rank: int, kept: str, models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """All weights move, or with LoRA those alone that carry adapters; text encoders and autoencoder stay, to the last
    bit of what they were before they were kept in half."""
    settings = (f"lora_rank={rank}", f"precision={kept}", f"frozen_precision={kept}", "training.learning_rate=1e-2")
    tuned = tune(models, pictures, tmp_path / "run", *settings)
    original = artifact.load(str(models / "teacher"))
    moved = changed(tuned, original)
    assert moved and (rank == 0 or all("attentions" in name for name in moved))
    assert ("conv_in.weight" in moved) is (rank == 0)
    for ours, theirs in ((tuned.vae, original.vae), (tuned.text, original.text)):
        pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    told = json.loads((tmp_path / "run" / "teacher" / "finetuning.json").read_text())
    assert (told["images_seen"], told["teacher"]) == (32, str(models / "teacher"))
    (run,) = runs.find(tmp_path / "run")
    assert run.kind == runs.Kind.TEACHER and "denoise" in {curve.tag for curve in runs.read(run).curves}
    command = tiny.arguments(models, tmp_path / "student", "--data", str(pictures), f"precision={kept}")
    distill.main([*command, "--teacher", str(tmp_path / "run" / "teacher")])
    assert (tmp_path / "student" / "student" / "distillation.json").is_file()


def test_adapters_learn_and_are_fused_at_the_size_asked_for(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size_px, seen, forward = 3 * toys.IMAGE_SIZE_PX // 2, set[int](), finetune.Denoising.forward

    def watched(module: finetune.Denoising, batch: Batch) -> dict[str, Tensor]:
        seen.update(batch.latents.shape[-2:])
        return forward(module, batch)

    monkeypatch.setattr(finetune.Denoising, "forward", watched)
    tuned = tune(models, pictures, tmp_path / "run", "lora_rank=4", "training.learning_rate=1e-2", f"size_px={size_px}")
    original = artifact.load(str(models / "teacher"))
    assert seen == {tuned.unet.config.sample_size} == {size_px // original.downscale}
    assert tuned.size_px == size_px and original.size_px == toys.IMAGE_SIZE_PX
    moved = changed(tuned, original)
    assert moved and all("attentions" in name for name in moved)
    adapted = {name for name in tuned.unet.state_dict() if name.removesuffix(".weight").endswith(lora.TARGETS)}
    assert set(moved) == adapted


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_a_single_file_learns_and_goes_on_with_its_base_alone(pictures: pathlib.Path, tmp_path: pathlib.Path) -> None:
    file, out = tmp_path / "model.safetensors", tmp_path / "run"
    parts = sdxl.build_parts("cpu", original_naming.NARROW)
    for base in ("base", "other"):
        artifact.save_pipeline(tmp_path / base, parts=parts)
    original_naming.save(file, parts, dtype=torch.float16)
    given = ["--teacher", str(file), "--data", str(pictures), "--out", str(out), *SHORT, "size_px=64", "lora_rank=4"]
    teacher.main([*given, "training.learning_rate=1e-2", "--base", str(tmp_path / "base")])
    told = json.loads((out / "teacher" / "finetuning.json").read_text())
    assert (told["teacher"], told["base"]) == (str(file), str(tmp_path / "base"))
    tuned = artifact.load(str(out / "teacher"))
    assert tuned.size_px == 64 and changed(tuned, artifact.load(str(file), base=str(tmp_path / "base")))
    with pytest.raises(errors.ConfigError, match="holds a run with base = "):
        teacher.main([*given, "training.learning_rate=1e-2", "--base", str(tmp_path / "other")])


def test_the_loss_falls_where_there_is_little_to_learn(
    models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    more = ("training.images=400", "training.learning_rate=3e-3", "lora_rank=0", "training.sample_every_steps=1000")
    tune(models, pictures, tmp_path / "run", *more)
    (run,) = runs.find(tmp_path / "run")
    (curve,) = [curve for curve in runs.read(run).curves if curve.tag == "denoise"]
    assert sum(curve.values[-5:]) < 0.8 * sum(curve.values[:5])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_perfect_network_has_no_loss(kind: str) -> None:
    """A U-Net that says what it should, whatever it predicts."""
    parts = toys.tiny_parts(kind)
    batch, denoiser = toys.tiny_batch(parts), parts.denoiser()
    x0 = batch.latents

    def knowing(x_t: Any, timesteps: Any, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        noise = denoiser.schedule.noise_from(x0, x_t, timesteps)
        return (denoiser.target(x0, noise, timesteps),)

    denoiser.unet.forward = knowing
    losses = finetune.Denoising(denoiser, 0.0)(batch)
    assert losses["denoise"].item() == pytest.approx(0, abs=1e-4)


def test_velocity_and_noise_are_what_the_papers_say() -> None:
    x0, noise, timesteps = (
        torch.tensor(2.0).reshape(1, 1, 1, 1),
        torch.tensor(3.0).reshape(1, 1, 1, 1),
        torch.tensor([499]),
    )
    for kind in ("epsilon", "v_prediction"):
        denoiser = toys.tiny_parts(kind).denoiser()
        alpha, sigma = denoiser.schedule.at(timesteps)
        expected = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0}[kind]
        torch.testing.assert_close(denoiser.target(x0, noise, timesteps), expected)
    assert isinstance(denoiser.schedule, schedule.NoiseSchedule)


def test_dropped_captions_are_zeros_and_the_others_stay() -> None:
    cond = Conditioning(torch.ones(2, 3, 4), torch.ones(2, 5), torch.ones(2, 6))
    without = finetune._without(cond, torch.tensor([True, False]))
    assert without.prompt_embeds.sum((1, 2)).tolist() == [0, 12] and without.pooled.sum(1).tolist() == [0, 5]
    assert without.time_ids.sum().item() == 12


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["caption_dropout=2"], "caption_dropout is 2.0"),
        (["sample_steps=0"], "sample_steps is 0"),
        (["lora_rank=4", "parallel=fsdp2"], "contradict"),
        (["frozen_precision=bf16"], "precision=bf16"),
        (["stages=[vae]"], "unknown config key 'stages'"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    more: list[str], said: str, models: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(errors.ConfigError, match=said):
        tune(models, pictures, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def test_it_takes_data_of_ones_own(models: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.ConfigError, match="with --data"):
        teacher.main(["--teacher", str(models / "teacher"), "--out", str(tmp_path / "run")])
