"""The loop that the teacher's stages share: draw, forward, step, log, checkpoint; resumable and deterministic."""

import collections
import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils import tensorboard

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class StageConfig:
    """How one network learns.

    images: training examples in all, counted over all processes.
    batch_size: examples a step, over all processes.
    learning_rate: peak, reached after `warmup_images`, held, then falling in a straight line over the last
        `decay_share` of all images.
    ema_decay: per step; 0 keeps no average.
    """

    images: int
    batch_size: int
    learning_rate: float
    warmup_images: int = 20_000
    decay_share: float = 0.3
    weight_decay: float = 0.01
    ema_decay: float = 0.0
    max_grad_norm: float = 1.0
    checkpoint_every_s: float = 120.0
    log_every_steps: int = 50


def learning_rate(images_seen: int, config: StageConfig) -> float:
    """Warm up, hold, decay to zero."""
    warm = min(1.0, (images_seen + config.batch_size) / max(config.warmup_images, 1))
    left = (config.images - images_seen) / max(config.decay_share * config.images, 1)
    return config.learning_rate * min(warm, max(left, 0.0), 1.0)


def fit(
    accelerator: accelerate.Accelerator,
    name: str,
    module: nn.Module,
    draw: Callable[[int, int], Mapping[str, Any]],
    config: StageConfig,
    folder: pathlib.Path,
) -> nn.Module:
    """Train `module` until `config.images` examples are seen; go on from `folder/checkpoint.pt` if there is one.

    module: its forward takes the keywords that `draw` gives and returns named losses; their sum is minimised.
    draw: (step, examples on this process) -> keywords. It must depend on the step and the process alone, so that a
        resumed run equals an unbroken one.
    Returns the trained module, averaged if `ema_decay` is set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = module.to(accelerator.device)
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
    )
    average = None
    if config.ema_decay:
        average = swa_utils.AveragedModel(module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(config.ema_decay))
    state = {"module": module, "optimizer": optimizer} | ({"average": average} if average else {})
    checkpoint = folder / "checkpoint.pt"
    first_step = _restore(checkpoint, state)
    parallel = accelerator.prepare_model(module)
    steps = config.images // config.batch_size
    local_batch = config.batch_size // accelerator.num_processes
    progress = _Progress(name, steps, config.batch_size, folder if accelerator.is_main_process else None)
    saved = time.monotonic()
    for step in range(first_step, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step * config.batch_size, config)
        with accelerator.autocast():
            losses: dict[str, Tensor] = parallel(**draw(step, local_batch))
        accelerator.backward(torch.stack(list(losses.values())).sum())
        norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update_parameters(module)
        progress.add(losses | {"gradient_norm": torch.as_tensor(norm)})
        if (step + 1) % config.log_every_steps == 0:
            progress.report(step + 1)
        if accelerator.is_main_process and (time.monotonic() - saved > config.checkpoint_every_s or step + 1 == steps):
            save_atomically({part: value.state_dict() for part, value in state.items()} | {"step": step + 1}, checkpoint)
            saved = time.monotonic()
    accelerator.wait_for_everyone()
    progress.close()
    return average.module if average is not None else module


def save_atomically(content: object, path: pathlib.Path) -> None:
    """torch.save to a neighbour, flush, then rename: a reader finds the old file or the new one, never half."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _restore(checkpoint: pathlib.Path, state: Mapping[str, Any]) -> int:
    if not checkpoint.exists():
        return 0
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for part, value in state.items():
        value.load_state_dict(content[part])
    _log.info("resuming %s at step %d", checkpoint.parent.name, content["step"])
    return int(content["step"])


class _Progress:
    """Running means to the log and to TensorBoard, with the rate and the time left."""

    def __init__(self, name: str, steps: int, batch_size: int, folder: pathlib.Path | None) -> None:
        self._name, self._steps, self._batch_size = name, steps, batch_size
        self._writer = tensorboard.SummaryWriter(str(folder)) if folder else None
        self._sums: dict[str, Tensor] = collections.defaultdict(lambda: torch.zeros(()))
        self._count, self._since = 0, time.monotonic()

    def add(self, values: Mapping[str, Tensor]) -> None:
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value.detach().float().cpu()

    def report(self, step: int) -> None:
        rate = self._count * self._batch_size / (time.monotonic() - self._since)
        means = {name: float(total) / self._count for name, total in self._sums.items()}
        if self._writer:
            for name, value in means.items():
                self._writer.add_scalar(f"{self._name}/{name}", value, step * self._batch_size)
            minutes = (self._steps - step) * self._batch_size / rate / 60
            shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
            _log.info("%s %d/%d  %s  %.0f images/s  %.1f min left", self._name, step, self._steps, shown, rate, minutes)
        self._sums.clear()
        self._count, self._since = 0, time.monotonic()

    def close(self) -> None:
        if self._writer:
            self._writer.close()
