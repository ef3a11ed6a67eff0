"""Low-rank adapters on a U-Net's transformer blocks (Hu et al. 2021), and the U-Net as it is without them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import peft
from peft.tuners import tuners_utils
from torch import Tensor, nn

from diffusion_kd.denoiser import Denoiser
from diffusion_kd.types import Conditioning

ADAPTER = "student"

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
"""Layers of every transformer block, as the public SDXL recipes for few-step adapters name them (LCM-LoRA, DMD2)."""


def add(unet: Any, rank: int, alpha: int) -> None:
    """Put fresh adapters, which change nothing yet, on a frozen U-Net; they alone learn, in float32.

    unet: diffusers' UNet2DConditionModel, in any precision. alpha: the adapters' scale is alpha / rank.
    """
    unet.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS), init_lora_weights=True)
    unet.add_adapter(config, adapter_name=ADAPTER)
    for weight in unet.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def layers(unet: nn.Module) -> list[tuners_utils.BaseTunerLayer]:
    return [module for module in unet.modules() if isinstance(module, tuners_utils.BaseTunerLayer)]


class WithoutAdapters(Denoiser):
    """The denoiser that a U-Net was before it got adapters: a teacher that takes no memory of its own.

    The adapters may come after it, but before its first pass.
    Gradients may pass to x_t, but not with gradient checkpointing: the second forward pass would see the adapters.
    """

    _adapted: list[tuners_utils.BaseTunerLayer] | None = None

    def forward(self, x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        with self._bare():
            return super().forward(x_t, timesteps, cond)

    @contextlib.contextmanager
    def _bare(self) -> Iterator[None]:
        adapted = self._adapted = self._adapted or layers(self.unet)
        for layer in adapted:
            layer._disable_adapters = True  # peft's `enable_adapters` would also freeze and thaw the weights
        try:
            yield
        finally:
            for layer in adapted:
                layer._disable_adapters = False
