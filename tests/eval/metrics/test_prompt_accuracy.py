"""Prompt accuracy: the oracle on pictures that are right and wrong by construction."""

import pytest

from diffusion_kd.shapes import scenes
from eval.metrics import prompt_accuracy


@pytest.mark.parametrize("held_out", [False, True])
def test_true_renders_are_all_right_and_pictures_of_other_prompts_are_not(held_out: bool) -> None:
    cases = scenes.draw_cases(40, 3, held_out)
    prompts, pictures = [prompt for _, prompt in cases], [scenes.render(scene) for scene, _ in cases]
    right = prompt_accuracy.judge(pictures, prompts)
    assert all(verdict.correct and set(verdict.facts.values()) == {True} for verdict in right)
    shifted = prompt_accuracy.judge(pictures, prompts[1:] + prompts[:1])
    assert sum(verdict.correct for verdict in shifted) < 4
