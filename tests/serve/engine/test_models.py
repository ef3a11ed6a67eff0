"""Teacher and student in memory: what they share, what they are called, what decoding makes of overflow."""

import dataclasses
import logging
import pathlib
from typing import Any

import diffusers
import pytest
import torch

from diffusion_kd import artifact, errors, pipeline
from serve.engine import models
from tests import toys
from tests.serve.engine import doubles


def save_pair(
    folder: pathlib.Path, change: Any = lambda parts: None, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """A teacher in `dtype` and a student, whose parts `change` has changed, as an export. Returns their folders."""
    artifact.save_pipeline(folder / "teacher", parts=toys.tiny_parts(), dtype=dtype)
    parts = toys.tiny_parts()
    change(parts)
    parts = dataclasses.replace(parts, scheduler=artifact.student_scheduler(parts.scheduler, 4))
    distillation = artifact.Distillation("add", pipeline.trained_timesteps(4), "v_prediction", parts.size_px, {})
    artifact.export_student(folder / "student", parts=parts, distillation=distillation)
    return str(folder / "teacher"), str(folder / "student")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return save_pair(tmp_path_factory.mktemp("pair"))


def test_what_is_the_same_is_kept_once(folders: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """The teacher's folder is in float32 and the export in float16: they agree as exports are stored."""
    pair = models.load_pair(*folders, device="cpu")
    assert pair["turbo"].parts.vae is pair["premium"].parts.vae
    assert pair["turbo"].parts.text is pair["premium"].parts.text
    assert pair["turbo"].parts.unet is not pair["premium"].parts.unet
    assert pair["turbo"].denoiser.unet is pair["turbo"].parts.unet
    assert pair["turbo"].timesteps == doubles.TIMESTEPS and pair["premium"].timesteps is None
    assert caplog.text == ""


def change_vae(parts: artifact.Parts) -> None:
    next(parts.vae.parameters()).mul_(1.5)


def change_text(parts: artifact.Parts) -> None:
    next(parts.text.parameters()).mul_(1.5)


def change_scale(parts: artifact.Parts) -> None:
    parts.vae.register_to_config(scaling_factor=0.25)


@pytest.mark.parametrize(
    ("change", "own", "shared"),
    [(change_vae, "vae", "text"), (change_text, "text", "vae"), (change_scale, "vae", "text")],
)
def test_what_differs_is_kept_twice_and_said(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, change: Any, own: str, shared: str
) -> None:
    with caplog.at_level(logging.WARNING):
        pair = models.load_pair(*save_pair(tmp_path, change), device="cpu")
    premium, turbo = pair["premium"].parts, pair["turbo"].parts
    assert getattr(turbo, own) is not getattr(premium, own)
    assert getattr(turbo, shared) is getattr(premium, shared)
    assert f"the student's {own} is not its teacher's" in caplog.text
    assert f"the student's {shared}" not in caplog.text


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_the_networks_are_of_the_precision_asked_for(
    folders: tuple[str, str], precision: str, dtype: torch.dtype
) -> None:
    for model in models.load_pair(*folders, device="cpu", precision=precision).values():
        assert model.dtype == model.parts.vae.dtype == next(model.parts.text.parameters()).dtype == dtype
        assert model.device == torch.device("cpu")


def test_half_precision_leaves_the_autoencoder_out(folders: tuple[str, str]) -> None:
    """diffusers' `force_upcast`, which SDXL's autoencoder sets."""
    for model in models.load_pair(*folders, device="cpu", precision="fp16").values():
        assert model.dtype == torch.float16 and model.parts.vae.dtype == torch.float32


def test_low_precision_works_end_to_end(folders: tuple[str, str]) -> None:
    low, full = (models.load_pair(*folders, device="cpu", precision=precision) for precision in ("bf16", "fp32"))
    wanted = [
        doubles.request("turbo", seeds=(1, 2), steps=2, previews=1),
        doubles.request(seeds=(3,), steps=4, guidance_scale=3.0),
        doubles.request(seeds=(3,), steps=4, guidance_scale=3.0, negative_prompt="a star"),
    ]
    with doubles.running(low) as engine:
        for one in wanted:
            assert 0 < doubles.furthest(doubles.images(engine.submit(one)), doubles.by_pipeline(full, one)) < 40


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_named(folders: tuple[str, str], device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(errors.ConfigError, match=f"device '{device}' cannot be used"):
        models.load_pair(*folders, device=device)


def test_a_missing_model_is_an_error(folders: tuple[str, str], tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.ModelError):
        models.load_pair(str(tmp_path / "nothing"), folders[1])
    with pytest.raises(errors.ModelError):
        models.load_pair(folders[0], folders[0])  # a teacher is no student


def test_a_version_names_the_folder_and_the_weights(folders: tuple[str, str], tmp_path: pathlib.Path) -> None:
    premium, turbo = models.load_pair(*folders, device="cpu").values()
    assert premium.version == f"teacher@{premium.sha256[:12]}"
    assert turbo.version == f"student@{turbo.sha256[:12]}" and len(turbo.sha256) == 64
    other = models.load_pair(*save_pair(tmp_path, change_vae), device="cpu")
    assert other["premium"].version == premium.version and other["turbo"].version != turbo.version
    assert dataclasses.replace(premium, source="owner/model/").version.startswith("model@")


@pytest.mark.filterwarnings(doubles.NUMPY_2)
def test_a_second_order_scheduler_takes_two_passes_a_step() -> None:
    config = toys.tiny_parts("epsilon").scheduler.config
    for name in ("DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "HeunDiscrete"):
        pair = doubles.toy_models(getattr(diffusers, f"{name}Scheduler").from_config(config))
        for steps in (1, 2, 7):
            assert pair["premium"].passes(steps) == pair["premium"].begin(doubles.request(steps=steps), 0).remaining
        assert pair["turbo"].passes(3) == 3


def test_the_size_asked_for_is_that_of_the_latents() -> None:
    one = doubles.toy_models()["premium"].begin(doubles.request(size_px=(32, 16)), 0)
    assert one.x_t.shape == (1, toys.LATENT_CHANNELS, 8, 16)  # height comes first


# --- decoding ---------------------------------------------------------------------------------------


class Autoencoder(torch.nn.Module):
    """One that shows the first three channels, brightened beyond what half precision holds."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain, self.calls = gain, 0
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
        self.config = toys.tiny_parts().vae.config

    def decode(self, latents: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        self.calls += 1
        assert latents.dtype == self.weight.dtype
        return (latents[:, :3] * self.gain / self.gain,)


def model_with(vae: Any) -> models.Model:
    model = doubles.toy_models()["premium"]
    return dataclasses.replace(model, parts=dataclasses.replace(model.parts, vae=vae))


def test_an_autoencoder_that_overflows_goes_on_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    vae = Autoencoder(1e6)
    model, latents = model_with(vae), torch.full((2, 4, 2, 2), 0.25)
    assert torch.allclose(model.decode(latents), torch.full((2, 3, 2, 2), 0.5))
    assert (vae.calls, vae.weight.dtype) == (2, torch.float32)
    assert "the autoencoder overflows in half precision" in caplog.text
    model.decode(latents)
    assert vae.calls == 3


def test_a_neighbour_that_is_not_finite_does_not_hide_an_overflow() -> None:
    latents = torch.full((2, 4, 2, 2), 0.25)
    latents[1, 0, 0, 0] = torch.nan
    images = model_with(Autoencoder(1e6)).decode(latents)
    assert torch.allclose(images[0], torch.tensor(0.5))
    assert not images[1].isfinite().all()


def test_latents_that_are_not_finite_are_no_overflow() -> None:
    vae = Autoencoder(1.0)
    latents = torch.full((1, 4, 2, 2), torch.nan)
    assert not model_with(vae).decode(latents).isfinite().all()
    assert (vae.calls, vae.weight.dtype) == (1, torch.float16)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_infinite_does_not_become_white(value: float) -> None:
    vae = Autoencoder(1.0).to(torch.float32)
    latents = torch.full((2, 4, 2, 2), 9.0)
    latents[0, 1, 0, 0] = value
    images = model_with(vae).decode(latents)
    assert not images[0].isfinite().all()
    assert torch.equal(images[1], torch.ones(3, 2, 2))
