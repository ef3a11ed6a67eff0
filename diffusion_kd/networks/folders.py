"""Models in diffusers' layout: a folder of folders, one for each part, with configs and safetensors."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
import transformers

from diffusion_kd import errors
from diffusion_kd.conditioning import PromptEncoder
from diffusion_kd.networks.parts import Parts, autoencoder_dtype

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def check(name: str, folder: pathlib.Path) -> None:
    """Raise ModelError if a folder, called `name` in the message, lacks a part."""
    for part in PARTS:
        if not (folder / part).is_dir():
            raise errors.ModelError(f"{name} has no {part}/; an SDXL pipeline folder has {', '.join(PARTS)}")


def load(folder: pathlib.Path, dtype: torch.dtype) -> Parts:
    """The parts of a pipeline's folder, weights in `dtype`; an autoencoder that it does not suit stays in float32.

    Raises ValueError for weights that are missing; OSError, KeyError, RuntimeError and SafetensorError come from the
    libraries.
    """
    vae_dtype = autoencoder_dtype(diffusers.AutoencoderKL.load_config(folder / "vae"), dtype)
    return Parts(
        unet=load_whole(diffusers.UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
        vae=load_whole(diffusers.AutoencoderKL, folder / "vae", torch_dtype=vae_dtype),
        text=PromptEncoder(
            *load_tokenizers(folder),
            load_whole(transformers.CLIPTextModel, folder / "text_encoder", dtype=dtype),
            load_whole(transformers.CLIPTextModelWithProjection, folder / "text_encoder_2", dtype=dtype),
        ),
        scheduler=load_scheduler(folder),
    )


def build(folder: pathlib.Path, changes: Mapping[str, object]) -> Parts:
    """The parts of a pipeline's folder on the device `meta`: no weight is read. changes: as of `load_scheduler`."""
    unet_config = diffusers.UNet2DConditionModel.load_config(folder / "unet")
    vae_config = diffusers.AutoencoderKL.load_config(folder / "vae")
    text_config, text_config_2 = (
        transformers.CLIPTextConfig.from_pretrained(folder / part) for part in ("text_encoder", "text_encoder_2")
    )
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(unet_config)
        vae = diffusers.AutoencoderKL.from_config(vae_config)
        text_encoder = transformers.CLIPTextModel(text_config)
        text_encoder_2 = transformers.CLIPTextModelWithProjection(text_config_2)
    text = PromptEncoder(*load_tokenizers(folder), text_encoder, text_encoder_2)
    return Parts(unet, vae, text, load_scheduler(folder, changes))


def load_tokenizers(folder: pathlib.Path) -> tuple[transformers.CLIPTokenizer, transformers.CLIPTokenizer]:
    """Both tokenizers of a pipeline's folder."""
    first, second = (transformers.CLIPTokenizer.from_pretrained(folder / part) for part in ("tokenizer", "tokenizer_2"))
    return first, second


def load_scheduler(folder: pathlib.Path, changes: Mapping[str, object] | None = None) -> diffusers.SchedulerMixin:
    """The scheduler of a pipeline's folder, of its own class. changes: what goes before its config's values."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    name = config.get("_class_name") if isinstance(config, dict) else None
    kind: Any = getattr(diffusers, str(name), object)
    if diffusers.SchedulerMixin not in kind.__mro__:
        raise ValueError(f"diffusers has no scheduler {name!r}")
    return kind.from_config(config, **(changes or {}))


def load_whole(kind: Any, folder: pathlib.Path, **options: torch.dtype) -> Any:
    """`from_pretrained`, but a weight that the file lacks is an error and not a random number."""
    module, report = kind.from_pretrained(folder, variant=_variant(folder), output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder.name} lacks {len(missing)} weights, {missing[0]} among them")
    return module


def _variant(folder: pathlib.Path) -> str | None:
    """The variant to load, as in `model.fp16.safetensors`; None where there are plain weights, or none at all."""
    names = [re.sub(r"-\d+-of-\d+", "", path.stem).split(".") for path in folder.glob("*.safetensors")]
    if any(len(name) == 1 for name in names):
        return None
    return min((name[1] for name in names), key=lambda variant: (variant != "fp16", variant), default=None)
