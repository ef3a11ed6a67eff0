"""The training loop: draw, forward, step, log, checkpoint; resumable and deterministic.

It knows learners, each a module that maps a batch to named losses, and runs them in turn at every step. What a
teacher's stage or a distillation method computes is theirs.
"""

import collections
import dataclasses
import logging
import math
import os
import pathlib
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils import tensorboard

from diffusion_kd import errors

_log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"

_MOST_SKIPPED = 100
"""So many skipped steps in a row end a training."""

_FLUSH_S = 10
"""Reports are on disk after so long, for those who watch."""


@dataclasses.dataclass
class LoopConfig:
    """How long and how.

    images: training examples in all, counted over all processes. batch_size: examples a step, over all processes.
    learning_rate: peak, reached after `warmup_images`, held, then falling in a straight line over the last
        `decay_share` of all images.
    ema_decay: of the average of the trained network, per step; 0 keeps none.
    max_grad_norm: gradients are scaled down to it.
    time_limit_s: stop after so long, the learning rate having fallen by then; 0 is no limit. A run that goes on counts
        the time before. What a limited run makes depends on the machine's speed.
    checkpoint_every_s: 0 writes one after every step. log_every_steps: between two lines of the log.
    """

    images: int
    batch_size: int
    learning_rate: float
    warmup_images: int = 20_000
    decay_share: float = 0.3
    weight_decay: float = 0.01
    ema_decay: float = 0.0
    max_grad_norm: float = 1.0
    time_limit_s: float = 0.0
    checkpoint_every_s: float = 120.0
    log_every_steps: int = 50

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.images < self.batch_size:
            raise errors.ConfigError(
                f"images is {self.images} and batch_size {self.batch_size}; at least one batch must fit into images"
            )
        for name, fits, wanted in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0"),
            ("warmup_images", self.warmup_images >= 0, "0 or more"),
            ("decay_share", 0 <= self.decay_share <= 1, "a share from 0 to 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 (none) or more"),
            ("ema_decay", 0 <= self.ema_decay < 1, "0 (no average) or more, and below 1"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
            ("time_limit_s", self.time_limit_s >= 0, "0 (no limit) or more"),
            ("checkpoint_every_s", self.checkpoint_every_s >= 0, "0 (every step) or more"),
            ("log_every_steps", self.log_every_steps >= 1, "1 or more"),
        ):
            errors.require(fits, name, getattr(self, name), wanted)

    def decisive(self) -> dict[str, Any]:
        """The settings that decide what is learnt, besides how long."""
        length = ("images", "time_limit_s", "checkpoint_every_s", "log_every_steps")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in length}


@dataclasses.dataclass
class Learner:
    """One module that learns. Its forward takes the keywords of a batch and returns named losses.

    learning_rate: peak; the loop's schedule scales it. betas: Adam's.
    """

    name: str
    module: nn.Module
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.99)


def learning_rate_share(images_seen: int, elapsed_s: float, config: LoopConfig) -> float:
    """Share of the peak learning rate: warm up, hold, decay to zero at the end of the images or of the time."""
    warm = (images_seen + config.batch_size) / max(config.warmup_images, 1)
    left = 1 - _done(images_seen, elapsed_s, config)
    return max(0.0, min(1.0, warm, left / config.decay_share if config.decay_share else 1.0))


def _done(images_seen: int, elapsed_s: float, config: LoopConfig) -> float:
    """Share of the run that is over."""
    in_time = elapsed_s / config.time_limit_s if config.time_limit_s else 0.0
    return max(images_seen / config.images, in_time)


