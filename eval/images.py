"""Generated pictures, kept on disk: a killed run goes on where it was, a second student reuses the teacher's pictures.

A picture is kept under what it depends on: the model's files, the settings of the sampler, the batch size, the device,
the code and the libraries that ran it, and its own prompt and seed.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
import tqdm
from numpy.typing import NDArray
from torch import Tensor

import diffusion_kd
from diffusion_kd import artifact, card, errors, files
from eval import fingerprint, processes, sampling, suites

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One picture to make: a prompt and the seed of its noise."""

    prompt: suites.Prompt
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        content = json.dumps([self.prompt.id, self.prompt.text, self.seed])
        return hashlib.sha256(content.encode()).hexdigest()[:24]


def items(suite: suites.Suite, images_per_prompt: int, seed: int) -> list[Item]:
    """All pictures of a suite, those of one prompt beside one another. A seed follows from the prompt's id alone."""
    return [
        Item(prompt, item_seed(prompt.id, number, seed))
        for prompt in suite.prompts
        for number in range(images_per_prompt)
    ]


def item_seed(prompt_id: str, number: int, seed: int) -> int:
    """In [0, 2**32)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}/{number}".encode()).digest()[:4], "big")


@dataclasses.dataclass(frozen=True, slots=True)
class Entrant:
    """A sampler under settings.

    model: its name in the report. source: where it came from. artifact_sha256: of its files.
    guidance_scale: 1 turns a teacher's guidance off; a student takes 0. settings: what else moves its pictures.
    device: the kind on which it computes.
    """

    model: str
    source: str
    sampler: sampling.Sampler
    artifact_sha256: str
    steps: int
    guidance_scale: float
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    device: str = "cpu"

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1]. Raises ModelError for anything else."""
        images = self.sampler(prompts, seeds, steps=self.steps, guidance_scale=self.guidance_scale)
        if images.ndim != 4 or images.shape[:2] != (len(prompts), 3):
            wanted, given = f"({len(prompts)}, 3, H, W)", tuple(images.shape)
            raise errors.ModelError(f"a sampler must return {wanted} images; {self.source} returned {given}")
        return images

    @property
    def label(self) -> str:
        return f"{self.model}, {self.steps} step{'s' if self.steps > 1 else ''}"


class Gallery:
    """The pictures of one entrant, in blocks that are always made together.

    A block is made whole or not at all, so that the work of a killed run is, bit for bit, that of an unbroken one: in
    half precision a picture can differ by a level with what shares its batch.
    """

    def __init__(self, cache: pathlib.Path, entrant: Entrant, everything: Sequence[Item], batch_size: int) -> None:
        self.entrant, self.items, self.batch_size = entrant, list(everything), batch_size
        key = {
            "artifact": entrant.artifact_sha256,
            "steps": entrant.steps,
            "guidance_scale": entrant.guidance_scale,
            "settings": entrant.settings,
            "batch_size": batch_size,
            "device": entrant.device,
            "code": code_sha256(),
            "versions": fingerprint.versions(),
        }
        text = json.dumps(key, indent=1, sort_keys=True)
        self.folder = cache / hashlib.sha256(text.encode()).hexdigest()[:20]
        self._about = text

    def blocks(self) -> Iterator[list[Item]]:
        for start in range(0, len(self.items), self.batch_size):
            yield self.items[start : start + self.batch_size]

    def fill(self, workers: processes.Processes) -> None:
        """Make what is not there yet; each process every `count`-th block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write(self.folder / "about.json", (self._about + "\n").encode())
        mine = [block for number, block in enumerate(self.blocks()) if number % workers.count == workers.rank]
        bar = tqdm.tqdm(total=sum(map(len, mine)), desc=self.entrant.label, unit="img", disable=not workers.first)
        with bar:
            for block in mine:
                if not all(self._path(item).exists() or self._mark(item).exists() for item in block):
                    self._make(block)
                bar.update(len(block))

    def lost(self) -> dict[str, str]:
        """Ids of prompts of which a picture could not be made -> why."""
        return {item.prompt.id: self._mark(item).read_text() for item in self.items if self._mark(item).exists()}

    def read(self, some: Sequence[Item]) -> NDArray[np.uint8]:
        """(B, H, W, 3). A file that is damaged is made again, with its whole block."""
        return np.stack([self._read(item) for item in some])

    def _read(self, item: Item) -> NDArray[np.uint8]:
        try:
            return load_image(self._path(item))
        except errors.DataError as error:
            _log.warning("%s; it is made again", error)
            at = self.items.index(item) // self.batch_size * self.batch_size
            self._make(self.items[at : at + self.batch_size])
            return load_image(self._path(item))

    def _make(self, block: Sequence[Item]) -> None:
        images = self.entrant.draw([item.prompt.text for item in block], [item.seed for item in block])
        finite = images.isfinite().flatten(1).all(1)
        for item, image, usable in zip(block, sampling.to_uint8(torch.nan_to_num(images)), finite, strict=True):
            if usable:
                _save(self._path(item), image)
                self._mark(item).unlink(missing_ok=True)
            else:
                files.write(self._mark(item), b"the model made NaN or infinite values")

    def _path(self, item: Item) -> pathlib.Path:
        return self.folder / f"{item.name}.png"

    def _mark(self, item: Item) -> pathlib.Path:
        return self.folder / f"{item.name}.lost"


def load_image(path: pathlib.Path) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of any picture file. Raises DataError if it cannot be read."""
    try:
        with PIL.Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow calls a broken PNG a SyntaxError
        raise errors.DataError(f"{path} is not a readable picture: {errors.first_line(error)}") from None


def fit(images_uint8: Sequence[NDArray[np.uint8]], size_px: int) -> NDArray[np.uint8]:
    """Centre squares, brought to (B, size_px, size_px, 3) by Lanczos; unchanged where that is their size."""
    return np.stack([_fit_one(image, size_px) for image in images_uint8])


def _fit_one(image_uint8: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    height, width = image_uint8.shape[:2]
    if (height, width) == (size_px, size_px):
        return image_uint8
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = PIL.Image.fromarray(image_uint8).crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size_px, size_px), PIL.Image.Resampling.LANCZOS))


def _save(path: pathlib.Path, image_uint8: NDArray[np.uint8]) -> None:
    with files.replacing(path) as unfinished:
        PIL.Image.fromarray(image_uint8).save(unfinished, format="PNG", compress_level=1)


@functools.cache
def artifact_sha256(name_or_path: str) -> str:
    """Of a model folder: names and contents of all its files but its card, which an evaluation is written into.

    Raises ModelError if there is no such model.
    """
    folder = artifact.resolve(name_or_path)
    digest = hashlib.sha256()
    found = [pathlib.Path(where) / name for where, _, names in os.walk(folder, followlinks=True) for name in names]
    for path in sorted(found):
        if path.relative_to(folder).parts[0].startswith(".") or path == folder / card.NAME:
            continue
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


_SAMPLING_CODE = ("artifact", "conditioning", "denoiser", "pipeline", "schedule", "types")


@functools.cache
def code_sha256() -> str:
    """Of the modules that make a picture: pictures of other code are other pictures."""
    folder = pathlib.Path(diffusion_kd.__file__).parent
    return hashlib.sha256(b"\0".join((folder / f"{name}.py").read_bytes() for name in _SAMPLING_CODE)).hexdigest()
