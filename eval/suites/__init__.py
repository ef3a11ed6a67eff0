"""Prompt suites: what every model is asked for. JSON lines with `id`, `category`, `edge_case`, `text`.

| suite     | for                    | standard prompts | edge cases |
|-----------|------------------------|------------------|------------|
| `shapes`  | the embedded domain    | 512 in 8 strata  | 252        |
| `general` | SDXL-class models      | 520 in 13 strata | 184        |

A prompt of the shapes domain also has `asks`, what the oracle looks for. `eval.suites.shapes` writes `shapes`.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion_kd import errors
from diffusion_kd.shapes import scenes
from eval import stats

BUILT_IN = {name: pathlib.Path(__file__).parent / f"{name}.jsonl" for name in ("shapes", "general")}
_KEYS = {"id": str, "category": str, "edge_case": bool, "text": str}


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """id: unique in its suite. edge_case: judged apart. asks: what the shapes oracle looks for; None: nothing."""

    id: str
    category: str
    edge_case: bool
    text: str
    asks: scenes.Prompt | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    name: str
    prompts: tuple[Prompt, ...]

    @functools.cached_property
    def standard(self) -> NDArray[np.int64]:
        """Places of the prompts that are no edge cases."""
        return np.array([place for place, prompt in enumerate(self.prompts) if not prompt.edge_case], dtype=np.int64)

    @functools.cached_property
    def groups(self) -> NDArray[np.int64]:
        """Jackknife group of each prompt, (P,), standard prompts dealt out in turn; -1 for an edge case."""
        groups = np.full(len(self.prompts), -1)
        groups[self.standard] = np.arange(len(self.standard)) % stats.GROUPS
        return groups

    @functools.cached_property
    def sha256(self) -> str:
        """Of ids, categories, texts and what is asked: another suite never passes for this one."""
        return hashlib.sha256("\n".join(map(to_line, self.prompts)).encode()).hexdigest()

    def thinned(self, count: int) -> "Suite":
        """About `count` prompts, as many of each category as its share, for a quick look; at least one of each."""
        by_category: dict[tuple[bool, str], list[Prompt]] = {}
        for prompt in self.prompts:
            by_category.setdefault((prompt.edge_case, prompt.category), []).append(prompt)
        kept = {
            prompt.id
            for members in by_category.values()
            for prompt in members[: max(1, round(len(members) * count / len(self.prompts)))]
        }
        return Suite(self.name, tuple(prompt for prompt in self.prompts if prompt.id in kept))


def load(name_or_path: str) -> Suite:
    """A suite by its name or from a file. Raises DataError naming the line and what is wrong with it."""
    path = BUILT_IN.get(name_or_path, pathlib.Path(name_or_path))
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: prompts may hold odd line ends
    except FileNotFoundError:
        known = ", ".join(sorted(BUILT_IN))
        raise errors.DataError(f"no prompt suite {name_or_path!r}: not a file, not one of {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise errors.DataError(f"{path} cannot be read: {errors.first_line(error)}") from None
    prompts = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise errors.DataError(f"{path} holds no prompts; a line is {_EXAMPLE}")
    return checked(name_or_path if name_or_path in BUILT_IN else path.name, prompts)


_RESERVED = {"all prompts", "all edge cases"}
_EXAMPLE = '{"id": "dogs-001", "category": "animals", "edge_case": false, "text": "a dog asleep on a red sofa"}'


def checked(name: str, prompts: Sequence[Prompt]) -> Suite:
    """A suite of prompts whose ids differ and of which one at least is no edge case. Raises DataError."""
    counts = collections.Counter(prompt.id for prompt in prompts)
    repeated = [prompt_id for prompt_id, count in counts.items() if count > 1]
    if repeated:
        raise errors.DataError(
            f"{name} has several prompts with the id {repeated[0]!r}; {len(repeated)} ids are repeated"
        )
    kinds = {edge: {prompt.category for prompt in prompts if prompt.edge_case == edge} for edge in (False, True)}
    if doubtful := (kinds[False] & kinds[True]) | ((kinds[False] | kinds[True]) & _RESERVED):
        raise errors.DataError(
            f"{name}: category {sorted(doubtful)[0]!r} holds standard prompts and edge cases, or is a name of the "
            f"report's own ({', '.join(sorted(_RESERVED))}); call it otherwise"
        )
    if all(prompt.edge_case for prompt in prompts):
        raise errors.DataError(f"{name} holds edge cases alone; distances of whole sets need standard prompts")
    return Suite(name, tuple(prompts))


def _parse(line: str, where: str) -> Prompt:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise errors.DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise errors.DataError(f"{where} must be an object with {', '.join(_KEYS)}, not {line[:60]!r}")
    for key, kind in _KEYS.items():
        if not isinstance(fields.get(key), kind):
            raise errors.DataError(f"{where}: {key} must be {kind.__name__}, not {fields.get(key)!r}")
    if any("\ud800" <= letter <= "\udfff" for letter in fields["id"] + fields["category"] + fields["text"]):
        raise errors.DataError(f"{where}: half of a surrogate pair is no text; write the character itself")
    if unknown := fields.keys() - _KEYS.keys() - {"asks"}:
        raise errors.DataError(f"{where}: unknown key {sorted(unknown)[0]!r}; a prompt has {', '.join(_KEYS)} and asks")
    asks = fields.get("asks")
    return Prompt(
        **{key: fields[key] for key in _KEYS}, asks=None if asks is None else _asks(fields["text"], asks, where)
    )


def _asks(text: str, asks: Any, where: str) -> scenes.Prompt:
    known = {"relation": scenes.RELATIONS, "place": scenes.PLACES, "background": scenes.BACKGROUNDS}
    looks = {"shape": scenes.SHAPES, "colour": scenes.COLOURS, "size": scenes.RADIUS_PX}
    try:
        objects = tuple(
            scenes.Wanted(**{key: _word(each, key, looks, where) for key in looks}) for each in asks["objects"]
        )
        return scenes.Prompt(text, objects, **{key: _word(asks, key, known, where) for key in known})
    except (KeyError, TypeError, AttributeError):
        raise errors.DataError(
            f"{where}: asks must hold objects, relation, place and background, not {asks!r}"
        ) from None


def _word(holder: dict[str, Any], key: str, known: dict[str, Any], where: str) -> str | None:
    word = holder.get(key)
    if word is not None and word not in known[key]:
        raise errors.DataError(f"{where}: no {key} {word!r}; there are {', '.join(known[key])}")
    return word


def to_line(prompt: Prompt) -> str:
    """The JSON of one prompt; `load` takes it back."""
    fields: dict[str, Any] = {key: getattr(prompt, key) for key in _KEYS}
    if prompt.asks is not None:
        fields["asks"] = {key: value for key, value in dataclasses.asdict(prompt.asks).items() if key != "text"}
    return json.dumps(fields, ensure_ascii=False)
