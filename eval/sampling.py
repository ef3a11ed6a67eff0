"""Prompts and seeds -> 8-bit pictures, timed: the only place where evaluation calls a model."""

import statistics
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_kd import errors


class Sampler(Protocol):
    """A model as evaluation sees it."""

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1] on the CPU. Image i depends on prompt i and seed i alone."""


def generate(
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    batch_size: int,
) -> tuple[NDArray[np.uint8], float]:
    """Pictures (N, H, W, 3) and seconds per image: the median over batches, so that a slow first call does not count.

    Raises ModelError when the sampler returns anything but finite RGB images, one for each prompt.
    """
    pictures, seconds = [], []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        began_s = time.perf_counter()
        images = sampler(prompts[rows], seeds[rows], steps=steps, guidance_scale=guidance_scale)
        seconds.append((time.perf_counter() - began_s) / len(prompts[rows]))
        _check(images, len(prompts[rows]))
        pictures.append(to_uint8(images))
    return np.concatenate(pictures), statistics.median(seconds)


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) in 0..255: rounded, and clamped where out of range."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_images(images_uint8: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) in 0..255 -> (B, 3, H, W) float32 in [-1, 1]; `to_uint8` takes it back exactly."""
    return torch.from_numpy(images_uint8).permute(0, 3, 1, 2).float() / 127.5 - 1


def _check(images: Tensor, count: int) -> None:
    if images.ndim != 4 or images.shape[:2] != (count, 3):
        raise errors.ModelError(f"a sampler must return ({count}, 3, H, W) images; it returned {tuple(images.shape)}")
    if not images.isfinite().all():
        raise errors.ModelError("a sampler returned NaN or infinity; pictures of it would be black, not bad")
