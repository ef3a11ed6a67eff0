"""Captioned images to train on: the endless shapes, or a folder of the user's own."""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

import accelerate
import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_kd import artifact, errors, files, pipeline
from diffusion_kd.shapes import scenes
from training.preparation import drawing, filters, pictures, sources


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
    """A folder with `metadata.jsonl`: a line `{"file_name": ..., "text": ...}` for each image (or .csv, .parquet).

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
        return np.stack([self._pixels(index) for index in indices])

    def _pixels(self, index: int) -> NDArray[np.uint8]:
        return pictures.cover(_open(self._items[index][0]), (self._size_px, self._size_px))[0]

    def captions(self, indices: Sequence[int], seed: int) -> list[str]:
        return [self._items[index][1] for index in indices]

    def cell_labels(self, indices: Sequence[int], cells: int) -> NDArray[np.int64] | None:
        return None


def _read_metadata(folder: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    return [_checked(folder, row) for row in sources.read_metadata(folder)]


def _checked(folder: pathlib.Path, row: sources.Row) -> tuple[pathlib.Path, str]:
    name = str(row.file_name or "")
    if not isinstance(row.text, str) or not row.text.strip():
        raise errors.DataError(f"{row.where}: the caption of {name[:200]} is empty")
    try:
        there = (folder / name).is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise errors.DataError(f"{row.where}: there is no file {str(folder / name)[:200]}")
    return folder / name, row.text.strip()


def _open(path: pathlib.Path) -> PIL.Image.Image:
    return pictures.open_rgb(pictures.FileRange(path), path)


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
    texts = [text for prompt in drawing.read_prompts(prompts) if (text := filters.scrub(prompt)[0].strip())]
    if not texts:
        raise errors.DataError(f"{prompts} holds nothing but addresses and numbers of people; write prompts")
    if accelerator.is_main_process:
        chosen = drawing.wanted(texts, f"{teacher}\n{seed}\n{guidance_scale}\n{parts.size_px}")
        folder.mkdir(parents=True, exist_ok=True)
        files.sweep(folder)
        sampler = pipeline.TeacherPipeline(parts)
        sampler.to(accelerator.device)
        drawing.draw(sampler, {one: one.prompt for one in chosen}, folder, guidance_scale=guidance_scale)
        lines = [json.dumps({"file_name": f"{one.name}.png", "text": one.prompt}) + "\n" for one in chosen]
        files.write(folder / "metadata.jsonl", "".join(lines))
    accelerator.wait_for_everyone()
    return FolderImages(folder, parts.size_px)


def to_tensor(images_uint8: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images_uint8).permute(0, 3, 1, 2).float() / 127.5 - 1
