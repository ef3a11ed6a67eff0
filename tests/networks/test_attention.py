"""Attention backends agree in their numbers, leave LoRA adapters alone, and say where they cannot run."""

import sys
import types
from collections.abc import Callable
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.models import attention_processor
from torch import Tensor

from diffusion_kd import errors
from diffusion_kd.networks import attention
from tests import toys

CUDA = torch.device("cuda")


def kinds(unet: diffusers.UNet2DConditionModel) -> set[type]:
    return {type(processor) for processor in unet.attn_processors.values()}


def predict(unet: Any) -> Tensor:
    """What the toy U-Net says of a fixed input."""
    generator = torch.Generator().manual_seed(0)
    x_t, tokens = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 32, 32)))
    told = {"text_embeds": torch.ones(2, toys.PROJECTION), "time_ids": torch.full((2, 6), 16.0)}
    prediction: Tensor = unet(x_t, torch.tensor([5, 900]), tokens, added_cond_kwargs=told, return_dict=False)[0]
    return prediction


def give_lora(unet: diffusers.UNet2DConditionModel) -> None:
    """Add an adapter that changes what the U-Net says."""
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    torch.manual_seed(3)
    unet.add_adapter(config, "student")


def fake_xformers(monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Tensor]) -> None:
    """An installed xformers that computes by `attend`, on this machine's CPU in CUDA's place."""
    package: Any = types.ModuleType("xformers")
    package.__spec__ = types.SimpleNamespace()
    ops = types.SimpleNamespace(memory_efficient_attention=attend)
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    trial = attention._try_xformers
    monkeypatch.setattr(attention, "_try_xformers", lambda device: trial(torch.device("cpu")))


@pytest.mark.parametrize(
    ("backend", "processor"),
    [
        ("auto", attention_processor.AttnProcessor),
        ("plain", attention_processor.AttnProcessor),
        ("sdpa", attention_processor.AttnProcessor2_0),
    ],
)
def test_a_backend_is_in_use_everywhere(backend: str, processor: type) -> None:
    unet = toys.tiny_parts().unet
    assert attention.use(unet, backend) == ("plain" if backend == "auto" else backend)
    assert kinds(unet) == {processor}


def test_plain_and_fused_attention_agree() -> None:
    unet = toys.tiny_parts().unet
    attention.use(unet, "plain")
    plain = predict(unet)
    attention.use(unet, "sdpa")
    assert torch.allclose(plain, predict(unet), atol=1e-5) and plain.std() > 0.01


def test_auto_goes_by_the_device_the_unet_will_run_on() -> None:
    unet = toys.tiny_parts().unet
    assert attention.use(unet, "auto", "cuda") == "sdpa"
    assert kinds(unet) == {attention_processor.AttnProcessor2_0}


@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "wrapped"])
@pytest.mark.parametrize("backend", ["plain", "sdpa"])
def test_lora_adapters_stay_and_learn(backend: str, wrapped: bool) -> None:
    unet: Any = toys.tiny_parts().unet
    without = predict(unet)
    if wrapped:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        unet = peft.get_peft_model(unet, config)
    else:
        give_lora(unet)
    before = predict(unet)
    assert not torch.allclose(before, without, atol=1e-3)
    attention.use(unet, backend)
    after = predict(unet)
    assert torch.allclose(after, before, atol=1e-5)
    after.square().mean().backward()
    adapters = [weight for name, weight in unet.named_parameters() if "lora_" in name]
    assert adapters and all(weight.grad is not None and bool(weight.grad.any()) for weight in adapters)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(errors.ConfigError, match="attention is 'flash'; it must be one of auto, sdpa"):
        attention.use(toys.tiny_parts().unet, "flash")


def test_xformers_without_cuda_says_what_would_do() -> None:
    unet = toys.tiny_parts().unet
    before = kinds(unet)
    with pytest.raises(errors.ConfigError, match="runs on CUDA only, not on cpu; take sdpa"):
        attention.use(unet, "xformers")
    assert kinds(unet) == before


def test_xformers_that_is_not_installed_says_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.ConfigError, match="not installed; install the extra `xformers`"):
        attention.choose("xformers", CUDA)


def test_xformers_of_another_torch_says_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*tensors: Tensor) -> Tensor:
        raise NotImplementedError("No operator found for this attention")

    fake_xformers(monkeypatch, fail)
    with pytest.raises(errors.ConfigError, match=r"\(No operator found .*built for this torch, or take sdpa"):
        attention.choose("xformers", CUDA)


def test_xformers_that_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_xformers(monkeypatch, lambda *tensors: tensors[0])
    unet = toys.tiny_parts().unet
    assert attention.use(unet, "xformers", CUDA) == "xformers"
    assert kinds(unet) == {attention_processor.XFormersAttnProcessor}
