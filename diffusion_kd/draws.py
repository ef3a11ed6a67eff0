"""Random numbers of a batch, example by example.

What an example is dealt depends on the run's seed, the step and its place in the whole batch, and on nothing else: not
on which process or micro-batch it falls into, nor on what was drawn before a run was interrupted.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """A stream of draws for each of `rows`, the examples' places in the whole batch. All numbers are made on the CPU,
    so that a seed means the same on every device.

    stream: keeps parts of a step apart, so that one more draw in one part does not disturb another.
    """

    def __init__(self, seed: Sequence[int], step: int, rows: Sequence[int], stream: int) -> None:
        states = (np.random.SeedSequence((*seed, step, row, stream)).generate_state(1, np.uint64) for row in rows)
        self._generators = [torch.Generator().manual_seed(int(state[0])) for state in states]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """(B, *shape) of unit Gaussian noise."""
        return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in self._generators])

    def normal_like(self, tensor: Tensor) -> Tensor:
        """Unit Gaussian noise of a (B, ...) tensor's shape, float32, on its device."""
        return self.normal(tensor.shape[1:]).to(tensor.device)

    def uniform(self) -> Tensor:
        """(B,) in [0, 1)."""
        return torch.cat([torch.rand(1, generator=generator) for generator in self._generators])

    def integers(self, low: int, high: int) -> Tensor:
        """(B,) int64 in the closed range [low, high]."""
        return torch.cat([torch.randint(low, high + 1, (1,), generator=generator) for generator in self._generators])
