"""Statistics of reported numbers: intervals, and the three outcomes of "is the student good enough?".

Two kinds of metric, two ways to their uncertainty:

- Fréchet distances and other distances of whole sets: leave out one of 20 groups at a time (`Jackknife`). Resampling a
  set with repeats would shrink it, and a distance that falls with the sample size then comes out too high: a bootstrap
  interval of a FID can exclude the FID itself. `python -m benchmarks.coverage` shows it.
- Means over prompts: resample the prompts, student and teacher together (`bootstrap_retention`).

Either way student and teacher answered the same prompts, so what the prompts have in common cancels.
"""

import dataclasses
import enum
import math
import statistics
from collections.abc import Sequence

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from diffusion_kd import errors

GROUPS = 20
RESAMPLES, _FEWEST_RESAMPLES, _DRAWS = 10_000, 2_000, 20_000_000
"""Resamples of a bootstrap; fewer, down to the second, where prompts times resamples would exceed the third."""

_CHUNK = 200
"""Resamples drawn at a time, which bounds the memory."""


class Outcome(enum.StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of a share, inside [0, 1] and of positive width even at 0 or `total` successes.

    successes: may be fractional where `total` counts prompts and each prompt has several pictures.
    Source: Wilson 1927; Brown, Cai, DasGupta 2001, equation 4.
    """
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    share, shrink = successes / total, 1 + z**2 / total
    middle = (share + z**2 / (2 * total)) / shrink
    reach = z / shrink * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


# --- leaving groups out -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Jackknife:
    """A statistic of a whole sample and of the sample without each of its equal groups.

    whole: the statistic as everybody computes it. without: (G,), G >= 2; groups that are empty or missing: ().
    Source: Efron & Tibshirani 1993, section 11.5; Shao & Tu 1995, section 2.3 (delete-d, grouped).
    """

    whole: float
    without: tuple[float, ...] = ()

    @property
    def corrected(self) -> float:
        """Without the bias of order 1/N. `whole` where there are no groups."""
        groups = len(self.without)
        return groups * self.whole - (groups - 1) * statistics.fmean(self.without) if groups else self.whole

    @property
    def standard_error(self) -> float:
        """NaN where there are no groups."""
        return float(np.std(self.without) * math.sqrt(len(self.without) - 1)) if self.without else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Two-sided, around `corrected`, by Student's t with G - 1 degrees of freedom."""
        if not self.without:
            return None
        reach = _t_quantile((1 + confidence) / 2, len(self.without)) * self.standard_error
        return self.corrected - reach, self.corrected + reach


def _t_quantile(probability: float, groups: int) -> float:
    return float(scipy.stats.t.ppf(probability, groups - 1))


# --- retention --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Retention:
    """How much of the teacher a student keeps: a ratio that is higher for a better student, 1 for an equal one.

    interval: two-sided; an end is None where the data do not bound it.
    p_below: how surprising the data are if the student is not above the floor; small: it is above.
    p_above: how surprising they are if it is above the floor; small: it is below.
    samples: what it rests on: how many prompts, pictures (of a set distance) or runs (of a latency).
    """

    value: float
    interval: tuple[float | None, float | None]
    floor: float
    p_below: float
    p_above: float
    samples: int

    def outcome(self, alpha: float, p_fail: float | None = None) -> Outcome:
        """PASS if shown to be above the floor, FAIL if shown to be below, else INCONCLUSIVE; one-sided at `alpha`.

        p_fail: `p_above` after `holm`, where other slices were tested beside this one.
        """
        if self.p_below < alpha:
            return Outcome.PASS
        return Outcome.FAIL if (self.p_above if p_fail is None else p_fail) < alpha else Outcome.INCONCLUSIVE


def jackknife_retention(
    numerator: Jackknife, denominator: Jackknife, floor: float, samples: int, confidence: float = 0.95
) -> Retention:
    """Of set distances: the teacher's over the student's, as less is better.

    Tests `numerator - floor * denominator` against Student's t; the interval holds every floor that such a test would
    not reject (Fieller 1954), so there is none where the denominator is not clearly above 0. The value is the ratio of
    the distances without their bias; NaN where the student's is not above 0, and so as good as can be told.
    """
    groups = len(numerator.without)
    if groups < 2:
        return Retention(math.nan, (None, None), floor, 1.0, 1.0, samples)
    gap = numerator.corrected - floor * denominator.corrected
    (aa, ab), (_, bb) = (groups - 1) * np.cov(numerator.without, denominator.without, bias=True)
    error = math.sqrt(max(aa - 2 * floor * ab + floor**2 * bb, 0.0))
    if error == 0:
        p_below = 0.5 if gap == 0 else float(gap < 0)
    else:
        p_below = float(scipy.stats.t.sf(gap / error, groups - 1))
    t = _t_quantile((1 + confidence) / 2, groups)
    interval = _fieller(numerator.corrected, denominator.corrected, t**2 * aa, t**2 * ab, t**2 * bb)
    value = numerator.corrected / denominator.corrected if denominator.corrected > 0 else math.nan
    return Retention(value, interval, floor, p_below, 1 - p_below, samples)


def _fieller(a: float, b: float, aa: float, ab: float, bb: float) -> tuple[float | None, float | None]:
    """Ratios r with (a - r b)^2 <= aa - 2 r ab + r^2 bb, as far as they form one interval."""
    square, half, constant = b**2 - bb, a * b - ab, a**2 - aa
    root = half**2 - square * constant
    if square <= 0 or root < 0 or b <= 0:
        return None, None
    return (half - math.sqrt(root)) / square, (half + math.sqrt(root)) / square


def bootstrap_retention(
    numerator: ArrayLike,
    denominator: ArrayLike,
    floor: float,
    *,
    pass_fail: bool = False,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Retention:
    """Of means over prompts: the student's over the teacher's where more is better. Both (n,), of the same prompts.

    pass_fail: the scores are shares in [0, 1]. A slice in which everything is right has no spread, and resampling it
    would show certainty that a dozen prompts cannot give. So each hypothesis is tested with one more prompt that speaks
    against it: one that the student gets wrong and the teacher right before it may pass, and one the other way before
    it may fail. (As the rule of three: what was not seen in n prompts may still happen once in n.)

    Where the denominator is not clearly above 0, as a cosine need not be, there is no ratio and nothing is shown.
    Raises DataError without prompts or for sets of different size.
    """
    ours, theirs = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if ours.ndim != 1 or ours.shape != theirs.shape or not len(ours):
        raise errors.DataError(f"paired scores must be (n,) and (n,), n >= 1, not {ours.shape} and {theirs.shape}")
    pairs = np.stack([ours, theirs], 1)
    against, favour = (
        (np.vstack([pairs, [[0.0, 1.0]]]), np.vstack([pairs, [[1.0, 0.0]]])) if pass_fail else (pairs, pairs)
    )
    low_draws, high_draws = (_resampled(each, resamples, seed) for each in (against, favour))
    mean, standard = pairs.mean(0)
    tail = (1 - confidence) / 2
    if (low_draws[:, 1] <= 0).mean() > tail:
        return Retention(math.nan, (None, None), floor, 1.0, 1.0, len(pairs))
    return Retention(
        value=float(mean / standard),
        interval=(_ratio_quantile(low_draws, tail), _ratio_quantile(high_draws, 1 - tail)),
        floor=floor,
        p_below=_share(low_draws @ [1, -floor] <= 0),
        p_above=_share(high_draws @ [1, -floor] >= 0),
        samples=len(pairs),
    )


def _resampled(pairs: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of resampled rows, (resamples, 2)."""
    rng = np.random.default_rng(seed)
    resamples = min(resamples, max(_FEWEST_RESAMPLES, _DRAWS // len(pairs)))
    even = np.full(len(pairs), 1 / len(pairs))
    starts = range(0, resamples, _CHUNK)
    counts = (rng.multinomial(len(pairs), even, min(_CHUNK, resamples - start)) for start in starts)
    return np.concatenate([count @ pairs for count in counts]) / len(pairs)


def _share(hits: NDArray[np.bool_]) -> float:
    """A p-value that is never 0: the data themselves are one of the draws."""
    return float((hits.sum() + 1) / (len(hits) + 1))


def _ratio_quantile(means: NDArray[np.float64], probability: float) -> float | None:
    """None where the denominator is 0 so often that the quantile is not bounded."""
    ratios = np.divide(means[:, 0], means[:, 1], out=np.full(len(means), np.inf), where=means[:, 1] > 0)
    ratio = float(np.quantile(ratios, probability, method="higher"))
    return ratio if math.isfinite(ratio) else None


def bootstrap_interval(
    scores: ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Two-sided percentile interval of a mean over prompts, (n,)."""
    values = np.asarray(scores, np.float64)
    means = _resampled(np.stack([values, values], 1), resamples, seed)[:, 0]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false rejection stays below alpha. Source: Holm 1979."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
