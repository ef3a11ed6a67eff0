"""A real service for tests from outside: the shapes models behind a real uvicorn on a free port.

Where these name real ones, the service stands on them, and the same tests must pass:
DIFFUSION_KD_TEST_POSTGRES: a PostgreSQL URL; each service has a schema of its own there.
DIFFUSION_KD_TEST_REDIS: a Redis URL for the rate limits.
DIFFUSION_KD_TEST_S3: http://endpoint|accesskey|secretkey|bucket; each service has a prefix of its own there.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import PIL.Image
import sqlalchemy
import uvicorn
from fastapi import FastAPI

from serve import api, build, connections
from serve.settings import Settings

ADMIN = "dkd_the-admin-key-of-the-tests"
PROMPT = "a large red circle left of a small blue square"


@dataclasses.dataclass
class Live:
    """A running service."""

    settings: Settings
    app: FastAPI
    built: build.Built
    url: str
    _clients: list[httpx.Client] = dataclasses.field(default_factory=list)

    def client(self, secret: str | None = ADMIN) -> httpx.Client:
        """Requests with a key, or with none. Closed with the service."""
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)
        self._clients.append(client)
        return client

    def new_key(self, **body: Any) -> dict[str, Any]:
        """A new key of the `generate` scope, as it is shown once."""
        answer = self.client().post("/v1/admin/keys", json={"name": "tester", **body})
        assert answer.status_code == 201, answer.text
        shown: dict[str, Any] = answer.json()
        return shown

    def user(self, **body: Any) -> httpx.Client:
        """Requests with a key that nobody else has."""
        return self.client(self.new_key(**body)["secret"])

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels, as Prometheus would read them."""
        total = 0.0
        for line in self.client(None).get("/metrics").text.splitlines():
            sample = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if sample is not None and sample[1] == f"diffusion_kd_{name}":
                found = dict(re.findall(r'(\w+)="([^"]*)"', sample[2] or ""))
                total += float(sample[3]) if labels.items() <= found.items() else 0.0
        return total

    def passes(self, tier: str) -> int:
        """Passes of a tier's network since the start."""
        return int(self.metric("batch_rows_count", tier=tier))

    def until(self, condition: Callable[[], bool], timeout_s: float = 20) -> None:
        end_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end_s, "it did not happen in time"
            time.sleep(0.02)

    def until_idle(self) -> None:
        engine = self.built.service.engine
        self.until(lambda: not any(engine.queued(tier) + engine.active(tier) for tier in engine.models))

    @contextlib.contextmanager
    def occupied(self, images: int = 2, by: httpx.Client | None = None) -> Iterator[httpx.Response]:
        """Keeps the premium tier busy with a stream of images, 100 steps each, for the block's time.

        by: whose stream it is; None: somebody else's, beside whose one further request of the caller has its turn.
        """
        body = {"model": "premium", "prompt": PROMPT, "n": images, "num_inference_steps": 100, "stream": True}
        with (by or self.user()).stream("POST", "/v1/images/generations", json=body) as admitted:
            assert admitted.status_code == 200
            yield admitted
        self.until_idle()

    def close_clients(self) -> None:
        for client in self._clients:
            client.close()


Create = Callable[[Settings, build.Built], FastAPI]


@contextlib.contextmanager
def serving(folder: pathlib.Path, create: Create = api.create_app, **given: Any) -> Iterator[Live]:
    """A service with these settings, on the backends of the environment; by default it asks for keys."""
    with contextlib.ExitStack() as stack:
        port = _free_port()
        defaults = {
            "auth": "keys",
            "admin_key": ADMIN,
            "port": port,
            "data_folder": folder,
            "body_timeout_s": 1.5,
            "header_timeout_s": 1.5,
            "drain_s": 10,
            "playground": "off",
            **stack.enter_context(_backends()),
        }
        settings = Settings(**(defaults | given))
        built = build.build(settings)
        app = create(settings, built)
        with _uvicorn(settings, app):
            live = Live(settings, app, built, f"http://127.0.0.1:{port}")
            stack.callback(live.close_clients)
            yield live


@contextlib.contextmanager
def _uvicorn(settings: Settings, app: FastAPI) -> Iterator[None]:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=connections.protocol(settings.header_timeout_s),
        ws="none",
        log_config=None,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the service did not start"
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the service did not end"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextlib.contextmanager
def _backends() -> Iterator[dict[str, Any]]:
    """Settings for the backends that the environment names; the database's are gone afterwards."""
    settings: dict[str, Any] = {}
    if redis := os.environ.get("DIFFUSION_KD_TEST_REDIS"):
        settings["limits_url"] = redis
    if bucket := os.environ.get("DIFFUSION_KD_TEST_S3"):
        endpoint, key, secret, name = bucket.split("|")
        settings |= {"s3_endpoint_url": endpoint, "s3_access_key": key, "s3_secret_key": secret}
        settings["images_url"] = f"s3://{name}/test-{uuid.uuid4().hex}"
    url = os.environ.get("DIFFUSION_KD_TEST_POSTGRES")
    if not url:
        yield settings
        return
    schema = f"test_{uuid.uuid4().hex}"
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
        yield settings | {"database_url": f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{schema}"}
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
        engine.dispose()


def opened(file: bytes) -> PIL.Image.Image:
    image = PIL.Image.open(io.BytesIO(file))
    image.load()
    return image


def refused(answer: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """Checks a refusal's form and returns its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert code is None or error["code"] == code, error
    assert error["message"] and error["type"]
    return str(error["message"])
