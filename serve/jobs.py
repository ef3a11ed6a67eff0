"""Durable jobs: accepted into the store, claimed from it, made by the engine, their results recorded once.

A process owns what it has claimed for as long as it renews its lease. When it dies, its lease runs out and another one,
or the same one started again, claims the job and makes it anew: at least once, and since a result is recorded only by
the owner, once in the books.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import hashlib
import logging
import secrets
from collections.abc import Sequence
from typing import Any

import structlog

from serve import errors, patience, receivers, schemas, webhooks
from serve.catalogue import Plan
from serve.engine.requests import Result
from serve.service import Service
from serve.store import (
    FinalStatus,
    Image,
    Job,
    Key,
    StoreError,
    TooManyJobs,
    UnknownCursor,
    Usage,
)

log = logging.getLogger(__name__)

_RENEWALS_PER_LEASE = 3
_IDLE_S = 1.0
_TRIES_TO_WRITE = 6
_CANCELLED, _HANDED_BACK = "cancelled", "handed back"
"""Why a job's task is cancelled; without a word, it is the whole process that ends."""


class Jobs:
    """Accepting, showing and cancelling jobs. worker: of this process, told when there is something to do."""

    def __init__(self, service: Service, worker: "Worker") -> None:
        self._service, self._store, self._worker = service, service.store, worker

    async def create(self, key: Key, body: schemas.JobBody, idempotency_key: str | None = None) -> schemas.JobOut:
        """Accept a job. Raises ServiceError; once this returns, the job survives whatever becomes of the process."""
        await self._service.check_rate(key)
        async with self._service.once(key, idempotency_key, "job", body) as first:
            if first.answer is not None:
                return await self.get(key, first.answer["job"])
            job_id = secrets.token_hex(16)
            if idempotency_key is not None:
                # The same id at each attempt: a crash before the answer is kept makes no second job.
                known = f"{key.id} {idempotency_key} {schemas.fingerprint('job', body)}"
                job_id = hashlib.sha256(known.encode()).hexdigest()[:32]
            job = await self._create(key, body, f"job_{job_id}")
            first.answer = {"job": job.id}
            return job

    async def _create(self, key: Key, body: schemas.JobBody, job_id: str) -> schemas.JobOut:
        settings = self._service.settings
        if body.stream:
            raise errors.InvalidField("stream is not supported for jobs; leave it out", param="stream")
        if body.webhook_url is not None:
            self._check_webhook(body.webhook_url)
        if self._service.engine.draining:
            raise errors.Overloaded("the service is closing; send the request again", code="draining", retry_after_s=1)
        plan = self._service.catalogue.plan(body, key.id)
        # A seed that the service draws is drawn now: a second attempt makes the same images.
        request = body.model_dump(mode="json", exclude={"webhook_url"}) | {"seed": plan.request.seeds[0]}
        async with self._service.budgets.held(key, self._service.predicted_nanousd(plan)):
            try:
                job = await asyncio.to_thread(
                    self._store.add_job,
                    job_id,
                    key.id,
                    request,
                    body.webhook_url,
                    most_queued=settings.max_queued_jobs,
                )
            except TooManyJobs as error:
                raise errors.Overloaded(str(error), retry_after_s=self._queue_s(plan)) from None
        self._worker.wake()
        return await self.show(job)

    def _check_webhook(self, url: str) -> None:
        settings = self._service.settings
        if settings.webhook_secret is None:
            raise errors.InvalidField(
                "webhook_url is not supported by this service: it has no webhook secret to sign with; ask its operator "
                "to set DIFFUSION_KD_WEBHOOK_SECRET",
                param="webhook_url",
            )
        try:
            receivers.check_url(url, allow_private=settings.webhook_allow_private)
        except receivers.WebhookRefused as error:
            raise errors.InvalidField(str(error), param="webhook_url") from None

    def _queue_s(self, plan: Plan) -> float:
        return self._service.engine.predicted_wait_s(plan.tier) + 1

    async def get(self, key: Key, job_id: str) -> schemas.JobOut:
        """Raises NotFound, also for the job of another key."""
        job = await asyncio.to_thread(self._store.get_job, job_id, key.id)
        if job is None:
            raise errors.NotFound("no such job")
        return await self.show(job)

    async def page(self, key: Key, limit: int, after: str | None, status: str | None) -> schemas.JobsOut:
        """Newest first. Raises InvalidField for a cursor that is not one."""
        try:
            jobs, more = await asyncio.to_thread(self._store.list_jobs, key.id, limit, after, status)
        except UnknownCursor as error:
            raise errors.InvalidField(str(error), param="after") from None
        shown = [await self.show(job, links_only=True) for job in jobs]
        return schemas.JobsOut(data=shown, has_more=more, after=jobs[-1].id if more else None)

    async def cancel(self, key: Key, job_id: str) -> schemas.CancelOut:
        """Raises NotFound. A running job of this process leaves the device within one step."""
        outcome = await asyncio.to_thread(self._store.cancel_job, job_id, key.id)
        if outcome is None:
            raise errors.NotFound("no such job")
        self._worker.cancel(job_id)
        return schemas.CancelOut(id=job_id, outcome=outcome)

    async def show(self, job: Job, *, links_only: bool = False) -> schemas.JobOut:
        result = None
        if job.answer is not None:
            try:
                result = await self._service.render(job.answer, links_only=links_only)
            except errors.NotFound:  # its images have expired; what it was remains
                result = await self._service.render(job.answer, links_only=True)
        return schemas.JobOut(
            id=job.id,
            status=job.status,
            created_at=_seconds(job.created_at) or 0,
            started_at=_seconds(job.started_at),
            finished_at=_seconds(job.finished_at),
            attempts=job.attempts,
            request=job.request,
            webhook_url=job.webhook_url,
            result=result,
            error=None if job.error is None else schemas.ErrorBody(**job.error),
        )


