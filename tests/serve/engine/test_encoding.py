"""Image files: the same pixels, and what made them."""

import io
import json

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from serve.engine import encoding
from serve.engine.encoding import Encoding
from tests.serve.engine import doubles

ABOUT = {"prompt": "ein roter Kreis, 赤い丸 🔴\nzweite Zeile", "seed": 7, "tier": "turbo", "steps": 4}
_DESCRIPTION = 0x010E


@pytest.fixture(scope="module")
def image_uint8() -> NDArray[np.uint8]:
    """A gradient with noise, wider than high."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 48)[None, :, None] + rng.normal(0, 20, (32, 48, 3))
    return ramp.clip(0, 255).astype(np.uint8)


def test_a_png_has_the_same_pixels_and_says_what_made_it(image_uint8: NDArray[np.uint8]) -> None:
    file = encoding.encode(image_uint8, Encoding("png"), ABOUT)
    assert np.array_equal(doubles.pixels(file), image_uint8)
    opened = Image.open(io.BytesIO(file))
    assert isinstance(opened, PngImagePlugin.PngImageFile) and opened.size == (48, 32)
    assert opened.text == {key: str(value) for key, value in ABOUT.items()}


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_others_say_it_in_exif_and_are_near(kind: encoding.Format, image_uint8: NDArray[np.uint8]) -> None:
    file = encoding.encode(image_uint8, Encoding(kind, 95), ABOUT)
    opened = Image.open(io.BytesIO(file))
    assert opened.format == kind.upper()
    assert json.loads(opened.getexif()[_DESCRIPTION]) == ABOUT
    assert np.abs(doubles.pixels(file).astype(int) - image_uint8).mean() < 12
    assert Image.MIME[kind.upper()] == encoding.MEDIA_TYPES[kind]


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_less_quality_is_fewer_bytes(kind: encoding.Format, image_uint8: NDArray[np.uint8]) -> None:
    sizes = [len(encoding.encode(image_uint8, Encoding(kind, quality), {})) for quality in (0, 40, 80, 100)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 2


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_longest_prompts_fit(kind: encoding.Format, image_uint8: NDArray[np.uint8]) -> None:
    """JPEG's Exif ends at 64 KiB; 8000 emoji are 96 KB of JSON."""
    about = {"prompt": "🔴" * 4000, "negative_prompt": "🔵" * 4000, "seed": 1}
    file = encoding.encode(image_uint8, Encoding(kind), about)
    opened = Image.open(io.BytesIO(file))
    if isinstance(opened, PngImagePlugin.PngImageFile):
        found = dict(opened.text)
    else:
        found = json.loads(opened.getexif()[_DESCRIPTION])
    assert int(found["seed"]) == 1
    assert found["prompt"].startswith("🔴" * 1000)


def test_nothing_to_say_is_fine(image_uint8: NDArray[np.uint8]) -> None:
    for kind in encoding.MEDIA_TYPES:
        assert doubles.pixels(encoding.encode(image_uint8, Encoding(kind), {})).shape == image_uint8.shape
