"""Configs: a YAML file over a dataclass of defaults, then `key=value` overrides. A config that exists is valid."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import omegaconf
import yaml

from diffusion_kd import errors

FOLDER = pathlib.Path(__file__).parent / "configs"

Config = TypeVar("Config")


def load(schema: type[Config], name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a config.

    schema: the dataclass that names every key, its type and default.
    name_or_path: a YAML file, or the name of one in `training/configs`.
    overrides: `key=value`, nested keys with dots.
    Raises ConfigError for a missing file, an unknown key, a value of the wrong type, or what the schema itself refuses.
    """
    base = omegaconf.OmegaConf.structured(schema)
    try:
        for override in overrides:
            if "=" not in override:
                raise errors.ConfigError(f"override {override!r} is not of the form key=value")
        merged = omegaconf.OmegaConf.merge(
            base, omegaconf.OmegaConf.create(_read(name_or_path)), omegaconf.OmegaConf.from_dotlist(list(overrides))
        )
        return cast(Config, omegaconf.OmegaConf.to_object(merged))
    except omegaconf.errors.ConfigKeyError as error:
        owner: Any = error.object_type if dataclasses.is_dataclass(error.object_type) else schema
        known = ", ".join(field.name for field in dataclasses.fields(owner))
        raise errors.ConfigError(f"unknown config key {error.full_key!r}; known keys are {known}") from None
    except omegaconf.errors.OmegaConfBaseException as error:
        raise errors.ConfigError(f"config key {error.full_key!r}: {str(error).splitlines()[0]}") from None
    except yaml.YAMLError as error:
        raise errors.ConfigError(f"{name_or_path} is not YAML: {' '.join(str(error).split())}") from None


def save(config: object, path: pathlib.Path) -> None:
    """Write the resolved config beside what it makes."""
    path.write_text(omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.structured(config)))


def _read(name_or_path: str) -> dict[str, object]:
    for path in (pathlib.Path(name_or_path), FOLDER / f"{name_or_path}.yaml"):
        if path.is_file():
            content = yaml.safe_load(path.read_text()) or {}
            if not isinstance(content, dict):
                raise errors.ConfigError(f"{path} holds a {type(content).__name__}, not a table of keys")
            return content
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    raise errors.ConfigError(f"no config {name_or_path!r}: neither a file nor one of {known}")
