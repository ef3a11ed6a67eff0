"""What `python -m serve` and `python app.py` have in common: options, settings, and a server that drains."""

import argparse
import asyncio
import pathlib
import socket
import time
from collections.abc import Awaitable, Callable
from types import FrameType

import pydantic
import pydantic_settings
import uvicorn
from fastapi import FastAPI

from diffusion_kd import errors
from serve import build, connections, telemetry
from serve.settings import Settings, unknown_variables

_SAME_SIGNAL_S = 1.0
AFTER_DRAIN_S = 5
"""For answers on their way to clients; what had to be made is made by then."""


class Server(uvicorn.Server):
    """uvicorn, but a first SIGTERM or SIGINT drains while connections are still taken, so that /readyz can say so.

    A second one, a moment later, ends at once; one that comes together with the first is that again, sent to a whole
    group of processes. The exit code is 0: a signal that was obeyed is no failure.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain_first = drain
        self._draining: asyncio.Task[None] | None = None
        self._asked_s = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:
            self.should_exit = True
            return
        if self._draining is not None:
            self.force_exit = time.monotonic() - self._asked_s > _SAME_SIGNAL_S
            self.should_exit = self.should_exit or self.force_exit
            return
        self._asked_s = time.monotonic()
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._drain_first()
        finally:
            self.should_exit = True


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those settings that are options too, each under its own name."""
    add = parser.add_argument
    add("--host", help="address to listen on; 127.0.0.1 unless given")
    add("--port", type=int, help="8000 unless given")
    add("--premium", metavar="DIR", help="the teacher: a folder, a hub id, or shapes-teacher")
    add("--turbo", metavar="DIR", help="the student: an exported folder, a hub id, or shapes-student")
    add("--auth", choices=("none", "keys"), help="whether callers need an API key; none is for this machine alone")
    add("--device", help="cpu, cuda, cuda:1; CUDA where there is one unless given")
    add("--data-folder", type=pathlib.Path, metavar="DIR", help="database and images; runs/service unless given")
    add("--log-format", choices=("console", "json"))


def settings(given: argparse.Namespace) -> Settings:
    """The settings that options name, and all others from the environment. Raises ConfigError."""
    options = {name: value for name in Settings.model_fields if (value := getattr(given, name, None)) is not None}
    if unknown := unknown_variables():
        raise errors.ConfigError(f"{unknown[0]} is no setting; docs/operations.md lists those that are")
    try:
        return Settings(**options)
    except pydantic_settings.SettingsError as error:
        raise errors.ConfigError(f"{errors.first_line(error)}; a list is given as JSON") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        given_was = "" if "key" in name or "secret" in name else f"; given was {first['input']!r}"
        said = first["msg"].replace("items after validation", "characters")  # pydantic's words for a secret
        raise errors.ConfigError(f"setting {name}: {said}{given_was}") from None


def run(settings: Settings, create: Callable[[Settings, build.Built], FastAPI]) -> None:
    """Load, listen, serve until a signal. create: makes the app of what is built."""
    telemetry.configure_logging(settings.log_format, settings.log_level)
    build.check(settings)
    listening = _bound(settings)
    settings = settings.model_copy(update={"port": listening.getsockname()[1]})
    built = build.build(settings)
    app = create(settings, built)

    async def drain() -> None:
        await built.drain()
        app.state.close_page()

    config = uvicorn.Config(
        app,
        http=connections.protocol(settings.header_timeout_s),
        ws="none",
        log_config=None,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=AFTER_DRAIN_S,
        server_header=False,
    )
    Server(config, drain).run(sockets=[listening])


def _bound(settings: Settings) -> socket.socket:
    """The address, taken before the models are loaded. Raises ConfigError where it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise errors.ConfigError(
            f"nothing can listen on port {settings.port} of {settings.host}: {error.strerror or error}; give another"
        ) from None
    return listening
