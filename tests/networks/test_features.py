"""Feature networks: frozen, of the true architecture, with the promised maps, and open to gradients of the image."""

import pathlib

import pytest
import torch
import transformers

from diffusion_kd import errors
from diffusion_kd.networks import features
from diffusion_kd.shapes import model


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> features.ClipFeatures:
    """The embedded encoder's architecture with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = model.build_tokenizer(["a red circle", "a blue star"], merges=40)
    clip = model.join_clip(model.build_text_encoder_2(tokenizer), model.build_image_encoder())
    model.save_clip(clip, tokenizer, folder)
    return features.load_clip(folder, "embedded")


def images(size_px: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(0)) * 2 - 1


def check(network: features.FeatureNetwork, size_px: int) -> features.Features:
    pictures = images(size_px).requires_grad_()
    seen = network(pictures)
    assert tuple(layer.shape[1] for layer in seen.maps) == network.map_channels
    assert all(layer.ndim == 4 and layer.shape[0] == 2 for layer in seen.maps)
    assert seen.vector.shape == (2, network.vector_dim)
    sum(layer.square().mean() for layer in seen.maps).backward()
    assert pictures.grad is not None and pictures.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in network.parameters())
    network.train()
    assert not any(module.training for module in network.modules())
    return seen


def test_the_embedded_encoder(embedded: features.ClipFeatures) -> None:
    seen = check(embedded, 64)
    assert [tuple(layer.shape[2:]) for layer in seen.maps] == [(8, 8)] * 5
    assert embedded.embed_text(["a red circle"]).shape == (1, embedded.vector_dim)


def test_the_normalisation_comes_with_the_weights(embedded: features.ClipFeatures) -> None:
    """The shipped encoder saw images in [-1, 1] as they are."""
    prepared = features._prepare(images(64), 64, embedded._mean, embedded._std)
    assert torch.allclose(prepared, images(64), atol=1e-6)


def test_images_of_any_size_are_averaged_down(embedded: features.ClipFeatures) -> None:
    large = images(64).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.allclose(embedded(large).vector, embedded(images(64)).vector, atol=1e-4)


def test_dinov2_has_its_true_architecture() -> None:
    network = features.DinoFeatures()
    assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(22.06e6, rel=1e-3)
    assert network.depths == (2, 5, 8, 11)
    with torch.no_grad():
        seen = network(images(64, 1))
    assert [tuple(layer.shape) for layer in seen.maps] == [(1, 384, 37, 37)] * 5


def test_dinov2_at_another_size() -> None:
    check(features.DinoFeatures(size_px=70), 64)


def test_dinov2_last_map_agrees_with_timm() -> None:
    network = features.DinoFeatures(size_px=70)
    pixels = features._prepare(images(70), 70, features._IMAGENET_MEAN, features._IMAGENET_STD)
    with torch.no_grad():
        assert torch.allclose(network(images(70)).vector, network.vit.forward_features(pixels)[:, 0], atol=1e-4)


def test_open_clip_towers() -> None:
    network = features.OpenClipFeatures("ViT-S-32")
    check(network, 64)
    assert network.embed_text(["a red circle", "a star"]).shape == (2, network.vector_dim)


def test_what_cannot_be_loaded_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.ModelError, match="ViT-nowhere"):
        features.OpenClipFeatures("ViT-nowhere")
    with pytest.raises(errors.ModelError, match="is not a CLIP model"):
        features.load_clip(tmp_path, "an empty folder")
    with pytest.raises(errors.ModelError, match="timm cannot make"):
        features.DinoFeatures("vit_nowhere")
    with pytest.raises(errors.ModelError, match="timm cannot make"):
        features.DinoFeatures(weights=str(tmp_path / "missing.safetensors"))


def test_a_transformers_clip_of_any_size_is_read() -> None:
    config = transformers.CLIPConfig(projection_dim=12)
    config.vision_config.update({"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 3, "image_size": 32})
    config.vision_config.update({"num_attention_heads": 2, "patch_size": 8})
    config.text_config.update({"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1})
    config.text_config.update({"num_attention_heads": 2, "vocab_size": 64})
    network = features.ClipFeatures(transformers.CLIPModel(config), transformers.CLIPTokenizer(), "toy", depths=(1, 3))
    seen = check(network, 48)
    assert [tuple(layer.shape[1:]) for layer in seen.maps] == [(24, 4, 4)] * 2


def test_damaged_clip_weights_are_named(tmp_path: pathlib.Path) -> None:
    tokenizer = model.build_tokenizer(["a red circle", "a blue star"], merges=40)
    clip = model.join_clip(model.build_text_encoder_2(tokenizer), model.build_image_encoder())
    clip.logit_scale.data.fill_(float("nan"))
    model.save_clip(clip, tokenizer, tmp_path)
    with pytest.raises(errors.ModelError, match="NaN or infinite weights"):
        features.load_clip(tmp_path, "toy")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(errors.ModelError, match="is not a CLIP model"):
        features.load_clip(tmp_path, "toy")
