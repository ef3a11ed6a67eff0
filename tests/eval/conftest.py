"""Stand-ins for a feature network and for models, small enough to know what they must score."""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diffusion_kd.networks import features
from diffusion_kd.shapes import scenes
from eval import protocols, sampling


class ToyNetwork(features.TextImageNetwork):
    """Two maps of a fixed random convolution; the vector is an 4x4 miniature of the picture."""

    name, map_channels, vector_dim = "toy", (8, 3), 48

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(8, 3, 8, 8, generator=generator) / 14)
        self._freeze()

    def forward(self, images: Tensor) -> features.Features:
        small = functional.adaptive_avg_pool2d(images, 4)
        return features.Features((functional.conv2d(images, self.kernel, stride=8), small), small.flatten(1))

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        return torch.stack([torch.randn(48, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class ToyModel:
    """A sampler that draws with `picture(prompt, seed)` and remembers how it was asked."""

    size_px = scenes.IMAGE_SIZE_PX

    def __init__(self, picture: Callable[[str, int], NDArray[np.uint8]]) -> None:
        self.picture = picture
        self.asked: list[tuple[int, float]] = []

    def to(self, device: str) -> "ToyModel":
        return self

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        self.asked.append((steps, guidance_scale))
        pairs = zip(prompts, seeds, strict=True)
        return sampling.to_images(np.stack([self.picture(prompt, seed) for prompt, seed in pairs]))


def draw_noise(prompt: str, seed: int) -> NDArray[np.uint8]:
    size = scenes.IMAGE_SIZE_PX
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


@pytest.fixture
def network() -> ToyNetwork:
    return ToyNetwork()


@pytest.fixture
def protocol() -> protocols.ShapesProtocol:
    return protocols.ShapesProtocol(prompts=16, seed=7, diversity_prompts=4, diversity_seeds=3)


@pytest.fixture
def painter(protocol: protocols.ShapesProtocol) -> ToyModel:
    """Draws what is asked for; the seed shifts the picture by a pixel or two."""
    scene_of = {prompt.text: scene for scene, prompt in protocol.cases()}
    return ToyModel(lambda prompt, seed: np.roll(scenes.render(scene_of[prompt]), seed % 3 - 1, axis=1))


@pytest.fixture
def noise_maker() -> ToyModel:
    return ToyModel(draw_noise)
