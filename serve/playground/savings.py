"""What distilling saves, before the money is spent: the sums of `eval.economics`, as one types."""

from collections.abc import Mapping
from typing import Any

import gradio as gr
import pandas as pd

from diffusion_kd import errors
from eval import economics
from serve import costs
from serve.playground import html, words
from serve.playground.stage import Stage, queued

_KINDS = {economics.Outcome.DISTIL: "good", economics.Outcome.PILOT_FIRST: "doubtful", economics.Outcome.DO_NOT: "bad"}
_LABELS = {
    "monthly_images": "Images a month",
    "premium_usd": "A premium image, $",
    "turbo_usd": "A turbo image, $",
    "turbo_share": "Traffic on turbo, %",
    "project_usd": "The project, $",
    "upkeep_usd": "Upkeep a month, $",
    "fallback_share": "Made again by premium, %",
    "premium_utilisation": "Premium's devices work, %",
    "turbo_utilisation": "Turbo's devices work, %",
}
_EXAMPLES = {
    "high-volume": "50 million a month",
    "in-between": "8 million a month",
    "too-little-volume": "200,000 a month",
}
_SUMS = queued("sums", 8)
"""A sum takes a millisecond; eight at a time wait for nobody."""

_MEASURED = """Prices as last measured here, per busy second of the device: say under “What may go wrong” how busy the
devices are."""


class Savings:
    """The tab."""

    def __init__(self, on: Stage) -> None:
        self._on = on
        first = economics.EXAMPLES["high-volume"]
        gr.Markdown("Does distilling pay? Type what you know; every field says what it means.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self._inputs = self._fields(first)
                self._measure = gr.Button("Use the prices measured here")
                self._said = gr.HTML("")
                self._examples = gr.Dataset(
                    components=[gr.Textbox(visible=False)],
                    samples=[[name] for name in _EXAMPLES],
                    sample_labels=list(_EXAMPLES.values()),
                    label="Worked cases",
                    type="values",
                )
            with gr.Column(scale=3, min_width=300):
                self._verdict = gr.HTML(_verdict(first), elem_id="savings-verdict")
                self._numbers = gr.HTML(_numbers(first), elem_id="savings-numbers")
                self._curve = gr.LinePlot(
                    _curve(first),
                    x="month",
                    y="net (US dollars)",
                    title="Net over three years",
                    x_lim=[0, economics.HORIZON_MONTHS],
                    height=240,
                    elem_id="savings-curve",
                )
        self._tables = gr.HTML(_tables(first), elem_id="savings-tables")
        self._wire()

    def _fields(self, case: economics.Case) -> dict[str, Any]:
        fields = {name: _field(name, case) for name in list(_LABELS)[:6]}
        with gr.Accordion("What may go wrong", open=False):
            return fields | {name: _field(name, case) for name in list(_LABELS)[6:]}

    def _wire(self) -> None:
        fields = list(self._inputs.values())
        shown = [self._verdict, self._numbers, self._curve, self._tables]
        gr.on([field.change for field in fields], self._sum, fields, shown, trigger_mode="always_last", **_SUMS)
        self._examples.click(self._take, self._examples, [*fields, self._said], **_SUMS)
        prices = [self._inputs["premium_usd"], self._inputs["turbo_usd"], self._said]
        self._measure.click(self._measured, None, prices, **_SUMS)

    def _sum(self, *given: float | None) -> list[Any]:
        try:
            case = _case(dict(zip(_LABELS, given, strict=True)))
        except errors.ConfigError as error:
            return [html.notice(words.sentence(str(error)), "bad"), "", gr.update(visible=False), ""]
        return [_verdict(case), _numbers(case), gr.update(value=_curve(case), visible=True), _tables(case)]

    def _take(self, sample: list[str]) -> list[Any]:
        """A worked case instead of what was typed."""
        case = economics.EXAMPLES[sample[0]]
        return [*(_typed(name, getattr(case, name)) for name in _LABELS), ""]

    def _measured(self) -> list[Any]:
        """What an image of each tier cost in this service, at its defaults."""
        prices = (costs.to_usd(self._on.service.image_nanousd(tier)) for tier in ("premium", "turbo"))
        return [*prices, html.notice(_MEASURED)]


def _field(name: str, case: economics.Case) -> gr.Number | gr.Slider:
    shown, about = _typed(name, getattr(case, name)), economics.FIELDS[name].replace(", 0 to 1", "")
    about = f"{about[0].upper()}{about[1:]}."
    if _is_share(name):
        return gr.Slider(1 if name.endswith("utilisation") else 0, 100, shown, step=1, label=_LABELS[name], info=about)
    return gr.Number(shown, label=_LABELS[name], info=about)


def _is_share(name: str) -> bool:
    return name.endswith(("_share", "_utilisation"))


def _typed(name: str, value: float) -> float:
    return 100 * value if _is_share(name) else value


def _case(given: Mapping[str, float | None]) -> economics.Case:
    """Raises ConfigError for what is missing or out of range, by the label that people see."""
    if empty := [label for name, label in _LABELS.items() if given[name] is None]:
        raise errors.ConfigError(f"“{empty[0]}” is empty; give a number")
    numbers = {name: value / 100 if _is_share(name) else value for name, value in given.items() if value is not None}
    try:
        return economics.Case(**numbers)
    except errors.ConfigError as error:
        wrong = next(name for name in _LABELS if str(error).startswith(name))
        raise errors.ConfigError(str(error).replace(wrong, f"“{_LABELS[wrong]}”", 1)) from None


def _verdict(case: economics.Case) -> str:
    found = economics.verdict(case)
    return html.render("verdict", outcome=found.outcome, because=found.because, kind=_KINDS[found.outcome])


def _numbers(case: economics.Case) -> str:
    return html.render("numbers", numbers=economics.results(case))


def _curve(case: economics.Case) -> pd.DataFrame:
    net_usd = economics.curve(case)
    return pd.DataFrame({"month": range(len(net_usd)), "net (US dollars)": net_usd})


def _tables(case: economics.Case) -> str:
    found = economics.sensitivity(case)
    return html.render(
        "sensitivity",
        tables=[
            ("If turbo's devices work … of the paid time", found.turbo_utilisation),
            ("If premium makes … of turbo's requests again", found.fallback_share),
        ],
        kinds=_KINDS,
        months=economics.duration,
    )
