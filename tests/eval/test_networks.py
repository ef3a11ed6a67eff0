"""Networks by specification, and that they compute what their own libraries compute."""

import dataclasses
import pathlib

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import diffusion_kd  # noqa: F401 - lets torchvision, which lpips imports, load
from diffusion_kd import errors
from diffusion_kd.networks import features
from eval import networks, protocols, sampling
from eval.metrics import clip_score, perceptual


def _images(seed: int) -> Tensor:
    return torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.filterwarnings("ignore")
def test_lpips_is_the_package_s_to_the_bit(alexnet_weights: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lpips
    import torchvision

    ours = perceptual.from_lpips(networks.load_lpips(alexnet_weights))
    real, saved = torchvision.models.alexnet, torch.load(alexnet_weights, weights_only=True)

    def pretrained(**options: object) -> torch.nn.Module:
        module: torch.nn.Module = real(weights=None)
        module.load_state_dict(saved)
        return module

    monkeypatch.setattr(lpips.pretrained_networks.tv, "alexnet", pretrained)
    theirs = lpips.LPIPS(net="alex", verbose=False)
    images, others = _images(0), _images(1)
    with torch.no_grad():
        expected = theirs(images, others).flatten()
        found = ours(images, others)
    assert torch.equal(found, expected)
    assert (found > 0).all()
    with torch.no_grad():  # the trap: images in [0, 1] pass for dark ones and look more alike
        assert not torch.allclose(ours((images + 1) / 2, (others + 1) / 2), expected)


def test_an_alexnet_that_is_none_is_refused(tmp_path: pathlib.Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    for name, words in (("other.pth", "does not hold AlexNet"), ("missing.pth", "cannot be read as tensors")):
        with pytest.raises(errors.ModelError, match=words):
            networks.load_lpips(tmp_path / name)


PROMPTS = ["a red circle", "a dog on a bicycle, " + "very " * 90 + "old", ""]


@pytest.mark.parametrize("size", [(50, 70), (70, 45), (32, 32)])
def test_a_clip_score_is_open_clip_s_own(tiny_clip: pathlib.Path, size: tuple[int, int]) -> None:
    import open_clip

    pixels = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", pretrained=str(tiny_clip))
    model.eval()
    with torch.no_grad():
        seen = model.encode_image(torch.stack([preprocess(PIL.Image.fromarray(each)) for each in pixels]))
        said = model.encode_text(open_clip.get_tokenizer("tiny-clip")(PROMPTS))
        expected = torch.nn.functional.cosine_similarity(seen.double(), said.double())
        network = features.OpenClipFeatures("tiny-clip", str(tiny_clip), resizer="pil-bicubic")
        found = clip_score.clip_scores(
            network(sampling.to_images(pixels)).vector, networks.text_vectors(network, PROMPTS, 2)
        )
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_prompt_beyond_the_77th_token_is_counted_and_scored_on_its_beginning(tiny_clip: pathlib.Path) -> None:
    network = features.OpenClipFeatures("tiny-clip", str(tiny_clip))
    assert network.overlong(PROMPTS) == [False, True, False]
    first, second = network.embed_text([PROMPTS[1], PROMPTS[1] + " and a cat"])
    assert torch.equal(first, second)


def test_resizers_are_told_apart(tiny_clip: pathlib.Path) -> None:
    area, bicubic = (
        features.OpenClipFeatures("tiny-clip", str(tiny_clip), resizer=name) for name in ("area", "pil-bicubic")
    )
    assert (area.resizer, bicubic.resizer) == ("area", "pil-bicubic")
    with torch.no_grad():
        assert not torch.allclose(area(_images(0)).vector, bicubic(_images(0)).vector, atol=1e-4)
    with pytest.raises(errors.ConfigError, match="area or pil-bicubic"):
        features.OpenClipFeatures("tiny-clip", resizer="nearest")


def test_networks_of_a_real_protocol(
    tiny_clip: pathlib.Path, alexnet_weights: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "clip.pt").symlink_to(tiny_clip)
    (tmp_path / "alexnet.pth").symlink_to(alexnet_weights)
    protocol = dataclasses.replace(
        protocols.named("shapes"),
        features="open_clip:tiny-clip:clip.pt",
        clip="open_clip:tiny-clip:clip.pt",
        distance="lpips-alex:alexnet.pth",
    )
    loaded = networks.load(protocol, tmp_path, torch.device("cpu"))
    assert loaded.features is loaded.clip
    assert loaded.clip.resizer == "pil-bicubic"
    hashes = loaded.sha256()
    assert set(hashes) == {"open_clip-tiny-clip", "lpips-alex"}
    assert len(set(hashes.values())) == 2


def test_equal_specifications_share_one_network() -> None:
    loaded = networks.load(protocols.named("shapes"), pathlib.Path(), torch.device("cpu"))
    assert loaded.features is loaded.clip is loaded.distance.module is loaded.distance.maps
    assert list(loaded.sha256()) == ["shapes-encoder"]
