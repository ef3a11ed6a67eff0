"""Stand-ins for a feature network and for models, small enough to know what they must score."""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from diffusion_kd import pipeline
from diffusion_kd.networks import features
from diffusion_kd.shapes import scenes
from eval import images, measure, networks, protocols, sampling, suites
from eval.metrics import perceptual


class ToyNetwork(features.TextImageNetwork):
    """Two maps of a fixed random convolution; the vector is a 2x2 miniature of the picture."""

    name, map_channels, vector_dim = "toy", (8, 3), 12

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernel = nn.Parameter(torch.randn(8, 3, 8, 8, generator=generator) / 14)
        self._freeze()

    def forward(self, images: Tensor) -> features.Features:
        small = functional.adaptive_avg_pool2d(images, 2)
        return features.Features((functional.conv2d(images, self.kernel, stride=8), small), small.flatten(1))

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        return torch.stack([torch.rand(12, generator=torch.Generator().manual_seed(seed)) + 1 for seed in seeds])

    def overlong(self, prompts: Sequence[str]) -> list[bool]:
        return [len(prompt) > 60 for prompt in prompts]


class ToyModel:
    """A sampler that draws with `picture(prompt, seed)` and remembers how it was asked."""

    def __init__(self, picture: Callable[[str, int], NDArray[np.uint8]]) -> None:
        self.picture = picture
        self.asked: list[tuple[int, float]] = []
        self.drawn = 0

    def to(self, device: str) -> "ToyModel":
        return self

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        self.asked.append((steps, guidance_scale))
        self.drawn += len(prompts)
        pairs = zip(prompts, seeds, strict=True)
        return sampling.to_images(np.stack([self.picture(prompt, seed) for prompt, seed in pairs]))


def draw_noise(prompt: str, seed: int) -> NDArray[np.uint8]:
    size = scenes.IMAGE_SIZE_PX
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def make_suite(standard: int = 24, edge: int = 8) -> suites.Suite:
    """Prompts of the shapes domain in two strata, and edge cases that ask for held-out pairs."""
    prompts = [
        suites.Prompt(f"{kind}-{number}", kind, edge_case, prompt.text, prompt)
        for kind, edge_case, cases in (
            ("one", False, scenes.draw_cases(standard // 2, 7)),
            ("two", False, scenes.draw_cases(standard - standard // 2, 8)),
            ("odd", True, scenes.draw_cases(edge, 9, held_out=True)),
        )
        for number, (_, prompt) in enumerate(cases)
    ]
    return suites.checked("toy", prompts)


@pytest.fixture
def network() -> ToyNetwork:
    return ToyNetwork()


@pytest.fixture
def instruments(network: ToyNetwork) -> networks.Networks:
    measured = networks.PerceptualDistance(network.name, perceptual.from_features(network), network, network)
    return networks.Networks(network, network, measured)


@pytest.fixture
def suite() -> suites.Suite:
    return make_suite()


@pytest.fixture
def protocol() -> protocols.Protocol:
    return dataclasses.replace(protocols.named("shapes"), teacher_steps=5)


@pytest.fixture
def painter(suite: suites.Suite) -> ToyModel:
    """Draws what is asked for, otherwise for every seed."""
    asks = {prompt.text: prompt.asks for prompt in suite.prompts}

    def picture(prompt: str, seed: int) -> NDArray[np.uint8]:
        wanted = asks.get(prompt)
        if wanted is None:  # the rehearsal
            return draw_noise(prompt, seed)
        return scenes.render(scenes.complete(wanted, np.random.default_rng(seed)))

    return ToyModel(picture)


@pytest.fixture
def noise_maker() -> ToyModel:
    return ToyModel(draw_noise)


@pytest.fixture
def make_entrant() -> Callable[..., images.Entrant]:
    def make(sampler: sampling.Sampler, model: str = "student", steps: int = 1, sha256: str = "") -> images.Entrant:
        return images.Entrant(model, f"{model} folder", sampler, sha256 or f"{model} {id(sampler)}", steps, 0.0)

    return make


@pytest.fixture
def ruler(
    protocol: protocols.Protocol, suite: suites.Suite, instruments: networks.Networks, tmp_path: pathlib.Path
) -> measure.Ruler:
    return measure.Ruler(protocol, suite, instruments, tmp_path, batch_size=8)


@pytest.fixture
def models(
    monkeypatch: pytest.MonkeyPatch, network: ToyNetwork, painter: ToyModel, noise_maker: ToyModel
) -> tuple[ToyModel, ToyModel]:
    """The teacher paints, every student makes noise; both are found under any name."""
    monkeypatch.setattr(pipeline, "load_teacher", lambda name: painter)
    monkeypatch.setattr(pipeline, "load_student", lambda name: noise_maker)
    monkeypatch.setattr(pipeline, "load_feature_network", lambda name: network)
    monkeypatch.setattr(images, "artifact_sha256", lambda name: f"hash of {name}")
    return painter, noise_maker


# --- true architectures with random weights -----------------------------------------------------------


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint that torch-fidelity's own class loads; He-normal, as default weights let every feature vanish."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Random(theirs.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *arguments: object, **options: object) -> None: ...

    with mock.patch.object(theirs, "load_state_dict_from_url", return_value={}):
        network = Random("inception", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
    path: pathlib.Path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def alexnet_weights(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    import torchvision

    torch.manual_seed(0)
    path: pathlib.Path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Weights of a small open_clip model, registered as `tiny-clip`."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 4, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    (folder / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    path: pathlib.Path = folder / "weights.pt"
    torch.save(open_clip.create_model("tiny-clip").state_dict(), path)
    return path
