"""How a U-Net computes attention: the same numbers, in another time and memory.

| backend    | what computes it                             | good for                                          |
|------------|----------------------------------------------|---------------------------------------------------|
| `sdpa`     | torch's fused `scaled_dot_product_attention` | CUDA                                              |
| `xformers` | xformers' memory-efficient attention         | CUDA, where torch has no fused kernel of the card |
| `plain`    | matmul, softmax, matmul                      | training small U-Nets on CPUs                     |
| `auto`     | `sdpa` on CUDA, else `plain`                 |                                                   |

Plain attention holds the (tokens x tokens) weights of every head. On CPUs the backward pass of the fused one takes a
quarter of a small U-Net's time.
"""

import importlib
import importlib.util
from typing import Any

import diffusers
import torch
from diffusers.models import attention_processor

from diffusion_kd import errors

BACKENDS = ("auto", "sdpa", "xformers", "plain")
_PROCESSORS: dict[str, Any] = {
    "sdpa": attention_processor.AttnProcessor2_0,
    "xformers": attention_processor.XFormersAttnProcessor,
    "plain": attention_processor.AttnProcessor,
}


def use(unet: diffusers.UNet2DConditionModel, backend: str = "auto", device: torch.device | str | None = None) -> str:
    """Let a U-Net compute its attention by `backend`; returns the one in use, which is never `auto`.

    The projections stay as they are, with or without LoRA adapters of peft around them; the U-Net may be wrapped by
    peft too. device: where it will run, if it is not there yet.
    Raises ConfigError for an unknown backend, or for xformers where it cannot run.
    """
    where = torch.device(unet.device if device is None else device)
    chosen = choose(backend, where)
    unet.set_attn_processor(_PROCESSORS[chosen]())
    return chosen


def choose(backend: str, device: torch.device) -> str:
    """The backend that `use` would take on a device. Raises ConfigError as `use` does."""
    errors.require(backend in BACKENDS, "attention", backend, f"one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "sdpa" if device.type == "cuda" else "plain"
    if backend == "xformers":
        _require_xformers(device)
    return backend


def _require_xformers(device: torch.device) -> None:
    """Raise ConfigError unless xformers is installed and its kernels run on `device`."""
    instead = "take sdpa, which needs nothing but torch"
    if device.type != "cuda":
        raise errors.ConfigError(f"attention is xformers, which runs on CUDA only, not on {device}; {instead}")
    if importlib.util.find_spec("xformers") is None:
        raise errors.ConfigError(
            f"attention is xformers, which is not installed; install the extra `xformers` of this package, or {instead}"
        )
    try:
        _try_xformers(device)
    except (ImportError, NotImplementedError, OSError, RuntimeError) as error:
        raise errors.ConfigError(
            f"attention is xformers, which does not run with torch {torch.__version__} on {device} "
            f"({errors.first_line(error)}); install the xformers built for this torch, or {instead}"
        ) from None


def _try_xformers(device: torch.device) -> None:
    ops = importlib.import_module("xformers.ops")
    query = torch.zeros(1, 8, 64, dtype=torch.float16, device=device)
    ops.memory_efficient_attention(query, query, query)
