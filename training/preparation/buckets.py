"""Aspect-ratio buckets: the heights and widths that pictures are cut to."""

import dataclasses
import math

from diffusion_kd import errors

_MOST_ASPECT = 4.0
"""Of SDXL's table: 512 x 2048 px."""


@dataclasses.dataclass(frozen=True, slots=True)
class Buckets:
    """sizes_px: (height, width) of each, tallest first."""

    sizes_px: tuple[tuple[int, int], ...]

    def nearest(self, height_px: int, width_px: int) -> tuple[int, int]:
        """The bucket whose aspect ratio is nearest, on a logarithmic scale; the squarer one of two."""
        wanted = math.log(width_px / height_px)

        def distance(size: tuple[int, int]) -> tuple[float, float]:
            aspect = math.log(size[1] / size[0])
            return round(abs(aspect - wanted), 9), abs(aspect)

        return min(self.sizes_px, key=distance)


def build(kind: str, size_px: int, multiple_px: int) -> Buckets:
    """`square`: the one of size_px; `aspect`: as wide as four times as high to as high as four times as wide.

    multiple_px: what the networks need sides to be a multiple of; the table's step is a sixteenth of size_px where
    that is one. For each long side, the short one is the longest that keeps the area within size_px squared: at 1024
    this gives SDXL's table (Podell et al. 2023, appendix I) but for the four shapes, each way round, that it has twice.
    Raises ConfigError for another kind or a size that is no multiple.
    """
    errors.require(kind in ("square", "aspect"), "buckets", kind, "square or aspect")
    errors.require(
        size_px >= multiple_px and size_px % multiple_px == 0, "size_px", size_px, f"a multiple of {multiple_px}"
    )
    if kind == "square":
        return Buckets(((size_px, size_px),))
    step = multiple_px * max(1, size_px // 16 // multiple_px)
    sizes = {(size_px, size_px)}
    for long in range(size_px, 2 * size_px + 1, step):
        short = size_px * size_px // long // step * step
        if short and long <= _MOST_ASPECT * short:
            sizes |= {(short, long), (long, short)}
    return Buckets(tuple(sorted(sizes, key=lambda size: (size[1] / size[0], size))))
