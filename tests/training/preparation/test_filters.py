"""Personal data goes and numbers stay; a picture that comes twice is found once, whatever its file."""

import io

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from training.preparation import filters, pictures


@pytest.mark.parametrize(
    ("text", "clean", "kinds"),
    [
        ("a cat, write to jo.doe+x@mail.example.co.uk please", "a cat, write to please", {"e-mail address": 1}),
        ("by jörg@bücher.de", "by", {"e-mail address": 1}),
        ("portrait (jane [at] site [dot] org), oil", "portrait, oil", {"e-mail address": 1}),
        ("see https://x.org/a?b=1&c=2, a dog", "see, a dog", {"URL": 1}),
        ("a dog. www.dogs.example/here.", "a dog..", {"URL": 1}),
        ("trending on artstation.com, 4k", "trending on, 4k", {"URL": 1}),
        ("HTTP://A.B/c and me@b.cd", "and", {"URL": 1, "e-mail address": 1}),
        ("call +49 (0)170 1234567 now", "call now", {"phone number": 1}),
        ("+1-555-123-4567", "", {"phone number": 1}),
        ("sign with (555) 123-4567 on it", "sign with on it", {"phone number": 1}),
        ("555.123.4567 or 555-123-4567", "or", {"phone number": 2}),
        ("a van, 0170 1234567", "a van,", {"phone number": 1}),
        ("a van, 030/123456 78", "a van,", {"phone number": 1}),
        ("London 020 7946 0958 taxi", "London taxi", {"phone number": 1}),
        ("tel: 12 34 56 78", "", {"phone number": 1}),
        ("number 4155552671.", "number.", {"phone number": 1}),
    ],
)
def test_personal_data_is_taken_out_and_counted(text: str, clean: str, kinds: dict[str, int]) -> None:
    assert filters.scrub(text) == (clean, kinds)


@pytest.mark.parametrize(
    "text",
    [
        "a 1920-1080 poster",
        "no. 5",
        "a phone, 1920 x 1080 wallpaper",
        "iphone wallpaper 1080x1920",
        "on 2024-05-17",
        "on 17.05.2024, 17/05/2024 and 05-17-24",
        "on 01.02.2024 and 01/02/2024 and 01-02-2024",
        "1999-2005, 1990 2000 2010",
        "at 09:30:15",
        "0.123456789 and 3.14159265358979",
        "1 2 3 4 5 6 7 8 9 10",
        "a crowd of 1,000,000,000 people",
        "seed 1234567",
        "Canon 5D, f/2.8, 1/8000 s, ISO 100-6400",
        "@artist at home, node.js on screen",
        "  spaces   stay  ",
        "e.g. a cat, i.e. a pet",
        "3:4 of 12.5 x 30.75",
        "24-70mm, 2-4-6-8",
        "ISBN 978-3-16-148410-0",
    ],
)
def test_dates_sizes_and_numbers_stay(text: str) -> None:
    assert filters.scrub(text) == (text, {})


def test_scrubbing_takes_linear_time() -> None:
    """A pattern that tries all beginnings of a long word would take minutes."""
    for text in ("a" * 50_000, "a." * 25_000, "1 " * 25_000, "[at]" * 10_000, "0123 " * 10_000):
        filters.scrub(text)


def thumbnails(*images: PIL.Image.Image) -> NDArray[np.uint8]:
    return np.stack([pictures.fit(image, (256, 256)).thumbnail_uint8 for image in images])


def landscape(seed: int, size: int = 256) -> PIL.Image.Image:
    """Soft blobs of colour: as a photograph, not flat anywhere."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    return PIL.Image.fromarray(coarse).resize((size, size), PIL.Image.Resampling.BICUBIC)


def again(image: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    written = io.BytesIO()
    image.save(written, "JPEG", quality=quality)
    return PIL.Image.open(written).convert("RGB")


def test_copies_are_found_whatever_their_file_and_size() -> None:
    one, other = landscape(0), landscape(1)
    copies = thumbnails(
        one, other, again(one, 75), landscape(1, 600), again(other, 50).resize((200, 200)), landscape(2)
    )
    assert filters.duplicates(copies, most_bits=3).tolist() == [-1, -1, 0, 1, 1, -1]
    assert filters.duplicates(copies, most_bits=-1).tolist() == [-1] * 6


def test_another_colour_is_another_picture() -> None:
    """Which the difference hash alone does not know."""
    flat = [PIL.Image.new("RGB", (64, 64), colour) for colour in ((200, 0, 0), (0, 0, 200), (200, 0, 0))]
    assert filters.duplicates(thumbnails(*flat), most_bits=0).tolist() == [-1, -1, 0]


def test_blocks_do_not_matter_and_repeats_are_no_measure() -> None:
    rng = np.random.default_rng(3)
    base = rng.integers(40, 200, (30, 8, 9, 3), np.uint8)
    drifting = np.stack([np.clip(base[0].astype(int) + step, 0, 255).astype(np.uint8) for step in (0, 1, 2, 3, 4)])
    many = np.concatenate([base[1:], drifting, base[10:12]])
    whole = filters.duplicates(many, most_bits=4)
    assert whole[29:34].tolist() == [-1, 29, 29, -1, 32], "3 is too far from 0; 1 and 2, which are near, do not count"
    assert whole[34:].tolist() == [9, 10] and (whole[:29] == -1).all()
    for block in (1, 2, 7, 32):
        assert filters.duplicates(many, most_bits=4, block=block).tolist() == whole.tolist()
