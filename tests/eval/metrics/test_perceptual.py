"""Perceptual distance on maps whose distance is known, and against the `lpips` package."""

import pytest
import torch
from torch import Tensor

import diffusion_kd  # noqa: F401 - lets torchvision, which lpips imports, load
from diffusion_kd import errors
from diffusion_kd.losses.perceptual import map_distance
from diffusion_kd.networks import features
from eval.metrics import perceptual


def _images(seed: int, count: int = 2, size_px: int = 64) -> Tensor:
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_zero_only_for_the_same_image_and_symmetric(network: features.FeatureNetwork) -> None:
    distance = perceptual.from_features(network)
    images, others = _images(0), _images(1)
    assert distance(images, images).tolist() == [0, 0]
    assert (distance(images, others) > 0.01).all()
    assert torch.equal(distance(images, others), distance(others, images))


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_the_lpips_package_without_its_weights() -> None:
    import lpips

    module = lpips.LPIPS(net="squeeze", pretrained=False, pnet_rand=True, lpips=False, verbose=False).eval()
    images, others = _images(2), _images(3)
    with torch.no_grad():
        maps, other_maps = (module.net(module.scaling_layer(batch)) for batch in (images, others))
        theirs = perceptual.from_lpips(module)(images, others)
    assert theirs.shape == (2,)
    assert map_distance(maps, other_maps).tolist() == pytest.approx(theirs.tolist(), rel=1e-4)


def test_images_of_another_range_or_size_are_refused(network: features.FeatureNetwork) -> None:
    for distance in (perceptual.from_features(network), perceptual.from_lpips(lambda images, others: images)):
        with pytest.raises(errors.DataError, match=r"\[0, 255\]"):
            distance(torch.tensor([0.0, 255.0]).expand(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))
        with pytest.raises(errors.DataError, match="lie in"):
            distance(torch.full((1, 3, 2, 2), torch.nan), torch.zeros(1, 3, 2, 2))
        with pytest.raises(errors.DataError, match="must match"):
            distance(torch.zeros(2, 3, 2, 2), torch.zeros(1, 3, 2, 2))
