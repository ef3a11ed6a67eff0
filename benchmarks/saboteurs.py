"""Does the gate catch a bad student, and by the right metric? `python -m benchmarks.saboteurs`.

Each saboteur hands in the teacher's own pictures after one thing has been done to them. The twin, which must pass, is
the teacher at other seeds. Takes about ten minutes of two cores, and less the second time.
"""

import argparse
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from diffusion_kd import errors, files
from eval import examine, gate, images, processes, run, sampling, stats

Picture = NDArray[np.uint8]
BLUR_PX = 1.5
CAUGHT_BY = {
    "swapped": "prompt_accuracy",
    "blurred": "patch_kid",
    "constant": "fd",
    "collapsed": "diversity",
    "noise": "fd",
    "twin": None,
}
"""Each saboteur, and a metric that must say FAIL; none may for the twin."""


class Saboteur:
    """A sampler that looks pictures up. pick: which item's picture, and as what, stands for an item."""

    def __init__(self, everything: Sequence[images.Item], pick: Callable[[int], Picture]) -> None:
        self._places = {(item.prompt.text, item.seed): place for place, item in enumerate(everything)}
        self._pick = pick

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        places = [self._places.get(asked, 0) for asked in zip(prompts, seeds, strict=True)]
        return sampling.to_images(np.stack([self._pick(place) for place in places]))


def saboteurs(teacher: images.Gallery, twin: images.Gallery, images_per_prompt: int) -> dict[str, Saboteur]:
    """All of `CAUGHT_BY`, out of the teacher's pictures, those of `twin` being of other seeds."""
    everything = teacher.items

    def drawn(place: int) -> Picture:
        return teacher.read([everything[place % len(everything)]])[0]

    def blurred(place: int) -> Picture:
        return np.asarray(Image.fromarray(drawn(place)).filter(ImageFilter.GaussianBlur(BLUR_PX)))

    picks: dict[str, Callable[[int], Picture]] = {
        "swapped": lambda place: drawn(place + 7 * images_per_prompt),
        "blurred": blurred,
        "constant": lambda place: drawn(0),
        "collapsed": lambda place: drawn(place - place % images_per_prompt),
        "noise": lambda place: np.random.default_rng(place).integers(0, 256, drawn(0).shape, np.uint8),
        "twin": lambda place: twin.read([twin.items[place]])[0],
    }
    return {name: Saboteur(everything, pick) for name, pick in picks.items()}


def judge(plan: examine.Plan, teacher: images.Entrant) -> dict[str, gate.Verdict]:
    """The gate's verdict on every saboteur of a teacher. The floor has no latency: a look-up takes none."""
    floors = tuple(floor for floor in plan.floor.floors if floor.metric != "latency")
    plan = dataclasses.replace(plan, floor=dataclasses.replace(plan.floor, floors=floors))
    each = plan.protocol.images_per_prompt
    honest, other = (
        images.Gallery(plan.cache, teacher, images.items(plan.suite, each, seed), plan.batch_size)
        for seed in (plan.seed, plan.seed + 1)
    )
    for gallery in (honest, other):
        gallery.fill(processes.Processes())
    entrants = [
        images.Entrant(name, "saboteur", sampler, f"{name} of {teacher.artifact_sha256}", 1, 0.0)
        for name, sampler in saboteurs(honest, other, each).items()
    ]
    examination = examine.examine(plan, [teacher, *entrants], processes.Processes())
    assert examination is not None, "one process"
    return {each.entrant.model: each.verdict for each in examination.results if each.verdict is not None}


def table(verdicts: dict[str, gate.Verdict]) -> str:
    """Markdown: who was caught, and by what."""
    lines = [
        "| student | verdict | must be caught by | floors that were missed, or not shown to hold |",
        "|---" * 4 + "|",
    ]
    for name, verdict in verdicts.items():
        deciding = [check for check in verdict.checks if check.outcome is verdict.outcome]
        deciding.sort(key=lambda check: check.metric != CAUGHT_BY[name])
        shown = "" if verdict.outcome is stats.Outcome.PASS else ", ".join(map(_said, deciding[:4]))
        more = f" and {len(deciding) - 4} more" if shown and len(deciding) > 4 else ""
        lines.append(f"| {name} | {verdict.outcome} | {CAUGHT_BY[name] or '-'} | {shown}{more} |")
    return "\n".join(lines)


def _said(check: gate.Check) -> str:
    low, high = ("?" if end is None else f"{end:.2f}" for end in check.retention.interval)
    return f"{check.metric} of {check.slice} {check.retention.value:.2f} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saboteurs", description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("runs/cache"))
    parser.add_argument("--prompts", type=int, help="about so many; all of the suite, if not given")
    given = parser.parse_args()
    files.check_folder(given.cache)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    arguments = ["--cache", str(given.cache)] + (["--prompts", str(given.prompts)] if given.prompts else [])
    plan, _ = run.plan(arguments)
    teacher, *_ = examine.enter(plan, torch.device(plan.device))
    sys.stdout.write(table(judge(plan, teacher)) + "\n")


if __name__ == "__main__":
    errors.run(main)
