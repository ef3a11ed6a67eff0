"""Pictures as numbers, and what a model is to evaluation."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Sampler(Protocol):
    """A model as evaluation sees it."""

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1] on the CPU. Image i depends on prompt i and seed i alone."""


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) in 0..255: rounded, and clamped where out of range."""
    levels = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_images(images_uint8: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) in 0..255 -> (B, 3, H, W) float32 in [-1, 1]; `to_uint8` takes it back exactly."""
    return torch.from_numpy(images_uint8).permute(0, 3, 1, 2).float() / 127.5 - 1
