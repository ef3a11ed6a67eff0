"""A picture of any mode becomes RGB, upright, cut at the centre, and tells where it was cut."""

import io
import pathlib

import numpy as np
import PIL.Image
import pytest

from diffusion_kd import errors
from training.preparation import pictures


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


@pytest.mark.parametrize(
    ("image", "kind", "colour"),
    [
        (PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG", (255, 255, 255)),
        (PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 255)), "PNG", (255, 0, 0)),
        (PIL.Image.new("LA", (4, 4), (0, 51)), "PNG", (204, 204, 204)),
        (PIL.Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (PIL.Image.new("L", (4, 4), 100), "PNG", (100, 100, 100)),
        (PIL.Image.new("1", (4, 4), 1), "PNG", (255, 255, 255)),
        (PIL.Image.new("RGB", (4, 4), (0, 0, 255)).quantize(4), "GIF", (0, 0, 255)),
    ],
    ids=["transparent", "opaque", "grey with alpha", "CMYK", "grey", "black and white", "palette"],
)
def test_every_mode_becomes_rgb(image: PIL.Image.Image, kind: str, colour: tuple[int, int, int]) -> None:
    opened = pictures.open_rgb(encoded(image, kind), "it")
    assert opened.mode == "RGB" and opened.getpixel((1, 1)) == colour


def test_a_transparent_palette_lies_on_white() -> None:
    palette = PIL.Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    content = encoded(palette, "PNG", transparency=1)
    assert pictures.open_rgb(content, "it").getpixel((0, 0)) == (255, 255, 255)


def test_what_cannot_be_shown_is_named() -> None:
    deep = PIL.Image.fromarray(np.full((8, 8), 30_000, np.uint16))
    with pytest.raises(pictures.TooDeepError, match="it has more than 8 bits"):
        pictures.open_rgb(encoded(deep), "it")
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = encoded(noise, kind)
        for content in (whole[: len(whole) // 2], b"", b"text"):
            with pytest.raises(errors.DataError, match="it cannot be read as an image") as caught:
                pictures.open_rgb(content, "it")
            assert "0x" not in str(caught.value), "an address differs from run to run"


def test_a_range_of_a_file_is_read_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    assert pictures.FileRange(tmp_path / "f", 2, 3).read() == b"234"
    assert pictures.FileRange(tmp_path / "f", 8).read() == b"89"


def test_a_picture_is_covered_and_cut_at_the_centre() -> None:
    """Three stripes, the middle one as wide as high: alone it is left."""
    stripes = PIL.Image.new("RGB", (300, 100), (255, 0, 0))
    stripes.paste((0, 255, 0), (100, 0, 200, 100))
    fitted = pictures.fit(stripes, (50, 50))
    assert fitted.pixels_uint8.shape == (50, 50, 3)
    assert fitted.pixels_uint8[:, 6:-6].reshape(-1, 3).tolist() == [[0, 255, 0]] * (50 * 38)
    assert fitted.original_px == (100, 300) and fitted.corner_px == (0, 50)
    assert pictures.fit(stripes.rotate(90, expand=True), (50, 50)).corner_px == (50, 0)
    assert pictures.fit(stripes, (50, 150)).corner_px == (0, 0)


def test_contrast_is_the_deviation_of_the_liveliest_channel() -> None:
    pixels = np.full((32, 32, 3), 77, np.uint8)
    pixels[:16, :, 2], pixels[16:, :, 2] = 100, 120
    assert pictures.fit(PIL.Image.fromarray(pixels), (32, 32)).contrast == pytest.approx(10, abs=0.5)
    flat = PIL.Image.new("RGB", (32, 32), (10, 200, 30))
    assert pictures.fit(flat, (32, 32)).contrast == pytest.approx(0, abs=1e-3)
