"""CLIP score on vectors whose angles are known."""

import math

import pytest
import torch

from diffusion_kd import errors
from eval.metrics import clip_score


def test_scores_are_cosines_of_any_length_and_sign() -> None:
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [1.0, 0.0]])
    texts = torch.tensor([[5.0, 0.0], [4.0, 0.0], [7.0, 0.0], [-2.0, 0.0]])
    expected = [1, 0, math.sqrt(0.5), -1]
    assert clip_score.clip_scores(images, texts).tolist() == pytest.approx(expected)


def test_one_text_for_many_images_is_refused() -> None:
    with pytest.raises(errors.DataError, match=r"\(4, 2\) and \(1, 2\)"):
        clip_score.clip_scores(torch.ones(4, 2), torch.ones(1, 2))
