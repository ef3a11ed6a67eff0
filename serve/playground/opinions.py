"""Blind votes: two pictures of one prompt and seed, sides shuffled; which is better?"""

import asyncio
import base64
import dataclasses
import datetime
import io
import re
import secrets
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr
import PIL.Image

from diffusion_kd import errors
from eval import suites
from serve import schemas
from serve.playground import drawing, html, words
from serve.playground.drawing import Asked, Card
from serve.playground.stage import AT_ONCE, Stage, queued
from serve.store import records

_CHOICES = {"left": "A is better", "neither": "No difference", "right": "B is better"}
_UNCHANGED = [gr.skip()] * (4 + len(_CHOICES))
_VOTED = "voted"
_WRITES = 4
_VOTER = re.compile("[0-9a-f]{32}")
"""What this page gave a browser to keep; anything else was put there by somebody."""
_ABOUT = """Two pictures of one prompt and seed, by the student and by its teacher, in an order that changes each time.
Say which you like better; you are told afterwards which was which. Votes are kept, and *Quality* counts them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """What somebody is shown. It stays on the server until the vote. id: the vote's, so that a pair counts once."""

    id: str
    turbo: Card
    premium: Card
    turbo_side: records.Side

    def on(self, side: records.Side) -> Card:
        return self.turbo if side == self.turbo_side else self.premium


class Opinions:
    """The tab."""

    def __init__(self, on: Stage, page: gr.Blocks) -> None:
        self._on, self._turns = on, drawing.Turns()
        gr.Markdown(_ABOUT)
        with gr.Row(elem_classes="dkd-ask"):
            self._own = gr.Textbox(
                label="A prompt of your own",
                info="Leave it empty for one of the evaluation's prompts.",
                max_length=schemas.PROMPT_CHARACTERS,
                scale=6,
            )
            self._next = gr.Button("Show a pair", variant="primary", scale=1, min_width=140)
        self._pictures = gr.HTML("", elem_id="vote-pair")
        with gr.Row(elem_id="vote-buttons"):
            self._buttons = {choice: gr.Button(label, interactive=False) for choice, label in _CHOICES.items()}
        self._pair = gr.State(None)
        # Who votes, as far as a browser knows: votes of one person hang together. The encryption hides nothing.
        self._voter = gr.BrowserState("", storage_key="diffusion-kd-voter", secret="diffusion-kd")
        self._wire(page)

    def _wire(self, page: gr.Blocks) -> None:
        buttons = list(self._buttons.values())
        gr.on(
            [self._next.click, self._own.submit],
            self._show,
            self._own,
            [self._pictures, self._pair, *buttons],
            trigger_mode="once",
            **AT_ONCE,
        )
        for choice, button in self._buttons.items():
            button.click(
                self._vote,
                [gr.State(choice), self._pair, self._voter],
                [self._pictures, self._pair, self._voter, self._next, *buttons],
                trigger_mode="once",
                **queued("votes", _WRITES),
            )
        page.unload(self._leave)

    async def _show(self, own: str, request: gr.Request) -> AsyncGenerator[list[Any]]:
        """Draw a pair. Nothing is shown before both are there, lest the time tell which is which."""
        prompt = own.strip() or await asyncio.to_thread(_prompt, "shapes" if self._on.on_shapes else "general")
        turn, found = self._turns.take(request, prompt), list[Card | None]()
        drawings = [drawing.draw(self._on, request, asked) for asked in self._asked(prompt)]
        async for found in drawing.together(drawings, turn):
            done = sum(card.done for card in found if card is not None) / len(found)
            yield [html.render("pair", pair=None, progress=done), None, *_buttons(False)]
        if turn.over.is_set():
            return
        turbo, premium = found
        assert turbo is not None and premium is not None, "both have ended"
        if failed := turbo.error or premium.error:
            yield [html.notice(failed, "bad"), None, *_buttons(False)]
            return
        side: records.Side = "left" if secrets.randbelow(2) else "right"
        turbo, premium = await asyncio.gather(*(asyncio.to_thread(_anonymous, card) for card in (turbo, premium)))
        pair = Pair(secrets.token_hex(20), turbo, premium, side)
        yield [html.render("pair", pair=pair, choice=None), pair, *_buttons(True)]

    def _asked(self, prompt: str) -> list[Asked]:
        turbo, premium = (self._on.service.catalogue.tiers[tier] for tier in ("turbo", "premium"))
        seed = secrets.randbelow(schemas.MOST_SEED + 1)
        return [
            Asked("turbo", prompt, seed, turbo.default_steps),
            Asked("premium", prompt, seed, premium.default_steps, premium.default_guidance_scale),
        ]

    async def _vote(
        self, choice: records.Choice, pair: Pair | str | None, voter: str, request: gr.Request
    ) -> list[Any]:
        """Keep a vote and say which picture was whose."""
        if pair == _VOTED:  # a second click
            return _UNCHANGED
        if not isinstance(pair, Pair):  # the service was started anew meanwhile
            return [html.notice("This pair is gone; show another.", "bad"), None, voter, gr.skip(), *_buttons(False)]
        if not isinstance(voter, str) or not _VOTER.fullmatch(voter):
            voter = secrets.token_hex(16)
        try:
            vote = self._record(await self._on.payer(request), pair, choice, voter)
            kept = await asyncio.to_thread(self._on.service.store.record_vote, vote)
        except errors.DiffusionKDError as error:
            said = html.notice(words.sentence(str(error)), "bad")
            return [html.render("pair", pair=pair, choice=None) + said, pair, voter, gr.skip(), *_buttons(True)]
        if not kept:  # a second click, before the first one's answer had come
            return _UNCHANGED
        shown = html.render("pair", pair=pair, choice=choice)
        return [shown, _VOTED, voter, gr.update(value="Show another"), *_buttons(False)]

    def _record(self, key: records.Key, pair: Pair, choice: records.Choice, voter: str) -> records.Vote:
        turbo, premium = (self._on.service.catalogue.tiers[tier] for tier in ("turbo", "premium"))
        return records.Vote(
            id=pair.id,
            key_id=key.id,
            voter=voter,
            at=datetime.datetime.now(datetime.UTC),
            prompt=pair.turbo.asked.prompt,
            seed=pair.turbo.asked.seed,
            turbo_version=turbo.model.version,
            premium_version=premium.model.version,
            turbo_steps=pair.turbo.asked.steps,
            premium_steps=pair.premium.asked.steps,
            guidance_scale=pair.premium.asked.guidance_scale or 1.0,
            turbo_side=pair.turbo_side,
            choice=choice,
        )

    async def _leave(self, request: gr.Request) -> None:
        self._turns.end(request)


def _buttons(interactive: bool) -> list[dict[str, Any]]:
    return [gr.update(interactive=interactive)] * len(_CHOICES)


def _prompt(suite: str) -> str:
    asked = suites.load(suite)
    return asked.prompts[int(secrets.choice(asked.standard))].text


def _anonymous(card: Card) -> Card:
    """Without what a file says of itself: it names its tier."""
    picture = card.pictures[0]
    kind, _, encoded = picture.uri.partition(";base64,")
    image, stream = PIL.Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"), io.BytesIO()
    PIL.Image.frombytes("RGB", image.size, image.tobytes()).save(stream, kind.rpartition("/")[2], lossless=True)
    uri = f"{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
    return dataclasses.replace(card, pictures=(dataclasses.replace(picture, uri=uri),))
