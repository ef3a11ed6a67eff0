"""Which autoencoder and which text encoders made a cache: known again in any precision, told from all others."""

import base64
import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import nn

from diffusion_kd import artifact

_PROBE = "A small red circle, above 3 blue squares; naïve café!"
_VAE_CONFIG = ("scaling_factor", "shift_factor", "latent_channels", "block_out_channels", "layers_per_block")
_TEXT_CONFIG = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "vocab_size")
_TOLERANCE = 2.0**-8
"""What is lost in bfloat16, relative; and half precision's smallest numbers, absolute."""
_SMALLEST = 1e-7


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """configs: part -> hash of what makes the same weights mean something else. weights: part -> one number a tensor.

    Equal up to half precision is equal: the same model loaded in float16 is the same teacher.
    """

    configs: dict[str, str]
    weights: dict[str, list[float]]

    @staticmethod
    def of(parts: artifact.Parts) -> "Identity":
        first, second = parts.text.text_encoder, parts.text.text_encoder_2
        ids = [ids.flatten().tolist() for ids in parts.text.tokenize([_PROBE])]
        configs = {
            "autoencoder": {name: parts.vae.config.get(name) for name in _VAE_CONFIG},
            "tokenizers": ids,
            "text encoders": [
                {name: getattr(encoder.config, name, None) for name in _TEXT_CONFIG} for encoder in (first, second)
            ],
        }
        weights = {"autoencoder": _taste(parts.vae), "text encoders": _taste(first) + _taste(second)}
        return Identity({part: _hash(config) for part, config in configs.items()}, weights)

    def difference(self, other: "Identity") -> str | None:
        """The first part that is another, or None."""
        for part, config in self.configs.items():
            if other.configs.get(part) != config:
                return part
        for part, mine in self.weights.items():
            theirs = other.weights.get(part, [])
            if len(mine) != len(theirs) or not np.allclose(mine, theirs, rtol=_TOLERANCE, atol=_SMALLEST):
                return part
        return None

    def to_json(self) -> dict[str, Any]:
        packed = {
            part: base64.b64encode(np.array(values, "<f4").tobytes()).decode() for part, values in self.weights.items()
        }
        return {"configs": self.configs, "weights": packed}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Identity":
        """Raises KeyError, TypeError or ValueError for anything else."""
        weights = {
            str(part): np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(float).tolist()
            for part, text in content["weights"].items()
        }
        return Identity({str(part): str(config) for part, config in content["configs"].items()}, weights)


def _taste(module: nn.Module) -> list[float]:
    """The number at a third of each floating-point tensor, in the order of their names."""
    tensors = [tensor for _, tensor in sorted(module.state_dict().items()) if tensor.is_floating_point()]
    with torch.no_grad():
        picked = torch.stack([tensor.flatten()[tensor.numel() // 3].float() for tensor in tensors])
    return [float(value) for value in picked.cpu()]


def _hash(config: object) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]
