"""Crops are native pixels, the same for the same number."""

import numpy as np
import pytest

from diffusion_kd import errors
from eval.metrics import patches

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def test_a_crop_is_a_part_of_the_picture_unchanged() -> None:
    crop = patches.crop(IMAGE, 8, 3)
    places = [(y, x) for y in range(13) for x in range(23) if np.array_equal(IMAGE[y : y + 8, x : x + 8], crop)]
    assert len(places) == 1


def test_places_follow_the_number_and_reach_every_edge() -> None:
    assert np.array_equal(patches.crop(IMAGE, 8, 3), patches.crop(IMAGE, 8, 3))
    board = np.stack([*np.mgrid[0:20, 0:30], np.zeros((20, 30))], axis=-1).astype(np.uint8)
    corners = np.array([patches.crop(board, 17, seed)[0, 0, :2] for seed in range(400)])
    assert set(corners[:, 0]) == set(range(4))
    assert set(corners[:, 1]) == set(range(14))


def test_a_picture_of_the_size_of_the_crop_is_itself() -> None:
    assert np.array_equal(patches.crop(IMAGE[:, :20], 20, 9), IMAGE[:, :20])


@pytest.mark.parametrize("size_px", [21, 0])
def test_a_crop_that_does_not_fit_is_refused(size_px: int) -> None:
    with pytest.raises(errors.DataError, match="30x20 px"):
        patches.crop(IMAGE, size_px, 0)
