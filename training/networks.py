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
    student: of `earlier_student`, to go on from. If None it begins as a copy of the teacher, or for adapters as the
        teacher's own U-Net, which then carries them.
    """
    teacher = parts.denoiser()
    if student is None and config.lora_rank:
        student, teacher = teacher, lora.WithoutAdapters(teacher.unet, teacher.schedule, teacher.prediction_type)
    elif student is None:
        student = copy.deepcopy(teacher)  # before it is rounded
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
        return features.DinoFeatures(weights=rest or True, size_px=dino_px(size_px))
    if kind == "open_clip":
        architecture, _, weights = rest.partition(":")
        return features.OpenClipFeatures(architecture, weights or None)
    return pipeline.load_feature_network(name)


def feature_architecture(name: str, size_px: int) -> features.FeatureNetwork:
    """What `load_feature_network` would load, on `meta`. Raises ModelError."""
    kind, _, rest = name.partition(":")
    with torch.device("meta"):
        if kind == "dinov2":
            return features.DinoFeatures(size_px=dino_px(size_px))
        if kind == "open_clip":
            return features.OpenClipFeatures(rest.partition(":")[0])
    return features.clip_architecture(artifact.resolve(name, ()), name)


def dino_px(size_px: int) -> int:
    """Whole patches of 14 px, and not above DINOv2's own 518."""
    return min(518, size_px // 14 * 14)


def earlier_student(start: str, teacher: artifact.Parts) -> Denoiser:
    """An earlier student of this teacher, by name or folder, in float32: what adapters learnt may be finer than the
    rounding of weights that are kept in half.

    Raises ModelError if it is not of the teacher's architecture, prediction type and autoencoder.
    """
    earlier, base = artifact.load(start), teacher.denoiser()
    kind = earlier.scheduler.config.prediction_type
    if kind != base.prediction_type:
        raise errors.ModelError(
            f"{start} predicts {kind} and the teacher {base.prediction_type}; start from a student of this teacher"
        )
    if unlike := _unlike(teacher.unet, earlier.unet):
        raise errors.ModelError(
            f"{start} is not of the teacher's architecture ({unlike}); start from a student of this teacher"
        )
    if not _same_weights(teacher.vae, earlier.vae):
        raise errors.ModelError(
            f"{start} has another autoencoder than the teacher, so its latents mean something else; "
            "start from a student of this teacher"
        )
    earlier.unet.register_to_config(sample_size=teacher.unet.config.sample_size)
    return Denoiser(earlier.unet, base.schedule, base.prediction_type)


def _unlike(unet: nn.Module, other: nn.Module) -> str:
    """The first weight that one has and the other has not, or of another shape; "" if there is none."""
    ours, theirs = ({name: tuple(weight.shape) for name, weight in each.state_dict().items()} for each in (unet, other))
    names = [name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name)]
    return f"{names[0]}: {ours.get(names[0], 'not there')} and {theirs.get(names[0], 'not there')}" if names else ""


def _same_weights(module: nn.Module, other: nn.Module) -> bool:
    """Whether they agree to within half precision, in which a student may be stored."""
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        weight.shape == theirs[name].shape
        and torch.allclose(weight.cpu().float(), theirs[name].cpu().float(), rtol=1e-2, atol=1e-4)
        for name, weight in ours.items()
    )
