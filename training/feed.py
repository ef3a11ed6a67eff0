"""Batches for an objective: out of captioned images, encoded as they are wanted, or out of a prepared cache."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

import accelerate
import numpy as np
import torch
from torch import Tensor

from diffusion_kd import artifact, pipeline
from diffusion_kd.objectives.base import Batch
from diffusion_kd.types import Conditioning
from training import cache, data, loop


class Feed(Protocol):
    """Batches by their place in a run: the same place, the same batch, in every process.

    source: what the data are and how many, and what tells them from others. licences: of the items, name -> how many.
    """

    source: str
    licences: dict[str, int]

    def batch(self, place: loop.Place) -> Batch: ...

    def prompts(self, count: int) -> list[str]:
        """Captions to sample, always the same; fewer if there are fewer."""


class Encoder:
    """A teacher's text encoders and autoencoder, under autocast. negative_prompt: "" for none."""

    def __init__(self, parts: artifact.Parts, accelerator: accelerate.Accelerator, negative_prompt: str = "") -> None:
        self._parts, self._accelerator, self._negative = parts, accelerator, negative_prompt
        self.device: torch.device = accelerator.device

    def text(self, prompts: Sequence[str], size_px: tuple[int, int]) -> Conditioning:
        with self._accelerator.autocast():
            return self._parts.text.encode(prompts, size_px)

    def negative(self, cond: Conditioning) -> Conditioning | None:
        """The negative prompt beside each caption, of the same sizes."""
        if not self._negative:
            return None
        encoded = self.text([self._negative] * len(cond), (0, 0))
        return Conditioning(encoded.prompt_embeds, encoded.pooled, cond.time_ids)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) float32 of images (B, 3, H, W) in [-1, 1]."""
        with self._accelerator.autocast():
            return self._parts.encode_images(images)

    def decoded(self, latents: Tensor, decode: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Images (B, 3, H, W) by `decode`; blank ones, which take no memory, without it."""
        if decode is None:
            height, width = (side * self._parts.downscale for side in latents.shape[-2:])
            return latents.new_zeros(()).expand(len(latents), 3, height, width)
        with torch.no_grad(), self._accelerator.autocast():
            return decode(latents)


def open_folder(
    folder: pathlib.Path, teacher: artifact.Parts, size_px: int
) -> data.CaptionedImages | cache.CachedImages:
    """A prepared cache of this teacher's, or a folder of captioned images. Raises DataError, ConfigError."""
    if cache.is_cache(folder):
        return cache.open_for(folder, teacher, size_px)
    return data.FolderImages(folder, size_px)


class ImageFeed:
    """Captioned images, drawn anew at every step and encoded as they come."""

    def __init__(self, images: data.CaptionedImages, encoder: Encoder, seed: int) -> None:
        self._images, self._encoder, self._seed = images, encoder, seed
        self.source, self.licences = images.source, dict[str, int]()

    def batch(self, place: loop.Place) -> Batch:
        rng = np.random.default_rng((self._seed, *place.seed, place.step))
        drawn = rng.integers(len(self._images), size=place.batch_size)
        indices = [int(drawn[row]) for row in place.rows]
        images = data.to_tensor(self._images.images_uint8(indices)).to(self._encoder.device)
        size = (images.shape[-2], images.shape[-1])
        cond = self._encoder.text(self._images.captions(indices, place.step), size)
        return _batch(place, self._seed, images, self._encoder.latents(images), cond, self._encoder.negative(cond))

    def prompts(self, count: int) -> list[str]:
        return self._images.captions(_spread(count, len(self._images)), 0)


class CacheFeed:
    """A prepared cache: latents and text come encoded.

    decode: what makes the real images that a discriminator looks at; None where nothing looks. They have been through
        the decoder that the student's pictures go through, so it leaves no trace to tell them apart by.
    """

    def __init__(
        self,
        images: cache.CachedImages,
        encoder: Encoder,
        seed: int,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._images, self._encoder, self._seed, self._decode = images, encoder, seed, decode
        self.source = images.source
        self.licences: dict[str, int] = images.manifest["licences"]

    def batch(self, place: loop.Place) -> Batch:
        drawn = self._images.draw((self._seed, *place.seed), place.step, place.batch_size)
        found = self._images.batch([drawn[row] for row in place.rows])
        latents, cond = found.latents.to(self._encoder.device), found.cond.to(self._encoder.device)
        images = self._encoder.decoded(latents, self._decode)
        return _batch(place, self._seed, images, latents, cond, self._encoder.negative(cond))

    def prompts(self, count: int) -> list[str]:
        chosen = _spread(count, len(self._images))
        return [caption for index in chosen for caption in self._images.batch([index]).captions]


def _batch(
    place: loop.Place, seed: int, images: Tensor, latents: Tensor, cond: Conditioning, negative: Conditioning | None
) -> Batch:
    return Batch(
        images=images,
        latents=latents,
        cond=cond,
        uncond=pipeline.no_prompt(cond),
        negative=negative,
        step=place.step,
        rows=place.rows,
        seed=(seed, *place.seed),
    )


def _spread(count: int, length: int) -> list[int]:
    """At most `count` indices, evenly over `length`."""
    count = min(count, length)
    return [index * length // count for index in range(count)]
