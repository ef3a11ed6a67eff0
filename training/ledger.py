"""Which tensors live while a step runs, in bytes, by what they are: on fake tensors a dry run, on true ones a check.

A `Ledger` sees every operation, backward passes and optimizers included, and notes each storage's birth and death under
a label. `Trace` is what it wrote: its peak, and its peak if some labels weighed more or less. What an operation borrows
and returns inside its kernel (cuDNN's workspaces) is not seen.
"""

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree, flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

CASTS = "weights in half precision"
"""Autocast makes them; those of weights that learn live until the backward pass has used them."""

_ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop,
}
_FLOPS: Mapping[Any, Any] = {**flop_counter.flop_registry, **_ATTENTION_ON_CPU}
_CAST = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class Peak:
    """The fullest moment. parts: label -> bytes then. moment: what was running."""

    total_bytes: int
    moment: str
    parts: dict[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """What a ledger wrote. Each event adds `deltas` bytes to a label at a moment.

    flops: floating point operations (two to a multiply-add) of each label's passes; those of backward included.
    """

    labels: tuple[str, ...]
    moments: tuple[str, ...]
    events: np.ndarray[Any, np.dtype[np.int64]]  # (E, 3): index of the moment, index of the label, bytes
    flops: dict[str, int]

    def peak(self, scale: Mapping[str, float] | None = None, extra: Mapping[str, int] | None = None) -> Peak:
        """The fullest moment. scale: label -> factor of its bytes (1 if not named). extra: label -> bytes all along."""
        factors = np.array([(scale or {}).get(label, 1.0) for label in self.labels])
        weighed = self.events[:, 2] * factors[self.events[:, 1]]
        at = int(np.argmax(np.cumsum(weighed)))
        until = self.events[: at + 1]
        live = np.bincount(until[:, 1], weighed[: at + 1], len(self.labels))
        parts = {label: round(count) for label, count in zip(self.labels, live, strict=True) if round(count)}
        parts |= extra or {}
        return Peak(sum(parts.values()), self.moments[int(self.events[at, 0])], parts)

    def most(self) -> dict[str, int]:
        """Label -> the most bytes that it ever has, whenever that is."""
        found = {}
        for index, label in enumerate(self.labels):
            own = self.events[self.events[:, 1] == index, 2]
            found[label] = max(0, int(np.cumsum(own).max())) if len(own) else 0
        return found


class Ledger(TorchDispatchMode):
    """Inside it, every storage that an operation makes is noted under the label of the network that runs.

    block_bytes: the allocator's unit; a storage takes whole units.
    """

    def __init__(self, block_bytes: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.turn = "set-up"
        self.flops: collections.Counter[str] = collections.Counter()
        self._block_bytes = block_bytes
        self._running: list[str] = []
        self._labels: dict[str, int] = {}
        self._moments: dict[str, int] = {}
        self._events: list[tuple[int, int, int]] = []
        self._alive: dict[int, tuple[Any, str, int]] = {}
        self._weights: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        label = self._running[-1] if self._running else self.turn
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops[label] += int(count(*args, **(kwargs or {}), out_val=made))
        cast = func in _CAST and isinstance(args[0], Tensor) and args[0].untyped_storage()._cdata in self._weights
        for tensor in _pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.note(tensor, CASTS if cast else label)
        return made

    def note(self, tensor: Tensor, label: str, *, weight: bool = False) -> None:
        """Count a tensor's storage from now to its death, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if weight:
            self._weights.add(key)
        if key in self._alive:
            return
        size = -(-storage.nbytes() // self._block_bytes) * self._block_bytes
        self._alive[key] = (weakref.ref(storage, lambda _: self._bury(key)), label, size)
        self._write(label, size)

    def rename(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count storages under another label from now on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            reference, before, size = self._alive[key]
            self._alive[key] = (reference, label, size)
            self._write(before, -size)
            self._write(label, size)

    @contextlib.contextmanager
    def during(self, label: str) -> Iterator[None]:
        """What is made inside is this label's."""
        self._running.append(label)
        try:
            yield
        finally:
            self._running.pop()

    def watch(self, module: nn.Module, label: str) -> None:
        """What a module's forward pass makes is this label's."""
        module.register_forward_pre_hook(lambda *_: self._running.append(label))
        module.register_forward_hook(lambda *_: self._end(), always_call=True)

    def trace(self) -> Trace:
        events = np.array(self._events, np.int64).reshape(-1, 3)
        return Trace(tuple(self._labels), tuple(self._moments), events, dict(self.flops))

    def _end(self) -> None:
        self._running.pop()

    def _bury(self, key: int) -> None:
        _, label, size = self._alive.pop(key)
        self._weights.discard(key)
        self._write(label, -size)

    def _write(self, label: str, delta: int) -> None:
        running = self._running[-1] if self._running else ""
        moment = f"{self.turn}: {running}" if running and running != self.turn else self.turn
        where = self._moments.setdefault(moment, len(self._moments))
        self._events.append((where, self._labels.setdefault(label, len(self._labels)), delta))


class CudaAutocast(TorchFunctionMode):
    """Normalisation and softmax in float32, as CUDA's autocast has them; the CPU's, which fake tensors go by, has not.

    Source: torch's documentation, "CUDA Ops that can autocast to float32"; those of them that our networks call.
    """

    _FLOAT32 = frozenset(
        (
            nn.functional.layer_norm,
            nn.functional.group_norm,
            nn.functional.softmax,
            torch.layer_norm,
            torch.group_norm,
            torch.softmax,
            Tensor.softmax,
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = _pytree.tree_map(_float, (args, kwargs))
        return func(*args, **kwargs)


def backward(loss: Tensor) -> None:
    """`loss.backward()` under `CudaAutocast`, which that method would leave, while checkpointed layers run again."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
