"""The work of preparation, chunk by chunk: open, judge, encode, write.

The pictures of a chunk are opened and cut by a pool of threads while the networks are busy with the chunk before.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import logging
import math
import pathlib
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import tqdm
from numpy.typing import NDArray

from diffusion_kd import errors
from training import cache, compute
from training.preparation import buckets, encoding, filters, pictures, sources

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides what is in a cache, besides teacher and source.

    size_px: side of the square whose area all buckets have. buckets: square or aspect.
    min_size_px: the shorter side that a picture must have. most_aspect: of the longer side to the shorter.
    least_contrast: standard deviation of the liveliest channel, in levels of 255; 0 takes flat pictures.
    clip, clip_floor: a CLIP model and the cosine that picture and caption must reach; "" and None: not asked.
    scrub: take e-mail addresses, URLs and phone numbers out of captions.
    licence: of items that do not say. chunk_items: how many are written, or lost, at once. batch_size: of the networks.
    precision: fp32, bf16, fp16.
    """

    size_px: int
    buckets: str = "square"
    min_size_px: int = 0
    most_aspect: float = 4.0
    least_contrast: float = 2.0
    clip: str = ""
    clip_floor: float | None = None
    scrub: bool = True
    licence: str = ""
    chunk_items: int = 256
    batch_size: int = 16
    precision: str = "fp32"

    def __post_init__(self) -> None:
        floor = self.clip_floor
        for name, fits, wanted in (
            ("min_size_px", self.min_size_px >= 0, "0 or more"),
            ("most_aspect", 1 <= self.most_aspect < math.inf, "1 or more"),
            ("least_contrast", 0 <= self.least_contrast < 128, "from 0 to 128"),
            ("clip_floor", floor is None or -1 <= floor <= 1, "from -1 to 1"),
            ("clip_floor", (floor is None) == (not self.clip), "given with --clip, and --clip with it"),
            ("chunk_items", self.chunk_items > 0, "above 0"),
            ("batch_size", self.batch_size > 0, "above 0"),
            ("precision", self.precision in compute.DTYPES, "fp32, bf16 or fp16"),
        ):
            errors.require(fits, name, getattr(self, name), wanted)


@dataclasses.dataclass(frozen=True, slots=True)
class _Looked:
    """An item after the threads: cut to its bucket, or rejected."""

    item: sources.Item
    caption: str
    scrubbed: dict[str, int]
    size: cache.Size = (0, 0)
    fitted: pictures.Fitted | None = None
    rejection: filters.Rejection | None = None


def clean_caption(text: str | None, *, scrub: bool) -> tuple[str, dict[str, int]]:
    """A caption as it is encoded and stored, and what was taken out of it."""
    plain = (text or "").replace("\0", "").encode("utf-8", "replace").decode().strip()
    return filters.scrub(plain) if scrub else (plain, {})


def look(item: sources.Item, settings: Settings, table: buckets.Buckets) -> _Looked:
    """Open, judge and cut one picture. Never raises for what the item holds."""
    caption, scrubbed = clean_caption(item.caption, scrub=settings.scrub)

    def reject(reason: str, detail: str) -> _Looked:
        return _Looked(item, caption, scrubbed, rejection=filters.Rejection(reason, f"{item.id}: {detail}"))

    if item.problem is not None:
        return _Looked(item, caption, scrubbed, rejection=item.problem)
    if not caption:
        left = "empty once personal data is taken out" if scrubbed else "missing, empty or not UTF-8"
        return reject(filters.NO_CAPTION, f"the caption is {left}")
    try:
        image = pictures.open_rgb(item.image, item.id)
    except pictures.TooDeepError as error:
        return _Looked(item, caption, scrubbed, rejection=filters.Rejection(filters.TOO_DEEP, str(error)))
    except errors.DataError as error:
        return _Looked(item, caption, scrubbed, rejection=filters.Rejection(filters.UNREADABLE, str(error)))
    short, long = sorted(image.size)
    if short < settings.min_size_px:
        return reject(filters.TOO_SMALL, f"{image.width} x {image.height} px, less than {settings.min_size_px}")
    if long > settings.most_aspect * short:
        return reject(filters.EXTREME, f"{image.width} x {image.height} px, beyond {settings.most_aspect:g} to 1")
    size = table.nearest(image.height, image.width)
    fitted = pictures.fit(image, size)
    if fitted.contrast < settings.least_contrast:
        return reject(filters.FLAT, f"contrast {fitted.contrast:.2f} of 255, less than {settings.least_contrast:g}")
    return _Looked(item, caption, scrubbed, size, fitted)


