"""Reading a prompt: all of the grammar, nothing but the grammar, whatever is typed."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_kd.shapes import language, oracle, scenes
from eval import suites

RED_CIRCLE = scenes.Wanted("circle", "red", None)
BLUE_STAR = scenes.Wanted("star", "blue", None)


def asked(
    *objects: scenes.Wanted, relation: str | None = None, place: str | None = None, background: str | None = None
) -> scenes.Prompt:
    return scenes.Prompt("", objects, relation, place, background)


def meant(text: str) -> scenes.Prompt | None:
    """What is understood, without the text."""
    understood = language.understand(text)
    return understood and dataclasses.replace(understood, text="")


# --- what is understood -----------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", [False, True])
def test_every_caption_of_the_grammar_is_read_back(held_out: bool) -> None:
    prompts = scenes.draw_prompts(3000, 17, held_out)
    assert [language.understand(prompt.text) for prompt in prompts] == prompts
    texts = " ".join(prompt.text for prompt in prompts)
    wordings = [*scenes.SIZE_WORDS.values(), *scenes.PLACE_WORDS.values(), *scenes.RELATION_WORDS.values()]
    assert all(word in texts for words in wordings for word in words)


def test_the_suite_is_read_as_it_is_meant_or_not_at_all() -> None:
    understood = {prompt.id: language.understand(prompt.text) for prompt in suites.load("shapes").prompts}
    for prompt in suites.load("shapes").prompts:
        assert understood[prompt.id] in (None, prompt.asks), prompt.text
        if not prompt.edge_case or prompt.category in ("held-out", "one-word"):
            assert understood[prompt.id] == prompt.asks, prompt.text


@pytest.mark.parametrize(
    "text",
    [
        "a red circle left of a blue star",
        "red circle left of blue star",
        "Red Circle LEFT OF blue star",
        "  a red  circle\tto the left of\na blue star ",
        "a red circle left of a blue star.",
        "a red circle left of a blue star . ",
        "picture of red circle to left of the blue star",
        "there is an red circle left of a blue star",
    ],
)
def test_case_blanks_articles_and_a_full_stop_do_not_matter(text: str) -> None:
    assert meant(text) == asked(RED_CIRCLE, BLUE_STAR, relation="left of")
    understood = language.understand(text)
    assert understood is not None and understood.text == text


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("circle", asked(scenes.Wanted("circle", None, None))),
        ("orange", asked(scenes.Wanted(None, "orange", None))),
        ("big star", asked(scenes.Wanted("star", None, "large"))),
        ("a little red at the top", asked(scenes.Wanted(None, "red", "small"), place="top")),
        (
            "ring above red",
            asked(scenes.Wanted("ring", None, None), scenes.Wanted(None, "red", None), relation="above"),
        ),
        ("red circle in center", asked(RED_CIRCLE, place="center")),
        ("red circle on left side", asked(RED_CIRCLE, place="left")),
        ("red circle on dusk gradient", asked(RED_CIRCLE, background="dusk gradient")),
        ("on white background, there is a red circle", asked(RED_CIRCLE, background="white")),
        (
            "red circle on the right against a black background",
            asked(RED_CIRCLE, place="right", background="black"),
        ),
    ],
)
def test_parts_may_be_left_out(text: str, prompt: scenes.Prompt) -> None:
    assert meant(text) == prompt


# --- what is not ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the",
        "small",
        "white background",
        "on a white background",
        "a red circle and a blue star",
        "a red circle a blue star",
        "not a red circle",
        "a red circle that is blue",
        "a red blue circle",
        "a circle red",
        "a small large circle",
        "a red circle left of",
        "left of a blue star",
        "a red circle left of a small",
        "a red circle left of a blue star above a green ring",
        "a red circle left of a blue star at the top",
        "a red circle on the left at the top",
        "a red circle on the left of a blue star",
        "on a white background, a red circle on a black background",
        "a red circle on a gray background on a gray background",
        "a red circle on a red background",
        "a red circle on white",
        "a red circles",
        "aredcircle",
        "a red-circle",
        "a red circle..",
        "a red circle, please",
        "a red circle\0",
        "a r\u0435d circle",
    ],
)
def test_what_is_not_wholly_of_the_grammar_is_not_understood(text: str) -> None:
    assert language.understand(text) is None


WORDS = sorted({word for prompt in scenes.draw_prompts(300, 3) for word in prompt.text.split()} | {"the", ".", ","})


@given(st.text(max_size=4000) | st.lists(st.sampled_from(WORDS), max_size=400).map(" ".join))
@settings(max_examples=300, deadline=None)
def test_anything_can_be_typed(text: str) -> None:
    understood = language.understand(text)
    if understood is not None:
        assert understood.text == text and 1 <= len(understood.objects) <= 2
        assert all(thing.shape or thing.colour for thing in understood.objects)
        assert (understood.relation is not None) == (len(understood.objects) == 2)
        assert understood.relation is None or understood.place is None


@pytest.mark.parametrize("part", ["a ", "small ", "a red circle ", "on a gray background, ", " ", "x", "a picture of "])
def test_long_prompts_take_no_time(part: str) -> None:
    text = (part * 4000)[:4000]
    language.understand(text)

    def taken_s() -> float:
        began = time.perf_counter()
        language.understand(text)
        return time.perf_counter() - began

    assert min(taken_s() for _ in range(5)) < 1e-3


# --- saying it --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (asked(RED_CIRCLE), "red circle"),
        (asked(scenes.Wanted("star", None, "large")), "large star"),
        (asked(scenes.Wanted(None, "red", None)), "red object"),
        (asked(RED_CIRCLE, BLUE_STAR, relation="left of"), "red circle left of blue star"),
        (asked(RED_CIRCLE, BLUE_STAR, RED_CIRCLE), "red circle, blue star, red circle"),
        (asked(RED_CIRCLE, place="top", background="gray"), "red circle at the top, on a gray background"),
        (asked(RED_CIRCLE, background="sand gradient"), "red circle, on a sand gradient"),
    ],
)
def test_what_is_asked_in_short(prompt: scenes.Prompt, words: str) -> None:
    assert language.say(prompt) == words


def test_a_right_picture_is_said_as_its_prompt_is() -> None:
    """Objects in the order of the prompt, the same words for layout and background."""
    everything = scenes.Mentions.everything()
    for seed in range(60):
        rng = np.random.default_rng((5, seed))
        scene = scenes.draw_scene(rng)
        prompt = scenes.describe(scene, rng, everything)
        assert oracle.say(oracle.read(scenes.render(scene)), prompt) == language.say(prompt)
