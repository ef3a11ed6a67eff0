"""Scenes: drawn as described, described as drawn."""

import collections

import numpy as np
import pytest

from diffusion_kd import errors
from diffusion_kd.shapes import scenes


def drawn(count: int, held_out: bool = False, seed: int = 5) -> list[tuple[scenes.Scene, scenes.Prompt]]:
    return scenes.draw_cases(count, seed, held_out)


def test_every_fact_of_the_domain_occurs() -> None:
    counts: collections.Counter[str] = collections.Counter()
    for scene, _ in drawn(1500):
        counts.update([scene.layout, scene.background, str(len(scene.objects))])
        for thing in scene.objects:
            counts.update([thing.shape, thing.colour, thing.size])
    every = {*scenes.SHAPES, *scenes.COLOURS, *scenes.RADIUS_PX, *scenes.BACKGROUNDS, *scenes.PLACES, *scenes.RELATIONS}
    assert {*every, "1", "2"} == set(counts)
    assert len(scenes.SHAPES) == 6 and len(scenes.COLOURS) == 8 and len(scenes.BACKGROUNDS) == 5


def test_held_out_pairs_occur_only_when_asked_for() -> None:
    assert not any(scene.held_out or prompt.held_out for scene, prompt in drawn(1000))
    assert all(scene.held_out and prompt.held_out for scene, prompt in drawn(300, held_out=True))
    assert len({shape for shape, _ in scenes.HELD_OUT}) == len({colour for _, colour in scenes.HELD_OUT}) == 6


def test_two_objects_can_be_told_apart_and_stand_as_their_relation_says() -> None:
    for scene, _ in drawn(1000):
        if len(scene.objects) == 2:
            first, second = scene.objects
            assert (first.shape, first.colour) != (second.shape, second.colour)
            dx, dy = second.x - first.x, second.y - first.y
            along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[scene.layout]
            assert along > abs(dy if scene.layout.endswith("of") else dx)


def test_objects_neither_touch_nor_leave_the_picture() -> None:
    for scene, _ in drawn(400):
        covers = []
        for thing in scene.objects:
            assert thing.radius <= 12.3
            cover = np.zeros((64, 64), bool)
            rows, columns, covered = scenes._coverage(thing)
            cover[rows, columns] = covered > 0
            covers.append(cover)
            assert not (cover[0].any() or cover[-1].any() or cover[:, 0].any() or cover[:, -1].any())
        assert len(covers) == 1 or not (covers[0] & covers[1]).any()


def test_the_same_seed_gives_the_same_pictures_and_another_does_not() -> None:
    first, again, other = drawn(20), drawn(20), drawn(20, seed=6)
    assert first == again and first != other
    assert drawn(5) == drawn(20)[:5]
    assert np.array_equal(scenes.render(first[0][0]), scenes.render(again[0][0]))


def test_prompts_are_not_the_training_scenes() -> None:
    training = set(scenes.training_scenes(400, 5))
    assert not training & {scene for scene, _ in drawn(400)}


def test_edges_are_anti_aliased_and_cover_the_true_area() -> None:
    thing = scenes.SceneObject("circle", "red", "large", 32.0, 32.0, 11.6)
    _, _, covered = scenes._coverage(thing)
    assert covered.sum() == pytest.approx(np.pi * 11.6**2, rel=5e-3)
    assert ((covered > 0) & (covered < 1)).sum() > 40


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_shapes_have_the_promised_extent(shape: str) -> None:
    thing = scenes.SceneObject(shape, "red", "large", 32.0, 32.0, 11.0)
    cover = np.zeros((64, 64))
    rows, columns, covered = scenes._coverage(thing)
    cover[rows, columns] = covered
    ys, xs = np.nonzero(cover > 0.5)
    assert max(np.ptp(xs), np.ptp(ys)) + 1 == pytest.approx(22, abs=2.5)


def test_an_unknown_shape_is_an_error_of_ours() -> None:
    with pytest.raises(errors.UnknownShapeError, match="'blob'"):
        scenes.render(scenes.Scene((scenes.SceneObject("blob", "red", "large", 32, 32, 11),), "center", "white"))


def test_captions_say_what_they_ask_for_and_no_more() -> None:
    words = {"small": ("small", "little"), "large": ("large", "big")}
    for scene, prompt in drawn(500):
        for thing in prompt.objects:
            assert f"{thing.colour} {thing.shape}" in prompt.text
        sizes = sum(word in prompt.text.split() for pair in words.values() for word in pair)
        assert (sizes > 0) == any(thing.size for thing in prompt.objects)
        assert (prompt.background is not None) == ("background" in prompt.text or "gradient" in prompt.text)
        assert (prompt.relation is not None) == (len(scene.objects) == 2)
        for wanted, thing in zip(prompt.objects, scene.objects, strict=True):
            assert (wanted.shape, wanted.colour) == (thing.shape, thing.colour)
            assert wanted.size in (None, thing.size)
        assert prompt.background in (None, scene.background) and prompt.place in (None, scene.layout)


def test_the_same_scene_is_said_in_many_ways() -> None:
    (scene, _), *_ = [case for case in drawn(50) if len(case[0].objects) == 2]
    everything = scenes.Mentions.everything()
    texts = {scenes.describe(scene, np.random.default_rng(seed), everything).text for seed in range(200)}
    assert len(texts) > 50


def test_cell_labels_lie_under_the_objects() -> None:
    thing = scenes.SceneObject("square", "blue", "small", 20.0, 44.0, 7.8)
    labels = scenes.cell_labels(scenes.Scene((thing,), "left", "white"), 8)
    assert labels.shape == (3, 8, 8)
    rows, columns = np.nonzero(labels[0])
    assert set(rows) <= {4, 5, 6} and set(columns) <= {1, 2, 3}
    assert labels[:, 5, 2].tolist() == [2, 6, 1]
    assert tuple(labels.max((1, 2)) < np.array(scenes.CELL_CLASSES)) == (True, True, True)
