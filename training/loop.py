"""The training loop: draw, forward, step, log, checkpoint; resumable and deterministic.

It knows learners, each a module that maps a batch to named losses, and runs them in turn at every step. What a
teacher's stage or a distillation method computes is theirs.

Where a run stands is (step, attempt); every random draw is a function of that and of the example's place in the whole
batch. So there is no random state to save, and neither an interruption nor the number of processes changes a run.
"""

import contextlib
import dataclasses
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from diffusion_kd import errors
from eval.health import DIVERSITY
from training import average, checkpoint, compute, health, parallel, tracking
from training import state as states

_log = logging.getLogger(__name__)

_MOST_SKIPPED = 100
"""So many skipped steps in a row end a training."""


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
    checkpoint_every_s: 0 writes one after every step. keep_checkpoints: so many last ones, and the newest healthy one.
    log_every_steps: between two lines of the log. sample_every_steps: between two grids of samples; 0: as often.
    accumulate: parts of a batch that are computed one after the other, which takes less memory and more time.
    health: watch says what goes wrong; rollback also goes back to the last healthy checkpoint by itself; off.
    trackers: by accelerate's names: tensorboard, wandb, mlflow, ...
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
    keep_checkpoints: int = 2
    log_every_steps: int = 50
    sample_every_steps: int = 0
    accumulate: int = 1
    health: str = "watch"
    trackers: list[str] = dataclasses.field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        if self.health == "False":  # YAML's reading of a bare `off`
            self.health = "off"
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
            ("keep_checkpoints", self.keep_checkpoints >= 1, "1 or more"),
            ("log_every_steps", self.log_every_steps >= 1, "1 or more"),
            ("sample_every_steps", self.sample_every_steps >= 0, "0 (at every report) or more"),
            ("accumulate", self.accumulate >= 1, "1 or more"),
            ("trackers", all(isinstance(name, str) for name in self.trackers), "a list of names"),
            ("health", self.health in health.MODES, f"one of {', '.join(health.MODES)}"),
        ):
            errors.require(fits, name, getattr(self, name), wanted)

    def decisive(self) -> dict[str, Any]:
        """The settings that decide what is learnt, besides how long."""
        names = ("batch_size", "learning_rate", "warmup_images", "decay_share", "weight_decay", "ema_decay")
        return {name: getattr(self, name) for name in (*names, "max_grad_norm")}


@dataclasses.dataclass
class Learner:
    """One module that learns. Its forward takes the keywords of a batch and returns named losses.

    learning_rate: peak; the loop's schedule scales it. betas: Adam's.
    large: the network within that parallel=fsdp2 shards; without one, every process has a copy.
    """

    name: str
    module: nn.Module
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    large: nn.Module | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Which examples of a run are wanted: all that their draws may depend on.

    rows: their places in the step's whole batch of `batch_size`. attempt: how often the run has been rolled back.
    """

    step: int
    rows: range
    batch_size: int
    attempt: int = 0

    @property
    def seed(self) -> tuple[int, ...]:
        """What a run's seed is lengthened by: nothing, until it has been rolled back."""
        return (self.attempt,) if self.attempt else ()


def learning_rate_share(images_seen: int, elapsed_s: float, config: LoopConfig) -> float:
    """Share of the peak learning rate: warm up, hold, decay to zero at the end of the images or of the time."""
    warm = (images_seen + config.batch_size) / max(config.warmup_images, 1)
    left = 1 - _done(images_seen, elapsed_s, config)
    return max(0.0, min(1.0, warm, left / config.decay_share if config.decay_share else 1.0))


def _done(images_seen: int, elapsed_s: float, config: LoopConfig) -> float:
    """Share of the run that is over."""
    in_time = elapsed_s / config.time_limit_s if config.time_limit_s else 0.0
    return max(images_seen / config.images, in_time)


Draw = Callable[[Place], Mapping[str, Any]]
OnReport = Callable[[int, tracking.Progress], Tensor | None]


