"""The soak's verdict on made-up figures."""

import dataclasses

import pytest

from benchmarks import soak

REST = soak.Sample(0.0, 500.0, 20, 4, 14, 7)


def verdict(growth_mb: float, **more_after: int) -> soak.Verdict:
    """Ten minutes in which memory grows by growth_mb a minute, after a jump while it warms up."""
    memory_mb = [400.0 if minute < 2 else 600 + growth_mb * minute for minute in (second / 60 for second in range(601))]
    samples = [dataclasses.replace(REST, at_s=float(at), memory_mb=each) for at, each in enumerate(memory_mb)]
    after = dataclasses.replace(REST, **{name: getattr(REST, name) + more for name, more in more_after.items()})
    return soak.Verdict(samples, REST, after, warm_s=120, window_s=60)


def test_what_stays_the_same_passes() -> None:
    assert verdict(0.0).grown == []
    assert verdict(0.0, handles=2, threads=2).grown == []


@pytest.mark.parametrize("name", ["handles", "connections", "threads", "tasks"])
def test_more_at_rest_than_pools_explain_is_growth(name: str) -> None:
    assert verdict(0.0, **{name: soak.SLACK[name] + 1}).grown == [name]


def test_memory_that_grows_by_more_than_a_twentieth_is_growth() -> None:
    """Minute 2.5 to 9.5: 4 MB a minute are 28 of 610, 5 are 35 of 612."""
    assert verdict(4.0).grown == []
    assert verdict(5.0).grown == ["memory_mb"]
    assert verdict(5.0).slope("memory_mb") == pytest.approx(5.0)


def test_the_table_marks_what_grows() -> None:
    marked = [line.split()[0] for line in verdict(9.0, tasks=3).table() if "GROWS" in line]
    assert marked == ["memory_mb", "tasks"]
