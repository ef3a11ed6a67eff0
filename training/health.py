"""Whether a training that goes on is still sound, and when it should go back to its last healthy checkpoint.

The loop asks a `Monitor` at every report. The rules are `eval.health`'s, which the playground shows as well, applied to
the last report alone, to the last `RECENT` reports and to the whole run: by the whole run alone, what goes wrong after
a thousand reports would be seen hundreds of reports late. Knows no networks and no processes: the main one judges.
"""

import dataclasses
import datetime
import enum
import json
import logging
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_kd import errors
from eval import health, runs
from eval.health import Finding, Level
from eval.metrics import diversity as pairwise

_log = logging.getLogger(__name__)

MODES = ("watch", "rollback", "off")
"""watch: say what goes wrong. rollback: also ask to go back to the last healthy checkpoint. off: look at nothing."""

MOST_ROLL_BACKS = 3

BACK_OFF = 0.5
"""Factor of the learning rates after each roll-back."""

RECENT = 24
"""Reports in which a sickness should show by itself: quarters of six."""

SUCCESSIVE = 2
"""Reports that must show a bad finding before the run goes back."""

FAR_OFF = 10.0
"""A loss so many times its usual size (the median of the 12 reports before) is not waited for, nor is a report of which
`NEARLY_ALL` steps were skipped."""

EARLY = 10.0
"""So much further off still is what counts before there are 12 reports."""

NEARLY_ALL = 0.9

_COMPARED_PX = 64


class Decision(enum.IntEnum):
    GO_ON = 0
    ROLL_BACK = 1