def fit(
    accelerator: accelerate.Accelerator,
    learners: Sequence[Learner],
    draw: Callable[[int, int], Mapping[str, Any]],
    config: LoopConfig,
    folder: pathlib.Path,
    *,
    averaged: nn.Module,
    on_report: Callable[[int, nn.Module, tensorboard.SummaryWriter], None] | None = None,
) -> nn.Module:
    """Train until `config.images` examples are seen; go on from the checkpoint in `folder` if there is one.

    draw: (step, examples on this process) -> keywords for every learner. It must depend on its arguments and the
        process alone, so that a resumed run equals an unbroken one.
    averaged: the network whose moving average is kept, if `ema_decay` is set.
    on_report: called on the main process at each report with images seen, the average (or the network) and the writer.
    Returns the average, or `averaged` itself if none is kept.
    Raises ConfigError if the batch cannot be shared evenly or the checkpoint does not fit, TrainingError if 100 steps
    in a row had to be skipped.
    """
    if config.batch_size % accelerator.num_processes:
        raise errors.ConfigError(
            f"batch_size {config.batch_size} cannot be shared among {accelerator.num_processes} processes; "
            f"it must be a multiple of {accelerator.num_processes}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    state = _State(accelerator, learners, config, averaged)
    first_step, earlier_s = state.restore(folder / CHECKPOINT)
    turns = _Turns(accelerator, learners, state.optimizers, config)
    steps = config.images // config.batch_size
    local_batch = config.batch_size // accelerator.num_processes
    writes = folder if accelerator.is_main_process else None
    progress = _Progress(folder.name, first_step, steps, config.batch_size, writes)
    saved = time.monotonic()
    began = saved - earlier_s
    for step in range(first_step, steps):
        elapsed_s = _agree(accelerator, time.monotonic() - began) if config.time_limit_s else 0.0
        over = _done(step * config.batch_size, elapsed_s, config) >= 1
        if over and step == first_step > 0:
            break  # the run that is gone on with had used up its time
        last = over or step + 1 == steps
        share = learning_rate_share(step * config.batch_size, elapsed_s, config)
        for report in turns.take(step, draw(step, local_batch), share):
            progress.add(report)
        state.update_average()
        if (step + 1) % config.log_every_steps == 0 or last:
            left_s = config.time_limit_s - elapsed_s if config.time_limit_s else float("inf")
            progress.report(step + 1, max(left_s, 0.0))
            if on_report and progress.writer:
                on_report((step + 1) * config.batch_size, state.result, progress.writer)
        if accelerator.is_main_process and (last or time.monotonic() - saved > config.checkpoint_every_s):
            state.save(folder / CHECKPOINT, step + 1, time.monotonic() - began)
            saved = time.monotonic()
        if last:
            break
    accelerator.wait_for_everyone()
    progress.close()
    return state.result


def restore(
    accelerator: accelerate.Accelerator,
    learners: Sequence[Learner],
    draw: Callable[[int, int], Mapping[str, Any]],
    config: LoopConfig,
    folder: pathlib.Path,
    *,
    averaged: nn.Module,
) -> nn.Module:
    """What `fit` would return if it trained no further than the checkpoint in `folder`.

    Raises ConfigError if there is none, or if it does not fit.
    """
    require_checkpoint(folder)
    state = _State(accelerator, learners, config, averaged)
    state.restore(folder / CHECKPOINT)
    return state.result


def require_checkpoint(folder: pathlib.Path) -> None:
    """Raise ConfigError unless a training has left a checkpoint in `folder`."""
    if not (folder / CHECKPOINT).is_file():
        raise errors.ConfigError(
            f"{folder} holds no {CHECKPOINT} to go by; train first, or name another run with --out"
        )


def images_seen(folder: pathlib.Path, config: LoopConfig) -> int:
    """Training examples that the checkpoint in `folder` has seen."""
    return int(_read(folder / CHECKPOINT, mmap=True)["step"]) * config.batch_size


def _agree(accelerator: accelerate.Accelerator, elapsed_s: float) -> float:
    """The main process's time on all: each would else stop at a step of its own and leave the others waiting."""
    return float(accelerate.utils.broadcast(torch.tensor(elapsed_s, device=accelerator.device)))


class _Turns:
    """The learners' turns of a step, each on its module as the accelerator wraps it."""

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        learners: Sequence[Learner],
        optimizers: Mapping[str, torch.optim.Optimizer],
        config: LoopConfig,
    ) -> None:
        self._accelerator, self._learners, self._optimizers = accelerator, learners, optimizers
        self._max_grad_norm = config.max_grad_norm
        self._modules = {learner.name: accelerator.prepare_model(learner.module) for learner in learners}
        self._skipped = dict.fromkeys(self._modules, 0)  # steps in a row

    def take(self, step: int, batch: Mapping[str, Any], share: float) -> list[dict[str, Tensor]]:
        """Every learner's turn at `share` of its learning rate. Returns what each reports.

        Raises TrainingError if one of them has skipped too many steps in a row.
        """
        reports = []
        for learner in self._learners:
            report, finite = self._turn(learner, batch, share)
            reports.append(report)
            skipped = self._skipped[learner.name] = 0 if finite else self._skipped[learner.name] + 1
            if skipped >= _MOST_SKIPPED:
                raise errors.TrainingError(
                    f"{learner.name}: the last {skipped} steps up to step {step + 1} had a loss or a gradient that is "
                    "not finite; look at the curves in TensorBoard, then begin anew in another folder, "
                    "with a lower learning rate or precision=fp32"
                )
        return reports

    def _turn(self, learner: Learner, batch: Mapping[str, Any], share: float) -> tuple[dict[str, Tensor], bool]:
        """What one learner reports, and whether its gradient was finite. If not, the step is skipped, and that it was
        is all that it reports."""
        optimizer = self._optimizers[learner.name]
        for group in optimizer.param_groups:
            group["lr"] = learner.learning_rate * share
        with self._accelerator.autocast():
            losses: dict[str, Tensor] = self._modules[learner.name](**batch)
        self._accelerator.backward(torch.stack([loss.float() for loss in losses.values()]).sum())
        norm = torch.as_tensor(self._accelerator.clip_grad_norm_(learner.module.parameters(), self._max_grad_norm))
        finite = bool(torch.isfinite(norm))
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        skipped = {f"{learner.name}_skipped": torch.tensor(float(not finite))}
        return (losses | {f"{learner.name}_gradient": norm} | skipped if finite else skipped), finite


