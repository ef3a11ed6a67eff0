"""The shapes protocol: what is asked, with which seeds."""

import pytest

from diffusion_kd import errors
from diffusion_kd.shapes import scenes
from eval import protocols


def test_the_last_quarter_is_held_out(protocol: protocols.ShapesProtocol) -> None:
    cases = protocol.cases()
    assert [prompt.held_out for _, prompt in cases] == [False] * 12 + [True] * 4
    assert [scene.held_out for scene, _ in cases] == [False] * 12 + [True] * 4


def test_independent_cases_share_no_picture(protocol: protocols.ShapesProtocol) -> None:
    pictures, others = (
        {picture.tobytes() for picture in protocols.renders(cases)}
        for cases in (protocol.cases(), protocol.independent_cases())
    )
    assert len(pictures) == len(others) == 16
    assert not pictures & others


def test_every_picture_has_a_seed_of_its_own(protocol: protocols.ShapesProtocol) -> None:
    indices, repeat_seeds = protocol.repeats()
    assert indices == [0, 0, 0, 4, 4, 4, 8, 8, 8, 12, 12, 12]
    seeds = protocol.image_seeds() + repeat_seeds
    assert len(set(seeds)) == len(seeds) == 16 + 12


def test_spread_takes_all_when_there_are_fewer(protocol: protocols.ShapesProtocol) -> None:
    assert protocol.spread(99) == list(range(16))


def test_no_true_picture_was_trained_on(protocol: protocols.ShapesProtocol) -> None:
    """Not even at the training's own seed: numpy pads seeds with zeros, so (7, 3) and (7, 3, 0) would be one stream."""
    trained = {scenes.render(scene).tobytes() for scene in scenes.training_scenes(16, protocol.seed, siblings=1)}
    assert not trained & {picture.tobytes() for picture in protocols.renders(protocol.cases())}


@pytest.mark.parametrize("wrong", [{"prompts": 7}, {"seed": -1}, {"diversity_seeds": 1}, {"diversity_prompts": 0}])
def test_numbers_too_small_to_measure_with_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(errors.ConfigError, match=f"{next(iter(wrong))} must be at least"):
        protocols.ShapesProtocol(**wrong)
