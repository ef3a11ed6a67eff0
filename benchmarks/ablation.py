"""What each part of the recipe does, on shapes: `python -m benchmarks.ablation --out runs/ablation`.

Every variant sees the same number of images, from the same teacher, with two seeds. What is finished for this number of
images (and measured on this number of prompts) is not done again, so the table can be grown over several sittings.
Prints a Markdown table; each cell is the mean over seeds and, behind ±, half their difference.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import sys
from typing import Any

from diffusion_kd import artifact, errors, files, pipeline
from diffusion_kd.objectives import add
from eval import examine
from eval import run as evaluation
from training import config as configs
from training import data, distill

_log = logging.getLogger(__name__)

VARIANTS: dict[str, list[str]] = {
    "ADD": [],
    "adversarial term only": ["objective.distillation_weight=0"],
    "distillation term only": ["objective.adversarial_weight=0"],
    "without R1": ["objective.r1_weight=0"],
    "stronger R1": ["objective.r1_weight=0.3"],
    "weaker adversarial term": ["objective.adversarial_weight=0.05"],
    "without text condition": ["objective.text_condition=false"],
    "without image condition": ["objective.image_condition=false"],
    "without either condition": ["objective.text_condition=false", "objective.image_condition=false"],
    "sds weighting": ["objective.weighting=sds"],
    "nfsd weighting": ["objective.weighting=nfsd", "negative_prompt=a blurry mess"],
    "latent distance": ["objective.distance_space=latent"],
    "+ terminal bias": ["objective.terminal_probability=0.5"],
    "+ latent heads": ["objective.latent_weight=0.3", "objective.latent_timesteps=[20,400]"],
    "+ mismatched captions": ["objective.mismatch_weight=0.5"],
    "+ finite differences": ["objective.finite_difference_weight=1"],
    "+ trajectories": ["objective.trajectory_weight=1"],
}
STEPS = (1, 4)
MEASURES = ("prompt_accuracy", "fd", "clip_score", "diversity_ratio")
Measures = dict[str, dict[str, float]]
"""Of one student: step count -> name -> value."""


def settings(variant: str, seed: int, images: int) -> distill.DistillConfig:
    """Plain ADD but for what the variant changes. Raises ConfigError."""
    overrides = [f"training.images={images}", f"seed={seed}", *VARIANTS[variant]]
    return configs.load(distill.DistillConfig, "shapes_add", overrides)


def student_of(variant: str, seed: int, images: int, out: pathlib.Path) -> pathlib.Path:
    """Distil one variant, or find it done."""
    folder = out / f"{images}-images" / f"{variant.replace(' ', '-')}-{seed}"
    if not (folder / "student").is_dir():
        config = settings(variant, seed, images)
        # The scenes stay those of seed 0: the seed decides the batches, the noise and the heads.
        pictures = data.ShapesImages(config.scenes, 0)
        distill.Distillation(config, "shapes-teacher", pictures, folder).run()
    return folder / "student"


def untrained(out: pathlib.Path) -> pathlib.Path:
    """The teacher's own weights as a student: where every variant starts."""
    folder, teacher, steps = (
        out / "untrained" / "student",
        artifact.load("shapes-teacher"),
        add.ADDConfig().student_steps,
    )
    if not folder.is_dir():
        kind = teacher.scheduler.config.prediction_type
        timesteps = pipeline.trained_timesteps(steps)
        parts = dataclasses.replace(teacher, scheduler=artifact.student_scheduler(teacher.scheduler, steps))
        untouched = artifact.Distillation("none", timesteps, kind, teacher.size_px, {"teacher": "shapes-teacher"})
        artifact.export_student(folder, parts=parts, distillation=untouched)
    return folder


def measure(student: pathlib.Path, arguments: list[str]) -> Measures:
    """Measures of one student by step count."""
    steps = ",".join(map(str, STEPS))
    report = evaluation.run(["--student", str(student), "--steps", steps, "--out", str(student.parent), *arguments])
    assert report is not None, "one process"
    return {str(row["steps"]): _measures(row) for row in report["rows"] if row["model"] == examine.STUDENT}


def _measures(row: dict[str, Any]) -> dict[str, float]:
    found = {name: row["values"][name]["value"] for name in MEASURES[:-1]}
    return found | {MEASURES[-1]: row["slices"]["diversity"]["all prompts"]["retention"]}


def measured_once(student: pathlib.Path, arguments: list[str]) -> Measures:
    """Measures of one student, kept beside it under what they were measured with."""
    results = student.parent / f"measures{''.join(arguments)}.json".replace("/", "-")
    if not results.is_file():
        results.write_text(json.dumps(measure(student, arguments), indent=2) + "\n")
    loaded: Measures = json.loads(results.read_text())
    return loaded


def table(results: dict[str, list[Measures]]) -> str:
    """Markdown: a line for each variant, a column for each measure and step count."""
    columns = [(steps, name) for steps in map(str, STEPS) for name in MEASURES]
    lines = [
        "| variant | " + " | ".join(f"{name.replace('_', ' ')}, {steps}" for steps, name in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for variant, seeds in results.items():
        cells = []
        for steps, name in columns:
            values = [seed[steps][name] for seed in seeds]
            middle, spread = sum(values) / len(values), (max(values) - min(values)) / 2
            cells.append(f"{middle:.3g} ± {spread:.2g}")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/ablation"))
    parser.add_argument("--images", type=int, default=3200, help="training examples of each run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument(
        "--guidance-scale", type=float, default=2.0, help="of the teacher that students are held against"
    )
    parser.add_argument("variants", nargs="*", help=f"of {', '.join(VARIANTS)}; all if none is named")
    given = parser.parse_intermixed_args()
    files.check_folder(given.out)
    if not given.guidance_scale > 1:
        raise errors.ConfigError(f"--guidance-scale must be above 1 (1 is none), not {given.guidance_scale:g}")
    if given.seeds < 1:
        raise errors.ConfigError(f"--seeds must be 1 or more, not {given.seeds}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    unknown = [variant for variant in given.variants if variant not in VARIANTS]
    if unknown:
        raise errors.ConfigError(f"no variant {unknown[0]!r}; variants are {', '.join(VARIANTS)}")
    for variant in given.variants or VARIANTS:
        settings(variant, 0, given.images)  # a bad length is named before the teacher's minutes
    arguments = ["--prompts", str(given.prompts), "--guidance-scale", f"{given.guidance_scale:g}"]
    results = {"untrained": [measured_once(untrained(given.out), arguments)]}
    for variant in given.variants or VARIANTS:
        results[variant] = []
        for seed in range(given.seeds):
            student = student_of(variant, seed, given.images, given.out)
            results[variant].append(measured_once(student, arguments))
        sys.stdout.write(table(results) + "\n\n")


if __name__ == "__main__":
    errors.run(main)
