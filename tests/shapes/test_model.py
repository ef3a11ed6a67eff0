"""The small SDXL: sizes that ship, a tokenizer that reads anything."""

import pathlib

import diffusers
import pytest
import torch
import transformers

from diffusion_kd.schedule import NoiseSchedule
from diffusion_kd.shapes import model, scenes

CAPTIONS = [prompt.text for prompt in scenes.draw_prompts(300, 0)]


@pytest.fixture(scope="module")
def tokenizer() -> transformers.CLIPTokenizer:
    return model.build_tokenizer(CAPTIONS)


def test_words_of_the_captions_are_single_tokens(tokenizer: transformers.CLIPTokenizer) -> None:
    assert tokenizer.tokenize("a red circle") == ["a</w>", "red</w>", "circle</w>"]
    assert max(len(ids) for ids in tokenizer(CAPTIONS).input_ids) <= model.MAX_TOKENS


def test_any_text_can_be_read(tokenizer: transformers.CLIPTokenizer) -> None:
    for text in ("", "日本", "ünïcode", "🟥 🔵", "zxqv 123", "\u202eright to left", "a\x00b"):
        ids = tokenizer(text, padding="max_length", truncation=True, max_length=model.MAX_TOKENS).input_ids
        assert len(ids) == model.MAX_TOKENS and max(ids) < len(tokenizer)
    assert tokenizer.tokenize("日") != tokenizer.tokenize("本")


def test_a_saved_tokenizer_reads_the_same(tokenizer: transformers.CLIPTokenizer, tmp_path: pathlib.Path) -> None:
    model.save_tokenizer(tokenizer, tmp_path)
    loaded = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded(CAPTIONS).input_ids == tokenizer(CAPTIONS).input_ids
    assert (tmp_path / "vocab.json").is_file() and (tmp_path / "merges.txt").is_file()


def test_the_parts_have_sdxls_classes_and_a_size_that_ships(tokenizer: transformers.CLIPTokenizer) -> None:
    unet, vae = model.build_unet(), model.build_vae()
    assert isinstance(unet, diffusers.UNet2DConditionModel) and unet.config.addition_embed_type == "text_time"
    assert isinstance(vae, diffusers.AutoencoderKL)
    first, second = model.build_text_encoder(tokenizer), model.build_text_encoder_2(tokenizer)
    assert isinstance(first, transformers.CLIPTextModel)
    assert isinstance(second, transformers.CLIPTextModelWithProjection)
    assert first.config.hidden_size + second.config.hidden_size == unet.config.cross_attention_dim
    weights = sum(weight.numel() for part in (unet, vae, first, second) for weight in part.parameters())
    assert 2 * weights < 15e6  # bytes in half precision


def test_the_vae_is_f8() -> None:
    vae = model.build_vae()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
        assert latents.shape == (1, model.LATENT_CHANNELS, model.LATENT_SIZE, model.LATENT_SIZE)
        assert vae.decode(latents).sample.shape == (1, 3, 64, 64)


def test_the_noise_schedules_are_sdxls() -> None:
    epsilon = NoiseSchedule.from_scheduler(model.build_noise_scheduler("epsilon"))
    assert epsilon.alphas[-1].item() == pytest.approx(0.0683, abs=1e-4)
    assert NoiseSchedule.from_scheduler(model.build_noise_scheduler("v_prediction")).zero_terminal_signal


def test_joining_the_towers_keeps_what_they_say(tokenizer: transformers.CLIPTokenizer) -> None:
    text, image = model.build_text_encoder_2(tokenizer).eval(), model.build_image_encoder().eval()
    clip = model.join_clip(text, image).eval()
    ids = torch.tensor(tokenizer(["a red circle"], padding="max_length").input_ids)
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(clip.text_projection(clip.text_model(ids).pooler_output), text(ids).text_embeds)
        assert torch.equal(clip.visual_projection(clip.vision_model(pixels).pooler_output), image(pixels).image_embeds)