def fit(
    accelerator: accelerate.Accelerator,
    learners: Sequence[Learner],
    draw: Draw,
    config: LoopConfig,
    folder: pathlib.Path,
    *,
    averaged: nn.Module,
    computing: compute.ComputeConfig | None = None,
    on_report: OnReport | None = None,
) -> None:
    """Train until `config.images` examples are seen; go on from the newest checkpoint in `folder` if there is one.

    draw: keywords for every learner. It must depend on its argument alone, so that a resumed run equals an unbroken
        one. averaged: the network whose moving average is kept, if `ema_decay` is set; it holds the average afterwards.
    computing: optimizer and sharding; plain, if None.
    on_report: called on every process when samples are due, with images seen and where to show pictures, while
        `averaged` holds its average. It may return samples (prompts, seeds, 3, H, W), whose diversity is watched.
    Raises ConfigError if the batch cannot be shared evenly or the checkpoint does not fit, TrainingError if 100 steps
    in a row had to be skipped or the run fell ill again and again.
    """
    run = _Run(accelerator, learners, draw, config, folder, averaged, computing or compute.ComputeConfig(), on_report)
    # Each step seeds torch's own generator; what is made afterwards must not depend on whether there were steps.
    with run.held(), run.tracked(), compute.memory_kept(accelerator.device), torch.random.fork_rng():
        run.train()
    accelerator.wait_for_everyone()


def restore(
    accelerator: accelerate.Accelerator,
    learners: Sequence[Learner],
    config: LoopConfig,
    folder: pathlib.Path,
    *,
    averaged: nn.Module,
    computing: compute.ComputeConfig | None = None,
) -> None:
    """Leave in `averaged` what `fit` would if it trained no further than the newest checkpoint in `folder`.

    Raises ConfigError if there is none, or if it does not fit.
    """
    require_checkpoint(folder)
    run = _Run(accelerator, learners, None, config, folder, averaged, computing or compute.ComputeConfig(), None)
    run.go_on()
    run.finish()


def require_checkpoint(folder: pathlib.Path) -> None:
    """Raise ConfigError unless a training has left a checkpoint in `folder`."""
    if not checkpoint.Checkpoints(folder / checkpoint.FOLDER).steps():
        raise errors.ConfigError(f"{folder} holds no checkpoint to go by; train first, or name another run")


def images_seen(folder: pathlib.Path, config: LoopConfig) -> int:
    """Training examples that the newest checkpoint in `folder` that is whole, by its size, has seen."""
    step = checkpoint.Checkpoints(folder / checkpoint.FOLDER).newest_step()
    return 0 if step is None else step * config.batch_size


