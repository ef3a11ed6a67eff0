"""What votes say: against closed forms, another formula and simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from eval import preference, stats


def tally(
    voter: str, turbo: int, premium: int, neither: int = 0, *, left: int | None = None, steps: int = 4
) -> preference.Tally:
    return preference.Tally(voter, steps, turbo, premium, neither, (turbo + premium) // 2 if left is None else left)


def found(*tallies: preference.Tally) -> preference.Preference:
    answer = preference.preference(tallies)
    assert answer is not None
    return answer


# --- counts and rate --------------------------------------------------------------------------------


def test_without_votes_there_is_nothing_to_say() -> None:
    assert preference.preference([]) is None
    assert preference.preference([tally("a", 0, 0)]) is None


def test_votes_are_counted_and_a_tie_is_half() -> None:
    said = found(tally("a", 5, 2, 1), tally("b", 1, 4, 3), tally("nobody", 0, 0))
    assert (said.votes, said.voters, said.turbo, said.premium, said.neither) == (16, 2, 6, 6, 4)
    assert said.rate == 0.5
    assert found(tally("a", 6, 1, 1)).rate == 6.5 / 8


def test_steps_do_not_make_one_voter_two() -> None:
    split = found(tally("a", 3, 1, steps=1), tally("b", 2, 4), tally("a", 1, 2, 2, steps=4))
    whole = found(tally("a", 4, 3, 2, left=3), tally("b", 2, 4))
    assert split == whole and split.voters == 2


def test_turbo_and_premium_change_places_as_in_a_mirror() -> None:
    one = found(tally("a", 9, 2, 1), tally("b", 4, 3), tally("c", 8, 0, 5))
    other = found(tally("a", 2, 9, 1), tally("b", 3, 4), tally("c", 0, 8, 5))
    assert other.rate == pytest.approx(1 - one.rate)
    assert other.interval == pytest.approx((1 - one.interval[1], 1 - one.interval[0]))


# --- interval ---------------------------------------------------------------------------------------


def test_one_voter_has_the_interval_of_wilson() -> None:
    said = found(tally("a", 6, 3, 3))
    assert said.interval == pytest.approx(stats.wilson_interval(7.5, 12))


def test_voters_who_agree_have_it_too() -> None:
    """They do not spread, and yet nobody is certain."""
    assert found(tally("a", 6, 4), tally("b", 3, 2)).interval == pytest.approx(stats.wilson_interval(9, 15))
    assert found(tally("a", 6, 0), tally("b", 9, 0)).interval == pytest.approx(stats.wilson_interval(15, 15))


def test_of_voters_of_equal_size_it_is_the_t_interval_of_their_means() -> None:
    shares = np.array([0.9, 0.1, 0.7, 0.2, 0.6])
    said = found(*(tally(str(index), round(20 * share), 20 - round(20 * share)) for index, share in enumerate(shares)))
    expected = scipy.stats.t.interval(0.95, 4, shares.mean(), shares.std(ddof=1) / math.sqrt(5))
    assert said.interval == pytest.approx(expected)


def test_of_voters_of_unequal_size_it_is_the_jackknife_done_by_leaving_out() -> None:
    voters = [(12, 3, 1), (2, 7, 0), (9, 9, 4), (1, 0, 1), (20, 6, 2)]
    turbo, premium, neither = np.array(voters, float).T
    scores, sizes = turbo + neither / 2, turbo + premium + neither
    without = [np.delete(scores, index).sum() / np.delete(sizes, index).sum() for index in range(len(voters))]
    rate = scores.sum() / sizes.sum()
    error = math.sqrt(4 / 5 * sum((share - rate) ** 2 for share in without))
    effective = sizes.sum() ** 2 / (sizes**2).sum()
    assert 1 < effective < 5
    reach = scipy.stats.t.ppf(0.975, effective - 1) * error
    said = found(*(tally(str(index), *counts) for index, counts in enumerate(voters)))
    low, high = stats.wilson_interval(scores.sum(), sizes.sum())
    assert said.interval == pytest.approx((min(low, rate - reach), max(high, rate + reach)))
    assert rate - reach < low  # so that it is not Wilson's that was compared


def test_it_stays_a_share() -> None:
    assert found(tally("a", 30, 0), tally("b", 0, 4)).interval == (0.0, 1.0)


KINDS = ("even", "uneven")


def _sizes(kind: str, rng: np.random.Generator) -> np.ndarray:
    return np.full(10, 12) if kind == "even" else np.minimum(np.ceil(3 * rng.pareto(1.0, 10) + 1), 200).astype(int)


def _share_held(kind: str, spread: bool, repeats: int = 600) -> tuple[float, float]:
    """How often each interval holds the truth, ours and Wilson's, of 10 voters; every fifth pair is a tie.

    spread: tastes are Beta(1, 1), so that some nearly always prefer turbo and others premium; else all are one half.
    """
    rng = np.random.default_rng(7)
    ours = naive = 0
    for _ in range(repeats):
        sizes = _sizes(kind, rng)
        ties = rng.binomial(sizes, 0.2)
        turbo = rng.binomial(sizes - ties, rng.random(10) if spread else 0.5)
        rows = zip(turbo.tolist(), (sizes - ties - turbo).tolist(), ties.tolist(), strict=True)
        said = found(*(tally(str(index), *row) for index, row in enumerate(rows)))
        low, high = stats.wilson_interval(said.turbo + said.neither / 2, said.votes)
        ours += said.interval[0] <= 0.5 <= said.interval[1]
        naive += low <= 0.5 <= high
    return ours / repeats, naive / repeats


@pytest.mark.parametrize("kind", KINDS)
def test_the_interval_holds_the_truth(kind: str) -> None:
    """As often as it says, where Wilson's alone does not."""
    ours, naive = _share_held(kind, spread=True)
    assert 0.93 <= ours <= 0.985
    assert naive < 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_where_tastes_do_not_differ_it_holds_it_too(kind: str) -> None:
    ours, naive = _share_held(kind, spread=False)
    assert 0.94 <= naive <= ours


