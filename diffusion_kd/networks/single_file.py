"""SDXL checkpoints of one `.safetensors` file in the original naming (Stability AI's generative-models, "LDM").

    model.diffusion_model.*            the U-Net
    first_stage_model.*                the autoencoder
    conditioner.embedders.0.*          text_encoder, in CLIP's naming
    conditioner.embedders.1.*          text_encoder_2, in OpenCLIP's
    v_pred, ztsnr                      empty tensors by which v-prediction checkpoints say what they are

Such a file has no configs and no tokenizers; they come from a folder in diffusers' layout. The names are translated by
diffusers' own converters; that every weight is there and fits is checked here.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import diffusers
import safetensors.torch
import torch
import transformers
from diffusers.loaders import single_file_utils
from torch import Tensor

from diffusion_kd import errors
from diffusion_kd.networks.parts import autoencoder_dtype

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_TEXT, _TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_SECTIONS = {"U-Net": _UNET, "autoencoder": _VAE, "first text encoder": _TEXT, "second text encoder": _TEXT_2}

# What a file is that lacks some of these, by a piece of its tensors' names; the first that is found is said.
_OTHERS = {
    "lora_": "of a LoRA; give the model that it was made for",
    "_lora.": "of a LoRA; give the model that it was made for",
    ".lora.": "of a LoRA; give the model that it was made for",
    "joint_blocks.": "of Stable Diffusion 3",
    "double_blocks.": "of Flux",
    "cond_stage_model.transformer.": "of Stable Diffusion 1",
    "cond_stage_model.model.": "of Stable Diffusion 2",
    "conditioner.embedders.0.model.": "of SDXL's refiner",
    "control_model.": "of a ControlNet",
    "down_blocks.0.": "in diffusers' naming; give the pipeline's folder",
    "encoder.conv_in.": "of an autoencoder alone",
}
_EDM = ("edm_mean", "edm_vpred.sigma_max")


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """What a checkpoint says before any weight is read.

    names: of all its tensors. prediction_type: None if the file does not say. zero_terminal_signal: `ztsnr` is there.
    said_by: what told the prediction type; empty if nothing did.
    """

    names: tuple[str, ...]
    prediction_type: str | None
    zero_terminal_signal: bool
    said_by: str


@dataclasses.dataclass(frozen=True, slots=True)
class Networks:
    """The four networks of a checkpoint."""

    unet: diffusers.UNet2DConditionModel
    vae: diffusers.AutoencoderKL
    text_encoder: transformers.CLIPTextModel
    text_encoder_2: transformers.CLIPTextModelWithProjection


def read_header(path: pathlib.Path) -> Header:
    """Names and prediction type of an SDXL checkpoint. Raises ModelError if it is cut short or not one of SDXL."""
    if not path.is_file():
        raise errors.ModelError(f"no file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            names, metadata = tuple(file.keys()), file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise errors.ModelError(
            f"{path} is cut short or no safetensors file ({errors.first_line(error)}); fetch it again"
        ) from None
    _check_names(path, names)
    prediction_type, said_by = _prediction_type(names, metadata)
    return Header(names, prediction_type, "ztsnr" in names, said_by)


def _check_names(path: pathlib.Path, names: tuple[str, ...]) -> None:
    missing = [part for part, prefix in _SECTIONS.items() if not any(name.startswith(prefix) for name in names)]
    if found := sorted({*_EDM} & {*names}):
        raise errors.ModelError(
            f"{path} is of the EDM kind (it holds {found[0]}), which is not supported; give one of noise or velocity"
        )
    if not missing:
        return
    looks = [f", and looks like one {what}" for mark, what in _OTHERS.items() if any(mark in name for name in names)]
    raise errors.ModelError(
        f"{path} is no SDXL checkpoint in its original naming: it has no {', no '.join(missing)}{''.join(looks[:1])}"
    )


def _prediction_type(names: tuple[str, ...], metadata: Mapping[str, str]) -> tuple[str | None, str]:
    """By the marker tensors, else by the metadata of Stability AI's ModelSpec."""
    if "v_pred" in names:
        return "v_prediction", "the key v_pred"
    said = metadata.get("modelspec.prediction_type")
    if said is None:
        return None, ""
    return {"v": "v_prediction"}.get(said, said), "modelspec.prediction_type"


