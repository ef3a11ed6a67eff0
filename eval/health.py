"""Whether a training goes well: curves -> findings in words. Pure functions; nothing is read, written or stopped here.

The rules look for what is known to go wrong (docs/runs.md has them in a table): numbers that are not finite, a
discriminator that has won or learns nothing, losses that climb, gradients that jump, pictures that become all alike,
and runs that stopped half-way. A loss says little about quality:
"loss does not predict FID" (BK-SDM#21), so the best verdict is that nothing points to trouble.

Each number below is our own judgement unless a source stands beside it. Curves are means over a report's steps
(`log_every_steps`), so a jump in a curve is a larger one in a single step.
"""

import dataclasses
import enum
import functools
import io
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image

from diffusion_kd import errors
from eval import runs

FEWEST_POINTS = 12
"""Points that a curve must have to be judged by how it runs: quarters of three points, the fewest whose median one
outlier does not decide."""

SKIPPED_WATCH, SKIPPED_BAD = 0.01, 0.1
"""Shares of the last quarter's steps; a watch needs `FEWEST_POINTS` too, as one step of a first report's 50 is nothing.
A training ends by itself after 100 skipped steps in a row."""

HINGE_PER_HEAD = 2.0
"""Hinge loss of a head that cannot tell, summed over heads in a curve (Sauer et al. 2023, section 3.2)."""

WON_WATCH, WON_BAD = 0.25, 0.1
"""Shares of that. At 0 every picture is past the margin: the heads learn no more, and what they tell the student is not
how to improve."""

BLIND_WATCH = 0.998
"""Share of that, for the whole second half. Near 1 is usual: "d_loss about 2 is normal" for one head (PCM#11), and our
own healthy runs have 9.9 of 10 and 5.85 of 6 (docs/recipes.md). So only next to exactly 1 is a worry."""

CLIMB_WATCH, CLIMB_BAD = 1.5, 3.0
"""The last quarter's median of a loss over the best quarter's before."""

CLIMB_NOISE = 4.0
"""A climb must also be so many deviations (1.4826 times the median deviation) of the best quarter."""

_WINDOWS_A_QUARTER = 16
"""So many windows are tried for each quarter of a long curve, which bounds the time."""

SPIKE = 8.0
"""A gradient norm over the median of the whole curve. A mean over 50 steps that is eight times as large means a single
step some 350 times as large, or many large ones."""

GRADIENT_GROWTH = 8.0
"""The last quarter's median of a gradient norm over the second quarter's: plain ADD climbs to a norm of 5 to 14 within
its first 200 steps (docs/recipes.md), and then stays."""

ALIKE_WATCH, ALIKE_BAD = 0.5, 0.2
"""How different the pictures of a row are, over the first grid's: eight captions cannot look alike."""

LATE_REPORTS, LATE_S = 5.0, 600.0
"""An active run makes no progress if its last report is older than so many usual intervals and so many seconds."""

COLUMNS = 8
"""Captions side by side in a grid (`training.distill`)."""

_COMPARED_PX = 64

LOSSES = ("distillation", "trajectory", "denoise", "squared", "l1", "text", "text_2", "cells")
"""Losses that should fall and stay down. Not `kl`, `r1`, `mismatch`, `finite_difference`: they rise as others fall."""

HINGES = ("hinge", "hinge_latent")
"""The discriminator's losses."""


DIVERSITY = "diversity"
"""How different the images of one prompt are under different seeds, of the same prompts and seeds each time."""

ALIKE_SEEDS_WATCH, ALIKE_SEEDS_BAD = 0.5, 0.25
"""Shares of the best diversity before, the median of the three best."""


class Level(enum.StrEnum):
    """UNKNOWN: there is too little to judge by."""

    BAD = "bad"
    WATCH = "watch"
    UNKNOWN = "unknown"
    OK = "ok"


