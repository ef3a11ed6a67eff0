"""What goes into the engine and what comes out."""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from serve.engine import errors
from serve.engine.encoding import Encoding

OnPreview = Callable[[int, int, bytes], None]
"""(index of the image, number of the preview, its file): called on a thread of the engine, never after the result."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One request, already checked against its tier.

    key: whose it is; waiting requests of a tier take turns by key. seeds: one for each image.
    guidance_scale: 1 or less is none. size_px: width and height. previews: pictures shown on the way, fewer than steps.
    about: written into every file, beside the seed.
    """

    tier: str
    prompt: str
    seeds: tuple[int, ...]
    steps: int
    size_px: tuple[int, int]
    key: str = ""
    guidance_scale: float = 1.0
    negative_prompt: str | None = None
    previews: int = 0
    encoding: Encoding = dataclasses.field(default_factory=Encoding)
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def rows(self) -> int:
        """Rows that one image takes in a pass of the network: guidance needs two."""
        return 2 if self.guided else 1


@dataclasses.dataclass(slots=True)
class Compute:
    """Seconds that a request took: of the device for text, denoising and decoding (its share of each shared pass), of
    a CPU thread for encoding, and of waiting before its first pass."""

    text_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    queue_s: float = 0.0

    @property
    def device_s(self) -> float:
        """What is paid for."""
        return self.text_s + self.denoise_s + self.decode_s

    def add(self, other: "Compute") -> None:
        """Sum of all but the waiting, of which the longest counts."""
        self.text_s += other.text_s
        self.denoise_s += other.denoise_s
        self.decode_s += other.decode_s
        self.encode_s += other.encode_s
        self.queue_s = max(self.queue_s, other.queue_s)


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """files: encoded images, in the order of the seeds."""

    files: tuple[bytes, ...]
    compute: Compute


class Ticket:
    """A request on its way. `future` holds its Result, or Cancelled, or Failed."""

    def __init__(self, request: ImageRequest, on_preview: OnPreview | None, on_cancel: Callable[[], None]) -> None:
        self.request, self.on_preview = request, on_preview
        self.future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self.submitted_s = time.monotonic()
        self.shares = tuple(Compute() for _ in request.seeds)
        """What each image has taken so far."""
        self._on_cancel = on_cancel
        self._files: dict[int, bytes] = {}
        # Re-entrant: whoever is told of the outcome may look at the ticket.
        self._lock = threading.RLock()
        # Nobody cancels it but `cancel`.
        self.future.set_running_or_notify_cancel()

    def result(self, timeout_s: float | None = None) -> Result:
        return self.future.result(timeout_s)

    def cancel(self) -> None:
        """Take the request back: what waits never starts, what runs leaves before the next pass."""
        self.fail(errors.Cancelled("the request was cancelled"))
        self._on_cancel()

    @property
    def over(self) -> bool:
        return self.future.done()

    def fail(self, error: errors.EngineError) -> None:
        """The first outcome stands."""
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)

    @property
    def taken(self) -> Compute:
        """What the request has taken so far."""
        total = Compute()
        for share in self.shares:
            total.add(share)
        return total

    def deliver(self, index: int, file: bytes) -> None:
        """One image is ready; the last one completes the request."""
        with self._lock:
            self._files[index] = file
            if len(self._files) == len(self.request.seeds) and not self.future.done():
                files = tuple(self._files[index] for index in range(len(self._files)))
                self.future.set_result(Result(files, self.taken))

    def preview(self, index: int, number: int, file: bytes) -> None:
        with self._lock:
            if self.on_preview is not None and not self.future.done():
                self.on_preview(index, number, file)
