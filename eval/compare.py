"""Compare two reports: `python -m eval.compare OLD/report.json NEW/report.json`.

Numbers are set side by side only where they were measured alike: the same network and weights, resizer, prompts,
sample count, resolution, libraries. Otherwise the field that differs is named. Exit code: 0, or 3 where nothing can be
compared.
"""

import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion_kd import errors
from eval import command, fingerprint, report


def load(path: pathlib.Path) -> dict[str, Any]:
    """A report, or the one in a folder. Raises DataError for anything else."""
    file = path / report.REPORT_NAME if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise errors.DataError(f"{file} is not a report: {errors.first_line(error)}") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != report.SCHEMA_VERSION:
        raise errors.DataError(f"{file} has schema version {version}; this release reads {report.SCHEMA_VERSION}")
    return content  # type: ignore[no-any-return]


def _refuse(constant: str) -> None:
    """NaN and infinity are no JSON; a report of ours has null instead."""
    raise ValueError(f"it holds {constant}, which is no JSON")


def lines(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Model, steps, metric, old value, new value, difference; of every value that both reports hold.

    Raises ComparisonError if none of them was measured alike; single ones that were not are told at the end.
    """
    refused: list[str] = []
    alike = 0
    theirs = {(row["model"], row["steps"], row["guidance_scale"]): row["values"] for row in old["rows"]}
    for row in new["rows"]:
        before = theirs.get((row["model"], row["steps"], row["guidance_scale"]), {})
        for key in (key for key in row["values"] if key in before):
            first, second = before[key], row["values"][key]
            try:
                fingerprint.require_same(
                    old["fingerprints"][first["fingerprint"]], new["fingerprints"][second["fingerprint"]]
                )
            except errors.ComparisonError as error:
                refused.append(str(error))
                continue
            alike += 1
            gap = second["value"] - first["value"]
            name = second["name"] + (" to the teacher" if key.endswith("_to_teacher") else "")
            yield (
                row["model"],
                str(row["steps"]),
                name,
                f"{first['value']:.4g}",
                f"{second['value']:.4g}",
                f"{gap:+.3g}",
            )
    if not alike:
        raise errors.ComparisonError(refused[0] if refused else "the reports have no value in common")
    sentences = [f"left out: {sentence}" for sentence in dict.fromkeys(refused)]
    sentences += [f"only in {name}: {', '.join(sorted(keys))}" for name, keys in _alone(old, new).items() if keys]
    sentences += [
        f"{name} lost prompts and is not complete" for name, each in (("old", old), ("new", new)) if each.get("lost")
    ]
    yield from (("", "", sentence, "", "", "") for sentence in sentences)


def _alone(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, set[str]]:
    """What one report holds and the other does not."""
    first, second = (
        {f"{row['model']} {row['steps']} {key}" for row in each["rows"] for key in row["values"]} for each in (old, new)
    )
    return {"old": first - second, "new": second - first}


def main(arguments: list[str] | None = None) -> int:
    parser = command.Parser(prog="python -m eval.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=pathlib.Path, help="a report.json or its folder")
    parser.add_argument("new", type=pathlib.Path)
    given = parser.parse_args(arguments)
    try:
        found = list(lines(load(given.old), load(given.new)))
    except (KeyError, TypeError, ValueError) as error:
        sys.stderr.write(f"error: a report is damaged: {type(error).__name__} {error}\n")
        return command.EXIT_ERROR
    except errors.DiffusionKDError as error:
        sys.stderr.write(f"error: {error}\n")
        return command.EXIT_ERROR
    for model, steps, name, *numbers in [("model", "steps", "metric", "old", "new", "difference"), *found]:
        sys.stdout.write(
            f"{model:18}{steps:>5}  {name:44}{''.join(f'{number:>12}' for number in numbers)}".rstrip() + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
