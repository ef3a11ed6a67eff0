"""`/v1/jobs`: durable asynchronous work."""

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from serve import deps, errors, schemas
from serve.routes import images

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[Depends(deps.known_query)])

_ID = re.compile(r"job_[0-9a-f]{32}")


def _checked(job_id: str) -> str:
    if not _ID.fullmatch(job_id):
        raise errors.NotFound("no such job")
    return job_id


@router.post(
    "",
    response_model=schemas.JobOut,
    status_code=202,
    responses=deps.refusals(400, 401, 403, 404, 408, 409, 413, 429),
)
async def create(
    body: schemas.JobBody,
    key: deps.Caller,
    jobs: deps.TheJobs,
    idempotency_key: images.IdempotencyKey = None,
) -> Response:
    """Accept a job: it survives restarts, and its result can be fetched until it expires."""
    return await images.accept(jobs, key, body, idempotency_key)


@router.get("", response_model=schemas.JobsOut, responses=deps.refusals(400, 401, 403))
async def page(
    key: deps.Caller,
    jobs: deps.TheJobs,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[
        str | None, Query(pattern=_ID.pattern, min_length=36, max_length=36, description="`after` of the page before")
    ] = None,
    status: Annotated[schemas.JobStatus | None, Query()] = None,
) -> schemas.JobsOut:
    """The caller's jobs, newest first."""
    return await jobs.page(key, limit, after, status)


@router.get("/{job_id}", response_model=schemas.JobOut, responses=deps.refusals(400, 401, 403, 404))
async def get(job_id: str, key: deps.Caller, jobs: deps.TheJobs) -> Response:
    """A job, with its result once it has one."""
    return await deps.written(await jobs.get(key, _checked(job_id)))


@router.post("/{job_id}/cancel", response_model=schemas.CancelOut, responses=deps.refusals(400, 401, 403, 404))
async def cancel(job_id: str, key: deps.Caller, jobs: deps.TheJobs) -> schemas.CancelOut:
    """Take a job back. One that runs ends soon after, unless it is done first: `status` of the job says."""
    return await jobs.cancel(key, _checked(job_id))
