"""SDXL's architecture has SDXL's numbers, and made small it runs."""

import pytest
import torch
from torch import nn

from diffusion_kd import pipeline
from diffusion_kd.networks import sdxl
from tests.original_naming import NARROW

# diffusers' Euler scheduler asks numpy for an array in numpy 1's way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_sdxl_base_has_its_published_parameter_counts() -> None:
    parts = sdxl.build_parts()
    assert count(parts.unet) == 2_567_463_684
    assert count(parts.vae) == 83_653_863
    assert count(parts.text.text_encoder) == 123_060_480
    assert count(parts.text.text_encoder_2) == 694_659_840
    assert (parts.size_px, parts.downscale) == (1024, 8)
    weights = [*parts.unet.parameters(), *parts.vae.parameters(), *parts.text.parameters()]
    assert {weight.device.type for weight in weights} == {"meta"}
    assert not any(weight.requires_grad for weight in weights)


def test_its_tokens_fit_its_text_encoders() -> None:
    tokenizer = sdxl.build_tokenizer()
    assert tokenizer.model_max_length == 77 and len(tokenizer) < sdxl.BASE.vocabulary
    assert tokenizer.eos_token_id == max(tokenizer.get_vocab().values())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_made_small_it_runs(prediction_type: str) -> None:
    torch.manual_seed(0)
    parts = sdxl.build_parts("cpu", NARROW, prediction_type=prediction_type)
    images = pipeline.TeacherPipeline(parts)(["a cat", "a dog"], [0, 0], steps=2)
    assert images.shape == (2, 3, 32, 32) and bool(images.isfinite().all())
    assert not torch.equal(images[0], images[1])


def test_a_narrow_one_has_the_blocks_of_the_true_one() -> None:
    true, narrow = sdxl.build_unet(), sdxl.build_unet(dimensions=NARROW)
    assert [type(block) for block in true.down_blocks] == [type(block) for block in narrow.down_blocks]
    layers = [len(block.attentions[0].transformer_blocks) for block in true.down_blocks[1:]]
    assert layers == [2, 10] and len(true.mid_block.attentions[0].transformer_blocks) == 10
    heads = [block.attentions[0].transformer_blocks[0].attn1.heads for block in true.down_blocks[1:]]
    assert heads == [10, 20]


def test_the_pooled_text_is_that_of_the_last_token() -> None:
    parts = sdxl.build_parts("cpu", NARROW)
    ids, ids_2 = parts.text.tokenize(["a cat"])
    end = int((ids_2[0] == parts.text.tokenizers[1].eos_token_id).nonzero()[0])
    changed = ids_2.clone()
    changed[0, end + 1 :] = 7
    same = parts.text(ids, changed, (32, 32)).pooled
    assert torch.allclose(same, parts.text(ids, ids_2, (32, 32)).pooled, atol=1e-6)
    changed[0, end - 1] = 7
    assert not torch.allclose(same, parts.text(ids, changed, (32, 32)).pooled, atol=1e-3)


def test_velocity_goes_with_zero_terminal_signal() -> None:
    parts = sdxl.build_parts(dimensions=NARROW, prediction_type="v_prediction")
    assert parts.denoiser().schedule.zero_terminal_signal
    assert not sdxl.build_parts(dimensions=NARROW).denoiser().schedule.zero_terminal_signal
    assert sdxl.build_parts(dimensions=NARROW).denoiser().schedule.alphas[-1] == pytest.approx(0.0682, abs=1e-4)
