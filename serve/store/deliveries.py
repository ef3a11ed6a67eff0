"""The outbox of webhooks: written with the job's result, in one transaction, and emptied by whoever sends them."""

import datetime
import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy
from sqlalchemy import orm

from serve.store import database, records
from serve.store.tables import DeliveryRow


class Deliveries(database.Database):
    def claim_deliveries(self, owner: str, limit: int, lease_s: float) -> list[records.Delivery]:
        """Those that are due, longest waiting first; nobody else gets them for `lease_s`."""
        now = self._now()
        query = (
            sqlalchemy.select(DeliveryRow)
            .where(
                DeliveryRow.status == "pending",
                DeliveryRow.next_at <= now,
                DeliveryRow.lease_until.is_(None) | (DeliveryRow.lease_until <= now),
            )
            .order_by(DeliveryRow.next_at, DeliveryRow.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        with self._writing() as session:
            rows = session.scalars(query).all()
            for row in rows:
                row.owner, row.lease_until = owner, now + datetime.timedelta(seconds=lease_s)
                row.attempts += 1
            return [_delivery(row) for row in rows]

    def delivery_done(self, delivery_id: str) -> None:
        """The receiver has it."""
        self._end_delivery(delivery_id, status="delivered", last_error=None)

    def fail_delivery(self, delivery_id: str, error: str) -> None:
        """Given up."""
        self._end_delivery(delivery_id, status="failed", last_error=error)

    def retry_delivery(self, delivery_id: str, next_at: datetime.datetime, error: str) -> None:
        """This attempt failed; another is due at `next_at`."""
        self._set_delivery(delivery_id, next_at=next_at, last_error=error)

    def release_deliveries(self, owner: str) -> None:
        """Hand back what `owner` has claimed and not sent: it is due at once."""
        with self._writing() as session:
            session.execute(
                sqlalchemy.update(DeliveryRow)
                .where(DeliveryRow.owner == owner, DeliveryRow.status == "pending")
                .values(owner=None, lease_until=None)
            )

    def _end_delivery(self, delivery_id: str, **values: Any) -> None:
        self._set_delivery(delivery_id, finished_at=self._now(), **values)

    def _set_delivery(self, delivery_id: str, **values: Any) -> None:
        """Does nothing to one that is over: of two that sent it, the second brings no news."""
        with self._writing() as session:
            session.execute(
                sqlalchemy.update(DeliveryRow)
                .where(DeliveryRow.id == delivery_id, DeliveryRow.status == "pending")
                .values(owner=None, lease_until=None, **values)
            )


def add(
    session: orm.Session, job_id: str, url: str, event: str, payload: dict[str, Any], now: datetime.datetime
) -> None:
    """Into the transaction that ends the job."""
    session.add(
        DeliveryRow(
            id=f"msg_{uuid.uuid4().hex}",
            job_id=job_id,
            url=url,
            event=event,
            payload=payload,
            status="pending",
            attempts=0,
            next_at=now,
        )
    )


def delete(session: orm.Session, job_ids: Sequence[str]) -> int:
    """All of some jobs; how many there were."""
    gone = sqlalchemy.delete(DeliveryRow).where(DeliveryRow.job_id.in_(job_ids)).returning(DeliveryRow.id)
    return len(session.scalars(gone).all())


def _delivery(row: DeliveryRow) -> records.Delivery:
    return records.Delivery(row.id, row.job_id, row.url, row.event, row.payload, row.attempts, row.next_at)
