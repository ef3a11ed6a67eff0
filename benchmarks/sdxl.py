"""SDXL-base at its true size, with random weights, on a GPU: speed and memory of training, latency of drawing.

`python -m benchmarks.sdxl` writes two tables in Markdown. Training is the loop's own, of the configs `sdxl_full` and
`sdxl_lora` at 512 px on one device, pictures being noise that is drawn beforehand. Latency is of one picture, text to
pixels. Random weights take the time and the memory of trained ones. `--toy` is for a look at it anywhere: a network a
hundredth as large.
"""

import argparse
import dataclasses
import functools
import gc
import itertools
import pathlib
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import accelerate.state
import torch

from benchmarks import training_step
from diffusion_kd import artifact, errors, pipeline
from diffusion_kd.networks import sdxl
from training import compute, distill, loop, networks
from training import config as configs

CONFIGS = {"sdxl_full": ("parallel=ddp", "training.accumulate=1"), "sdxl_lora": ("training.accumulate=4",)}
"""On one device, of a batch of 8: all at a time, as the plan of `docs/plan.md` has it, or two."""

SWITCHES = (("attention=sdpa",), ("attention=xformers",), ("attention=sdpa", "compile=true"))
STUDENT_STEPS, TEACHER_STEPS, GUIDANCE = (1, 2, 4), 50, 5.0
_WARM = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """train_px, draw_px: sides at which to train and to draw. batch_size: examples of a step."""

    dimensions: sdxl.Dimensions
    train_px: int
    draw_px: tuple[int, ...]
    batch_size: int

    def parts(self, size_px: int, device: torch.device) -> artifact.Parts:
        torch.manual_seed(0)
        return compute.sized(sdxl.build_parts(device, self.dimensions), size_px)


BASE = Case(sdxl.BASE, 512, (512, 1024), 8)
TOY = Case(training_step.TOY, 64, (64, 128), 4)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _forget() -> None:
    """What earlier cases left: a training refers to itself, and torch.compile keeps what it made."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train(case: Case, name: str, overrides: Sequence[str], steps: int) -> tuple[float, float]:
    """Examples a second, and the peak in GB; NaN where none is recorded. The first steps are left out of the time."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    length = [f"training.images={case.batch_size * steps}", f"training.batch_size={case.batch_size}"]
    quiet = ["training.log_every_steps=1000000", "training.trackers=[]", "training.health='off'"]
    config = configs.load(
        distill.DistillConfig, name, [f"size_px={case.train_px}", *length, *quiet, *CONFIGS[name], *overrides]
    )
    began_s: list[float] = []
    _forget()
    with tempfile.TemporaryDirectory() as folder:
        run = _run(case, config, pathlib.Path(folder))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # the networks are made on the GPU in float32, which no run does

        def draw(place: loop.Place) -> dict[str, Any]:
            if place.rows.start == 0:
                began_s.append(training_step.now_s())
            return {"batch": run.feed.batch(place)}

        with mock.patch.object(loop._Run, "_save"):  # tens of GB
            training_step.train(run, draw, pathlib.Path(folder))
        began_s.append(training_step.now_s())
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")
    steps_s = [later - earlier for earlier, later in itertools.pairwise(began_s)][_WARM:]
    return case.batch_size / statistics.median(steps_s), peak


def _run(case: Case, config: distill.DistillConfig, folder: pathlib.Path) -> distill.Distillation:
    pictures = training_step.Drawn(2 * case.batch_size, case.train_px)
    parts = case.parts(case.train_px, device())
    decoder = sdxl.build_tiny_decoder(device(), parts.vae.config.latent_channels)
    with (
        mock.patch.object(networks, "load_feature_network", training_step.random_eyes),
        mock.patch.object(artifact, "load_tiny_decoder", return_value=decoder),
    ):
        return distill.Distillation(config, "random", pictures, folder, parts=parts)


def latencies_ms(case: Case, size_px: int, rounds: int) -> list[float]:
    """Median time of one picture by the student's step counts and by the teacher, after one that does not count."""
    _forget()
    parts = case.parts(size_px, device()).to(device(), torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    timesteps = {int(steps): each for steps, each in pipeline.trained_timesteps(4).items()}
    student, teacher = pipeline.FewStepPipeline(parts, timesteps), pipeline.TeacherPipeline(parts)
    ways = [functools.partial(student, steps=steps) for steps in STUDENT_STEPS]
    ways += [functools.partial(teacher, steps=TEACHER_STEPS, guidance_scale=GUIDANCE)]
    return [_median_ms(way, rounds) for way in ways]


def _median_ms(draw: Callable[..., Any], rounds: int) -> float:
    took_s = []
    for seed in range(rounds + 1):
        since_s = training_step.now_s()
        draw(["a red circle above a blue star"], [seed])
        took_s.append(training_step.now_s() - since_s)
    return 1000 * statistics.median(took_s[1:])


def show_training(case: Case, steps: int) -> None:
    sys.stdout.write(f"| training at {case.train_px} px, batch {case.batch_size} | images/s | peak, GB |\n")
    sys.stdout.write("|---|--:|--:|\n")
    for name in CONFIGS:
        for overrides in SWITCHES:
            if "compile=true" in overrides and not torch.cuda.is_available():
                continue  # minutes for what nobody asks
            try:
                rate, peak_gb = train(case, name, overrides, steps)
                told = f"{rate:.2f} | {peak_gb:.1f}"
            except (errors.ConfigError, torch.OutOfMemoryError) as error:
                told = f"{errors.first_line(error)} | |"
            sys.stdout.write(f"| {name}, {' '.join(overrides)} | {told} |\n")
            sys.stdout.flush()


def show_latency(case: Case, rounds: int) -> None:
    sys.stdout.write(f"\n| one picture, ms | {' | '.join(f'{size} px' for size in case.draw_px)} |\n")
    sys.stdout.write(f"|---|{'--:|' * len(case.draw_px)}\n")
    titles = [*(f"student, {steps} steps" for steps in STUDENT_STEPS), f"teacher, {TEACHER_STEPS} guided steps"]
    columns = [latencies_ms(case, size, rounds) for size in case.draw_px]
    for title, *times in zip(titles, *columns, strict=True):
        sys.stdout.write(f"| {title} | {' | '.join(f'{each:.0f}' for each in times)} |\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sdxl", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help=f"of each training; the first {_WARM} do not count")
    parser.add_argument("--rounds", type=int, default=5, help="pictures of each latency")
    parser.add_argument("--toy", action="store_true", help="a small network, on any device")
    given = parser.parse_args(arguments)
    errors.require(given.steps > _WARM, "steps", given.steps, f"above {_WARM}")
    errors.require(given.rounds > 0, "rounds", given.rounds, "above 0")
    if not (given.toy or torch.cuda.is_available()):
        raise errors.ConfigError("SDXL-base at its true size needs a CUDA device and there is none here; give --toy")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    sys.stdout.write(f"torch {torch.__version__}, {name}\n\n")
    case = TOY if given.toy else BASE
    show_training(case, given.steps)
    show_latency(case, given.rounds)


if __name__ == "__main__":
    errors.run(main)
