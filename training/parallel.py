"""Networks over several processes: DDP keeps a copy in each, FSDP2 a shard of each weight.

accelerate starts the processes and knows the devices; both wrappers are torch's own. accelerate 1.15 prepares one
model alone for FSDP2, and here a student and a discriminator learn in turn.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch.distributed import device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

SHARDED = ("BasicTransformerBlock", "ResnetBlock2D")
"""What is gathered at once: the blocks that SDXL's U-Net is made of."""


def shard(network: nn.Module, accelerator: accelerate.Accelerator) -> None:
    """Spread a network's weights, in place, over all processes (FSDP2). With one process it stays as it is.

    The weights stay float32; under bf16 they are gathered as bf16, and gradients are summed in float32. Inputs are not
    cast: time_ids of 1,023 px do not fit into bf16.
    """
    if accelerator.num_processes == 1:
        return
    mesh = device_mesh.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    gathered = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in network.modules():
        if type(module).__name__ in SHARDED:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # The root's default is to stay gathered after a pass; without a backward pass nothing would give its weights back,
    # and what is averaged, saved or restored meanwhile would be the shards beneath.
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


class Replica:
    """A learner's module as every process calls it: in DDP, unless FSDP2 has sharded `sharded` within it."""

    def __init__(self, module: nn.Module, accelerator: accelerate.Accelerator, *, sharded: nn.Module | None) -> None:
        self.module = module
        self._sharded: Any = sharded
        self._ddp: Any = None
        if accelerator.num_processes > 1 and sharded is None:
            device = accelerator.device
            self._ddp = DistributedDataParallel(
                module, device_ids=None if device.type == "cpu" else [device.index], gradient_as_bucket_view=True
            )

    def __call__(self, **batch: Any) -> dict[str, Tensor]:
        called: nn.Module = self.module if self._ddp is None else self._ddp
        losses: dict[str, Tensor] = called(**batch)
        return losses

    @contextlib.contextmanager
    def gathering(self, last: bool) -> Iterator[None]:
        """Within, backward passes sum gradients over the processes if `last`, else they only add up locally."""
        with contextlib.ExitStack() as held:
            if self._ddp is not None and not last:
                held.enter_context(self._ddp.no_sync())
            if hasattr(self._sharded, "set_requires_gradient_sync"):  # not where one process has all
                self._sharded.set_requires_gradient_sync(last)
            yield


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value. All processes must ask for a sharded one together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, in the same memory, without gradients."""
    shard: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return shard.detach()


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """A full value, spread as `target` is; every process gives the same."""
    if not isinstance(target, DTensor):
        return tensor
    local = tensor.to(target.device)
    return distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)


def clip(weights: Sequence[Tensor], most: float) -> Tensor:
    """Scale gradients down to a norm of `most` over all processes; returns the norm before."""
    return whole(nn.utils.clip_grad_norm_(weights, most))


def mean(accelerator: accelerate.Accelerator, values: Mapping[str, Tensor]) -> dict[str, float]:
    """The means over all processes of equal shares of a batch, with one transfer and one wait for the device."""
    if not values:
        return {}
    stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    if accelerator.num_processes > 1:
        stacked = accelerator.reduce(stacked, "mean")
    return dict(zip(values, stacked.tolist(), strict=True))


def on_cpu(network: nn.Module, *, main: bool) -> nn.Module:
    """A network whose weights are whole: itself, or on the main process a copy on the CPU, if it was sharded.

    All processes must ask together. What the others get is the network as it is.
    """
    if not any(isinstance(weight, DTensor) for weight in network.parameters()):
        return network
    weights = {}
    for name, weight in network.state_dict().items():
        full = whole(weight.detach())
        if main:
            weights[name] = full.cpu()
    if not main:
        return network
    copied: nn.Module = type(network).from_config(network.config)  # type: ignore[attr-defined]
    copied.load_state_dict(weights)
    return copied
