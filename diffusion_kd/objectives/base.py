"""What the training loop knows of a method: phases, each with the module it trains and a loss of named parts.

Adding an objective touches no loop code.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from diffusion_kd.denoiser import Denoiser
from diffusion_kd.draws import Draws
from diffusion_kd.types import Conditioning


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """One batch of real, captioned images.

    images: (B, 3, H, W) in [-1, 1]. latents: (B, C, h, w), the same images encoded.
    cond: their captions; uncond: no caption; negative: a negative prompt, which NFSD needs.
    step: counts batches from 0; lazy regularisation goes by it. rows: the examples' places in the step's whole batch,
        of which this may be a part. seed: with both of them, it decides every random draw.
    """

    images: Tensor
    latents: Tensor
    cond: Conditioning
    uncond: Conditioning
    negative: Conditioning | None
    step: int
    rows: Sequence[int]
    seed: tuple[int, ...]

    def draws(self, stream: int) -> Draws:
        return Draws(self.seed, self.step, self.rows, stream)


class Phase(nn.Module, abc.ABC):
    """One network's turn within a step.

    Its parameters are those that learn in this phase and no others: a wrapper for data-parallel training may take
    the module as it is. `forward` returns named losses; the loop minimises their sum.
    """

    name: str

    @abc.abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]: ...


class Objective(Protocol):
    """A distillation method.

    phases: run in this order at every step. A later phase may reuse, detached, what an earlier one computed.
    """

    @property
    def phases(self) -> tuple[Phase, ...]: ...

    @property
    def student(self) -> Denoiser:
        """Whose U-Net is averaged, sampled and exported."""
