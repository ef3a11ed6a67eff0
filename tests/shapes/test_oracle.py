import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
from numpy.typing import NDArray

from diffusion_kd import errors
from diffusion_kd.shapes import oracle, scenes

Picture = NDArray[np.uint8]


def to_uint8(pixels: NDArray[np.float64]) -> Picture:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def intact(picture: Picture, rng: np.random.Generator) -> Picture:
    return picture


def degraded(picture: Picture, rng: np.random.Generator) -> Picture:
    """What a decoder does to a picture: a blur of 0.7 px, noise of 6/255, a shift of each channel by up to 8/255."""
    blurred = scipy.ndimage.gaussian_filter(picture.astype(float), (0.7, 0.7, 0))
    return to_uint8(blurred + rng.normal(0, 6, blurred.shape) + rng.uniform(-8, 8, 3))


def shifted_and_noisy(picture: Picture, rng: np.random.Generator) -> Picture:
    """No blur, but noise of 8/255 and a shift of up to 15/255."""
    return to_uint8(picture + rng.normal(0, 8, picture.shape) + rng.uniform(-15, 15, 3))


def lone(
    shape: str = "circle",
    colour: str = "red",
    size: str = "large",
    x: float = 32.3,
    y: float = 31.6,
    radius: float | None = None,
) -> scenes.SceneObject:
    return scenes.SceneObject(shape, colour, size, x, y, radius or scenes.RADIUS_PX[size])


def picture_of(*things: scenes.SceneObject, background: str = "white") -> Picture:
    return scenes.render(scenes.Scene(things, "center", background))


# --- reading true pictures --------------------------------------------------------------------------


def accuracy(count: int, held_out: bool, spoil: Callable[[Picture, np.random.Generator], Picture]) -> dict[str, float]:
    """Share of scenes for which each attribute is judged right, by prompts that mention everything."""
    right: dict[str, list[bool]] = {name: [] for name in oracle.ATTRIBUTES}
    for index in range(count):
        rng = np.random.default_rng((11, index, int(held_out)))
        scene = scenes.draw_scene(rng, held_out)
        prompt = scenes.describe(scene, rng, scenes.Mentions.everything())
        verdict = oracle.judge(oracle.read(spoil(scenes.render(scene), rng)), prompt)
        for name, fact in verdict.facts.items():
            right[name].append(fact)
    assert min(len(facts) for facts in right.values()) > count / 4
    return {name: float(np.mean(facts)) for name, facts in right.items()}


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize(("spoil", "least"), [(intact, 0.995), (degraded, 0.97), (shifted_and_noisy, 0.97)])
def test_reads_renders(held_out: bool, spoil: Callable[[Picture, np.random.Generator], Picture], least: float) -> None:
    assert min(accuracy(120, held_out, spoil).values()) >= least


@pytest.mark.parametrize("size", scenes.RADIUS_PX)
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_names_a_lone_object_and_finds_its_middle(shape: str, size: str) -> None:
    reading = oracle.read(picture_of(lone(shape, "purple", size), background="dusk gradient"))

    assert (reading.background, reading.readable) == ("dusk gradient", True)
    (seen,) = reading.objects
    assert (seen.shape, seen.colour, seen.size) == (shape, "purple", size)
    assert (seen.x, seen.y) == pytest.approx((32.3, 31.6), abs=0.3)


@pytest.mark.parametrize("shape", ["star", "ring"])
def test_names_thin_shapes_through_a_blur_of_a_pixel(shape: str) -> None:
    picture = picture_of(lone(shape, "green", "small"), background="black")
    blurred = to_uint8(scipy.ndimage.gaussian_filter(picture.astype(float), (1, 1, 0)))

    assert [seen.shape for seen in oracle.read(blurred).objects] == [shape]


@pytest.mark.parametrize("background", scenes.BACKGROUNDS)
@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_names_every_colour_on_every_background(colour: str, background: str) -> None:
    reading = oracle.read(picture_of(lone("ring", colour, "small"), background=background))

    assert reading.background == background
    assert [seen.colour for seen in reading.objects] == [colour]


def test_an_empty_picture_has_a_background_and_no_objects() -> None:
    assert oracle.read(picture_of(background="sand gradient")) == oracle.Reading((), "sand gradient", True)


def test_counts_three_objects() -> None:
    things = [lone("star", "blue", "small", x=x, y=y) for x, y in ((14, 14), (48, 15), (30, 46))]
    reading = oracle.read(picture_of(*things))

    assert [(round(seen.x), round(seen.y)) for seen in reading.objects] == [(14, 14), (48, 15), (30, 46)]


