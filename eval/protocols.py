"""What is asked of every model: which prompts, which seeds, which pictures are the truth."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffusion_kd import errors
from diffusion_kd.shapes import scenes

Case = tuple[scenes.Scene, scenes.Prompt]
"""A prompt and a scene that it describes: one true answer of many."""

HELD_OUT_SHARE = 0.25
"""Share of prompts that ask for a (shape, colour) pair which never occurs in training."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShapesProtocol:
    """One examination in the shapes domain; everything in it follows from these numbers.

    prompts: how many; the last quarter is held out.
    seed: of the prompts, and the first of the image seeds.
    diversity_prompts, diversity_seeds: how many of the prompts are drawn again, and with how many seeds each.
    Raises ConfigError for numbers too small to measure with.
    """

    prompts: int = 1024
    seed: int = 0
    diversity_prompts: int = 32
    diversity_seeds: int = 4

    def __post_init__(self) -> None:
        for name, least in (("prompts", 8), ("seed", 0), ("diversity_prompts", 1), ("diversity_seeds", 2)):
            if getattr(self, name) < least:
                raise errors.ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.seed >= 2**62:  # torch's generators end at 2**63, and every picture has a seed of its own
            raise errors.ConfigError(f"seed must be below 2**62, not {self.seed}")

    @property
    def held_out(self) -> int:
        """How many prompts are held out."""
        return round(self.prompts * HELD_OUT_SHARE)

    def cases(self) -> list[Case]:
        """All prompts, seen before held out."""
        return self._draw(self.seed)

    def independent_cases(self) -> list[Case]:
        """As many of the same kind, from another stream."""
        return self._draw(self.seed + 1)

    def image_seeds(self) -> list[int]:
        """One for each prompt."""
        return list(range(self.seed, self.seed + self.prompts))

    def spread(self, count: int) -> list[int]:
        """Indices of `count` prompts (all, where there are fewer), evenly spaced, so a quarter of them is held out."""
        count = min(count, self.prompts)
        return [index * self.prompts // count for index in range(count)]

    def repeats(self) -> tuple[list[int], list[int]]:
        """Indices of prompts and image seeds of the pictures that measure diversity: runs of `diversity_seeds`."""
        indices = [index for index in self.spread(self.diversity_prompts) for _ in range(self.diversity_seeds)]
        first = self.seed + self.prompts
        return indices, list(range(first, first + len(indices)))

    def _draw(self, seed: int) -> list[Case]:
        seen = scenes.draw_cases(self.prompts - self.held_out, seed)
        return seen + scenes.draw_cases(self.held_out, seed, held_out=True)


def renders(cases: Sequence[Case]) -> NDArray[np.uint8]:
    """The true pictures, (N, 64, 64, 3)."""
    return np.stack([scenes.render(scene) for scene, _ in cases])
