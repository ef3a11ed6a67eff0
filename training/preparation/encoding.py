"""The networks of preparation: pictures and captions -> latents, text states and CLIP scores, in batches."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diffusion_kd import artifact, errors, pipeline
from diffusion_kd.networks import features
from training import compute


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """Half precision, on the CPU. latents: (B, C, h, w), scaled; prompt_embeds: (B, L, D); pooled: (B, P)."""

    latents: Tensor
    prompt_embeds: Tensor
    pooled: Tensor

    def finite(self) -> NDArray[np.bool_]:
        """(B,) which rows hold nothing but numbers: half precision ends at 65,504."""
        rows = [tensor.isfinite().flatten(1).all(1) for tensor in (self.latents, self.prompt_embeds, self.pooled)]
        return torch.stack(rows).all(0).numpy()


class Encoder:
    """A teacher's autoencoder and text encoders on a device, and a CLIP model if there is one.

    precision: fp32, bf16 or fp16; an autoencoder that overflows in fp16 (`force_upcast`, SDXL's does) stays fp32 there,
    and the CLIP model always. network_s: seconds spent here since it was made.
    """

    def __init__(
        self,
        parts: artifact.Parts,
        *,
        device: torch.device,
        precision: str,
        clip: features.TextImageNetwork | None = None,
    ) -> None:
        self._parts = parts.encoders_to(device, compute.DTYPES[precision])
        self._clip = clip.to(device) if clip is not None else None
        self._device = device
        self.network_s = 0.0

    @torch.inference_mode()
    def scores(self, pixels_uint8: NDArray[np.uint8], captions: Sequence[str]) -> NDArray[np.float32]:
        """(B,) cosines between pictures (B, H, W, 3) and captions. Needs a CLIP model."""
        assert self._clip is not None, "scores need a CLIP model"
        with self._timed():
            seen = self._clip(self._images(pixels_uint8)).vector.float()
            read = self._clip.embed_text(captions).float()
            return functional.cosine_similarity(seen, read).cpu().numpy()

    @torch.inference_mode()
    def encode(self, pixels_uint8: NDArray[np.uint8], captions: Sequence[str]) -> Encoded:
        """Pictures (B, H, W, 3) and their captions."""
        with self._timed():
            latents = self._parts.encode_images(self._images(pixels_uint8))
            cond = self._parts.text.encode(captions, pixels_uint8.shape[1:3])
            halves = [tensor.half().cpu() for tensor in (latents, cond.prompt_embeds, cond.pooled)]
            return Encoded(*halves)

    def _images(self, pixels_uint8: NDArray[np.uint8]) -> Tensor:
        """To (B, 3, H, W) float32 in [-1, 1]. What crosses to the device are bytes."""
        on_device = torch.from_numpy(pixels_uint8).to(self._device)
        return on_device.permute(0, 3, 1, 2).float() / 127.5 - 1

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """All of it ends in a copy to the CPU, which waits for the device."""
        since = time.perf_counter()
        yield
        self.network_s += time.perf_counter() - since


def load_clip(name: str) -> features.TextImageNetwork:
    """A CLIP model: `open_clip:ARCHITECTURE:WEIGHTS`, with open_clip's own preprocessing, a folder or a hub id.

    Raises ConfigError, ModelError.
    """
    kind, _, rest = name.partition(":")
    if kind != "open_clip":
        return pipeline.load_feature_network(name)
    architecture, _, weights = rest.partition(":")
    errors.require(bool(architecture and weights), "clip", name, "open_clip:ARCHITECTURE:WEIGHTS")
    return features.OpenClipFeatures(architecture, weights, resizer="pil-bicubic")
