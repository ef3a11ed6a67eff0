"""What the service tells about itself: logs, metrics, and traces where they are asked for.

Every module logs with `logging.getLogger(__name__)`; `configure_logging` decides how all of it looks, uvicorn's and
other libraries' lines alike. What is bound to structlog's context variables (`request_id`, `key_id`, `job_id`) stands
on every line written in that context.
"""

import asyncio
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any, Literal

import prometheus_client
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion_kd import errors

logger = logging.getLogger(__name__)

LEVELS = ("debug", "info", "warning", "error")

CLIENT_GONE = 499
"""Status in logs and metrics of a request whose client left before its answer was complete; never sent."""

_CLIENTS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# --- logs -------------------------------------------------------------------------------------------


def configure_logging(form: Literal["json", "console"], level: str = "info") -> None:
    """Send every log line of the process to stderr, one event a line.

    form: `json` for machines, `console` for people. level: one of `LEVELS`; less important lines are dropped.
    May be called again; the last call counts. uvicorn is to be given `log_config=None`, or it undoes this; its access
    log is silenced, since `RequestLog` writes a line for each request.
    Raises ConfigError for another form or level.
    """
    errors.require(form in ("json", "console"), "log format", form, "json or console")
    errors.require(level in LEVELS, "log level", level, "one of " + ", ".join(LEVELS))
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _without_colour,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(form)],
        )
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    # They tell of every connection and request of ours to others, and of every look at the schema.
    for name in ("alembic", "httpcore", "httpx", "botocore", "s3fs"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _without_colour(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """uvicorn gives its messages a second time, with colours."""
    event.pop("color_message", None)
    return event


def _renderers(form: str) -> list[structlog.typing.Processor]:
    """Stack traces hold no values of variables, which may be prompts or keys."""
    if form == "json":
        return [
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ]
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]


# --- metrics ----------------------------------------------------------------------------------------

SECONDS_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0),
)
ROWS_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """The service's metrics, in a registry of their own, so that two apps in one process do not mix.

    Names begin with `diffusion_kd_`. Labels take few values each: tiers, stages, route templates, codes, outcomes.
    """

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self.registry)
        self.queue_depth = self._gauge("queue_depth", "Images that wait", "tier")
        self.active_images = self._gauge("active_images", "Images that are being denoised", "tier")
        self.queue_wait_seconds = self._seconds("queue_wait_seconds", "From arrival to the first step", "tier")
        self.batch_rows = self._histogram(
            "batch_rows", "Rows of the network's input in a pass; a guided image has two", ROWS_BUCKETS, "tier"
        )
        self.step_seconds = self._seconds("step_seconds", "One denoising step of a batch", "tier")
        self.stage_seconds = self._seconds("stage_seconds", "Text, denoise, decode or encode", "stage", "tier")
        self.request_seconds = self._seconds("request_seconds", "HTTP requests", "route", "method", "status")
        self.images = self._counter("images", "Images made", "tier")
        self.errors = self._counter("errors", "Error answers by code", "code")
        self.cost_usd = self._counter("cost_usd", "Cost of requests, in US dollars", "tier")
        self.jobs = self._counter("jobs", "Jobs that ended, by status", "status")
        self.webhook_deliveries = self._counter("webhook_deliveries", "Attempts to deliver webhooks", "outcome")
        self.out_of_memory = self._counter("out_of_memory", "Batches that exceeded the device's memory", "tier")
        self.prompt_cache = self._counter("prompt_cache", "Look-ups of encoded prompts", "result")
        self.event_loop_tasks = self._gauge("event_loop_tasks", "Tasks of the event loop in which this is read")
        self.event_loop_tasks.set_function(_tasks)

    def watch_queue(self, tier: str, waiting: Callable[[], float]) -> None:
        """Ask `waiting` how many images wait whenever the metrics are read. It is called in the reader's thread."""
        self.queue_depth.labels(tier).set_function(waiting)

    def watch_active(self, tier: str, active: Callable[[], float]) -> None:
        """As `watch_queue`, for the images that are being denoised."""
        self.active_images.labels(tier).set_function(active)

    def render(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, and that format's content type."""
        return prometheus_client.generate_latest(self.registry), prometheus_client.CONTENT_TYPE_PLAIN_0_0_4

    def _gauge(self, name: str, what: str, *labels: str) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(f"diffusion_kd_{name}", what, labels, registry=self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> prometheus_client.Counter:
        return prometheus_client.Counter(f"diffusion_kd_{name}", what, labels, registry=self.registry)

    def _seconds(self, name: str, what: str, *labels: str) -> prometheus_client.Histogram:
        return self._histogram(name, f"{what}, in seconds", SECONDS_BUCKETS, *labels)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...], *labels: str) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(
            f"diffusion_kd_{name}", what, labels, buckets=buckets, registry=self.registry
        )


