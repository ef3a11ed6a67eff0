"""What a key may spend in a month, what runs included."""

import asyncio
import collections
import contextlib
import datetime
from collections.abc import AsyncIterator
from typing import Protocol

from serve import costs, errors
from serve.store import records


class Spent(Protocol):
    """The part of the store that is needed here."""

    def spent_nanousd(self, key_id: str, since: datetime.datetime) -> int:
        """The sum of a key's costs since then."""


class Budgets:
    """Holds each key to its budget of the calendar month, UTC.

    What runs is held at its predicted cost until it is recorded, so that many requests at once cannot overspend by more
    than the prediction errs. Each process holds for itself.
    """

    def __init__(self, store: Spent) -> None:
        self._store = store
        self._held = collections.Counter[str]()

    @contextlib.asynccontextmanager
    async def held(self, key: records.Key, nanousd: int) -> AsyncIterator[None]:
        """Hold a predicted cost. Raises BudgetSpent where it would exceed what is left."""
        if key.monthly_budget_nanousd is None:
            yield
            return
        self._held[key.id] += nanousd
        # Before the database is asked: what is recorded meanwhile counts twice rather than not at all.
        held = self._held[key.id]
        try:
            month, following = _month(datetime.datetime.now(datetime.UTC))
            spent = await asyncio.to_thread(self._store.spent_nanousd, key.id, month)
            if spent + held > key.monthly_budget_nanousd:
                raise errors.BudgetSpent(
                    f"the key's budget of ${costs.to_usd(key.monthly_budget_nanousd):g} a month is not enough: "
                    f"${costs.to_usd(spent):g} are spent, and this request and those that run are predicted to cost "
                    f"${costs.to_usd(held):g}; it starts again on {following:%Y-%m-%d} UTC",
                    retry_after_s=(following - datetime.datetime.now(datetime.UTC)).total_seconds(),
                )
            yield
        finally:
            self._held[key.id] -= nanousd


def _month(now: datetime.datetime) -> tuple[datetime.datetime, datetime.datetime]:
    """The beginnings of this month and of the next."""
    first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return first, (first + datetime.timedelta(days=32)).replace(day=1)
