"""The moving average of a network's trained weights: what is sampled and exported."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from training import parallel


class Average:
    """Exponential moving average, in float32, of those weights alone that learn; sharded weights have sharded averages.

    decay: per update. The first update copies.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self._decay, self.updates = decay, 0
        self.values: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        weights = [parallel.local(weight) for weight in self._weights.values()]
        values = [parallel.local(value) for value in self.values.values()]
        if self.updates == 0:
            torch._foreach_copy_(values, weights)
        else:
            torch._foreach_lerp_(values, weights, 1 - self._decay)
        self.updates += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the network has the averaged weights. They change places one by one: no third copy."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the network's weights and their averages."""
        for name, weight in self._weights.items():
            ours, average = parallel.local(weight), parallel.local(self.values[name])
            held = ours.clone()
            ours.copy_(average)
            average.copy_(held)