class Worker:
    """Carries out jobs, some at a time, beside the requests that somebody waits for."""

    def __init__(self, service: Service, deliverer: "webhooks.Deliverer | None" = None) -> None:
        self._service, self._store, self._deliverer = service, service.store, deliverer
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Event()
        self._claiming, self._claim_lock = True, asyncio.Lock()

    def wake(self) -> None:
        """There may be something to claim."""
        self._news.set()

    def cancel(self, job_id: str) -> None:
        """A job was cancelled: if it runs here, it stops."""
        if job_id in self._tasks:
            self._tasks[job_id].cancel(_CANCELLED)
        elif self._deliverer is not None:
            self._deliverer.wake()

    async def run(self) -> None:
        """Until cancelled. What the store refuses for a while is tried again."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._renew())
            while True:
                try:
                    claimed = await self._claim()
                except StoreError as error:
                    log.warning("jobs cannot be claimed: %s", error)
                    claimed = 0
                if not claimed:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._news.wait(), _IDLE_S)
                self._news.clear()

    async def drain(self, timeout_s: float) -> None:
        """Claim nothing more, give what runs that long, and hand the rest back to the store."""
        self._claiming = False
        async with self._claim_lock:  # what is being claimed is to be handed back too
            pass
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=timeout_s)
        left = list(self._tasks.values())
        for task in left:
            task.cancel(_HANDED_BACK)
        await asyncio.gather(*left, return_exceptions=True)
        try:
            await asyncio.to_thread(self._store.release_jobs, self._service.owner)
        except StoreError as error:
            log.warning("jobs cannot be handed back, and wait for their leases to run out: %s", error)

    async def _claim(self) -> int:
        settings = self._service.settings
        async with self._claim_lock:
            room = settings.job_concurrency - len(self._tasks)
            if room <= 0 or not self._claiming:
                return 0
            claimed = await asyncio.to_thread(self._store.claim_jobs, self._service.owner, room, settings.lease_s)
            for job in claimed:
                task = asyncio.create_task(self._carry_out(job), name=job.id)
                self._tasks[job.id] = task
                task.add_done_callback(lambda _, job_id=job.id: self._done(job_id))  # type: ignore[misc]
            return len(claimed)

    def _done(self, job_id: str) -> None:
        self._tasks.pop(job_id, None)
        self._news.set()

    async def _renew(self) -> None:
        """Keep what is ours, and learn which of it was cancelled through another process."""
        lease_s = self._service.settings.lease_s
        while True:
            await asyncio.sleep(lease_s / _RENEWALS_PER_LEASE)
            try:
                for job_id in await asyncio.to_thread(
                    self._store.renew, self._service.owner, lease_s, list(self._tasks)
                ):
                    self.cancel(job_id)
            except StoreError as error:
                log.warning("leases cannot be renewed: %s", error)

    async def _carry_out(self, job: Job) -> None:
        structlog.contextvars.bind_contextvars(job_id=job.id, key_id=job.key_id)
        try:
            await self._attempt(job)
        except asyncio.CancelledError as error:
            if error.args == (_CANCELLED,):
                await self._finish(job, _Ending("cancelled"))
        except _HandedBack:
            log.info("a job is handed back to the store")
        except errors.ServiceError as error:
            await self._finish(job, _Ending("failed", error=error.envelope()["error"]))
        except Exception:
            log.exception("a job failed")
            await self._finish(job, _Ending("failed", error=errors.Internal("the job failed").envelope()["error"]))

    async def _attempt(self, job: Job) -> None:
        service = self._service
        if job.attempts > service.settings.job_attempts:
            raise errors.Internal(
                f"{service.settings.job_attempts} attempts ended with the process; the job is given up",
                code="too_many_attempts",
            )
        key = await asyncio.to_thread(self._store.get_key, job.key_id)
        if key is None:
            raise errors.Forbidden("the key of this job is gone", code="invalid_api_key")
        # Jobs take turns of their own: many of them do not hold up what their key waits for.
        plan = service.catalogue.plan(schemas.JobBody.model_validate(job.request), f"{key.id} jobs")
        plan, result = await self._make(key, plan)
        bill, file_format = service.bill(plan, result), plan.request.encoding.format
        images = [
            service.pictures.record(key.id, file_format, service.settings.image_ttl_s, job.id) for _ in result.files
        ]
        await patience.patiently(service.pictures.keep, images, result.files, tries=_TRIES_TO_WRITE)
        answer, usage = service.answer(plan, result, bill, images), service.usage(key, plan, bill)
        if await self._finish(job, _Ending("succeeded", answer=answer, usage=usage, images=images)):
            service.count_cost(plan, bill)

    async def _make(self, key: Key, plan: Plan) -> tuple[Plan, Result]:
        """What was accepted waits until there is room. Raises _HandedBack when the service closes."""
        while True:
            try:
                async with self._service.admitted(key, plan, charged=False) as (carried_out, ticket):
                    try:
                        return carried_out, await self._service.outcome(ticket)
                    except asyncio.CancelledError as error:
                        if error.args == (_CANCELLED,):  # whoever takes it back has had this much of the device
                            await self._service.charge_unmade(key, carried_out, ticket)
                        raise
            except errors.Overloaded as error:
                if error.code == "draining":
                    raise _HandedBack from None
                await asyncio.sleep(min(error.retry_after_s or 1.0, patience.MOST_WAIT_S))

    async def _finish(self, job: Job, ending: "_Ending") -> bool:
        """Record how a job ended, unless somebody else has taken it over; whether it was ours."""
        ours = await patience.patiently(
            self._store.finish_job,
            job.id,
            self._service.owner,
            ending.status,
            ending.answer,
            ending.error,
            ending.usage,
            ending.images,
        )
        if not ours:
            log.warning("a job was finished elsewhere first")
            return False
        self._service.metrics.jobs.labels(ending.status).inc()
        if self._deliverer is not None:
            self._deliverer.wake()
        return True


class _HandedBack(Exception):
    """The service closes: the job goes back to the store as it was."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Ending:
    status: FinalStatus
    answer: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    usage: Usage | None = None
    images: Sequence[Image] = ()


def _seconds(moment: datetime.datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())
