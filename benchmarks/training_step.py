"""Time of a training step against the bare network passes that it must make: `python -m benchmarks.training_step`.

The step is the loop's own, batch to average, without logs, samples and checkpoints. Between steps, in the same run,
each pass is timed alone on the same networks and shapes; figures are medians over steps, so that a machine that slows
down slows both. Pictures are drawn beforehand: that is data, not training. Then, with --memory, the peak of the step
with and without each memory switch, as measured and as `training.plan` foretells it.

glibc by itself gives every large block back to the kernel, which clears it again at the next use. A step, whose memory
is larger than any pass's, pays more for that than they do, so a training lets it keep what it has, as CUDA's allocator
does; --plain-allocator measures without.
"""

import argparse
import collections
import contextlib
import dataclasses
import gc
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import accelerate.state
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from diffusion_kd import artifact, errors
from diffusion_kd.losses import adversarial
from diffusion_kd.networks import features, sdxl
from diffusion_kd.objectives.base import Batch
from training import average, compute, distill, feed, loop, networks, plan, rehearsal
from training import config as configs

TOY = sdxl.Dimensions(
    size_px=128,
    unet_widths=(64, 128, 256),
    transformer_layers=(1, 1, 2),
    vae_widths=(32, 64, 64, 64),
    text_widths=(64, 128),
    text_layers=(2, 2),
    vocabulary=1024,
    head_width=32,
    groups=16,
    time_id_width=32,
)
"""SDXL's architecture with 15 million parameters in its U-Net."""


SWITCHES = (
    (),
    ("precision=bf16",),
    ("precision=bf16", "frozen_precision=bf16"),
    ("gradient_checkpointing=true",),
    ("training.accumulate=4",),
    ("lora_rank=16",),
    ("precision=bf16", "frozen_precision=bf16", "lora_rank=16", "gradient_checkpointing=true", "training.accumulate=4"),
)


class Drawn:
    """Captioned pictures of noise, drawn once."""

    source, group_size = "noise", 1

    def __init__(self, count: int, size_px: int) -> None:
        shape = (count, size_px, size_px, 3)
        self._pictures: Any = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def __len__(self) -> int:
        return len(self._pictures)

    def images_uint8(self, indices: Sequence[int]) -> Any:
        return self._pictures[list(indices)]

    def captions(self, indices: Sequence[int], seed: int) -> list[str]:
        return [f"a red circle above a blue star {index}" for index in indices]

    def cell_labels(self, indices: Sequence[int], cells: int) -> None:
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A teacher to train from. eyes: the feature network's name; `dinov2` has random weights here."""

    name: str
    eyes: str

    def load(self, config: distill.DistillConfig) -> artifact.Parts:
        if self.name != "toy":
            return compute.load_teacher(config, self.name)
        torch.manual_seed(0)
        return sdxl.build_parts("cpu", TOY)

    def architecture(self) -> artifact.Parts:
        return sdxl.build_parts("meta", TOY) if self.name == "toy" else artifact.architecture(self.name)


CASES = (Case("shapes-teacher", "shapes-encoder"), Case("toy", "dinov2"))


def random_eyes(name: str, size_px: int) -> features.FeatureNetwork:
    return features.DinoFeatures(size_px=networks.dino_px(size_px))


def prepare(case: Case, overrides: Sequence[str], steps: int, folder: pathlib.Path) -> distill.Distillation:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    length = [f"training.images={16 * steps}", "training.trackers=[]", "training.health='off'"]
    rare = ["training.log_every_steps=1000000", "training.checkpoint_every_s=1e9"]
    config = configs.load(
        distill.DistillConfig, "shapes_add", [f"feature_network={case.eyes}", *length, *rare, *overrides]
    )
    parts = case.load(config)
    eyes = random_eyes if case.eyes == "dinov2" else networks.load_feature_network
    with mock.patch.object(networks, "load_feature_network", eyes):
        return distill.Distillation(config, case.name, Drawn(64, parts.size_px), folder, parts=parts)


