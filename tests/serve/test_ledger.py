"""The ledger: one transaction for all that wait, and whoever waits learns what became of it."""

import asyncio
import datetime
import threading

import pytest

from serve import ledger
from serve.store import StoreUnavailable, Usage


def usage(images: int) -> Usage:
    return Usage("key", "turbo", images, 1.0, 10, 100, datetime.datetime.now(datetime.UTC))


class Book:
    """Its first transaction waits for `go`."""

    def __init__(self) -> None:
        self.go, self.transactions = threading.Event(), list[list[int]]()
        self.error: Exception | None = None

    def record_usage(self, *usages: Usage) -> None:
        assert self.go.wait(10)
        if self.error is not None:
            raise self.error
        self.transactions.append([one.images for one in usages])


async def begun(count: int) -> None:
    """Let tasks run until they wait."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_what_comes_during_a_transaction_goes_into_the_next() -> None:
    book = Book()

    async def run() -> None:
        its = ledger.Ledger(book)
        tasks = [asyncio.create_task(its.record(usage(1)))]
        await begun(5)
        tasks += [asyncio.create_task(its.record(usage(number))) for number in (2, 3, 4)]
        await begun(5)
        assert book.transactions == []
        book.go.set()
        await asyncio.gather(*tasks)
        await its.record(usage(5))

    asyncio.run(run())
    assert book.transactions == [[1], [2, 3, 4], [5]]


def test_an_error_reaches_all_who_wait_and_later_ones_are_recorded() -> None:
    book = Book()
    book.go.set()
    book.error = StoreUnavailable("away")

    async def run() -> None:
        its = ledger.Ledger(book)
        outcomes = await asyncio.gather(its.record(usage(1)), its.record(usage(2)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StoreUnavailable, StoreUnavailable]
        book.error = None
        await its.record(usage(3))

    asyncio.run(run())
    assert book.transactions == [[3]]


def test_what_nobody_waits_for_any_more_is_recorded() -> None:
    book = Book()

    async def run() -> None:
        its = ledger.Ledger(book)
        task = asyncio.create_task(its.record(usage(1)))
        await begun(5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        book.go.set()
        await its.record(usage(2))

    asyncio.run(run())
    assert book.transactions == [[1], [2]]
