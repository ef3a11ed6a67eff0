"""The whole road in one command: distil the embedded teacher for some minutes, judge the result, show both.

`python -m training.demo --out runs/demo` (or `make demo`). Leaves the fresh student, `report.html` and `report.json`. A
minutes-old student need not meet the quality floor: the demo shows its verdict and ends well whatever it is.
"""

import argparse
import logging
import pathlib
import sys

from diffusion_kd import artifact, errors, files
from eval import report
from eval import run as evaluation
from training import config as configs
from training import data, distill

_log = logging.getLogger(__name__)

SHORT = ("training.ema_decay=0.98", "objective.latent_weight=0.01", "objective.latent_timesteps=[20,400]")
"""What the demo does otherwise than `shapes_add_plus`: a shorter average, as it lasts minutes, and a light adversarial
term, so that it shows the whole method (docs/recipes.md says what it does)."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/demo"), help="where everything goes")
    parser.add_argument("--minutes", type=float, default=5.0, help="of distillation")
    parser.add_argument("--prompts", type=int, default=256, help="to judge on, a third of them edge cases")
    given = parser.parse_args(arguments)
    if not 0 < given.minutes <= 60 * 24:
        raise errors.ConfigError(f"--minutes must be above 0 and at most a day, not {given.minutes:g}")
    if given.prompts < 8:
        raise errors.ConfigError(f"--prompts must be 8 or more, not {given.prompts}")
    files.check_folder(given.out)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    overrides = [*SHORT, f"training.time_limit_s={given.minutes * 60}"]
    config = configs.load(distill.DistillConfig, "shapes_add_plus", overrides)
    images = data.ShapesImages(config.scenes, config.seed)
    _log.info("distilling shapes-teacher for %g minutes", given.minutes)
    student = distill.Distillation(config, "shapes-teacher", images, given.out).run()
    beside = ["--beside", "shapes-student"] if artifact.SHIPPED["shapes-student"].is_dir() else []
    _log.info("judging it, the untrained teacher and the shipped student, on %d prompts", given.prompts)
    asked = ["--student", str(student), "--prompts", str(given.prompts), "--out", str(given.out), "--baseline", *beside]
    found = evaluation.run([*asked, "--cache", str(given.out.parent / "cache")])
    assert found is not None, "one process"
    sys.stdout.write(report.table(found) + "\n")
    sys.stdout.write(
        f"\nNext:\n"
        f"  look at                {given.out / report.PAGE_NAME}\n"
        f"  see it as a page       make serve, then http://127.0.0.1:8000/playground (Quality, Runs)\n"
        f"  watch the curves       .venv/bin/tensorboard --logdir {given.out}\n"
        f"  the full distillation  make distill\n"
        f"  your own pictures      .venv/bin/python -m training.teacher --data FOLDER --out runs/my-teacher\n"
    )


if __name__ == "__main__":
    errors.run(main)
