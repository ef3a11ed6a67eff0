"""What a number was measured with. Two numbers may be compared only where all of it is the same."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import torch
from torch import nn

import diffusion_kd
from diffusion_kd import errors

REPORT_SCHEMA_VERSION = 2
"""Of report.json; here, where those who only read one need nothing else of evaluation."""

_LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "scipy",
    "pillow",
    "tokenizers",
    "open-clip-torch",
    "lpips",
    "torch-fidelity",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Everything that a value of a metric depends on beside the model.

    metric: its full name. network, network_sha256: what saw the pictures, and its weights; "" where nothing did.
    resizer, antialias: how pictures came to the network's size. reference: what they were compared with.
    samples: pictures. prompts_sha256: ids and texts of the prompts. resolution_px: of the judged pictures.
    settings: further numbers of the protocol, such as crops or neighbours. versions: of the libraries.
    device: what measured. code_sha256: of the metrics.
    """

    metric: str
    network: str
    network_sha256: str
    resizer: str
    antialias: bool
    reference: str
    samples: int
    prompts_sha256: str
    images_per_prompt: int
    seed: int
    resolution_px: int
    settings: dict[str, Any]
    versions: dict[str, str]
    device: str
    code_sha256: str

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A measured number that knows what it is.

    value: as the literature computes it. interval: 95 %, None where none is known.
    corrected: a set distance without its bias of order 1/N, which the interval is around; None for other metrics.
    """

    value: float
    interval: tuple[float, float] | None
    fingerprint: Fingerprint
    corrected: float | None = None


def require_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Raise ComparisonError naming every field in which two numbers were measured differently.

    first, second: fingerprints as plain values, as a report holds them.
    """
    ours, theirs = _flat(first), _flat(second)
    differing = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    if differing:
        said = "; ".join(f"{key} is {ours.get(key)!r} and {theirs.get(key)!r}" for key in differing)
        raise errors.ComparisonError(f"{first['metric']} and {second['metric']} cannot be compared: {said}")


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def versions() -> dict[str, str]:
    """Of everything that can move a number; a library that is not installed is not there."""
    found = {"diffusion_kd": diffusion_kd.__version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def code_sha256() -> str:
    """Of the modules that measure: numbers of other code are other numbers."""
    here = pathlib.Path(__file__).parent
    sources = [*sorted((here / "metrics").glob("*.py")), here / "measure.py", here / "inception.py"]
    sources.append(pathlib.Path(diffusion_kd.__file__).parent / "networks" / "features.py")
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()


def weights_sha256(module: nn.Module) -> str:
    """Of a network's parameters and buffers, by name, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
