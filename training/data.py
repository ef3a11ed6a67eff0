"""Captioned images to train on: the endless shapes, or a folder of the user's own."""

import collections
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

import accelerate
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_kd import artifact, errors, pipeline
from diffusion_kd.shapes import scenes

_log = logging.getLogger(__name__)

_TEACHER_BATCH = 16


class CaptionedImages(Protocol):
    """Images by index, each with a caption that may be phrased differently at each asking."""

    group_size: int
    """Runs of this many neighbours differ by one fact: hard negatives for contrastive training. 1: none."""

    source: str
    """Shapes or which folder, how many, and what tells them from others."""

    def __len__(self) -> int: ...

    def images_uint8(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """(B, H, W, 3) RGB."""

    def captions(self, indices: Sequence[int], seed: int) -> list[str]:
        """One caption each; the same for the same seed. Neighbours in a group mention the same facts."""

    def cell_labels(self, indices: Sequence[int], cells: int) -> NDArray[np.int64] | None:
        """(B, 3, cells, cells) of what lies where, or None where nobody knows."""


class ShapesImages:
    """The first `count` training scenes of a seed, drawn when asked for."""

    group_size = 4

    def __init__(self, count: int, seed: int) -> None:
        self._scenes = list(scenes.training_scenes(count, seed, self.group_size))
        self.source = f"shapes, {len(self._scenes)} scenes"

    def __len__(self) -> int:
        return len(self._scenes)

    def images_uint8(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        return np.stack([scenes.render(self._scenes[index]) for index in indices])

    def captions(self, indices: Sequence[int], seed: int) -> list[str]:
        texts = []
        for index in indices:
            mentions = scenes.Mentions.draw(np.random.default_rng((seed, index // self.group_size)))
            rng = np.random.default_rng((seed, index, 1))
            texts.append(scenes.describe(self._scenes[index], rng, mentions).text)
        return texts

    def cell_labels(self, indices: Sequence[int], cells: int) -> NDArray[np.int64] | None:
        return np.stack([scenes.cell_labels(self._scenes[index], cells) for index in indices])


class FolderImages:
    """A folder with `metadata.jsonl`: a line `{"file_name": ..., "text": ...}` for each image.

    Images are turned as their EXIF says, scaled until they cover size_px x size_px and cut at the centre. All files
    are opened once at the start, so a bad one is named before any training. Raises DataError.
    """

    group_size = 1

    def __init__(self, folder: pathlib.Path, size_px: int) -> None:
        self._size_px = size_px
        self._items = _read_metadata(folder)
        for path, _ in self._items:
            _open(path)
        listed = "\n".join(f"{os.path.relpath(path, folder)}\t{text}" for path, text in self._items)
        digest = hashlib.sha256(listed.encode()).hexdigest()[:8]
        self.source = f"folder {folder.resolve().name}, {len(self._items)} images, captions {digest}"

    def __len__(self) -> int:
        return len(self._items)

    def images_uint8(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        return np.stack([_cover(_open(self._items[index][0]), self._size_px) for index in indices])

    def captions(self, indices: Sequence[int], seed: int) -> list[str]:
        return [self._items[index][1] for index in indices]

    def cell_labels(self, indices: Sequence[int], cells: int) -> NDArray[np.int64] | None:
        return None


def _read_metadata(folder: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    if not folder.is_dir():
        raise errors.DataError(f"no folder {folder}; give one with images and a metadata.jsonl")
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise errors.DataError(
            f'{folder} has no metadata.jsonl; write a line {{"file_name": …, "text": …}} for each image'
        )
    items = [
        _read_line(folder, line, f"{metadata}, line {number}")
        for number, line in enumerate(_lines(metadata), 1)
        if line.strip()
    ]
    if not items:
        raise errors.DataError(f"{metadata} names no images")
    return items


def _read_line(folder: pathlib.Path, line: str, where: str) -> tuple[pathlib.Path, str]:
    try:
        entry = json.loads(line)
        name, text = entry["file_name"], entry["text"]
        if not isinstance(name, str):
            raise TypeError
    except (json.JSONDecodeError, KeyError, TypeError):
        raise errors.DataError(f'{where}: not of the form {{"file_name": …, "text": …}}: {line[:80]}') from None
    if not isinstance(text, str) or not text.strip():
        raise errors.DataError(f"{where}: the caption of {name} is empty")
    try:
        there = (folder / name).is_file()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        raise errors.DataError(f"{where}: there is no file {str(folder / name)[:200]}")
    return folder / name, text.strip()


def _lines(path: pathlib.Path) -> list[str]:
    """Of a UTF-8 file, with or without a byte order mark; only a newline ends a line."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise errors.DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _open(path: pathlib.Path) -> PIL.Image.Image:
    try:
        with PIL.Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would cut off all above 255
                raise errors.DataError(f"{path} has more than 8 bits a channel ({image.mode}); save it with 8")
            return PIL.ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise errors.DataError(f"{path} cannot be read as an image: {error}") from None


def _cover(image: PIL.Image.Image, size_px: int) -> NDArray[np.uint8]:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size_px, size_px), PIL.Image.Resampling.LANCZOS, box=box))


def teacher_images(
    teacher: str,
    prompts: pathlib.Path,
    folder: pathlib.Path,
    *,
    parts: artifact.Parts,
    accelerator: accelerate.Accelerator,
    guidance_scale: float,
    seed: int,
) -> FolderImages:
    """Let a teacher draw a text file's prompts, one a line, into `folder`; pictures that are there already stay.

    teacher: its name; parts: its networks, which move to the accelerator's device. The main process draws, the others
    wait. A picture is named after all that decides it, so it never meets another prompt, teacher or guidance.
    Raises DataError for a file that is missing, not UTF-8, or holds no prompt.
    """
    if not prompts.is_file():
        raise errors.DataError(f"no file {prompts}; give a text file with a prompt a line")
    texts = [line.strip() for line in _lines(prompts) if line.strip()]
    if not texts:
        raise errors.DataError(f"{prompts} holds no prompts; write one a line")
    if accelerator.is_main_process:
        drawn: collections.Counter[str] = collections.Counter()
        wanted: list[tuple[str, str]] = []
        for text in texts:
            key = f"{teacher}\n{text}\n{drawn[text]}\n{seed}\n{guidance_scale}"
            wanted.append((hashlib.sha256(key.encode()).hexdigest()[:16], text))
            drawn[text] += 1
        folder.mkdir(parents=True, exist_ok=True)
        sampler = pipeline.TeacherPipeline(parts)
        sampler.to(accelerator.device)
        _draw(sampler, [pair for pair in wanted if not (folder / f"{pair[0]}.png").exists()], folder, guidance_scale)
        lines = [json.dumps({"file_name": f"{name}.png", "text": text}) + "\n" for name, text in wanted]
        unfinished = folder / "metadata.jsonl.unfinished"
        unfinished.write_text("".join(lines), encoding="utf-8")
        unfinished.replace(folder / "metadata.jsonl")
    accelerator.wait_for_everyone()
    return FolderImages(folder, parts.size_px)


def _draw(
    sampler: pipeline.TeacherPipeline, wanted: list[tuple[str, str]], folder: pathlib.Path, guidance_scale: float
) -> None:
    """wanted: (name, prompt) of each picture; the name, 16 hex digits, is its seed too."""
    for start in range(0, len(wanted), _TEACHER_BATCH):
        chosen = wanted[start : start + _TEACHER_BATCH]
        images = sampler(
            [text for _, text in chosen], [int(name, 16) for name, _ in chosen], guidance_scale=guidance_scale
        )
        for (name, _), image in zip(chosen, images, strict=True):
            pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            unfinished = folder / f"{name}.png.unfinished"
            PIL.Image.fromarray(pixels).save(unfinished, "PNG")
            unfinished.replace(folder / f"{name}.png")
        _log.info("the teacher has drawn %d of %d missing pictures", start + len(chosen), len(wanted))


def to_tensor(images_uint8: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images_uint8).permute(0, 3, 1, 2).float() / 127.5 - 1
