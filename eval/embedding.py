"""Pictures and prompts through a feature network, batch by batch, on the network's own device."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_kd.networks import features
from eval import sampling
from eval.metrics import perceptual


def device_of(network: features.FeatureNetwork) -> torch.device:
    """Where a network's weights lie."""
    return next(network.parameters()).device


@torch.no_grad()
def image_vectors(network: features.FeatureNetwork, images_uint8: NDArray[np.uint8], batch_size: int) -> Tensor:
    """(N, H, W, 3) -> (N, P) float32 on the CPU."""
    device = device_of(network)
    parts = [
        network(images.to(device)).vector.float().cpu() for images in sampling.to_images(images_uint8).split(batch_size)
    ]
    return torch.cat(parts)


@torch.no_grad()
def text_vectors(network: features.TextImageNetwork, prompts: Sequence[str], batch_size: int) -> Tensor:
    """N prompts -> (N, P) float32 on the CPU."""
    starts = range(0, len(prompts), batch_size)
    return torch.cat([network.embed_text(prompts[start : start + batch_size]).float().cpu() for start in starts])


def distance_on(device: torch.device, distance: perceptual.Distance) -> perceptual.Distance:
    """A distance of images that lie on the CPU, computed on `device` without gradients; (B,) float32 on the CPU."""

    @torch.no_grad()
    def distance_from_cpu(images: Tensor, others: Tensor) -> Tensor:
        return distance(images.to(device), others.to(device)).float().cpu()

    return distance_from_cpu