def now_s() -> float:
    """Once the GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Bare:
    """The passes of one step of plain ADD, each alone."""

    def __init__(self, run: distill.Distillation) -> None:
        self._run, self._objective = run, run.objective
        self._encoder = feed.Encoder(run.parts, run.accelerator)
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        self._student = [weight for weight in run.objective.student.parameters() if weight.requires_grad]
        self._heads = list(run.objective.heads.parameters())
        # At a rate of 0 they take the time of a step and change nothing.
        self._optimizers = [AdamW(group, 0.0, weight_decay=0.0, fused=True) for group in (self._student, self._heads)]
        self._average = average.Average(run.objective.student.unet, 0.99)

    def round(self, batch: Batch) -> None:
        """Every pass once. Gradients are gone afterwards."""
        objective = self._objective
        timesteps = torch.full((len(batch.cond),), 499)
        noised = objective.student.schedule.add_noise(batch.latents, torch.randn_like(batch.latents), timesteps)
        self._time("encoders", lambda: self._encode(batch))
        self._time("student U-Net, forward and backward", lambda: self._student_pass(noised, timesteps, batch))
        latents = batch.latents.detach().requires_grad_()
        self._time("decoder, forward and backward", lambda: self._backward(objective.decode(latents)))
        images = batch.images.detach().requires_grad_()
        self._time("feature network, forward and backward", lambda: self._backward(*self._maps(images)))
        with torch.no_grad():
            self._time("feature network, forward", lambda: self._maps(batch.images))
            self._time("teacher U-Net, forward", lambda: self._teach(noised, timesteps, batch))
            self._time("decoder, forward", lambda: objective.decode(batch.latents))
            seen = objective.feature_network(batch.images)
        maps = [layer.detach().float().requires_grad_() for layer in seen.maps]
        told = objective.conditions(batch.cond, seen.vector.float(), torch.zeros(len(batch.cond), dtype=torch.bool))
        objective.heads.requires_grad_(False)
        self._time("heads, student's turn", lambda: self._backward(*objective.heads["pixel"](maps, told)))
        objective.heads.requires_grad_(True)
        self._time("heads, their own turn", lambda: self._judge(maps, told))
        self._time("clipping and optimizers", self._optimize)
        self._time("average", self._average.update)

    def _time(self, name: str, work: Callable[[], object]) -> None:
        with self._run.accelerator.autocast():
            since = now_s()
            work()
            self.seconds[name].append(now_s() - since)

    def _encode(self, batch: Batch) -> None:
        size = (batch.images.shape[-2], batch.images.shape[-1])
        self._encoder.latents(batch.images)
        self._encoder.text([f"a red circle above a blue star {index}" for index in range(len(batch.cond))], size)

    def _student_pass(self, noised: Tensor, timesteps: Tensor, batch: Batch) -> None:
        self._backward(self._objective.student(noised, timesteps, batch.cond))

    def _teach(self, noised: Tensor, timesteps: Tensor, batch: Batch) -> None:
        scale = self._objective.config.teacher_guidance[0]
        self._objective.teacher.guided(noised, timesteps, batch.cond, batch.uncond, scale)

    def _maps(self, images: Tensor) -> tuple[Tensor, ...]:
        return self._objective.feature_network(images).maps  # type: ignore[no-any-return]

    def _judge(self, maps: Sequence[Tensor], told: Sequence[Tensor]) -> None:
        """Real and student's maps, R1 on the real ones, and backward through all of it."""
        heads = self._objective.heads["pixel"]
        real, fake = heads(maps, told), heads([layer.detach() for layer in maps], told)
        loss = adversarial.hinge_discriminator_loss(real, fake)
        if self._objective.config.r1_weight:
            loss = loss + adversarial.r1_penalty(real, maps)
        loss.backward()

    def _backward(self, *outputs: Tensor) -> None:
        torch.stack([output.float().mean() for output in outputs]).sum().backward()

    def _optimize(self) -> None:
        for weights, optimizer in zip((self._student, self._heads), self._optimizers, strict=True):
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def time_steps(run: distill.Distillation, folder: pathlib.Path, warm: int = 2) -> tuple[list[float], Bare]:
    """Seconds of each step of a true training, and the bare passes between them; the first `warm` of both left out."""
    bare, source = Bare(run), run.feed
    steps_s: list[float] = []
    since = 0.0

    def draw(place: loop.Place) -> Mapping[str, Any]:
        nonlocal since
        if place.step:
            steps_s.append(now_s() - since)
        bare.round(source.batch(place))
        since = now_s()
        return {"batch": source.batch(place)}

    train(run, draw, folder)
    for figures in (steps_s, *bare.seconds.values()):
        del figures[:warm]
    return steps_s, bare


