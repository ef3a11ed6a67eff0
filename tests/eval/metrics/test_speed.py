"""Timing in turns, on calls whose behaviour is known. No bound on any duration that a busy machine could break."""

import time

import pytest
import torch

from eval.metrics import speed


def test_models_take_turns_after_a_call_that_is_not_timed() -> None:
    calls: list[tuple[str, int]] = []
    speeds = speed.measure(
        [lambda count: calls.append(("a", count)), lambda count: calls.append(("b", count))],
        batch_size=8, device=torch.device("cpu"), runs=3,
    )  # fmt: skip
    assert calls[:2] == [("a", 1), ("b", 1)]
    assert calls[2:8] == [("a", 1), ("b", 1)] * 3
    assert calls[8:] == [("a", 8)] * 3 + [("b", 8)] * 3
    assert [len(each.latency_s) for each in speeds] == [3, 3]


def test_a_slower_model_is_slower_by_what_it_sleeps() -> None:
    fast, slow = speed.measure(
        [lambda count: None, lambda count: time.sleep(0.02 * count)], batch_size=4, device=torch.device("cpu"), runs=3
    )
    assert slow.mean_latency_s >= 0.02 > fast.mean_latency_s
    assert slow.seconds_per_image >= 0.02 > fast.seconds_per_image


def test_cost_is_time_at_a_price() -> None:
    assert speed.Speed((1.0,), 0.5, 8, None).cost_usd(7.2) == pytest.approx(0.001)


def test_peak_memory_is_of_each_model_and_not_of_the_process_s_life() -> None:
    def greedy(count: int) -> None:
        torch.ones(60_000_000 if count > 1 else 1).sum()  # 240 MB

    modest, much, modest_again = speed.measure(
        [lambda count: None, greedy, lambda count: None], batch_size=2, device=torch.device("cpu"), runs=1
    )
    if modest.peak_memory_gb is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert much.peak_memory_gb is not None and modest_again.peak_memory_gb is not None
    assert much.peak_memory_gb > modest.peak_memory_gb + 0.2
    assert modest_again.peak_memory_gb < much.peak_memory_gb - 0.2
