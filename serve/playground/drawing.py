"""Pictures of one tier as they come: what a card on the page shows, from the first moment to the last."""

import asyncio
import base64
import dataclasses
import io
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import gradio as gr
import numpy as np
import PIL.Image
import pydantic

from diffusion_kd.shapes import language, oracle, scenes
from serve import errors, schemas
from serve.playground import words
from serve.playground.stage import Stage
from serve.store import records

log = logging.getLogger(__name__)

_PNG_UP_TO_PX = 256
"""Larger pictures travel as WebP: a tenth of the bytes."""

_PREVIEWS = 3
"""As many as the service gives."""


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What is to be drawn. count: seeds, from `seed` on. guidance_scale: None for a student, which takes none."""

    tier: str
    prompt: str
    seed: int
    steps: int
    guidance_scale: float | None = None
    count: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """uri: the file itself, as a data URI. seen: what the oracle reads in it; verdict: its words for what is wrong."""

    uri: str
    seed: int
    seen: str | None = None
    verdict: str | None = None
    right: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Card:
    """One tier's pictures at a moment.

    done: share of the way; 1: these are the pictures; below: previews, if any. error: a sentence, instead of pictures.
    wanted: what the prompt asks for in the oracle's words, where it reads pictures and understands the prompt.
    seconds: from asking to having. cost_usd: of all pictures.
    """

    asked: Asked
    done: float = 0.0
    pictures: tuple[Picture, ...] = ()
    seconds: float = 0.0
    cost_usd: float = 0.0
    warnings: tuple[str, ...] = ()
    wanted: str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.done == 1

    @property
    def state(self) -> str:
        return "failed" if self.error else "done" if self.finished else "drawing"


async def draw(on: Stage, request: gr.Request, asked: Asked) -> AsyncGenerator[Card]:
    """Cards, the first empty, the last finished or with an error. Closed early, it frees the device."""
    yield Card(asked)
    try:
        key = await on.payer(request)
        async for card in _draw(on, key, asked):
            yield card
    except errors.ServiceError as error:
        yield Card(asked, error=words.sentence(str(error)))
    except Exception:
        log.exception("the playground could not draw")
        yield Card(asked, error="The service failed; its log says why.")


async def _draw(on: Stage, key: records.Key, asked: Asked) -> AsyncIterator[Card]:
    began, events = time.monotonic(), on.service.stream(key, body(on, asked))
    previews, ready = dict[int, Picture](), list[schemas.CompletedEvent]()
    async for event in events:
        if isinstance(event, schemas.PartialImageEvent):
            previews[event.image_index] = Picture(_uri(event), asked.seed + event.image_index)
            share = (event.partial_image_index + 1) / (_previews(asked) + 1)
            yield Card(asked, share, tuple(previews[index] for index in sorted(previews)))
        elif event is not None:
            ready.append(event)
    seconds = time.monotonic() - began
    wants = language.understand(asked.prompt) if on.on_shapes else None
    pictures = await asyncio.to_thread(_read, ready, wants)
    yield Card(
        asked,
        done=1,
        pictures=pictures,
        seconds=seconds,
        cost_usd=ready[0].usage.cost_usd,
        warnings=tuple(ready[0].warnings),
        wanted=None if wants is None else language.say(wants),
    )


def body(on: Stage, asked: Asked) -> schemas.GenerationBody:
    """The request of a card. Raises InvalidField, which names what is wrong."""
    if not asked.prompt.strip():
        raise errors.InvalidField("type a prompt first: what would you like to see?", param="prompt")
    if not 0 <= asked.seed <= schemas.MOST_SEED:
        raise errors.InvalidField(f"the seed is {asked.seed}; it must be from 0 to {schemas.MOST_SEED}", param="seed")
    small = max(on.service.catalogue.tiers[asked.tier].sizes[0]) <= _PNG_UP_TO_PX
    try:
        return schemas.GenerationBody(
            model=asked.tier,
            prompt=asked.prompt,
            n=asked.count,
            seed=asked.seed,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance_scale,
            output_format="png" if small else "webp",
            output_compression=None if small else 90,
            stream=True,
            partial_images=_previews(asked),
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise errors.InvalidField(f"{first['loc'][0]}: {first['msg']}; given was {first['input']!r:.60}") from None


def _previews(asked: Asked) -> int:
    return min(_PREVIEWS, asked.steps - 1)


def _uri(event: schemas.PartialImageEvent | schemas.CompletedEvent) -> str:
    return f"data:image/{event.output_format};base64,{event.b64_json}"


def _read(ready: Sequence[schemas.CompletedEvent], wants: scenes.Prompt | None) -> tuple[Picture, ...]:
    return tuple(_picture(event, wants) for event in ready)


def _picture(event: schemas.CompletedEvent, wants: scenes.Prompt | None) -> Picture:
    if wants is None:
        return Picture(_uri(event), event.seed)
    image = PIL.Image.open(io.BytesIO(base64.b64decode(event.b64_json))).convert("RGB")
    reading = oracle.read(np.asarray(image))
    verdict = oracle.judge(reading, wants)
    return Picture(_uri(event), event.seed, oracle.say(reading, wants), verdict.say(), verdict.correct)


@dataclasses.dataclass(eq=False, slots=True)
class Turn:
    """Something that is drawn for a visitor. about: what. over: set when it is to end; stopped: by the visitor."""

    about: object
    over: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    stopped: bool = False


class Turns:
    """Of what one visitor asks for, the newest stands: what came before it ends, and does not come back over it.

    For the event loop's thread alone.
    """

    def __init__(self) -> None:
        self._last: dict[str | None, Turn] = {}

    def take(self, request: gr.Request, about: object) -> Turn:
        """A turn that is over once the same visitor takes another."""
        self.end(request)
        turn = self._last[request.session_hash] = Turn(about)
        return turn

    def about(self, request: gr.Request) -> object:
        """What the visitor's last turn draws, or has drawn; None if there is none, or it was ended."""
        turn = self._last.get(request.session_hash)
        return None if turn is None else turn.about

    def end(self, request: gr.Request, *, stopped: bool = False) -> None:
        """The visitor asks for nothing any more."""
        if (turn := self._last.pop(request.session_hash, None)) is not None:
            turn.stopped = stopped
            turn.over.set()


async def together(drawings: Sequence[AsyncGenerator[Card]], turn: Turn) -> AsyncGenerator[list[Card | None]]:
    """The newest card of each drawing, whenever one has a new one, until all have ended or the turn is over.

    Closed early, it closes them all.
    """
    newest: list[Card | None] = [None] * len(drawings)
    changed: asyncio.Queue[tuple[int, Card | None]] = asyncio.Queue()

    async def follow(index: int, drawing: AsyncGenerator[Card]) -> None:
        try:
            async for card in drawing:
                changed.put_nowait((index, card))
        finally:
            changed.put_nowait((index, None))

    async def watch() -> None:
        await turn.over.wait()
        changed.put_nowait((-1, None))

    tasks = [asyncio.create_task(follow(*each), name="playground") for each in enumerate(drawings)]
    tasks.append(asyncio.create_task(watch(), name="playground"))
    try:
        running = len(drawings)
        while running:
            index, card = await changed.get()
            if turn.over.is_set():
                return
            if card is None:
                running -= 1
                continue
            newest[index] = card
            yield list(newest)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
