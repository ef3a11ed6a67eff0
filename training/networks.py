"""The networks of a distillation: which of them there are, in which precision, and which of them learn.

A training fills them with weights; a plan puts networks without any in their place.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffusion_kd import artifact, errors, pipeline
from diffusion_kd.denoiser import Denoiser
from diffusion_kd.networks import features, lora
from diffusion_kd.objectives import add

if TYPE_CHECKING:
    from training import distill


def make_objective(
    config: "distill.DistillConfig",
    parts: artifact.Parts,
    *,
    feature_network: features.FeatureNetwork,
    device: torch.device,
    tiny_decoder: Any = None,
    student: Denoiser | None = None,
) -> add.ADD:
    """The objective on `device`: frozen networks in their own precision, and a student ready to learn.

    parts: the teacher, which is moved there. tiny_decoder: in the place of the teacher's own, which decodes if None.
    student: of `earlier_student`, to go on from. It begins as the teacher if None, adapters as the teacher's own.
    """
    teacher = parts.denoiser()
    if student is None and config.lora_rank:
        student, teacher = teacher, lora.WithoutAdapters(teacher.unet, teacher.schedule, teacher.prediction_type)
    student = student or copy.deepcopy(teacher)  # before the teacher is rounded
    parts.to(device, config.frozen_dtype)
    if tiny_decoder is not None:
        nn.Module.to(tiny_decoder, device, config.frozen_dtype)
    objective = add.ADD(
        config.objective,
        student=student.to(device),
        teacher=teacher,
        vae=parts.vae if tiny_decoder is None else tiny_decoder,
        feature_network=feature_network.to(device, config.frozen_dtype),
    )
    config.prepare(student.unet, device)  # last: the objective has frozen what it shares with the teacher
    return objective


def load_feature_network(name: str, size_px: int) -> features.FeatureNetwork:
    """The discriminator's eyes, by the names of `DistillConfig.feature_network`. Raises ModelError."""
    kind, _, rest = name.partition(":")
    if kind == "dinov2":
        return features.DinoFeatures(weights=rest or True, size_px=min(518, size_px // 14 * 14))
    if kind == "open_clip":
        architecture, _, weights = rest.partition(":")
        return features.OpenClipFeatures(architecture, weights or None)
    return pipeline.load_feature_network(name)


def earlier_student(start: str, teacher: artifact.Parts) -> Denoiser:
    """An earlier student of this teacher, by name or folder, in float32: what adapters learnt may be finer than the
    rounding of weights that are kept in half.

    Raises ModelError if it is not of the teacher's architecture, prediction type and autoencoder.
    """
    student = copy.deepcopy(teacher.denoiser())
    student.unet.float()
    earlier = artifact.load(start)
    if earlier.scheduler.config.prediction_type != student.prediction_type:
        raise errors.ModelError(
            f"{start} predicts {earlier.scheduler.config.prediction_type} and the teacher {student.prediction_type}; "
            "start from a student of this teacher"
        )
    try:
        student.unet.load_state_dict(earlier.unet.state_dict())
    except RuntimeError as error:
        raise errors.ModelError(
            f"{start} is not of the teacher's architecture ({errors.first_line(error)}); "
            "start from a student of this teacher"
        ) from None
    if not _same_weights(teacher.vae, earlier.vae):
        raise errors.ModelError(
            f"{start} has another autoencoder than the teacher, so its latents mean something else; "
            "start from a student of this teacher"
        )
    return student


def _same_weights(module: nn.Module, other: nn.Module) -> bool:
    """Whether they agree to within half precision, in which a student may be stored."""
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        weight.shape == theirs[name].shape
        and torch.allclose(weight.cpu().float(), theirs[name].cpu().float(), rtol=1e-2, atol=1e-4)
        for name, weight in ours.items()
    )
