"""Training runs as they go: curves, samples over time, and what the curves say in words."""

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

import gradio as gr
import pandas as pd

from diffusion_kd import errors
from eval import health
from eval import runs as on_disk
from serve.playground import html, stage, words
from serve.playground.stage import Stage

_EVERY_S = 5
_READS = 2
"""Runs that are read at a time, by all people together."""

_READING: dict[str, Any] = {
    "concurrency_limit": _READS,
    "concurrency_id": "runs",
    "show_progress": "hidden",
    "api_visibility": "private",
}
_NONE = "There is no training yet. Start one with: make demo (or python -m training.distill), and it appears here."
_SHOWN_GRIDS = 12


class Runs:
    """The tab. It is read anew when it is opened, and every few seconds while a run goes on."""

    def __init__(self, on: Stage, tab: gr.Tab) -> None:
        self._on = on
        self._menu = gr.Dropdown([], label="Run", interactive=True, filterable=False)
        self._said = gr.HTML(html.notice(_NONE), elem_id="run-health")
        self._curves = gr.State([])
        self._draw_curves()
        self._grids = gr.HTML("", elem_id="run-grids")
        self._config = gr.HTML("", elem_id="run-config")
        self._clock = gr.Timer(_EVERY_S, active=False)
        shown = [self._said, self._curves, self._grids, self._config, self._clock]
        tab.select(self._open, self._menu, [self._menu, *shown], **_READING)
        self._menu.input(self._show, self._menu, shown, **_READING)
        self._clock.tick(self._show, self._menu, shown, **_READING)

    def _draw_curves(self) -> None:
        @gr.render(inputs=self._curves, show_progress="hidden")  # type: ignore[untyped-decorator]
        def draw(curves: Sequence[on_disk.Curve]) -> None:
            """A plot for each curve, three in a row where there is room."""
            with gr.Row(elem_id="run-curves"):
                for curve in curves:
                    gr.LinePlot(
                        _frame(curve),
                        x="images seen",
                        y=_name(curve),
                        title=_name(curve),
                        height=200,
                        min_width=300,
                        key=_name(curve),
                    )

    async def _open(self, chosen: str | None) -> list[Any]:
        found = await asyncio.to_thread(on_disk.find, self._on.runs)
        names = [run.name for run in found]
        chosen = chosen if chosen in names else next(iter(names), None)
        return [gr.update(choices=[(_label(run), run.name) for run in found], value=chosen), *await self._show(chosen)]

    async def _show(self, name: str | None) -> list[Any]:
        return await asyncio.to_thread(self._read, name)

    def _read(self, name: str | None) -> list[Any]:
        run = next((run for run in on_disk.find(self._on.runs) if run.name == name), None)
        if run is None:
            said = _NONE if name is None else f"The run {name!r} is gone; open this page anew."
            return [html.notice(said), [], "", "", gr.update(active=False)]
        try:
            history = on_disk.read(run)
        except errors.DiffusionKDError as error:
            return [html.notice(stage.sentence(error), "bad"), [], "", "", gr.update(active=False)]
        return [
            _health(history),
            [
                on_disk.thin(curve)
                for curve in history.curves
                if not curve.tag.endswith("_skipped") or any(curve.values)
            ],
            html.render("grids", grids=_grids(history.grids)),
            html.render("config", config=run.config),
            gr.update(active=run.active),
        ]


def _label(run: on_disk.Run) -> str:
    standing = "running" if run.active else "finished" if run.finished else "stopped"
    return f"{run.name}: {run.kind}, {standing}"


def _name(curve: on_disk.Curve) -> str:
    return curve.tag if curve.stage == on_disk.TRAINING else f"{curve.stage}: {curve.tag}"


def _frame(curve: on_disk.Curve) -> pd.DataFrame:
    return pd.DataFrame({"images seen": curve.images_seen, _name(curve): curve.values})


def _health(history: on_disk.History) -> str:
    findings = health.judge(history)
    seen = max((curve.images_seen[-1] for curve in history.curves if len(curve)), default=0)
    ago_s = max(0.0, time.time() - history.run.last_written_s)
    return html.render(
        "health",
        summary=health.summary(findings),
        findings=findings,
        notes=history.notes,
        run=history.run,
        standing=f"{words.count(seen, 'image')} seen; last written {_ago(ago_s)} ago",
    )


def _ago(seconds: float) -> str:
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= 2 * size:
            return words.count(int(seconds // size), unit)
    return words.count(int(seconds), "second")


def _grids(grids: Sequence[on_disk.Grid]) -> list[tuple[int, str]]:
    """Some, evenly over the run, the last one first, each as a data URI; those whose file is gone are left out."""
    step = max(1, -(-len(grids) // _SHOWN_GRIDS))
    shown = []
    for grid in grids[::-1][::step]:
        try:
            shown.append((grid.images_seen, f"data:image/png;base64,{base64.b64encode(grid.png).decode()}"))
        except errors.DataError:
            continue
    return shown
