"""Numbers that were not measured alike are not compared."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from diffusion_kd import errors
from eval import fingerprint

PRINT = fingerprint.Fingerprint(
    metric="FD[toy]", network="toy", network_sha256="a", resizer="area", antialias=True, reference="renders",
    samples=1024, prompts_sha256="b", images_per_prompt=2, seed=0, resolution_px=64, settings={"crop_px": 32},
    versions={"torch": "2.13.0"}, device="cpu", code_sha256="e",
)  # fmt: skip
OTHER: dict[str, Any] = {
    "metric": "FID", "network": "inception", "network_sha256": "c", "resizer": "tf1-bilinear", "antialias": False,
    "reference": "val2014", "samples": 5000, "prompts_sha256": "d", "images_per_prompt": 1, "seed": 1,
    "resolution_px": 512, "settings": {"crop_px": 16}, "versions": {"torch": "2.14.0"}, "device": "cuda",
    "code_sha256": "f",
}  # fmt: skip


def test_alike_numbers_are_compared() -> None:
    fingerprint.require_same(dataclasses.asdict(PRINT), dataclasses.asdict(dataclasses.replace(PRINT)))


@pytest.mark.parametrize("field", list(OTHER))
def test_the_field_that_differs_is_named(field: str) -> None:
    changed = dataclasses.replace(PRINT, **{field: OTHER[field]})
    with pytest.raises(errors.ComparisonError, match=field) as caught:
        fingerprint.require_same(dataclasses.asdict(PRINT), dataclasses.asdict(changed))
    others = set(OTHER) - {field, "metric"}
    assert not any(f"{other} is " in str(caught.value) or f"{other}." in str(caught.value) for other in others)
    assert changed.digest() != PRINT.digest()


def test_every_field_is_compared() -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(fingerprint.Fingerprint)}


def test_a_hash_is_of_the_weights_and_of_nothing_else() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    assert fingerprint.weights_sha256(first) == fingerprint.weights_sha256(second)
    with torch.no_grad():
        second.bias[0] += 1e-6
    assert fingerprint.weights_sha256(first) != fingerprint.weights_sha256(second)


def test_versions_are_those_that_are_installed() -> None:
    found = fingerprint.versions()
    assert found["torch"] == torch.__version__
    assert {"diffusion_kd", "python", "torch", "diffusers", "transformers", "numpy", "scipy", "pillow"} <= found.keys()
