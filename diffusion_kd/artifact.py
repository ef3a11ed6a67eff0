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
from collections.abc import Sequence
from typing import Any

import diffusers
import huggingface_hub
import safetensors
import torch
import transformers
from torch import nn

from diffusion_kd import _progress, errors, files, types
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
_PARTS_WEIGHTS = tuple(f"{part}/*.safetensors" for part in _PARTS)
_OTHER_VARIANTS = ("*fp16*", "*onnx*", "*openvino*")


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

    def steps(self) -> dict[int, list[int]]:
        """`student_timesteps` with its keys as numbers, which JSON has not."""
        return {int(steps): [int(one) for one in timesteps] for steps, timesteps in self.student_timesteps.items()}


def resolve(name_or_path: str, weights: Sequence[str] = _PARTS_WEIGHTS) -> pathlib.Path:
    """The local folder of a shipped name, a folder, or a hub id (downloaded). Raises ModelError.

    weights: patterns of the files that are downloaded beside .json and .txt; a pipeline's parts, if not given.
    """
    if name_or_path in SHIPPED:
        if not SHIPPED[name_or_path].is_dir():
            raise errors.ModelError(
                f"the weights of {name_or_path} are not in this installation ({SHIPPED[name_or_path]}); "
                "install from the repository, or give a folder or a hub id"
            )
        return SHIPPED[name_or_path]
    path = pathlib.Path(name_or_path)
    if name_or_path and path.is_dir():
        return path
    shipped = ", ".join(sorted(SHIPPED))
    if path.is_file() or name_or_path.count("/") != 1 or name_or_path.startswith((".", "/")):
        raise errors.ModelError(
            f"no model {name_or_path!r}: not a folder, not a hub id (owner/name), not one of {shipped}"
        )
    try:
        wanted = ["*.json", "*.txt", *weights]
        downloaded = huggingface_hub.snapshot_download(
            name_or_path, allow_patterns=wanted, ignore_patterns=list(_OTHER_VARIANTS)
        )
        return pathlib.Path(downloaded)
    except Exception as error:  # noqa: BLE001 - the hub's client raises errors of several libraries
        raise errors.ModelError(
            f"no model {name_or_path!r}: not a folder, not one of {shipped}, and the hub did not give it: "
            f"{errors.first_line(error)}"
        ) from None


def load(name_or_path: str) -> Parts:
    """Load an SDXL-layout pipeline folder in float32, each part checked.

    Raises ModelError for a missing part, an unsupported prediction type, a U-Net that is not SDXL's or does not fit the
    autoencoder, or weights that are missing or not finite.
    """
    folder = resolve(name_or_path)
    for part in _PARTS:
        if not (folder / part).is_dir():
            raise errors.ModelError(f"{name_or_path} has no {part}/; an SDXL pipeline folder has {', '.join(_PARTS)}")
    try:
        with _progress.hidden():
            parts = _load_parts(folder)
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise errors.ModelError(f"{name_or_path} cannot be loaded: {errors.first_line(error)}") from None
    _check_kind(name_or_path, parts)
    for name, module in (("unet", parts.unet), ("vae", parts.vae), ("text encoders", parts.text)):
        if weight := _not_finite(module):
            raise errors.ModelError(
                f"{name_or_path}, {name}: {weight} holds NaN or infinite values; the file is damaged"
            )
        module.eval().requires_grad_(False)
    return parts


def _check_kind(name: str, parts: Parts) -> None:
    kind = parts.scheduler.config.get("prediction_type")
    if kind is None:
        scheduler = type(parts.scheduler).__name__
        raise errors.ModelError(f"{name}: its {scheduler} has no prediction_type; give a model with SDXL's schedulers")
    try:
        types.prediction_type(kind)
    except errors.ModelError as error:
        raise errors.ModelError(f"{name}: {error}") from None
    seen, made = parts.unet.config.in_channels, parts.vae.config.latent_channels
    if seen != made:
        raise errors.ModelError(
            f"{name}: the U-Net takes {seen} channels and the autoencoder makes {made}; give a text-to-image model"
        )
    if (addition := parts.unet.config.get("addition_embed_type")) != "text_time":
        raise errors.ModelError(
            f"{name}: the U-Net's addition_embed_type is {addition!r}; an SDXL U-Net has 'text_time'"
        )


def _load_parts(folder: pathlib.Path) -> Parts:
    return Parts(
        unet=_load_whole(diffusers.UNet2DConditionModel, folder / "unet", torch_dtype=torch.float32),
        vae=_load_whole(diffusers.AutoencoderKL, folder / "vae", torch_dtype=torch.float32),
        text=PromptEncoder(
            transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
            _load_whole(transformers.CLIPTextModel, folder / "text_encoder", dtype=torch.float32),
            _load_whole(transformers.CLIPTextModelWithProjection, folder / "text_encoder_2", dtype=torch.float32),
        ),
        scheduler=_load_scheduler(folder),
    )


