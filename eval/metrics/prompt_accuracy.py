"""Prompt accuracy: the share of shapes pictures that show what their prompts ask for, as the oracle reads them."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from diffusion_kd.shapes import oracle, scenes


@dataclasses.dataclass(frozen=True, slots=True)
class PromptAccuracy:
    """correct of total pictures show every fact asked for.

    by_attribute: for each attribute, the share among the prompts which ask for it; None where no prompt does.
    """

    correct: int
    total: int
    by_attribute: dict[str, float | None]

    @property
    def share(self) -> float:
        return self.correct / self.total


def judge(images_uint8: Iterable[NDArray[np.uint8]], prompts: Sequence[scenes.Prompt]) -> list[oracle.Verdict]:
    """The oracle's verdict on each picture (64, 64, 3) against its own prompt."""
    return [oracle.judge(oracle.read(image), prompt) for image, prompt in zip(images_uint8, prompts, strict=True)]


def prompt_accuracy(verdicts: Sequence[oracle.Verdict]) -> PromptAccuracy:
    """Count verdicts; at least one."""
    shares: dict[str, float | None] = {}
    for attribute in oracle.ATTRIBUTES:
        facts = [verdict.facts[attribute] for verdict in verdicts if attribute in verdict.facts]
        shares[attribute] = sum(facts) / len(facts) if facts else None
    return PromptAccuracy(sum(verdict.correct for verdict in verdicts), len(verdicts), shares)
