"""Prompt accuracy: counting, and the oracle on pictures that are right and wrong by construction."""

import pytest

from diffusion_kd.shapes import oracle, scenes
from eval import protocols
from eval.metrics import prompt_accuracy


def test_each_attribute_is_a_share_of_the_prompts_that_ask_for_it() -> None:
    verdicts = [
        oracle.Verdict({"count": True, "shape": True, "size": False}),
        oracle.Verdict({"count": True, "shape": False}),
        oracle.Verdict({"count": True, "shape": True}),
    ]
    accuracy = prompt_accuracy.prompt_accuracy(verdicts)
    assert (accuracy.correct, accuracy.total) == (1, 3)
    assert accuracy.share == pytest.approx(1 / 3)
    assert accuracy.by_attribute == {
        "count": 1,
        "shape": pytest.approx(2 / 3),
        "size": 0,
        **dict.fromkeys(("colour", "relation", "place", "background")),
    }


@pytest.mark.parametrize("held_out", [False, True])
def test_true_renders_are_all_right_and_pictures_of_other_prompts_are_not(held_out: bool) -> None:
    cases = scenes.draw_cases(40, 3, held_out)
    prompts, pictures = [prompt for _, prompt in cases], protocols.renders(cases)
    right = prompt_accuracy.prompt_accuracy(prompt_accuracy.judge(pictures, prompts))
    assert right.share == 1
    assert set(right.by_attribute.values()) == {1}
    shifted = prompt_accuracy.prompt_accuracy(prompt_accuracy.judge(pictures, prompts[1:] + prompts[:1]))
    assert shifted.share < 0.1
