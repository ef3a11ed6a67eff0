"""Durable asynchronous work: each job runs at least once, its result is recorded once."""

import dataclasses
import datetime
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy
from sqlalchemy import func, orm

from serve.store import database, deliveries, idempotency, image_rows, locks, records, usage
from serve.store.errors import TooManyJobs, UnknownCursor
from serve.store.tables import JobRow

FINAL: tuple[records.FinalStatus, ...] = ("succeeded", "failed", "cancelled")


class Jobs(database.Database):
    def add_job(
        self, job_id: str, key_id: str, request: dict[str, Any], webhook_url: str | None, *, most_queued: int | None
    ) -> records.Job:
        """Queue a job; once this returns it will run, whatever becomes of the process.

        A job of the same key that already has the id is returned as it stands: a retry makes no second one.
        most_queued: raises TooManyJobs when that many are queued already; None: never.
        """
        with self._writing() as session:
            locks.hold(session, locks.QUEUE)
            row = session.scalar(sqlalchemy.select(JobRow).where(JobRow.id == job_id, JobRow.key_id == key_id))
            if row is not None:
                return _job(row)
            if most_queued is not None and _queued(session) >= most_queued:
                raise TooManyJobs(f"{most_queued} jobs are queued, which is the most; try again later")
            row = JobRow(id=job_id, key_id=key_id, status="queued", request=request, webhook_url=webhook_url)
            row.created_at, row.attempts, row.cancel_requested = self._now(), 0, False
            session.add(row)
            session.flush()
            return _job(row)

    def get_job(self, job_id: str, key_id: str | None) -> records.Job | None:
        """key_id: None finds the jobs of all keys; else those of others are unknown."""
        with self._reading() as session:
            row = session.scalar(_one(job_id, key_id))
        return None if row is None else _job(row)

    def list_jobs(
        self, key_id: str | None, limit: int, after: str | None = None, status: str | None = None
    ) -> tuple[list[records.Job], bool]:
        """A page, newest first, and whether there are more.

        after: the id of the last job of the page before. Raises UnknownCursor where there is no such job.
        """
        query = sqlalchemy.select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit + 1)
        if key_id is not None:
            query = query.where(JobRow.key_id == key_id)
        if status is not None:
            query = query.where(JobRow.status == status)
        with self._reading() as session:
            if after is not None:
                query = query.where(_older_than(session, after, key_id))
            rows = session.scalars(query).all()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def queued_jobs(self) -> int:
        """How many wait to be claimed."""
        with self._reading() as session:
            return _queued(session)

    def cancel_job(self, job_id: str, key_id: str | None) -> records.Cancelled | None:
        """A queued job is cancelled at once; a running one's owner learns of it when it renews. None: unknown.

        key_id: as in `get_job`.
        """
        with self._writing() as session:
            row = session.scalar(_one(job_id, key_id).with_for_update())
            if row is None:
                return None
            if row.status in FINAL:
                return "already_finished"
            row.cancel_requested = True
            if row.status == "running":
                return "cancellation_requested"
            self._end_job(session, row, "cancelled")
            return "cancelled"

    # --- for those who do the work ------------------------------------------------------------------

    def claim_jobs(self, owner: str, limit: int, lease_s: float) -> list[records.Job]:
        """Take up to `limit` jobs: those queued, and those whose owner let its lease run out.

        Round-robin: the oldest of each key comes before the second oldest of any, and among these the key that waited
        longest since it was last served. Nobody else gets them for `lease_s`, or longer if `owner` renews. A job that
        lost its owner and was to be cancelled is cancelled instead.
        """
        now = self._now()
        with self._writing() as session:
            abandoned = sqlalchemy.select(JobRow).where(_abandoned(now), JobRow.cancel_requested)
            for row in session.scalars(abandoned.with_for_update(skip_locked=True)):
                self._end_job(session, row, "cancelled")
            rows = session.scalars(_in_turn(now, limit)).all()
            for place, row in enumerate(rows):
                row.status, row.owner, row.lease_until = "running", owner, now + datetime.timedelta(seconds=lease_s)
                row.attempts += 1
                # Jobs claimed together started one after the other, so that the next claim knows whose turn it is.
                row.started_at = now + datetime.timedelta(microseconds=place)
            return [_job(row) for row in rows]

    def renew(self, owner: str, lease_s: float, at_work: Collection[str] | None = None) -> list[str]:
        """Prolong the leases of the jobs and idempotent requests of `owner`; its jobs that are to be cancelled.

        at_work: ids of the jobs that are really being worked on. The others lose their lease in time and are claimed
        anew, such as one whose result could not be recorded while the database was away. None: all.
        """
        until = self._now() + datetime.timedelta(seconds=lease_s)
        with self._writing() as session:
            idempotency.renew(session, owner, until)
            rows = session.scalars(_running(owner).order_by(JobRow.id).with_for_update()).all()
            for row in rows:
                if at_work is None or row.id in at_work:
                    row.lease_until = until
            return [row.id for row in rows if row.cancel_requested]

    def finish_job(
        self,
        job_id: str,
        owner: str,
        status: records.FinalStatus,
        answer: dict[str, Any] | None,
        error: dict[str, Any] | None,
        usage_of_it: records.Usage | None,
        images: Sequence[records.Image],
    ) -> bool:
        """Record the result, what it used, its pictures and the message to its webhook: all or nothing.

        False, and nothing is written, if `owner` no longer has the job: its lease ran out and somebody took it over.
        """
        with self._writing() as session:
            row = session.scalar(_running(owner).where(JobRow.id == job_id).with_for_update())
            if row is None:
                return False
            row.answer, row.error = answer, error
            self._end_job(session, row, status)
            if usage_of_it is not None:
                usage.add(session, usage_of_it)
            for image in images:
                image_rows.put(session, image)
            return True

    def release_jobs(self, owner: str) -> int:
        """Hand the jobs of `owner` back at once: they are queued again, in their old place. How many.

        The attempt does not count. A job that was to be cancelled is.
        """
        with self._writing() as session:
            rows = session.scalars(_running(owner).order_by(JobRow.id).with_for_update()).all()
            for row in rows:
                row.attempts -= 1
                row.status, row.owner, row.lease_until = "queued", None, None
                if row.cancel_requested:
                    self._end_job(session, row, "cancelled")
            return len(rows)

    def _end_job(self, session: orm.Session, row: JobRow, status: records.FinalStatus) -> None:
        row.status, row.finished_at, row.owner, row.lease_until = status, self._now(), None, None
        if row.webhook_url is not None:
            event = f"job.{status}"
            # A thin message: the receiver reads the job, which may be large, for itself.
            data = {"id": row.id, "status": status}
            payload = {"type": event, "timestamp": row.finished_at.isoformat(), "data": data}
            deliveries.add(session, row.id, row.webhook_url, event, payload, row.finished_at)


