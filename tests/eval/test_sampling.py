"""Pictures as numbers."""

import numpy as np
import torch

from eval import sampling


def test_every_level_survives_the_way_to_floats_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    images = sampling.to_images(levels)
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert np.array_equal(sampling.to_uint8(images), levels)


def test_levels_are_rounded_and_clamped() -> None:
    images = torch.tensor([-1.5, -1, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1, 1.5]).reshape(1, 1, 2, 3).expand(1, 3, 2, 3)
    assert sampling.to_uint8(images)[0, ..., 0].tolist() == [[0, 0, 1], [0, 255, 255]]