def train(run: distill.Distillation, draw: loop.Draw, folder: pathlib.Path) -> None:
    loop.fit(
        run.accelerator,
        run._learners(),
        draw,
        run.config.training,
        folder,
        averaged=run.objective.student.unet,
        computing=run.config,
    )


def show_time(case: Case, overrides: Sequence[str], steps: int) -> float:
    """A table of medians; returns the step's time over the sum of the passes."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(case, overrides, steps, pathlib.Path(folder))
        steps_s, bare = time_steps(run, pathlib.Path(folder))
    passes = {name: statistics.median(seconds) for name, seconds in bare.seconds.items()}
    step, whole = statistics.median(steps_s), sum(passes.values())
    sys.stdout.write(f"\n{case.name}, batch 16, {' '.join(overrides) or 'as in shapes_add'}, ms\n")
    for name, seconds in passes.items():
        sys.stdout.write(f"  {name:42}{seconds * 1000:>9.1f}\n")
    sys.stdout.write(f"  {'sum of the bare passes':42}{whole * 1000:>9.1f}\n")
    sys.stdout.write(f"  {f'step, median of {len(steps_s)}':42}{step * 1000:>9.1f}{step / whole:>8.3f}x\n")
    sys.stdout.flush()
    return step / whole


def live_bytes() -> int:
    """Of every tensor that there is, each storage once."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def allocator_peak_bytes(work: Callable[[], object]) -> int:
    """By torch's own record of its CPU allocator: the most that is held at once of what is allocated meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None, "the profiler has run"
    found, left = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while left:
        event = left.pop()
        left.extend(event.children)
        if event.tag.name == "Allocation":
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    return int(np.cumsum([size for _, size in sorted(found, key=lambda each: each[0])]).max())


def measured_bytes(make: Callable[[], distill.Distillation], folder: pathlib.Path) -> int:
    """The peak of a training: the networks that it starts with, and what it allocates."""
    before = live_bytes()
    run = make()

    def work() -> None:
        train(run, lambda place: {"batch": run.feed.batch(place)}, folder)

    if run.accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    return live_bytes() - before + allocator_peak_bytes(work)


def show_memory(case: Case, steps: int = 2) -> None:
    """A line for each set of switches: measured, planned."""
    cuda = torch.cuda.is_available()
    sys.stdout.write(f"\n{case.name}, batch 16: peak of a step, MB\n  {'':78}{'measured':>10}{'planned':>10}\n")
    for overrides in SWITCHES:
        chosen = overrides if any("precision" in each for each in overrides) else ("precision=fp32", *overrides)
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            kept: list[distill.Distillation] = []

            def make(chosen: Sequence[str] = chosen, folder: pathlib.Path = folder, kept: list[Any] = kept) -> Any:
                kept.append(prepare(case, chosen, steps, folder))
                return kept[0]

            measured = measured_bytes(make, folder)
        config = kept[0].config
        parts = case.architecture()
        eyes = random_eyes("", parts.size_px) if case.eyes == "dinov2" else networks.feature_architecture(case.eyes, 0)
        planned = plan.make(
            config, case.name, plan.Machine(cuda=cuda), architectures=rehearsal.Architectures(parts, eyes)
        )
        sys.stdout.write(f"  {' '.join(chosen):78}{measured / 1e6:>10.1f}{planned.peak_gb * 1000:>10.1f}\n")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[case.name for case in CASES], help="one alone")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--memory", action="store_true", help="peaks with and without each memory switch")
    parser.add_argument("--plain-allocator", action="store_true", help="glibc's, as it is by itself")
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    given = parser.parse_intermixed_args()
    if given.plain_allocator:
        mock.patch.object(compute, "memory_kept", return_value=contextlib.nullcontext()).start()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    sys.stdout.write(f"torch {torch.__version__}, {device}\n")
    for case in CASES:
        if given.case in (None, case.name):
            show_time(case, given.overrides, given.steps)
            if given.memory:
                show_memory(case)


if __name__ == "__main__":
    errors.run(main)
