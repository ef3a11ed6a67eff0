"""Latency, throughput, peak memory and cost of models, timed side by side."""

import contextlib
import dataclasses
import gc
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

import torch

RUNS, THROUGHPUT_RUNS = 10, 3
Call = Callable[[int], object]
"""Makes that many pictures and returns when they are there."""


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """latency_s: of single pictures, one after another. seconds_per_image: in batches of `batch_size`.

    peak_memory_gb: of the GPU; without one, of the process (libraries and all models included), while the model made a
    batch. None where the system does not tell.
    """

    latency_s: tuple[float, ...]
    seconds_per_image: float
    batch_size: int
    peak_memory_gb: float | None

    @property
    def mean_latency_s(self) -> float:
        return statistics.fmean(self.latency_s)

    def cost_usd(self, price_per_hour_usd: float) -> float:
        """Of one picture on a machine at that price which makes nothing but full batches."""
        return self.seconds_per_image * price_per_hour_usd / 3600


def measure(calls: Sequence[Call], *, batch_size: int, device: torch.device, runs: int = RUNS) -> list[Speed]:
    """Time models in turns, so that a busy moment of the machine meets all. The first call of each is not timed."""
    for call in calls:
        call(1)
    latencies = [[_timed(call, 1) for call in calls] for _ in range(runs)]
    speeds = []
    for call, latency_s in zip(calls, zip(*latencies, strict=True), strict=True):
        _reset_peak(device)
        seconds = statistics.median(_timed(call, batch_size) for _ in range(THROUGHPUT_RUNS))
        speeds.append(Speed(tuple(latency_s), seconds / batch_size, batch_size, _peak_gb(device)))
    return speeds


def _timed(call: Call, count: int) -> float:
    began_s = time.perf_counter()
    call(count)
    return time.perf_counter() - began_s


_CLEAR, _STATUS = pathlib.Path("/proc/self/clear_refs"), pathlib.Path("/proc/self/status")


def _reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # Linux: forget the highest resident size so far


def _peak_gb(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    return None