class _Run:
    """One training, from where it stands to its end."""

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        learners: Sequence[Learner],
        draw: Draw | None,
        config: LoopConfig,
        folder: pathlib.Path,
        averaged: nn.Module,
        computing: compute.ComputeConfig,
        on_report: OnReport | None,
    ) -> None:
        parts = accelerator.num_processes * config.accumulate
        if config.batch_size % parts:
            raise errors.ConfigError(
                f"batch_size {config.batch_size} cannot be shared among {accelerator.num_processes} processes with "
                f"accumulate={config.accumulate}; it must be a multiple of {parts}"
            )
        tracking.require(config.trackers)
        folder.mkdir(parents=True, exist_ok=True)
        self._accelerator, self._draw, self._config, self._on_report = accelerator, draw, config, on_report
        self._turns = _Turns(accelerator, learners, config, computing)
        self._average = average.Average(averaged, config.ema_decay) if config.ema_decay else None
        modules = {learner.name: learner.module for learner in learners}
        self._state = states.State(accelerator, modules, self._turns.optimizers, self._average)
        self._checkpoints = checkpoint.Checkpoints(folder / checkpoint.FOLDER, config.keep_checkpoints)
        self._monitor = health.Monitor(config.health, folder)
        self._step, self._steps = 0, config.images // config.batch_size
        main = accelerator.is_main_process
        self._progress = tracking.Progress(folder, self._steps, config.batch_size, config.trackers if main else [])
        self._began_s = self._saved_s = time.monotonic()

    def held(self) -> contextlib.AbstractContextManager[object]:
        """The folder, against a second run in it."""
        return self._checkpoints if self._accelerator.is_main_process else contextlib.nullcontext()

    def tracked(self) -> contextlib.AbstractContextManager[object]:
        """Trackers, from when the folder is ours to the end, however it comes."""
        return self._progress

    # --- where it stands ---

    def go_on(self) -> None:
        """From the newest checkpoint, if there is one."""
        found = self._newest()
        if found is None:
            return
        if found.step > self._steps:
            raise errors.ConfigError(
                f"the run has seen {found.step * self._config.batch_size} images, and images is {self._config.images}; "
                "give as many or more, or another folder with --out"
            )
        self._take_up(found)

    def _newest(self, *, healthy_only: bool = False) -> checkpoint.Checkpoint | None:
        """The main process verifies it; the others take its word for which it is."""
        found = self._checkpoints.newest(healthy_only=healthy_only) if self._accelerator.is_main_process else None
        step = int(self._agree(-1.0 if found is None else float(found.step))[0])
        return None if step < 0 else found or self._checkpoints.read(step)

    def _take_up(self, found: checkpoint.Checkpoint) -> None:
        self._state.restore(found.state)
        self._monitor.load_state_dict(found.state["monitor"])
        self._progress.restart()
        self._progress.sums.update(found.state["sums"])
        self._turns.skipped.update(found.state.get("skipped", {}))
        self._step = found.step
        self._began_s = time.monotonic() - found.state["elapsed_s"]
        _log.info("%s stands at step %d", self._progress.name, self._step)

    def _save(self, *, last: bool, healthy: bool = False) -> None:
        """Write a checkpoint; one that cannot be written is a warning, unless it is the last.

        Whether it is healthy shows later: at the next report that finds nothing.
        """
        state = self._state.collect() | {
            "monitor": self._monitor.state_dict(),
            "sums": dict(self._progress.sums),
            "skipped": dict(self._turns.skipped),
            "elapsed_s": time.monotonic() - self._began_s,
        }
        if self._accelerator.is_main_process:
            try:
                self._checkpoints.save(self._step, state, healthy=healthy)
            except checkpoint.CheckpointNotWritten as error:
                if last:
                    raise
                _log.warning("%s; the run goes on", error)
        self._saved_s = time.monotonic()

    def _agree(self, *values: float) -> list[float]:
        """The main process's numbers, on all: each would else decide by a clock of its own and leave others waiting."""
        if self._accelerator.num_processes == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64 if self._accelerator.device.type == "cpu" else torch.float32)
        agreed: list[float] = accelerate.utils.broadcast(shared.to(self._accelerator.device)).tolist()
        return agreed

    # --- training ---

    def train(self) -> None:
        self.go_on()
        if self._step == 0 and self._config.health == "rollback":
            self._save(last=False, healthy=True)
        first_step = self._step
        while self._step < self._steps:
            now_s = time.monotonic()
            elapsed_s, unsaved_s = self._agree(now_s - self._began_s, now_s - self._saved_s)
            over = _done(self._step * self._config.batch_size, elapsed_s, self._config) >= 1
            if over and self._step == first_step > 0:
                break  # the run that is gone on with had used up its time
            last = (
                over or self._step + 1 == self._steps
            )  # a run that is rolled back there goes on, in what time is left
            self._take_step(learning_rate_share(self._step * self._config.batch_size, elapsed_s, self._config))
            if (last or self._step % self._config.log_every_steps == 0) and self._report(elapsed_s, last=last):
                self._roll_back()
                last = over
            elif last or unsaved_s > self._config.checkpoint_every_s:
                self._save(last=last)
            if last:
                break
        self.finish()

    def finish(self) -> None:
        """Leave the average in its network."""
        if self._average is not None:
            self._average.swap()

    def _take_step(self, share: float) -> None:
        assert self._draw is not None, "a run that trains was given something to draw from"
        attempt = self._monitor.attempt
        share *= health.BACK_OFF**attempt
        config, accelerator = self._config, self._accelerator
        size = config.batch_size // accelerator.num_processes // config.accumulate
        first = accelerator.process_index * config.accumulate * size
        places = [
            Place(self._step, range(first + part * size, first + (part + 1) * size), config.batch_size, attempt)
            for part in range(config.accumulate)
        ]
        # Whatever draws from torch's own generator, as dropout does, depends on step, attempt and process alone.
        torch.manual_seed(hash((self._step, attempt, accelerator.process_index)) % 2**63)
        for report in self._turns.take(self._step, map(self._draw, places), share):
            self._progress.add(report)
        if self._average is not None:
            self._average.update()
        self._step += 1
        self._progress.stepped()

    def _report(self, elapsed_s: float, *, last: bool) -> bool:
        """Say how it goes. Returns whether the run should be rolled back."""
        config = self._config
        left_s = config.time_limit_s - elapsed_s if config.time_limit_s else float("inf")
        seen, main = self._step * config.batch_size, self._accelerator.is_main_process
        means = self._progress.report(self._step, max(left_s, 0.0), loud=main)
        if self._on_report and (last or self._step % (config.sample_every_steps or config.log_every_steps) == 0):
            with self._average.in_place() if self._average is not None else contextlib.nullcontext():
                samples = self._on_report(seen, self._progress)
            if samples is not None:
                means[DIVERSITY] = health.diversity(samples)
                self._progress.log({DIVERSITY: means[DIVERSITY]}, seen)
        ill = main and self._monitor.report(seen, means) is health.Decision.ROLL_BACK
        if main and not self._monitor.ill:
            self._checkpoints.confirm(self._step - 1)
        return bool(self._agree(float(ill))[0])

    def _roll_back(self) -> None:
        """To the newest healthy checkpoint, on another random path and with a lower learning rate."""
        found = self._newest(healthy_only=True)
        if found is None:
            raise errors.TrainingError("the run has fallen ill and no healthy checkpoint is left to go back to")
        began_s = self._began_s
        self._monitor.rolled_back(found.step * self._config.batch_size)  # first: it may be once too often
        self._take_up(found)
        self._accelerator.wait_for_everyone()  # until all have read it
        if self._accelerator.is_main_process:
            self._checkpoints.discard_after(found.step)
        self._began_s = began_s  # time that was lost is spent all the same
        self._save(last=False, healthy=True)