# --- sides ------------------------------------------------------------------------------------------


def test_the_left_is_counted_among_votes_that_chose_a_side() -> None:
    said = found(tally("a", 6, 4, 10, left=7), tally("b", 5, 5, left=4))
    assert said.left_share == 11 / 20
    assert said.left_interval == pytest.approx(stats.wilson_interval(11, 20))
    assert not said.favours_a_side and "left" not in said.sentence


@pytest.mark.parametrize(("left", "share"), [(36, "90 %"), (4, "10 %")])
def test_who_picks_a_side_is_told(left: int, share: str) -> None:
    said = found(tally("a", 20, 20, left=left))
    assert said.favours_a_side
    assert f"But the picture on the left was chosen in {share} of 40 pairs" in said.sentence


def test_of_ties_alone_nobody_chose_a_side() -> None:
    said = found(tally("a", 0, 0, 5), tally("b", 0, 0, 1))
    assert said.rate == 0.5 and said.left_share is None and said.left_interval is None and not said.favours_a_side
    assert "0 pairs" not in said.sentence


# --- words ------------------------------------------------------------------------------------------


def test_the_sentence_says_all() -> None:
    said = found(tally("a", 22, 20, 10), tally("b", 19, 20, 4), tally("c", 15, 6, 4))
    low, high = (f"{100 * end:.0f}" for end in said.interval)
    assert said.sentence == (
        f"Turbo was preferred in 54 % of 120 pairs (95 %: {low}–{high} %), by 3 people; "  # noqa: RUF001
        "18 pairs looked the same to them and count half. No difference is shown."
    )


@pytest.mark.parametrize(
    ("turbo", "premium", "preferred", "says"),
    [
        (30, 10, "turbo", "Turbo is preferred."),
        (10, 30, "premium", "Premium is preferred."),
        (20, 20, None, "No difference is shown."),
    ],
)
def test_what_it_means(turbo: int, premium: int, preferred: str | None, says: str) -> None:
    said = found(tally("a", turbo, premium), tally("b", turbo, premium))
    assert said.preferred == preferred
    assert said.sentence.endswith(f"by 2 people. {says}")


def test_one_voter_is_one_taste() -> None:
    said = found(tally("a", 30, 2, 1, left=16))
    assert "by 1 person; 1 pair looked the same to that person and counts half." in said.sentence
    assert said.sentence.endswith(
        "Turbo is preferred, as far as one person's taste goes: what others prefer, this cannot tell."
    )
    assert "of 1 pair (" in found(tally("a", 1, 0)).sentence
    assert "taste" not in found(tally("a", 30, 2), tally("b", 30, 2)).sentence


def test_no_end_is_rounded_onto_the_half_that_decides() -> None:
    close = [
        said
        for turbo, premium in itertools.product(range(1, 400, 7), repeat=2)
        for said in [found(tally("a", turbo, premium))]
        if said.preferred and min(abs(end - 0.5) for end in said.interval) < 0.005
    ]
    assert len(close) > 20
    for said in close:
        low, high = said.sentence.partition("(95 %: ")[2].partition(" %)")[0].split("–")  # noqa: RUF001
        assert float(low) > 50 or float(high) < 50, said.sentence
