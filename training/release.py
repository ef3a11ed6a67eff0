"""Hand a student over: what its teacher and data allow, where it came from, its folder, and its evaluation in the card.

`training.distill` calls `require_licences` before it begins and `export` at its end; `training.export` does both again.
"""

import argparse
import dataclasses
import getpass
import json
import logging
import pathlib
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import diffusion_kd
from diffusion_kd import artifact, card, errors, files, licences
from eval import fingerprint, images

_log = logging.getLogger(__name__)

FINE_TUNING = "finetuning.json"
"""Where a fine-tuned teacher's folder tells what it was made of."""

OWN_LICENCE = "Apache-2.0"
"""Of the shipped models."""

_EXPECTED = {
    "fd": "Fréchet distance",
    "patch_fd": "Fréchet distance of crops",
    "kid": "KID",
    "cmmd": "CMMD",
    "precision": "precision",
    "recall": "recall",
    "clip_score": "CLIP score",
    "diversity": "diversity",
    "lpips_to_teacher": "LPIPS to the teacher's pictures",
}
"""What a card says of even where it was not measured: a report's key -> its name then."""


# --- licences and lineage ---------------------------------------------------------------------------


def require_licences(
    lineage: Mapping[str, Any], acceptance: licences.Acceptance, *, teacher_licence: str = ""
) -> dict[str, list[dict[str, Any]]]:
    """What a student's `lineage` gains: `licences` and `acceptances`. For the first lines of a training, too.

    lineage: `teacher`, and if there are any `start` and `data_licences` (name -> items, as a cache's manifest says).
    teacher_licence: what the user states, for a teacher that does not say.
    Raises ArtifactError if one forbids derivative models and was not accepted, ConfigError if one is stated away.
    """
    found = _of_model(str(lineage["teacher"]), "teacher", teacher_licence)
    if lineage.get("start"):
        found += _of_model(str(lineage["start"]), "start", "")
    found += licences.of_data(lineage.get("data_licences") or {})
    accepted = licences.require(found, acceptance)
    return {"licences": [licence.record() for licence in found], "acceptances": [dict(each) for each in accepted]}


def _of_model(name: str, role: str, stated: str) -> list[licences.Licence]:
    """A model's licence, and those of what it was fine-tuned from and on."""
    return [_own_licence(name, role, stated), *_inherited(name, role)]


