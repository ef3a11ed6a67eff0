"""The shapes protocol: what is asked, with which seeds."""

import numpy as np
import pytest

from diffusion_kd import errors
from diffusion_kd.shapes import scenes
from eval import protocols


@pytest.mark.parametrize("held_out", [False, True])
def test_cases_are_the_prompts_of_the_domain_with_scenes_that_they_describe(held_out: bool) -> None:
    cases = protocols.draw_cases(20, 5, held_out)
    assert [case.prompt for case in cases] == scenes.draw_prompts(20, 5, held_out)
    for case in cases:
        looks = [(thing.shape, thing.colour) for thing in case.scene.objects]
        assert looks == [(thing.shape, thing.colour) for thing in case.prompt.objects]


def test_the_last_quarter_is_held_out(protocol: protocols.ShapesProtocol) -> None:
    assert [case.prompt.held_out for case in protocol.cases()] == [False] * 12 + [True] * 4


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


def test_default_pictures_are_not_those_of_the_default_training_seed() -> None:
    seed = protocols.ShapesProtocol().seed
    trained = [scenes.render(scene) for scene in scenes.training_scenes(8, seed=0, siblings=1)]
    truth = protocols.renders(protocols.draw_cases(8, seed))
    assert not np.array_equal(np.stack(trained), truth)


@pytest.mark.parametrize("wrong", [{"prompts": 7}, {"seed": -1}, {"diversity_seeds": 1}, {"diversity_prompts": 0}])
def test_numbers_too_small_to_measure_with_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(errors.ConfigError, match=f"{next(iter(wrong))} must be at least"):
        protocols.ShapesProtocol(**wrong)
