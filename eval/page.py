"""The report as one HTML page that needs nothing else: verdict first, pictures, intervals, fingerprints."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jinja2

from eval import cases, examine, views

_TEMPLATE = "page.html.j2"
_PIXELATED_UP_TO_PX = 128
_GRID_ROWS = 8
_COLUMNS = (
    "prompt_accuracy", "clip_score", "fd", "patch_fd", "patch_kid", "kid", "cmmd", "mind", "precision", "recall",
    "diversity", "fd_to_teacher", "lpips_to_teacher",
)  # fmt: skip
_MORE_IS_BETTER = {"prompt_accuracy", "clip_score", "precision", "recall", "diversity"}


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """A picture on the page, and whose it is."""

    picture: cases.Picture
    label: str


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A prompt and its pictures. note: why it is shown."""

    prompt: str
    pictures: list[Shown]
    note: str = ""


def render(report: Mapping[str, Any], examination: examine.Examination, chosen: cases.Cases) -> str:
    """The page, complete with its pictures. chosen: the cases that it shows."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(views.TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(_TEMPLATE)
    native = examination.plan.protocol.resolution_px
    return template.render(
        report=report,
        rows=[row | {"title": views.title(row["model"], row["steps"])} for row in report["rows"]],
        columns=[_column(key, report) for key in _COLUMNS if any(key in row["values"] for row in report["rows"])],
        summaries=views.summaries(report),
        charts=views.charts(report),
        axis=views.AXIS,
        grid=_grid(examination),
        subject=views.title(examine.STUDENT, chosen.student_steps),
        sections=_sections(chosen),
        strips=_strips(examination),
        pixelated=native <= _PIXELATED_UP_TO_PX,
    )


def _label(result: examine.Result) -> str:
    return views.title(result.entrant.model, result.entrant.steps)


def _column(key: str, report: Mapping[str, Any]) -> dict[str, Any]:
    name = next(row["values"][key]["name"] for row in report["rows"] if key in row["values"])
    suffix = " to the teacher" if key.endswith("_to_teacher") else ""
    return {"key": key, "name": name + suffix, "better": "higher" if key in _MORE_IS_BETTER else "lower"}


# --- pictures ---------------------------------------------------------------------------------------


def _shown(examination: examine.Examination) -> list[examine.Result]:
    return [result for result in examination.results if result.entrant.model != examine.BASELINE]


def _grid(examination: examine.Examination) -> list[Row]:
    """Some prompts, evenly over the suite, the same seed along each row."""
    return [_row(examination, place) for place in examine.spread(cases.usable(examination), _GRID_ROWS)]


def _row(examination: examine.Examination, place: int) -> Row:
    prompt = examination.plan.suite.prompts[place]
    pictures = [Shown(cases.picture(examination, result, place), _label(result)) for result in _shown(examination)]
    return Row(_quoted(prompt.text, prompt.category), pictures)


def _quoted(text: str, category: str) -> str:
    return text if text.strip() else f"{text!r} ({category})"


def _sections(chosen: cases.Cases) -> list[dict[str, Any]]:
    """The cases by kind, without kinds of which there are none."""
    kinds = (
        ("Where the student falls furthest behind", "standard prompts", chosen.worst),
        ("Edge cases where it falls furthest behind", "edge cases", chosen.worst_edge_cases),
        ("Where it does best against its teacher", "standard prompts", chosen.best),
    )
    return [
        {"title": title, "over": over, "rows": [_case(each, chosen) for each in some]}
        for title, over, some in kinds
        if some
    ]


def _case(case: cases.Case, chosen: cases.Cases) -> Row:
    metric = chosen.metric.replace("_", " ")
    note = f"{case.category}; {metric} {case.student_score:.2f}, teacher {case.teacher_score:.2f}"
    pictures = [
        Shown(case.teacher, views.title(examine.TEACHER, chosen.teacher_steps)),
        Shown(case.student, views.title(examine.STUDENT, chosen.student_steps)),
    ]
    return Row(_quoted(case.prompt, case.category), pictures, note)


def _strips(examination: examine.Examination) -> list[dict[str, Any]]:
    """One prompt, many seeds: a line of pictures for each model."""
    strips: list[dict[str, Any]] = []
    shown = [each for each in _shown(examination) if not each.strip.lost()]
    for start in range(0, len(shown[0].strip.items) if shown else 0, examine.STRIP_SEEDS):
        items = shown[0].strip.items[start : start + examine.STRIP_SEEDS]
        lines = [
            {
                "label": _label(each),
                "pictures": [cases.uri(image) for image in each.strip.read(items)],
            }
            for each in shown
        ]
        strips.append({"prompt": items[0].prompt.text, "lines": lines})
    return strips
