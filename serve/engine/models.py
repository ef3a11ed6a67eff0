"""Teacher and student in memory: text encoders and autoencoder once, two U-Nets."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_kd import artifact, errors, pipeline
from diffusion_kd.denoiser import Denoiser
from eval import images
from serve.engine.requests import ImageRequest
from serve.engine.trajectory import FewStepTrajectory, TeacherTrajectory, Trajectory

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """What a tier denoises with.

    timesteps: a student's, by step count; None for a teacher, which takes any. sha256: of the files it came from.
    """

    source: str
    sha256: str
    parts: artifact.Parts
    denoiser: Denoiser
    timesteps: Mapping[int, list[int]] | None = None

    @property
    def version(self) -> str:
        """The last part of where it came from, and which weights those are."""
        return f"{self.source.rstrip('/').rsplit('/', 1)[-1]}@{self.sha256[:12]}"

    @property
    def device(self) -> torch.device:
        return _weight(self.parts.unet).device

    @property
    def dtype(self) -> torch.dtype:
        return _weight(self.parts.unet).dtype

    def passes(self, steps: int) -> int:
        """Passes of the network of so many steps: a second order scheduler, as Heun's, has two in all but the last."""
        order = 1 if self.timesteps is not None else self.parts.scheduler.order
        return int(steps * order - (order - 1))

    def begin(self, request: ImageRequest, seed: int) -> Trajectory:
        """The trajectory of one image of a request."""
        width, height = request.size_px
        downscale = self.parts.downscale
        shape = (1, self.parts.unet.config.in_channels, height // downscale, width // downscale)
        if self.timesteps is None:
            return TeacherTrajectory(self.denoiser, self.parts.scheduler, request.steps, shape, seed, self.device)
        return FewStepTrajectory(self.denoiser, self.timesteps[request.steps], shape, seed, self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 in [-1, 1], on the device; not finite where the latents are not.

        An autoencoder that overflows in half precision, as SDXL's does, goes on in float32 from then on.
        """
        vae: Any = self.parts.vae
        dtype = _weight(vae).dtype
        images = vae.decode(latents.to(dtype) / vae.config.scaling_factor, return_dict=False)[0].float()
        if dtype == torch.float16 and bool((_finite(latents) & ~_finite(images)).any()):
            log.warning("the autoencoder overflows in half precision; it is float32 from now on")
            vae.to(torch.float32)
            return self.decode(latents)
        # Clamping would make white of what is infinite.
        return torch.where(torch.isfinite(images), images, torch.nan).clamp(-1, 1)


def _weight(module: nn.Module) -> Tensor:
    """Any of them. diffusers' own `dtype` looks at all: a millisecond in every step."""
    return next(module.parameters())


def _finite(rows: Tensor) -> Tensor:
    """Whether each row (B, ...) is, (B,)."""
    return torch.isfinite(rows).flatten(1).all(1)


def load_pair(premium: str, turbo: str, *, device: str = "auto", precision: str = "auto") -> dict[str, Model]:
    """The models of the tiers `premium`, a teacher, and `turbo`, a student.

    device: as torch spells it; "auto": CUDA where there is one. precision: fp32, fp16 or bf16 of the networks; "auto":
    fp16 on CUDA, else fp32. The student's text encoders and autoencoder are its teacher's, where the weights agree in
    half precision, as exports are stored; else both are kept, which is said in the log.
    Raises ModelError, or ConfigError for a device that this machine has not.
    """
    if (artifact.resolve(premium) / artifact.DISTILLATION_FILE).exists():
        raise errors.ModelError(f"{premium} is a student; give its teacher as premium, and the student as turbo")
    teacher, student = pipeline.load_teacher(premium), pipeline.load_student(turbo)
    parts = _share(teacher.parts, student.parts)
    where = _device(device)
    for each in (teacher.parts, parts):
        each.to(where, _dtype(precision, where))
    few = Denoiser(parts.unet, student.denoiser.schedule, student.denoiser.prediction_type)
    return {
        "premium": Model(premium, images.artifact_sha256(premium), teacher.parts, teacher.denoiser),
        "turbo": Model(turbo, images.artifact_sha256(turbo), parts, few, student.timesteps),
    }


def _share(teacher: artifact.Parts, student: artifact.Parts) -> artifact.Parts:
    """The student's parts, with the teacher's in place of those that are the same."""
    parts = student
    if _same(teacher.vae, student.vae) and teacher.vae.config.scaling_factor == student.vae.config.scaling_factor:
        parts = dataclasses.replace(parts, vae=teacher.vae)
    if _same(teacher.text, student.text) and _tokens(teacher) == _tokens(student):
        parts = dataclasses.replace(parts, text=teacher.text)
    for name in ("vae", "text"):
        if getattr(parts, name) is getattr(student, name):
            log.warning("the student's %s is not its teacher's: both are kept in memory", name)
    return parts


def _same(one: nn.Module, other: nn.Module) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(
        mine[name].shape == others[name].shape and torch.equal(mine[name].half(), others[name].half()) for name in mine
    )


def _tokens(parts: artifact.Parts) -> list[Any]:
    return [(tokenizer.get_vocab(), tokenizer.model_max_length) for tokenizer in parts.text.tokenizers]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise errors.ConfigError(f"device {name!r} cannot be used: {errors.first_line(error)}") from None
    return device


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
