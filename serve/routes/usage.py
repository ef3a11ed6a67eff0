"""`/v1/usage`: what the caller has used."""

import asyncio
import datetime
import re
from typing import Annotated

import pydantic
from fastapi import APIRouter, Depends, Query

from serve import costs, deps, errors, schemas
from serve.store import UsageDay

router = APIRouter(tags=["usage"], dependencies=[Depends(deps.known_query)])

_MOST_DAYS = 366
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def _written_out(given: str) -> str:
    """pydantic would take a number for seconds since 1970."""
    if not _DAY.fullmatch(given):
        raise ValueError("a day is written YYYY-MM-DD")
    return given


Day = Annotated[datetime.date, pydantic.BeforeValidator(_written_out)]


@router.get("/v1/usage", response_model=schemas.UsageReport, responses=deps.refusals(400, 401, 403))
async def usage(
    key: deps.Caller,
    service: deps.TheService,
    since: Annotated[Day | None, Query(description="first day, UTC; absent: the first of the month")] = None,
    until: Annotated[Day | None, Query(description="last day, UTC; absent: today")] = None,
) -> schemas.UsageReport:
    """Images, compute and cost by tier and day. The costs are sums of those answered, to the last digit."""
    last = until or datetime.datetime.now(datetime.UTC).date()
    first = since or last.replace(day=1)
    if not datetime.timedelta(0) <= last - first < datetime.timedelta(days=_MOST_DAYS):
        raise errors.InvalidField(
            f"since is {first} and until {last}; give a range of 1 to {_MOST_DAYS} days", param="since"
        )
    days = await asyncio.to_thread(service.store.usage_days, key.id, first, last)
    data = [schemas.UsageDayOut(day=str(day.day), tier=day.tier, **_sums([day]).model_dump()) for day in days]
    return schemas.UsageReport(since=str(first), until=str(last), total=_sums(days), data=data)


def _sums(days: list[UsageDay]) -> schemas.UsageSums:
    return schemas.UsageSums(
        requests=sum(day.requests for day in days),
        images=sum(day.images for day in days),
        compute_ms=sum(day.compute_ms for day in days),
        cost_usd=costs.to_usd(sum(day.cost_nanousd for day in days)),
        premium_cost_usd=costs.to_usd(sum(day.premium_cost_nanousd for day in days)),
    )
