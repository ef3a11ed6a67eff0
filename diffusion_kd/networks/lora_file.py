"""A student's adapters as a file that every reader of diffusers' LoRA files takes, and back into a U-Net.

The file holds `unet.<layer>.lora.down.weight` (rank, in) and `.lora.up.weight` (out, rank). An adapter's scale, alpha /
rank, is multiplied into `up`: a reader that knows no alpha takes it for the rank, and is right.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import safetensors.torch
import torch
from torch import Tensor, nn

from diffusion_kd import errors
from diffusion_kd.networks import lora

NAME = "pytorch_lora_weights.safetensors"
_PROBED_WEIGHTS, _PROBED_VALUES = 16, 4


def carries_adapter(unet: nn.Module) -> bool:
    return lora.ADAPTER in getattr(unet, "peft_config", {})


def weights(unet: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The student's adapters, on the CPU in `dtype`, by diffusers' names without `unet.`.

    Raises ArtifactError without any, for adapters that are more than low-rank products of one rank, or for values that
    are not finite in `dtype`.
    """
    if not carries_adapter(unet):
        raise errors.ArtifactError(f"the U-Net carries no adapter named {lora.ADAPTER!r}; export it as a pipeline")
    config: Any = unet.peft_config[lora.ADAPTER]  # type: ignore[index]
    _require_plain(config)
    found = {}
    modules: Iterable[tuple[str, Any]] = unet.named_modules()
    for name, layer in modules:
        if lora.ADAPTER in getattr(layer, "lora_A", ()):
            down, up = (getattr(layer, half)[lora.ADAPTER].weight.detach() for half in ("lora_A", "lora_B"))
            found[f"{name}.lora.down.weight"] = _stored(down, dtype)
            found[f"{name}.lora.up.weight"] = _stored(up.float() * layer.scaling[lora.ADAPTER], dtype)
    for name, weight in found.items():
        if not bool(torch.isfinite(weight).all()):
            raise errors.ArtifactError(
                f"the student's {name} holds NaN or infinite values in {dtype}; "
                "train anew, with a lower learning rate, in another folder"
            )
    return found


def _require_plain(config: Any) -> None:
    odd = [name for name in ("use_dora", "lora_bias", "modules_to_save", "rank_pattern") if getattr(config, name, None)]
    odd += ["bias"] * (getattr(config, "bias", "none") != "none")
    if odd:
        raise errors.ArtifactError(
            f"these adapters were made with {', '.join(odd)}, which a LoRA file for every reader cannot hold; "
            "export the student as a pipeline"
        )


def _stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to("cpu", dtype).contiguous()


def write(folder: pathlib.Path, adapters: Mapping[str, Tensor]) -> None:
    """Write what `weights` gave, as `NAME` in `folder`."""
    diffusers.StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=dict(adapters))


def fuse(unet: Any, path: pathlib.Path) -> None:
    """Add the adapters of a file to a U-Net's own weights, in their precision.

    Raises ValueError for a file that is none of ours or does not fit the U-Net.
    """
    adapters = safetensors.torch.load_file(path)
    foreign = [key for key in adapters if not key.startswith("unet.") or ".lora." not in key]
    if foreign or not adapters:
        raise ValueError(f"{path.name} holds {foreign[0] if foreign else 'nothing'}, which is no adapter of a U-Net")
    layers = dict(unet.named_modules())
    for key in adapters:
        name = key.removeprefix("unet.").partition(".lora.")[0]
        if name not in layers:
            raise ValueError(f"{path.name} adapts {name}, which its base's U-Net has not")
    unet.load_lora_adapter(adapters, prefix="unet", adapter_name=lora.ADAPTER)
    settle(unet)


def settle(unet: Any) -> None:
    """Add the adapters that a U-Net carries to its weights, and take them off."""
    unet.fuse_lora(adapter_names=[lora.ADAPTER])
    unet.unload_lora()


def probe(unet: nn.Module) -> dict[str, list[float]]:
    """A few values of a few weights beneath the adapters, by which a base is known again in any precision."""
    found = {
        name.replace(".base_layer.", "."): weight
        for name, weight in unet.state_dict().items()
        if weight.ndim > 1 and "lora_" not in name
    }
    names = sorted(found)[:: max(1, len(found) // _PROBED_WEIGHTS)]
    return {name: found[name].flatten()[:_PROBED_VALUES].float().tolist() for name in names}


def fits(unet: nn.Module, probed: Mapping[str, list[float]]) -> bool:
    """Whether a U-Net has the probed values, to within bfloat16's precision."""
    state = unet.state_dict()
    for name, values in probed.items():
        if name not in state:
            return False
        mine = state[name].flatten()[: len(values)].float().cpu()
        if len(mine) != len(values) or not torch.allclose(mine, torch.tensor(values), rtol=1e-2, atol=1e-4):
            return False
    return True
