"""`create_app`: the service over HTTP."""

import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

import diffusion_kd
from diffusion_kd.errors import ConfigError
from serve import build, connections, deps, errors, telemetry
from serve.routes import health, images, jobs, keys, models, usage
from serve.settings import Settings
from serve.store import StoreError

log = logging.getLogger(__name__)

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_CODES = {404: "not_found", 405: "method_not_allowed"}
_ABOUT = """Images from text in two tiers: `premium`, a diffusion teacher in many steps, and `turbo`, its distilled
student in one to four. OpenAI's clients work unchanged; what their API lacks is a documented extension."""


def create_app(settings: Settings, built: build.Built | None = None) -> FastAPI:
    """The service as an ASGI app. Its lifespan builds what is behind it, or takes what is built, and closes it.

    Raises ConfigError for settings that do not fit together.
    """
    app = _frame(settings, built)
    for module in (images, models, jobs, usage, keys, health):
        app.include_router(module.router)
    app.openapi = lambda: _reference(app)  # type: ignore[method-assign]
    if _has_playground(settings):
        _add_playground(app, settings, "/playground")
        app.add_route("/playground", lambda _: RedirectResponse("playground/"), include_in_schema=False)
    return app


def create_playground(settings: Settings, built: build.Built | None = None) -> FastAPI:
    """As `create_app`, but the page alone, at the root, and whether it answers. Raises ConfigError without gradio."""
    app = _frame(settings, built, reference=False)
    app.include_router(health.router)
    _has_playground(settings.model_copy(update={"playground": "on"}))
    _add_playground(app, settings, "/")
    return app


def _frame(settings: Settings, built: build.Built | None, *, reference: bool = True) -> FastAPI:
    """What every app of ours has: the service behind it, its errors, its limits, its log. reference: and /docs."""
    build.check(settings)
    app = FastAPI(
        title="diffusion-kd",
        version=diffusion_kd.__version__,
        description=_ABOUT,
        lifespan=lambda app: _lifespan(app, settings, built),
        redoc_url=None,
        openapi_url="/openapi.json" if reference else None,
        redirect_slashes=False,
    )
    app.state.close_page = lambda: None
    metrics = app.state.metrics = telemetry.Metrics() if built is None else built.service.metrics
    _handle_errors(app, metrics)
    app.add_middleware(
        connections.BodyLimit, most_bytes=int(settings.max_body_mb * 1e6), timeout_s=settings.body_timeout_s
    )
    if settings.auth == "none":
        app.add_middleware(_LoopbackOnly)
    app.add_middleware(telemetry.RequestLog, metrics=metrics)
    return app


def _has_playground(settings: Settings) -> bool:
    """Raises ConfigError where it is wanted and its packages are missing."""
    installed = importlib.util.find_spec("gradio") is not None
    if settings.playground == "on" and not installed:
        raise ConfigError("playground is 'on' and gradio is not installed; pip install 'diffusion-kd[app]'")
    return installed and settings.playground != "off"


def _add_playground(app: FastAPI, settings: Settings, path: str) -> None:
    # Here, because gradio takes seconds to import and a service without a playground need not have it.
    from serve.playground import page
    from serve.playground.stage import Stage

    stage = Stage(lambda: app.state.service, settings.runs_folder)
    app.state.close_page = page.mount(app, stage, path, keys=settings.auth == "keys", public=build.public_url(settings))


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI, settings: Settings, built: build.Built | None) -> AsyncIterator[None]:
    parts = built if built is not None else await asyncio.to_thread(build.build, settings, app.state.metrics)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(parts.close)
        app.state.service, app.state.jobs = parts.service, parts.jobs
        app.state.tasks = parts.start()
        if not await parts.limiter.ping():
            log.warning("the rate limits' Redis does not answer: requests pass unlimited until it does")
        if settings.otlp_endpoint is not None:
            stack.callback(telemetry.start_tracing(settings.otlp_endpoint, app))
        log.info("ready", extra={"url": build.public_url(settings)})
        yield


