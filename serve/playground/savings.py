"""What distilling saves, before the money is spent: the sums of `eval.economics`, as one types."""

from collections.abc import Mapping
from typing import Any

import gradio as gr
import pandas as pd

from diffusion_kd import errors
from eval import economics
from serve import costs
from serve.playground import html, stage
from serve.playground.stage import Stage

_KINDS = {economics.Outcome.DISTIL: "good", economics.Outcome.PILOT_FIRST: "doubtful", economics.Outcome.DO_NOT: "bad"}
_EXAMPLES = {
    "high-volume": "50 million a month",
    "in-between": "8 million a month",
    "too-little-volume": "200,000 a month",
}
_SUMS: dict[str, Any] = {"concurrency_limit": 8, "show_progress": "hidden", "api_visibility": "private"}
"""A sum takes a millisecond; eight at a time wait for nobody."""

_MEASURED = (
    "Prices as last measured here, per busy second of the device: the utilisation below turns them into real ones."
)


class Savings:
    """The tab."""

    def __init__(self, on: Stage) -> None:
        self._on = on
        first = economics.EXAMPLES["high-volume"]
        gr.Markdown("Does distilling pay? Type what you know; every field says what it means.")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self._inputs = self._fields(first)
                self._measure = gr.Button("Use the prices measured here", size="sm")
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
        def number(name: str, label: str) -> gr.Number:
            return gr.Number(getattr(case, name), label=label, info=_sentence(economics.FIELDS[name]))

        def share(name: str, label: str) -> gr.Slider:
            least = 1 if name.endswith("utilisation") else 0
            shown, about = 100 * getattr(case, name), _sentence(economics.FIELDS[name].replace(", 0 to 1", ""))
            return gr.Slider(least, 100, shown, step=1, label=f"{label}, %", info=about)

        fields: dict[str, Any] = {
            "monthly_images": number("monthly_images", "Images a month"),
            "premium_usd": number("premium_usd", "A premium image, $"),
            "turbo_usd": number("turbo_usd", "A turbo image, $"),
            "turbo_share": share("turbo_share", "Traffic on turbo"),
            "project_usd": number("project_usd", "The project, $"),
            "upkeep_usd": number("upkeep_usd", "Upkeep a month, $"),
        }
        with gr.Accordion("What may go wrong", open=False):
            fields |= {
                "fallback_share": share("fallback_share", "Made again by premium"),
                "premium_utilisation": share("premium_utilisation", "Premium's devices work"),
                "turbo_utilisation": share("turbo_utilisation", "Turbo's devices work"),
            }
        return fields

    def _wire(self) -> None:
        fields = list(self._inputs.values())
        shown = [self._verdict, self._numbers, self._curve, self._tables]
        gr.on([field.change for field in fields], self._sum, fields, shown, trigger_mode="always_last", **_SUMS)
        self._examples.click(self._take, self._examples, [*fields, self._said], **_SUMS)
        prices = [self._inputs["premium_usd"], self._inputs["turbo_usd"], self._said]
        self._measure.click(self._measured, None, prices, **_SUMS)

    def _sum(self, *given: float | None) -> list[Any]:
        try:
            case = _case(dict(zip(self._inputs, given, strict=True)))
        except errors.ConfigError as error:
            return [html.notice(stage.sentence(error), "bad"), "", gr.update(visible=False), ""]
        return [_verdict(case), _numbers(case), gr.update(value=_curve(case), visible=True), _tables(case)]

    def _take(self, sample: list[str]) -> list[Any]:
        """A worked case instead of what was typed."""
        case = economics.EXAMPLES[sample[0]]
        return [*(_typed(name, getattr(case, name)) for name in self._inputs), ""]

    def _measured(self) -> list[Any]:
        """What an image of each tier cost in this service, at its defaults."""
        return [*map(self._image_usd, ("premium", "turbo")), html.notice(_MEASURED)]

    def _image_usd(self, name: str) -> float:
        service, tier = self._on.service, self._on.service.catalogue.tiers[name]
        guided = tier.default_guidance_scale > 1
        image_s = service.engine.predicted_device_s(name, tier.default_steps, guided=guided)
        return costs.to_usd(service.price.nanousd(image_s))


def _is_share(name: str) -> bool:
    return name.endswith(("_share", "_utilisation"))


def _typed(name: str, value: float) -> float:
    return 100 * value if _is_share(name) else value


def _case(given: Mapping[str, float | None]) -> economics.Case:
    """Raises ConfigError for what is missing or out of range."""
    for name, value in given.items():
        errors.require(value is not None, name, "empty", economics.FIELDS[name])
    return economics.Case(
        **{name: value / 100 if _is_share(name) else value for name, value in given.items() if value is not None}
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


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