class _Turns:
    """The learners' turns of a step, over all parts of a batch and all processes."""

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        learners: Sequence[Learner],
        config: LoopConfig,
        computing: compute.ComputeConfig,
    ) -> None:
        self._accelerator, self._learners, self._config = accelerator, learners, config
        self._replicas: dict[str, parallel.Replica] = {}
        self._trained: dict[str, list[nn.Parameter]] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for learner in learners:
            learner.module.to(accelerator.device)
            large = learner.large if computing.parallel == "fsdp2" else None
            if large is not None:
                parallel.shard(large, accelerator)
            self._replicas[learner.name] = parallel.Replica(learner.module, accelerator, sharded=large)
            trained = [weight for weight in learner.module.parameters() if weight.requires_grad]
            self._trained[learner.name] = trained
            self.optimizers[learner.name] = compute.make_optimizer(
                computing, trained, learner.learning_rate, learner.betas, config.weight_decay
            )
        self.skipped = dict.fromkeys(self._replicas, 0)  # steps in a row
        # A run that may be rolled back waits for the report that would do it.
        self._most_skipped = max(_MOST_SKIPPED, 2 * config.log_every_steps if config.health == "rollback" else 0)

    def take(self, step: int, parts: Iterable[Mapping[str, Any]], share: float) -> list[dict[str, float]]:
        """Every learner's turn at `share` of its learning rate. Returns what each reports, means over the whole batch.

        A part of the batch passes through all learners before the next one, as a later learner reuses what an earlier
        one computed; the weights change once, at the end.
        Raises TrainingError if one of them has skipped too many steps in a row.
        """
        sums: dict[str, dict[str, Tensor]] = {learner.name: {} for learner in self._learners}
        for number, part in enumerate(parts, 1):
            for learner in self._learners:
                for name, loss in self._backward(learner.name, part, last=number == self._config.accumulate).items():
                    sums[learner.name][name] = sums[learner.name].get(name, torch.zeros_like(loss)) + loss
        return [self._step(learner, sums[learner.name], step, share) for learner in self._learners]

    def _backward(self, name: str, part: Mapping[str, Any], *, last: bool) -> dict[str, Tensor]:
        """A part's share of the losses, its gradients added to what is there."""
        replica = self._replicas[name]
        with replica.gathering(last):
            with self._accelerator.autocast():
                losses = replica(**part)
            shares = {key: loss.float() / self._config.accumulate for key, loss in losses.items()}
            torch.stack(list(shares.values())).sum().backward()
        return {key: loss.detach() for key, loss in shares.items()}

    def _step(self, learner: Learner, losses: Mapping[str, Tensor], step: int, share: float) -> dict[str, float]:
        """Change one learner's weights, unless a loss or the gradient is not finite, on any process. Then that the step
        was skipped is all that is reported."""
        optimizer = self.optimizers[learner.name]
        for group in optimizer.param_groups:
            group["lr"] = learner.learning_rate * share
        norm = parallel.clip(self._trained[learner.name], self._config.max_grad_norm)
        report = parallel.mean(self._accelerator, {**losses, f"{learner.name}_gradient": norm})
        finite = all(math.isfinite(value) for value in report.values())
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        skipped = self.skipped[learner.name] = 0 if finite else self.skipped[learner.name] + 1
        if skipped >= self._most_skipped:
            raise errors.TrainingError(
                f"{learner.name}: the last {skipped} steps up to step {step + 1} had a loss or a gradient that is "
                "not finite; look at the curves in TensorBoard, then begin anew in another folder, "
                "with a lower learning rate or precision=fp32"
            )
        mark = {f"{learner.name}_skipped": float(not finite)}
        return report | mark if finite else mark
