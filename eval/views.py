"""A report in the words and the shapes of a page: sentences about students, charts of what they keep.

Pure functions of what report.json holds; `parts.html.j2` draws them, in report.html and in the playground.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from eval import examine, gate

TEMPLATES = pathlib.Path(__file__).parent
AXIS = 1.25
"""Retention at the right end of the charts."""

_NAMES = {
    examine.TEACHER: "teacher",
    examine.STUDENT: "student",
    examine.BASELINE: "teacher, untrained for few steps",
    examine.BESIDE: "other student",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """One line of a chart, positions in percent of its width. text: the number in words. floor: None for none."""

    name: str
    prompts: int
    steps: int
    band: str
    low: float
    value: float
    high: float
    text: str
    floor: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """What is kept of one metric, by kind of prompt; edge cases apart."""

    title: str
    standard: list[Bar]
    edge: list[Bar]


def title(model: str, steps: int) -> str:
    return f"{_NAMES[model]}, {steps} step{'s' if steps > 1 else ''}"


def summaries(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each student in a sentence."""
    return [_summary(row, report) for row in report["rows"] if row["model"] == examine.STUDENT]


def _summary(row: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
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


def charts(report: Mapping[str, Any]) -> list[Chart]:
    """For each metric of prompts: retention by slice, standard and edge cases apart, one line a student."""
    students = [row for row in report["rows"] if row["model"] == examine.STUDENT]
    floors = {(floor["metric"], floor["over"]): floor["retention"] for floor in report["floor"]["floors"]}
    found = []
    for metric in gate.PROMPT_METRICS:
        if not all(metric in row["slices"] for row in students):
            continue
        bars: dict[bool, list[Bar]] = {False: [], True: []}
        for name, first in students[0]["slices"][metric].items():
            for row in students:
                floor = floors.get((metric, _over(name, first["edge_case"])))
                bars[first["edge_case"]] += _bar(name, row["slices"][metric].get(name), row["steps"], floor)
        found.append(Chart(metric.replace("_", " "), bars[False], bars[True]))
    return found


def _bar(name: str, entry: Mapping[str, Any] | None, steps: int, floor: float | None) -> list[Bar]:
    if entry is None or entry.get("retention") is None:
        return []
    low, high = entry["retention_interval"]
    said = ("?" if end is None else f"{end:.3f}" for end in (low, high))
    text = f"{entry['retention']:.3f} [{', '.join(said)}]"
    low, high = (0.0 if low is None else low), (AXIS if high is None else high)
    left, middle, right = (min(max(value, 0), AXIS) / AXIS * 100 for value in (low, entry["retention"], high))
    least = None if floor is None else floor / AXIS * 100
    return [Bar(name, entry["prompts"], steps, entry["band"], left, middle, right, text, least)]


def _over(name: str, edge_case: bool) -> str:
    """What a floor is over, for a slice of that name."""
    if edge_case:
        return "edge_cases" if name == "all edge cases" else "edge_category"
    return "all" if name == "all prompts" else "category"
