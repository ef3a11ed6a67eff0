"""Prompt accuracy: the share of shapes pictures that show what their prompts ask for, as the oracle reads them."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from diffusion_kd.shapes import oracle, scenes


def judge(images_uint8: Iterable[NDArray[np.uint8]], prompts: Sequence[scenes.Prompt]) -> list[oracle.Verdict]:
    """The oracle's verdict on each picture (64, 64, 3) against its own prompt: right as a whole, and fact by fact.

    Facts are count, shape, colour, size, relation, place and background, as far as the prompt asks for them.
    """
    return [oracle.judge(oracle.read(image), prompt) for image, prompt in zip(images_uint8, prompts, strict=True)]
