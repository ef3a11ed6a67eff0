"""What the device does for a batch of images: read their prompts, take a step, decode. For the device's thread alone.

Each stage's time is shared out among the images of its batch. A batch that does not fit into memory is halved; an image
that fails by itself fails its own request and no other.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_kd import pipeline
from diffusion_kd.types import Conditioning
from eval import sampling
from serve.engine import embeddings, errors
from serve.engine.lanes import Lane, Sample
from serve.engine.models import Model
from serve.engine.observer import Observer

log = logging.getLogger(__name__)

Latents = tuple[Sample, int | None, Tensor]
"""Whose; the number of the preview, or None for the image itself; (1, C, h, w)."""
Pixels = tuple[Sample, int | None, NDArray[np.uint8]]
"""Whose; the number of the preview, or None for the image itself; (H, W, 3)."""
Item = TypeVar("Item")
Made = TypeVar("Made")


class Stages:
    """prompt_cache_bytes: embeddings that are kept. failures: requests that failed since an image went well."""

    def __init__(self, models: Mapping[str, Model], prompt_cache_bytes: int, observer: Observer) -> None:
        self.failures = 0
        self._models, self._observer = models, observer
        self._cache = embeddings.EmbeddingCache(prompt_cache_bytes)
        self._device = next(iter(models.values())).device

    def now_s(self) -> float:
        """The clock, once the device has done what it was told: CUDA works on while Python goes ahead."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def read_prompts(self, lane: Lane, joined: Sequence[Sample]) -> None:
        """Give each image its conditioning, from the cache or else from the text encoders."""
        found: dict[embeddings.Key, Conditioning] = {}
        wanted: dict[embeddings.Key, Sample] = {}
        for sample in joined:
            for key in self._keys(lane, sample):
                known = self._cache.get(key)
                if known is not None:
                    found[key] = known
                elif key not in wanted:
                    wanted[key] = sample
                self._observer.looked_up(hit=known is not None)
        for size in {sample.request.size_px for sample in wanted.values()}:
            found |= self._encode(lane, [one for one in wanted.items() if one[1].request.size_px == size])
        for sample in joined:
            keys = self._keys(lane, sample)
            if all(key in found for key in keys):
                sample.cond = found[keys[0]]
                if sample.request.guided:
                    sample.away = found[keys[1]] if len(keys) > 1 else pipeline.no_prompt(sample.cond)
            else:  # another request asked first
                sample.ticket.fail(errors.Failed("the prompt could not be read"))

    def _keys(self, lane: Lane, sample: Sample) -> list[embeddings.Key]:
        request = sample.request
        encoder, prompts = id(self._models[request.tier].parts.text), [request.prompt]
        if request.guided and request.negative_prompt is not None:
            prompts.append(request.negative_prompt)
        return [(encoder, lane.limits.batch_invariant, prompt, request.size_px) for prompt in prompts]

    def _encode(
        self, lane: Lane, wanted: Sequence[tuple[embeddings.Key, Sample]]
    ) -> dict[embeddings.Key, Conditioning]:
        """Prompts of one size. The time is charged to the image that asked first."""
        text, (width, height) = self._models[lane.tier].parts.text, wanted[0][1].request.size_px
        found: dict[embeddings.Key, Conditioning] = {}
        began_s = self.now_s()
        for some, cond in self._in_parts(
            lane, wanted, lambda some: text.encode([key[2] for key, _ in some], (height, width)), lambda pair: pair[1]
        ):
            for row, (key, _) in enumerate(some):
                # Copies: a slice would keep the whole batch in memory.
                found[key] = cond[torch.tensor([row], device=cond.pooled.device)]
                self._cache.put(key, found[key])
        seconds = self.now_s() - began_s
        self._observer.staged(lane.tier, "text", seconds)
        lane.estimates.text_s.observe(seconds / len(wanted))
        for _, sample in wanted:
            sample.compute.text_s += seconds / len(wanted)
        return found

    def step(self, lane: Lane, chosen: Sequence[Sample]) -> list[Latents]:
        """One step of each image, in one pass of the network. Returns the clean estimates that previews want."""
        previews: list[Latents] = []
        began_s, rows = self.now_s(), sum(sample.request.rows for sample in chosen)
        for some, predictions in self._in_parts(lane, chosen, lambda some: self._predict(lane, some), lambda one: one):
            for sample, prediction in zip(some, predictions, strict=True):
                with self.failing_alone(lane, sample):
                    previews += _advance(sample, prediction)
        seconds = self.now_s() - began_s
        lane.passed()
        lane.estimates.row_s.observe(seconds / rows)
        self._observer.passed(lane.tier, rows, seconds)
        for sample in chosen:
            sample.compute.denoise_s += seconds * sample.request.rows / rows
        return previews

    def _predict(self, lane: Lane, some: Sequence[Sample]) -> list[Tensor]:
        """The network's prediction for each image, guidance in it: (1, C, h, w) float32 each. Changes nothing."""
        inputs, timesteps, conds = [], [], []
        for sample in some:
            assert sample.trajectory is not None and sample.cond is not None, "an image that is ready for a pass"
            for cond in (sample.away, sample.cond):
                if cond is not None:
                    inputs.append(sample.trajectory.network_input())
                    timesteps.append(sample.trajectory.timestep)
                    conds.append(cond)
        model, cond = self._models[lane.tier], Conditioning.concatenate(conds)
        told = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        x_t, at = torch.cat(inputs).to(model.dtype), torch.cat(timesteps)
        predicted = model.parts.unet(x_t, at, cond.prompt_embeds, added_cond_kwargs=told, return_dict=False)[0]
        return list(_guided(predicted.float(), some))

    def decode(self, lane: Lane, latents: Sequence[Latents]) -> list[Pixels]:
        """Pixels of latents; an image that is not finite fails, and is left out."""
        if not latents:
            return []
        model = self._models[lane.tier]

        def work(some: Sequence[Latents]) -> Tensor:
            return model.decode(torch.cat([one for _, _, one in some]))

        began_s = self.now_s()
        pixels: list[Pixels] = []
        for some, images in self._in_parts(lane, latents, work, lambda one: one[0]):
            finite = torch.isfinite(images).flatten(1).all(1).tolist()
            images_uint8 = sampling.to_uint8(images.nan_to_num())
            for (sample, number, _), image_uint8, fine in zip(some, images_uint8, finite, strict=True):
                if fine:
                    pixels.append((sample, number, image_uint8))
                else:
                    self._give_up(sample, errors.NotFinite("the network made NaN or infinite values for this image"))
        seconds = self.now_s() - began_s
        self._observer.staged(lane.tier, "decode", seconds)
        lane.estimates.decode_s.observe(seconds / len(latents))
        for sample, _, _ in latents:
            sample.compute.decode_s += seconds / len(latents)
        return pixels

    def _in_parts(
        self,
        lane: Lane,
        items: Sequence[Item],
        work: Callable[[Sequence[Item]], Made],
        owner: Callable[[Item], Sample],
    ) -> list[tuple[Sequence[Item], Made]]:
        """`work` on all items: as many at once as fit into memory, one by one where something else goes wrong.

        An item that fails by itself fails its request; the others go on. `work` must change nothing.
        """
        made: list[tuple[Sequence[Item], Made]] = []
        left = list(items)
        while left:
            size = 1 if lane.limits.batch_invariant else lane.fits
            some, left = left[:size], left[size:]
            try:
                made.append((some, work(some)))
                continue
            except Exception as error:  # noqa: BLE001 - whatever a network raises must not reach the other requests
                out_of_memory = is_out_of_memory(error)
                if len(some) == 1:
                    self._fail(lane, owner(some[0]), error)
                    continue
            # The error is gone here, and with its traceback the tensors that did not fit.
            if out_of_memory:
                self._take_fewer(lane, len(some))
                left = some + left
            else:
                made += [done for one in some for done in self._in_parts(lane, [one], work, owner)]
        return made

    def _take_fewer(self, lane: Lane, images: int) -> None:
        """That many do not fit into memory together."""
        lane.shrink((images + 1) // 2)
        self._observer.ran_out_of_memory(lane.tier)
        log.warning("%d images do not fit into memory together: %d at a time from now on", images, lane.fits)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def failing_alone(self, lane: Lane, sample: Sample) -> Iterator[None]:
        """What is done here for one image fails its own request and no other."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the other requests go on
            self._fail(lane, sample, error)

    def _fail(self, lane: Lane, sample: Sample, problem: Exception) -> None:
        log.error("an image of the %s tier failed", lane.tier, exc_info=problem)
        if is_out_of_memory(problem):
            sample.ticket.fail(errors.OutOfMemory("not even one image of this size fits into memory"))
        else:
            self._give_up(sample, errors.Failed("the image could not be made"))

    def _give_up(self, sample: Sample, error: errors.Failed) -> None:
        """A request counts once, however many images it has: one alone must not make the engine look sick."""
        self.failures += not sample.ticket.over
        sample.ticket.fail(error)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(said in str(error) for said in ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED"))


def _advance(sample: Sample, prediction: Tensor) -> list[Latents]:
    """Take a step. Returns the clean estimate, if a preview wants it."""
    assert sample.trajectory is not None, "an image has a trajectory before its first step"
    number = sample.previews.pop(sample.remaining - 1, None)
    previews: list[Latents] = [] if number is None else [(sample, number, sample.trajectory.x0_hat(prediction))]
    sample.trajectory.advance(prediction)
    return previews


def _guided(predicted: Tensor, some: Sequence[Sample]) -> Iterator[Tensor]:
    """uncond + w * (cond - uncond) of those that are guided (Ho & Salimans 2022, in Imagen's form)."""
    row = 0
    for sample in some:
        one = predicted[row : row + sample.request.rows]
        row += sample.request.rows
        yield one[:1] + sample.request.guidance_scale * (one[1:] - one[:1]) if sample.request.guided else one
