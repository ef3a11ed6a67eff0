"""Rate limits, in memory and in a real Redis where DIFFUSION_KD_TEST_REDIS holds the url of one."""

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import Awaitable, Callable

import pytest

from diffusion_kd import errors
from serve import limits

REDIS = os.environ.get("DIFFUSION_KD_TEST_REDIS")
needs_redis = pytest.mark.skipif(REDIS is None, reason="DIFFUSION_KD_TEST_REDIS is not set")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time as both kinds of counters read it; Redis, too, is told the time by its client."""
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)])
def url(request: pytest.FixtureRequest) -> str:
    return "memory://" if request.param == "memory" else REDIS or ""


def with_limiter(url: str, use: Callable[[limits.RateLimiter, str], Awaitable[None]]) -> None:
    """Run `use` with a limiter and the id of a key that nobody used before."""

    async def run() -> None:
        limiter = limits.RateLimiter(url)
        try:
            await use(limiter, uuid.uuid4().hex)
        finally:
            await limiter.close()

    asyncio.run(run())


def test_as_many_as_the_limit_pass_and_the_next_is_told_when(url: str, clock: Clock) -> None:
    async def use(limiter: limits.RateLimiter, key: str) -> None:
        for _ in range(3):
            assert await limiter.take(key, 3) is None
            clock.now_s += 10
        # The first came 30 s ago, so a place is free in 30 s.
        assert await limiter.take(key, 3) == pytest.approx(30, abs=0.1)

    with_limiter(url, use)


def test_a_retry_after_the_told_time_passes_and_one_before_does_not(url: str, clock: Clock) -> None:
    async def use(limiter: limits.RateLimiter, key: str) -> None:
        await limiter.take(key, 2)
        clock.now_s += 5
        await limiter.take(key, 2)
        wait_s = await limiter.take(key, 2)
        assert wait_s is not None
        clock.now_s += wait_s - 0.5
        assert await limiter.take(key, 2) is not None
        clock.now_s += 0.5
        assert await limiter.take(key, 2) is None
        # Only the first had left the window.
        assert await limiter.take(key, 2) is not None

    with_limiter(url, use)


def test_a_dear_request_is_told_when_enough_have_left(url: str, clock: Clock) -> None:
    async def use(limiter: limits.RateLimiter, key: str) -> None:
        for _ in range(4):
            assert await limiter.take(key, 4) is None
            clock.now_s += 5
        # They came 20, 15, 10 and 5 s ago; three must have left, the third in 50 s.
        wait_s = await limiter.take(key, 4, cost=3)
        assert wait_s == pytest.approx(51, abs=1)
        clock.now_s += wait_s
        assert await limiter.take(key, 4, cost=3) is None
        assert await limiter.take(key, 4) is not None

    with_limiter(url, use)


def test_a_request_dearer_than_the_limit_takes_all_of_it(url: str, clock: Clock) -> None:
    async def use(limiter: limits.RateLimiter, key: str) -> None:
        assert await limiter.take(key, 4, cost=10) is None
        assert await limiter.take(key, 4) is not None
        clock.now_s += 61
        assert await limiter.take(key, 4, cost=10) is None

    with_limiter(url, use)


def test_a_refused_request_costs_nothing(url: str, clock: Clock) -> None:
    async def use(limiter: limits.RateLimiter, key: str) -> None:
        await limiter.take(key, 1)
        for _ in range(5):
            clock.now_s += 11
            assert await limiter.take(key, 1) is not None
        clock.now_s += 6
        assert await limiter.take(key, 1) is None

    with_limiter(url, use)


def test_keys_do_not_share(url: str, clock: Clock) -> None:
    async def use(limiter: limits.RateLimiter, key: str) -> None:
        assert await limiter.take(key, 1) is None
        assert await limiter.take(key + "-other", 1) is None
        assert await limiter.take(key, 1) is not None

    with_limiter(url, use)


def test_none_is_no_limit_and_0_lets_nothing_pass(url: str, clock: Clock) -> None:
    async def use(limiter: limits.RateLimiter, key: str) -> None:
        for _ in range(100):
            assert await limiter.take(key, None) is None
        assert await limiter.take(key, 0) == 60

    with_limiter(url, use)


def test_of_requests_at_once_as_many_as_the_limit_pass(url: str) -> None:
    async def use(limiter: limits.RateLimiter, key: str) -> None:
        answers = await asyncio.gather(*(limiter.take(key, 7) for _ in range(20)))
        assert answers.count(None) == 7

    with_limiter(url, use)


def test_ping(url: str) -> None:
    async def use(limiter: limits.RateLimiter, key: str) -> None:
        assert await limiter.ping()

    with_limiter(url, use)


@needs_redis
def test_processes_share_through_redis() -> None:
    async def use(limiter: limits.RateLimiter, key: str) -> None:
        other = limits.RateLimiter(REDIS or "")
        try:
            assert await limiter.take(key, 1) is None
            assert await other.take(key, 1) is not None
        finally:
            await other.close()

    with_limiter(REDIS or "", use)


# --- outages ----------------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def test_without_redis_requests_pass_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_PAUSE_S", 0.0)

    async def use(limiter: limits.RateLimiter, key: str) -> None:
        for _ in range(3):
            assert await limiter.take(key, 1) is None
        assert not await limiter.ping()

    with caplog.at_level(logging.WARNING, logger="serve.limits"):
        with_limiter(f"redis://:pass-word@127.0.0.1:{closed_port()}/0", use)
    assert len(caplog.records) == 1
    assert "rate limits are off" in caplog.text and "pass-word" not in caplog.text


def test_a_silent_redis_holds_up_one_request_not_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_STORAGE_TIMEOUT_S", 0.3)

    async def use(limiter: limits.RateLimiter, key: str) -> None:
        begun_s = time.perf_counter()
        for _ in range(20):
            assert await limiter.take(key, 1) is None
        assert 0.2 < time.perf_counter() - begun_s < 3

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with_limiter(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", use)


@needs_redis
def test_limits_hold_again_when_redis_is_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_PAUSE_S", 0.0)

    async def use(limiter: limits.RateLimiter, key: str) -> None:
        assert await limiter.take(key, 1) is None
        with monkeypatch.context() as outage:
            outage.setattr(limiter, "_take", failing)
            assert await limiter.take(key, 1) is None
        assert await limiter.take(key, 1) is not None

    async def failing(*_: object) -> None:
        raise ConnectionRefusedError("gone")

    with caplog.at_level(logging.WARNING, logger="serve.limits"):
        with_limiter(REDIS or "", use)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memcached://localhost", "give memory:// or redis://"),
        ("", "give memory:// or redis://"),
        ("redis://:pass-word@localhost:port/0", "malformed"),
    ],
)
def test_other_urls_are_refused_without_telling_a_password(url: str, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message) as caught:
        limits.RateLimiter(url)
    assert "pass-word" not in str(caught.value)
