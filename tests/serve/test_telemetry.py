"""What the service tells about itself, read back."""

import asyncio
import http.server
import json
import logging
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import fastapi
import fastapi.testclient
import pytest
import structlog
from fastapi import responses
from prometheus_client import parser
from starlette.types import Message, Receive, Scope, Send

from diffusion_kd import errors
from serve import telemetry

# --- logs -------------------------------------------------------------------------------------------


@pytest.fixture
def logs_as_before() -> Iterator[None]:
    """Undo what configure_logging does to the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).propagate = True
    for name in ("httpcore", "httpx", "botocore", "s3fs"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.usefixtures("logs_as_before")
def test_lines_of_all_loggers_look_alike(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("json")
    structlog.contextvars.bind_contextvars(request_id="r1", key_id="k1")
    logging.getLogger("serve.jobs").info("job %s", "j1", extra={"tier": "turbo"})
    logging.getLogger("uvicorn.error").warning("careful", extra={"color_message": "\x1b[31mcareful"})
    structlog.get_logger("serve.engine").info("step", rows=3)
    logging.getLogger("uvicorn.access").info("GET /secret")
    job, careful, step = logged(capsys)
    assert job.pop("timestamp").endswith("Z")
    bound = {"request_id": "r1", "key_id": "k1"}
    assert job == {"message": "job j1", "level": "info", "logger": "serve.jobs", "tier": "turbo", **bound}
    assert careful["message"] == "careful" and careful.keys() == job.keys() - {"tier"} | {"timestamp"}
    assert step["message"] == "step" and step["rows"] == 3 and step["request_id"] == "r1"


@pytest.mark.usefixtures("logs_as_before")
def test_a_stack_trace_is_one_line_without_values(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("json")
    prompt = "-".join(["private", "words"])
    try:
        raise ValueError(len(prompt))
    except ValueError:
        logging.getLogger("serve").exception("broke")
    (line,) = logged(capsys)
    assert line["message"] == "broke" and "ValueError: 13" in line["exception"] and prompt not in line["exception"]


@pytest.mark.usefixtures("logs_as_before")
def test_nor_does_a_stack_trace_for_people_hold_values(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("console")
    prompt = "-".join(["private", "words"])
    try:
        raise ValueError(len(prompt))
    except ValueError:
        logging.getLogger("serve").exception("broke")
    told = capsys.readouterr().err
    assert "ValueError: 13" in told and prompt not in told


@pytest.mark.usefixtures("logs_as_before")
def test_levels_below_the_chosen_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("json", "warning")
    for log in (logging.getLogger("serve").info, structlog.get_logger("serve").info, logging.getLogger("s").warning):
        log("told")
    assert [line["level"] for line in logged(capsys)] == ["warning"]


@pytest.mark.usefixtures("logs_as_before")
def test_console_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("console")
    logging.getLogger("serve").info("ready", extra={"tier": "turbo"})
    told = capsys.readouterr().err
    assert "ready" in told and "tier=turbo" in told and "\x1b" not in told


@pytest.mark.parametrize(("form", "level"), [("xml", "info"), ("json", "loud"), ("json", "INFO")])
def test_unknown_formats_and_levels_are_refused(form: Any, level: str) -> None:
    with pytest.raises(errors.ConfigError, match="it must be"):
        telemetry.configure_logging(form, level)


# --- metrics ----------------------------------------------------------------------------------------


def samples(metrics: telemetry.Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of a rendering, by its name and labels."""
    families = parser.text_string_to_metric_families(metrics.render()[0].decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def sample(metrics: telemetry.Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((f"diffusion_kd_{name}", frozenset(labels.items())))


def test_what_was_observed_is_rendered() -> None:
    metrics = telemetry.Metrics()
    waiting = [3]
    metrics.watch_queue("turbo", lambda: waiting[0])
    metrics.watch_active("turbo", lambda: 2)
    metrics.images.labels("turbo").inc(4)
    metrics.cost_usd.labels("premium").inc(0.25)
    metrics.stage_seconds.labels("decode", "turbo").observe(0.03)
    assert metrics.render()[1].startswith("text/plain; version=0.0.4")
    assert sample(metrics, "queue_depth", tier="turbo") == 3
    assert sample(metrics, "active_images", tier="turbo") == 2
    assert sample(metrics, "images_total", tier="turbo") == 4
    assert sample(metrics, "cost_usd_total", tier="premium") == 0.25
    assert sample(metrics, "stage_seconds_bucket", stage="decode", tier="turbo", le="0.02") == 0
    assert sample(metrics, "stage_seconds_bucket", stage="decode", tier="turbo", le="0.05") == 1
    waiting[0] = 5
    assert sample(metrics, "queue_depth", tier="turbo") == 5


def test_two_registries_do_not_mix() -> None:
    one, other = telemetry.Metrics(), telemetry.Metrics()
    one.jobs.labels("succeeded").inc()
    assert sample(one, "jobs_total", status="succeeded") == 1
    assert sample(other, "jobs_total", status="succeeded") is None


# --- requests ---------------------------------------------------------------------------------------


def app() -> fastapi.FastAPI:
    """A few routes to watch: plain, on a router, mounted, streamed and failing."""
    made, mounted, router = fastapi.FastAPI(), fastapi.FastAPI(), fastapi.APIRouter(prefix="/v1")

    @router.get("/jobs/{job_id}")
    async def job(job_id: str, request: fastapi.Request) -> dict[str, str]:
        structlog.contextvars.bind_contextvars(key_id="k1")
        return {"id": request.state.request_id}

    @made.get("/stream")
    async def stream() -> responses.StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for chunk in (b"one", b"two"):
                yield chunk

        return responses.StreamingResponse(chunks())

    @made.get("/broken")
    async def broken() -> None:
        raise RuntimeError("broken")

    @mounted.get("/page/{name}")
    async def page(name: str) -> str:
        return name

    made.include_router(router)
    made.mount("/playground", mounted)
    return made


@pytest.fixture
def metrics() -> telemetry.Metrics:
    return telemetry.Metrics()


@pytest.fixture
def client(metrics: telemetry.Metrics) -> fastapi.testclient.TestClient:
    return fastapi.testclient.TestClient(telemetry.RequestLog(app(), metrics), raise_server_exceptions=False)


def observed(metrics: telemetry.Metrics) -> dict[tuple[str, str, str], float]:
    """(route, method, status) -> requests."""
    return {
        (labels["route"], labels["method"], labels["status"]): count
        for (name, pairs), count in samples(metrics).items()
        if name == "diffusion_kd_request_seconds_count" and (labels := dict(pairs))
    }


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v1/jobs/17", ("/v1/jobs/{job_id}", "GET", "200")),
        ("GET", "/stream", ("/stream", "GET", "200")),
        ("GET", "/playground/page/x", ("/playground/page/{name}", "GET", "200")),
        ("GET", "/nowhere/17", ("unmatched", "GET", "404")),
        ("GET", "/playground/nowhere", ("unmatched", "GET", "404")),
        ("GET", "/broken", ("/broken", "GET", "500")),
        ("BREW", "/nowhere", ("unmatched", "other", "404")),
    ],
)
def test_requests_are_observed_by_template(
    method: str, path: str, expected: tuple[str, str, str], client: Any, metrics: telemetry.Metrics
) -> None:
    client.request(method, path)
    assert observed(metrics) == {expected: 1}


