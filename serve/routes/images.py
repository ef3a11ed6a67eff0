"""`/v1/images`: generate, stream, and fetch."""

import asyncio
import json
import logging
import re
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve import deps, errors, schemas
from serve.engine import encoding
from serve.jobs import Jobs
from serve.service import Event
from serve.store import Key

log = logging.getLogger(__name__)
router = APIRouter(tags=["images"], dependencies=[Depends(deps.known_query)])

_EVENT = {
    "type": "object",
    "description": "With `stream`: one of these for each preview and image; `data` is JSON.",
    "properties": {
        "event": {"enum": ["image_generation.partial_image", "image_generation.completed", "error"]},
        "data": {"type": "string"},
    },
    "required": ["event", "data"],
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_NO_BUFFERING = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_FILE_HEADERS = {
    "Cache-Control": "private, max-age=3600",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'",
}

_ID = re.compile(r"img_[0-9a-f]{40}")
_SILENCE_S = 15.0
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[\x21-\x7e]{1,255}$",
        description="A repeated key returns the first answer and generates nothing, for 24 hours.",
    ),
]
Prefer = Annotated[
    str | None, Header(alias="Prefer", max_length=200, description="`respond-async`: answer 202 with a job.")
]


@router.post(
    "/v1/images/generations",
    response_model=schemas.ImagesOut,
    response_model_exclude_none=True,
    responses={
        200: {"content": {"text/event-stream": {"schema": _EVENT}}},
        202: {"model": schemas.JobOut, "description": "Accepted as a job."},
        **deps.refusals(400, 401, 403, 404, 408, 409, 413, 429),
    },
)
async def generate(
    request: Request,
    body: schemas.GenerationBody,
    key: deps.Caller,
    service: deps.TheService,
    jobs: deps.TheJobs,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> Response:
    """Generate images now; as server-sent events with `stream`; as a job with `Prefer: respond-async`."""
    if "respond-async" in [part.split(";")[0].strip().lower() for part in (prefer or "").split(",")]:
        return await accept(jobs, key, schemas.JobBody(**body.model_dump()), idempotency_key)
    if body.stream:
        events = service.stream(key, body, idempotency_key)
        await deps.until_left(request, _first(events))
        return _Events(request, events)
    answer = await deps.until_left(request, service.generate(key, body, idempotency_key))
    served = {"X-Tier-Served": answer.model}
    return await deps.written(answer, headers=served)


async def accept(jobs: Jobs, key: Key, body: schemas.JobBody, idempotency_key: str | None) -> Response:
    """Answer 202 with a new job."""
    job = await jobs.create(key, body, idempotency_key)
    headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
    return await deps.written(job, status_code=202, headers=headers)


@router.get(
    "/v1/images/{image_id}",
    response_class=Response,
    responses={
        200: {"content": dict.fromkeys(encoding.MEDIA_TYPES.values(), _BINARY)},
        **deps.refusals(400, 404),
    },
)
async def fetch(image_id: str, service: deps.TheService) -> Response:
    """The bytes of an image, until it expires. Its id is its secret: as with OpenAI's links, no key is asked for."""
    if not _ID.fullmatch(image_id):
        raise errors.NotFound("no such image; it may have expired")
    file, media_type = await asyncio.to_thread(service.pictures.read, image_id)
    return Response(file, media_type=media_type, headers=_FILE_HEADERS)


async def _first(events: AsyncIterator[Event | None]) -> None:
    """Wait until a stream is admitted; what is refused is refused before the answer begins."""
    admitted = await anext(events)
    assert admitted is None, "a stream begins when it is admitted"


async def _sent(request: Request, events: AsyncGenerator[Event | None]) -> AsyncGenerator[bytes]:
    """Server-sent events, with a comment when nothing happens for a while, lest a proxy closes the connection."""
    left = asyncio.ensure_future(deps.left(request))
    following = asyncio.ensure_future(_next(events))
    try:
        while True:
            happened, _ = await asyncio.wait((left, following), timeout=_SILENCE_S, return_when=FIRST_COMPLETED)
            if left in happened:
                return
            if not happened:
                yield b": waiting\n\n"
                continue
            if (event := following.result()) is None:
                return
            yield f"event: {event.type}\ndata: {event.model_dump_json(exclude_none=True)}\n\n".encode()
            following = asyncio.ensure_future(_next(events))
    except errors.ServiceError as error:
        yield _failure(error, request)
    except Exception:
        log.exception("a stream failed")
        yield _failure(errors.Internal("the stream failed"), request)
    finally:
        for task in (left, following):
            task.cancel()
        await asyncio.gather(left, following, return_exceptions=True)
        await events.aclose()


class _Events(StreamingResponse):
    """Ends its events when it ends. Starlette leaves a client that never reads to the garbage collector."""

    def __init__(self, request: Request, events: AsyncGenerator[Event | None]) -> None:
        self._events, self._sent = events, _sent(request, events)
        super().__init__(self._sent, media_type="text/event-stream", headers=_NO_BUFFERING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._sent.aclose()
            await self._events.aclose()  # of a response that never began


async def _next(events: AsyncIterator[Event | None]) -> Event | None:
    return await anext(events, None)


def _failure(error: errors.ServiceError, request: Request) -> bytes:
    request.app.state.metrics.errors.labels(error.code).inc()
    return f"event: error\ndata: {json.dumps(error.envelope(request.state.request_id))}\n\n".encode()
