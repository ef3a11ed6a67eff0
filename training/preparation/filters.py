"""What prepared data must pass: why items are left out, captions without personal data, no picture twice."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MISSING = "file missing"
OUTSIDE = "path outside of the folder"
TWICE = "named twice"
NO_CAPTION = "no caption"
UNREADABLE = "cannot be read"
TOO_DEEP = "more than 8 bits"
TOO_SMALL = "too small"
EXTREME = "extreme aspect ratio"
FLAT = "flat"
LOW_SCORE = "CLIP score"
NOT_FINITE = "not finite"
DUPLICATE = "duplicate"
CUT_SHORT = "shard cut short"
REFUSED = "refused by the teacher"


@dataclasses.dataclass(frozen=True, slots=True)
class Rejection:
    """Why an item is left out. reason: one of the constants above; detail: the same in full, with numbers."""

    reason: str
    detail: str


_URL = re.compile(
    r"(?:\bhttps?://|\bftp://|\bwww\.)[^\s<>\"']*[^\s<>\"'.,;:!?)\]}]"
    r"|(?<![\w@.-])(?:[a-z0-9-]{1,63}\.){1,4}(?:com|org|net|io|info|biz|gov|edu|app|dev)\b(?:/[^\s<>\"')\]]*[\w/])?",
    re.IGNORECASE,
)
_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,5}[^\W\d_]{2,24}\b"
    r"|\b[\w.+-]{1,64} ?[\[(] ?at ?[\])] ?[\w-]{1,63} ?(?:\.|[\[(] ?dot ?[\])]) ?[^\W\d_]{2,24}\b",
    re.IGNORECASE,
)
_GAP = r"[ .\-/]?"
_PHONE = re.compile(
    # international: +49 (0)170 1234567
    rf"(?<![\w+])\+\d{{1,3}}{_GAP}(?:\(\d{{1,4}}\){_GAP})?\d(?:{_GAP}\d){{5,12}}(?![\w])"
    # North American: (555) 123-4567, 555-123-4567, 555.123.4567, 5551234567
    r"|(?<![\w.(-])\([2-9]\d{2}\) ?\d{3}[ .-]?\d{4}(?![\w-])"
    r"|(?<![\w.-])(?:1[ .-])?[2-9]\d{2}([ .-])\d{3}\1\d{4}(?![\w-])"
    r"|(?<![\w.,-])[2-9]\d{2}[2-9]\d{6}(?![\w,-]|\.\d)"
    # with a trunk zero: 0170 1234567, 030/123 456 78, (030) 1234567
    r"|(?<![\w.,:-])(?:0[1-9]\d{1,4}[ /-]|\(0[1-9]\d{1,4}\) ?)\d{3,8}(?:[ -]\d{2,4}){0,3}(?![\w:]|-\d)"
    r"|(?<![\w.,:-])0[1-9]\d{8,10}(?![\w:]|[.,]\d)"
    # whatever is called one
    r"|\b(?:tel|telephone|phone|mobile|fax|whatsapp)(?:\.:?|:)\s{0,3}[+(]?\d(?:[ ()./-]{0,2}\d){5,14}(?!\w)",
    re.IGNORECASE,
)
_KINDS = (("e-mail address", _EMAIL), ("URL", _URL), ("phone number", _PHONE))


def scrub(text: str) -> tuple[str, dict[str, int]]:
    """A text without e-mail addresses, URLs and phone numbers, and how many of each were taken out.

    Dates, years, sizes ("1920-1080") and numbers stay. What it finds is a matter of patterns: names and postal
    addresses it does not know.
    """
    counts: dict[str, int] = {}
    for kind, pattern in _KINDS:
        text, removed = pattern.subn(_unless_date if kind == "phone number" else "", text)
        removed -= text.count(_KEPT)
        if removed:
            counts[kind] = removed
        text = text.replace(_KEPT, "")
    if counts:
        text = re.sub(r"\s*[(\[<]\s*[)\]>]", "", text)
        text = re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"[ \t]{2,}", " ", text)).strip()
    return text, counts


_KEPT = "\x00"
_DATE = re.compile(r"\d{1,2}([./ -])\d{1,2}\1\d{2,4}|\d{4}([./ -])\d{1,2}\2\d{1,2}")


def _unless_date(match: re.Match[str]) -> str:
    return _KEPT + match[0] if _DATE.fullmatch(match[0]) else ""


def duplicates(
    thumbnails_uint8: NDArray[np.uint8],
    *,
    most_bits: int,
    most_levels: float = 2.0,
    device: torch.device | str = "cpu",
    block: int = 1024,
    seen: Callable[[int], object] | None = None,
) -> NDArray[np.int64]:
    """For each picture the first earlier one that it repeats, or -1.

    thumbnails_uint8: (N, 8, 9, 3). Two are the same if their difference hashes are at most `most_bits` of 64 apart and
    their thumbnails at most `most_levels` of 255 (root mean square): the hash knows no colour, and of flat pictures
    nothing at all. A picture that is a repeat itself is no measure for others. most_bits < 0: nothing is a repeat.
    seen: told how many pictures are done. All pairs are compared, as matrix products: 64 products a pair, of 20,000
    pictures under a second. Source of the hash: dHash (Krawetz 2013).
    """
    count = len(thumbnails_uint8)
    first = np.full(count, -1, np.int64)
    if most_bits < 0:
        return first
    signs, colours, squares = _fingerprints(torch.from_numpy(thumbnails_uint8), torch.device(device))
    kept = torch.ones(count, dtype=torch.bool, device=device)
    for start in range(0, count, block):
        stop = min(start + block, count)
        for before in range(0, stop, block):
            rows, columns = slice(start, stop), slice(before, min(before + block, stop))
            alike = signs[rows] @ signs[columns].T >= 64 - 2 * most_bits - 1
            suspects = torch.nonzero(alike.any(1)).flatten()
            mine, squared = colours[rows][suspects], squares[rows][suspects, None] + squares[None, columns]
            alike[suspects] &= squared - 2 * mine @ colours[columns].T <= most_levels**2 * colours.shape[1] + 0.5
            _note(alike & kept[None, columns], start, before, first, kept)
        if seen is not None:
            seen(stop)
    return first


def _fingerprints(thumbnails: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Signs of the 64 differences of luminance, as +1 and -1; the thumbnails as vectors, and their squared lengths."""
    pixels = thumbnails.to(device, torch.float32)
    luminance = pixels @ pixels.new_tensor([0.299, 0.587, 0.114])
    signs = torch.where(luminance[:, :, 1:] > luminance[:, :, :-1], 1.0, -1.0).flatten(1)
    colours = pixels.flatten(1) - 128
    return signs, colours, colours.square().sum(1)


def _note(alike: Tensor, start: int, before: int, first: NDArray[np.int64], kept: Tensor) -> None:
    """Write a block's repeats into `first` and take them out of `kept`; where rows meet themselves, in their order.

    alike: (rows, columns) of which rows begin at `start` and columns at `before`.
    """
    if start != before:
        for row in torch.nonzero(alike.any(1)).flatten().tolist():
            if first[start + row] < 0:
                first[start + row] = before + int(alike[row].to(torch.uint8).argmax())
                kept[start + row] = False
        return
    within = alike.tril(-1)
    for row in torch.nonzero(within.any(1)).flatten().tolist():
        earlier = within[row] & kept[before : before + alike.shape[1]]
        if first[start + row] < 0 and bool(earlier.any()):
            first[start + row] = before + int(earlier.to(torch.uint8).argmax())
            kept[start + row] = False
