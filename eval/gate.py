"""The quality floor: PASS, FAIL or INCONCLUSIVE, for each step count of a student and for the student as a whole.

A student passes only where the data show that every floor holds, so a small sample cannot pass. It fails where the data
show that a floor is missed. Which error each rule guards against:

- PASS needs every floor, each at the full level. That is an intersection-union test: a student below any one floor
  passes with a chance of at most alpha, however many floors there are (Berger 1982), so no correction is due.
- FAIL needs one floor. With twenty slices one of them looks bad by chance, so their p-values are adjusted (Holm 1979),
  and multiplied by the number of step counts of which each can fail the student.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from diffusion_kd import errors
from eval import measure, stats, suites

FLOORS = pathlib.Path(__file__).parent / "floors"
SET_METRICS = (*measure.SET_DISTANCES, "patch_fd", "patch_kid")
PROMPT_METRICS = ("prompt_accuracy", "clip_score", "diversity")
METRICS = (*SET_METRICS, *PROMPT_METRICS, "latency")
OVER = ("all", "category", "edge_cases", "edge_category")
BANDS = ((0.95, "excellent"), (0.85, "good"), (0.70, "acceptable"), (-np.inf, "poor"))
"""Least retention of each band."""


@dataclasses.dataclass(frozen=True, slots=True)
class Floor:
    """metric: one of `METRICS`. over: one of `OVER`. retention: the least that a student may keep."""

    metric: str
    over: str
    retention: float


@dataclasses.dataclass(frozen=True, slots=True)
class FloorFile:
    """confidence: one-sided. min_prompts: a slice of fewer is INCONCLUSIVE."""

    confidence: float
    min_prompts: int
    floors: tuple[Floor, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One floor on one slice. needs: the fewest samples on which it can be decided."""

    metric: str
    slice: str
    retention: stats.Retention
    outcome: stats.Outcome
    needs: int

    def sentence(self) -> str:
        """What was found, in words."""
        kept, floor = self.retention.value, self.retention.floor
        if not self.retention.samples:
            return f"{self.metric} of {self.slice}: not measured here, so the floor of {floor:g} is not shown to hold"
        low, high = ("?" if end is None else f"{end:.3f}" for end in self.retention.interval)
        ratio = "undefined" if math.isnan(kept) else f"{kept:.3f} [{low}, {high}]"
        found = f"{self.metric} of {self.slice}: retention {ratio}, floor {floor:g}"
        if self.outcome is stats.Outcome.FAIL:
            return f"{found}: missed by {floor - min(kept, floor):.3f}"
        if self.retention.samples < self.needs:
            return f"{found}: {self.retention.samples} samples cannot decide it, {self.needs} are needed"
        if self.outcome is stats.Outcome.INCONCLUSIVE:
            return f"{found}: neither shown to hold nor to be missed by {self.retention.samples} samples"
        return f"{found}: holds"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """outcome, and the checks behind it, worst first. remarks: what else stood in the way of a PASS."""

    outcome: stats.Outcome
    checks: tuple[Check, ...]
    remarks: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """What decided."""
        if self.outcome is stats.Outcome.PASS:
            return []
        return [*self.remarks, *(check.sentence() for check in self.checks if check.outcome is self.outcome)]


