"""Toys of the true architecture: an SDXL pipeline of a few thousand weights, and a feature network."""

from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from diffusion_kd import artifact, conditioning
from diffusion_kd.networks import discriminator, features
from diffusion_kd.objectives.base import Batch
from diffusion_kd.shapes import model

LATENT_CHANNELS, LATENT_SIZE, IMAGE_SIZE_PX, WIDTH, PROJECTION = 4, 8, 16, 16, 8


def tiny_parts(prediction_type: str = "v_prediction") -> artifact.Parts:
    """A random SDXL pipeline: 16x16 px images, 4x8x8 latents. The same weights at every call."""
    torch.manual_seed(0)
    tokenizer = model.build_tokenizer(["a red circle", "a blue star above a green ring"], merges=40)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": PROJECTION,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": model.MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = conditioning.PromptEncoder(
        tokenizer,
        tokenizer,
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)),
        transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config)),
    )
    vae = diffusers.AutoencoderKL(
        sample_size=IMAGE_SIZE_PX,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=(2, 2),
        use_linear_projection=True,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=PROJECTION + 6 * 8,
        norm_num_groups=8,
    )
    parts = artifact.Parts(unet, vae, text, model.build_noise_scheduler(prediction_type))
    for part in (unet, vae, text):
        part.eval().requires_grad_(False)
    return parts


class ToyFeatures(features.FeatureNetwork):
    """Two random convolutions as a feature network."""

    name, map_channels, vector_dim = "toy", (8, 8), 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1)
        self._freeze()

    def forward(self, images: Tensor) -> features.Features:
        shallow = self.first(images).tanh()
        deep = self.second(shallow).tanh()
        return features.Features((shallow, deep), deep.mean((2, 3)))


def tiny_batch(parts: artifact.Parts, count: int = 4, step: int = 0, seed: int = 0) -> Batch:
    """A batch of random images that fit `tiny_parts`."""
    generator = torch.Generator().manual_seed(seed)
    size = (IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    cond = parts.text.encode([f"a {word} circle" for word in ("red", "blue", "green", "pink")[:count]], size)
    return Batch(
        images=torch.rand((count, 3, *size), generator=generator) * 2 - 1,
        latents=torch.randn((count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE), generator=generator),
        cond=cond,
        uncond=parts.text.encode([""] * count, size),
        negative=parts.text.encode(["a mess"] * count, size),
        step=step,
        rows=range(count),
        seed=(seed,),
    )


def taught(heads: nn.Module) -> Any:
    """Discriminator heads that have learnt something: fresh ones judge everything 0."""
    torch.manual_seed(5)
    for module in heads.modules():
        if isinstance(module, discriminator.Head) and module.project is not None:
            module.project.reset_parameters()
    return heads