def test_an_object_at_the_border_does_not_spoil_the_background() -> None:
    reading = oracle.read(picture_of(lone("square", "blue", x=10.6), background="sand gradient"))

    assert (reading.background, [seen.shape for seen in reading.objects]) == ("sand gradient", ["square"])


def test_ignores_a_few_specks_but_not_many() -> None:
    rng = np.random.default_rng(0)
    few, many = (picture_of(lone()) for _ in range(2))
    few[2:4, 2:5] = 0
    rows, columns = np.divmod(rng.permutation(64 * 12)[:120], 64)
    many[rows, columns] = 0

    assert [item.shape for item in oracle.read(few).objects] == ["circle"]
    assert oracle.read(many) == oracle.Reading((), "white", False)


def test_reading_is_repeatable_and_leaves_the_picture_alone() -> None:
    rng = np.random.default_rng(5)
    picture = degraded(scenes.render(scenes.draw_scene(rng)), rng)
    before = picture.copy()

    assert oracle.read(picture) == oracle.read(picture)
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("picture", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32)])
def test_rejects_other_pictures(picture: Picture) -> None:
    with pytest.raises(errors.DataError, match=r"64, 64, 3"):
        oracle.read(picture)


def test_reads_in_a_few_milliseconds() -> None:
    pictures = [scenes.render(scenes.draw_scene(np.random.default_rng((2, index)))) for index in range(20)]

    def batch_s() -> float:
        start = time.process_time()
        for picture in pictures:
            oracle.read(picture)
        return time.process_time() - start

    assert min(batch_s() for _ in range(5)) / len(pictures) < 0.005  # it takes 1.5 ms; the rest is for slow machines


# --- abstaining -------------------------------------------------------------------------------------


def whole(reading: oracle.Reading) -> bool:
    """Whether every fact about the objects is named: what must not happen for a picture that shows nothing."""
    named = [(seen.shape, seen.colour, seen.size) for seen in reading.objects]
    return bool(named) and all(None not in facts for facts in named)


def noise(rng: np.random.Generator) -> Picture:
    return rng.integers(0, 256, (64, 64, 3), np.uint8)


def blobs(rng: np.random.Generator) -> Picture:
    field = scipy.ndimage.gaussian_filter(rng.normal(size=(64, 64, 3)), (*[rng.uniform(3, 10)] * 2, 0))
    return to_uint8(255 * (field - field.min()) / np.ptp(field))


def flat_blobs(rng: np.random.Generator) -> Picture:
    """Shapeless patches of one palette colour on a palette background."""
    field = scipy.ndimage.gaussian_filter(rng.normal(size=(64, 64)), rng.uniform(4, 8))
    picture = picture_of(background=str(rng.choice(list(scenes.BACKGROUNDS))))
    picture[field > np.quantile(field, rng.uniform(0.85, 0.95))] = scenes.COLOURS[str(rng.choice(list(scenes.COLOURS)))]
    return picture


def scrambled(rng: np.random.Generator) -> Picture:
    blocks = scenes.render(scenes.draw_scene(rng)).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 8, 8, 3)
    return rng.permutation(blocks).reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 64, 3)


def pair(rng: np.random.Generator, differ: str) -> tuple[Picture, Picture, scenes.SceneObject]:
    """Two pictures of one object that differ in its shape or its colour, and the object."""
    scene = scenes.draw_scene(rng)
    thing = scene.objects[0]
    options = [
        name for name in (scenes.SHAPES if differ == "shape" else scenes.COLOURS) if name != getattr(thing, differ)
    ]
    change: dict[str, Any] = {differ: str(rng.choice(options))}
    other = dataclasses.replace(thing, **change)
    first, second = (picture_of(each, background=scene.background) for each in (thing, other))
    return first, second, thing


def mixed_shapes(rng: np.random.Generator) -> Picture:
    first, second, _ = pair(rng, "shape")
    return to_uint8((first.astype(float) + second) / 2)


def halves(rng: np.random.Generator, differ: str) -> Picture:
    """One picture on one side of a random line through the object, the other beyond."""
    first, second, thing = pair(rng, differ)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:64, :64] + 0.5
    beyond = (x - thing.x) * np.cos(angle) + (y - thing.y) * np.sin(angle) > 0
    return np.where(beyond[..., None], second, first)


def half_coloured(rng: np.random.Generator) -> Picture:
    return halves(rng, "colour")


