"""The report as JSON and as a table. docs/evaluation.md describes the schema."""

import dataclasses
import json
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval import examine, fingerprint, gate, inception, measure, stats, suites
from eval.fingerprint import Fingerprint, Value
from eval.metrics import cmmd, mind, precision_recall

SCHEMA_VERSION = fingerprint.REPORT_SCHEMA_VERSION
REPORT_NAME, PAGE_NAME = "report.json", "report.html"
SLICED = (*gate.PROMPT_METRICS, "lpips_to_teacher")


def build(examination: examine.Examination, command: str) -> dict[str, Any]:
    """The report as plain JSON values. command: how to make it again."""
    plan, prints = examination.plan, _Fingerprints(examination)
    found = [_Values(examination, result, prints).all() for result in examination.results]
    for values in found:
        _require_alike(values, found[0])
    rows = [_row(examination, *each, prints) for each in zip(examination.results, found, strict=True)]
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": str(examination.verdict),
        "complete": not examination.lost,
        "command": command,
        "protocol": _protocol(examination),
        "models": _models(examination),
        "floor": dataclasses.asdict(plan.floor),
        "reference": examination.reference_name,
        "attainable": _plain(
            {
                key: {"value": estimate.whole, "corrected": estimate.corrected}
                for key, estimate in (examination.attainable or {}).items()
            }
        ),
        "rows": rows,
        "lost": examination.lost,
        "fingerprints": prints.table,
    }


def _protocol(examination: examine.Examination) -> dict[str, Any]:
    plan = examination.plan
    edge = len(plan.suite.prompts) - len(plan.suite.standard)
    return {
        "id": plan.protocol.id,
        "about": plan.protocol.about,
        "as_written": plan.as_written,
        "suite": plan.suite.name,
        "prompts": len(plan.suite.prompts) - edge,
        "edge_cases": edge,
        "prompts_sha256": plan.suite.sha256,
        "prompts_longer_than_clip_reads": examination.overlong,
        "images_per_prompt": plan.protocol.images_per_prompt,
        "resolution_px": plan.protocol.resolution_px,
        "seed": plan.seed,
        "batch_size": plan.batch_size,
        "device": plan.device,
        "price_per_hour_usd": plan.price_per_hour_usd,
    }


def _models(examination: examine.Examination) -> dict[str, dict[str, str]]:
    entrants = [result.entrant for result in examination.results]
    return {each.model: {"source": each.source, "artifact_sha256": each.artifact_sha256} for each in entrants}


# --- values -----------------------------------------------------------------------------------------


class _Fingerprints:
    """Makes the fingerprint of each value and keeps each once."""

    def __init__(self, examination: examine.Examination) -> None:
        self._examination = examination
        self._hashes = examination.instruments.sha256()
        self._versions = fingerprint.versions()
        suite, lost = examination.plan.suite, examination.lost
        measured = suites.Suite(suite.name, tuple(prompt for prompt in suite.prompts if prompt.id not in lost))
        self._prompts_sha256 = measured.sha256
        self.table: dict[str, dict[str, Any]] = {}

    def keep(self, made: Fingerprint) -> str:
        self.table[made.digest()] = dataclasses.asdict(made)
        return made.digest()

    def make(self, key: str, result: examine.Result, reference: str) -> Fingerprint:
        plan, parts = self._examination.plan, self._examination.instruments
        metric, network, settings = _described(key, self._examination)
        resizer: Any = {parts.features.name: parts.features, parts.clip.name: parts.clip}.get(network)
        if network == parts.distance.name and resizer is None:
            resizer = parts.distance.maps
        return Fingerprint(
            metric=metric,
            network=network,
            network_sha256=self._hashes.get(network, ""),
            resizer="none" if resizer is None else resizer.resizer,
            antialias=resizer is not None and resizer.antialias,
            reference=reference,
            samples=_samples(key, result, plan),
            prompts_sha256=self._prompts_sha256,
            images_per_prompt=plan.protocol.images_per_prompt,
            seed=plan.seed,
            resolution_px=plan.protocol.resolution_px,
            settings=settings,
            versions=self._versions,
            device=plan.device,
            code_sha256=fingerprint.code_sha256(),
        )


