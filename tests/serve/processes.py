"""The service to test as a whole: in a process that can be killed, or in a thread whose insides can be looked at.

Processes are forked from one that has imported the service already: they start in a second, and run `main` as
`python -m serve` does.
"""

import contextlib
import dataclasses
import http.server
import io
import json
import multiprocessing
import os
import pathlib
import runpy
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from typing import Any, TypeVar

import httpx2
import numpy as np
import uvicorn
from numpy.typing import NDArray
from PIL import Image

from serve import api, build, connections
from serve.settings import Settings

PATIENCE_S = 60.0
Found = TypeVar("Found")


def eventually(check: Callable[[], Found], within_s: float = PATIENCE_S, what: str = "it") -> Found:
    """What `check` returns as soon as that is true; fails after `within_s`."""
    until_s = time.monotonic() + within_s
    while not (found := check()):
        assert time.monotonic() < until_s, f"{what} has not happened within {within_s:g} s"
        time.sleep(0.01)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pixels(file: bytes) -> NDArray[np.int16]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(np.int16)


# --- a process --------------------------------------------------------------------------------------


class Process:
    """`python -m serve` with its settings in the environment: `DIFFUSION_KD_{NAME}`."""

    def __init__(
        self, folder: pathlib.Path, name: str = "service", *, arguments: Sequence[str] = (), **settings: Any
    ) -> None:
        self.port = settings.pop("port", None) or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"{name}-{self.port}.log"
        # However slow the machine is, work is admitted.
        patient = {"premium_tier__max_wait_s": 1000, "turbo_tier__max_wait_s": 1000}
        given = {"data_folder": folder / "data", "device": "cpu"} | patient | settings
        environment = {f"DIFFUSION_KD_{key.upper()}": str(value) for key, value in given.items()}
        arguments = ["--port", str(self.port), *arguments]
        forked = {"arguments": arguments, "environment": environment, "log": str(self._log)}
        # By its path: what pytest imports as `tests` is not on the path of a process of its own.
        script = str(pathlib.Path(__file__).with_name("forked.py"))
        self._log.touch()
        self.process = _context().Process(
            target=runpy.run_path, args=(script, {"FORKED": forked}, "forked"), daemon=True
        )
        self.process.start()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_ready(self) -> "Process":
        def ready() -> bool:
            assert self.process.is_alive(), f"the service has ended:\n{self.log}"
            with contextlib.suppress(httpx2.TransportError):
                return httpx2.get(f"{self.url}/readyz", timeout=5).status_code == 200
            return False

        eventually(ready, what="readiness")
        return self

    def signal(self, number: int) -> None:
        assert self.process.pid is not None, "a process that was started"
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """As the kernel would for want of memory."""
        self.process.kill()
        self.process.join(PATIENCE_S)

    def exit_code(self, within_s: float = PATIENCE_S) -> int:
        """Waits for the end, which must come."""
        self.process.join(within_s)
        assert self.process.exitcode is not None, f"it still runs after {within_s:g} s:\n{self.log}"
        return self.process.exitcode


@contextlib.contextmanager
def started(folder: pathlib.Path, **given: Any) -> Iterator[Process]:
    process = Process(folder, **given)
    try:
        yield process
    finally:
        process.kill()


@contextlib.contextmanager
def running(folder: pathlib.Path, **given: Any) -> Iterator[Process]:
    with started(folder, **given) as process:
        yield process.wait_ready()


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["serve.__main__"])
    return context


def stop_forkserver() -> None:
    """End the process that others are forked from."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


# --- in a thread ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Inside:
    """A service on a real port of this process. built: what is behind it."""

    url: str
    port: int
    built: build.Built
    server: uvicorn.Server

    def metric(self, name: str, **labels: str) -> float:
        registry = self.built.service.metrics.registry
        return registry.get_sample_value(f"diffusion_kd_{name}", labels) or 0.0

    def passes(self, tier: str) -> int:
        return int(self.metric("step_seconds_count", tier=tier))


@contextlib.contextmanager
def inside(folder: pathlib.Path, **settings: Any) -> Iterator[Inside]:
    port = free_port()
    patient: dict[str, Any] = {
        tier: {"max_wait_s": 1000, **settings.pop(tier, {})} for tier in ("turbo_tier", "premium_tier")
    }
    chosen = Settings(data_folder=folder / "data", device="cpu", port=port, **patient, **settings)
    built = build.build(chosen)
    config = uvicorn.Config(
        api.create_app(chosen, built),
        port=port,
        http=connections.protocol(chosen.header_timeout_s),
        ws="none",
        log_config=None,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="service", daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started, what="the start")
        yield Inside(f"http://127.0.0.1:{port}", port, built, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the service has not ended"


# --- a client that can leave ------------------------------------------------------------------------


def send(port: int, body: Mapping[str, Any], **headers: str) -> socket.socket:
    """Ask for images over a bare connection, which the caller closes when it likes."""
    content = json.dumps(body).encode()
    lines = ["POST /v1/images/generations HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines.append(f"Content-Length: {len(content)}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + content)
    return connection


# --- a receiver of webhooks -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Message:
    headers: dict[str, str]
    body: bytes
    at_s: float

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def job_id(self) -> str:
        data: dict[str, Any] = json.loads(self.body)
        while "id" not in data:
            data = data["data"]
        return str(data["id"])


class Receiver:
    """Takes webhooks on loopback. answer: told the message, returns the status and a Location or None; it may wait."""

    def __init__(self, answer: Callable[[Message], tuple[int, str | None]] | None = None, port: int = 0) -> None:
        self.messages: list[Message] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                message = Message({name.lower(): value for name, value in self.headers.items()}, body, time.monotonic())
                receiver.messages.append(message)
                status, location = answer(message) if answer else (204, None)
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    if location is not None:
                        self.send_header("location", location)
                    self.send_header("content-length", "0")
                    self.end_headers()

            def do_GET(self) -> None:
                receiver.messages.append(Message({}, b'{"id": "followed"}', time.monotonic()))
                self.send_error(404)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "Receiver":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