def half_shaped(rng: np.random.Generator) -> Picture:
    return halves(rng, "shape")


def rate(draw: Callable[[np.random.Generator], Picture], count: int = 150) -> float:
    return float(np.mean([whole(oracle.read(draw(np.random.default_rng((3, index))))) for index in range(count)]))


@pytest.mark.parametrize("draw", [noise, blobs, flat_blobs, scrambled, mixed_shapes, half_coloured, half_shaped])
def test_abstains_on_what_is_no_scene(draw: Callable[[np.random.Generator], Picture]) -> None:
    assert rate(draw) <= 0.04


def test_names_everything_in_a_scene() -> None:
    assert rate(lambda rng: scenes.render(scenes.draw_scene(rng))) == 1


@pytest.mark.parametrize("draw", [noise, blobs])
def test_noise_is_not_readable(draw: Callable[[np.random.Generator], Picture]) -> None:
    assert [oracle.read(draw(np.random.default_rng(seed))) for seed in range(20)] == [
        oracle.Reading((), None, False)
    ] * 20


def test_abstains_on_a_colour_or_background_outside_the_palette() -> None:
    teal = picture_of(lone("square", "red"))
    teal[(teal == scenes.COLOURS["red"]).all(-1)] = (0, 90, 90)
    on_brown = picture_of(lone("square", "cyan"), background="black")
    on_brown[(on_brown == 8).all(-1)] = (110, 70, 20)

    first, second = oracle.read(teal), oracle.read(on_brown)

    assert (first.objects[0].shape, first.objects[0].colour, first.background) == ("square", None, "white")
    assert (second.objects[0].shape, second.objects[0].colour, second.background) == ("square", "cyan", None)


def test_abstains_on_the_colour_of_an_object_in_two_colours() -> None:
    picture = picture_of(lone("circle", "red"))
    picture[:, 32:] = picture_of(lone("circle", "blue"))[:, 32:]

    assert [seen.colour for seen in oracle.read(picture).objects] == [None]


@pytest.mark.parametrize(("depth", "readable"), [(5, True), (18, False)])
def test_a_background_with_strong_stripes_is_not_readable(depth: int, readable: bool) -> None:
    picture = picture_of(lone(), background="gray")
    picture[:, ::2] += np.uint8(depth)
    picture[:, 1::2] -= np.uint8(depth)

    assert oracle.read(picture).readable == readable


@pytest.mark.parametrize(("height", "readable"), [(20, True), (30, False)])
def test_a_picture_that_is_mostly_covered_is_not_readable(height: int, readable: bool) -> None:
    picture = picture_of()
    picture[10 : 10 + height] = scenes.COLOURS["red"]

    assert oracle.read(picture).readable == readable


@pytest.mark.parametrize(("count", "readable"), [(4, True), (5, False)])
def test_a_crowd_is_not_readable(count: int, readable: bool) -> None:
    spots = [(12, 12), (52, 12), (12, 52), (52, 52), (32, 32)][:count]

    assert oracle.read(picture_of(*(lone(size="small", x=x, y=y) for x, y in spots))).readable == readable


def test_abstains_on_the_size_of_what_is_no_shape() -> None:
    picture = picture_of()
    picture[20:26, 20:50] = scenes.COLOURS["red"]

    assert [(seen.shape, seen.colour, seen.size) for seen in oracle.read(picture).objects] == [(None, "red", None)]


@pytest.mark.parametrize(("radius", "size"), [(5.5, None), (7.0, "small"), (9.5, None), (12.5, "large"), (15.0, None)])
def test_size_follows_the_radius_and_is_left_open_between(radius: float, size: str | None) -> None:
    assert [seen.size for seen in oracle.read(picture_of(lone(radius=radius))).objects] == [size]


# --- relations and places ---------------------------------------------------------------------------


def seen_at(
    x: float, y: float, shape: str | None = "star", colour: str | None = "red", size: str | None = "small"
) -> oracle.SeenObject:
    return oracle.SeenObject(shape, colour, size, x, y)


def reading_of(*objects: oracle.SeenObject) -> oracle.Reading:
    return oracle.Reading(objects, "white", True)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ((50, 40), "left of"),
        ((10, 22), "right of"),
        ((22, 50), "above"),
        ((40, 2), "below"),
        ((50, 51), None),  # neither axis leads
        ((38, 30), None),  # too close
    ],
)
def test_relation_is_along_the_longer_axis(second: tuple[float, float], expected: str | None) -> None:
    assert oracle.relation(reading_of(seen_at(30, 30), seen_at(*second))) == expected