def _job(row: JobRow) -> records.Job:
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(records.Job)}
    return records.Job(**values)


# --- queries ----------------------------------------------------------------------------------------


def _one(job_id: str, key_id: str | None) -> sqlalchemy.Select[JobRow]:
    query = sqlalchemy.select(JobRow).where(JobRow.id == job_id)
    return query if key_id is None else query.where(JobRow.key_id == key_id)


def _running(owner: str) -> sqlalchemy.Select[JobRow]:
    return sqlalchemy.select(JobRow).where(JobRow.status == "running", JobRow.owner == owner)


def _queued(session: orm.Session) -> int:
    return session.execute(
        sqlalchemy.select(func.count()).select_from(JobRow).where(JobRow.status == "queued")
    ).scalar_one()


def _older_than(session: orm.Session, job_id: str, key_id: str | None) -> sqlalchemy.ColumnElement[bool]:
    last = session.scalar(_one(job_id, key_id))
    if last is None:
        raise UnknownCursor(f"there is no job {job_id!r} to go on after; give the id of a listed job")
    same_time = (JobRow.created_at == last.created_at) & (JobRow.id < last.id)
    return (JobRow.created_at < last.created_at) | same_time


def _abandoned(now: datetime.datetime) -> sqlalchemy.ColumnElement[bool]:
    return (JobRow.status == "running") & (JobRow.lease_until <= now)


def _in_turn(now: datetime.datetime, limit: int) -> sqlalchemy.Select[JobRow]:
    """The next jobs to run, locked. PostgreSQL passes over those that another process is taking just now."""
    claimable = (JobRow.status == "queued") | _abandoned(now)
    others = orm.aliased(JobRow)
    served = sqlalchemy.select(func.max(others.started_at)).where(others.key_id == JobRow.key_id).scalar_subquery()
    turn = func.row_number().over(partition_by=JobRow.key_id, order_by=(JobRow.created_at, JobRow.id))
    line = sqlalchemy.select(JobRow.id, turn.label("turn"), served.label("served")).where(claimable).subquery()
    return (
        sqlalchemy.select(JobRow)
        .join(line, line.c.id == JobRow.id)
        .where(claimable)
        .order_by(line.c.turn, line.c.served.nulls_first(), JobRow.created_at, JobRow.id)
        .limit(limit)
        .with_for_update(of=JobRow, skip_locked=True)
    )