@pytest.mark.parametrize("given", ["a", "Trace.1_2-3", "x" * 64])
def test_a_fitting_id_of_the_client_is_kept(given: str, client: Any) -> None:
    answer = client.get("/v1/jobs/17", headers={"X-Request-ID": given})
    assert answer.headers["x-request-id"] == given == answer.json()["id"]


@pytest.mark.parametrize("given", [None, "", "x" * 65, "two words", "a\tb", "ä", "a;b"])
def test_any_other_id_is_replaced(given: str | None, client: Any) -> None:
    headers = {} if given is None else {"X-Request-ID": given.encode("latin-1")}
    answers = [client.get("/v1/jobs/17", headers=headers) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2 and given not in ids
    assert all(len(made) == 32 and made.isalnum() for made in ids)


def test_a_failed_request_answers_its_id_too(client: Any) -> None:
    answer = client.get("/broken", headers={"X-Request-ID": "mine"})
    assert answer.status_code == 500 and answer.headers["x-request-id"] == "mine"


@pytest.mark.usefixtures("logs_as_before")
def test_a_request_is_one_line_with_what_was_bound_meanwhile(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("json")
    client.get("/v1/jobs/17?token=secret", headers={"X-Request-ID": "mine"})
    client.get("/stream")
    told = [line for line in logged(capsys) if line["logger"] == "serve.telemetry"]
    assert [line["route"] for line in told] == ["/v1/jobs/{job_id}", "/stream"]
    first, second = told
    assert first["message"] == "request" and first["method"] == "GET" and first["status"] == 200
    assert first["request_id"] == "mine" and first["key_id"] == "k1" and first["duration_ms"] > 0
    assert "key_id" not in second and "secret" not in json.dumps(told)


async def _quiet(_: Message) -> None:
    pass


def run_bare(inner: Any, receive: Receive, send: Send, metrics: telemetry.Metrics) -> None:
    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(telemetry.RequestLog(inner, metrics)(scope, receive, send))


async def _disconnect() -> Message:
    return {"type": "http.disconnect"}


def test_a_client_that_leaves_is_499(metrics: telemetry.Metrics) -> None:
    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b""})

    run_bare(inner, _disconnect, _quiet, metrics)
    assert observed(metrics) == {("unmatched", "GET", "499"): 1}