def _described(key: str, examination: examine.Examination) -> tuple[str, str, dict[str, Any]]:
    """Name in full, name of the network, and further settings of a metric."""
    parts, protocol = examination.instruments, examination.plan.protocol
    features, clip, distance = parts.features.name, parts.clip.name, parts.distance.name
    scale = "" if protocol.clip_scale == 1 else f" x{protocol.clip_scale:g}"
    crops = {"crop_px": protocol.crop_px, "crops_per_image": protocol.crops_per_image}
    names: dict[str, tuple[str, str, dict[str, Any]]] = {
        "fd": (inception.frechet_name(parts.features), features, {}),
        "patch_fd": (f"patch {inception.frechet_name(parts.features)}", features, crops),
        "patch_kid": (f"patch KID[{features}]", features, crops | {"most_crops": measure.MOST_KERNEL_ROWS}),
        "kid": (f"KID[{features}]", features, {"subsets": "none: all pictures"}),
        "mind": (f"MIND[{features}]", features, {"projections": mind.PROJECTIONS, "seed": mind.SEED}),
        "cmmd": (f"CMMD[{clip}]", clip, {"sigma": cmmd.SIGMA, "scale": cmmd.SCALE}),
        "precision": (f"precision[{features}]", features, {"neighbours": precision_recall.NEIGHBOURS}),
        "recall": (f"recall[{features}]", features, {"neighbours": precision_recall.NEIGHBOURS}),
        "clip_score": (
            f"CLIP score[{clip}]{scale}",
            clip,
            {"prefix": protocol.clip_prefix, "scale": protocol.clip_scale},
        ),
        "lpips_to_teacher": (f"LPIPS[{distance}]", distance, {}),
        "diversity": (f"LPIPS diversity[{distance}]", distance, {}),
        "prompt_accuracy": ("prompt accuracy[shapes-oracle]", "", {}),
    }
    return names[key.removesuffix("_to_teacher") if key != "lpips_to_teacher" else key]


def _samples(key: str, result: examine.Result, plan: examine.Plan) -> int:
    """Pictures of standard prompts of which the metric says something."""
    if key not in SLICED:
        return len(result.measured.sets.whole)
    return int(np.isfinite(result.measured.scores[key][plan.suite.standard]).sum()) * plan.protocol.images_per_prompt


class _Values:
    def __init__(self, examination: examine.Examination, result: examine.Result, prints: _Fingerprints) -> None:
        self._examination, self._result, self._prints = examination, result, prints
        teacher = examination.results[0].entrant
        self._teacher_name = (
            f"{teacher.artifact_sha256[:12]}, {teacher.steps} steps, guidance {teacher.guidance_scale:g}, "
            f"{json.dumps(teacher.settings, sort_keys=True)}"
        )

    def all(self) -> dict[str, Value]:
        result, truth = self._result, self._examination.reference_name
        found = {key: self._distance(key, estimate, truth) for key, estimate in result.evidence.sets.items()}
        found |= {key: self._value(key, share, None, truth) for key, share in result.precision_recall.items()}
        for key, estimate in result.to_teacher.items():
            found[f"{key}_to_teacher"] = self._distance(f"{key}_to_teacher", estimate, self._teacher_name)
        standard = self._examination.plan.suite.standard
        for key in SLICED:
            scores = result.measured.scores.get(key, np.empty(0))
            mean = _mean(scores[standard]) if len(scores) else None
            if mean is not None:
                reference = self._teacher_name if key == "lpips_to_teacher" else "none"
                found[key] = self._value(key, mean, _interval(key, scores[standard]), reference)
        return found

    def _distance(self, key: str, estimate: stats.Jackknife, reference: str) -> Value:
        print_ = self._prints.make(key, self._result, reference)
        return Value(
            value=estimate.whole, interval=estimate.interval(), fingerprint=print_, corrected=estimate.corrected
        )

    def _value(self, key: str, value: float, interval: tuple[float, float] | None, reference: str) -> Value:
        return Value(value=value, interval=interval, fingerprint=self._prints.make(key, self._result, reference))


