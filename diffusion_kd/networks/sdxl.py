"""SDXL's architecture, written out: networks with random weights, or with none (on the device `meta`).

| part           | class                        | SDXL-base                             | parameters    |
|----------------|------------------------------|---------------------------------------|---------------|
| text_encoder   | CLIPTextModel (ViT-L)        | 768 wide, 12 layers                   |   123,060,480 |
| text_encoder_2 | CLIPTextModelWithProjection  | 1280 wide, 32 layers                  |   694,659,840 |
| vae            | AutoencoderKL, f8            | 128, 256, 512, 512; 4 latent channels |    83,653,863 |
| unet           | UNet2DConditionModel         | 320, 640, 1280; 0, 2, 10 transformers | 2,567,463,684 |

For planning, which reads no weights, and for measuring at the true size where no weights are at hand. Narrower
`Dimensions` give the same architecture made small.
Source: the configs of stabilityai/stable-diffusion-xl-base-1.0; Podell et al. 2023 (SDXL), table 1.
"""

import dataclasses

import diffusers
import torch
import transformers

from diffusion_kd.conditioning import PromptEncoder
from diffusion_kd.networks.parts import Parts
from diffusion_kd.shapes import model

NAME = "sdxl-base"
_TIME_IDS = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Dimensions:
    """What an SDXL-class model may differ in; SDXL-base's own, if not given.

    unet_widths: channels of each level; all but the first attend. transformer_layers: transformer blocks of each level
        (the first level's number counts for nothing). vae_widths: of each level; each but the last halves the image.
    text_widths, text_layers: of both text encoders. head_width: of an attention head, everywhere but in the
        autoencoder, which has one. groups: of every group norm; they divide each width.
    time_id_width: of each of the six numbers of the micro-conditioning, as sines.
    """

    size_px: int = 1024
    unet_widths: tuple[int, ...] = (320, 640, 1280)
    transformer_layers: tuple[int, ...] = (1, 2, 10)
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 4
    text_widths: tuple[int, int] = (768, 1280)
    text_layers: tuple[int, int] = (12, 32)
    vocabulary: int = 49408
    max_tokens: int = 77
    head_width: int = 64
    groups: int = 32
    time_id_width: int = 256


BASE = Dimensions()


def build_unet(device: torch.device | str = "meta", dimensions: Dimensions = BASE) -> diffusers.UNet2DConditionModel:
    """The denoiser: (B, 4, h, w) latents, at (B,) timesteps, told (B, 77, 2048) tokens and (B, 1280) pooled text."""
    widths = dimensions.unet_widths
    attending = len(widths) - 1
    with torch.device(device):
        return diffusers.UNet2DConditionModel(
            sample_size=dimensions.size_px // 2 ** (len(dimensions.vae_widths) - 1),
            in_channels=dimensions.latent_channels,
            out_channels=dimensions.latent_channels,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * attending),
            mid_block_type="UNetMidBlock2DCrossAttn",
            up_block_types=(*("CrossAttnUpBlock2D",) * attending, "UpBlock2D"),
            layers_per_block=2,
            transformer_layers_per_block=dimensions.transformer_layers,
            # By this name diffusers means the number of heads.
            attention_head_dim=tuple(width // dimensions.head_width for width in widths),
            norm_num_groups=dimensions.groups,
            use_linear_projection=True,
            cross_attention_dim=sum(dimensions.text_widths),
            addition_embed_type="text_time",
            addition_time_embed_dim=dimensions.time_id_width,
            projection_class_embeddings_input_dim=dimensions.text_widths[1] + _TIME_IDS * dimensions.time_id_width,
        )


def build_vae(device: torch.device | str = "meta", dimensions: Dimensions = BASE) -> diffusers.AutoencoderKL:
    """The autoencoder: (B, 3, H, W) in [-1, 1] <-> (B, 4, H/8, W/8). It overflows in float16."""
    widths = dimensions.vae_widths
    with torch.device(device):
        return diffusers.AutoencoderKL(
            sample_size=dimensions.size_px,
            latent_channels=dimensions.latent_channels,
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=2,
            norm_num_groups=dimensions.groups,
            scaling_factor=0.13025,
            force_upcast=True,
        )


def build_tiny_decoder(device: torch.device | str = "meta", latent_channels: int = 4) -> diffusers.AutoencoderTiny:
    """TAESDXL's architecture: decodes SDXL's latents in a fraction of the memory. 2.4 M parameters with its encoder."""
    with torch.device(device):
        return diffusers.AutoencoderTiny(latent_channels=latent_channels)


def build_text_encoder(
    device: torch.device | str = "meta", dimensions: Dimensions = BASE
) -> transformers.CLIPTextModel:
    """CLIP ViT-L's text encoder: (B, 77) token ids -> states (B, 77, 768)."""
    with torch.device(device):
        return transformers.CLIPTextModel(_text_config(dimensions, 0, "quick_gelu"))


def build_text_encoder_2(
    device: torch.device | str = "meta", dimensions: Dimensions = BASE
) -> transformers.CLIPTextModelWithProjection:
    """OpenCLIP ViT-bigG's text encoder: (B, 77) token ids -> states (B, 77, 1280), pooled (B, 1280)."""
    with torch.device(device):
        return transformers.CLIPTextModelWithProjection(_text_config(dimensions, 1, "gelu"))


def _text_config(dimensions: Dimensions, index: int, activation: str) -> transformers.CLIPTextConfig:
    width = dimensions.text_widths[index]
    return transformers.CLIPTextConfig(
        vocab_size=dimensions.vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=dimensions.text_layers[index],
        num_attention_heads=width // dimensions.head_width,
        max_position_embeddings=dimensions.max_tokens,
        hidden_act=activation,
        bos_token_id=0,
        # SDXL's configs say so; to transformers 2 means that a text ends at its highest token id, wherever that is.
        eos_token_id=2,
        pad_token_id=1,
    )


def build_tokenizer(dimensions: Dimensions = BASE) -> transformers.CLIPTokenizer:
    """Stands in for CLIP's: it spells every text byte by byte, so its ids mean nothing to weights of CLIP's."""
    tokenizer = model.build_tokenizer((), merges=0)
    tokenizer.model_max_length = dimensions.max_tokens
    return tokenizer


def build_scheduler(prediction_type: str = "epsilon") -> diffusers.EulerDiscreteScheduler:
    """SDXL's noise schedule and sampler; `v_prediction` on betas rescaled to zero terminal signal (Lin et al. 2023)."""
    rescaled = prediction_type == "v_prediction"
    return diffusers.EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        interpolation_type="linear",
        timestep_spacing="trailing" if rescaled else "leading",
        steps_offset=1,
        rescale_betas_zero_snr=rescaled,
    )


def build_parts(
    device: torch.device | str = "meta", dimensions: Dimensions = BASE, *, prediction_type: str = "epsilon"
) -> Parts:
    """All of them, frozen, in float32. On any device but `meta` SDXL-base takes 14 GB, and random weights."""
    tokenizer = build_tokenizer(dimensions)
    text = PromptEncoder(
        tokenizer, tokenizer, build_text_encoder(device, dimensions), build_text_encoder_2(device, dimensions)
    )
    parts = Parts(build_unet(device, dimensions), build_vae(device, dimensions), text, build_scheduler(prediction_type))
    for module in (parts.unet, parts.vae, parts.text):
        module.eval().requires_grad_(False)
    return parts