def test_the_end_of_a_connection_after_its_answer_is_no_499(metrics: telemetry.Metrics) -> None:
    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        await receive()

    run_bare(inner, _disconnect, _quiet, metrics)
    assert observed(metrics) == {("unmatched", "GET", "201"): 1}


def test_a_server_that_cannot_send_is_499(metrics: telemetry.Metrics) -> None:
    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def broken_pipe(_: Message) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_bare(inner, _disconnect, broken_pipe, metrics)
    assert observed(metrics) == {("unmatched", "GET", "499"): 1}


def test_an_answer_passes_as_it_comes(metrics: telemetry.Metrics) -> None:
    """A chunk reaches the server before the app makes the next."""
    events: list[str] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3):
            events.append(f"made {number}")
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": number < 2})

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            events.append(f"sent {message['body'].decode()}")

    run_bare(inner, _disconnect, send, metrics)
    assert events == ["made 0", "sent 0", "made 1", "sent 1", "made 2", "sent 2"]


def test_nothing_that_one_request_bound_is_left_to_the_next(metrics: telemetry.Metrics) -> None:
    bound: list[dict[str, Any]] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        bound.append(structlog.contextvars.get_contextvars())
        structlog.contextvars.bind_contextvars(key_id="k1")

    async def both() -> None:
        for given in (b"one", b"two"):
            headers = [(b"x-request-id", given)]
            scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
            await telemetry.RequestLog(inner, metrics)(scope, _disconnect, _quiet)
        # What the server logs of it afterwards still has its id.
        bound.append(structlog.contextvars.get_contextvars())

    asyncio.run(both())
    assert bound == [{"request_id": "one"}, {"request_id": "two"}, {"request_id": "two", "key_id": "k1"}]


# --- traces -----------------------------------------------------------------------------------------


class Collector(http.server.BaseHTTPRequestHandler):
    got: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        self.got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_traces_reach_a_collector() -> None:
    pytest.importorskip("opentelemetry.instrumentation.fastapi")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    handler = type("Handler", (Collector,), {"got": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        traced = app()
        stop = telemetry.start_tracing(f"http://127.0.0.1:{server.server_address[1]}/v1/traces", traced)
        fastapi.testclient.TestClient(traced).get("/playground/page/17")
        stop()
        server.shutdown()
    ((path, sent),) = handler.got  # type: ignore[attr-defined]
    assert path == "/v1/traces" and b"diffusion-kd" in sent
    assert b"/playground" in sent


def test_without_its_packages_tracing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(errors.ConfigError, match=r"diffusion-kd\[otel\]"):
        telemetry.start_tracing("http://localhost:4318/v1/traces", fastapi.FastAPI())
