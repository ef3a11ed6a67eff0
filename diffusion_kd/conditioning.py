"""Prompts -> `Conditioning`: both text encoders, the pooled text, and SDXL's micro-conditioning."""

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor, nn

from diffusion_kd.types import Conditioning


class PromptEncoder(nn.Module):
    """SDXL's two tokenizers and text encoders.

    The token states are those before each encoder's last layer, as in SDXL. Gradients flow unless the caller says
    otherwise.
    """

    def __init__(
        self,
        tokenizer: transformers.CLIPTokenizer,
        tokenizer_2: transformers.CLIPTokenizer,
        text_encoder: transformers.CLIPTextModel,
        text_encoder_2: transformers.CLIPTextModelWithProjection,
    ) -> None:
        super().__init__()
        self.tokenizers = (tokenizer, tokenizer_2)
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids for both encoders, each (B, L) int64, cut and padded to the tokenizer's length."""
        first, second = (
            tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids.to(self.device)
            for tokenizer in self.tokenizers
        )
        return first, second

    def forward(self, ids: Tensor, ids_2: Tensor, size_px: tuple[int, int]) -> Conditioning:
        """Encode token ids. size_px: height and width, told to the U-Net as original and target size without crop."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        prompt_embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        # In float32: bfloat16 would round a size of 1023 px.
        told = time_ids(len(ids), size_px).to(prompt_embeds.device)
        return Conditioning(prompt_embeds, second.text_embeds, told)

    def encode(self, prompts: Sequence[str], size_px: tuple[int, int]) -> Conditioning:
        """Encode prompts without gradients."""
        with torch.no_grad():
            conditioning: Conditioning = self(*self.tokenize(prompts), size_px)
        return conditioning


def time_ids(count: int, size_px: tuple[int, int]) -> Tensor:
    """SDXL's micro-conditioning of uncropped images: (count, 6) of original size, crop corner, target size in px."""
    return torch.tensor([[*size_px, 0, 0, *size_px]], dtype=torch.float32).expand(count, -1)
