"""What a training says of itself: running means and pictures, to the log and to trackers by accelerate's names."""

import collections
import logging
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from accelerate import tracking
from torch import Tensor

from diffusion_kd import errors

_log = logging.getLogger(__name__)

_FLUSH_S = 10
"""TensorBoard's reports are on disk after so long, for those who watch."""


def require(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that accelerate does not know or whose package is missing."""
    known = [str(name) for name in tracking.LOGGER_TYPE_TO_CLASS]
    for name in names:
        errors.require(name in known, "trackers", name, f"a list of {', '.join(known)}")
        if name not in [str(getattr(each, "value", each)) for each in tracking.get_available_trackers()]:
            raise errors.ConfigError(f"trackers names {name}, whose package is not installed; pip install it")


def start(names: Sequence[str], folder: pathlib.Path) -> list[Any]:
    """Trackers of one stage, named after its folder; TensorBoard writes into it."""
    started = []
    for name in names:
        options = {"flush_secs": _FLUSH_S} if name == "tensorboard" else {}
        kind: Any = tracking.LOGGER_TYPE_TO_CLASS[name]
        where = {"logging_dir": str(folder.parent)} if kind.requires_logging_directory else {}
        tracker = kind(folder.name, **where, **options)
        if hasattr(tracker, "start"):
            tracker.start()
        started.append(tracker)
    return started


class Progress:
    """Means since the last report, with the rate and the time left. Within it as a context its trackers run.

    folder: the stage's. names: of trackers; none on processes that only count along.
    """

    def __init__(self, folder: pathlib.Path, steps: int, batch_size: int, names: Sequence[str]) -> None:
        self.name, self._steps, self._batch_size = folder.name, steps, batch_size
        self._folder, self._names = folder, names
        self._trackers: list[Any] = []
        self.sums: dict[str, list[float]] = collections.defaultdict(list)
        self._taken, self._since = 0, time.monotonic()

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.sums[name].append(value)

    def stepped(self) -> None:
        self._taken += 1

    def report(self, step: int, most_left_s: float, loud: bool) -> dict[str, float]:
        """The means since the last time, reported if `loud`. most_left_s: until a time limit."""
        means = {name: sum(values) / len(values) for name, values in self.sums.items()}
        rate = self._taken * self._batch_size / max(time.monotonic() - self._since, 1e-9)
        if loud:
            minutes = min((self._steps - step) * self._batch_size / rate, most_left_s) / 60 if rate else 0.0
            shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
            _log.info("%s %d/%d  %s  %.3g images/s  %.1f min left", self.name, step, self._steps, shown, rate, minutes)
            self.log(means | {"images_per_s": rate}, step * self._batch_size)
        self.restart()
        return means

    def log(self, values: Mapping[str, float], images_seen: int) -> None:
        for tracker in self._trackers:
            tracker.log(dict(values), step=images_seen)

    def picture(self, tag: str, image: Tensor, images_seen: int) -> None:
        """image: (3, H, W) in [-1, 1]."""
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy().astype(np.uint8)
        for tracker in self._trackers:
            if tracker.name == "tensorboard":
                tracker.tracker.add_image(tag, pixels, images_seen, dataformats="HWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({tag: [pixels]}, step=images_seen)

    def restart(self) -> None:
        self.sums.clear()
        self._taken, self._since = 0, time.monotonic()

    def __enter__(self) -> Self:
        self._trackers = start(self._names, self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._trackers:
            tracker.finish()
