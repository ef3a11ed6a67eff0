"""Reads a picture of the shapes domain by plain image analysis and judges it against a prompt.

`read` explains a picture as flat shapes on a vertical gradient: the border tells the background, what differs
from it falls into connected pieces, and each piece is compared with the six shapes at its own middle and size.
Whatever does not fit well is left unnamed (None): the oracle abstains rather than guesses.

Knows no scene, no network and no torch: numpy and scipy alone. All distances between colours are taken after
`_perceived`.
"""

import dataclasses
import functools
import itertools

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from diffusion_kd import errors
from diffusion_kd.shapes import language, scenes

ATTRIBUTES = ("count", "shape", "colour", "size", "relation", "place", "background")
"""The facts that a verdict can hold."""

_CONTRAST = 40.0
"""Distance from the background at which a pixel belongs to an object. Objects are drawn at 85 or more."""

_BORDER_PX = 4
"""Width of the columns, left and right, from which the first estimate of the background is made."""

_MIN_OBJECT_PX = 12
"""Pieces of fewer pixels are specks."""

_MAX_SPECKS_PX = 40
_MAX_OBJECTS = 4
_MAX_COVERED = 0.4
"""A picture with more pixels in specks, more objects or a larger covered share is not readable."""

_MAX_GROUND_ERROR = 22.0
"""Root mean square distance of the uncovered pixels from the fitted background. Noise of 8/255 makes 14."""

_COLOUR_REACH = 45.0
_BACKGROUND_REACH = 42.0
"""How far a colour, a background may lie from the one it is named after. Both are below half of the smallest
distance between two of them (102 and 91), so that at most one name fits."""

_MAX_MIXED = 0.1
"""Share of an object's pixels that may have a colour of their own, `_CONTRAST` away from the object's."""

_CORE = 0.3
"""Share of an object's pixels that tell its colour."""

_MIN_FIT = 0.85
_MIN_LEAD = 0.06
"""A shape is named if its intersection over union is at least `_MIN_FIT` and leads the second by `_MIN_LEAD`.
A true shape blurred by 1 px fits by 0.87 and leads by 0.07 at worst, a picture half of one shape and half of
another mostly by less."""

_SOFT_PX = 0.8
"""Blur of the soft templates, standard deviation; a picture is compared with the sharp and with the soft ones."""

_ROUGH_FIT = 0.7
"""Below this fit of the best shape the radius, and with it the size, means nothing."""

_SIZE_REACH = 1.2
"""Largest ratio of a radius to that of the size it is named after. Small and large are 1.49 apart."""

_PLACE_REACH_PX = 7.0
"""How far an object may lie from the place it is named after. Places are at least 15 px apart."""

_MIN_APART_PX = 12.0
_MIN_DOMINANCE = 1.25
"""Two objects are related if so far apart along one axis, and so many times as far as along the other."""

_FIELD_REACH = 1.4
_FIELD_STEPS = 140
"""Extent of the stored distance fields, in radii, and samples per extent."""


@dataclasses.dataclass(frozen=True, slots=True)
class SeenObject:
    """One object as seen; a fact on which the oracle abstains is None. `x`, `y`: its middle, in px."""

    shape: str | None
    colour: str | None
    size: str | None
    x: float
    y: float


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows, objects in the order of their first rows; none if the picture is not readable."""

    objects: tuple[SeenObject, ...]
    background: str | None
    readable: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Which of the facts that a prompt asks for a picture gets right; keys are from `ATTRIBUTES`."""

    facts: dict[str, bool]

    @property
    def correct(self) -> bool:
        return all(self.facts.values())

    @property
    def wrong(self) -> tuple[str, ...]:
        """What a person should be told is wrong: with a wrong count nothing else about the objects."""
        missed = [name for name in ATTRIBUTES if not self.facts.get(name, True)]
        return tuple(name for name in missed if "count" not in missed or name in ("count", "background"))

    def say(self) -> str:
        """In short: `as asked`, or `shape wrong, relation wrong`."""
        return ", ".join(f"{name} wrong" for name in self.wrong) or "as asked"


# --- the background ---------------------------------------------------------------------------------


def _perceived(colour: NDArray[np.generic]) -> NDArray[np.float64]:
    """RGB in [0, 255], scaled so that Euclidean distance resembles seen difference. (..., 3) -> (..., 3).

    Source: the weighted RGB distance (2, 4, 3) of T. Riemersma, "Colour metric"; divided by 3 to keep the scale.
    """
    return np.asarray(colour, np.float64) * np.sqrt(np.array([2, 4, 3]) / 3)


