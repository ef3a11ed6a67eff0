"""The report as one HTML page that needs nothing else: verdict first, pictures, intervals, fingerprints."""

import base64
import dataclasses
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from diffusion_kd.shapes import oracle
from eval import examine, gate, images

_TEMPLATE = pathlib.Path(__file__).parent / "page.html.j2"
_THUMBNAIL_PX, _PIXELATED_UP_TO_PX = 256, 128
_GRID_ROWS, _CASES = 8, 6
_AXIS = 1.25
"""Retention at the right end of the charts."""

_NAMES = {
    examine.TEACHER: "teacher",
    examine.STUDENT: "student",
    examine.BASELINE: "teacher, untrained for few steps",
    examine.BESIDE: "other student",
}
_COLUMNS = (
    "prompt_accuracy", "clip_score", "fd", "patch_fd", "patch_kid", "kid", "cmmd", "mind", "precision", "recall",
    "diversity", "fd_to_teacher", "lpips_to_teacher",
)  # fmt: skip
_MORE_IS_BETTER = {"prompt_accuracy", "clip_score", "precision", "recall", "diversity"}


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """A picture on the page. says: what the oracle reads in it, if anything."""

    uri: str
    label: str
    says: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A prompt and its pictures. note: why it is shown."""

    prompt: str
    pictures: list[Shown]
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """One line of a chart, all positions in percent of its width. text: the number in words."""

    name: str
    prompts: int
    steps: int
    band: str
    low: float
    value: float
    high: float
    text: str


def render(report: Mapping[str, Any], examination: examine.Examination) -> str:
    """The page, complete with its pictures."""
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))
    students = [result for result in examination.results if result.entrant.model == examine.STUDENT]
    subject = min(students, key=lambda result: result.entrant.steps)
    worst, best = _cases(examination, subject)
    native = examination.plan.protocol.resolution_px
    return template.render(
        report=report,
        rows=[row | {"title": _title(row["model"], row["steps"])} for row in report["rows"]],
        columns=[_column(key, report) for key in _COLUMNS if any(key in row["values"] for row in report["rows"])],
        summaries=[_summary(row, report) for row in report["rows"] if row["model"] == examine.STUDENT],
        charts=_charts(report),
        floors={(floor.metric, floor.over): floor.retention for floor in examination.plan.floor.floors},
        axis=_AXIS,
        grid=_grid(examination),
        subject=_label(subject),
        worst=worst,
        best=best,
        strips=_strips(examination),
        pixelated=native <= _PIXELATED_UP_TO_PX,
    )


def _title(model: str, steps: int) -> str:
    return f"{_NAMES[model]}, {steps} step{'s' if steps > 1 else ''}"


def _label(result: examine.Result) -> str:
    return _title(result.entrant.model, result.entrant.steps)


def _column(key: str, report: Mapping[str, Any]) -> dict[str, Any]:
    name = next(row["values"][key]["name"] for row in report["rows"] if key in row["values"])
    suffix = " to the teacher" if key.endswith("_to_teacher") else ""
    return {"key": key, "name": name + suffix, "better": "higher" if key in _MORE_IS_BETTER else "lower"}


def _summary(row: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """One student in a sentence."""
    teacher = report["rows"][0]
    metric = next(name for name in gate.PROMPT_METRICS if "all prompts" in row["slices"].get(name, {}))
    kept = row["slices"][metric]["all prompts"]
    edge = row["slices"][metric].get("all edge cases")
    faster = teacher["speed"]["latency_s"] / row["speed"]["latency_s"]
    cheaper = 1 - row["speed"]["seconds_per_image"] / teacher["speed"]["seconds_per_image"]
    return {
        "steps": row["steps"],
        "outcome": row["verdict"]["outcome"],
        "because": row["verdict"]["because"],
        "metric": metric.replace("_", " "),
        "kept": kept.get("retention"),
        "band": kept.get("band"),
        "edge": edge.get("retention") if edge else None,
        "faster": faster,
        "cheaper": cheaper,
    }


# --- charts -----------------------------------------------------------------------------------------


def _charts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each metric of prompts: retention by slice, standard and edge cases apart, one line a student."""
    students = [row for row in report["rows"] if row["model"] == examine.STUDENT]
    charts = []
    for metric in gate.PROMPT_METRICS:
        if not all(metric in row["slices"] for row in students):
            continue
        bars: dict[bool, list[Bar]] = {False: [], True: []}
        for name, first in students[0]["slices"][metric].items():
            for row in students:
                bars[first["edge_case"]] += _bar(name, row["slices"][metric].get(name), row["steps"])
        charts.append(
            {"metric": metric, "title": metric.replace("_", " "), "standard": bars[False], "edge": bars[True]}
        )
    return charts


