"""Judge a student against its teacher: `python -m eval.run --teacher DIR --student DIR --out DIR`.

Generates with the same prompts and seeds for both, measures, and holds the student against the quality floor. Writes
`report.json`, `report.html` and `cases.json`. Exit code: 0 PASS, 1 FAIL, 2 INCONCLUSIVE, 3 for an error.

Under `accelerate launch` (or `torchrun`) the processes share the generating; the launcher has its own exit codes.
"""

import argparse
import errno
import logging
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch

from diffusion_kd import errors, files
from eval import cases, command, examine, gate, page, processes, protocols, report, stats, suites

_log = logging.getLogger(__name__)

EXIT_CODES = {stats.Outcome.PASS: 0, stats.Outcome.FAIL: 1, stats.Outcome.INCONCLUSIVE: 2}


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="python -m eval.run",
        description="Judge a student against its teacher. Exit code: 0 PASS, 1 FAIL, 2 INCONCLUSIVE, 3 error.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--teacher", default="shapes-teacher", help="a pipeline folder, a hub id or shapes-teacher")
    add("--student", default="shapes-student", help="an exported student's folder, a hub id or shapes-student")
    add("--protocol", default="shapes", help=f"one of {', '.join(protocols.PROTOCOLS)}")
    add("--steps", default="1,2,4", help="the student's step counts, each judged")
    add("--suite", help="prompts by name or from a JSON lines file, instead of the protocol's own")
    add("--floor", type=pathlib.Path, help="a quality floor, instead of the protocol's own in eval/floors")
    add("--prompts", type=int, help="about so many prompts of the suite, for a quick look; all, if not given")
    add(
        "--baseline",
        action="store_true",
        help="also judge the teacher at the student's step counts, untrained for them",
    )
    add("--beside", help="another student to show beside it")
    add("--teacher-steps", type=int, help="instead of the protocol's own")
    add("--guidance-scale", type=float, help="the teacher's, instead of the protocol's own; 1 is none")
    add("--seed", type=int, default=0, help="of the pictures")
    add("--batch-size", type=int, default=16, help="pictures at a time")
    add("--price-per-hour", type=float, help="of the device, in dollars, for the cost of a picture")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data", type=pathlib.Path, default=pathlib.Path("data"), help="folder of data sets and weights of a protocol")
    add("--cache", type=pathlib.Path, default=pathlib.Path("runs/cache"), help="where generated pictures are kept")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/eval"), help="the report's folder")
    return parser


def plan(arguments: Sequence[str] | None = None) -> tuple[examine.Plan, pathlib.Path]:
    """What the command line asks for, and where the report goes. Raises DiffusionKDError before anything is loaded."""
    given = _parser().parse_args(arguments)
    protocol = protocols.named(given.protocol)
    _check(given, protocol)
    files.check_folder(given.out)
    files.check_folder(given.cache)
    if absent := protocol.missing(given.data):
        raise errors.DataError(absent)
    suite = suites.load(given.suite) if given.suite else protocol.suite(given.data)
    if given.prompts is not None:
        suite = suite.thinned(given.prompts)
    made = examine.Plan(
        protocol=protocol,
        suite=suite,
        floor=gate.load(given.floor or gate.FLOORS / f"{protocol.floor}.yaml"),
        teacher=given.teacher,
        student=given.student,
        beside=given.beside,
        as_written=all(
            getattr(given, name) is None for name in ("suite", "prompts", "teacher_steps", "guidance_scale")
        ),
        steps=_step_counts(given.steps),
        teacher_steps=given.teacher_steps or protocol.teacher_steps,
        guidance_scale=protocol.guidance_scale if given.guidance_scale is None else given.guidance_scale,
        baseline=given.baseline,
        seed=given.seed,
        batch_size=given.batch_size,
        device=given.device,
        data=given.data,
        cache=given.cache,
        price_per_hour_usd=given.price_per_hour,
    )
    return made, given.out


def _check(given: argparse.Namespace, protocol: protocols.Protocol) -> None:
    errors.require(given.batch_size >= 1, "--batch-size", given.batch_size, "at least 1")
    errors.require(given.prompts is None or given.prompts >= 1, "--prompts", given.prompts, "at least 1")
    errors.require(0 <= given.seed < 2**62, "--seed", given.seed, "at least 0 and below 2**62")
    steps, scale, price = given.teacher_steps, given.guidance_scale, given.price_per_hour
    errors.require(steps is None or 1 <= steps <= 1000, "--teacher-steps", steps, "between 1 and 1000")
    errors.require(scale is None or 1 <= scale <= 100, "--guidance-scale", scale, "between 1 (none) and 100")
    errors.require(price is None or 0 < price < 1e6, "--price-per-hour", price, "above 0")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise errors.ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if not protocol.oracle and {"shapes-teacher", "shapes-student"} & {given.teacher, given.student}:
        raise errors.ConfigError(f"protocol {protocol.id} judges SDXL-class models: give --teacher and --student")
    if given.student == given.teacher:
        raise errors.ConfigError(f"--student is the teacher itself, {given.teacher}; give an exported student")


def _step_counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if min(counts) < 1 or len(set(counts)) < len(counts):
        raise errors.ConfigError(f"--steps must be different positive numbers like 1,2,4, not {text!r}")
    return counts


def run(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Examine, write the report and return it; None in every process but the first. Raises DiffusionKDError."""
    planned, out = plan(arguments)
    workers = processes.join()
    try:
        entrants = examine.enter(planned, workers.device(planned.device))
        examination = examine.examine(planned, entrants, workers)
        if examination is None:
            return None
        given = sys.argv[1:] if arguments is None else list(arguments)
        written = report.build(examination, shlex.join(["python", "-m", "eval.run", *given]))
        report.write(out, {report.REPORT_NAME: report.to_json(written)})
        chosen = cases.choose(examination, written)
        shown = page.render(written, examination, chosen)
        report.write(out, {report.PAGE_NAME: shown, cases.FILE_NAME: cases.to_json(chosen)})
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise errors.DataError(
            f"the disk is full ({error.filename or planned.cache}); pictures made so far are kept in {planned.cache}: "
            "make room and give the same command again to go on"
        ) from None
    finally:
        processes.leave()
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        written = run(arguments)
    except errors.DiffusionKDError as error:
        sys.stderr.write(f"error: {error}\n")
        return command.EXIT_ERROR
    except Exception:  # noqa: BLE001 - a defect of ours must not end with the code of a verdict
        _log.exception("this is a defect; please report it with what follows")
        return command.EXIT_ERROR
    if written is None:
        return 0
    sys.stdout.write(f"{report.table(written)}\n")
    return EXIT_CODES[stats.Outcome(written["verdict"])]


if __name__ == "__main__":
    sys.exit(main())