def _load_whole(kind: Any, folder: pathlib.Path, **options: torch.dtype) -> Any:
    """`from_pretrained`, but a weight that the file lacks is an error and not a random number."""
    module, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder.name} lacks {len(missing)} weights, {missing[0]} among them")
    return module


def _load_scheduler(folder: pathlib.Path) -> diffusers.SchedulerMixin:
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    name = config.get("_class_name") if isinstance(config, dict) else None
    kind: Any = getattr(diffusers, str(name), object)
    if diffusers.SchedulerMixin not in kind.__mro__:
        raise ValueError(f"diffusers has no scheduler {name!r}")
    return kind.from_config(config)


def _not_finite(module: nn.Module) -> str | None:
    """The name of the first weight that holds NaN or infinite values."""
    for name, weight in module.state_dict().items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            return name
    return None


def read_distillation(name_or_path: str) -> Distillation:
    """`distillation.json` of an exported student. Raises ArtifactError if it is missing, malformed or newer than us."""
    path = resolve(name_or_path) / DISTILLATION_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise errors.ArtifactError(f"{path} has schema version {version}; this release reads {SCHEMA_VERSION}")
        distillation = Distillation(**content)
        if not distillation.steps():
            raise ValueError("student_timesteps is empty")
        return distillation
    except FileNotFoundError:
        raise errors.ArtifactError(
            f"{name_or_path} is not an exported student: it has no {DISTILLATION_FILE}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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

    extra: further files, name -> text. Raises ModelError for weights that are not finite in `dtype`.
    """
    first, second = parts.text.tokenizers
    modules = {
        "vae": parts.vae,
        "text_encoder": parts.text.text_encoder,
        "text_encoder_2": parts.text.text_encoder_2,
        "unet": parts.unet,
    }
    halves = {name: _copy_to_cpu(module, dtype) for name, module in modules.items()}
    for name, module in halves.items():
        if weight := _not_finite(module):
            raise errors.ModelError(
                f"{name} cannot be written: {weight} holds NaN or infinite values in {dtype}; "
                "train anew, with a lower learning rate, in another folder"
            )
    pipeline = diffusers.StableDiffusionXLPipeline(
        **halves, tokenizer=first, tokenizer_2=second, scheduler=parts.scheduler, add_watermarker=False
    )
    with files.written_whole(folder) as unfinished:
        with _progress.hidden():
            pipeline.save_pretrained(unfinished)
        for part, tokenizer in (("tokenizer", first), ("tokenizer_2", second)):
            # CLIP's own files too, for libraries that read those alone (transformers 4).
            tokenizer.backend_tokenizer.model.save(str(unfinished / part))
        for part in ("unet", "vae", "scheduler"):
            for path in (unfinished / part).glob("*config.json"):
                _edit(path, remove="_name_or_path")
        for part in ("text_encoder", "text_encoder_2"):
            # transformers goes by the stored precision, diffusers loads its parts in float32, and half precision text
            # beside a float32 U-Net is an error.
            _edit(unfinished / part / "config.json", remove="_name_or_path", dtype="float32")
        for name, text in (extra or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")


def _copy_to_cpu(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in `dtype`, made weight by weight: an accelerator never holds a second model."""
    weights: dict[int, Any] = {}
    for parameter in module.parameters():
        weight = parameter.detach().to("cpu", dtype, copy=True)
        weights[id(parameter)] = nn.Parameter(weight, requires_grad=False)
    # nn.Module's own `to`: diffusers' warns of an empty list of modules that it would rather not convert.
    return nn.Module.to(copy.deepcopy(module, weights), "cpu", dtype)


def _edit(path: pathlib.Path, *, remove: str, **changes: str) -> None:
    """Change a saved config. `_name_or_path`, where a part was loaded from, tells strangers of our folders."""
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    config.pop(remove, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def export_student(folder: pathlib.Path, *, parts: Parts, distillation: Distillation) -> None:
    """Write a student as a plain diffusers folder with `distillation.json`.

    parts: the student's U-Net beside its teacher's other parts, with the scheduler of `student_scheduler`.
    Raises ArtifactError if the student's weights are not finite.
    """
    content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(distillation)}
    try:
        save_pipeline(folder, parts=parts, extra={DISTILLATION_FILE: json.dumps(content, indent=2) + "\n"})
    except errors.ModelError as error:
        raise errors.ArtifactError(f"the student's {error}") from None
