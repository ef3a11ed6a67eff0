"""One prompt and one seed in both tiers: turbo while one types, premium when asked for, and a wipe between them."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import gradio as gr

from serve import schemas
from serve.playground import drawing, html
from serve.playground.drawing import Asked, Card
from serve.playground.stage import AT_ONCE, Stage

_SEEDS = 6
_FIRST_SEED = 7
_TYPING_MS = 150
"""Turbo draws when nobody has typed for so long."""

# Gradio waits for what this promises before it asks the server; of a burst of keystrokes the last alone is kept.
_WHEN_STILL = f"""(...given) => new Promise(resolve => {{
    clearTimeout(window.dkdTyping);
    window.dkdTyping = setTimeout(() => resolve(given), {_TYPING_MS});
}})"""
_AT_ONCE = "(...given) => { clearTimeout(window.dkdTyping); return given; }"

_SHAPES = {
    "two objects": "a red circle left of a blue star",
    "size and background": "a large yellow triangle on a dark gradient",
    "place": "a small green square at the top",
    "a pair that training never showed": "a purple star above an orange ring",
    "three objects: more than it learnt": "a red circle, a blue star and a green square",
    "misspelt": "a yelow triangel below a gren circel",
}
_GENERAL = {
    "a portrait": "a portrait of an old fisherman, soft window light",
    "a landscape": "a mountain lake at dawn, mist over the water",
    "counting": "five red apples in a row on a wooden table",
    "who is where": "a blue cup to the left of a green book",
    "writing": "a shop sign that says OPEN LATE",
    "hands": "two hands shaking, close up",
}
_HINT = "Press Compare: premium takes its time, and shows what it has on the way."
_BLANK = "Type what you would like to see."
_STOPPED = "Stopped. Press Compare to begin again."
_STOP_OFF = gr.update(interactive=False)


class Compare:
    """The tab. Its choices and its first picture come when a page is loaded."""

    def __init__(self, on: Stage, page: gr.Blocks) -> None:
        self._on, self._cards, self._strip = on, drawing.Turns(), drawing.Turns()
        with gr.Row(elem_classes="dkd-ask"):
            self._prompt = gr.Textbox(
                label="Prompt",
                info="Turbo draws as you type.",
                max_length=schemas.PROMPT_CHARACTERS,
                scale=6,
                autofocus=True,
                elem_id="prompt",
            )
            with gr.Column(scale=1, min_width=140):
                self._start = gr.Button("Compare", variant="primary")
                self._stop = gr.Button("Stop", size="sm", interactive=False)
        self._examples = gr.Dataset(
            components=[gr.Textbox(visible=False)],
            samples=[[text] for text in _SHAPES.values()],
            sample_labels=list(_SHAPES),
            label="Strengths and weaknesses",
            type="index",
        )
        with gr.Row(elem_id="knobs"):
            self._seed = gr.Number(_FIRST_SEED, label="Seed", precision=0)
            self._locked = gr.Checkbox(True, label="Keep the seed", info="Else each Compare takes a new one.")
            self._steps = gr.Radio([1], value=1, label="Turbo steps", elem_id="turbo-steps")
            self._many = gr.Slider(1, 100, 50, step=1, label="Premium steps")
            self._guidance = gr.Slider(1, 15, 2, step=0.5, label="Premium guidance")
        with gr.Row(elem_id="pair"):
            self._turbo = gr.HTML(_card(None, "turbo"), elem_id="turbo")
            self._premium = gr.HTML(_card(None, "premium"), elem_id="premium")
            self._wipe = gr.HTML(_wipe([None, None]), elem_id="wipe")
        self._diverse = gr.Button(f"How diverse? Draw {_SEEDS} seeds with both", size="sm")
        self._strips = gr.HTML("", elem_id="strips")
        self._wire(page)

    def _wire(self, page: gr.Blocks) -> None:
        cards = [self._turbo, self._premium, self._wipe, self._stop]
        knobs = [self._prompt, self._seed, self._steps, self._many, self._guidance]
        gr.on(
            [self._start.click, self._prompt.submit],
            self._compare,
            [*knobs, self._locked],
            [self._seed, *cards],
            js=_AT_ONCE,
            trigger_mode="multiple",
            **AT_ONCE,
        )
        gr.on(
            # Gradio's `input` knows keys that write: not Backspace, and not what is pasted.
            [self._prompt.change, self._seed.change, self._steps.change],
            self._typed,
            knobs[:3],
            cards,
            js=_WHEN_STILL,
            trigger_mode="multiple",
            **AT_ONCE,
        )
        self._examples.click(self._take, [self._examples, *knobs[1:3]], [self._prompt, *cards], **AT_ONCE)
        self._diverse.click(self._diversity, knobs, [self._strips, self._stop], trigger_mode="multiple", **AT_ONCE)
        shown = [self._turbo, self._premium, self._strips]
        self._stop.click(self._stopped, shown, [*shown, self._stop], **AT_ONCE)
        choices = [self._prompt, self._examples, self._steps, self._many, self._guidance]
        page.load(self._prepare, None, [*choices, *cards], **AT_ONCE)
        page.unload(self._left)

    @property
    def _samples(self) -> dict[str, str]:
        return _SHAPES if self._on.on_shapes else _GENERAL

    async def _prepare(self, request: gr.Request) -> list[Any]:
        """The choices that the models leave, and a first picture."""
        turbo, premium = (self._on.service.catalogue.tiers[tier] for tier in ("turbo", "premium"))
        first = next(iter(self._samples.values()))
        return [
            first,
            gr.update(samples=[[text] for text in self._samples.values()], sample_labels=list(self._samples)),
            gr.update(choices=turbo.steps, value=turbo.default_steps, visible=len(turbo.steps) > 1),
            premium.default_steps,
            premium.default_guidance_scale,
            *await self._typed(first, _FIRST_SEED, turbo.default_steps, request),
        ]

    async def _take(self, index: int, seed: int | None, steps: int, request: gr.Request) -> list[Any]:
        """An example instead of the prompt."""
        text = list(self._samples.values())[index]
        return [text, *await self._typed(text, seed, steps, request)]

    async def _typed(self, text: str, seed: int | None, steps: int, request: gr.Request) -> list[Any]:
        """Turbo's picture of a prompt that may change again in a moment."""
        about = (text, seed, steps)
        if self._cards.about(request) == about:  # an example, or what Compare draws already
            return [gr.skip()] * 4
        over, card = self._cards.take(request, about), None
        if text.strip():
            drawn = drawing.draw(self._on, request, Asked("turbo", text, _number(seed), steps))
            async for found in drawing.together([drawn], over):
                card = found[0]
        if over.is_set():
            return [gr.skip()] * 4
        return [_card(card, "turbo", _BLANK), _card(None, "premium"), _wipe([None, None]), _STOP_OFF]

    async def _compare(
        self, text: str, seed: int | None, steps: int, many: int, guidance: float, keep: bool, request: gr.Request
    ) -> AsyncGenerator[list[Any]]:
        """Both tiers at once, each as it comes."""
        number = _number(seed if keep else None)
        pair = [Asked("turbo", text, number, steps), Asked("premium", text, number, int(many), guidance)]
        over = self._cards.take(request, (text, number, steps))
        async for found in self._both(pair, request, over):
            turbo, premium = found
            going_on = gr.update(interactive=not _over(found))
            yield [number, _card(turbo, "turbo"), _card(premium, "premium"), _wipe(found), going_on]
        if over.is_set():
            yield [gr.skip()] * 5  # Gradio shows the last of these once more

    async def _diversity(
        self, text: str, seed: int | None, steps: int, many: int, guidance: float, request: gr.Request
    ) -> AsyncGenerator[list[Any]]:
        """The same prompt with several seeds."""
        first = min(_number(seed), schemas.MOST_SEED - _SEEDS + 1)
        pair = [
            Asked("turbo", text, first, steps, count=_SEEDS),
            Asked("premium", text, first, int(many), guidance, count=_SEEDS),
        ]
        over = self._strip.take(request, pair)
        async for found in self._both(pair, request, over):
            strips = html.render("strip", tiers=list(zip(("turbo", "premium"), found, strict=True)))
            yield [strips, gr.update(interactive=not _over(found))]
        if over.is_set():
            yield [gr.skip()] * 2

    async def _both(
        self, pair: Sequence[Asked], request: gr.Request, over: asyncio.Event
    ) -> AsyncGenerator[list[Card | None]]:
        drawings = drawing.together([drawing.draw(self._on, request, asked) for asked in pair], over)
        try:
            async for found in drawings:
                yield found
        finally:
            await drawings.aclose()

    async def _stopped(self, turbo: str, premium: str, strips: str, request: gr.Request) -> list[Any]:
        """What was being drawn is gone; what is finished stays."""
        await self._left(request)
        instead = (_card(None, "turbo", _STOPPED), _card(None, "premium", _STOPPED), "")
        shown = zip((turbo, premium, strips), instead, strict=True)
        return [*(new if html.DRAWING in old else old for old, new in shown), _STOP_OFF]

    async def _left(self, request: gr.Request) -> None:
        self._cards.end(request)
        self._strip.end(request)


def _number(seed: int | None) -> int:
    return secrets.randbelow(schemas.MOST_SEED + 1) if seed is None else int(seed)


def _over(found: Sequence[Card | None]) -> bool:
    return all(card is not None and card.over for card in found)


def _card(card: Card | None, tier: str, hint: str = _HINT) -> str:
    return html.render("card", card=card, tier=tier, hint=hint)


def _wipe(found: Sequence[Card | None]) -> str:
    both = all(card is not None and card.finished for card in found)
    turbo, premium = found if both else (None, None)
    return html.render("wipe", turbo=turbo, premium=premium)
