"""What handlers are given: the service, and whose request it is; and what frees the device when a client leaves."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

import structlog
from fastapi import Depends, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from serve import errors, schemas
from serve.jobs import Jobs
from serve.service import LARGE, Service, in_thread_if
from serve.store import Key

_bearer = HTTPBearer(auto_error=False, description="An API key, where the service asks for keys.")
T = TypeVar("T")


class ClientLeft(Exception):
    """The client closed the connection before its answer; nobody reads what would be sent."""


# Asynchronous, though they wait for nothing: FastAPI runs others in threads.
async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


TheService = Annotated[Service, Depends(_service)]
TheJobs = Annotated[Jobs, Depends(_jobs)]


def _caller(scope: str) -> Callable[..., Coroutine[Any, Any, Key]]:
    async def caller(
        service: TheService, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
    ) -> Key:
        key = await service.authenticate(None if credentials is None else credentials.credentials)
        structlog.contextvars.bind_contextvars(key_id=key.id)
        if scope not in key.scopes:
            raise errors.Forbidden(f"the key lacks the scope {scope!r}; it has {', '.join(sorted(key.scopes))}")
        return key

    return caller


Caller = Annotated[Key, Depends(_caller("generate"))]
Admin = Annotated[Key, Depends(_caller("admin"))]


async def known_query(request: Request) -> None:
    """Refuses query parameters that the route does not have: a filter with a slip in its name must not show all."""
    known = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            param = ascii(name)[1:-1][:100]
            raise errors.InvalidField(
                f"{param} is not supported; leave it out", param=param, code="unsupported_parameter"
            )


async def until_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The outcome of `work`, which is cancelled when the client closes the connection. Raises ClientLeft."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def left(request: Request) -> None:
    """Returns when the client is gone. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def written(answer: schemas.ImagesOut | schemas.JobOut, **options: Any) -> Response:
    """A JSON answer; one that holds large images is written by another thread. Further options are the Response's."""
    images = answer if isinstance(answer, schemas.ImagesOut) else answer.result
    size = sum(len(image.b64_json or "") for image in images.data) if images is not None else 0
    leave_out = isinstance(answer, schemas.ImagesOut)
    write = functools.partial(answer.model_dump_json, exclude_none=leave_out)
    content = await in_thread_if(size > LARGE, write)
    return Response(content, media_type="application/json", **options)


_MEANINGS = {
    400: "A field is malformed, out of range, or not honoured by the tier; `param` names it.",
    401: "No key, or one that is not known.",
    403: "The key lacks the scope.",
    404: "No such model, job, image or key.",
    408: "The body did not come in time.",
    409: "The Idempotency-Key was used for another request.",
    413: "The body is too large.",
    429: "The key's rate or budget is spent.",
    500: "Ours; the message has the id of the request.",
    503: "The queue is full, the service closes, or its database does not answer.",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer beside success, for the reference."""
    return {status: {"model": schemas.ErrorOut, "description": _MEANINGS[status]} for status in (*statuses, 500, 503)}
