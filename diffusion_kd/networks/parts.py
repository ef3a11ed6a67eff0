"""`Parts`: the networks, tokenizers and scheduler that make up one SDXL-class model, and their precision."""

import dataclasses
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from diffusion_kd import types
from diffusion_kd.conditioning import PromptEncoder
from diffusion_kd.denoiser import Denoiser
from diffusion_kd.schedule import NoiseSchedule


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """The parts of an SDXL pipeline."""

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

    @property
    def multiple_px(self) -> int:
        """What a picture's sides must be multiples of: pixels per latent cell times the U-Net's stride."""
        return int(self.downscale * 2 ** (len(self.unet.config.block_out_channels) - 1))

    def denoiser(self) -> Denoiser:
        kind = types.prediction_type(self.scheduler.config.prediction_type)
        return Denoiser(self.unet, NoiseSchedule.from_scheduler(self.scheduler), kind)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Parts":
        """Move the parts, and keep them in `dtype` if one is given: all but an autoencoder that it does not suit."""
        nn.Module.to(self.unet, device, dtype)
        return self.encoders_to(device, dtype)

    def encoders_to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Parts":
        """`to`, of the text encoders and the autoencoder alone."""
        # nn.Module's own `to`: diffusers' and transformers' have opinions of their own on precision.
        nn.Module.to(self.text, device, dtype)
        nn.Module.to(self.vae, device, None if dtype is None else autoencoder_dtype(self.vae.config, dtype))
        return self

    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) float32 of images (B, 3, H, W) in [-1, 1]: the means, without their noise."""
        mean = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean.float()
        return mean * self.vae.config.scaling_factor  # type: ignore[no-any-return]


def autoencoder_dtype(config: Any, dtype: torch.dtype) -> torch.dtype:
    """The precision of an autoencoder beside networks in `dtype`, by its config.

    SDXL's own overflows in float16, which its config says with `force_upcast`; such a one stays in float32. bfloat16
    has float32's range.
    """
    upcast = dtype == torch.float16 and config.get("force_upcast", True)
    return torch.float32 if upcast else dtype