def test_relation_needs_two_objects() -> None:
    assert oracle.relation(reading_of(seen_at(30, 30))) is None
    assert oracle.relation(reading_of(seen_at(10, 30), seen_at(30, 30), seen_at(50, 30))) is None


@pytest.mark.parametrize(
    ("middle", "expected"),
    [
        ((34, 30), "center"),
        ((15, 35), "left"),
        ((49, 30), "right"),
        ((32, 12), "top"),
        ((30, 49), "bottom"),
        ((12, 12), None),
    ],
)
def test_place_is_the_nearest_within_reach(middle: tuple[float, float], expected: str | None) -> None:
    assert oracle.place(reading_of(seen_at(*middle))) == expected


def test_place_needs_a_lone_object() -> None:
    assert oracle.place(reading_of(seen_at(32, 32), seen_at(32, 32))) is None


# --- judging ----------------------------------------------------------------------------------------


def prompt_for(
    *wanted: scenes.Wanted, relation: str | None = None, place: str | None = None, background: str | None = None
) -> scenes.Prompt:
    return scenes.Prompt("", wanted, relation, place, background)


RED_STAR = scenes.Wanted("star", "red", "small")
BLUE_RING = scenes.Wanted("ring", "blue", "large")
STAR_SEEN = seen_at(15, 30)
RING_SEEN = seen_at(45, 30, "ring", "blue", "large")
BOTH = prompt_for(RED_STAR, BLUE_RING, relation="left of", background="white")


@pytest.mark.parametrize("objects", [(STAR_SEEN, RING_SEEN), (RING_SEEN, STAR_SEEN)])
def test_a_right_picture_is_correct_in_either_order(objects: tuple[oracle.SeenObject, ...]) -> None:
    verdict = oracle.judge(reading_of(*objects), BOTH)

    assert verdict.facts == dict.fromkeys(("count", "shape", "colour", "size", "relation", "background"), True)
    assert verdict.correct


@pytest.mark.parametrize("objects", [(STAR_SEEN, RING_SEEN), (RING_SEEN, STAR_SEEN)])
def test_swapped_places_are_a_wrong_relation_alone(objects: tuple[oracle.SeenObject, ...]) -> None:
    verdict = oracle.judge(reading_of(*objects), dataclasses.replace(BOTH, relation="right of"))

    assert [name for name, right in verdict.facts.items() if not right] == ["relation"]
    assert not verdict.correct


def test_swapped_colours_are_a_wrong_colour_alone() -> None:
    reading = reading_of(dataclasses.replace(RING_SEEN, colour="red"), dataclasses.replace(STAR_SEEN, colour="blue"))

    assert [name for name, right in oracle.judge(reading, BOTH).facts.items() if not right] == ["colour"]


def test_relation_decides_between_twins() -> None:
    twins = reading_of(seen_at(45, 30), seen_at(15, 30))

    assert oracle.judge(twins, prompt_for(RED_STAR, RED_STAR, relation="left of")).facts["relation"]


