"""What the evaluation found, what people prefer, and two artifacts beside each other."""

import asyncio
import hashlib
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr
import jinja2

from diffusion_kd import errors
from eval import cases, compare, preference, views
from serve.playground import html, reports, words
from serve.playground.stage import Stage, queued

log = logging.getLogger(__name__)

_READING = queued("reports", 2) | {"show_progress": "minimal"}
"""Each report is parsed whole."""

_NONE = "There is no evaluation yet. Make one with: make evaluate (or python -m eval.run), and reload this page."
_NO_OTHER = "no other"
_DAMAGED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, StopIteration, RecursionError)
"""What a report causes whose parts are not what they should be; a template's errors are beside them."""


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
        self._report.input(self._choose, menus, [self._shown, self._beside], **_READING)
        self._other.input(self._choose, menus, [self._shown, self._beside], **_READING)

    async def _open(self, report: str | None, other: str | None, request: gr.Request) -> list[Any]:
        """Everything, with what was chosen before where it still is there."""
        if barred := await self._on.barred(request):
            return [gr.skip(), gr.skip(), html.notice(barred, "bad"), "", ""]
        return await asyncio.to_thread(self._all, report, other)

    async def _choose(self, report: str | None, other: str | None, request: gr.Request) -> list[str]:
        if barred := await self._on.barred(request):
            return [html.notice(barred, "bad"), ""]
        return await asyncio.to_thread(lambda: self._show(report, other, self._found()))

    def _all(self, report: str | None, other: str | None) -> list[Any]:
        found = self._found()
        names = list(found)
        report = report if report in found else next(iter(names), None)
        other = other if other in found else _NO_OTHER
        menus = [gr.update(choices=names, value=report), gr.update(choices=[_NO_OTHER, *names], value=other)]
        return [*menus, *self._show(report, other, found), self._preferences()]

    def _found(self) -> dict[str, pathlib.Path]:
        return reports.find(self._on.runs, self._on.service.engine.models["turbo"].source)

    def _show(self, report: str | None, other: str | None, found: Mapping[str, pathlib.Path]) -> list[str]:
        """The evaluation, and the other beside it."""
        if report is None:
            return [html.notice(_NONE), ""]
        pair = "" if other in (None, _NO_OTHER) else _readable(_beside, [report, str(other)], found)
        return [_readable(_evaluation, [report], found), pair]

    def _preferences(self) -> str:
        turbo, premium = (self._on.service.catalogue.tiers[tier].model.version for tier in ("turbo", "premium"))
        tallies = self._on.service.store.tallies(turbo, premium)
        return html.render("people", found=preference.preference(tallies), turbo=turbo, premium=premium)


def _readable(draw: Callable[..., str], names: Sequence[str], found: Mapping[str, pathlib.Path]) -> str:
    """What is drawn of these reports, or a sentence that says why it is not."""
    if missing := [name for name in names if name not in found]:
        return html.notice(f"The report {missing[0]!r} is gone; open this page anew.", "bad")
    try:
        return draw(*(found[name] for name in names))
    except errors.DiffusionKDError as error:
        return html.notice(words.sentence(str(error)), "bad")
    except (*_DAMAGED, jinja2.TemplateError) as error:
        log.warning("a report cannot be shown: %r", error)
        return html.notice("This report is damaged: something that this page needs is missing, or is no number.", "bad")


def _evaluation(path: pathlib.Path) -> str:
    report, (chosen, remark) = compare.load(path), _cases(path)
    return html.render(
        "evaluation",
        report=report,
        summaries=views.summaries(report),
        charts=views.charts(report),
        axis=views.AXIS,
        cases=chosen,
        remark=remark,
    )


def _cases(path: pathlib.Path) -> tuple[cases.Cases | None, str]:
    """Those beside a report, or a sentence that says why there are none."""
    file = path.with_name(cases.FILE_NAME)
    if not file.is_file():
        return None, "There are no pictures of cases beside this report; evaluate again to have them."
    try:
        chosen = cases.load(file)
    except errors.DataError as error:
        return None, words.sentence(str(error))
    if chosen.report.sha256 != hashlib.sha256(path.read_bytes()).hexdigest():
        return None, "The cases beside this report are of another evaluation; evaluate again to have its own."
    return chosen, ""


def _beside(first: pathlib.Path, second: pathlib.Path) -> str:
    rows = list(compare.lines(compare.load(first), compare.load(second)))
    numbers = [row for row in rows if row[0]]
    return html.render("beside", rows=numbers, remarks=[row[2] for row in rows if not row[0]])