def load(path: pathlib.Path, base: pathlib.Path, dtype: torch.dtype) -> Networks:
    """The networks of an SDXL checkpoint in `dtype`, with the configs of the folder `base`.

    Weights that are stored in `dtype` are not copied. Raises ValueError for weights that are missing, too many or of
    another shape than the configs say; OSError, KeyError, RuntimeError and SafetensorError come from the libraries.
    """
    weights = safetensors.torch.load_file(path)
    return Networks(
        unet=_unet(_section(weights, _UNET), base / "unet", dtype),
        vae=_vae(_section(weights, _VAE), base / "vae", dtype),
        text_encoder=_text_encoder(
            transformers.CLIPTextModel,
            single_file_utils.convert_ldm_clip_checkpoint(_section(weights, _TEXT)),
            base / "text_encoder",
            dtype,
        ),
        text_encoder_2=_text_encoder_2(_section(weights, _TEXT_2), base / "text_encoder_2", dtype),
    )


def _section(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if name.startswith(prefix)}


def _unet(weights: dict[str, Tensor], folder: pathlib.Path, dtype: torch.dtype) -> diffusers.UNet2DConditionModel:
    config = diffusers.UNet2DConditionModel.load_config(folder)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(config)
    try:
        converted = single_file_utils.convert_ldm_unet_checkpoint(weights, dict(unet.config))
    except KeyError as error:
        raise ValueError(f"unet lacks the weight {error}") from None
    return _filled(unet, converted, "unet", dtype)


def _vae(weights: dict[str, Tensor], folder: pathlib.Path, dtype: torch.dtype) -> diffusers.AutoencoderKL:
    config = diffusers.AutoencoderKL.load_config(folder)
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(config)
    converted = single_file_utils.convert_ldm_vae_checkpoint(weights, dict(vae.config))
    return _filled(vae, converted, "vae", autoencoder_dtype(vae.config, dtype))


def _filled(module: Any, weights: dict[str, Tensor], part: str, dtype: torch.dtype) -> Any:
    """A module on `meta` with its weights put in place. Neither network has buffers that a file does not hold."""
    _check_weights(part, {name: weight.shape for name, weight in module.state_dict().items()}, weights)
    module.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    return module


def _check_weights(part: str, wanted: Mapping[str, torch.Size], given: Mapping[str, Tensor]) -> None:
    if missing := sorted(wanted.keys() - given.keys()):
        raise ValueError(f"{part} lacks {len(missing)} weights, {missing[0]} among them")
    if left := sorted(given.keys() - wanted.keys()):
        raise ValueError(f"{part} has {len(left)} weights more than its base, {left[0]} among them")
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ValueError(f"{part}: {name} is {tuple(given[name].shape)} and in its base {tuple(shape)}")


def _text_encoder_2(
    weights: dict[str, Tensor], folder: pathlib.Path, dtype: torch.dtype
) -> transformers.CLIPTextModelWithProjection:
    kind = transformers.CLIPTextModelWithProjection
    with torch.device("meta"):
        shell = kind(transformers.CLIPTextConfig.from_pretrained(folder))
    converted = single_file_utils.convert_open_clip_checkpoint(shell, weights, prefix=_TEXT_2)
    return _text_encoder(kind, converted, folder, dtype)


def _text_encoder(kind: Any, weights: dict[str, Tensor], folder: pathlib.Path, dtype: torch.dtype) -> Any:
    config = transformers.CLIPTextConfig.from_pretrained(folder)
    with torch.device("meta"):
        wanted = {name: weight.shape for name, weight in kind(config).state_dict().items()}
    if not any(name.startswith("text_model.") for name in wanted):
        # Since transformers 5.6 CLIPTextModel is its own text_model.
        weights = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    # Files of older tools hold positions, which are counted and not learnt.
    weights = {name: weight for name, weight in weights.items() if not name.endswith("position_ids")}
    _check_weights(folder.name, wanted, weights)
    return kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
