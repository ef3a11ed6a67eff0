"""One prompt and one seed in both tiers: turbo while one types, premium when asked for, and a wipe between them."""

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
                self._stop = gr.Button("Stop", size="sm")
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
        self._diverse = gr.Button(f"How diverse? Draw {_SEEDS} seeds with both")
        self._strips = gr.HTML("", elem_id="strips")
        self._wire(page)

    def _wire(self, page: gr.Blocks) -> None:
        cards = [self._turbo, self._premium, self._wipe]
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
        self._diverse.click(self._diversity, knobs, self._strips, trigger_mode="once", **AT_ONCE)
        self._stop.click(self._end, None, None, **AT_ONCE)
        choices = [self._prompt, self._examples, self._steps, self._many, self._guidance]
        for chosen in (
            self._examples.click(self._example, self._examples, self._prompt, js=_AT_ONCE, **AT_ONCE),
            page.load(self._choices, None, choices, **AT_ONCE),
        ):
            chosen.then(self._typed, knobs[:3], cards, **AT_ONCE)
        page.unload(self._leave)

    @property
    def _samples(self) -> dict[str, str]:
        return _SHAPES if self._on.on_shapes else _GENERAL

    def _choices(self) -> list[Any]:
        """What the models leave to choose, and a first prompt."""
        turbo, premium = (self._on.service.catalogue.tiers[tier] for tier in ("turbo", "premium"))
        return [
            next(iter(self._samples.values())),
            gr.update(samples=[[text] for text in self._samples.values()], sample_labels=list(self._samples)),
            gr.update(choices=turbo.steps, value=turbo.default_steps, visible=len(turbo.steps) > 1),
            premium.default_steps,
            premium.default_guidance_scale,
        ]

    def _example(self, index: int) -> str:
        return list(self._samples.values())[index]

    async def _typed(self, text: str, seed: int | None, steps: int, request: gr.Request) -> list[Any]:
        """Turbo's picture of a prompt that may change again in a moment."""
        about = (text, seed, steps)
        if self._cards.about(request) == about:  # an example, or what Compare draws already
            return [gr.skip()] * 3
        self._strip.end(request, stopped=True)
        turn, card = self._cards.take(request, about), None
        if text.strip():
            drawn = drawing.draw(self._on, request, Asked("turbo", text, _number(seed), steps))
            async for found in drawing.together([drawn], turn):
                card = found[0]
        if turn.over.is_set():
            return [gr.skip()] * 3
        return [_card(card, "turbo", _BLANK), _card(None, "premium"), _wipe([None, None])]

    async def _compare(
        self, text: str, seed: int | None, steps: int, many: int, guidance: float, keep: bool, request: gr.Request
    ) -> AsyncGenerator[list[Any]]:
        """Both tiers at once, each as it comes."""
        number = _number(seed if keep else None)
        pair = [Asked("turbo", text, number, steps), Asked("premium", text, number, int(many), guidance)]
        turn, found = self._cards.take(request, (text, number, steps)), list[Card | None]([None, None])
        drawn_from = gr.skip() if number == seed else number
        async for found in self._both(pair, request, turn):
            yield [drawn_from, *_cards(found)]
        if turn.over.is_set():  # Gradio shows the last of these once more
            yield [gr.skip(), *_cards(found, _STOPPED)] if turn.stopped else [gr.skip()] * 4

    async def _diversity(
        self, text: str, seed: int | None, steps: int, many: int, guidance: float, request: gr.Request
    ) -> AsyncGenerator[Any]:
        """The same prompt with several seeds."""
        first = min(_number(seed), schemas.MOST_SEED - _SEEDS + 1)
        pair = [
            Asked("turbo", text, first, steps, count=_SEEDS),
            Asked("premium", text, first, int(many), guidance, count=_SEEDS),
        ]
        turn = self._strip.take(request, pair)
        async for found in self._both(pair, request, turn):
            yield html.render("strip", tiers=list(zip(("turbo", "premium"), found, strict=True)))
        if turn.over.is_set():
            yield "" if turn.stopped else gr.skip()

    def _both(
        self, pair: Sequence[Asked], request: gr.Request, turn: drawing.Turn
    ) -> AsyncGenerator[list[Card | None]]:
        return drawing.together([drawing.draw(self._on, request, asked) for asked in pair], turn)

    async def _end(self, request: gr.Request) -> None:
        """What is being drawn is gone; what is finished stays."""
        self._cards.end(request, stopped=True)
        self._strip.end(request, stopped=True)

    async def _leave(self, request: gr.Request) -> None:
        self._cards.end(request)
        self._strip.end(request)


def _cards(found: Sequence[Card | None], otherwise: str = "") -> list[str]:
    """Both cards and the wipe. otherwise: a hint instead of what is not finished."""
    turbo, premium = (None if otherwise and not (card and card.finished) else card for card in found)
    hint = otherwise or _HINT
    return [_card(turbo, "turbo", hint), _card(premium, "premium", hint), _wipe(found)]


def _number(seed: int | None) -> int:
    return secrets.randbelow(schemas.MOST_SEED + 1) if seed is None else int(seed)


def _card(card: Card | None, tier: str, hint: str = _HINT) -> str:
    return html.render("card", card=card, tier=tier, hint=hint)


def _wipe(found: Sequence[Card | None]) -> str:
    both = all(card is not None and card.finished for card in found)
    turbo, premium = found if both else (None, None)
    return html.render("wipe", turbo=turbo, premium=premium)
