"""Evaluations on disk: which there are, and each as a person would name it."""

import logging
import pathlib
from collections.abc import Iterator

from diffusion_kd import artifact, errors
from eval import compare, report
from serve.playground import words

log = logging.getLogger(__name__)

_DEEPEST = 3
"""Folders below the runs' own that are searched."""

_MOST_BYTES, _LONGEST = 20_000_000, 120
"""A report has some hundred kilobytes; names are cut after so many characters."""


def find(runs: pathlib.Path, served: str) -> dict[str, pathlib.Path]:
    """Name -> report.json, the newest first. served: the student; a report beside it counts even outside of `runs`."""
    beside = artifact.resolve(served).parent / report.REPORT_NAME
    paths = [path for path in dict.fromkeys([*_below(runs), beside]) if path.is_file()]  # no pipe, which would block
    named: dict[str, pathlib.Path] = {}
    for path in sorted(paths, key=_written_s, reverse=True):
        name = _name(path, runs)
        if name is not None:
            named.setdefault(name, path)
    return named


def _written_s(path: pathlib.Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it has just gone
        return 0.0


def _below(runs: pathlib.Path) -> Iterator[pathlib.Path]:
    for depth in range(1, _DEEPEST + 1):
        yield from runs.glob("*/" * depth + report.REPORT_NAME)


def _name(path: pathlib.Path, runs: pathlib.Path) -> str | None:
    """None for a report that this release cannot read."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        content = compare.load(path)
        student, protocol = content["models"]["student"], content["protocol"]["id"]
        where = path.parent.relative_to(runs) if path.is_relative_to(runs) else _beside(path)
        name = f"{where}: {_last(student['source'])} on {protocol}, {content['verdict']}"
        return words.printable(name)[:_LONGEST]
    except (errors.DataError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        log.debug("%s is left out: %s", path, errors.first_line(error))
        return None


def _beside(path: pathlib.Path) -> str:
    return "shipped" if path.parent == artifact.SHIPPED["shapes-student"].parent else path.parent.name


def _last(source: str) -> str:
    return source.rstrip("/").rsplit("/", 1)[-1]
