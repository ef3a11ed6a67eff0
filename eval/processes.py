"""Several processes that share the generating, when a launcher (`accelerate launch`, `torchrun`) started them."""

import dataclasses
import datetime

import torch
from torch import distributed


@dataclasses.dataclass(frozen=True, slots=True)
class Processes:
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            distributed.barrier()

    def device(self, asked: str) -> torch.device:
        """`cuda` becomes the GPU of this process."""
        if asked != "cuda" or self.count == 1:
            return torch.device(asked)
        return torch.device("cuda", distributed.get_node_local_rank())


def join() -> Processes:
    """The processes of this run. They meet through gloo, on any device: all that they exchange is 'done'."""
    if not distributed.is_torchelastic_launched():
        return Processes()
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # the slowest may take its time
    return Processes(distributed.get_rank(), distributed.get_world_size())


def leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