_ORDER = list(Level)


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a run shows. what, advice: sentences; advice may be empty. stage, tag: the curve, "" for none."""

    level: Level
    what: str
    advice: str = ""
    stage: str = ""
    tag: str = ""


def judge(history: runs.History) -> list[Finding]:
    """Everything that a run shows, the worst first. Never empty.

    Looks at the curves, at how the run stands and at its sample grids; a grid that cannot be read is left out.
    """
    found = [*curve_findings(history.curves), *_standing(history), *_alike(history.grids), *_went_back(history)]
    points = max((len(curve) for curve in history.curves), default=0)
    if points < FEWEST_POINTS:
        found.append(_too_early(points))
    elif not any(finding.level in (Level.BAD, Level.WATCH) for finding in found):
        found.append(Finding(Level.OK, f"Nothing in {len(history.curves)} curves points to trouble."))
    return worst_first(found)


def curve_findings(curves: Sequence[runs.Curve]) -> list[Finding]:
    """What curves alone show, the worst first. Empty where there is nothing to say."""
    found = [(curve, _of_one(curve)) for curve in curves]
    return worst_first(
        dataclasses.replace(finding, stage=curve.stage, tag=curve.tag) for curve, finding in found if finding
    )


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: _ORDER.index(finding.level))


def summary(findings: Sequence[Finding]) -> str:
    """The verdict in one sentence."""
    for level, said in ((Level.BAD, "In trouble"), (Level.WATCH, "Worth a look")):
        named = [finding for finding in findings if finding.level == level]
        if named:
            more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
            return f"{said}: {named[0].what.rstrip('.')}{more}."
    if any(finding.level == Level.UNKNOWN for finding in findings) or not findings:
        return "Too early to judge."
    return "Nothing points to trouble."


def _too_early(points: int) -> Finding:
    return Finding(
        Level.UNKNOWN,
        f"Too early to judge: the longest curve has {points} {'point' if points == 1 else 'points'}, "
        f"and {FEWEST_POINTS} are needed to tell how a curve runs.",
    )


# --- one curve --------------------------------------------------------------------------------------


def _of_one(curve: runs.Curve) -> Finding | None:
    """What is wrong with a curve, without its name; None where that is nothing."""
    if curve.tag.endswith("_skipped"):
        return _skipped(curve)
    broken = _not_finite(curve)
    if broken is None and curve.tag == DIVERSITY:
        return _seeds_alike(curve)
    if broken or len(curve) < FEWEST_POINTS:
        return broken
    if curve.tag.endswith("_gradient"):
        return _gradient(curve)
    if curve.tag in HINGES:
        return _discriminator(curve)
    return _climb(curve) if curve.tag in LOSSES else None


def _not_finite(curve: runs.Curve) -> Finding | None:
    broken = [at for at, value in zip(curve.images_seen, curve.values, strict=True) if not math.isfinite(value)]
    if not broken:
        return None
    late = not all(math.isfinite(value) for value in _quarters(curve.values)[-1])
    return Finding(
        Level.BAD if late else Level.WATCH,
        f"{curve.tag} is not a finite number in {len(broken)} of {len(curve)} reports, first at {broken[0]:,} "
        f"images{'' if late else ', and not of late'}.",
        "Go back to a run from before that, with a lower learning rate or precision=fp32.",
    )


def _skipped(curve: runs.Curve) -> Finding | None:
    """The curve is the share of a report's steps that were skipped, because a loss or gradient was not finite."""
    shares = [value for value in curve.values if math.isfinite(value)]
    late = statistics.fmean(_quarters(shares)[-1]) if shares else 0.0
    if late < SKIPPED_BAD and (late < SKIPPED_WATCH or len(shares) < FEWEST_POINTS):
        return None
    learner = curve.tag.removesuffix("_skipped")
    return Finding(
        Level.BAD if late >= SKIPPED_BAD else Level.WATCH,
        f"The {learner} skipped {_percent(statistics.fmean(shares))} of its steps, {_percent(late)} of the last "
        "quarter's, as a loss or a gradient was not finite.",
        "Lower the learning rate, or train with precision=fp32.",
    )


def _seeds_alike(curve: runs.Curve) -> Finding | None:
    """A student that comes to one picture for each prompt, whatever the seed. Samples are few, so the last decides."""
    best = float(np.median(sorted(curve.values[:-1])[-3:])) if len(curve) > 1 else 0.0
    if best <= 0 or curve.values[-1] > ALIKE_SEEDS_WATCH * best:
        return None
    ratio = curve.values[-1] / best
    return Finding(
        Level.BAD if ratio <= ALIKE_SEEDS_BAD else Level.WATCH,
        f"The images of one prompt have become alike: under different seeds they differ {_percent(ratio)} as much as "
        f"at their best ({curve.values[-1]:.3g} of {best:.3g}).",
        "The student may be collapsing. Raise objective.trajectory_weight, or lower objective.distillation_weight or "
        "training.learning_rate.",
    )


def _climb(curve: runs.Curve) -> Finding | None:
    """A loss that has left its best behind: the last quarter against the best window of that length before it."""
    last, best, spread, best_at = _last_and_best(curve)
    if best <= 0 or last < CLIMB_WATCH * best or last - best <= CLIMB_NOISE * spread:
        return None
    return Finding(
        Level.BAD if last >= CLIMB_BAD * best else Level.WATCH,
        f"{curve.tag} has climbed: its last quarter's median is {last:.3g}, {last / best:.1f} times the best "
        f"before ({best:.3g}, about {best_at:,} images).",
        "Look at the grids since then. If they are worse too, begin anew with a lower training.learning_rate, or with "
        "a lower objective.adversarial_weight.",
    )


