"""Models on disk: SDXL-layout diffusers folders, and students exported as such with `distillation.json`.

A model is asked for by a folder, a hub id, or the names of the shipped ones: `shapes-teacher`, `shapes-student`.

A student's folder is a plain `StableDiffusionXLPipeline` with an `LCMScheduler` that sends each step's clean
estimate through fresh noise at the trained timesteps, so `num_inference_steps=N, guidance_scale=0` in plain diffusers
is right. `distillation.json` carries what inference must not get wrong, and where the student came from.
"""

import copy
import dataclasses
import json
import pathlib
import shutil
import tempfile
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from torch import nn

from diffusion_kd import _progress, errors, types
from diffusion_kd.conditioning import PromptEncoder
from diffusion_kd.denoiser import Denoiser
from diffusion_kd.schedule import NoiseSchedule

DISTILLATION_FILE = "distillation.json"
SCHEMA_VERSION = 1
SHIPPED = {
    name: pathlib.Path(__file__).parent / "shapes" / "weights" / name
    for name in ("shapes-teacher", "shapes-student", "shapes-encoder")
}
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """The parts of an SDXL pipeline, loaded and checked."""

    unet: diffusers.UNet2DConditionModel
    vae: diffusers.AutoencoderKL
    text: PromptEncoder
    scheduler: diffusers.SchedulerMixin

    @property
    def size_px(self) -> int:
        """Height and width that the U-Net was made for."""
        return int(self.unet.config.sample_size * self.downscale)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def denoiser(self) -> Denoiser:
        kind = types.prediction_type(self.scheduler.config.prediction_type)
        return Denoiser(self.unet, NoiseSchedule.from_scheduler(self.scheduler), kind)

    def to(self, device: torch.device | str) -> "Parts":
        for part in (self.unet, self.vae, self.text):
            part.to(device)
        return self


@dataclasses.dataclass(frozen=True, slots=True)
class Distillation:
    """What `distillation.json` holds besides its `schema_version`.

    student_timesteps: every step count the student was trained for -> its timesteps, in sampling order.
    guidance_scale: always 0: the student has learnt its teacher's guidance.
    lineage: teacher, data, code version, config and whatever else made this student.
    """

    objective: str
    student_timesteps: dict[str, list[int]]
    prediction_type: str
    size_px: int
    lineage: dict[str, Any]
    guidance_scale: float = 0.0


def resolve(name_or_path: str) -> pathlib.Path:
    """The local folder of a shipped name, a folder, or a hub id (downloaded). Raises ModelError."""
    if name_or_path in SHIPPED:
        return SHIPPED[name_or_path]
    path = pathlib.Path(name_or_path)
    if path.exists():
        return path
    shipped = ", ".join(sorted(SHIPPED))
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/")):
        raise errors.ModelError(
            f"no model {name_or_path!r}: not a folder, not a hub id (owner/name), not one of {shipped}"
        )
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name_or_path))
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of several libraries
        raise errors.ModelError(
            f"no model {name_or_path!r}: not a folder, not one of {shipped}, and the hub did not give it: "
            f"{str(error).splitlines()[0]}"
        ) from None