def _tasks() -> float:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # no loop runs in the reader's thread
        return 0


# --- traces -----------------------------------------------------------------------------------------


def start_tracing(endpoint: str, app: Any) -> Callable[[], None]:
    """Send a trace of each request of a FastAPI app to an OpenTelemetry collector.

    endpoint: where the collector takes traces over HTTP, such as http://localhost:4318/v1/traces.
    Returns what to call at the end, which sends the traces that are left.
    Raises ConfigError where the packages of the extra `otel` are missing.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise errors.ConfigError(
            f"traces were asked for, but {error.name} is not installed; install the extra otel, "
            "such as pip install 'diffusion-kd[otel]', or leave the endpoint out"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "diffusion-kd"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls="/healthz,/readyz,/metrics")

    def stop() -> None:
        FastAPIInstrumentor.uninstrument_app(app)
        provider.shutdown()

    return stop


# --- requests ---------------------------------------------------------------------------------------


class RequestLog:
    """ASGI middleware, to be outermost: an id, a line in the log and an observation for each request.

    The id is the client's X-Request-ID where that is 1 to 64 of A-Z, a-z, 0-9, `.`, `_` and `-`, else a new one. It is
    bound to the log's context, stands in `scope["state"]["request_id"]` and is answered as X-Request-ID. Nothing is
    buffered. Only route templates and known methods become labels: a stranger cannot make metrics grow.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope, receive, send)
        # A pipelined request is handled in a copy of the context of the one before. At the end nothing is cleared, so
        # that what servers log of a failed request has its id.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request.id)
        try:
            await self._app(scope, request.receive, request.send)
        finally:
            self._note(request)

    def _note(self, request: "_Request") -> None:
        taken_s, route = time.perf_counter() - request.started_s, request.route
        logger.info(
            "request",
            extra={
                "method": request.method,
                "route": route,
                "status": request.outcome,
                "duration_ms": round(1000 * taken_s, 1),
            },
        )
        self._metrics.request_seconds.labels(route, request.method, str(request.outcome)).observe(taken_s)


class _Request:
    """What is seen of one request and its answer as they pass by."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._root = scope.get("root_path", "")
        self.id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = self.id
        self.method = scope["method"] if scope["method"] in _METHODS else "other"
        self.started_s = time.perf_counter()
        self.status: int | None = None
        self.complete = self.gone = False

    @property
    def outcome(self) -> int:
        """The status that was sent; 499 if the client left before the end, 500 if the app failed before its answer."""
        if self.gone:
            return CLIENT_GONE
        return 500 if self.status is None else self.status

    @property
    def route(self) -> str:
        """The route's template, with where its app is mounted before it; known once the app has run."""
        path = getattr(self._scope.get("route"), "path", None)
        if path is None:
            return "unmatched"
        return f"{self._scope.get('root_path', '').removeprefix(self._root)}{path}"

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.complete:
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            others = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"x-request-id"]
            message = {**message, "headers": [*others, (b"x-request-id", self.id.encode())]}
        try:
            await self._send(message)
        except OSError:  # so a server tells an app that its client is gone
            self.gone = not self.complete
            raise
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name.lower() == b"x-request-id" and _CLIENTS_ID.fullmatch(given := value.decode("latin-1")):
            return str(given)
    return uuid.uuid4().hex
