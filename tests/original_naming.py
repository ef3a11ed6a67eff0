"""Writes a toy of SDXL's architecture as one file in the original naming, as checkpoints of the community come.

The opposite of what `diffusion_kd.networks.single_file` reads; only the names and the fused attention weights of the
second text encoder differ from diffusers' folders.
"""

import pathlib
import re

import safetensors.torch
import torch
from torch import Tensor, nn

from diffusion_kd.networks import sdxl
from diffusion_kd.networks.parts import Parts

NARROW = sdxl.Dimensions(
    size_px=32,
    unet_widths=(16, 32, 64),
    transformer_layers=(1, 1, 2),
    vae_widths=(8, 16),
    text_widths=(16, 32),
    text_layers=(2, 3),
    vocabulary=600,
    head_width=8,
    groups=8,
    time_id_width=8,
)
"""The layers of SDXL, a few channels wide: 32x32 px images, 4x16x16 latents."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_PER_LEVEL = 3
"""Blocks of a level in SDXL's U-Net: two layers and a downsampler, or three layers on the way up."""


def save(
    path: pathlib.Path,
    parts: Parts,
    *,
    dtype: torch.dtype = torch.float32,
    extra: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """Write `parts` as one file, and return what was written. extra: further tensors."""
    weights = {
        **{f"model.diffusion_model.{_unet(name)}": weight for name, weight in _of(parts.unet)},
        **{f"first_stage_model.{_vae(name, parts)}": _as_convolution(name, weight) for name, weight in _of(parts.vae)},
        **_clip(parts.text.text_encoder),
        **_open_clip(parts.text.text_encoder_2),
    }
    weights = {name: weight.to(dtype).contiguous() for name, weight in weights.items()} | (extra or {})
    safetensors.torch.save_file(weights, path, metadata)
    return weights


def _of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.state_dict().items())


def _renamed(name: str, table: dict[str, str]) -> str:
    """The first piece of a name that is in the table, exchanged."""
    for ours, theirs in table.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def _unet(name: str) -> str:
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name):
        way, level, kind, layer, rest = found.groups()
        index = _PER_LEVEL * int(level) + int(layer) + (way == "down")
        blocks = "input_blocks" if way == "down" else "output_blocks"
        return f"{blocks}.{index}.1.{rest}" if kind == "attentions" else f"{blocks}.{index}.0.{_renamed(rest, _RESNET)}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{_PER_LEVEL * (int(found[1]) + 1)}.0.op.{found[2]}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", name):
        return f"output_blocks.{_PER_LEVEL * int(found[1]) + 2}.2.conv.{found[2]}"
    if found := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", name):
        return f"middle_block.{2 * int(found[1])}.{_renamed(found[2], _RESNET)}"
    if name.startswith("mid_block.attentions.0."):
        return name.replace("mid_block.attentions.0", "middle_block.1")
    return _renamed(name, _UNET_ENDS)


def _vae(name: str, parts: Parts) -> str:
    levels = len(parts.vae.config.block_out_channels)
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    if found := re.fullmatch(r"(en|de)coder\.(down|up)_blocks\.(\d+)\.(resnets|\w+samplers)\.(\d+)\.(.+)", name):
        end, way, level, kind, layer, rest = found.groups()
        index = int(level) if way == "down" else levels - 1 - int(level)
        piece = f"block.{layer}" if kind == "resnets" else f"{way}sample"
        return f"{end}coder.{way}.{index}.{piece}.{rest}"
    if found := re.fullmatch(r"(..coder)\.mid_block\.resnets\.(\d)\.(.+)", name):
        return f"{found[1]}.mid.block_{int(found[2]) + 1}.{found[3]}"
    if found := re.fullmatch(r"(..coder)\.mid_block\.attentions\.0\.(.+)", name):
        return f"{found[1]}.mid.attn_1.{_renamed(found[2], _VAE_ATTENTION)}"
    return name


def _as_convolution(name: str, weight: Tensor) -> Tensor:
    """The autoencoder's attention projects by 1x1 convolutions."""
    return weight[:, :, None, None] if ".attentions." in name and weight.ndim == 2 else weight


def _clip(encoder: nn.Module) -> dict[str, Tensor]:
    names = {name: name if name.startswith("text_model.") else f"text_model.{name}" for name, _ in _of(encoder)}
    weights = {f"conditioner.embedders.0.transformer.{names[name]}": weight for name, weight in _of(encoder)}
    positions = torch.arange(77)[None]
    return weights | {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": positions}


def _open_clip(encoder: nn.Module) -> dict[str, Tensor]:
    given = {name.removeprefix("text_model."): weight for name, weight in _of(encoder)}
    weights = {
        "text_projection": given.pop("text_projection.weight").T,
        "positional_embedding": given.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": given.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": given.pop("final_layer_norm.weight"),
        "ln_final.bias": given.pop("final_layer_norm.bias"),
        "logit_scale": torch.tensor(4.6),
    }
    for name in list(given):
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        assert found is not None, name
        layer, rest = f"transformer.resblocks.{found[1]}", found[2]
        if projection := re.fullmatch(r"self_attn\.q_proj\.(weight|bias)", rest):
            pieces = [given[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            weights[f"{layer}.attn.in_proj_{projection[1]}"] = torch.cat(pieces)
        elif not re.match(r"self_attn\.[kv]_proj", rest):
            weights[f"{layer}.{_renamed(rest, _OPEN_CLIP)}"] = given[name]
    return {f"conditioner.embedders.1.model.{name}": weight for name, weight in weights.items()}