def load(path: pathlib.Path) -> FloorFile:
    """Read a floor file. Raises ConfigError that names what is wrong in it."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise errors.ConfigError(f"no floor can be read from {path}: {errors.first_line(error)}") from None
    if not isinstance(content, dict) or content.keys() != {"confidence", "min_prompts", "floors"}:
        raise errors.ConfigError(f"{path} must hold confidence, min_prompts and floors")
    confidence, least, listed = content["confidence"], content["min_prompts"], content["floors"]
    where = f"{path}: "
    errors.require(_number(confidence) and 0.5 < confidence < 1, f"{where}confidence", confidence, "in (0.5, 1)")
    whole = isinstance(least, int) and not isinstance(least, bool)
    errors.require(whole and least >= 1, f"{where}min_prompts", least, "a whole number, at least 1")
    errors.require(isinstance(listed, list) and listed != [], f"{where}floors", listed, "a list of floors")
    return FloorFile(float(confidence), int(least), tuple(_floor(each, where) for each in listed))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _floor(fields: Any, where: str) -> Floor:
    if not isinstance(fields, dict) or fields.keys() != {"metric", "over", "retention"}:
        raise errors.ConfigError(f"{where}a floor has metric, over and retention, not {fields!r}")
    metric, over, retention = fields["metric"], fields["over"], fields["retention"]
    errors.require(metric in METRICS, f"{where}metric", metric, f"one of {', '.join(METRICS)}")
    errors.require(over in OVER, f"{where}over", over, f"one of {', '.join(OVER)}")
    errors.require(_number(retention) and retention > 0, f"{where}retention", retention, "above 0")
    if over != "all" and metric not in PROMPT_METRICS:
        raise errors.ConfigError(f"{where}{metric} is measured over all prompts only, not over {over}")
    return Floor(metric, over, float(retention))


# --- judging ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """What the gate knows of one entrant.

    sets: distances to the reference; empty where there is none. scores: by prompt. latency_s: of repeated runs.
    pictures, dimensions: (N, d) of the features behind `sets`. pictures_per_prompt: of the standard prompts.
    """

    sets: Mapping[str, stats.Jackknife]
    scores: measure.Scores
    latency_s: Sequence[float]
    pictures: int
    pictures_per_prompt: int
    dimensions: int


def judge(
    floor: FloorFile,
    student: Evidence,
    teacher: Evidence,
    suite: suites.Suite,
    remarks: Sequence[str] = (),
    *,
    step_counts: int = 1,
) -> Verdict:
    """Hold a student against the floor.

    remarks: reasons, such as lost pictures, for which nothing may pass. step_counts: how many are judged, of which each
    can fail the student. A floor that cannot be measured is INCONCLUSIVE, so no student passes by measuring less.
    """
    alpha = 1 - floor.confidence
    found = [
        (each.metric, name, retention)
        for each in floor.floors
        for name, retention in _retentions(each, student, teacher, suite, confidence=2 * floor.confidence - 1)
    ]
    adjusted = [min(1.0, step_counts * p) for p in stats.holm([retention.p_above for _, _, retention in found])]
    checks = [
        _check(metric, name, retention, alpha, p_fail, _needs(metric, floor, student))
        for (metric, name, retention), p_fail in zip(found, adjusted, strict=True)
    ]
    checks.sort(key=_severity)
    outcome = worst([check.outcome for check in checks])
    if remarks and outcome is stats.Outcome.PASS:
        outcome = stats.Outcome.INCONCLUSIVE
    return Verdict(outcome, tuple(checks), tuple(remarks))


def _check(metric: str, name: str, retention: stats.Retention, alpha: float, p_fail: float, needs: int) -> Check:
    enough = retention.samples >= needs
    outcome = retention.outcome(alpha, p_fail) if enough else stats.Outcome.INCONCLUSIVE
    return Check(metric, name, retention, outcome, needs)


def _severity(check: Check) -> tuple[int, float]:
    kept = check.retention.value / check.retention.floor
    return _ORDER.index(check.outcome), -math.inf if math.isnan(kept) else kept


def _needs(metric: str, floor: FloorFile, student: Evidence) -> int:
    """A covariance of d dimensions out of fewer than 2 d pictures is too far off for the jackknife to mend."""
    if metric in ("fd", "patch_fd"):
        return 2 * student.dimensions
    if metric in SET_METRICS:
        return floor.min_prompts * student.pictures_per_prompt
    return LATENCY_RUNS if metric == "latency" else floor.min_prompts


LATENCY_RUNS = 5
"""Fewest timed runs of which a latency is known."""

_ORDER = (stats.Outcome.FAIL, stats.Outcome.INCONCLUSIVE, stats.Outcome.PASS)


def worst(outcomes: Sequence[stats.Outcome]) -> stats.Outcome:
    """FAIL before INCONCLUSIVE before PASS; INCONCLUSIVE if nothing was checked."""
    return min(outcomes, key=_ORDER.index, default=stats.Outcome.INCONCLUSIVE)


def _retentions(
    floor: Floor, student: Evidence, teacher: Evidence, suite: suites.Suite, confidence: float
) -> list[tuple[str, stats.Retention]]:
    """The slices of a floor, one at least. confidence: of the interval, two-sided."""
    found: list[tuple[str, stats.Retention | None]] = []
    if floor.metric == "latency":
        times = (teacher.latency_s, student.latency_s)
        found = [("one picture", stats.bootstrap_retention(*times, floor.retention, confidence=confidence))]
    elif floor.metric in SET_METRICS and floor.metric in student.sets:
        ours, theirs = student.sets[floor.metric], teacher.sets[floor.metric]
        kept = stats.jackknife_retention(theirs, ours, floor.retention, student.pictures, confidence)
        found = [("all prompts", kept)]
    elif floor.metric in student.scores:
        found = [
            (name, score_retention(floor.metric, student, teacher, members, floor.retention, confidence))
            for name, members in slices(suite, floor.over)
        ]
    measured = [(name, retention) for name, retention in found if retention is not None]
    nothing = stats.Retention(math.nan, (None, None), floor.retention, 1.0, 1.0, 0)
    return measured or [(floor.over.replace("_", " "), nothing)]


def score_retention(
    metric: str, student: Evidence, teacher: Evidence, members: NDArray[np.int64], floor: float, confidence: float
) -> stats.Retention | None:
    """Of a metric of prompts on some of them; None if it says nothing of any."""
    ours, theirs = student.scores[metric][members], teacher.scores[metric][members]
    both = np.isfinite(ours) & np.isfinite(theirs)
    if not both.any():
        return None
    return stats.bootstrap_retention(
        ours[both], theirs[both], floor, pass_fail=metric == "prompt_accuracy", confidence=confidence
    )


def slices(suite: suites.Suite, over: str) -> list[tuple[str, NDArray[np.int64]]]:
    """Name and places of the prompts of each slice."""
    edge = over.startswith("edge")
    members = [(index, prompt) for index, prompt in enumerate(suite.prompts) if prompt.edge_case == edge]
    if over in ("all", "edge_cases"):
        name = "all edge cases" if edge else "all prompts"
        return [(name, np.array([index for index, _ in members], dtype=np.int64))]
    categories = dict.fromkeys(prompt.category for _, prompt in members)
    return [
        (name, np.array([index for index, prompt in members if prompt.category == name], dtype=np.int64))
        for name in categories
    ]


def band(retention: float) -> str:
    """In words; above 1 is excellent too."""
    return next(name for least, name in BANDS if retention >= least)
