"""Do the intervals hold? Coverage by simulation, where the truth is known: `python -m benchmarks.coverage`.

Fréchet distances: features of prompts with two pictures each, Gaussian with a 1/k spectrum, so that the true distance
is known in closed form. How often does each 95 % interval hold it?

The gate: students that lie exactly at the floor. How often do they PASS (at most 5 % should) or FAIL, and how often
does an equal student PASS? Takes about ten minutes of one core.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from eval import stats
from eval.metrics import frechet

Array = NDArray[np.float64]
BOOTSTRAPS, BOOTSTRAP_TRIALS = 100, 60


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """Features of `prompts` prompts with two pictures each in `dim` dimensions, and true pictures of the same prompts.

    A student's features are the truth's, stretched by 1 + error along every axis; what pictures of a prompt have in
    common is `common` of the variance.
    """

    prompts: int
    dim: int
    common: float = 0.5

    @property
    def variances(self) -> Array:
        return 1 / np.arange(1, self.dim + 1)

    def truth(self, error: float) -> float:
        """The Fréchet distance of a student to the truth: the sum of (sqrt(v (1 + e)^2) - sqrt(v))^2."""
        return float(error**2 * self.variances.sum())

    def draw(self, rng: np.random.Generator, *errors: float) -> tuple[Array, ...]:
        """True pictures, then each student's, (2 * prompts, dim): pictures of one prompt beside one another."""
        prompt = rng.standard_normal((self.prompts, self.dim)).repeat(2, 0)
        drawn = []
        for error in (0.0, *errors):
            own = rng.standard_normal((2 * self.prompts, self.dim))
            mixed = np.sqrt(self.common) * prompt + np.sqrt(1 - self.common) * own
            drawn.append(mixed * np.sqrt(self.variances) * (1 + error))
        return tuple(drawn)

    @property
    def groups(self) -> NDArray[np.int64]:
        return np.arange(self.prompts).repeat(2) % stats.GROUPS


def naive_bootstrap(student: Array, truth: Array, rng: np.random.Generator) -> tuple[float, float]:
    """The percentile interval that evaluations of FID must not use."""
    prompts = len(student) // 2
    found = []
    for _ in range(BOOTSTRAPS):
        rows = (2 * rng.integers(0, prompts, prompts)[:, None] + [0, 1]).ravel()
        found.append(frechet.frechet_distance(student[rows], truth[rows]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def frechet_line(world: World, error: float, trials: int) -> list[str]:
    """Coverage and bias of one world."""
    truth, estimates, by_t, by_z, naive, excluded = world.truth(error), [], 0, 0, 0, 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        true, student = world.draw(rng, error)
        found = frechet.jackknife(student, true, world.groups, world.groups)
        estimates.append((found.whole, found.corrected, found.standard_error))
        low, high = found.interval() or (0, 0)
        by_t += low <= truth <= high
        by_z += abs(found.corrected - truth) <= 1.96 * found.standard_error
        if trial < BOOTSTRAP_TRIALS:
            low, high = naive_bootstrap(student, true, rng)
            naive += low <= truth <= high
            excluded += not low <= found.whole <= high
    whole, corrected, error_said = np.mean(estimates, axis=0)
    error_true = np.std([estimate for _, estimate, _ in estimates])
    return [
        f"{world.prompts}", f"{world.dim}", f"{truth:.4f}", f"{whole:.4f}", f"{corrected:.4f}",
        f"{error_said:.4f} / {error_true:.4f}", f"{by_t / trials:.1%}", f"{by_z / trials:.1%}",
        f"{naive / min(trials, BOOTSTRAP_TRIALS):.0%}", f"{excluded / min(trials, BOOTSTRAP_TRIALS):.0%}",
    ]  # fmt: skip


def floor_line(world: World, error: float, floor: float, trials: int) -> list[str]:
    """Outcomes of a student at the floor, of one equal to the teacher, and of one far below."""
    at_floor = error / np.sqrt(floor)  # distances go with the square of the error

    def outcome(student_error: float, trial: int) -> stats.Outcome:
        true, teacher, student = world.draw(np.random.default_rng(trial), error, student_error)
        ours, theirs = (frechet.jackknife(each, true, world.groups, world.groups) for each in (student, teacher))
        return stats.jackknife_retention(theirs, ours, floor, 2 * world.prompts).outcome(0.05)

    rates = (_rates(outcome, each, trials) for each in (at_floor, error, 2 * at_floor))
    return [
        f"FD, d = {world.dim}",
        f"{world.prompts}",
        f"{floor:g}",
        *(f"{value:.1%}" for rate in rates for value in rate),
    ]


def accuracy_line(prompts: int, share: float, floor: float, trials: int, pass_fail: bool) -> list[str]:
    """The same of prompt accuracy with two pictures a prompt, whose difficulty student and teacher share."""

    def draw(rng: np.random.Generator, mean: float, difficulty: Array) -> Array:
        chance = np.clip(mean + (1 - mean) * difficulty, 0, 1)
        return (rng.random((prompts, 2)) < chance[:, None]).mean(1)

    def outcome(mean: float, trial: int) -> stats.Outcome:
        rng = np.random.default_rng(trial)
        difficulty = rng.uniform(-1, 1, prompts)
        student, teacher = draw(rng, mean, difficulty), draw(rng, share, difficulty)
        return stats.bootstrap_retention(student, teacher, floor, pass_fail=pass_fail, resamples=2000).outcome(0.05)

    rates = (_rates(outcome, each, trials) for each in (floor * share, share, floor * share - 0.25))
    name = "prompt accuracy" if pass_fail else "prompt accuracy, without the one more prompt"
    return [name, f"{prompts}", f"{floor:g}", *(f"{value:.1%}" for rate in rates for value in rate)]


def _rates(outcome: Callable[[float, int], stats.Outcome], worth: float, trials: int) -> tuple[float, float]:
    found = [outcome(worth, trial) for trial in range(trials)]
    return tuple(found.count(each) / trials for each in (stats.Outcome.PASS, stats.Outcome.FAIL))  # type: ignore[return-value]


def table(headings: list[str], lines: Iterator[list[str]]) -> Iterator[str]:
    """Markdown, line by line as they come."""
    yield f"| {' | '.join(headings)} |"
    yield "|---" * len(headings) + "|"
    for line in lines:
        yield f"| {' | '.join(line)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=400)
    given = parser.parse_args()
    trials = given.trials
    sys.stdout.write("95 % intervals of a Fréchet distance\n\n")
    headings = [
        "prompts", "dimensions", "truth", "plug-in", "corrected", "standard error, said / true",
        "holds the truth (t)", "(z)", "naive bootstrap holds it", "naive bootstrap excludes its own estimate",
    ]  # fmt: skip
    worlds = [(World(256, 16), 0.0), (World(256, 64), 0.1), (World(512, 128), 0.1), (World(2048, 128), 0.1)]
    _print(table(headings, (frechet_line(world, error, trials) for world, error in worlds)))
    sys.stdout.write("\nOutcomes of the gate at 95 %\n\n")
    headings = ["metric", "prompts", "floor", "at the floor: PASS", "FAIL", "equal: PASS", "FAIL", "bad: PASS", "FAIL"]
    _print(table(headings, _outcomes(trials)))


def _outcomes(trials: int) -> Iterator[list[str]]:
    for prompts in (256, 512, 2048):
        yield floor_line(World(prompts, 64), 0.2, 0.75, trials)
    for prompts in (16, 64, 512):
        for pass_fail in (True, False):
            yield accuracy_line(prompts, 0.97, 0.85, trials, pass_fail)


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
