"""Calling samplers: batches, timing, rounding, and refusing what is no image."""

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_kd import errors
from eval import sampling


def _level(prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
    """Flat pictures whose level is the seed."""
    return torch.tensor(seeds).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 4) / 127.5 - 1


def test_every_level_survives_the_way_to_floats_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    images = sampling.to_images(levels)
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert np.array_equal(sampling.to_uint8(images), levels)


def test_levels_are_rounded_and_clamped() -> None:
    images = torch.tensor([-1.5, -1, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1, 1, 1.5]).reshape(1, 1, 2, 3).expand(1, 3, 2, 3)
    assert sampling.to_uint8(images)[0, ..., 0].tolist() == [[0, 0, 1], [0, 255, 255]]


def test_order_is_kept_over_uneven_batches() -> None:
    pictures, _ = sampling.generate(_level, ["x"] * 5, range(5), steps=1, guidance_scale=0, batch_size=2)
    assert pictures.shape == (5, 2, 4, 3)
    assert pictures[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_slow_first_call_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = [0.0]
    durations_s = iter([9.0, 2.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(time, "perf_counter", lambda: clock_s[0])

    def slow_at_first(prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        clock_s[0] += next(durations_s)
        return torch.zeros(len(prompts), 3, 2, 2)

    _, seconds = sampling.generate(slow_at_first, ["x"] * 18, range(18), steps=1, guidance_scale=0, batch_size=4)
    assert seconds == 0.5  # 9 / 4, 2 / 4 three times, 1 / 2


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 2, 2), "must return"),
        (torch.zeros(2, 1, 2, 2), "must return"),
        (torch.full((2, 3, 2, 2), torch.nan), "NaN"),
    ],
)
def test_what_is_no_image_is_refused(images: Tensor, message: str) -> None:
    with pytest.raises(errors.ModelError, match=message):
        sampling.generate(
            lambda prompts, seeds, *, steps, guidance_scale: images,
            ["a", "b"],
            [0, 1],
            steps=1,
            guidance_scale=0,
            batch_size=2,
        )
