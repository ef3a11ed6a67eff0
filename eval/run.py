"""Report how good students are against their teacher: `python -m eval.run --teacher DIR --student DIR`.

Rows: the teacher at 50 guided steps; the teacher at each of the students' step counts, guided and not: what a student
must beat; the student, and optionally the shipped one, at each of its step counts. Writes `report.json` and
`samples.png`.
"""

import argparse
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Sequence

import torch

from diffusion_kd import errors, files, pipeline
from eval import compare, protocols, report

TEACHER_STEPS = 50
UNGUIDED, STUDENT_GUIDANCE = 1.0, 0.0
FEATURE_NETWORK = "shapes-encoder"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line asks for. Raises ConfigError for what cannot be asked.

    teacher, student, shipped_student: a folder or a name that `diffusion_kd.pipeline` knows; None: no such rows.
    """

    teacher: str
    student: str
    shipped_student: str | None
    prompts: int
    seed: int
    steps: tuple[int, ...]
    guidance_scale: float
    batch_size: int
    device: str
    out: pathlib.Path

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise errors.ConfigError(f"--batch-size must be at least 1, not {self.batch_size}")
        if not self.guidance_scale > UNGUIDED:
            raise errors.ConfigError(f"--guidance-scale must be above 1 (1 is none), not {self.guidance_scale:g}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise errors.ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")

    def models(self) -> dict[str, str]:
        """Model names in the rows, and where each comes from."""
        named = {compare.TEACHER: self.teacher, compare.TEACHER_FEW_STEPS: self.teacher, compare.STUDENT: self.student}
        return named | ({compare.SHIPPED_STUDENT: self.shipped_student} if self.shipped_student else {})


def parse(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m eval.run", description="Compare students with their teacher.")
    parser.add_argument("--teacher", default="shapes-teacher", help="a pipeline folder or a name")
    parser.add_argument("--student", default="shapes-student", help="an exported student's folder or a name")
    parser.add_argument("--shipped-student", help="a second student to compare with, usually shapes-student")
    parser.add_argument("--prompts", type=int, default=1024, help="how many; a quarter asks for held-out pairs")
    parser.add_argument("--seed", type=int, default=protocols.ShapesProtocol().seed, help="of prompts and pictures")
    parser.add_argument("--steps", default="1,2,4", help="the students', and the untrained teacher's, step counts")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="the teacher's; above 1")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/eval"), help="the report's folder")
    given = vars(parser.parse_args(arguments))
    return Settings(**given | {"steps": _step_counts(given["steps"])})


def _step_counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise errors.ConfigError(f"--steps must be different positive numbers like 1,2,4, not {text!r}")
    return counts


def enter(settings: Settings) -> tuple[compare.Entrant, list[compare.Entrant]]:
    """Load the models: the teacher, and everyone that is compared with it."""
    sampler, guidance = pipeline.load_teacher(settings.teacher), settings.guidance_scale
    sampler.to(settings.device)
    teacher = compare.Entrant(compare.TEACHER, sampler, TEACHER_STEPS, guidance)
    others = [
        compare.Entrant(compare.TEACHER_FEW_STEPS, sampler, steps, scale)
        for steps in settings.steps
        for scale in (guidance, UNGUIDED)
    ]
    for model, name in ((compare.STUDENT, settings.student), (compare.SHIPPED_STUDENT, settings.shipped_student)):
        if name is not None:
            student = pipeline.load_student(name)
            student.to(settings.device)
            others += [compare.Entrant(model, student, steps, STUDENT_GUIDANCE) for steps in settings.steps]
    return teacher, others


def run(settings: Settings) -> str:
    """Examine, write the report, and return its table."""
    protocol = protocols.ShapesProtocol(prompts=settings.prompts, seed=settings.seed)
    files.check_folder(settings.out)
    teacher, others = enter(settings)
    network = pipeline.load_feature_network(FEATURE_NETWORK).to(settings.device)
    exam = compare.Exam(protocol, network, batch_size=settings.batch_size)
    rows, works = zip(*compare.compare(exam, teacher, others), strict=True)
    written = report.build(exam, exam.reference(), rows, settings.models())
    report.write(settings.out, written, report.samples(exam, works))
    return report.table(written)


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        settings = parse(arguments)
        table = run(settings)
    except errors.DiffusionKDError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{table}\nwritten: {settings.out / report.REPORT_NAME}, {settings.out / report.SAMPLES_NAME}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
