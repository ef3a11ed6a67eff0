"""Seconds per image of teacher and student, end to end, side by side: `python -m benchmarks.speed`.

Text encoders and autoencoder included. Rounds alternate between the contenders, so that a machine that slows down
slows all of them; each figure is the median over rounds, and the share of each stage comes from the same rounds.
"""

import argparse
import dataclasses
import statistics
import sys
import time

import torch

from diffusion_kd import errors, pipeline
from diffusion_kd.shapes import scenes


@dataclasses.dataclass
class Contender:
    """A sampler under settings, and what was measured of it."""

    name: str
    sampler: pipeline.TeacherPipeline | pipeline.FewStepPipeline
    steps: int
    guidance_scale: float
    seconds: list[float] = dataclasses.field(default_factory=list)
    stages_s: dict[str, float] = dataclasses.field(default_factory=dict)

    def round(self, batch: int) -> None:
        """Draw one batch and note its time, whole and by stage."""
        prompts = [prompt.text for prompt in scenes.draw_prompts(batch, 5)]
        before = dict(self.sampler.stage_s)
        began = time.perf_counter()
        self.sampler(prompts, range(batch), steps=self.steps, guidance_scale=self.guidance_scale)
        self.seconds.append((time.perf_counter() - began) / batch)
        for stage, total in self.sampler.stage_s.items():
            self.stages_s[stage] = self.stages_s.get(stage, 0.0) + total - before[stage]


def measure(teacher: str, student: str, batch: int, rounds: int, guidance_scale: float) -> list[Contender]:
    """All contenders at one batch size; the first round warms up and does not count."""
    slow, fast = pipeline.load_teacher(teacher), pipeline.load_student(student)
    contenders = [Contender("teacher", slow, 50, guidance_scale)]
    contenders += [Contender("student", fast, steps, 0.0) for steps in (1, 2, 4)]
    for index in range(rounds + 1):
        for contender in contenders:
            if index == 1:
                contender.seconds.clear()
                contender.stages_s.clear()
            contender.round(batch)
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="shapes-teacher")
    parser.add_argument("--student", default="shapes-student")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    sys.stdout.write(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {given.rounds} rounds\n")
    sys.stdout.write(f"{'':22}{'batch':>6}{'ms/image':>10}{'faster':>9}   share of text, denoise, decode\n")
    for batch in (1, 16):
        contenders = measure(given.teacher, given.student, batch, given.rounds, given.guidance_scale)
        slowest = statistics.median(contenders[0].seconds)
        for contender in contenders:
            seconds = statistics.median(contender.seconds)
            whole = sum(contender.seconds) * batch
            shares = "  ".join(f"{total / whole:4.0%}" for total in contender.stages_s.values())
            name = f"{contender.name}, {contender.steps} steps"
            sys.stdout.write(f"{name:22}{batch:>6}{seconds * 1000:>10.1f}{slowest / seconds:>8.1f}x   {shares}\n")


if __name__ == "__main__":
    errors.run(main)
