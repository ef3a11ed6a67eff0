"""Wilson's interval against published values."""

import pytest

from eval import stats


@pytest.mark.parametrize(
    ("successes", "total", "expected"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (5, 10, (0.2366, 0.7634)), (81, 263, (0.2553, 0.3662))],
)
def test_known_intervals(successes: int, total: int, expected: tuple[float, float]) -> None:
    """The last is Newcombe's 1998 example (81 of 263, table I)."""
    assert stats.wilson_interval(successes, total) == pytest.approx(expected, abs=5e-5)


def test_more_confidence_is_wider() -> None:
    low, high = stats.wilson_interval(5, 10)
    wider_low, wider_high = stats.wilson_interval(5, 10, confidence=0.99)
    assert wider_low < low < high < wider_high
