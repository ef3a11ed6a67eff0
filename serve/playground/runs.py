"""Training runs as they go: curves, samples over time, and what the curves say in words."""

import asyncio
import base64
import functools
import io
import re
import time
from collections.abc import Sequence
from typing import Any

import gradio as gr
import pandas as pd
import PIL.Image

from diffusion_kd import errors
from eval import health
from eval import runs as on_disk
from serve.playground import html, words
from serve.playground.stage import Stage, queued

_EVERY_S = 5
_READING = queued("runs", 2)
_NONE = "There is no training yet. Start one with: make demo (or python -m training.distill), and it appears here."
_GRID_PX = 1024


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
        self._seen = gr.State(None)
        shown = [self._said, self._curves, self._grids, self._config, self._seen, self._clock]
        tab.select(self._open, self._menu, [self._menu, *shown], **_READING)
        self._menu.input(self._follow, [self._menu, gr.State(None)], shown, **_READING)
        self._clock.tick(self._follow, [self._menu, self._seen], shown, **_READING)

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
                        y_title=" ",  # the title says it
                        height=200,
                        min_width=300,
                        key=_name(curve),
                    )

    async def _open(self, chosen: str | None, request: gr.Request) -> list[Any]:
        if barred := await self._on.barred(request):
            return [gr.skip(), *_said(barred)]
        found = await asyncio.to_thread(on_disk.find, self._on.runs)
        names = [words.printable(run.name) for run in found]
        chosen = chosen if chosen in names else next(iter(names), None)
        menu = gr.update(choices=[(_label(run), words.printable(run.name)) for run in found], value=chosen)
        return [menu, *await asyncio.to_thread(self._read, chosen, None)]

    async def _follow(self, name: str | None, seen: object, request: gr.Request) -> list[Any]:
        if barred := await self._on.barred(request):
            return _said(barred)
        return await asyncio.to_thread(self._read, name, seen)

    def _read(self, name: str | None, seen: object) -> list[Any]:
        """seen: what of a run the visitor has; only what is new is sent."""
        run = next((run for run in on_disk.find(self._on.runs) if words.printable(run.name) == name), None)
        if run is None:
            return _said(_NONE if name is None else f"The run {name!r} is gone; open this page anew.")
        try:
            history = on_disk.read(run)
        except errors.DiffusionKDError as error:
            return _said(words.sentence(str(error)))
        clock, news = gr.update(active=run.active), (run.name, [len(curve) for curve in history.curves], history.grids)
        if news == seen:
            return [_health(history), gr.skip(), gr.skip(), gr.skip(), news, clock]
        curves = [curve for curve in history.curves if not curve.tag.endswith("_skipped") or any(curve.values)]
        grids = html.render("grids", grids=_grids(history.grids))
        return [
            _health(history),
            [on_disk.thin(curve) for curve in curves],
            grids,
            html.render("config", config=run.config),
            news,
            clock,
        ]


def _said(sentence: str) -> list[Any]:
    """A sentence instead of a run."""
    return [html.notice(sentence), [], "", "", None, gr.update(active=False)]


def _label(run: on_disk.Run) -> str:
    standing = "running" if run.active else "finished" if run.finished else "stopped"
    return words.printable(f"{run.name}: {run.kind}, {standing}")


def _name(curve: on_disk.Curve) -> str:
    """Short enough for a title over a small plot: `clip_score[eyes], 2 steps` of `samples/2_steps/clip_score[eyes]`."""
    sampled = re.fullmatch(r"samples/(\d+)_steps/(.+)", curve.tag)
    tag = f"{sampled[2]}, {words.count(int(sampled[1]), 'step')}" if sampled else curve.tag
    return tag if curve.stage == on_disk.TRAINING else f"{curve.stage}: {tag}"


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
    """The last one first, each as a data URI; those whose file is gone are left out."""
    shown = []
    for grid in reversed(grids):
        try:
            shown.append((grid.images_seen, _uri(grid)))
        except errors.DataError:
            continue
    return shown


@functools.lru_cache(maxsize=256)
def _uri(grid: on_disk.Grid) -> str:
    """A grid of small pictures as it is, one of large ones made smaller: eight of 1024 px weigh sixteen megabytes."""
    png = grid.png
    with PIL.Image.open(io.BytesIO(png)) as picture:
        if picture.width <= _GRID_PX:
            return f"data:image/png;base64,{base64.b64encode(png).decode()}"
        small, stream = picture.convert("RGB"), io.BytesIO()
    small.thumbnail((_GRID_PX, small.height))
    small.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
