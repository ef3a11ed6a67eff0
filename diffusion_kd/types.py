"""Small frozen records that the library passes around, and the legend of tensor shapes.

Shapes: B batch, C latent channels, H W height and width in pixels, h w in latents (H/8, W/8), L tokens, D width
of the token states, P width of the pooled text, K heads of a discriminator.
Images are RGB in [-1, 1]; 8-bit arrays end in `_uint8`. Latents are scaled: what the U-Net sees.
"""

import dataclasses
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from diffusion_kd import errors

PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""What a denoiser's network predicts: the noise, the velocity `alpha_t * noise - sigma_t * x0`, or x0."""


def prediction_type(name: str) -> PredictionType:
    """Check a prediction type given by name. Raises ModelError on any other."""
    if name in get_args(PredictionType):
        return cast(PredictionType, name)
    raise errors.ModelError(
        f"prediction type {name!r} is not supported; supported are {', '.join(get_args(PredictionType))}"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Conditioning:
    """Everything SDXL's U-Net is told about a batch besides x_t and t.

    prompt_embeds: (B, L, D) token states of both text encoders, side by side.
    pooled: (B, P) pooled projection of the second text encoder.
    time_ids: (B, 6) original height, width, crop top, left, target height, width; px.
    """

    prompt_embeds: Tensor
    pooled: Tensor
    time_ids: Tensor

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def __getitem__(self, rows: Tensor) -> "Conditioning":
        return Conditioning(self.prompt_embeds[rows], self.pooled[rows], self.time_ids[rows])

    def to(self, device: torch.device) -> "Conditioning":
        return Conditioning(self.prompt_embeds.to(device), self.pooled.to(device), self.time_ids.to(device))

    @staticmethod
    def concatenate(parts: "list[Conditioning]") -> "Conditioning":
        return Conditioning(
            torch.cat([part.prompt_embeds for part in parts]),
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.time_ids for part in parts]),
        )
