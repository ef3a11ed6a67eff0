"""Work for the store or the images' folder that must be done, and is tried again while they do not answer."""

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from serve.store import StoreUnavailable

log = logging.getLogger(__name__)

MOST_WAIT_S = 5.0
T = TypeVar("T")


async def patiently(work: Callable[..., T], *given: Any, tries: int | None = None) -> T:
    """`work` in a thread, again after StoreUnavailable or OSError. tries: then the error is raised; None: for ever."""
    for attempt in itertools.count(1):
        try:
            return await asyncio.to_thread(work, *given)
        except (StoreUnavailable, OSError) as error:
            if attempt == tries:
                raise
            log.warning("trying again, after attempt %d: %s", attempt, error)
            await asyncio.sleep(min(2.0 ** (attempt - 1), MOST_WAIT_S))
    raise AssertionError("unreachable")
