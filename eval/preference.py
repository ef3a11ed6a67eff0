"""Blind votes of people: how often is turbo preferred to premium, and how sure is that?

A vote is on a pair: two pictures of one prompt and seed, sides shuffled. Votes of one person hang together, for tastes
differ: a hundred votes by five people tell much less than a hundred by a hundred.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from eval import stats

CONFIDENCE = 0.95
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Tally:
    """Votes of one voter on pairs of one number of turbo steps.

    voter: who voted, as far as a browser tells. turbo, premium, neither: how often each was the answer.
    left: how often the picture on the left was chosen, whosever it was: at most turbo + premium.
    """

    voter: str
    turbo_steps: int
    turbo: int
    premium: int
    neither: int
    left: int

    @property
    def votes(self) -> int:
        return self.turbo + self.premium + self.neither


@dataclasses.dataclass(frozen=True, slots=True)
class Preference:
    """How often turbo was preferred.

    rate: share of pairs, in [0, 1]; one that looked the same counts half. interval: of 95 %, inside [0, 1].
    turbo, premium, neither: how often each was the answer; together `votes`, which is at least 1.
    left_share: of the votes that chose a side; None where none did. left_interval: of 95 %, with it.
    """

    rate: float
    interval: Interval
    votes: int
    voters: int
    turbo: int
    premium: int
    neither: int
    left_share: float | None
    left_interval: Interval | None

    @property
    def preferred(self) -> Literal["turbo", "premium"] | None:
        """Which one is shown to be preferred; None where the interval holds one half."""
        low, high = self.interval
        return "turbo" if low > 0.5 else "premium" if high < 0.5 else None

    @property
    def favours_a_side(self) -> bool:
        """Whether people chose the left or the right too often for sides that are shuffled."""
        return self.left_interval is not None and not self.left_interval[0] <= 0.5 <= self.left_interval[1]

    @property
    def sentence(self) -> str:
        """All that is to be said, for people."""
        said = [self._counts, self._meaning]
        if self.favours_a_side:
            said.append(self._side)
        return " ".join(said)

    @property
    def _counts(self) -> str:
        rate, (low, high) = _percent(self.rate), map(_percent, self.interval)
        people = "1 person" if self.voters == 1 else f"{self.voters} people"
        pairs = _pairs(self.votes)
        text = f"Turbo was preferred in {rate} % of {pairs} (95 %: {low}–{high} %), by {people}"  # noqa: RUF001 - a range
        if self.neither:
            them, verb = ("that person" if self.voters == 1 else "them"), ("counts" if self.neither == 1 else "count")
            text += f"; {_pairs(self.neither)} looked the same to {them} and {verb} half"
        return f"{text}."

    @property
    def _meaning(self) -> str:
        meaning = "No difference is shown" if self.preferred is None else f"{self.preferred.capitalize()} is preferred"
        if self.voters > 1:
            return f"{meaning}."
        return f"{meaning}, as far as one person's taste goes: what others prefer, this cannot tell."

    @property
    def _side(self) -> str:
        assert self.left_share is not None and self.left_interval is not None, "only said of votes that chose a side"
        share, (low, high) = _percent(self.left_share), map(_percent, self.left_interval)
        return (
            f"But the picture on the left was chosen in {share} % of {_pairs(self.turbo + self.premium)} "
            f"(95 %: {low}–{high} %), though sides are shuffled: people pick a side more than a picture."  # noqa: RUF001
        )


def preference(tallies: Iterable[Tally]) -> Preference | None:
    """What the votes say. None where there are none. Several tallies of one voter are taken together.

    The interval is, end by end, the wider of two, and clamped to [0, 1]:

    - Wilson's, as if each vote were of another person (a tie being half a success). It has a width where all agree.
    - Of two voters or more, that of a jackknife which leaves out one voter at a time (`_between_voters`).

    The interval of the left is Wilson's alone: where sides are shuffled and nobody favours one, each vote falls on the
    left by a toss of its own, whoever casts it.
    """
    voters = _by_voter(tallies)
    if not len(voters):
        return None
    turbo, premium, neither, left = voters.sum(0).tolist()
    scores, sizes = voters[:, 0] + voters[:, 2] / 2, voters[:, :3].sum(1)
    votes, decided = turbo + premium + neither, turbo + premium
    return Preference(
        rate=(turbo + neither / 2) / votes,
        interval=_interval(scores, sizes),
        votes=votes,
        voters=len(voters),
        turbo=turbo,
        premium=premium,
        neither=neither,
        left_share=left / decided if decided else None,
        left_interval=stats.wilson_interval(left, decided, CONFIDENCE) if decided else None,
    )


def _by_voter(tallies: Iterable[Tally]) -> NDArray[np.int64]:
    """How often (turbo, premium, neither, left), of each voter who has voted: (m, 4)."""
    counts: dict[str, NDArray[np.int64]] = {}
    for tally in tallies:
        if tally.votes:
            own = np.array([tally.turbo, tally.premium, tally.neither, tally.left], np.int64)
            counts[tally.voter] = counts.get(tally.voter, 0) + own
    return np.array(list(counts.values()), np.int64).reshape(-1, 4)


def _interval(scores: NDArray[np.float64], sizes: NDArray[np.int64]) -> Interval:
    """Of the rate. scores: votes for turbo and half of the ties, of each voter, (m,). sizes: all votes, (m,)."""
    votes = int(sizes.sum())
    rate = float(scores.sum()) / votes
    low, high = stats.wilson_interval(rate * votes, votes, CONFIDENCE)
    if len(sizes) > 1:
        reach = _between_voters(rate, scores, sizes)
        low, high = min(low, rate - reach), max(high, rate + reach)
    return max(low, 0.0), min(high, 1.0)


def _between_voters(rate: float, scores: NDArray[np.float64], sizes: NDArray[np.int64]) -> float:
    """Half the width of the interval that the spread between voters gives, of m >= 2 voters.

    The rate is a ratio, the sum of y_i over the sum of n_i, N, where voter i has n_i votes. Without voter i it moves by
    (rate n_i - y_i) / (N - n_i), and its variance is (m - 1) / m times the sum of the squares of that: the delete-one
    jackknife of a ratio. That is the linearised variance of unequal clusters with each residual over 1 - n_i / N,
    without which somebody who cast most of the votes pulls the rate along and seems to agree with it.

    Student's t has one degree of freedom less than there are *effective* voters, N^2 over the sum of n_i^2, which is m
    where all voted equally often; with m itself the interval is too narrow where few cast most of the votes.
    `test_the_interval_holds_the_truth` has the coverage about one half. Where most voters lean one way it is a little
    narrow: polls of tastes drawn from Beta(4, 1), ten votes each, held the truth in 91 % (3 voters) to 93 % (30).

    Sources: Shao & Tu 1995, section 2.1 (jackknife); Bell & McCaffrey 2002 (residuals of clusters, and why fewer
    degrees of freedom); Kish 1965 (effective number). To take its degrees of freedom from there is ours.
    """
    voters, votes = len(sizes), sizes.sum()
    moved = (rate * sizes - scores) / (votes - sizes)
    error = math.sqrt((voters - 1) / voters * float(np.square(moved).sum()))
    effective = float(votes**2 / np.square(sizes).sum())
    return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, max(effective - 1, 1.0))) * error


# --- words ------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    """Whole percents, and more digits where those would say 50 of what is not: on it hangs what is said next."""
    for digits in range(17):
        text = f"{100 * share:.{digits}f}"
        if float(text) != 50 or share == 0.5:
            break
    return text


def _pairs(count: int) -> str:
    return f"{count} pair" if count == 1 else f"{count} pairs"
