"""Cards without a browser: whose turn it is, what travels, what is read."""

import asyncio
from collections.abc import AsyncGenerator

import gradio as gr
import pytest

from serve.playground import drawing, words
from serve.playground.drawing import Asked, Card


def visitor(name: str) -> gr.Request:
    return gr.Request(session_hash=name)


async def drawn(tier: str, cards: int, log: list[str]) -> AsyncGenerator[Card]:
    try:
        for index in range(cards):
            yield Card(Asked(tier, "a star", 1, 1), done=index / cards)
            await asyncio.sleep(0.01)
    finally:
        log.append(tier)


def test_both_come_as_they_are_ready_and_are_closed_at_the_end() -> None:
    async def run() -> tuple[list[list[Card | None]], list[str]]:
        log: list[str] = []
        both = drawing.together([drawn("turbo", 1, log), drawn("premium", 3, log)], drawing.Turn("both"))
        return [each async for each in both], log

    found, closed = asyncio.run(run())
    assert len(found) == 4 and closed == ["turbo", "premium"]
    assert [card.asked.tier for card in found[-1] if card is not None] == ["turbo", "premium"]


def test_a_turn_that_is_over_ends_what_it_draws() -> None:
    async def run() -> tuple[int, list[str]]:
        turns, log, seen = drawing.Turns(), list[str](), 0
        turn = turns.take(visitor("a"), "first")
        async for _ in drawing.together([drawn("premium", 1000, log)], turn):
            seen += 1
            if seen == 3:
                turns.take(visitor("b"), "somebody else's")
                assert not turn.over.is_set()
                turns.take(visitor("a"), "second")
        return seen, log

    assert asyncio.run(run()) == (3, ["premium"])


def test_closing_early_closes_what_is_drawn() -> None:
    async def run() -> list[str]:
        log: list[str] = []
        both = drawing.together([drawn("turbo", 1000, log), drawn("premium", 1000, log)], drawing.Turn("both"))
        await anext(both)
        await both.aclose()
        return log

    assert sorted(asyncio.run(run())) == ["premium", "turbo"]


def test_who_has_left_is_forgotten() -> None:
    turns = drawing.Turns()
    turn = turns.take(visitor("a"), "first")
    assert turns.about(visitor("a")) == "first" and turns.about(visitor("b")) is None
    turns.end(visitor("a"), stopped=True)
    assert turn.over.is_set() and turn.stopped and turns.about(visitor("a")) is None and turns._last == {}


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0405, "40 ms"), (0.9996, "1.0 s"), (12.34, "12.3 s"), (99.96, "1.7 min"), (240, "4.0 min")]
)
def test_times_are_read_at_a_glance(seconds: float, said: str) -> None:
    assert words.duration(seconds) == said