def _inherited(name: str, role: str) -> list[licences.Licence]:
    path = pathlib.Path(name) / FINE_TUNING
    if not path.is_file():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["licences"]
        return [
            licences.Licence(
                f"{record['covers']}, of which {role} {name} was made",
                str(record["name"]),
                licences.Kind(record["kind"]),
                str(record["found_in"]),
                int(record.get("items", 0)),
            )
            for record in records
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.ArtifactError(
            f"{path} is malformed ({errors.first_line(error)}); export the teacher anew"
        ) from None


def _own_licence(name: str, role: str, stated: str) -> licences.Licence:
    covers = f"{role} {name}"
    if name in artifact.SHIPPED:
        return licences.Licence(covers, OWN_LICENCE, licences.kind_of(OWN_LICENCE), "this project")
    if artifact.is_single_file(name):
        # A file among others in a folder: a licence there need not be its own.
        kind = licences.kind_of(stated) if stated else licences.Kind.UNKNOWN
        said = licences.canonical(stated) if stated else licences.UNKNOWN_NAME
        return licences.Licence(covers, said, kind, "stated by the user" if stated else "nowhere")
    return licences.of_model(artifact.resolve(name), covers=covers, stated=stated)


def _origin(name: str) -> str:
    """What kind of name a model goes by: shipped, file, folder or hub."""
    if name in artifact.SHIPPED:
        return "shipped"
    if artifact.is_single_file(name):
        return "file"
    return "folder" if pathlib.Path(name).is_dir() else "hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--teacher-licence`, `--accept-licence` and `--accepted-by`, for every command that ends in an export."""
    parser.add_argument("--teacher-licence", default="", metavar="NAME", help="of a teacher that does not say its own")
    parser.add_argument(
        "--accept-licence", action="append", default=[], metavar="NAME",
        help="state that you have leave to make a student in spite of this licence; recorded in it",
    )  # fmt: skip
    parser.add_argument("--accepted-by", default="", metavar="WHO", help="who states it; this account if not given")


def acceptance(given: argparse.Namespace) -> licences.Acceptance:
    """What those arguments say, as of today."""
    return licences.Acceptance(tuple(given.accept_licence), given.accepted_by or _account())


def _account() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container without a name for its user
        return "unknown"


def code_version() -> str:
    """The package's version and, in a checkout with git at hand, its commit."""
    here = pathlib.Path(__file__).parent
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        asked = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return diffusion_kd.__version__
    return f"{diffusion_kd.__version__}+{asked.stdout.strip()}" if asked.returncode == 0 else diffusion_kd.__version__


# --- export -----------------------------------------------------------------------------------------


def export(
    folder: pathlib.Path,
    *,
    parts: artifact.Parts,
    distillation: artifact.Distillation,
    dtype: torch.dtype = torch.float16,
    lora: bool = False,
    report: pathlib.Path | None = None,
    acceptance: licences.Acceptance | None = None,
    teacher_licence: str = "",
) -> None:
    """Write a student's folder with its full lineage: a pipeline, or with `lora` the adapters that its U-Net carries.

    distillation: its lineage names `teacher`, and `start` and `data_licences` if there are any. What the licences say
        and the hashes of the teacher's parts are added here. report: of this very student, for its card.
    Raises ArtifactError if a licence forbids it, or if the student is not finite.
    """
    files.check_replaceable(folder, artifact.DISTILLATION_FILE)
    lineage = dict(distillation.lineage)
    teacher = str(lineage["teacher"])
    for role in ("teacher", "start"):
        name = str(lineage.get(role) or "")
        if name and pathlib.Path(name).is_dir() and pathlib.Path(name).resolve() == folder.resolve():
            raise errors.ConfigError(f"{folder} is the {role} itself; give another folder")
    lineage |= require_licences(lineage, acceptance or licences.Acceptance(), teacher_licence=teacher_licence)
    lineage |= {"teacher_from": _origin(teacher), "teacher_sha256": artifact.part_hashes(teacher)}
    described = dataclasses.replace(distillation, lineage=lineage)
    start = lineage.get("start")
    if lora and start and artifact.is_lora(start):
        _log.warning(
            "%s is a LoRA itself, and two do not fit into one file: the student is written as a pipeline", start
        )
        lora = False
    if lora:
        artifact.export_lora(folder, parts=parts, distillation=described, dtype=dtype)
    else:
        artifact.export_student(folder, parts=parts, distillation=described, dtype=dtype)
    if report is not None:
        add_report(folder, report)


# --- the evaluation in the card ---------------------------------------------------------------------


def add_report(folder: pathlib.Path, report: pathlib.Path) -> None:
    """Put the evaluation of `report.json` into the card of an exported student; the rest of the card stays.

    Raises ArtifactError if the folder holds none, ConfigError for a report that is unreadable or of another student.
    """
    distillation = artifact.read_distillation(str(folder))
    content = _read_report(report)
    judged = content["models"].get("student", {}).get("artifact_sha256")
    if judged != images.artifact_sha256.__wrapped__(str(folder)):
        raise errors.ConfigError(
            f"{report} is of another student than {folder} as it is now; judge this one: "
            f"python -m eval.run --student {folder} --out FOLDER"
        )
    text = card.with_evaluation(folder, artifact.content(distillation), evaluation(content))
    files.write(folder / card.NAME, text)
    _log.info("the card of %s has the evaluation of %s", folder, report)


def _read_report(path: pathlib.Path) -> dict[str, Any]:
    wanted = fingerprint.REPORT_SCHEMA_VERSION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["schema_version"]
        if version != wanted:
            raise errors.ConfigError(f"{path} has schema version {version}; this release reads {wanted}")
        if not content["rows"] or not isinstance(content["models"], dict):
            raise ValueError("it has no rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.ConfigError(
            f"{path} is no report of eval.run ({type(error).__name__}: {errors.first_line(error)}); "
            "give its report.json"
        ) from None
    return content  # type: ignore[no-any-return]


def evaluation(report: Mapping[str, Any]) -> card.Evaluation:
    """What a card shows of a report, as plain text."""
    rows, protocol = report["rows"], report["protocol"]
    networks = sorted({each["network"] for each in report["fingerprints"].values() if each["network"]})
    asked = f"{protocol['prompts']} prompts and {protocol['edge_cases']} edge cases"
    said = (
        f"Protocol `{protocol['id']}`{'' if protocol['as_written'] else ', shortened'}: {asked}, "
        f"{protocol['images_per_prompt']} pictures each at {protocol['resolution_px']} px, on {protocol['device']}. "
        f"Seen through: {', '.join(networks)}. Reference: {report['reference']}. In brackets 95 % intervals."
    )
    models = [f"{row['model']}, {row['steps']} step{'s' if row['steps'] > 1 else ''}" for row in rows]
    return card.Evaluation(said, str(report["verdict"]), models, list(_metric_rows(rows, protocol["id"])))


def _metric_rows(rows: list[Mapping[str, Any]], protocol: str) -> Iterator[tuple[str, list[str | None]]]:
    keys = dict.fromkeys([key for row in rows for key in row["values"]] + list(_EXPECTED))
    for key in keys:
        values = [row["values"].get(key) for row in rows]
        yield _label(key, values, protocol), [_shown(value) for value in values]
    speeds = [row.get("speed", {}).get("latency_s") for row in rows]
    yield "seconds for one picture", [None if value is None else f"{value:.3g}" for value in speeds]
    yield "quality floor", [row.get("verdict", {}).get("outcome", "") for row in rows]


def _label(key: str, values: list[Any], protocol: str) -> str:
    name = next((str(value["name"]) for value in values if value), None)
    if name is None:
        return _EXPECTED[key]
    return f"{name}, {protocol}{', to the teacher' if key.endswith('_to_teacher') else ''}"


def _shown(value: Mapping[str, Any] | None) -> str | None:
    """Value and interval; that of a set distance is around the value without its bias, which is said."""
    if value is None or value["value"] is None:
        return None
    number = f"{value['value']:.4g}"
    if value["interval"] is None or None in value["interval"]:
        return number
    low, high = value["interval"]
    return f"{number} ({low:.4g} to {high:.4g}{'' if value['corrected'] is None else ' without bias'})"
