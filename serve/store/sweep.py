"""Deletes what has had its time: expired pictures, old jobs with their deliveries, and old idempotency keys.

Never usage, votes, keys, queued or running jobs, or pictures that have not expired.
"""

import datetime
import logging
from collections.abc import Callable, Sequence

import sqlalchemy

from serve.store import database, deliveries, records
from serve.store.jobs import FINAL
from serve.store.tables import IdempotencyRow, ImageRow, JobRow

logger = logging.getLogger(__name__)

_BATCH = 200
"""Rows of a transaction: none holds up the service for long."""


class Sweep(database.Database):
    def sweep(self, *, jobs_older_than: datetime.timedelta | None, delete_file: Callable[[str], None]) -> records.Swept:
        """Delete what has had its time.

        jobs_older_than: since a job finished; its deliveries go too, sent or not. None: jobs stay for good.
        delete_file: takes an image's path. FileNotFoundError is as good as done; another OSError is logged, and the
        image stays for the next sweep.
        """
        now = self._now()
        images = self._sweep_images(now, delete_file)
        jobs, messages = (0, 0) if jobs_older_than is None else self._sweep_jobs(now - jobs_older_than)
        return records.Swept(images=images, jobs=jobs, idempotency=self._sweep_idempotency(now), deliveries=messages)

    def _sweep_images(self, now: datetime.datetime, delete_file: Callable[[str], None]) -> int:
        """The file goes first: a row without a file is found again by the next sweep, a file without a row never."""
        deleted, last = 0, ""
        while rows := self._expired_images(now, last):
            last = rows[-1][0]
            gone = [image_id for image_id, path in rows if _deleted(path, delete_file)]
            with self._writing() as session:
                statement = sqlalchemy.delete(ImageRow).where(ImageRow.id.in_(gone), ImageRow.expires_at <= now)
                deleted += len(session.scalars(statement.returning(ImageRow.id)).all())
        return deleted

    def _expired_images(self, now: datetime.datetime, last: str) -> list[tuple[str, str]]:
        query = (
            sqlalchemy.select(ImageRow.id, ImageRow.path)
            .where(ImageRow.expires_at <= now, ImageRow.id > last)
            .order_by(ImageRow.id)
            .limit(_BATCH)
        )
        with self._reading() as session:
            return [(image_id, path) for image_id, path in session.execute(query)]

    def _sweep_jobs(self, finished_by: datetime.datetime) -> tuple[int, int]:
        jobs = messages = 0
        query = (
            sqlalchemy.select(JobRow.id)
            .where(JobRow.status.in_(FINAL), JobRow.finished_at <= finished_by)
            .limit(_BATCH)
            .with_for_update(skip_locked=True)
        )
        while True:
            with self._writing() as session:
                old: Sequence[str] = session.scalars(query).all()
                messages += deliveries.delete(session, old)
                session.execute(sqlalchemy.delete(JobRow).where(JobRow.id.in_(old)))
            jobs += len(old)
            if len(old) < _BATCH:
                return jobs, messages

    def _sweep_idempotency(self, now: datetime.datetime) -> int:
        deleted = 0
        expired = IdempotencyRow.expires_at <= now
        query = sqlalchemy.select(IdempotencyRow.id).where(expired).limit(_BATCH)
        while True:
            with self._writing() as session:
                gone = sqlalchemy.delete(IdempotencyRow).where(IdempotencyRow.id.in_(query), expired)
                batch = len(session.scalars(gone.returning(IdempotencyRow.id)).all())
            deleted += batch
            if batch < _BATCH:
                return deleted


def _deleted(path: str, delete_file: Callable[[str], None]) -> bool:
    try:
        delete_file(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        logger.warning("the expired image %s cannot be deleted yet: %s", path, error)
        return False
    return True
