"""Pixels -> files: PNG, JPEG and WebP, with what made the picture written into it."""

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

Format = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_EXIF_DESCRIPTION = 0x010E  # ImageDescription
_EXIF_TEXT_LENGTH = 2000  # Exif ends at 64 KiB, and JSON takes up to 12 bytes a character


@dataclasses.dataclass(frozen=True, slots=True)
class Encoding:
    """compression: 0-100, the quality of JPEG and WebP as OpenAI has it; PNG is lossless and takes none."""

    format: Format = "png"
    compression: int = 100


def encode(image_uint8: NDArray[np.uint8], encoding: Encoding, about: Mapping[str, Any]) -> bytes:
    """A file of (H, W, 3) pixels.

    about: written into it, as PNG text chunks or as JSON in the Exif description; long texts are cut in the latter.
    """
    file = io.BytesIO()
    image = Image.fromarray(image_uint8)
    if encoding.format == "png":
        chunks = PngImagePlugin.PngInfo()
        for key, value in about.items():
            chunks.add_itxt(key, str(value))
        image.save(file, "PNG", pnginfo=chunks, compress_level=1)
        return file.getvalue()
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION] = json.dumps(
        {key: value[:_EXIF_TEXT_LENGTH] if isinstance(value, str) else value for key, value in about.items()}
    )
    image.save(file, encoding.format.upper(), quality=encoding.compression, exif=exif)
    return file.getvalue()
