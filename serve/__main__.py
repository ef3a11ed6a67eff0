"""`python -m serve`: the two-tier service; `python -m serve keys`: its API keys."""

import argparse
import asyncio
import pathlib
import socket
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import pydantic
import pydantic_settings
import uvicorn

from diffusion_kd import errors
from serve import api, build, connections, costs, schemas, telemetry
from serve.settings import Settings, unknown_variables

_SAME_SIGNAL_S = 1.0
_AFTER_DRAIN_S = 5
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve",
        description="Serve a teacher and its student as two tiers. Every setting of docs/operations.md can be given as "
        "DIFFUSION_KD_NAME in the environment; these options go before it.",
    )
    add = parser.add_argument
    add("--host", help="address to listen on; 127.0.0.1 unless given")
    add("--port", type=int, help="8000 unless given")
    add("--premium", metavar="DIR", help="the teacher: a folder, a hub id, or shapes-teacher")
    add("--turbo", metavar="DIR", help="the student: an exported folder, a hub id, or shapes-student")
    add("--auth", choices=("none", "keys"), help="whether callers need an API key; none is for this machine alone")
    add("--device", help="cpu, cuda, cuda:1; CUDA where there is one unless given")
    add("--data-folder", type=pathlib.Path, metavar="DIR", help="database and images; runs/service unless given")
    add("--log-format", choices=("console", "json"))
    commands = parser.add_subparsers(dest="command", title="commands")
    keys = commands.add_parser("keys", help="create, list and revoke API keys; other options go before this word")
    actions = keys.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a key and show its secret, once")
    create.add_argument("--name", required=True)
    create.add_argument("--scopes", default="generate", help="generate, admin, or both with a comma")
    create.add_argument("--requests-per-minute", type=int)
    create.add_argument("--monthly-budget-usd", type=float)
    actions.add_parser("list", help="list the keys that are not revoked")
    revoke = actions.add_parser("revoke", help="revoke a key, for ever")
    revoke.add_argument("id")
    return parser


def main() -> None:
    given = _parser().parse_args()
    options = ("host", "port", "premium", "turbo", "auth", "device", "data_folder", "log_format")
    settings = _settings({name: value for name in options if (value := getattr(given, name)) is not None})
    if given.command == "keys":
        _keys(settings, given)
    else:
        _serve(settings)


def _settings(given: dict[str, Any]) -> Settings:
    if unknown := unknown_variables():
        raise errors.ConfigError(f"{unknown[0]} is no setting; docs/operations.md lists those that are")
    try:
        return Settings(**given)
    except pydantic_settings.SettingsError as error:
        raise errors.ConfigError(f"{errors.first_line(error)}; a list is given as JSON") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        given_was = "" if "key" in name or "secret" in name else f"; given was {first['input']!r}"
        said = first["msg"].replace("items after validation", "characters")  # pydantic's words for a secret
        raise errors.ConfigError(f"setting {name}: {said}{given_was}") from None


def _serve(settings: Settings) -> None:
    telemetry.configure_logging(settings.log_format, settings.log_level)
    build.check(settings)
    listening = _bound(settings)
    settings = settings.model_copy(update={"port": listening.getsockname()[1]})
    built = build.build(settings)
    config = uvicorn.Config(
        api.create_app(settings, built),
        http=connections.protocol(settings.header_timeout_s),
        ws="none",
        log_config=None,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=_AFTER_DRAIN_S,
        server_header=False,
    )
    Server(config, built.drain).run(sockets=[listening])


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


def _keys(settings: Settings, given: argparse.Namespace) -> None:
    store = build.open_store(settings)
    try:
        if given.action == "create":
            body = _key_body(given)
            budget = None if body.monthly_budget_usd is None else costs.to_nanousd(body.monthly_budget_usd)
            key, secret = store.create_key(body.name, body.scopes, body.requests_per_minute, budget)
            print(f"{key.id}  {key.name}  {','.join(sorted(key.scopes))}")
            print(f"{secret}  (shown this once)")
        elif given.action == "list":
            for key in store.list_keys():
                print(f"{key.id}  {key.prefix}  {','.join(sorted(key.scopes))}  {key.name}")
        elif not store.revoke_key(given.id):
            raise errors.ConfigError(f"there is no key {given.id!r} that is not revoked; see python -m serve keys list")
    finally:
        store.close()


def _key_body(given: argparse.Namespace) -> schemas.KeyBody:
    """The options of `keys create`, under the rules of the API."""
    try:
        return schemas.KeyBody(
            name=given.name,
            scopes=[scope.strip() for scope in given.scopes.split(",")],
            requests_per_minute=given.requests_per_minute,
            monthly_budget_usd=given.monthly_budget_usd,
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise errors.ConfigError(f"--{option}: {first['msg']}; given was {ascii(first['input'])[:80]}") from None


if __name__ == "__main__":
    errors.run(main)
