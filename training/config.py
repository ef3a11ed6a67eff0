"""Configs: a YAML file over a dataclass of defaults, then `key=value` overrides. A config that exists is valid."""

import dataclasses
import json
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import omegaconf
import yaml

from diffusion_kd import errors, files

FOLDER = pathlib.Path(__file__).parent / "configs"

Config = TypeVar("Config")

_LONGEST = 100
"""Characters of a value in a message: a teacher's identity has thousands."""


def load(schema: type[Config], name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a config.

    schema: the dataclass that names every key, its type and default.
    name_or_path: a YAML file, or the name of one in `training/configs`.
    overrides: `key=value`, nested keys with dots.
    Raises ConfigError for a missing file, an unknown key, a value of the wrong type, or what the schema itself refuses.
    """
    merged: Any = omegaconf.OmegaConf.structured(schema)
    for given in (_read(name_or_path), *map(_override, overrides)):
        merged = _merged(schema, merged, given)
    try:
        return cast(Config, omegaconf.OmegaConf.to_object(merged))
    except omegaconf.errors.OmegaConfBaseException as error:  # ??? and ${...}
        raise errors.ConfigError(f"{error.full_key} has no value ({errors.first_line(error)})") from None


def _merged(schema: type, config: Any, given: Any) -> Any:
    try:
        merged = omegaconf.OmegaConf.merge(config, given)
    except omegaconf.errors.ConfigKeyError as error:
        owner: Any = error.object_type if dataclasses.is_dataclass(error.object_type) else schema
        known = ", ".join(field.name for field in dataclasses.fields(owner))
        raise errors.ConfigError(f"unknown config key {error.full_key!r}; known keys are {known}") from None
    except (omegaconf.errors.OmegaConfBaseException, TypeError) as error:
        key = str(getattr(error, "full_key", ""))
        raise errors.ConfigError(_misfit(schema, key, omegaconf.OmegaConf.to_container(given))) from None
    for name, kind, value in _settings(schema, omegaconf.OmegaConf.to_container(given)):
        # omegaconf takes every number but 0 for true.
        if kind is bool and isinstance(value, int) and value not in (0, 1):
            raise errors.ConfigError(f"{name} is {value!r}; it must be {_WANTED[bool]}")
    return merged


_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _misfit(schema: type, key: str, given: Any) -> str:
    """What does not fit in what was given, in words. key: where omegaconf saw it, which of groups and lists is ""."""
    for name, kind, value in _settings(schema, given):
        if dataclasses.is_dataclass(kind) and not isinstance(value, dict):
            inner = dataclasses.fields(kind)[0].name
            return f"{name} is {value!r}; it is a group of keys, to be given as {name}.{inner}=VALUE"
        listed = typing.get_origin(kind) is list
        if name == key.partition("[")[0] or (listed and not isinstance(value, list)):
            wanted = next(_WANTED[one] for one in (*typing.get_args(kind), kind) if one in _WANTED)
            return f"{name} is {value!r}; it must be {f'a list, as [a, b], each {wanted}' if listed else wanted}"
    return f"config key {key!r} does not fit"


def _settings(schema: Any, given: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What is given, groups and the keys in them: name, type, value."""
    for name, kind in typing.get_type_hints(schema).items():
        if name in given:
            yield prefix + name, kind, given[name]
            if dataclasses.is_dataclass(kind) and isinstance(given[name], dict):
                yield from _settings(kind, given[name], f"{prefix}{name}.")


def save(config: object, path: pathlib.Path) -> None:
    """Write the resolved config beside what it makes."""
    path.write_text(omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.structured(config)))


def claim(folder: pathlib.Path, origin: Mapping[str, object], *, write: bool) -> None:
    """Make a run's folder remember what the run starts from, so that no other run goes on with its checkpoints.

    origin: what decides the result besides its length, as JSON. write: whether this process is the one that writes.
    Raises ConfigError if a run of another origin stands there, or if what the folder remembers is damaged.
    """
    path = folder / "origin.json"
    wanted = json.loads(json.dumps(origin))
    if path.is_file():
        try:
            found = _flat(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, AttributeError) as error:
            raise errors.ConfigError(
                f"{path} cannot be read ({errors.first_line(error)}); give another --out"
            ) from None
        asked = _flat(wanted)
        for key in sorted(asked.keys() | found.keys()):
            if asked.get(key) != found.get(key):
                there, here = (_shortened(repr(each.get(key))) for each in (found, asked))
                raise errors.ConfigError(
                    f"{folder} holds a run with {key} = {there}, not {here}; "
                    "give another --out, or what that run was started with"
                )
    elif write:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps(wanted, indent=2) + "\n")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Groups of settings as single keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def require_seed(seed: int) -> None:
    errors.require(0 <= seed < 2**63, "seed", seed, "0 or more and below 2**63")


def _override(text: str) -> Any:
    if not text.partition("=")[0].strip() or "=" not in text:
        raise errors.ConfigError(f"override {text!r} is not of the form key=value")
    try:
        return omegaconf.OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException) as error:
        raise errors.ConfigError(f"override {text!r}: {errors.first_line(error)}") from None


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _read(name_or_path: str) -> Any:
    for path in (pathlib.Path(name_or_path), FOLDER / f"{name_or_path}.yaml"):
        if path.is_file():
            try:
                content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise errors.ConfigError(f"{path} is not YAML in UTF-8: {' '.join(str(error).split())}") from None
            if not isinstance(content, dict):
                raise errors.ConfigError(f"{path} holds a {type(content).__name__}, not a table of keys")
            try:
                return omegaconf.OmegaConf.create(content)
            except (omegaconf.errors.OmegaConfBaseException, RecursionError) as error:
                raise errors.ConfigError(f"{path} holds what no config can: {errors.first_line(error)}") from None
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    raise errors.ConfigError(f"no config {name_or_path!r}: neither a file nor one of {known}")
