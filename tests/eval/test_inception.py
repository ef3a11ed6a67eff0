"""Inception of the true architecture with random weights: its preprocessings, its name, the whole path of a FID."""

import pathlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import diffusion_kd  # noqa: F401 - lets torchvision, which torch_fidelity imports, load
from diffusion_kd import errors
from diffusion_kd.networks import features
from eval import inception, sampling
from eval.metrics import frechet


@pytest.fixture(scope="module")
def images_uint8() -> np.ndarray:
    noise = torch.rand(4, 3, 12, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return sampling.to_uint8(functional.interpolate(noise, (120, 160), mode="bicubic"))


def _vectors(network: features.FeatureNetwork, images_uint8: np.ndarray) -> Tensor:
    with torch.no_grad():
        return network(sampling.to_images(images_uint8)).vector


@pytest.mark.filterwarnings("ignore")
def test_tf1_is_torch_fidelity_s_own(inception_weights: pathlib.Path, images_uint8: np.ndarray) -> None:
    from torch_fidelity import feature_extractor_inceptionv3

    theirs = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(inception_weights)
    )
    expected = theirs(torch.from_numpy(images_uint8).permute(0, 3, 1, 2))[0]
    found = _vectors(inception.InceptionFeatures(inception_weights, "tf1"), images_uint8)
    assert found.shape == (4, 2048)
    assert found.std() > 1e-2
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_clean_is_clean_fid_s_resizer(images_uint8: np.ndarray, inception_weights: pathlib.Path) -> None:
    from cleanfid import resize

    network = inception.InceptionFeatures(inception_weights, "clean")
    theirs = np.stack([resize.make_resizer("PIL", False, "bicubic", (299, 299))(image) for image in images_uint8])
    levels = torch.from_numpy(images_uint8).permute(0, 3, 1, 2).float()
    ours = (network._clean(levels) * 128 + 128).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 1e-3


def test_clean_is_pillow_s_bicubic_within_a_level_on_edges(inception_weights: pathlib.Path) -> None:
    import PIL.Image

    fields = np.kron(np.indices((16, 16)).sum(0) % 2, np.ones((32, 32)))[..., None].repeat(3, -1)
    board = (64 + 128 * fields).astype(np.uint8)  # away from 0 and 255, where 8 bits cut off the overshoot
    levels = torch.from_numpy(board[None]).permute(0, 3, 1, 2).float()
    ours = (
        (inception.InceptionFeatures(inception_weights, "clean")._clean(levels) * 128 + 128)[0].permute(1, 2, 0).numpy()
    )
    theirs = np.asarray(PIL.Image.fromarray(board).resize((299, 299), PIL.Image.Resampling.BICUBIC), np.float32)
    assert np.abs(ours - theirs).max() <= 1


def test_pytorch_fid_resizes_without_antialias_to_minus_one_and_one(
    inception_weights: pathlib.Path, images_uint8: np.ndarray
) -> None:
    network = inception.InceptionFeatures(inception_weights, "pytorch-fid")
    unit = torch.from_numpy(images_uint8).permute(0, 3, 1, 2).float() / 255
    expected = 2 * functional.interpolate(unit, (299, 299), mode="bilinear", align_corners=False) - 1
    assert torch.allclose(network._pytorch_fid(unit * 255), expected, atol=1e-5)


def test_preprocessings_are_different_metrics(inception_weights: pathlib.Path, images_uint8: np.ndarray) -> None:
    """The resizer alone moves features by far more than rounding: it belongs into the fingerprint."""
    networks = {name: inception.InceptionFeatures(inception_weights, name) for name in ("tf1", "pytorch-fid", "clean")}
    vectors = {name: _vectors(network, images_uint8) for name, network in networks.items()}
    scale = vectors["tf1"].std()
    for name in ("pytorch-fid", "clean"):
        assert (vectors[name] - vectors["tf1"]).abs().mean() > 1e-3 * scale
    assert [(networks[name].resizer, networks[name].antialias) for name in networks] == [
        ("tf1-bilinear", False), ("torch-bilinear", False), ("pil-bicubic", True)
    ]  # fmt: skip


def test_only_the_original_weights_make_a_fid(inception_weights: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = inception.InceptionFeatures(inception_weights)
    assert inception.frechet_name(network) == f"FD[{network.name}]"
    assert network.name.startswith("inception-")
    digest = network.name.removeprefix("inception-")
    monkeypatch.setattr(inception, "WEIGHTS_SHA256_PREFIX", digest)
    assert inception.frechet_name(inception.InceptionFeatures(inception_weights)) == "FID"


def test_what_is_no_inception_is_refused(tmp_path: pathlib.Path, inception_weights: pathlib.Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"broken")
    for name, words in (
        ("other", "is not an Inception checkpoint"),
        ("broken", "cannot be read"),
        ("missing", "cannot be read"),
    ):
        with pytest.raises(errors.ModelError, match=rf"{name}\.pth {words}"):
            inception.InceptionFeatures(tmp_path / f"{name}.pth")
    with pytest.raises(errors.ConfigError, match="one of tf1, pytorch-fid, clean"):
        inception.InceptionFeatures(inception_weights, "bilinear")


class RandomExtractor(nn.Module):
    """A fixed-seed convolution, as a feature extractor of torchmetrics: uint8 in, (N, 24) out."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(2)) / 15)

    def forward(self, images: Tensor) -> Tensor:
        return functional.conv2d(images.float() / 127.5 - 1, self.kernel, stride=5).relu().mean((2, 3))


@pytest.mark.filterwarnings("ignore")
def test_the_whole_path_is_torchmetrics_s() -> None:
    from torchmetrics.image import fid

    generator = torch.Generator().manual_seed(3)
    real, fake = (torch.randint(0, 256, (96, 3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(2))
    fake = (fake.float() * 0.8).to(torch.uint8)
    extractor = RandomExtractor().eval()
    theirs = fid.FrechetInceptionDistance(feature=extractor, input_img_size=(3, 32, 32))
    for batch in range(0, 96, 32):
        theirs.update(real[batch : batch + 32], real=True)
        theirs.update(fake[batch : batch + 32], real=False)
    with torch.no_grad():
        ours = frechet.frechet_distance(extractor(fake), extractor(real))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-4)