class Monitor:
    """Judges one stage's reports as they come.

    mode: one of `MODES`. folder: the stage's, to whose `health.jsonl` roll-backs are appended; None writes nothing.
    Raises ConfigError for another mode.
    """

    def __init__(self, mode: str = "watch", folder: pathlib.Path | None = None) -> None:
        errors.require(mode in MODES, "health", mode, f"one of {', '.join(MODES)}")
        self._mode, self._folder = mode, folder
        self._stage = folder.name if folder is not None else ""
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._bad: dict[str, int] = {}  # successive reports in which a curve looked bad
        self._attempt = 0
        self._ill = False
        self._images_seen = 0
        self.findings: list[Finding] = []
        """What the last report showed, the worst first."""

    @property
    def attempt(self) -> int:
        """How often the run has gone back, 0 to `MOST_ROLL_BACKS`.

        It must enter the random draws, and `BACK_OFF ** attempt` the learning rates: the same steps would lead to the
        same wall.
        """
        return self._attempt

    @property
    def ill(self) -> bool:
        """Whether a checkpoint written now should not be gone back to. Stricter than what is worth going back for: a
        sickness is recognised some reports after it begins."""
        return self._ill

    def report(self, images_seen: int, means: Mapping[str, float]) -> Decision:
        """Judge a report: means since the last one, by tag. A finding is logged when it is new."""
        if self._mode == "off":
            return Decision.GO_ON
        self._images_seen = images_seen
        self._cut(images_seen - 1)  # a report that comes again counts once
        for tag, value in means.items():
            self._curves.setdefault(tag, []).append((images_seen, float(value)))
        before, self.findings = self.findings, self._judge(means)
        _say(self.findings, before)
        return self._decide(means)

    def rolled_back(self, images_seen: int) -> None:
        """The run stands at so many images again. Its curves are cut back to there, and another attempt begins.

        Every process must say so: `attempt` counts on all. The one that judged writes it down.
        Raises TrainingError, on all of them, if the run has gone back `MOST_ROLL_BACKS` times before.
        """
        gives_up = self._attempt >= MOST_ROLL_BACKS
        why = "; ".join(finding.what.rstrip(".") for finding in self.findings if finding.level == Level.BAD)
        self._note("stop" if gives_up else "roll_back", None if gives_up else images_seen)
        if gives_up:
            advice = " ".join(dict.fromkeys(finding.advice for finding in self.findings if finding.level == Level.BAD))
            raise errors.TrainingError(
                f"the training fell ill again after {MOST_ROLL_BACKS} roll-backs"
                f"{f', at {self._images_seen:,} images: {why}' if self.findings else ''}. "
                f"{advice or 'The main process says why.'} Begin anew in another folder"
            )
        self._attempt += 1
        if self.findings:
            _log.warning(
                "back from %d to %d images, attempt %d of %d, at %g of the learning rate: %s",
                *(self._images_seen, images_seen, self._attempt, MOST_ROLL_BACKS, BACK_OFF**self._attempt, why),
            )
        self._cut(images_seen)
        self._bad.clear()
        self._ill, self.findings = False, []

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and dicts, so that a resumed run judges as the unbroken one."""
        curves = {
            tag: {"images_seen": [at for at, _ in points], "values": [value for _, value in points]}
            for tag, points in self._curves.items()
        }
        return {"attempt": self._attempt, "ill": self._ill, "bad": dict(self._bad), "curves": curves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. `attempt` never falls: a checkpoint from before a roll-back, to which the
        same process goes back, does not know of it."""
        self._attempt = max(self._attempt, int(state["attempt"]))
        self._ill = bool(state["ill"])
        self._bad = {tag: int(count) for tag, count in state["bad"].items()}
        self._curves = {
            tag: list(zip(points["images_seen"], points["values"], strict=True))
            for tag, points in state["curves"].items()
        }

    def _cut(self, images_seen: int) -> None:
        for points in self._curves.values():
            while points and points[-1][0] > images_seen:
                points.pop()

    def _judge(self, values: Mapping[str, float]) -> list[Finding]:
        """The worst finding on each curve. One that this report does not go on with stands as it stood."""
        views = [view for tag in self._curves for view in self._views(tag)]
        far_off = [_far_off(self._curves[tag], self._stage, tag) for tag in values]
        worst: dict[str, Finding] = {}
        for finding in health.worst_first([*filter(None, far_off), *health.curve_findings(views)]):
            worst.setdefault(finding.tag, finding)
        return list(worst.values())

    def _views(self, tag: str) -> list[runs.Curve]:
        """The last point, which tells whether it is finite or steps were skipped; and what tells how a curve runs."""
        points = self._curves[tag]
        views = [points[-1:]] if points else []
        finite = [point for point in points if math.isfinite(point[1])]
        if not tag.endswith("_skipped") and len(finite) > 1:
            begins = finite[:3] if tag in health.HINGES else []  # where its heads are counted
            views += [finite] if len(finite) <= RECENT else [finite, [*begins, *finite[len(begins) - RECENT :]]]
        return [_curve(self._stage, tag, view) for view in views]

    def _decide(self, values: Mapping[str, float]) -> Decision:
        bad = {finding.tag for finding in self.findings if finding.level == Level.BAD}
        self._bad |= {tag: self._bad.get(tag, 0) + 1 if tag in bad else 0 for tag in values}
        watched = {finding.tag for finding in self.findings} & {*health.LOSSES, health.DIVERSITY}
        self._ill = any(self._bad.values()) or bool(watched) or any(map(self._suspicious, values))
        at_once = any(_hopeless(tag, self._curves[tag]) for tag in values)
        lasting = any(count >= SUCCESSIVE for count in self._bad.values())
        return Decision.ROLL_BACK if self._mode == "rollback" and (at_once or lasting) else Decision.GO_ON

    def _suspicious(self, tag: str) -> bool:
        """Whether the last value alone gives reason not to go back to here."""
        points = self._curves[tag]
        if tag.endswith("_skipped"):
            return points[-1][1] > 0
        factor = health.SPIKE if tag.endswith("_gradient") else health.CLIMB_WATCH if tag in health.LOSSES else math.inf
        usual, slack = _usual(points)
        return points[-1][1] > factor * slack * usual

    def _note(self, action: str, to_images: int | None) -> None:
        """Append to `health.jsonl`; a full disk does not end a training for that."""
        if self._folder is None or not self.findings:
            return
        written = {
            "time_s": datetime.datetime.now(datetime.UTC).timestamp(),
            "images_seen": self._images_seen,
            "action": action,
            "to_images": to_images,
            "attempt": self._attempt + (action == "roll_back"),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }
        try:
            with (self._folder / runs.HEALTH).open("a", encoding="utf-8") as file:
                file.write(json.dumps(written) + "\n")
        except OSError as error:
            _log.warning("%s could not be written (%s)", self._folder / runs.HEALTH, error.strerror)