def _mean(scores: NDArray[np.float64]) -> float | None:
    """Over the prompts of which a metric says something; None for none."""
    known = scores[np.isfinite(scores)]
    return float(known.mean()) if len(known) else None


def _interval(metric: str, scores: NDArray[np.float64]) -> tuple[float, float]:
    """95 %, of `_mean`: Wilson's for shares of right pictures, which have no spread where all are right."""
    known = scores[np.isfinite(scores)]
    if metric == "prompt_accuracy":
        return stats.wilson_interval(float(known.sum()), len(known))
    return stats.bootstrap_interval(known)


# --- rows -------------------------------------------------------------------------------------------


def _require_alike(values: dict[str, Value], teacher: dict[str, Value]) -> None:
    """A retention compares a student's number with its teacher's: they must have been measured alike."""
    for key in values.keys() & teacher.keys():
        assert values[key].fingerprint == teacher[key].fingerprint, f"{key} was measured in two ways"


def _row(
    examination: examine.Examination, result: examine.Result, found: dict[str, Value], prints: _Fingerprints
) -> dict[str, Any]:
    plan, entrant, timed = examination.plan, result.entrant, result.speed
    row = {
        "model": entrant.model,
        "steps": entrant.steps,
        "guidance_scale": entrant.guidance_scale,
        "values": {key: _value(value, prints) for key, value in found.items()},
        "prompt_accuracy_by": {
            attribute: _mean(scores[plan.suite.standard]) for attribute, scores in result.measured.facts.items()
        },
        "slices": _slices(examination, result),
        "speed": {
            "latency_s": timed.mean_latency_s,
            "latency_runs_s": list(timed.latency_s),
            "batch_size": timed.batch_size,
            "seconds_per_image": timed.seconds_per_image,
            "images_per_second": 1 / timed.seconds_per_image,
            "peak_memory_gb": timed.peak_memory_gb,
            "cost_usd": None if plan.price_per_hour_usd is None else timed.cost_usd(plan.price_per_hour_usd),
        },
    }
    if result.verdict is not None:
        row["verdict"] = {
            "outcome": str(result.verdict.outcome),
            "because": result.verdict.sentences(),
            "checks": [_check(check) for check in result.verdict.checks],
        }
    if entrant.model == examine.TEACHER and plan.protocol.windows and plan.as_written and not examination.lost:
        row["windows"] = {
            key: {"least": low, "most": high, "met": low <= found[key].value <= high}
            for key, (low, high) in plan.protocol.windows.items()
            if key in found
        }
    return _plain(row)  # type: ignore[no-any-return]


def _value(value: Value, prints: _Fingerprints) -> dict[str, Any]:
    return {
        "name": value.fingerprint.metric,
        "value": value.value,
        "corrected": value.corrected,
        "interval": value.interval,
        "fingerprint": prints.keep(value.fingerprint),
    }


def _check(check: gate.Check) -> dict[str, Any]:
    return {
        "metric": check.metric,
        "slice": check.slice,
        "retention": check.retention.value,
        "interval": check.retention.interval,
        "floor": check.retention.floor,
        "samples": check.retention.samples,
        "needs": check.needs,
        "band": gate.band(check.retention.value) if math.isfinite(check.retention.value) else None,
        "outcome": str(check.outcome),
        "sentence": check.sentence(),
    }


def _slices(examination: examine.Examination, result: examine.Result) -> dict[str, Any]:
    """metric -> slice -> mean, its interval, and the retention against the teacher with its interval."""
    plan = examination.plan
    named = [
        (name, members, over.startswith("edge"))
        for over in gate.OVER
        for name, members in gate.slices(plan.suite, over)
    ]
    table: dict[str, dict[str, Any]] = {}
    for metric, scores in ((metric, result.measured.scores.get(metric)) for metric in SLICED):
        for name, members, edge in named if scores is not None else ():
            known = np.asarray(scores)[members]
            mean = _mean(known)
            if mean is not None:
                prompts = int(np.isfinite(known).sum())
                entry = {"value": mean, "interval": _interval(metric, known), "prompts": prompts, "edge_case": edge}
                table.setdefault(metric, {})[name] = entry | _retained(examination, result, metric, members)
    return table