def save_atomically(content: object, path: pathlib.Path) -> None:
    """torch.save to a neighbour, flush, then rename: a reader finds the old file or the new one, never half."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


class _State:
    """Everything that a checkpoint holds: modules, optimizers, and the average."""

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        learners: Sequence[Learner],
        config: LoopConfig,
        averaged: nn.Module,
    ) -> None:
        self._averaged = averaged
        self._parts: dict[str, Any] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for learner in learners:
            module = learner.module.to(accelerator.device)
            trained = [weight for weight in module.parameters() if weight.requires_grad]
            self.optimizers[learner.name] = torch.optim.AdamW(
                trained, learner.learning_rate, betas=learner.betas, weight_decay=config.weight_decay, fused=True
            )
            self._parts |= {learner.name: module, f"{learner.name}_optimizer": self.optimizers[learner.name]}
        self._average: swa_utils.AveragedModel | None = None
        if config.ema_decay:
            decay = swa_utils.get_ema_multi_avg_fn(config.ema_decay)
            self._average = self._parts["average"] = swa_utils.AveragedModel(averaged, multi_avg_fn=decay)

    @property
    def result(self) -> nn.Module:
        """The average if one is kept, else the network itself."""
        return self._average.module if self._average is not None else self._averaged

    def update_average(self) -> None:
        if self._average is not None:
            self._average.update_parameters(self._averaged)

    def save(self, checkpoint: pathlib.Path, step: int, elapsed_s: float) -> None:
        content = {name: part.state_dict() for name, part in self._parts.items()}
        save_atomically(content | {"step": step, "elapsed_s": elapsed_s}, checkpoint)

    def restore(self, checkpoint: pathlib.Path) -> tuple[int, float]:
        """Load a checkpoint if there is one. Returns the steps taken and the seconds they took.

        Raises ConfigError if it is damaged or does not fit.
        """
        if not checkpoint.exists():
            return 0, 0.0
        content = _read(checkpoint)
        try:
            for name, part in self._parts.items():
                part.load_state_dict(content[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise errors.ConfigError(
                f"{checkpoint} is of another configuration ({errors.first_line(error)}); "
                "use its own config, or another folder with --out"
            ) from None
        _log.info("%s stands at step %d", checkpoint.parent.name, content["step"])
        return int(content["step"]), float(content.get("elapsed_s", 0.0))


def _read(checkpoint: pathlib.Path, *, mmap: bool = False) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mmap)
        content["step"]
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise errors.ConfigError(
            f"{checkpoint} cannot be read ({errors.first_line(error)}); remove it to begin anew, or use --out"
        ) from None
    return content


class _Progress:
    """Running means to the log and to TensorBoard, with the rate and the time left."""

    def __init__(self, name: str, first_step: int, steps: int, batch_size: int, folder: pathlib.Path | None) -> None:
        self._name, self._steps, self._batch_size = name, steps, batch_size
        self.writer = tensorboard.SummaryWriter(str(folder), flush_secs=_FLUSH_S) if folder else None
        self._sums: dict[str, list[float]] = collections.defaultdict(list)
        self._step, self._since = first_step, time.monotonic()

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name].append(float(value.detach()))

    def report(self, step: int, most_left_s: float = float("inf")) -> None:
        """Report the means since the last time. most_left_s: until a time limit."""
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        rate = (step - self._step) * self._batch_size / (time.monotonic() - self._since)
        if self.writer:
            for name, value in means.items():
                self.writer.add_scalar(name, value, step * self._batch_size)
            minutes = min((self._steps - step) * self._batch_size / rate, most_left_s) / 60
            shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
            _log.info("%s %d/%d  %s  %.0f images/s  %.1f min left", self._name, step, self._steps, shown, rate, minutes)
        self._sums.clear()
        self._step, self._since = step, time.monotonic()

    def close(self) -> None:
        if self.writer:
            self.writer.close()