def diversity(samples: Tensor) -> float:
    """How different the images of one prompt are: the mean over pairs of seeds, then over prompts; 0 for equal ones.

    samples: (prompts, seeds, 3, H, W) in [-1, 1]. How far apart two images are is the mean absolute difference of their
    pixels as a share of the full range, images above 64 px being shrunk to 64 px, so in [0, 1]. NaN if a pixel is.
    Raises DataError for fewer than two seeds.
    """
    if not bool(torch.isfinite(samples).all()):
        return math.nan
    images = samples.flatten(0, 1).float()
    return float(pairwise.mean_pairwise_distances(images, samples.shape[1], _pixel_distance).mean())


def _pixel_distance(images: Tensor, others: Tensor) -> Tensor:
    difference = (_shrunk(images) - _shrunk(others)).abs()
    return difference.flatten(1).mean(1) / 2


def _shrunk(images: Tensor) -> Tensor:
    """(B, 3, H, W) with sides of 64 px at most."""
    height, width = images.shape[-2:]
    return functional.adaptive_avg_pool2d(images, (min(height, _COMPARED_PX), min(width, _COMPARED_PX)))


def _curve(stage: str, tag: str, points: Sequence[tuple[int, float]]) -> runs.Curve:
    images_seen, values = zip(*points, strict=True)
    return runs.Curve(stage, tag, images_seen, values, (0.0,) * len(points))


def _usual(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The median of the reports before the last, and by what factor a limit upon it is to be raised.

    While they are few a curve still finds its size: then the largest of them, and `EARLY`. Infinite where there are not
    even two, or they are of no size.
    """
    before = [value for _, value in points[:-1] if math.isfinite(value)][-health.FEWEST_POINTS :]
    few = len(before) < health.FEWEST_POINTS
    usual = math.inf if len(before) < 2 else max(before) if few else statistics.median(before)
    return usual if usual > 0 else math.inf, EARLY if few else 1.0


def _far_off(points: Sequence[tuple[int, float]], stage: str, tag: str) -> Finding | None:
    last = points[-1][1]
    usual, slack = _usual(points)
    if tag not in health.LOSSES or not math.isfinite(last) or last < FAR_OFF * slack * usual:
        return None
    return Finding(
        Level.BAD,
        f"{tag} is far off: {last:.3g}, {last / usual:.0f} times its usual {usual:.3g}.",
        "Lower training.learning_rate or objective.adversarial_weight, or train with precision=fp32.",
        stage,
        tag,
    )


def _hopeless(tag: str, points: Sequence[tuple[int, float]]) -> bool:
    """Whether the last report is so bad that the next need not be waited for."""
    return _far_off(points, "", tag) is not None or (tag.endswith("_skipped") and points[-1][1] >= NEARLY_ALL)


def _say(findings: Sequence[Finding], before: Sequence[Finding]) -> None:
    """Log what was not there before, and that all is well again."""
    known = {(finding.tag, finding.level) for finding in before}
    for finding in findings:
        if (finding.tag, finding.level) not in known:
            _log.warning("%s: %s %s", finding.level, finding.what, finding.advice)
    if before and not findings:
        _log.info("nothing points to trouble any more")