def _retained(
    examination: examine.Examination, result: examine.Result, metric: str, members: NDArray[np.int64]
) -> dict[str, Any]:
    """The retention of a slice; empty for the teacher, and where there is none."""
    teacher = examination.results[0]
    if result is teacher or metric not in gate.PROMPT_METRICS:
        return {}
    kept = gate.score_retention(metric, result.evidence, teacher.evidence, members, 1.0, 0.95)
    if kept is None or not math.isfinite(kept.value):
        return {}
    return {"retention": kept.value, "retention_interval": kept.interval, "band": gate.band(kept.value)}


def _plain(content: Any) -> Any:
    """Infinite and undefined numbers, which JSON has not, become null."""
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


# --- for the terminal -------------------------------------------------------------------------------

_COLUMNS = (
    ("accuracy", "prompt_accuracy", 3), ("FD", "fd", 2), ("patch FD", "patch_fd", 2), ("patch KID", "patch_kid", 3),
    ("KID", "kid", 3),
    ("CMMD", "cmmd", 3), ("MIND", "mind", 2), ("recall", "recall", 3), ("CLIP", "clip_score", 3),
    ("diversity", "diversity", 3), ("FD teacher", "fd_to_teacher", 2), ("LPIPS teacher", "lpips_to_teacher", 3),
)  # fmt: skip


def table(report: Mapping[str, Any]) -> str:
    """The rows as aligned plain text, then the verdict and what decided it."""
    shown = [column for column in _COLUMNS if any(column[1] in row["values"] for row in report["rows"])]
    heading = ("model", "steps", "guidance", *(name for name, _, _ in shown), "edge cases", "ms/image", "verdict")
    lines = [heading, *(_cells(row, shown) for row in report["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    protocol = report["protocol"]
    networks = sorted({each["network"] for each in report["fingerprints"].values() if each["network"]})
    title = (
        f"{protocol['id']}: {protocol['prompts']} prompts and {protocol['edge_cases']} edge cases, "
        f"{protocol['images_per_prompt']} pictures each; networks: {', '.join(networks)}"
    )
    return "\n".join([title, *(_align(line, widths) for line in lines), "", *verdict_lines(report)])


def verdict_lines(report: Mapping[str, Any]) -> list[str]:
    lines = [f"verdict: {report['verdict']}"]
    for row in report["rows"]:
        if row["model"] == examine.STUDENT:
            lines.append(f"  {row['steps']} step{'s' if row['steps'] > 1 else ''}: {row['verdict']['outcome']}")
            lines += [f"    {sentence}" for sentence in row["verdict"]["because"]]
    return lines


def _cells(row: Mapping[str, Any], shown: Sequence[tuple[str, str, int]]) -> tuple[str, ...]:
    numbers = (_number(row["values"].get(key, {}).get("value"), digits) for _, key, digits in shown)
    sliced = row["slices"].get("prompt_accuracy") or row["slices"].get("clip_score") or {}
    edge = sliced.get("all edge cases", {}).get("value")
    return (
        row["model"],
        str(row["steps"]),
        f"{row['guidance_scale']:g}",
        *numbers,
        _number(edge, 3),
        f"{1000 * row['speed']['latency_s']:.1f}",
        row.get("verdict", {}).get("outcome", "-"),
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _align(line: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = line
    cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


# --- on disk ----------------------------------------------------------------------------------------


def write(folder: pathlib.Path, files: Mapping[str, str]) -> None:
    """Write texts, name -> content; earlier ones there are replaced, and no file is ever half-written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        draft = pathlib.Path(beside)
        for name, text in files.items():
            (draft / name).write_text(text, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for name in files:
            (draft / name).replace(folder / name)


def to_json(report: Mapping[str, Any]) -> str:
    return json.dumps(report, indent=1, allow_nan=False) + "\n"