class Preparation:
    """The chunks of one process. share: (rank, number of processes). workers: threads that open pictures."""

    def __init__(
        self,
        settings: Settings,
        source: sources.Source,
        encoder: encoding.Encoder,
        table: buckets.Buckets,
        folder: pathlib.Path,
        *,
        most_rejected: float = 0.5,
        share: tuple[int, int] = (0, 1),
        workers: int = 2,
    ) -> None:
        self._settings, self._source, self._encoder, self._table = settings, source, encoder, table
        self._folder, self._most_rejected, self._share, self._workers = folder, most_rejected, share, workers
        self.chunks = -(-len(source) // settings.chunk_items)
        self._rejected: list[cache.Rejected] = []

    def run(self) -> None:
        """Write every chunk of this process that does not stand yet. Raises DataError once too much is rejected."""
        mine = list(range(self.chunks))[self._share[0] :: self._share[1]]
        todo = []
        for chunk in mine:
            if (record := cache.read_record(self._folder, chunk)) is None:
                todo.append(chunk)
            else:
                self._rejected += [cache.Rejected(**one) for one in record["rejected"]]
        done = sum(len(self._range(chunk)) for chunk in mine) - sum(len(self._range(chunk)) for chunk in todo)
        total = sum(len(self._range(chunk)) for chunk in mine)
        with (
            concurrent.futures.ThreadPoolExecutor(self._workers) as pool,
            tqdm.tqdm(total=total, initial=done, unit="item", disable=None, smoothing=0.1) as bar,
        ):
            try:
                self._work(pool, todo, bar)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _work(self, pool: concurrent.futures.ThreadPoolExecutor, todo: list[int], bar: "tqdm.tqdm[Any]") -> None:
        progress = _Progress(bar)
        ahead = self._submit(pool, todo[:1])
        for position, chunk in enumerate(todo):
            looking, ahead = ahead, self._submit(pool, todo[position + 1 : position + 2])
            self._write(chunk, [future.result() for future in looking])
            progress.more(len(looking), len(self._rejected))
            if len(self._rejected) > self._most_rejected * len(self._source):
                cache.check_share(self._rejected, len(self._source), self._most_rejected)

    def _range(self, chunk: int) -> range:
        start = chunk * self._settings.chunk_items
        return range(start, min(start + self._settings.chunk_items, len(self._source)))

    def _submit(
        self, pool: concurrent.futures.ThreadPoolExecutor, chunks: Sequence[int]
    ) -> list["concurrent.futures.Future[_Looked]"]:
        items = itertools.chain.from_iterable(
            self._source.items(self._range(chunk).start, self._range(chunk).stop) for chunk in chunks
        )
        return [pool.submit(look, item, self._settings, self._table) for item in items]

    def _write(self, chunk: int, looked: Sequence[_Looked]) -> None:
        start = self._range(chunk).start
        rejections = {start + row: one.rejection for row, one in enumerate(looked) if one.rejection is not None}
        licences = sorted({one.item.licence or self._settings.licence for one in looked})
        origins = sorted({origin(one.item.source) for one in looked})
        rows: dict[cache.Size, cache.Rows] = {}
        for size in sorted({one.size for one in looked if one.fitted is not None}):
            numbered = [(start + row, one) for row, one in enumerate(looked) if one.size == size]
            if (some := self._encode(numbered, rejections, licences, origins)) is not None:
                rows[size] = some
        rejected = [
            cache.Rejected(number, looked[number - start].item.id, why.reason, why.detail)
            for number, why in sorted(rejections.items())
        ]
        scrubbed: collections.Counter[str] = collections.Counter()
        for one in looked:
            scrubbed.update(one.scrubbed)
        notes = {
            "start": start,
            "stop": start + len(looked),
            "scrubbed": dict(sorted(scrubbed.items())),
            "licences": licences,
            "sources": origins,
        }
        cache.write_chunk(self._folder, chunk, rows, rejected, notes)
        self._rejected += rejected

    def _encode(
        self,
        numbered: Sequence[tuple[int, _Looked]],
        rejections: dict[int, filters.Rejection],
        licences: list[str],
        origins: list[str],
    ) -> cache.Rows | None:
        """One bucket of a chunk through the networks. What they reject is added to `rejections`."""
        kept: list[tuple[int, _Looked]] = []
        encoded: list[encoding.Encoded] = []
        for begin in range(0, len(numbered), self._settings.batch_size):
            batch = self._liked(numbered[begin : begin + self._settings.batch_size], rejections)
            if not batch:
                continue
            result = self._encoder.encode(_pixels(batch), [one.caption for _, one in batch])
            finite = result.finite()
            for number, one in (pair for pair, fine in zip(batch, finite, strict=True) if not fine):
                detail = f"{one.item.id}: its latents or text states are NaN or infinite in half precision"
                rejections[number] = filters.Rejection(filters.NOT_FINITE, detail)
            kept += [pair for pair, fine in zip(batch, finite, strict=True) if fine]
            rows = torch.from_numpy(finite)
            encoded.append(encoding.Encoded(result.latents[rows], result.prompt_embeds[rows], result.pooled[rows]))
        if not kept:
            return None
        looked = [one for _, one in kept]
        tensors = {name: torch.cat([getattr(one, name) for one in encoded]) for name in encoding.Encoded.__slots__}
        tensors |= {
            "time_ids": _time_ids(looked),
            "item": torch.tensor([number for number, _ in kept]),
            "thumbnail": torch.from_numpy(np.stack([one.fitted.thumbnail_uint8 for one in looked if one.fitted])),
            "licence": torch.tensor(
                [licences.index(one.item.licence or self._settings.licence) for one in looked], dtype=torch.int32
            ),
            "source": torch.tensor([origins.index(origin(one.item.source)) for one in looked], dtype=torch.int32),
        }
        return cache.Rows(tensors, [one.caption for one in looked], [one.item.id for one in looked])

    def _liked(
        self, batch: Sequence[tuple[int, _Looked]], rejections: dict[int, filters.Rejection]
    ) -> list[tuple[int, _Looked]]:
        """Those whose picture shows what the caption says, if that is asked."""
        floor = self._settings.clip_floor
        if floor is None:
            return list(batch)
        scores = self._encoder.scores(_pixels(batch), [one.caption for _, one in batch])
        for (number, one), score in zip(batch, scores, strict=True):
            if not score >= floor:
                detail = f"{one.item.id}: {self._settings.clip} gives {score:.3f}, less than {floor:g}"
                rejections[number] = filters.Rejection(filters.LOW_SCORE, detail)
        return [pair for pair in batch if pair[0] not in rejections]


def _pixels(batch: Sequence[tuple[int, _Looked]]) -> NDArray[np.uint8]:
    return np.stack([one.fitted.pixels_uint8 for _, one in batch if one.fitted is not None])


def _time_ids(looked: Sequence[_Looked]) -> torch.Tensor:
    """(N, 6): original size, corner of the cut, size."""
    fitted = [(one.fitted, one.size) for one in looked if one.fitted is not None]
    return torch.tensor([[*it.original_px, *it.corner_px, *size] for it, size in fitted], dtype=torch.int32)


def origin(source: str) -> str:
    """Of an address its host: a list of a million addresses says little, and each may name a person."""
    return urllib.parse.urlsplit(source).hostname or source if "://" in source else source


class _Progress:
    """A bar on a terminal; elsewhere a line of the log, every ten seconds at most."""

    def __init__(self, bar: "tqdm.tqdm[Any]") -> None:
        self._bar, self._began_s, self._told_s, self._done, self._first = bar, time.monotonic(), 0.0, 0, bar.n

    def more(self, items: int, rejected: int) -> None:
        self._bar.update(items)
        self._bar.set_postfix(rejected=rejected)
        self._done += items
        now_s = time.monotonic()
        ends = self._first + self._done >= (self._bar.total or 0)
        if self._bar.disable and (ends or now_s - self._told_s > 10):
            self._told_s = now_s
            rate = self._done / max(now_s - self._began_s, 1e-9)
            left_s = ((self._bar.total or 0) - self._first - self._done) / rate
            _log.info(
                "%d of %s items, %d rejected, %.0f items/min, %.0f s left",
                self._first + self._done,
                self._bar.total,
                rejected,
                rate * 60,
                left_s,
            )
