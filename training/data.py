"""Captioned images to train on: the endless shapes, or a folder of the user's own."""

import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_kd import errors, pipeline
from diffusion_kd.shapes import scenes

_log = logging.getLogger(__name__)

_TEACHER_BATCH = 16


class CaptionedImages(Protocol):
    """Images by index, each with a caption that may be phrased differently at each asking."""

    group_size: int
    """Runs of this many neighbours differ by one fact: hard negatives for contrastive training. 1: none."""

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

    Images are scaled until they cover size_px x size_px and cut at the centre. All files are opened once at the
    start, so a bad one is named before any training. Raises DataError.
    """

    group_size = 1

    def __init__(self, folder: pathlib.Path, size_px: int) -> None:
        self._size_px = size_px
        self._items = _read_metadata(folder)
        for path, _ in self._items:
            _open(path)

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
    items = []
    for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise errors.DataError(
                f'{metadata}, line {number}: not of the form {{"file_name": …, "text": …}}: {line[:80]}'
            ) from None
        if not isinstance(text, str) or not text.strip():
            raise errors.DataError(f"{metadata}, line {number}: the caption of {name} is empty")
        if not (folder / name).is_file():
            raise errors.DataError(f"{metadata}, line {number}: there is no file {folder / name}")
        items.append((folder / name, text.strip()))
    if not items:
        raise errors.DataError(f"{metadata} names no images")
    return items


def _open(path: pathlib.Path) -> PIL.Image.Image:
    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, PIL.Image.DecompressionBombError) as error:
        raise errors.DataError(f"{path} cannot be read as an image: {error}") from None


def _cover(image: PIL.Image.Image, size_px: int) -> NDArray[np.uint8]:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size_px, size_px), PIL.Image.Resampling.LANCZOS, box=box))


def teacher_images(
    teacher: str, prompts: pathlib.Path, folder: pathlib.Path, *, guidance_scale: float, seed: int
) -> FolderImages:
    """Let a teacher draw a text file's prompts, one a line, into `folder`; pictures that are there already stay.

    Raises DataError for a file that is missing or holds no prompt, ModelError for the teacher.
    """
    if not prompts.is_file():
        raise errors.DataError(f"no file {prompts}; give a text file with a prompt a line")
    texts = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise errors.DataError(f"{prompts} holds no prompts; write one a line")
    sampler = pipeline.load_teacher(teacher)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(texts), _TEACHER_BATCH):
        wanted = [
            index
            for index in range(start, min(start + _TEACHER_BATCH, len(texts)))
            if not (folder / f"{index}.png").exists()
        ]
        if wanted:
            chosen = [texts[index] for index in wanted]
            images = sampler(chosen, [seed + index for index in wanted], guidance_scale=guidance_scale)
            for index, image in zip(wanted, images, strict=True):
                pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
                PIL.Image.fromarray(pixels).save(folder / f"{index}.png")
            _log.info("the teacher has drawn %d of %d prompts", wanted[-1] + 1, len(texts))
    lines = [json.dumps({"file_name": f"{index}.png", "text": text}) for index, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return FolderImages(folder, sampler.size_px)


def to_tensor(images_uint8: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images_uint8).permute(0, 3, 1, 2).float() / 127.5 - 1
