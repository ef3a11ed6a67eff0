"""SDXL's architecture made small: the parts of the reference teacher, with fresh weights.

| part           | class                         | SDXL                    | here                                |
|----------------|-------------------------------|-------------------------|-------------------------------------|
| tokenizers     | CLIPTokenizer, byte-level BPE | 49,408 tokens, 77 long  | learnt from the captions, 32 long   |
| text_encoder   | CLIPTextModel                 | 768 wide, 12 layers     | 64 wide, 3 layers                   |
| text_encoder_2 | CLIPTextModelWithProjection   | 1280 wide, 32 layers    | 128 wide, 3 layers                  |
| vae            | AutoencoderKL, f8             | 4 channels              | 12 channels                         |
| unet           | UNet2DConditionModel          | 320, 640, 1280          | 80, 128                             |
| image_encoder  | CLIPVisionModelWithProjection | (not part of SDXL)      | 128 wide, 4 layers, patches of 8 px |

The image encoder is not part of the pipeline: it is the embedded feature network.
"""

import pathlib
import tempfile
from collections.abc import Iterable

import diffusers
import tokenizers
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers
import torch
import transformers

from diffusion_kd import _progress

IMAGE_SIZE_PX = 64
LATENT_SIZE = 8
LATENT_CHANNELS = 12
MAX_TOKENS = 32
PROJECTION_DIM = 128
_WIDTHS = (64, 128)
_TIME_IDS = 6
_TIME_ID_DIM = 32


def build_tokenizer(captions: Iterable[str], merges: int = 600) -> transformers.CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learnt from `captions`; any unicode text can be encoded.

    Words that occur often become one token each; all else falls apart into bytes.
    """
    blank = transformers.CLIPTokenizer()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = blank.backend_tokenizer.normalizer
    bpe.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(alphabet) * 2 + merges,
        initial_alphabet=alphabet,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    with tempfile.TemporaryDirectory() as folder:
        bpe.model.save(folder)
        lines = pathlib.Path(folder, "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [(left, right) for left, right in (line.split(" ") for line in lines if not line.startswith("#version"))]
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *(left + right for left, right in pairs)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=pairs, model_max_length=MAX_TOKENS
    )


def save_tokenizer(tokenizer: transformers.CLIPTokenizer, folder: pathlib.Path) -> None:
    """Write a tokenizer, and its vocabulary and merges in CLIP's own files too, for libraries that read those."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def _text_config(tokenizer: transformers.CLIPTokenizer, width: int) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 4,
        projection_dim=PROJECTION_DIM,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _spread_embeddings(encoder: transformers.CLIPTextModel | transformers.CLIPTextModelWithProjection) -> None:
    """Start words and positions far apart: CLIP's deviation of 0.02 reads a caption as a bag of near-equal words."""
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.5)
    for name, weight in encoder.named_parameters():
        if name.endswith("position_embedding.weight"):
            torch.nn.init.normal_(weight, std=0.25)


def build_text_encoder(tokenizer: transformers.CLIPTokenizer) -> transformers.CLIPTextModel:
    encoder = transformers.CLIPTextModel(_text_config(tokenizer, _WIDTHS[0]))
    _spread_embeddings(encoder)
    return encoder


def build_text_encoder_2(tokenizer: transformers.CLIPTokenizer) -> transformers.CLIPTextModelWithProjection:
    encoder = transformers.CLIPTextModelWithProjection(_text_config(tokenizer, _WIDTHS[1]))
    _spread_embeddings(encoder)
    return encoder


def build_image_encoder() -> transformers.CLIPVisionModelWithProjection:
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            projection_dim=PROJECTION_DIM,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE_PX,
            patch_size=8,
            hidden_act="gelu",
        )
    )


def join_clip(
    text: transformers.CLIPTextModelWithProjection, image: transformers.CLIPVisionModelWithProjection
) -> transformers.CLIPModel:
    """A copy of two towers as one CLIP model: the embedded feature network."""
    config = transformers.CLIPConfig(
        text_config=text.config.to_dict(), vision_config=image.config.to_dict(), projection_dim=PROJECTION_DIM
    )
    clip = transformers.CLIPModel(config)
    clip.load_state_dict({"logit_scale": clip.logit_scale, **text.state_dict(), **image.state_dict()})
    return clip


def save_clip(clip: transformers.CLIPModel, tokenizer: transformers.CLIPTokenizer, folder: pathlib.Path) -> None:
    """Write the embedded feature network, in half precision, with its tokenizer and its normalisation of [-1, 1]."""
    with _progress.hidden():
        clip.half().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    size = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    transformers.CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def build_vae() -> diffusers.AutoencoderKL:
    """An f8 autoencoder: (B, 3, 64, 64) in [-1, 1] <-> (B, 12, 8, 8)."""
    widths = (16, 32, 48, 64)
    return diffusers.AutoencoderKL(
        sample_size=IMAGE_SIZE_PX,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build_unet() -> diffusers.UNet2DConditionModel:
    """SDXL's U-Net on (B, 12, 8, 8) latents. Few groups: 32 groups would normalise single channels."""
    return diffusers.UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(80, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(4, 4),
        use_linear_projection=True,
        cross_attention_dim=sum(_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_DIM,
        projection_class_embeddings_input_dim=PROJECTION_DIM + _TIME_IDS * _TIME_ID_DIM,
        norm_num_groups=8,
    )


def build_noise_scheduler(prediction_type: str) -> diffusers.DDIMScheduler:
    """SDXL's betas; `v_prediction` rescales them to zero terminal signal (Lin et al. 2023), `epsilon` keeps them."""
    return diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=prediction_type == "v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
