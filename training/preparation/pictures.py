"""One picture: opened, judged, and cut to the size that it is trained at."""

import dataclasses
import io
import pathlib
import re

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from diffusion_kd import errors

THUMBNAIL = (8, 9)
"""Height and width of the small copy that duplicates are found by: 8 rows of 8 differences between neighbours."""


@dataclasses.dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes of a file: `length` of them from `start` on, to its end if None."""

    path: pathlib.Path
    start: int = 0
    length: int | None = None

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read() if self.length is None else file.read(self.length)


@dataclasses.dataclass(frozen=True, slots=True)
class Fitted:
    """A picture cut to a bucket.

    pixels_uint8: (H, W, 3). original_px, corner_px: height and width before, and top and left of the cut in the
    scaled picture: SDXL's micro-conditioning. thumbnail_uint8: (8, 9, 3). contrast: standard deviation of the
    liveliest channel, in levels of 255.
    """

    pixels_uint8: NDArray[np.uint8]
    original_px: tuple[int, int]
    corner_px: tuple[int, int]
    thumbnail_uint8: NDArray[np.uint8]
    contrast: float


class TooDeepError(errors.DataError):
    """A picture of more than 8 bits a channel, of which Pillow would cut off all above 255."""


def open_rgb(content: bytes | FileRange, name: object) -> PIL.Image.Image:
    """Decode a picture: upright as its EXIF says, any mode turned into RGB, what is transparent laid on white.

    name: what errors call it. Raises TooDeepError, and DataError for what cannot be read, a file cut short among it.
    """
    try:
        encoded = content.read() if isinstance(content, FileRange) else content
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            if image.mode.startswith(("I", "F")):
                raise TooDeepError(f"{name} has more than 8 bits a channel ({image.mode}); save it with 8")
            return _to_rgb(PIL.ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        reason = re.sub(r"<_io\.BytesIO object at \w+>", "its content", str(error))
        raise errors.DataError(f"{name} cannot be read as an image: {reason}") from None


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = PIL.Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return PIL.Image.alpha_composite(white, layer).convert("RGB")


def cover(image: PIL.Image.Image, size_px: tuple[int, int]) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Scale until it covers size_px (height, width) and cut at the centre: (H, W, 3), and top and left of the cut.

    The corner is counted in pixels of the scaled picture, as SDXL counts it (Podell et al. 2023, section 2.2).
    """
    height, width = size_px
    scale = max(height / image.height, width / image.width)
    spare = (image.height - height / scale, image.width - width / scale)
    top, left = (max(0.0, side / 2) for side in spare)
    box = (left, top, min(image.width, left + width / scale), min(image.height, top + height / scale))
    pixels = np.asarray(image.resize((width, height), PIL.Image.Resampling.LANCZOS, box=box))
    return pixels, (round(top * scale), round(left * scale))


def fit(image: PIL.Image.Image, size_px: tuple[int, int]) -> Fitted:
    """Cut an RGB picture to size_px (height, width) and take its measure."""
    pixels, corner = cover(image, size_px)
    cut = PIL.Image.fromarray(pixels)
    small = np.asarray(cut.resize(THUMBNAIL[::-1], PIL.Image.Resampling.BOX))
    return Fitted(pixels, (image.height, image.width), corner, small, _contrast(cut))


def _contrast(image: PIL.Image.Image) -> float:
    """From the histogram, which Pillow counts: no array of a picture's size."""
    counts = np.array(image.histogram(), np.float64).reshape(3, 256) / (image.width * image.height)
    levels = np.arange(256.0)
    means = counts @ levels
    return float(np.sqrt(np.maximum(counts @ levels**2 - means**2, 0)).max())
