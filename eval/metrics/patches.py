"""Crops at native resolution: what patch distances are measured on.

A network that squeezes a picture to its own size does not see what lies between the pixels that it keeps. A few-step
student fails there first, in texture and in sharpness, so a crop goes to the network without its surroundings.
"""

import numpy as np
from numpy.typing import NDArray

from diffusion_kd import errors


def crop(image_uint8: NDArray[np.uint8], size_px: int, seed: int) -> NDArray[np.uint8]:
    """A square crop of a picture (H, W, 3) at a place drawn by `seed`, (size_px, size_px, 3).

    With the number of the picture as seed, student and teacher are cropped alike whatever shares their batch.
    Raises DataError for a crop larger than the picture. Source: Lin et al. 2024 (SDXL-Lightning), section 4.2.
    """
    height, width = image_uint8.shape[:2]
    if not 1 <= size_px <= min(height, width):
        raise errors.DataError(f"a crop of {size_px} px does not fit into a picture of {width}x{height} px")
    place = np.random.default_rng(seed).random(2)
    top, left = (place * [height - size_px + 1, width - size_px + 1]).astype(int)
    return image_uint8[top : top + size_px, left : left + size_px]