def _bar(name: str, entry: Mapping[str, Any] | None, steps: int) -> list[Bar]:
    if entry is None or entry.get("retention") is None:
        return []
    low, high = entry["retention_interval"]
    said = ("?" if end is None else f"{end:.3f}" for end in (low, high))
    text = f"{entry['retention']:.3f} [{', '.join(said)}]"
    low, high = (0.0 if low is None else low), (_AXIS if high is None else high)
    left, middle, right = (min(max(value, 0), _AXIS) / _AXIS * 100 for value in (low, entry["retention"], high))
    return [Bar(name, entry["prompts"], steps, entry["band"], left, middle, right, text)]


# --- pictures ---------------------------------------------------------------------------------------


def _shown(examination: examine.Examination) -> list[examine.Result]:
    return [result for result in examination.results if result.entrant.model != examine.BASELINE]


def _usable(examination: examine.Examination) -> list[int]:
    return [index for index, prompt in enumerate(examination.plan.suite.prompts) if prompt.id not in examination.lost]


def _grid(examination: examine.Examination) -> list[Row]:
    """Some prompts, evenly over the suite, the same seed along each row."""
    return [_row(examination, index, _shown(examination)) for index in examine.spread(_usable(examination), _GRID_ROWS)]


def _row(examination: examine.Examination, index: int, results: Sequence[examine.Result], note: str = "") -> Row:
    prompt = examination.plan.suite.prompts[index]
    asks = prompt.asks is not None and examination.plan.protocol.oracle
    pictures = [_picture(result.gallery, _item(examination, result, index), _label(result), asks) for result in results]
    return Row(prompt.text if prompt.text.strip() else f"{prompt.text!r} ({prompt.category})", pictures, note)


def _item(examination: examine.Examination, result: examine.Result, index: int) -> images.Item:
    return result.gallery.items[index * examination.plan.protocol.images_per_prompt]


def _picture(gallery: images.Gallery, item: images.Item, label: str, reads: bool) -> Shown:
    image = gallery.read([item])[0]
    return Shown(_uri(image), label, _say(oracle.read(image)) if reads else "")


def _say(reading: oracle.Reading) -> str:
    if not reading.readable:
        return "not readable"
    things = [" ".join(word or "?" for word in (thing.size, thing.colour, thing.shape)) for thing in reading.objects]
    between = oracle.relation(reading)
    return f" {between} ".join(things) if between else ", ".join(things) or "nothing"


def _uri(image_uint8: NDArray[np.uint8]) -> str:
    """Small pictures as they are, large ones as thumbnails."""
    picture, stream = PIL.Image.fromarray(image_uint8), io.BytesIO()
    if max(picture.size) > _THUMBNAIL_PX:
        picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), PIL.Image.Resampling.LANCZOS)
        picture.save(stream, "JPEG", quality=85)
        kind = "jpeg"
    else:
        picture.save(stream, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _cases(examination: examine.Examination, subject: examine.Result) -> tuple[list[Row], list[Row]]:
    """Prompts on which a student falls furthest behind its teacher, and gains most on it."""
    teacher, plan = examination.results[0], examination.plan
    metric = "prompt_accuracy" if "prompt_accuracy" in subject.measured.scores else "clip_score"
    ours, theirs = subject.measured.scores[metric], teacher.measured.scores[metric]
    apart = subject.measured.scores["lpips_to_teacher"]
    usable = [
        index for index in _usable(examination) if np.isfinite(ours[index]) and not plan.suite.prompts[index].edge_case
    ]
    worst = sorted(usable, key=lambda index: (ours[index] - theirs[index], -apart[index]))[:_CASES]
    best = sorted(usable, key=lambda index: (theirs[index] - ours[index], apart[index]))[:_CASES]

    def row(index: int) -> Row:
        note = f"{metric.replace('_', ' ')} {ours[index]:.2f}, teacher {theirs[index]:.2f}"
        return _row(examination, index, [teacher, subject], note)

    return [row(index) for index in worst], [row(index) for index in best]


def _strips(examination: examine.Examination) -> list[dict[str, Any]]:
    """One prompt, many seeds: a line of pictures for each model."""
    strips: list[dict[str, Any]] = []
    shown = [each for each in _shown(examination) if not each.strip.lost()]
    for start in range(0, len(shown[0].strip.items) if shown else 0, examine.STRIP_SEEDS):
        items = shown[0].strip.items[start : start + examine.STRIP_SEEDS]
        lines = [
            {
                "label": _label(each),
                "pictures": [_uri(image) for image in each.strip.read(items)],
            }
            for each in shown
        ]
        strips.append({"prompt": items[0].prompt.text, "lines": lines})
    return strips