@pytest.mark.parametrize("fact", ["shape", "colour", "size"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_fact_wrong_for_one_object_or_left_open_is_wrong(fact: str, which: int) -> None:
    for value in ("another", None):
        objects = [STAR_SEEN, RING_SEEN]
        change: dict[str, Any] = {fact: value}
        objects[which] = dataclasses.replace(objects[which], **change)
        facts = oracle.judge(reading_of(*objects), BOTH).facts

        assert [name for name, right in facts.items() if not right] == [fact]


@pytest.mark.parametrize("objects", [(), (STAR_SEEN,), (STAR_SEEN, RING_SEEN, seen_at(30, 55))])
def test_a_wrong_count_makes_every_object_fact_wrong(objects: tuple[oracle.SeenObject, ...]) -> None:
    facts = oracle.judge(reading_of(*objects), BOTH).facts

    wrong = dict.fromkeys(("count", "shape", "colour", "size", "relation"), False)
    assert facts == {**wrong, "background": True}


def test_a_wrong_count_makes_the_place_wrong() -> None:
    facts = oracle.judge(reading_of(STAR_SEEN, RING_SEEN), prompt_for(RED_STAR, place="left")).facts

    assert facts == dict.fromkeys(("count", "shape", "colour", "size", "place"), False)


def test_a_lone_object_is_judged_by_its_place() -> None:
    reading = reading_of(STAR_SEEN)

    assert oracle.judge(reading, prompt_for(RED_STAR, place="left")).correct
    assert not oracle.judge(reading, prompt_for(RED_STAR, place="right")).facts["place"]


def test_facts_that_are_not_asked_are_not_judged() -> None:
    facts = oracle.judge(reading_of(STAR_SEEN), prompt_for(scenes.Wanted("star", "red", None))).facts

    assert facts == {"count": True, "shape": True, "colour": True}


def test_a_size_asked_of_one_object_is_judged_for_that_one() -> None:
    open_ring = prompt_for(RED_STAR, dataclasses.replace(BLUE_RING, size=None), relation="left of")

    assert oracle.judge(reading_of(STAR_SEEN, dataclasses.replace(RING_SEEN, size=None)), open_ring).facts["size"]
    assert not oracle.judge(reading_of(dataclasses.replace(STAR_SEEN, size="large"), RING_SEEN), open_ring).facts[
        "size"
    ]


def test_an_unnamed_background_is_wrong_where_one_is_asked() -> None:
    reading = oracle.Reading((STAR_SEEN,), None, True)

    assert not oracle.judge(reading, prompt_for(RED_STAR, background="white")).facts["background"]
    assert "background" not in oracle.judge(reading, prompt_for(RED_STAR)).facts


@pytest.mark.parametrize(
    ("fact", "changed"),
    [
        ("shape", lone("square")),
        ("colour", lone(colour="orange")),
        ("size", lone(size="small")),
        ("place", lone(x=47.0)),
    ],
)
def test_a_picture_with_one_fact_changed_fails_in_that_fact_alone(fact: str, changed: scenes.SceneObject) -> None:
    prompt = prompt_for(scenes.Wanted("circle", "red", "large"), place="center", background="black")

    assert oracle.judge(oracle.read(picture_of(lone(), background="black")), prompt).correct
    facts = oracle.judge(oracle.read(picture_of(changed, background="black")), prompt).facts
    assert [name for name, right in facts.items() if not right] == [fact]


# --- saying -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (reading_of(STAR_SEEN), "small red star on the left, on a white background"),
        (reading_of(STAR_SEEN, RING_SEEN), "small red star left of large blue ring, on a white background"),
        (reading_of(STAR_SEEN, seen_at(17, 33)), "small red star, small red star, on a white background"),
        (reading_of(seen_at(5, 5, None, "red", None)), "? red ?, on a white background"),
        (oracle.Reading((STAR_SEEN,), None, True), "small red star on the left, on a ? background"),
        (oracle.Reading((), "dusk gradient", True), "nothing, on a dusk gradient"),
        (oracle.Reading((), "white", False), "not readable"),
    ],
)
def test_all_that_is_seen_is_said(reading: oracle.Reading, words: str) -> None:
    assert oracle.say(reading) == words


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (prompt_for(BLUE_RING), "small red star"),
        (prompt_for(BLUE_RING, place="top"), "small red star on the left"),
        (prompt_for(BLUE_RING, background="black"), "small red star, on a white background"),
    ],
)
def test_of_place_and_background_what_is_asked_is_said(prompt: scenes.Prompt, words: str) -> None:
    assert oracle.say(reading_of(STAR_SEEN), prompt) == words


def test_objects_are_said_in_the_order_of_the_prompt() -> None:
    reading = reading_of(RING_SEEN, STAR_SEEN)
    swapped = prompt_for(BLUE_RING, RED_STAR, relation="right of")

    assert oracle.say(reading, BOTH) == "small red star left of large blue ring, on a white background"
    assert oracle.say(reading, swapped) == "large blue ring right of small red star"
    assert oracle.say(reading, prompt_for(RED_STAR)) == "large blue ring right of small red star"


@pytest.mark.parametrize(
    ("objects", "background", "wrong", "words"),
    [
        ((STAR_SEEN, RING_SEEN), "white", (), "as asked"),
        ((STAR_SEEN, RING_SEEN), "black", ("background",), "background wrong"),
        (
            (seen_at(45, 30, "circle"), RING_SEEN),
            "white",
            ("shape", "relation"),
            "shape wrong, relation wrong",
        ),
        ((STAR_SEEN,), "white", ("count",), "count wrong"),
        ((), "black", ("count", "background"), "count wrong, background wrong"),
    ],
)
def test_what_is_wrong_is_said(
    objects: tuple[oracle.SeenObject, ...], background: str, wrong: tuple[str, ...], words: str
) -> None:
    verdict = oracle.judge(oracle.Reading(objects, background, True), BOTH)

    assert (verdict.wrong, verdict.say()) == (wrong, words)
