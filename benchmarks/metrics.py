"""What measuring costs, without generating: `python -m benchmarks.metrics`.

Seconds of each part of the measurement of 5,000 pictures of 64x64 px, and peak memory at 2,000 and at 20,000 pictures,
each in a process of its own. Pictures are true renders, made beforehand.
"""

import argparse
import dataclasses
import functools
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_kd.shapes import scenes
from eval import images, measure, networks, processes, protocols, reference, run, sampling, suites


def _suite(prompts: int) -> suites.Suite:
    """Standard prompts alone, of the training grammar."""
    asked = scenes.draw_prompts(prompts, 1)
    return suites.checked(
        "benchmark", [suites.Prompt(f"{n:06d}", f"k{n % 8}", False, each.text, each) for n, each in enumerate(asked)]
    )


def _gallery(suite: suites.Suite, cache: pathlib.Path) -> images.Gallery:
    everything = images.items(suite, 2, 0)
    asks = {(item.prompt.text, item.seed): item.prompt.asks for item in everything}

    def paint(prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance_scale: float) -> Tensor:
        wanted = [(asks[pair], pair[1]) for pair in zip(prompts, seeds, strict=True)]
        drawn = [scenes.render(scenes.complete(each, np.random.default_rng(seed))) for each, seed in wanted if each]
        return sampling.to_images(np.stack(drawn))

    gallery = images.Gallery(cache, images.Entrant("renders", "renders", paint, "renders", 1, 0.0), everything, 16)
    gallery.fill(processes.Processes())
    return gallery


def measure_once(pictures: int, cache: pathlib.Path, crops: int, references: int) -> None:
    """Print seconds of each part and the peak memory of this process. crops, references: of a picture, of a prompt."""
    shapes = protocols.named("shapes")
    suite = _suite(pictures // 2)
    protocol = dataclasses.replace(shapes, crops_per_image=crops, references_per_prompt=references)
    plan, _ = run.plan(["--cache", str(cache)])
    gallery = _gallery(suite, cache)
    instruments = networks.load(protocol, plan.data, torch.device(plan.device))
    spent: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began_s = time.perf_counter()
        result = call()
        spent[name] = time.perf_counter() - began_s
        return result

    with tempfile.TemporaryDirectory() as folder:
        ruler = measure.Ruler(protocol, suite, instruments, pathlib.Path(folder), batch_size=16)
        truth = reference.open_reference(protocol, suite, plan.data, 1)
        assert isinstance(truth, reference.Pictures), "renders are pictures"
        text = networks.text_vectors(instruments.clip, [prompt.text for prompt in suite.prompts], 16)
        other = dataclasses.replace(gallery.entrant, model="teacher")
        teacher = images.Gallery(cache, other, gallery.items, 16)
        sets = timed("reference: render, features, crops", lambda: ruler.reference_sets(truth))
        found = timed("pictures: features, crops, CLIP, LPIPS, oracle", lambda: ruler.measure(gallery, teacher, text))
        groups = (found.sets.groups, sets.groups)
        for name, metric in measure.SET_DISTANCES.items():
            timed(name, functools.partial(metric.jackknife, found.sets.whole, sets.whole, *groups))
        timed("all distances", lambda: measure.distances(found.sets, sets))
        timed("precision, recall", lambda: measure.precision_and_recall(found.sets, sets))
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    for name, seconds in spent.items():
        sys.stdout.write(f"{pictures:>6} pictures  {name:48} {seconds:8.1f} s\n")
    sys.stdout.write(f"{pictures:>6} pictures  {'peak memory of the process':48} {peak_gb:8.3f} GB\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, nargs="*", default=[2_000, 5_000, 20_000])
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("runs/cache"))
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    shapes = protocols.named("shapes")
    parser.add_argument("--crops", type=int, default=shapes.crops_per_image)
    parser.add_argument("--references", type=int, default=shapes.references_per_prompt)
    given = parser.parse_args()
    if given.once:
        measure_once(given.once, given.cache, given.crops, given.references)
        return
    for pictures in given.pictures:
        _gallery(_suite(pictures // 2), given.cache)  # painted here, so that it counts for nothing there
        command = ["-m", "benchmarks.metrics", "--once", str(pictures), "--cache", str(given.cache)]
        command += ["--crops", str(given.crops), "--references", str(given.references)]
        sys.stdout.write(subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
