"""`/healthz`, `/readyz`, `/metrics`: for whoever keeps the service running."""

import asyncio

from fastapi import APIRouter, Request, Response

from serve import deps, schemas
from serve.store import StoreError

router = APIRouter(tags=["health"])


@router.get("/healthz", response_model=schemas.HealthOut, responses={503: {"model": schemas.HealthOut}})
async def healthz(request: Request, response: Response, service: deps.TheService) -> schemas.HealthOut:
    """Alive. 503: the device or a background task has failed for good; restart the process."""
    checks = {"engine": "ok" if service.engine.healthy else "images fail one after another"}
    for task in request.app.state.tasks:
        checks[task.get_name()] = "has ended" if task.done() else "ok"
    return _answer(checks, response)


@router.get("/readyz", response_model=schemas.HealthOut, responses={503: {"model": schemas.HealthOut}})
async def readyz(response: Response, service: deps.TheService) -> schemas.HealthOut:
    """Able to serve now. 503: closing, or the database does not answer; send requests elsewhere."""
    checks = {
        "engine": "ok" if service.engine.healthy else "images fail one after another",
        "drain": "closing" if service.engine.draining else "ok",
        "database": "ok",
    }
    try:
        await asyncio.to_thread(service.store.ping)
    except StoreError as error:
        checks["database"] = str(error)
    return _answer(checks, response)


def _answer(checks: dict[str, str], response: Response) -> schemas.HealthOut:
    fine = all(check == "ok" for check in checks.values())
    response.status_code = 200 if fine else 503
    return schemas.HealthOut(status="ok" if fine else "unavailable", checks=checks)


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(service: deps.TheService) -> Response:
    """Prometheus' text format."""
    content, media_type = service.metrics.render()
    return Response(content, headers={"Content-Type": media_type})
