"""Procedural captioned scenes: what is in a picture, how it is drawn, how it is said.

A `Scene` is one or two objects on a background. `render` draws it as 64x64 RGB with exact
anti-aliasing from signed distances; `describe` says it in one of several natural phrasings and returns a
`Prompt`, which also holds what the words ask for, so that a picture can later be judged against them.

Some (shape, colour) pairs never occur in training: `HELD_OUT`. Whoever draws them composes two words it
knows, not a picture it has seen.

Knows no torch: numpy only.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from diffusion_kd import errors

IMAGE_SIZE_PX = 64

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (255, 135, 0),
    "yellow": (250, 225, 30),
    "green": (30, 150, 50),
    "cyan": (40, 205, 225),
    "blue": (35, 75, 230),
    "purple": (135, 40, 185),
    "pink": (255, 130, 190),
}

RADIUS_PX = {"small": 7.8, "large": 11.6}
"""Half of an object's larger extent. Above 12.3 px two objects can touch."""

BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "white": ((250, 250, 250), (250, 250, 250)),
    "black": ((8, 8, 8), (8, 8, 8)),
    "gray": ((128, 128, 128), (128, 128, 128)),
    "dusk gradient": ((22, 22, 62), (78, 54, 92)),
    "sand gradient": ((238, 222, 188), (190, 160, 120)),
}
"""Colour of the top row and of the bottom row."""

PLACES: dict[str, tuple[float, float]] = {
    "center": (32.0, 32.0),
    "left": (17.0, 32.0),
    "right": (47.0, 32.0),
    "top": (32.0, 17.0),
    "bottom": (32.0, 47.0),
}
"""Where a lone object's middle lies, in px from the upper left corner, before jitter."""

RELATIONS: dict[str, tuple[str, str]] = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
"""Places of the first and the second object."""

HELD_OUT = frozenset(
    {
        ("circle", "purple"),
        ("square", "cyan"),
        ("triangle", "orange"),
        ("star", "green"),
        ("ring", "red"),
        ("cross", "yellow"),
    }
)
"""(shape, colour) pairs that no training scene contains."""

JITTER_PX = 2.5
"""How far an object's middle strays from its place, in x and y."""

SLACK_PX = 6.0
"""How far two related objects stray across the axis of their relation."""


@dataclasses.dataclass(frozen=True, slots=True)
class SceneObject:
    """One object as drawn. `x`, `y`: its middle; `radius`: half its larger extent; all in px."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def held_out(self) -> bool:
        return (self.shape, self.colour) in HELD_OUT


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows.

    `layout` is a place (one object) or a relation of the first object to the second (two objects).
    """

    objects: tuple[SceneObject, ...]
    layout: str
    background: str

    @property
    def held_out(self) -> bool:
        return any(thing.held_out for thing in self.objects)


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """One object as asked for. None: the words leave it open, as nothing but a size is in the training grammar."""

    shape: str | None
    colour: str | None
    size: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """A caption and what it asks for. None: the words leave it open."""

    text: str
    objects: tuple[Wanted, ...]
    relation: str | None
    place: str | None
    background: str | None

    @property
    def held_out(self) -> bool:
        return any((thing.shape, thing.colour) in HELD_OUT for thing in self.objects)


@dataclasses.dataclass(frozen=True, slots=True)
class Mentions:
    """Which of the optional facts a caption states."""

    sizes: tuple[bool, bool]
    place: bool
    background: bool

    @classmethod
    def everything(cls) -> "Mentions":
        return cls((True, True), True, True)

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Mentions":
        """Each optional fact is said three times in four."""
        first, second, place, background = (bool(said) for said in rng.random(4) < 0.75)
        return cls((first, second), place, background)


# --- drawing scenes ---------------------------------------------------------------------------------


def _pairs(held_out: bool) -> list[tuple[str, str]]:
    return [(shape, colour) for shape in SHAPES for colour in COLOURS if ((shape, colour) in HELD_OUT) == held_out]


def _place(
    shape: str, colour: str, size: str, place: str, slack: tuple[float, float], rng: np.random.Generator
) -> SceneObject:
    x, y = PLACES[place]
    dx, dy = rng.uniform(-1, 1, 2) * slack
    return SceneObject(shape, colour, size, x + dx, y + dy, RADIUS_PX[size] * rng.uniform(0.97, 1.03))


