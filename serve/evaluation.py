"""What the report of an evaluation says of the student that is served."""

import json
import logging
import pathlib
from typing import Any

from diffusion_kd import artifact, errors
from eval.fingerprint import REPORT_SCHEMA_VERSION
from serve import schemas
from serve.engine.models import Model

log = logging.getLogger(__name__)

_MADE_HERE = pathlib.Path("runs/eval/report.json")


def find(turbo: Model, given: pathlib.Path | None) -> schemas.EvaluationOut | None:
    """The evaluation of the student, from `given`, or else from a report.json beside its folder or of `make evaluate`.

    A report of other weights is none. Raises ConfigError if `given` cannot be read or is of other weights.
    """
    if given is not None:
        found = _read(given, turbo.sha256)
        if found is None:
            raise errors.ConfigError(f"{given} is no evaluation of {turbo.version}; make one with python -m eval.run")
        return found
    for path in (artifact.resolve(turbo.source).parent / "report.json", _MADE_HERE):
        if path.is_file() and (found := _read(path, turbo.sha256)) is not None:
            return found
    return None


def _read(path: pathlib.Path, sha256: str) -> schemas.EvaluationOut | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != REPORT_SCHEMA_VERSION:
            log.warning("%s is a report of another release, schema version %s", path, content["schema_version"])
            return None
        if content["models"]["student"]["artifact_sha256"] != sha256:
            return None
        steps = {str(row["steps"]): row["verdict"]["outcome"] for row in content["rows"] if row["model"] == "student"}
        return schemas.EvaluationOut(
            verdict=content["verdict"], protocol=content["protocol"]["id"], steps=steps, report=path.name
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read as the report of an evaluation: %s", path, errors.first_line(error))
        return None
