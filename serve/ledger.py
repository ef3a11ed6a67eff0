"""Usage into the store: what comes while one transaction is under way goes together into the next."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from serve.store import Usage


class Book(Protocol):
    """The part of the store that is needed here."""

    def record_usage(self, *usages: Usage) -> None:
        """Record all of them, or none."""


class Ledger:
    """Under load a commit for each request would cost more than the request."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._waiting: list[tuple[Usage, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def record(self, usage: Usage) -> None:
        """Returns once it is committed; raises what the store raises. Cancelled, it is recorded all the same."""
        recorded = asyncio.get_running_loop().create_future()
        self._waiting.append((usage, recorded))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="ledger")
        await asyncio.shield(recorded)

    async def _write(self) -> None:
        while self._waiting:
            entries, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._book.record_usage, *(usage for usage, _ in entries))
            except Exception as error:  # noqa: BLE001 - it is those who wait that must know
                _settle(entries, error)
            else:
                _settle(entries, None)


def _settle(entries: Sequence[tuple[Usage, asyncio.Future[None]]], error: Exception | None) -> None:
    for _, recorded in entries:
        if error is None:
            recorded.set_result(None)
        else:
            recorded.set_exception(error)