# --- errors -----------------------------------------------------------------------------------------


def _handle_errors(app: FastAPI, metrics: telemetry.Metrics) -> None:
    def refuse(request: Request, error: errors.ServiceError) -> Response:
        metrics.errors.labels(error.code).inc()
        envelope = error.envelope(request.state.request_id)
        return JSONResponse(envelope, status_code=error.status, headers=error.headers)

    @app.exception_handler(errors.ServiceError)
    async def of_service(request: Request, error: errors.ServiceError) -> Response:
        return refuse(request, error)

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> Response:
        return refuse(request, invalid(error))

    @app.exception_handler(StoreError)
    async def of_store(request: Request, error: StoreError) -> Response:
        log.error("the store refuses: %s", error)
        return refuse(
            request, errors.Overloaded("the database does not answer", code="store_unavailable", retry_after_s=5)
        )

    @app.exception_handler(deps.ClientLeft)
    async def of_client(request: Request, error: deps.ClientLeft) -> Response:
        return Response(status_code=telemetry.CLIENT_GONE)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        code = _CODES.get(error.status_code, "invalid_request")
        content = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": code}
        if error.status_code == 400:  # all that FastAPI raises with it: a body beyond the limits of its parser
            content |= {"message": "the body is not JSON that can be read", "code": "invalid_json"}
        headers = {"Allow": ", ".join(_allowed(request))} if error.status_code == 405 else error.headers
        return JSONResponse({"error": content}, status_code=error.status_code, headers=headers)

    @app.exception_handler(Exception)
    async def of_us(request: Request, error: Exception) -> Response:
        answer = refuse(request, errors.Internal("the service failed"))
        answer.headers["X-Request-ID"] = request.state.request_id  # this handler stands outside all middleware
        return answer


def _allowed(request: Request) -> list[str]:
    """The methods of a path; Starlette tells those of one route, and a path may have several."""
    routes, scope = request.app.routes, dict(request.scope)
    return [
        method
        for method in _METHODS
        if any(route.matches(scope | {"method": method})[0] is Match.FULL for route in routes)
    ]


def invalid(error: RequestValidationError) -> errors.InvalidField:
    """The first thing that is wrong, with the field's name and what was given."""
    first = error.errors()[0]
    param = ".".join(map(str, first["loc"][1:])) if len(first["loc"]) > 1 else None  # after body, query or header
    if first["type"] == "json_invalid":
        return errors.InvalidField("the body is not JSON", code="invalid_json")
    if param is None:
        return errors.InvalidField("the body must be a JSON object, sent with Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        return errors.InvalidField(
            f"{_ascii(param)} is not supported; leave it out", param=_ascii(param), code="unsupported_parameter"
        )
    if first["type"] == "missing":
        return errors.InvalidField(f"{param} is missing", param=param, code="missing_required_parameter")
    given = f"; given was {_ascii(repr(first['input']))}" if isinstance(first["input"], str | int | float) else ""
    return errors.InvalidField(f"{_ascii(param)}: {_ascii(first['msg'])}{given}", param=_ascii(param))


def _ascii(text: str, most: int = 120) -> str:
    """What can be sent whatever was received: JSON may hold halves of characters."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= most else f"{plain[:most]}..."


class _LoopbackOnly:
    """Refuses requests for other hosts, where no keys are asked for.

    Only this machine can connect, but a web page in its browser can too: a name that resolves to 127.0.0.1 (DNS
    rebinding) would let strangers' scripts in.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_local(Headers(scope=scope).get("host", "")):
            message = "this service has no keys and answers to localhost alone; see --auth keys"
            await JSONResponse(errors.Forbidden(message, code="host_not_allowed").envelope(), 403)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_local(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if host.rsplit("]", 1)[-1].startswith(":") or host.count(":") == 1 else host
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _reference(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document. FastAPI lists 422 everywhere; here what does not validate is 400."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
