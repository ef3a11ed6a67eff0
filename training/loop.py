"""The training loop: draw, forward, step, log, checkpoint; resumable and deterministic.

It knows learners, each a module that maps a batch to named losses, and runs them in turn at every step. What a
teacher's stage or a distillation method computes is theirs.
"""

import collections
import dataclasses
import logging
import os
import pathlib
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


@dataclasses.dataclass
class LoopConfig:
    """How long and how.

    images: training examples in all, counted over all processes. batch_size: examples a step, over all processes.
    learning_rate: peak, reached after `warmup_images`, held, then falling in a straight line over the last
        `decay_share` of all images.
    ema_decay: of the average of the trained network, per step; 0 keeps none.
    max_grad_norm: gradients are scaled down to it.
    time_limit_s: stop after so long, the learning rate having fallen by then; 0 is no limit. What a limited run makes
        depends on the machine's speed.
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
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _State(accelerator, learners, config, averaged)
    first_step = state.restore(folder / CHECKPOINT)
    parallel = {learner.name: accelerator.prepare_model(learner.module) for learner in learners}
    steps = config.images // config.batch_size
    local_batch = config.batch_size // accelerator.num_processes
    progress = _Progress(folder.name, steps, config.batch_size, folder if accelerator.is_main_process else None)
    began = saved = time.monotonic()
    for step in range(first_step, steps):
        elapsed_s = time.monotonic() - began if config.time_limit_s else 0.0
        share = learning_rate_share(step * config.batch_size, elapsed_s, config)
        last = step + 1 == steps or _done(step * config.batch_size, elapsed_s, config) >= 1
        batch = draw(step, local_batch)
        for learner in learners:
            losses = _take_step(
                accelerator, learner, parallel[learner.name], state.optimizers[learner.name], batch, share, config
            )
            progress.add(losses)
        state.update_average()
        if (step + 1) % config.log_every_steps == 0 or last:
            progress.report(step + 1)
            if on_report and progress.writer:
                on_report((step + 1) * config.batch_size, state.result, progress.writer)
        due = time.monotonic() - saved > config.checkpoint_every_s or last
        if accelerator.is_main_process and due:
            save_atomically(state.content() | {"step": step + 1}, folder / CHECKPOINT)
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
    """What `fit` would return if it trained no further than the checkpoint in `folder`."""
    state = _State(accelerator, learners, config, averaged)
    state.restore(folder / CHECKPOINT)
    return state.result


def _take_step(
    accelerator: accelerate.Accelerator,
    learner: Learner,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Any],
    share: float,
    config: LoopConfig,
) -> dict[str, Tensor]:
    """One learner's turn. A loss or gradient that is not finite skips the step and is counted."""
    for group in optimizer.param_groups:
        group["lr"] = learner.learning_rate * share
    with accelerator.autocast():
        losses: dict[str, Tensor] = module(**batch)
    accelerator.backward(torch.stack([loss.float() for loss in losses.values()]).sum())
    norm = torch.as_tensor(accelerator.clip_grad_norm_(learner.module.parameters(), config.max_grad_norm))
    finite = bool(torch.isfinite(norm))
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    report = {name: loss if finite else torch.zeros(()) for name, loss in losses.items()}
    return report | {f"{learner.name}_gradient": norm.nan_to_num(0, 0, 0), "skipped": torch.tensor(float(not finite))}


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

    def content(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def restore(self, checkpoint: pathlib.Path) -> int:
        """Load a checkpoint if there is one. Returns the steps taken. Raises ConfigError if it does not fit."""
        if not checkpoint.exists():
            return 0
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        try:
            for name, part in self._parts.items():
                part.load_state_dict(content[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise errors.ConfigError(
                f"{checkpoint} is of another configuration ({str(error).splitlines()[0]}); "
                "use its own config, or another folder with --out"
            ) from None
        _log.info("%s stands at step %d", checkpoint.parent.name, content["step"])
        return int(content["step"])


class _Progress:
    """Running means to the log and to TensorBoard, with the rate and the time left."""

    def __init__(self, name: str, steps: int, batch_size: int, folder: pathlib.Path | None) -> None:
        self._name, self._steps, self._batch_size = name, steps, batch_size
        self.writer = tensorboard.SummaryWriter(str(folder)) if folder else None
        self._sums: dict[str, list[float]] = collections.defaultdict(list)
        self._step, self._since = 0, time.monotonic()

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name].append(float(value.detach()))

    def report(self, step: int) -> None:
        means = {name: sum(values) / len(values) for name, values in self._sums.items()}
        steps_taken = max(len(values) for values in self._sums.values()) if self._step == 0 else step - self._step
        rate = steps_taken * self._batch_size / (time.monotonic() - self._since)
        if self.writer:
            for name, value in means.items():
                self.writer.add_scalar(name, value, step * self._batch_size)
            minutes = (self._steps - step) * self._batch_size / rate / 60
            shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
            _log.info("%s %d/%d  %s  %.0f images/s  %.1f min left", self._name, step, self._steps, shown, rate, minutes)
        self._sums.clear()
        self._step, self._since = step, time.monotonic()

    def close(self) -> None:
        if self.writer:
            self.writer.close()