def _last_and_best(curve: runs.Curve) -> tuple[float, float, float, int]:
    """Median of the last quarter; of the best window of its length before; that window's deviation and middle."""
    values = np.asarray(curve.values)
    length = len(values) // 4
    apart = -(-length // _WINDOWS_A_QUARTER)
    windows = np.lib.stride_tricks.sliding_window_view(values[: len(values) - length], length)[::apart]
    medians = np.median(windows, axis=1)
    best = int(medians.argmin())
    spread = 1.4826 * float(np.median(np.abs(windows[best] - medians[best])))
    return (
        float(np.median(values[-length:])),
        float(medians[best]),
        spread,
        curve.images_seen[best * apart + length // 2],
    )


def _gradient(curve: runs.Curve) -> Finding | None:
    """Norms before they are cut."""
    learner, quarters = curve.tag.removesuffix("_gradient"), _quarters(curve.values)
    second, last = float(np.median(quarters[1])), float(np.median(quarters[-1]))
    if second > 0 and last >= GRADIENT_GROWTH * second:
        what = f"The {learner}'s gradient has grown: its norm's median is {last:.3g} of late and was {second:.3g}."
        return Finding(Level.WATCH, what, "Lower the learning rate if a loss climbs too.")
    usual = float(np.median(curve.values))
    spikes = [at for at, norm in zip(curve.images_seen, curve.values, strict=True) if norm > SPIKE * usual > 0]
    late = [at for at in spikes if at >= curve.images_seen[-len(quarters[-1])]]
    if not late and len(spikes) < 3:
        return None
    times = "once" if len(spikes) == 1 else f"{len(spikes)} times"
    what = f"The {learner}'s gradient has jumped {times} to {SPIKE:g} times its usual norm ({usual:.3g}) or more, "
    what += f"last at {spikes[-1]:,} images."
    advice = "Each is cut to max_grad_norm, so one does little; if they become more, lower the learning rate."
    return Finding(Level.WATCH, what, advice)


def _quarters(values: Sequence[float]) -> list[Sequence[float]]:
    """Four stretches of a curve; the last has a quarter of the points, and at least one."""
    length = max(len(values) // 4, 1)
    start = len(values) - length
    return [values[: start // 3], values[start // 3 : 2 * start // 3], values[2 * start // 3 : start], values[start:]]


def heads(hinge: runs.Curve) -> int:
    """How many heads a hinge curve sums over, by where it begins: a head starts at judgement 0, so at a loss of 2.

    An estimate: too low where the heads learn much within the first report (five that begin at 7.4 count as four), or
    where the run's first reports are gone. That the discriminator has won is then said a little later.
    """
    return max(1, round(max(hinge.values[:3]) / HINGE_PER_HEAD))


def _discriminator(hinge: runs.Curve) -> Finding | None:
    """The loss as a share of that of heads which cannot tell: 0 sure, 1 blind."""
    blind = HINGE_PER_HEAD * heads(hinge)
    last = float(np.median(_quarters(hinge.values)[-1])) / blind
    shown = f"{hinge.tag} is {hinge.values[-1]:.3g} of {blind:g}"
    if last <= WON_WATCH:
        return Finding(
            Level.BAD if last <= WON_BAD else Level.WATCH,
            f"The discriminator has all but won: {shown}, where 0 is sure of every picture.",
            "It no longer tells the student how to improve. Raise r1_weight, lower discriminator_learning_rate, or "
            "give finite_difference_weight.",
        )
    if min(hinge.values[len(hinge) // 2 :]) < BLIND_WATCH * blind:
        return None
    return Finding(
        Level.WATCH,
        f"The discriminator has learnt nothing in the second half: {shown}.",
        "The adversarial term is noise then. Raise discriminator_learning_rate or lower r1_weight.",
    )


# --- how the run stands -----------------------------------------------------------------------------


def _standing(history: runs.History) -> list[Finding]:
    """Whether the run makes progress, or ended without a result. Other programs' runs are left alone."""
    run = history.run
    if run.kind == runs.Kind.OTHER:
        return []
    reached = max((curve.images_seen[-1] for curve in history.curves if len(curve)), default=0)
    if run.active:
        return _late(history, reached)
    if run.finished:
        return []
    made = "teacher" if run.kind == runs.Kind.TEACHER else "student"
    command = f"python -m training.{'teacher' if run.kind == runs.Kind.TEACHER else 'distill'}"
    what = f"The run stopped, or hangs, at {reached:,} images: nothing has been written of late, and "
    what += f"no {made} was exported." if run.exported is None else f"its {made} is from before it went on."
    advice = f"Run the same command ({command}) again; it goes on from the checkpoint."
    if not run.checkpoint:
        advice = f"There is no checkpoint, so {command} begins anew; its log says why it ended."
    return [Finding(Level.WATCH, what, advice)]


def _late(history: runs.History, reached: int) -> list[Finding]:
    """Against when something was last written, not the clock: what was read is older than what is on disk."""
    longest = max(history.curves, key=len, default=None)
    if longest is None or len(longest) < 3:
        return []
    usual_s = float(np.median(np.diff(sorted(longest.wall_s))))
    quiet_s = history.run.last_written_s - max(curve.wall_s[-1] for curve in history.curves if len(curve))
    if quiet_s <= max(LATE_S, LATE_REPORTS * usual_s):
        return []
    what = f"The run writes files but has reported nothing for {quiet_s / 60:.0f} minutes, since {reached:,} images; "
    what += f"a report used to come every {usual_s:.0f} s."
    return [Finding(Level.WATCH, what, "Look at its log: it may be waiting for data or for another process.")]


def _went_back(history: runs.History) -> list[Finding]:
    """What training did about its own health."""
    found = []
    for stage in dict.fromkeys(each.stage for each in history.interventions):
        own = [each for each in history.interventions if each.stage == stage]
        backs = [each for each in own if each.to_images is not None]
        if backs:
            last, times = backs[-1], "once" if len(backs) == 1 else f"{len(backs)} times"
            what = f"The training rolled back {times}, last from {last.images_seen:,} to {last.to_images:,} images, "
            advice = "Each time its learning rates are halved, and other random numbers drawn."
            found.append(Finding(Level.WATCH, what + f"because: {last.why}", advice, stage))
        last = own[-1]
        if last.to_images is None and not _reported_since(history, last):
            what = f"The training gave up at {last.images_seen:,} images, as rolling back did not help: {last.why}"
            found.append(Finding(Level.BAD, what, "Begin anew in another folder with other settings.", stage))
    return found


def _reported_since(history: runs.History, then: runs.Intervention) -> bool:
    return any(curve.wall_s[-1] > then.time_s for curve in history.curves if curve.stage == then.stage and len(curve))


# --- the pictures -----------------------------------------------------------------------------------


def _alike(grids: Sequence[runs.Grid]) -> list[Finding]:
    """Whether the pictures of a row have become alike, measured against the first grid of the same stage and tag.

    This sees a collapse to one picture or one colour. It does not see a student that has one picture for each caption,
    whatever the seed: a grid has one seed a caption. The report's diversity does.
    """
    found = []
    for stage, tag in dict.fromkeys((grid.stage, grid.tag) for grid in grids):
        own = [grid for grid in grids if (grid.stage, grid.tag) == (stage, tag)]
        first, last = _differences(own[0]), _differences(own[-1])
        if len(own) < 2 or first is None or last is None or len(first) != len(last):
            continue
        ratios = [late / early if early > 0 else math.nan for early, late in zip(first, last, strict=True)]
        row, ratio = min(enumerate(ratios), key=lambda each: each[1] if math.isfinite(each[1]) else math.inf)
        if math.isfinite(ratio) and ratio <= ALIKE_WATCH:
            level = Level.BAD if ratio <= ALIKE_BAD else Level.WATCH
            what = f"The pictures have become alike: in row {row + 1} of the grid at {own[-1].images_seen:,} images "
            what += f"they differ {_percent(ratio)} as much as in the first grid."
            advice = "The student may be collapsing: raise trajectory_weight, or lower distillation_weight."
            found.append(Finding(level, what, advice, stage, tag))
    return found


@functools.lru_cache(maxsize=256)
def _differences(grid: runs.Grid) -> tuple[float, ...] | None:
    """`row_differences` of a grid; None if its picture cannot be read."""
    try:
        return row_differences(grid.png)
    except errors.DataError:
        return None


def row_differences(png: bytes, columns: int = COLUMNS) -> tuple[float, ...]:
    """Of each row of square pictures: the mean absolute difference of two of them, as a share of the full range.

    columns: how many pictures a row has, 2 or more. Pictures above 64 px are compared at 64 px.
    Raises DataError if it is no picture, or not made of so many square columns.
    """
    try:
        with PIL.Image.open(io.BytesIO(png)) as image:
            size = image.width // columns
            if not size or image.width % columns or image.height % size:
                raise errors.DataError(
                    f"a sample grid has {image.width} x {image.height} px; it must hold {columns} square columns"
                )
            rows, shown = image.height // size, min(size, _COMPARED_PX)
            small = image.convert("RGB").resize((columns * shown, rows * shown), PIL.Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise errors.DataError(f"a sample grid is no picture ({errors.first_line(error)})") from None
    pixels = np.asarray(small, np.float32) / 255  # (H, W, 3) in [0, 1]
    cells = pixels.reshape(rows, shown, columns, shown, 3).swapaxes(1, 2)
    pairs = list(itertools.combinations(range(columns), 2))
    return tuple(float(np.mean([np.abs(row[a] - row[b]).mean() for a, b in pairs])) for row in cells)


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.01 else f"{share:.0%}"
