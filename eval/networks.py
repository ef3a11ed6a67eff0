"""Feature networks of protocols, by a specification such as `open_clip:ViT-g-14:weights/file.safetensors`.

| specification                       | network                                                                     |
|-------------------------------------|-----------------------------------------------------------------------------|
| `shapes-encoder`, a folder, hub id  | a transformers CLIP                                                         |
| `inception:PREPROCESSING:FILE`      | `eval.inception`                                                            |
| `open_clip:ARCHITECTURE:FILE`       | an open_clip model, with open_clip's own preprocessing                      |
| `lpips-alex:FILE`                   | LPIPS on torchvision's AlexNet; `FILE` holds the backbone                   |

Files are sought in the data folder.
"""

import dataclasses
import pathlib

import torch
from torch import Tensor, nn

from diffusion_kd import errors, pipeline
from diffusion_kd.networks import features
from diffusion_kd.networks.features import FeatureNetwork, TextImageNetwork
from eval import checkpoints, fingerprint, inception, protocols
from eval.metrics import perceptual


@dataclasses.dataclass(frozen=True, slots=True)
class PerceptualDistance:
    """A perceptual distance and its name. module: what holds its weights. maps: whose maps it compares, if any."""

    name: str
    between: perceptual.Distance
    module: nn.Module
    maps: FeatureNetwork | None


@dataclasses.dataclass(frozen=True, slots=True)
class Networks:
    """features: of set distances. clip: of CLIP score and CMMD. distance: LPIPS. Often one network in three parts."""

    features: FeatureNetwork
    clip: TextImageNetwork
    distance: PerceptualDistance

    def sha256(self) -> dict[str, str]:
        """Of the weights of each, by name."""
        modules = {
            self.features.name: self.features,
            self.clip.name: self.clip,
            self.distance.name: self.distance.module,
        }
        return {name: fingerprint.weights_sha256(module) for name, module in modules.items()}


def load(protocol: protocols.Protocol, data: pathlib.Path, device: torch.device) -> Networks:
    """The networks of a protocol; equal specifications share one. Raises ModelError, ConfigError."""
    loaded: dict[str, FeatureNetwork] = {}
    for name in (protocol.features, protocol.clip):
        if name not in loaded:
            loaded[name] = _feature_network(name, data).to(device)
    clip = loaded[protocol.clip]
    if not isinstance(clip, TextImageNetwork):
        raise errors.ConfigError(f"a CLIP score needs a network of text and images, not {protocol.clip!r}")
    return Networks(loaded[protocol.features], clip, _distance(protocol.distance, data, device, loaded))


def _feature_network(specification: str, data: pathlib.Path) -> FeatureNetwork:
    kind, _, rest = specification.partition(":")
    if kind == "inception":
        preprocessing, _, file = rest.partition(":")
        return inception.InceptionFeatures(data / file, preprocessing)
    if kind == "open_clip":
        architecture, _, file = rest.partition(":")
        return features.OpenClipFeatures(architecture, str(data / file), resizer="pil-bicubic")
    return pipeline.load_feature_network(specification)


def _distance(
    specification: str, data: pathlib.Path, device: torch.device, loaded: dict[str, FeatureNetwork]
) -> PerceptualDistance:
    kind, _, file = specification.partition(":")
    if kind == "lpips-alex":
        module = load_lpips(data / file).to(device)
        return PerceptualDistance("lpips-alex", perceptual.from_lpips(module), module, None)
    network = loaded[specification] if specification in loaded else _feature_network(specification, data).to(device)
    return PerceptualDistance(network.name, perceptual.from_features(network), network, network)


def load_lpips(backbone: pathlib.Path) -> nn.Module:
    """`lpips.LPIPS(net="alex")` with the learnt linear weights of the package and an AlexNet from a file.

    backbone: torchvision's `alexnet-owt-7be5be79.pth`, or any state dict of its AlexNet. Raises ModelError.
    """
    import lpips

    module = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)  # random only until the next lines: no download
    saved = checkpoints.load(backbone)
    try:
        module.net.load_state_dict({ours: saved[theirs] for ours, theirs in _alexnet_keys(module.net)})
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise errors.ModelError(f"{backbone} does not hold AlexNet: {errors.first_line(error)}") from None
    module.requires_grad_(False).eval()
    return module  # type: ignore[no-any-return]


def _alexnet_keys(net: nn.Module) -> list[tuple[str, str]]:
    """lpips cuts AlexNet's `features` into slices whose layers keep their numbers: slice2.3.bias is features.3.bias."""
    return [(name, "features." + name.split(".", 1)[1]) for name in net.state_dict()]


def device_of(network: nn.Module) -> torch.device:
    """Where a network's weights lie."""
    return next(network.parameters()).device


@torch.no_grad()
def text_vectors(network: TextImageNetwork, texts: list[str], batch_size: int) -> Tensor:
    """N texts -> (N, P) float32 on the CPU."""
    starts = range(0, len(texts), batch_size)
    return torch.cat([network.embed_text(texts[start : start + batch_size]).float().cpu() for start in starts])
