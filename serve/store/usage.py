"""What was used and what it cost. Never deleted."""

import dataclasses
import datetime

import sqlalchemy
from sqlalchemy import func, orm

from serve.store import database, records
from serve.store.tables import UsageRow


class UsageBook(database.Database):
    def record_usage(self, *usages: records.Usage) -> None:
        """Record all of them, or none."""
        with self._writing() as session:
            for usage in usages:
                add(session, usage)

    def usage_days(self, key_id: str, since: datetime.date, until: datetime.date) -> list[records.UsageDay]:
        """Sums by UTC day and tier, oldest first. since, until: both within."""
        query = (
            sqlalchemy.select(
                UsageRow.day,
                UsageRow.tier,
                func.count(),
                func.sum(UsageRow.images),
                func.sum(UsageRow.compute_ms),
                func.sum(UsageRow.cost_nanousd),
                func.sum(UsageRow.premium_cost_nanousd),
            )
            .where(UsageRow.key_id == key_id, UsageRow.day >= since, UsageRow.day <= until)
            .group_by(UsageRow.day, UsageRow.tier)
            .order_by(UsageRow.day, UsageRow.tier)
        )
        with self._reading() as session:
            return [
                records.UsageDay(day, tier, requests, int(images), float(compute_ms), int(cost), int(premium))
                for day, tier, requests, images, compute_ms, cost, premium in session.execute(query)
            ]

    def spent_nanousd(self, key_id: str, since: datetime.datetime) -> int:
        """What a key's requests at or after a time cost."""
        query = sqlalchemy.select(func.coalesce(func.sum(UsageRow.cost_nanousd), 0)).where(
            UsageRow.key_id == key_id, UsageRow.at >= since
        )
        with self._reading() as session:
            return int(session.execute(query).scalar_one())


def add(session: orm.Session, usage: records.Usage) -> None:
    """Into a transaction that does more."""
    session.add(UsageRow(**dataclasses.asdict(usage), day=usage.at.astimezone(datetime.UTC).date()))