def _fit_gradient(pixels: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Least-squares vertical gradient through the known pixels: (2, 3), colours of the top and bottom row."""
    down = np.linspace(0, 1, scenes.IMAGE_SIZE_PX)
    weight = known.sum(1)
    total = (pixels * known[..., None]).sum(1)
    ramp = np.stack([1 - down, down])
    fitted: NDArray[np.float64] = np.linalg.pinv((ramp * weight) @ ramp.T) @ (ramp @ total)
    return fitted


def _gradient_rows(ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, 3) -> (64, 1, 3): the gradient's colour in each row."""
    down = np.linspace(0, 1, scenes.IMAGE_SIZE_PX)[:, None, None]
    rows: NDArray[np.float64] = ends[0] + (ends[1] - ends[0]) * down
    return rows


def _find_ground(pixels: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The background's (2, 3) end colours and each pixel's distance from it, (64, 64).

    Fitted to the border first, then twice to all that resembles the fit, so that objects do not pull at it.
    """
    known = np.zeros(pixels.shape[:2], bool)
    known[:, :_BORDER_PX] = known[:, -_BORDER_PX:] = True
    for _ in range(3):
        ends = _fit_gradient(pixels, known)
        distance = _length(pixels - _gradient_rows(ends))
        known = distance < _CONTRAST
    return ends, distance


def _length(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean length along the last axis."""
    length: NDArray[np.float64] = np.sqrt(np.einsum("...c,...c->...", vectors, vectors))
    return length


def _name_background(ends: NDArray[np.float64]) -> str | None:
    palette = _perceived(np.array(list(scenes.BACKGROUNDS.values())))  # (K, 2, 3)
    distance = np.sqrt((_length(palette - ends) ** 2).mean(1))
    return _nearest(list(scenes.BACKGROUNDS), distance, _BACKGROUND_REACH)


def _nearest(names: list[str], distance: NDArray[np.float64], reach: float) -> str | None:
    best = int(distance.argmin())
    return names[best] if distance[best] <= reach else None


# --- shapes -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Templates:
    """The shapes at radius 1: distance fields (S, K, K), areas (S,) and centroids below the middle (S,)."""

    fields: NDArray[np.float64]
    areas: NDArray[np.float64]
    drops: NDArray[np.float64]


@functools.cache
def _templates() -> _Templates:
    axis = np.linspace(-_FIELD_REACH, _FIELD_REACH, 2 * _FIELD_STEPS + 1)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    points = np.stack([x.ravel(), y.ravel()], 1)
    fields = np.stack([scenes._signed_distance(shape, points).reshape(x.shape) for shape in scenes.SHAPES])
    inside = fields < 0
    counts = inside.sum((1, 2))
    return _Templates(fields, counts * (axis[1] - axis[0]) ** 2, (inside * y).sum((1, 2)) / counts)


@dataclasses.dataclass(frozen=True, slots=True)
class _Fit:
    """A piece of the picture against every shape: intersection over union, middle and radius, each (S,)."""

    overlap: NDArray[np.float64]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    radius: NDArray[np.float64]


def _fit_shapes(coverage: NDArray[np.float64]) -> _Fit:
    """Each shape at the radius and middle that give it the coverage's area and centroid. coverage: (H, W) in [0, 1]."""
    templates = _templates()
    rows, columns = np.arange(coverage.shape[0]) + 0.5, np.arange(coverage.shape[1]) + 0.5
    area = coverage.sum()
    radius = np.sqrt(area / templates.areas)
    x = np.full_like(radius, coverage.sum(0) @ columns / area)
    y = coverage.sum(1) @ rows / area - templates.drops * radius
    sharp = _draw_shapes((rows - y[:, None]) / radius[:, None], (columns - x[:, None]) / radius[:, None], radius)
    soft = _focus(scipy.ndimage.gaussian_filter(sharp, (0, _SOFT_PX, _SOFT_PX), truncate=3))
    return _Fit(np.maximum(_overlap(sharp, coverage), _overlap(soft, coverage)), x, y, radius)


def _overlap(drawn: NDArray[np.float64], coverage: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of each drawn shape (S, H, W) with the coverage (H, W): (S,)."""
    shared: NDArray[np.float64] = np.minimum(drawn, coverage).sum((1, 2)) / np.maximum(drawn, coverage).sum((1, 2))
    return shared


def _focus(coverage: NDArray[np.float64]) -> NDArray[np.float64]:
    """Steepen the edges about one half: takes off faint noise and part of a blur, keeps areas."""
    return np.clip((coverage - 0.15) / 0.7, 0, 1)


def _draw_shapes(
    rows: NDArray[np.float64], columns: NDArray[np.float64], radius: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Coverage of every shape, (S, H, W). rows (S, H), columns (S, W): offsets from the middle in radii."""
    row, column = (
        np.clip(np.rint((offsets / _FIELD_REACH + 1) * _FIELD_STEPS), 0, 2 * _FIELD_STEPS).astype(int)
        for offsets in (rows, columns)
    )
    shape = np.arange(len(radius))[:, None, None]
    distance_px = _templates().fields[shape, row[:, :, None], column[:, None, :]] * radius[:, None, None]
    drawn: NDArray[np.float64] = np.clip(0.5 - distance_px, 0, 1)
    return drawn


def _name_shape(fit: _Fit) -> str | None:
    second, best = np.argsort(fit.overlap)[-2:]
    fits = fit.overlap[best] >= _MIN_FIT and fit.overlap[best] - fit.overlap[second] >= _MIN_LEAD
    return scenes.SHAPES[best] if fits else None


def _name_size(fit: _Fit) -> str | None:
    best = int(fit.overlap.argmax())
    if fit.overlap[best] < _ROUGH_FIT:
        return None
    off = np.abs(np.log(fit.radius[best] / np.array(list(scenes.RADIUS_PX.values()))))
    return _nearest(list(scenes.RADIUS_PX), off, float(np.log(_SIZE_REACH)))


# --- objects ----------------------------------------------------------------------------------------


def _see_object(
    pixels: NDArray[np.float64], ground: NDArray[np.float64], piece: NDArray[np.bool_], left: int, top: int
) -> SeenObject:
    """Name what one piece shows.

    pixels (H, W, 3), piece (H, W): a window around the piece, whose corner lies at (left, top) in the picture.
    ground (H, 1, 3): the background there.
    """
    colour = _core_colour(pixels, ground, piece)
    contrast = colour - ground
    power = np.maximum((contrast**2).sum(-1), _CONTRAST**2)  # in some row a gradient may have the object's colour
    share = np.clip(((pixels - ground) * contrast).sum(-1) / power, 0, 1)
    near = scipy.ndimage.binary_dilation(piece)
    mixed = _length(pixels - ground - share[..., None] * contrast)[near] > _CONTRAST
    fit = _fit_shapes(_focus(share) * near)
    best = int(fit.overlap.argmax())
    return SeenObject(
        _name_shape(fit),
        _name_colour(colour) if mixed.mean() <= _MAX_MIXED else None,
        _name_size(fit),
        left + float(fit.x[best]),
        top + float(fit.y[best]),
    )


def _core_colour(
    pixels: NDArray[np.float64], ground: NDArray[np.float64], piece: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Median colour of the pixels of a piece that are furthest from the background, (3,): no blurred rim."""
    distance = _length(pixels - ground)[piece]
    core = pixels[piece][distance >= np.quantile(distance, 1 - _CORE)]
    colour: NDArray[np.float64] = np.median(core, axis=0)
    return colour


def _name_colour(colour: NDArray[np.float64]) -> str | None:
    palette = _perceived(np.array(list(scenes.COLOURS.values())))
    return _nearest(list(scenes.COLOURS), _length(palette - colour), _COLOUR_REACH)


# --- the picture ------------------------------------------------------------------------------------


def read(image_uint8: NDArray[np.uint8]) -> Reading:
    """Say what a picture shows. image_uint8: (64, 64, 3) RGB.

    Raises DataError for another shape or dtype.
    """
    size = scenes.IMAGE_SIZE_PX
    if image_uint8.shape != (size, size, 3) or image_uint8.dtype != np.uint8:
        raise errors.DataError(
            f"the oracle reads ({size}, {size}, 3) uint8 pictures, got {image_uint8.shape} {image_uint8.dtype}"
        )
    pixels = _perceived(image_uint8)
    ends, distance = _find_ground(pixels)
    background = _name_background(ends)
    covered = distance >= _CONTRAST
    if covered.mean() > _MAX_COVERED or np.sqrt((distance[~covered] ** 2).mean()) > _MAX_GROUND_ERROR:
        return Reading((), None, False)
    labels, count = scipy.ndimage.label(covered)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    kept = np.flatnonzero(areas >= _MIN_OBJECT_PX) + 1
    if areas[areas < _MIN_OBJECT_PX].sum() > _MAX_SPECKS_PX or len(kept) > _MAX_OBJECTS:
        return Reading((), background, False)
    return Reading(_see_objects(pixels, _gradient_rows(ends), labels, kept), background, True)


def _see_objects(
    pixels: NDArray[np.float64], ground: NDArray[np.float64], labels: NDArray[np.int32], kept: NDArray[np.int64]
) -> tuple[SeenObject, ...]:
    boxes = scipy.ndimage.find_objects(labels)
    seen = []
    for label in kept:
        rows, columns = (slice(max(side.start - 2, 0), side.stop + 2) for side in boxes[label - 1])
        piece = labels[rows, columns] == label
        seen.append(_see_object(pixels[rows, columns], ground[rows], piece, columns.start, rows.start))
    return tuple(seen)


def relation(reading: Reading) -> str | None:
    """How the first of two objects lies to the second, along the axis on which they are further apart.

    None unless there are exactly two, clearly apart on one axis.
    """
    if len(reading.objects) != 2:
        return None
    first, second = reading.objects
    dx, dy = second.x - first.x, second.y - first.y
    longer, shorter = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if longer < _MIN_APART_PX or longer < _MIN_DOMINANCE * shorter:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def place(reading: Reading) -> str | None:
    """Where a lone object lies; None for several objects or one far from every place."""
    if len(reading.objects) != 1:
        return None
    spots = np.array(list(scenes.PLACES.values()))
    middle = np.array([reading.objects[0].x, reading.objects[0].y])
    return _nearest(list(scenes.PLACES), _length(spots - middle), _PLACE_REACH_PX)


# --- judging ----------------------------------------------------------------------------------------

_UNSEEN = SeenObject(None, None, None, 0.0, 0.0)


def judge(reading: Reading, prompt: scenes.Prompt) -> Verdict:
    """Which facts of the prompt a picture gets right. Facts that the prompt leaves open are not in the verdict.

    Seen objects are assigned to the wanted ones so that most facts are right; a fact about objects is right
    only if it is for each of them. With a wrong count every fact about objects is wrong. Abstaining is wrong.
    """
    counted = len(reading.objects) == len(prompt.objects)
    unseen = dataclasses.replace(reading, objects=(_UNSEEN,) * len(prompt.objects))
    compared = _compare(_in_order(reading, prompt) if counted else unseen, prompt)
    facts = {"count": counted, **{name: all(right) for name, right in compared.items()}}
    if prompt.background is not None:
        facts["background"] = reading.background == prompt.background
    return Verdict(facts)


def _in_order(reading: Reading, prompt: scenes.Prompt) -> Reading:
    """The same objects, as many as are wanted, in the order in which most facts are right."""
    orders = (dataclasses.replace(reading, objects=order) for order in itertools.permutations(reading.objects))
    return max(orders, key=lambda order: sum(map(sum, _compare(order, prompt).values())))


def _compare(reading: Reading, prompt: scenes.Prompt) -> dict[str, list[bool]]:
    """For each fact that is asked about objects, whether it is right, for each object that it is asked of.

    The n-th object of the reading is taken for the n-th of the prompt.
    """
    pairs = list(zip(reading.objects, prompt.objects, strict=True))
    facts = {
        "shape": [seen.shape == wanted.shape for seen, wanted in pairs if wanted.shape is not None],
        "colour": [seen.colour == wanted.colour for seen, wanted in pairs if wanted.colour is not None],
        "size": [seen.size == wanted.size for seen, wanted in pairs if wanted.size is not None],
        "relation": [relation(reading) == prompt.relation] if prompt.relation is not None else [],
        "place": [place(reading) == prompt.place] if prompt.place is not None else [],
    }
    return {name: right for name, right in facts.items() if right}


# --- saying ---------------------------------------------------------------------------------------


def say(reading: Reading, asked: scenes.Prompt | None = None) -> str:
    """What is seen, worded as `language.say` words what is asked: `large red ? left of small blue star`.

    `?` is a fact on which the oracle abstains; a relation or a place that is not clear is left out. asked: says the
    objects in that prompt's order, and of place and background only what it asks for; None says all that is seen.
    """
    if not reading.readable:
        return "not readable"
    if asked is not None and len(asked.objects) == len(reading.objects):
        reading = _in_order(reading, asked)
    things = [" ".join(word or "?" for word in (thing.size, thing.colour, thing.shape)) for thing in reading.objects]
    spot = place(reading) if asked is None or asked.place else None
    background = (reading.background or "?") if asked is None or asked.background else None
    return language.sentence(things or ["nothing"], relation(reading), spot, background)