def _slack(layout: str) -> tuple[float, float]:
    if layout in ("left of", "right of"):
        return (JITTER_PX, SLACK_PX)
    if layout in ("above", "below"):
        return (SLACK_PX, JITTER_PX)
    return (JITTER_PX, JITTER_PX)


def _compose(looks: Sequence[tuple[str, str, str]], layout: str, background: str, rng: np.random.Generator) -> Scene:
    places = RELATIONS[layout] if len(looks) == 2 else (layout,)
    objects = tuple(_place(*look, place, _slack(layout), rng) for look, place in zip(looks, places, strict=True))
    return Scene(objects, layout, background)


def draw_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A random scene: one object with probability 0.4, else two.

    held_out: False draws only pairs seen in training; True makes one object (of one or two) a held-out pair.
    Two objects differ in shape or colour, so that words can tell them apart.
    """
    count = 1 if rng.random() < 0.4 else 2
    seen, unseen = _pairs(False), _pairs(True)
    chosen = [seen[index] for index in rng.choice(len(seen), count, replace=False)]
    if held_out:
        chosen[int(rng.integers(count))] = unseen[int(rng.integers(len(unseen)))]
    sizes = rng.choice(list(RADIUS_PX), count)
    layout = str(rng.choice(list(RELATIONS if count == 2 else PLACES)))
    background = str(rng.choice(list(BACKGROUNDS)))
    looks = [(shape, colour, str(size)) for (shape, colour), size in zip(chosen, sizes, strict=True)]
    return _compose(looks, layout, background, rng)


def complete(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A random scene that shows what a prompt asks for; what the words leave open is drawn, seen pairs only.

    Raises UnknownShapeError for a prompt of more than two objects, or of two without a relation.
    """
    count = len(prompt.objects)
    layouts = [prompt.relation] if prompt.relation else [prompt.place] if prompt.place else list(PLACES)
    if not 1 <= count <= 2 or (count == 2) != (prompt.relation is not None):
        raise errors.UnknownShapeError(f"no scene of the domain shows what is asked: {prompt.text!r}")
    looks = [_fill(wanted, rng) for wanted in prompt.objects]
    background = prompt.background or str(rng.choice(list(BACKGROUNDS)))
    return _compose(looks, str(rng.choice(layouts)), background, rng)


def _fill(wanted: Wanted, rng: np.random.Generator) -> tuple[str, str, str]:
    fitting = [
        (shape, colour)
        for shape, colour in _pairs(False) + _pairs(True)
        if wanted.shape in (None, shape) and wanted.colour in (None, colour)
    ]
    seen = [pair for pair in fitting if pair not in HELD_OUT]
    if not fitting:
        raise errors.UnknownShapeError(f"no {wanted.colour} {wanted.shape} in the shapes domain")
    shape, colour = (seen or fitting)[int(rng.integers(len(seen or fitting)))]
    return shape, colour, wanted.size or str(rng.choice(list(RADIUS_PX)))


