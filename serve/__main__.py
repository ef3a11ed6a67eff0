"""`python -m serve`: the two-tier service; `python -m serve keys`: its API keys."""

import argparse

import pydantic

from diffusion_kd import errors
from serve import api, build, command, costs, schemas
from serve.settings import Settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve",
        description="Serve a teacher and its student as two tiers. Every setting of docs/operations.md can be given as "
        "DIFFUSION_KD_NAME in the environment; these options go before it.",
    )
    command.add_options(parser)
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
    settings = command.settings(given)
    if given.command == "keys":
        _keys(settings, given)
    else:
        command.run(settings, api.create_app)


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
