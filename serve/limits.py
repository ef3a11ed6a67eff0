"""How often a key may ask, for one process or for all that share a Redis.

A moving window: at most `per_minute` in any 60 seconds, exactly. The counters of two fixed windows, the cheaper choice,
let through up to twice the limit around a boundary, and hold back a caller who did wait for what it was told.

Where Redis does not answer, requests pass: a limit protects against excess, which the bounded queues behind it do as
well, and a service that refuses all its callers for want of a counter would be the greater harm. Each outage is logged
once, and Redis is left alone for some seconds so that requests do not wait for it one after another.
"""

import asyncio
import importlib.util
import logging
import time
from typing import Any

import limits
import limits.aio.storage
import limits.aio.strategies
import limits.errors

from diffusion_kd import errors

logger = logging.getLogger(__name__)

WINDOW_S = 60

_STORAGE_TIMEOUT_S, _PAUSE_S = 1.0, 5.0
"""Patience with Redis for one request; how long it is left alone after it did not answer."""

_MARGIN_S = 0.001
"""An entry exactly as old as the window still counts."""


class RateLimiter:
    """Rate limits of API keys.

    url: `memory://` for one process, `redis://...` or `rediss://...` for several.
    Raises ConfigError for another url, or where the redis package is missing.
    """

    def __init__(self, url: str) -> None:
        self._storage = _storage(url)
        self._window = limits.aio.strategies.MovingWindowRateLimiter(self._storage)
        self._paused_until_s = 0.0
        self._out = False

    async def take(self, key_id: str, per_minute: int | None, cost: int = 1) -> float | None:
        """Count a request, unless that would be one too many.

        per_minute: None is no limit, 0 lets nothing pass. cost: 1 or more; one above `per_minute` is taken as all of
        it, so that the request can pass at all.
        Returns None if it was counted, else after how many seconds (above 0, at most a little over 60) the same one
        would pass if no other comes between.
        """
        if per_minute is None or time.monotonic() < self._paused_until_s:
            return None
        if per_minute <= 0:
            return float(WINDOW_S)
        item = limits.RateLimitItemPerMinute(per_minute)
        try:
            async with asyncio.timeout(_STORAGE_TIMEOUT_S):
                wait_s = await self._take(item, key_id, min(cost, per_minute))
        except (limits.errors.StorageError, OSError) as error:
            self._note_outage(error)
            return None
        self._note_return()
        return wait_s

    async def ping(self) -> bool:
        """Whether the counters can be reached now."""
        try:
            async with asyncio.timeout(_STORAGE_TIMEOUT_S):
                return await self._storage.check()
        except (limits.errors.StorageError, OSError):
            return False

    async def close(self) -> None:
        """Close connections and background work; the limiter is of no use afterwards."""
        if isinstance(self._storage, limits.aio.storage.MemoryStorage):
            if self._storage.timer is not None:
                self._storage.timer.cancel()
                await asyncio.gather(self._storage.timer, return_exceptions=True)
        else:
            # What every bridge has, though their base class does not say so.
            connection: Any = getattr(self._storage.bridge, "get_connection")()  # noqa: B009
            await connection.aclose()

    async def _take(self, item: limits.RateLimitItem, key_id: str, cost: int) -> float | None:
        if await self._window.hit(item, key_id, cost=cost):
            return None
        now_s = time.time()
        oldest_s, held = await self._held(item, key_id, WINDOW_S)
        if held - 1 + cost <= item.amount:
            return max(oldest_s + WINDOW_S - now_s, 0.0) + _MARGIN_S
        # More than one must leave the window first: the fewest whole seconds after which enough of them have.
        low_s, high_s = 0, WINDOW_S
        while high_s - low_s > 1:
            middle_s = (low_s + high_s) // 2
            _, staying = await self._held(item, key_id, WINDOW_S - middle_s)
            low_s, high_s = (low_s, middle_s) if staying + cost <= item.amount else (middle_s, high_s)
        return high_s + _MARGIN_S

    async def _held(self, item: limits.RateLimitItem, key_id: str, last_s: int) -> tuple[float, int]:
        """When the oldest of the entries of the last seconds came, in seconds since 1970, and how many they are."""
        return await self._storage.get_moving_window(item.key_for(key_id), item.amount, last_s)

    def _note_outage(self, error: BaseException) -> None:
        self._paused_until_s = time.monotonic() + _PAUSE_S
        if not self._out:
            self._out = True
            logger.error("rate limits are off: their Redis does not answer (%s)", errors.first_line(error))

    def _note_return(self) -> None:
        if self._out:
            self._out = False
            logger.warning("rate limits are on again: their Redis answers")


def _storage(url: str) -> limits.aio.storage.MemoryStorage | limits.aio.storage.RedisStorage:
    """The counters behind a url, which no message repeats: it may hold a password."""
    scheme = url.partition("://")[0]
    if scheme == "memory":
        return limits.aio.storage.MemoryStorage()
    if scheme not in ("redis", "rediss"):
        raise errors.ConfigError(f"rate limits cannot be kept at {scheme!r}; give memory:// or redis://host:port/0")
    try:
        # `limits` would look for another client, coredis, unless told.
        return limits.aio.storage.RedisStorage(
            f"async+{url}",
            wrap_exceptions=True,
            implementation="redispy",
            key_prefix="diffusion_kd:limits",
            socket_timeout=_STORAGE_TIMEOUT_S,
            socket_connect_timeout=_STORAGE_TIMEOUT_S,
        )
    except (limits.errors.ConfigurationError, ValueError):
        if importlib.util.find_spec("redis") is None:
            raise errors.ConfigError(
                "rate limits in Redis need the package redis; install it, or use memory://"
            ) from None
        wanted = "redis://:password@host:port/0"
        raise errors.ConfigError(f"the url of the rate limits' Redis is malformed; give one such as {wanted}") from None