def draw_sibling(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene with exactly one fact changed: the hard negatives of contrastive training.

    The fact is one of: an object's shape, colour or size; the layout; the background; which object stands where.
    The result contains no held-out pair; positions are drawn anew.
    """
    looks = [(thing.shape, thing.colour, thing.size) for thing in scene.objects]
    layout, background = scene.layout, scene.background
    facts = ["shape", "colour", "size", "layout", "background"] + (["swap"] if len(looks) == 2 else [])
    fact = str(rng.choice(facts))
    if fact == "swap":
        looks.reverse()
    elif fact == "layout":
        layout = _another(RELATIONS if len(looks) == 2 else PLACES, layout, rng)
    elif fact == "background":
        background = _another(BACKGROUNDS, background, rng)
    else:
        looks = _change_look(looks, fact, rng)
    return _compose(looks, layout, background, rng)


def _change_look(looks: list[tuple[str, str, str]], fact: str, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    which = int(rng.integers(len(looks)))
    others = looks[:which] + looks[which + 1 :]
    while True:
        shape, colour, size = looks[which]
        if fact == "shape":
            shape = _another(SHAPES, shape, rng)
        elif fact == "colour":
            colour = _another(COLOURS, colour, rng)
        else:
            size = _another(RADIUS_PX, size, rng)
        taken = any((shape, colour) == other[:2] for other in others)
        if (shape, colour) not in HELD_OUT and not taken:
            return [*looks[:which], (shape, colour, size), *looks[which + 1 :]]


def _another(options: Iterable[str], current: str, rng: np.random.Generator) -> str:
    return str(rng.choice([option for option in options if option != current]))


def training_scenes(count: int, seed: int, siblings: int = 4) -> Iterator[Scene]:
    """`count` scenes without held-out pairs, in runs of `siblings` that differ from the first by one fact each.

    Group g depends on (seed, g) alone, so any part can be drawn again.
    """
    for group in range(-(-count // siblings)):
        rng = np.random.default_rng((seed, group))
        first = draw_scene(rng)
        run = [first, *(draw_sibling(first, rng) for _ in range(siblings - 1))]
        yield from run[: count - group * siblings]


# --- drawing pictures -------------------------------------------------------------------------------


@functools.cache
def _polygon(shape: str) -> NDArray[np.float64]:
    """Corners of a shape of half extent 1, (K, 2), y down."""
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.9
    if shape == "triangle":
        return np.array([(0, -1), (1, 0.85), (-1, 0.85)])
    if shape == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        reach = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
        return np.stack([np.cos(angles) * reach, np.sin(angles) * reach + 0.05], 1)
    if shape == "cross":
        a, b = 1.0, 0.36
        return np.array(
            [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]
        )
    raise errors.UnknownShapeError(f"no shape {shape!r}; shapes are {', '.join(SHAPES)}")


def _signed_distance(shape: str, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance to the outline of a shape of half extent 1, negative inside. points: (N, 2) -> (N,)."""
    if shape == "circle":
        return np.hypot(points[:, 0], points[:, 1]) - 1
    if shape == "ring":
        return np.abs(np.hypot(points[:, 0], points[:, 1]) - 0.76) - 0.24
    start = _polygon(shape)
    edge = np.roll(start, -1, 0) - start
    offset = points[:, None] - start  # (N, K, 2)
    along = np.clip((offset * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
    distance = np.sqrt(((offset - along[..., None] * edge) ** 2).sum(-1).min(1))
    x, y = points[:, None, 0], points[:, None, 1]
    end = start + edge
    crosses = (start[:, 1] > y) != (end[:, 1] > y)
    reached = x < edge[:, 0] * (y - start[:, 1]) / np.where(edge[:, 1] == 0, 1, edge[:, 1]) + start[:, 0]
    inside = (crosses & reached).sum(1) % 2 == 1
    signed: NDArray[np.float64] = np.where(inside, -distance, distance)
    return signed


def _coverage(thing: SceneObject) -> tuple[slice, slice, NDArray[np.float64]]:
    """Rows, columns and the share of each pixel there that the object covers."""
    low = np.maximum(np.floor(np.array([thing.x, thing.y]) - 1.2 * thing.radius), 0).astype(int)
    high = np.minimum(np.ceil(np.array([thing.x, thing.y]) + 1.2 * thing.radius), IMAGE_SIZE_PX).astype(int)
    rows, columns = np.mgrid[low[1] : high[1], low[0] : high[0]] + 0.5
    points = np.stack([(columns - thing.x).ravel(), (rows - thing.y).ravel()], 1) / thing.radius
    distance_px = _signed_distance(thing.shape, points) * thing.radius
    covered = np.clip(0.5 - distance_px, 0, 1).reshape(rows.shape)
    return slice(low[1], high[1]), slice(low[0], high[0]), covered


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene. Returns (64, 64, 3) RGB, uint8."""
    top, bottom = (np.array(colour, float) for colour in BACKGROUNDS[scene.background])
    down = np.linspace(0, 1, IMAGE_SIZE_PX)[:, None, None]
    image = np.broadcast_to(top + (bottom - top) * down, (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3)).copy()
    for thing in scene.objects:
        rows, columns, covered = _coverage(thing)
        patch = image[rows, columns]
        patch += (np.array(COLOURS[thing.colour]) - patch) * covered[..., None]
    drawn: NDArray[np.uint8] = np.rint(image).astype(np.uint8)
    return drawn


def cell_labels(scene: Scene, cells: int) -> NDArray[np.int64]:
    """What each cell of a cells x cells grid shows: (3, cells, cells) of shape, colour, size indices; 0 = background.

    A cell belongs to an object that covers at least a quarter of it. An aid for training the reference teacher.
    """
    labels = np.zeros((3, cells, cells), np.int64)
    step = IMAGE_SIZE_PX // cells
    for thing in scene.objects:
        whole = np.zeros((IMAGE_SIZE_PX, IMAGE_SIZE_PX))
        rows, columns, covered = _coverage(thing)
        whole[rows, columns] = covered
        mine = whole.reshape(cells, step, cells, step).mean((1, 3)) >= 0.25
        facts = (SHAPES.index(thing.shape), list(COLOURS).index(thing.colour), list(RADIUS_PX).index(thing.size))
        for channel, fact in enumerate(facts):
            labels[channel][mine] = fact + 1
    return labels


CELL_CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(RADIUS_PX) + 1)
"""Number of classes of each channel of `cell_labels`."""


# --- saying what is there ---------------------------------------------------------------------------

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
PLACE_WORDS = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPENINGS = ("", "", "a picture of ", "there is ")
GROUND_WORDS = ("on", "against")
"""The words that captions use. In each tuple the first is the plainest; what stands twice is said twice as often."""


def _choice(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _noun(thing: Wanted, rng: np.random.Generator) -> str:
    size = [_choice(SIZE_WORDS[thing.size], rng)] if thing.size else []
    words = [*size, *filter(None, (thing.colour, thing.shape))]
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def ground_noun(background: str) -> str:
    """A background as captions call it: `white background`, `dusk gradient`."""
    return background if "gradient" in background else f"{background} background"


def phrase(
    objects: Sequence[Wanted],
    rng: np.random.Generator,
    *,
    relation: str | None = None,
    place: str | None = None,
    background: str | None = None,
) -> str:
    """One of several natural phrasings of what is asked for; the draws of `rng` choose which."""
    text = _noun(objects[0], rng)
    if relation is not None:
        text += f" {_choice(RELATION_WORDS[relation], rng)} {_noun(objects[1], rng)}"
    if place is not None:
        text += f" {_choice(PLACE_WORDS[place], rng)}"
    opening = _choice(OPENINGS, rng)
    if background is None:
        return opening + text
    ground = f"{_choice(GROUND_WORDS, rng)} a {ground_noun(background)}"
    return f"{ground}, {text}" if rng.random() < 0.25 else f"{opening}{text} {ground}"


def describe(scene: Scene, rng: np.random.Generator, mentions: Mentions | None = None) -> Prompt:
    """A caption of the scene together with what it asks for. mentions: which optional facts are said; drawn if None."""
    mentions = mentions or Mentions.draw(rng)
    objects = tuple(
        Wanted(thing.shape, thing.colour, thing.size if said else None)
        for thing, said in zip(scene.objects, mentions.sizes, strict=False)
    )
    relation = scene.layout if len(objects) == 2 else None
    place = scene.layout if len(objects) == 1 and mentions.place else None
    background = scene.background if mentions.background else None
    text = phrase(objects, rng, relation=relation, place=place, background=background)
    return Prompt(text, objects, relation, place, background)


def draw_cases(count: int, seed: int, held_out: bool = False) -> list[tuple[Scene, Prompt]]:
    """`count` prompts of the training grammar, each with a scene that it describes. Case i depends on (seed, i) alone.

    held_out: True asks for one held-out pair in each, False for none. No stream is one of `training_scenes`.
    """
    cases = []
    for index in range(count):
        rng = np.random.default_rng((seed, index, 1 + held_out))
        scene = draw_scene(rng, held_out)
        cases.append((scene, describe(scene, rng)))
    return cases


def draw_prompts(count: int, seed: int, held_out: bool = False) -> list[Prompt]:
    """The prompts of `draw_cases`."""
    return [prompt for _, prompt in draw_cases(count, seed, held_out)]