def load(name_or_path: str) -> Parts:
    """Load an SDXL-layout pipeline folder in float32, each part checked.

    Raises ModelError for a missing part, an unsupported prediction type, or weights that are not finite.
    """
    folder = resolve(name_or_path)
    for part in _PARTS:
        if not (folder / part).is_dir():
            raise errors.ModelError(f"{name_or_path} has no {part}/; an SDXL pipeline folder has {', '.join(_PARTS)}")
    try:
        with _progress.hidden():
            parts = _load_parts(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise errors.ModelError(f"{name_or_path} cannot be loaded: {str(error).splitlines()[0]}") from None
    types.prediction_type(parts.scheduler.config.prediction_type)
    for name, module in (("unet", parts.unet), ("vae", parts.vae), ("text encoders", parts.text)):
        _check_finite(f"{name_or_path}, {name}", module)
        module.eval().requires_grad_(False)
    return parts


def _load_parts(folder: pathlib.Path) -> Parts:
    return Parts(
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text=PromptEncoder(
            transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
            transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
        ),
        scheduler=_load_scheduler(folder),
    )


def _load_scheduler(folder: pathlib.Path) -> diffusers.SchedulerMixin:
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    kind = getattr(diffusers, config.get("_class_name", ""), None)
    if kind is None:
        raise ValueError(f"diffusers has no scheduler {config.get('_class_name')!r}")
    return kind.from_config(config)


def _check_finite(name: str, module: nn.Module) -> None:
    for weight_name, weight in module.state_dict().items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise errors.ModelError(f"{name}: {weight_name} holds NaN or infinite values; the file is damaged")


def read_distillation(name_or_path: str) -> Distillation:
    """`distillation.json` of an exported student. Raises ArtifactError if it is missing, malformed or newer than us."""
    path = resolve(name_or_path) / DISTILLATION_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise errors.ArtifactError(f"{path} has schema version {version}; this release reads {SCHEMA_VERSION}")
        return Distillation(**content)
    except FileNotFoundError:
        raise errors.ArtifactError(
            f"{name_or_path} is not an exported student: it has no {DISTILLATION_FILE}"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise errors.ArtifactError(f"{path} is malformed: {error}") from None


def student_scheduler(teacher: diffusers.SchedulerMixin, steps: int) -> diffusers.LCMScheduler:
    """The scheduler that samples a student trained at `steps` timesteps, on its teacher's betas.

    LCM's sampler is what a student of fresh noise needs: x0_hat, then x0_hat noised to the next timestep. Its boundary
    condition c_skip * x_t + c_out * x0_hat is scaled away: ADD has none.
    """
    config = teacher.config
    return diffusers.LCMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        trained_betas=config.get("trained_betas"),
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
        original_inference_steps=steps,
        timestep_scaling=1e6,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def save_pipeline(
    folder: pathlib.Path,
    *,
    parts: Parts,
    extra: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write an SDXL-layout pipeline folder, safetensors in `dtype`. A failure leaves what stood there untouched.

    extra: further files, name -> text.
    """
    first, second = parts.text.tokenizers
    modules = {
        "vae": parts.vae,
        "text_encoder": parts.text.text_encoder,
        "text_encoder_2": parts.text.text_encoder_2,
        "unet": parts.unet,
    }
    # nn.Module's own `to`: diffusers' warns of an empty list of modules that it would rather not convert.
    halves = {name: nn.Module.to(copy.deepcopy(module), dtype=dtype) for name, module in modules.items()}
    pipeline = diffusers.StableDiffusionXLPipeline(
        **halves, tokenizer=first, tokenizer_2=second, scheduler=parts.scheduler, add_watermarker=False
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        unfinished = pathlib.Path(temporary) / folder.name
        with _progress.hidden():
            pipeline.save_pretrained(unfinished)
        for part in ("text_encoder", "text_encoder_2"):
            _declare_float32(unfinished / part / "config.json")
        for name, text in (extra or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")
        if folder.exists():
            shutil.move(folder, pathlib.Path(temporary) / "previous")
        shutil.move(unfinished, folder)


def _declare_float32(path: pathlib.Path) -> None:
    """Let a text encoder load in float32 unless asked otherwise, as diffusers loads the other parts.

    transformers goes by the stored precision; beside a float32 U-Net, half precision text is an error.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def export_student(folder: pathlib.Path, *, parts: Parts, distillation: Distillation) -> None:
    """Write a student as a plain diffusers folder with `distillation.json`.

    parts: the student's U-Net beside its teacher's other parts, with the scheduler of `student_scheduler`.
    Raises ArtifactError if the student's weights are not finite.
    """
    try:
        _check_finite("the student", parts.unet)
    except errors.ModelError as error:
        raise errors.ArtifactError(str(error)) from None
    content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(distillation)}
    save_pipeline(folder, parts=parts, extra={DISTILLATION_FILE: json.dumps(content, indent=2) + "\n"})
