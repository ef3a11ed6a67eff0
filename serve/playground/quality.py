"""What the evaluation found, what people prefer, and two artifacts beside each other."""

import asyncio
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from diffusion_kd import errors
from eval import cases, compare, preference, views
from serve.playground import html, reports, stage
from serve.playground.stage import Stage

log = logging.getLogger(__name__)

_READS = 2
"""Reports that are read at a time, by all people together: each is parsed whole."""

_READING: dict[str, Any] = {
    "concurrency_limit": _READS,
    "concurrency_id": "reports",
    "show_progress": "minimal",
    "api_visibility": "private",
}
_NONE = "There is no evaluation yet. Make one with: make evaluate (or python -m eval.run), and reload this page."
_NO_OTHER = "no other"


class Quality:
    """The tab. It is read anew whenever somebody opens it."""

    def __init__(self, on: Stage, tab: gr.Tab) -> None:
        self._on = on
        self._people = gr.HTML("", elem_id="people")
        with gr.Row():
            self._report = gr.Dropdown([], label="Evaluation", interactive=True, filterable=False, min_width=280)
            self._other = gr.Dropdown([], label="Compare with", interactive=True, filterable=False, min_width=280)
        self._beside = gr.HTML("", elem_id="comparison")
        self._shown = gr.HTML("", elem_id="evaluation")
        menus = [self._report, self._other]
        tab.select(self._open, menus, [*menus, self._shown, self._beside, self._people], **_READING)
        self._report.input(self._show, menus, [self._shown, self._beside], **_READING)
        self._other.input(self._comparison, menus, self._beside, **_READING)

    async def _open(self, report: str | None, other: str | None) -> list[Any]:
        """Everything, with what was chosen before where it still is there."""
        names = list(await asyncio.to_thread(self._found))
        report = report if report in names else next(iter(names), None)
        other = other if other in names else _NO_OTHER
        menus = [gr.update(choices=names, value=report), gr.update(choices=[_NO_OTHER, *names], value=other)]
        return [*menus, *await self._show(report, other), await asyncio.to_thread(self._preferences)]

    async def _show(self, report: str | None, other: str | None) -> list[str]:
        return [await self._evaluation(report), await self._comparison(report, other)]

    def _found(self) -> dict[str, pathlib.Path]:
        return reports.find(self._on.runs, self._on.service.engine.models["turbo"].source)

    async def _evaluation(self, name: str | None) -> str:
        if name is None:
            return html.notice(_NONE)
        return await asyncio.to_thread(self._readable, self._render, [name])

    async def _comparison(self, first: str | None, second: str | None) -> str:
        if first is None or second in (None, _NO_OTHER):
            return ""
        return await asyncio.to_thread(self._readable, _beside, [first, str(second)])

    def _readable(self, draw: Callable[..., str], names: Sequence[str]) -> str:
        """What is drawn of these reports, or a sentence that says why it is not."""
        found = self._found()
        if missing := [name for name in names if name not in found]:
            return html.notice(f"The report {missing[0]!r} is gone; open this page anew.", "bad")
        try:
            return draw(*(found[name] for name in names))
        except errors.DiffusionKDError as error:
            return html.notice(stage.sentence(error), "bad")
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            log.warning("a report cannot be shown: %r", error)
            return html.notice(f"This report is damaged: {errors.first_line(error)}.", "bad")

    def _render(self, path: pathlib.Path) -> str:
        report = compare.load(path)
        file = path.with_name(cases.FILE_NAME)
        return html.render(
            "evaluation",
            report=report,
            summaries=views.summaries(report),
            charts=views.charts(report),
            axis=views.AXIS,
            cases=cases.load(file) if file.is_file() else None,
        )

    def _preferences(self) -> str:
        turbo, premium = (self._on.service.catalogue.tiers[tier].model.version for tier in ("turbo", "premium"))
        tallies = self._on.service.store.tallies(turbo, premium)
        return html.render("people", found=preference.preference(tallies), turbo=turbo, premium=premium)


def _beside(first: pathlib.Path, second: pathlib.Path) -> str:
    rows = list(compare.lines(compare.load(first), compare.load(second)))
    numbers = [row for row in rows if row[0]]
    return html.render("beside", rows=numbers, remarks=[row[2] for row in rows if not row[0]])
