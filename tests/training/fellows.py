"""Trainings of two processes that share one start of theirs, for `test_parallel`: imports take longer than they do.

`torchrun --nproc_per_node 2 fellows.py OUT ARGUMENTS...`, the arguments being of `training.distill`.
"""

import json
import pathlib
import sys
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from diffusion_kd import artifact, draws, pipeline
from training import compute, data, distill, feed, finetune, loop, tracking

ILL_FROM, RIGHT = 30, 40
"""The step from which `roll_back`'s first attempt is ill, and how many steps it takes."""

BROKEN_OFF, LONG = 2, 4
"""The step at which `sharded` is left and gone on with, and how many steps it takes."""


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"distillation": (self.line(x) - y).square().mean()}


def roll_back(accelerator: accelerate.Accelerator, folder: pathlib.Path) -> dict[str, Any]:
    """A run whose first attempt learns nonsense from `ILL_FROM` on, out of the batch's last example alone.

    Returns the steps that this process took, each with its attempt, and the weights before each and at the end.
    """
    taken, weights, module = list[tuple[int, int]](), list[list[float]](), Line()

    def draw(place: loop.Place) -> dict[str, Tensor]:
        taken.append((place.step, place.attempt))
        weights.append(module.line.weight.flatten().tolist())
        x, noise = (draws.Draws(place.seed, place.step, place.rows, n).normal([width]) for n, width in ((0, 3), (1, 1)))
        y = x.sum(1, keepdim=True) + noise
        if place.step >= ILL_FROM and place.attempt == 0 and place.batch_size - 1 in place.rows:
            y[-1] = 1e4
        return {"x": x, "y": y}

    config = loop.LoopConfig(
        images=4 * RIGHT,
        batch_size=4,
        learning_rate=0.1,
        warmup_images=0,
        ema_decay=0.9,
        checkpoint_every_s=0,
        log_every_steps=2,
        health="rollback",
    )
    loop.fit(accelerator, [loop.Learner("line", module, 0.1)], draw, config, folder, averaged=module)
    return {"taken": taken, "weights": [*weights, module.line.weight.flatten().tolist()]}


def sharded(
    accelerator: accelerate.Accelerator, given: Any, folder: pathlib.Path, *, steps: int, sampling: bool
) -> None:
    """Train a sharded U-Net, or go on with it, and keep a checkpoint of every step, written after samples if asked.

    given: names a `teacher` and the folder `data`, as `training.distill` is given them.
    """
    parts = artifact.load(given.teacher)
    parts.unet.requires_grad_(True)
    pictures = feed.ImageFeed(data.FolderImages(given.data, parts.size_px), feed.Encoder(parts, accelerator), 0)
    sampler = pipeline.TeacherPipeline(parts)

    def show(images_seen: int, progress: tracking.Progress) -> None:
        sampler(["a red circle"], [0], steps=1)

    config = loop.LoopConfig(
        images=4 * steps,
        batch_size=4,
        learning_rate=1e-2,
        warmup_images=0,
        decay_share=0,
        ema_decay=0.5,
        checkpoint_every_s=0,
        keep_checkpoints=steps,
        log_every_steps=1,
    )
    learner = loop.Learner("unet", finetune.Denoising(parts.denoiser(), 0.1), 1e-2, large=parts.unet)
    computing = compute.ComputeConfig(parallel="fsdp2")
    loop.fit(
        accelerator,
        [learner],
        lambda place: {"batch": pictures.batch(place)},
        config,
        folder,
        averaged=parts.unet,
        computing=computing,
        on_report=show if sampling else None,
    )


def main() -> None:
    out, arguments = pathlib.Path(sys.argv[1]), sys.argv[2:]
    accelerator = compute.launch(compute.ComputeConfig(precision="fp32"))
    told = roll_back(accelerator, out / "ill" / "training")
    (out / f"ill-{accelerator.process_index}.json").write_text(json.dumps(told))
    given = distill.parse(arguments)
    for name, steps, sampling in (("plain", LONG, False), ("sampled", BROKEN_OFF, True), ("sampled", LONG, True)):
        sharded(accelerator, given, out / name / "training", steps=steps, sampling=sampling)
    distill.main(arguments)  # last, as it parts the processes


if __name__ == "__main__":
    main()
