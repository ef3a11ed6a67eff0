"""Load that is sent when it is due, and the servers that it is sent to."""

import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import pathlib
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import torch

from benchmarks import serving, serving_baselines
from diffusion_kd import errors

_IMAGE = b'{"data": [{"b64_json": "AA=="}]}'


@contextlib.asynccontextmanager
async def _answering(answer: Callable[[int], tuple[int, bytes]], after_s: float = 0.0) -> AsyncIterator[int]:
    """A server that answers request i with (status, body), one at a time, each after `after_s`. Yields its port."""
    count, turn, serving_now = 0, asyncio.Lock(), list[asyncio.Task[None]]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        task = asyncio.current_task()
        assert task is not None
        serving_now.append(task)
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]))
                async with turn:
                    await asyncio.sleep(after_s)
                status, body = answer(count)
                count += 1
                writer.write(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.wait_for(asyncio.gather(*serving_now), 10)


# --- schedule ---------------------------------------------------------------------------------------


def test_arrivals_are_poisson_and_the_same_for_a_seed() -> None:
    one, other = (serving.schedule(200, 20, 0.9, 3, serving.Prompts(0)) for _ in range(2))
    assert one == other
    assert one != serving.schedule(200, 20, 0.9, 4, serving.Prompts(0))
    gaps_s = [late.due_s - early.due_s for early, late in itertools.pairwise(one)]
    assert len(one) == pytest.approx(4000, rel=0.06)
    assert statistics.fmean(gaps_s) == pytest.approx(1 / 200, rel=0.06)
    assert statistics.stdev(gaps_s) == pytest.approx(1 / 200, rel=0.1)  # of evenly spaced arrivals: 0
    assert sum(arrival.tier == "turbo" for arrival in one) == pytest.approx(0.9 * len(one), rel=0.03)


def test_no_prompt_comes_twice() -> None:
    prompts = serving.Prompts(0)
    bodies = [json.loads(prompts.body("turbo")) for _ in range(1200)]
    assert len({body["prompt"] for body in bodies}) == 1200


# --- client -----------------------------------------------------------------------------------------


async def _sent(arrivals: Sequence[serving.Arrival], after_s: float, **kinds: int) -> list[serving.Answer]:
    def answer(count: int) -> tuple[int, bytes]:
        return (503, b"{}") if count in kinds.values() else (200, _IMAGE)

    async with _answering(answer, after_s) as port:
        return await serving.open_loop(port, arrivals)


def test_latency_counts_from_when_a_request_was_due() -> None:
    """Four requests, already late by a second, at a server that takes 50 ms for each: the last waits for all."""
    answers = asyncio.run(_sent([serving.Arrival(-1.0, "turbo", b"{}") for _ in range(4)], 0.05))
    for place, latency_s in enumerate(sorted(answer.latency_s for answer in answers), 1):
        assert 1 + place * 0.05 <= latency_s < 3
    assert all(1 <= answer.late_s <= answer.latency_s for answer in answers)


def test_requests_do_not_wait_for_each_other() -> None:
    """At a server that takes 0.3 s for each, all are sent before the first is answered."""
    answers = asyncio.run(_sent([serving.Arrival(0.01 * index, "turbo", b"{}") for index in range(4)], 0.3))
    assert max(answer.late_s for answer in answers) < 0.2
    assert max(answer.done_s for answer in answers) >= 1.2


def test_a_refusal_is_counted_and_its_latency_is_not() -> None:
    arrivals = [serving.Arrival(0.02 * index, "turbo", b"{}") for index in range(5)]
    answers = asyncio.run(_sent(arrivals, 0.0, refused=2))
    row = serving.latencies(answers, "turbo")
    assert row["requests"] == 5 and row["refused"] == pytest.approx(0.2)
    assert [answer.status for answer in answers].count(503) == 1


def test_what_is_no_image_ends_the_benchmark() -> None:
    async def send(status: int, body: bytes) -> None:
        async with _answering(lambda _: (status, body)) as port, serving.Client(port) as client:
            await client.post(b"{}")

    with pytest.raises(errors.DataError, match="answered 500"):
        asyncio.run(send(500, _IMAGE))
    with pytest.raises(errors.DataError, match="not an image"):
        asyncio.run(send(200, b"{}"))


def test_throughput_of_a_server_that_takes_20_ms() -> None:
    async def load(clients: int) -> float:
        async with _answering(lambda _: (200, _IMAGE), 0.02) as port:
            return await serving.closed_loop(port, 1.0, clients, 1.0, serving.Prompts(0))

    assert 5 < asyncio.run(load(4)) <= 51.25  # at most 41 answers in 0.8 s


def test_the_interval_knows_that_neighbours_are_alike() -> None:
    """A slow minute among fast ones, and the same values shuffled: the former say less."""
    series = [100.0] * 950 + [1000.0] * 50
    low, high = serving.quantile_interval(series, 0.95)
    assert low == 100.0 and high == 1000.0
    constant = serving.quantile_interval([7.0] * 10, 0.99)
    assert constant == (7.0, 7.0)


def test_the_rate_of_a_mixed_load_follows_from_the_tiers() -> None:
    """0.9 of 20 ms and 0.1 of 1 s are 118 ms a request."""
    found = [
        {"load": "turbo", "images_per_s": {"ours": [1.0], "naive": [50.0]}},
        {"load": "premium", "images_per_s": {"ours": [1.0], "naive": [1.0]}},
    ]
    assert serving.reference_rate(found, "turbo") == pytest.approx(50)
    assert serving.reference_rate(found, "mixed") == pytest.approx(1 / 0.118)


# --- baselines --------------------------------------------------------------------------------------


def test_a_batch_is_what_waits_of_the_tier_of_the_oldest() -> None:
    drawn: list[tuple[str, int]] = []
    began, all_asked = threading.Event(), threading.Event()

    def draw(tier: str, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        drawn.append((tier, len(prompts)))
        began.set()
        assert all_asked.wait(30)
        return torch.stack([torch.full((3, 2, 2), seed / 100) for seed in seeds])

    batching = serving_baselines.Batching(draw, max_batch=3, delay_s=0.01)
    asked = [("turbo", 0), *(("premium", seed) for seed in range(10, 14)), ("turbo", 50)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = []
        for tier, seed in asked:
            futures.append(pool.submit(batching, serving_baselines.Body(model=tier, prompt="", seed=seed)))
            assert began.wait(30)  # the first is alone
            time.sleep(0.1)
        all_asked.set()
        levels = [int(future.result()[0, 0, 0]) for future in futures]
    assert drawn == [("turbo", 1), ("premium", 3), ("premium", 1), ("turbo", 1)]
    assert levels == [round((seed / 100 + 1) * 127.5) for _, seed in asked]


def test_a_batch_that_fails_fails_those_that_wait() -> None:
    def draw(tier: str, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        serving_baselines.Batching(draw, 3)(serving_baselines.Body(model="turbo", prompt="", seed=0))


# --- all of it --------------------------------------------------------------------------------------


def test_all_servers_under_a_little_load(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "serving.json"
    options = "--loads turbo --rates 0.5 --rounds 1 --seconds 2 --saturation-seconds 1 --clients 4 --calls 3"
    monkeypatch.setattr(sys, "argv", ["serving", *options.split(), "--out", str(out)])
    threads = torch.get_num_threads()
    try:
        serving.main()
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out.read_text(encoding="utf-8"))
    assert {row["server"] for row in report["rows"]} == set(serving.SERVERS)
    assert all(row["refused"] == 0 and 0 < row["p50_ms"] <= row["p99_ms"] for row in report["rows"])
    assert all(rates[0] > 0 for rates in report["saturation"][0]["images_per_s"].values())
    assert set(report["saturation"][0]["ours_over"]) == {serving.NAIVE, serving.BATCHING}
    assert report["overhead"]["bare_ms"] > 0 and report["overhead"]["http_ms"] > 0
    shown = capsys.readouterr().out
    assert "overhead" in shown and "saturated" in shown and "p99 ms" in shown
