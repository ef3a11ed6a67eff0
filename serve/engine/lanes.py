"""Who goes next: a tier's queue, its images on their way, its share of the device. Knows no networks and no threads."""

import collections
import concurrent.futures
import dataclasses
import heapq
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from diffusion_kd.types import Conditioning
from serve.engine import errors
from serve.engine.requests import Compute, ImageRequest, Ticket
from serve.engine.trajectory import Trajectory

_MEMORY = 0.1
"""Weight of the newest observation in a running estimate."""
_PASSES_BEFORE_GROWTH = 200


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """max_batch: images that share a pass. max_queued: images that may wait. max_wait_s: longest predicted wait that is
    admitted. weight: share of the device while several tiers are busy. batch_invariant: no two images share a call of a
    network, so that no neighbour changes a single bit."""

    max_batch: int = 8
    max_queued: int = 64
    max_wait_s: float = 60.0
    weight: float = 1.0
    batch_invariant: bool = False


@dataclasses.dataclass(eq=False, slots=True)
class Sample:
    """One image of a request.

    passes: of the network, from noise to x0. previews: passes left -> number of the preview that is due then.
    cond, away: the prompt, and what guidance leads away from. writing: its file that was begun last.
    """

    ticket: Ticket
    index: int
    passes: int
    previews: dict[int, int] = dataclasses.field(default_factory=dict)
    trajectory: Trajectory | None = None
    cond: Conditioning | None = None
    away: Conditioning | None = None
    writing: concurrent.futures.Future[None] | None = None

    @property
    def request(self) -> ImageRequest:
        return self.ticket.request

    @property
    def compute(self) -> Compute:
        """What it has taken so far."""
        return self.ticket.shares[self.index]

    @property
    def remaining(self) -> int:
        """Passes that are left."""
        return self.passes if self.trajectory is None else self.trajectory.remaining


class FairQueue:
    """First come, first served within a key; keys take turns, so that a flood of one holds nobody else back."""

    def __init__(self) -> None:
        self._by_key: collections.OrderedDict[str, collections.deque[Sample]] = collections.OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._by_key.values()))

    def __iter__(self) -> Iterator[Sample]:
        return (sample for waiting in self._by_key.values() for sample in waiting)

    def of(self, key: str) -> int:
        """Images of a key that wait."""
        return len(self._by_key.get(key, ()))

    def before(self, key: str, images: int) -> list[Sample]:
        """Those whose turn comes before the last of so many more of a key."""
        turns = self.of(key) + images
        return [sample for waiting in self._by_key.values() for sample in itertools.islice(waiting, turns)]

    def push(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self._by_key.setdefault(sample.request.key, collections.deque()).append(sample)

    def pop(self) -> Sample:
        key, waiting = next(iter(self._by_key.items()))
        sample = waiting.popleft()
        del self._by_key[key]
        if waiting:
            self._by_key[key] = waiting
        return sample

    def drop_over(self) -> None:
        """Forget the images of requests that are over."""
        for key in list(self._by_key):
            left = collections.deque(sample for sample in self._by_key[key] if not sample.ticket.over)
            if left:
                self._by_key[key] = left
            else:
                del self._by_key[key]


@dataclasses.dataclass(slots=True)
class Estimate:
    """A running mean that starts with the plain mean."""

    value: float = 0.0
    count: int = 0

    def observe(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) * max(_MEMORY, 1 / self.count)


@dataclasses.dataclass(slots=True)
class Estimates:
    """Seconds of the device: of one prompt's text, of one row of a pass, of one image's decoding."""

    text_s: Estimate = dataclasses.field(default_factory=Estimate)
    row_s: Estimate = dataclasses.field(default_factory=Estimate)
    decode_s: Estimate = dataclasses.field(default_factory=Estimate)

    def image_s(self, passes: int, rows: int) -> float:
        """Of one image without its text."""
        return passes * rows * self.row_s.value + self.decode_s.value


class Lane:
    """A tier's queue and its images on their way."""

    def __init__(self, tier: str, limits: Limits) -> None:
        self.tier, self.limits = tier, limits
        self.queue, self.active = FairQueue(), list[Sample]()
        self.estimates = Estimates()
        self.spent_s = 0.0
        """Device time over weight, from which the tiers' turns follow."""
        self.fits = limits.max_batch
        """Images that fit into memory at once, as far as is known."""
        self._passes = 0

    @property
    def busy(self) -> bool:
        return bool(self.active or len(self.queue))

    def drop_over(self) -> None:
        self.queue.drop_over()
        self.active = [sample for sample in self.active if not sample.ticket.over]

    def join(self) -> list[Sample]:
        """Move what fits from the queue to the images on their way; returns those."""
        room = self.fits - len(self.active)
        joined = [self.queue.pop() for _ in range(min(room, len(self.queue)))]
        self.active += joined
        return joined

    def turn(self) -> list[Sample]:
        """The images of the next pass, all of one size; sizes take turns."""
        if not self.active:
            return []
        size = self.active[0].request.size_px
        chosen = [sample for sample in self.active if sample.request.size_px == size]
        self.active = [sample for sample in self.active if sample.request.size_px != size] + chosen
        return chosen

    def shrink(self, images: int) -> None:
        """No more than `images` fit into memory."""
        self.fits, self._passes = max(1, min(self.fits, images)), 0

    def passed(self) -> None:
        """A pass went well. After many of them a shrunken batch may try again to be larger."""
        self._passes += 1
        if self._passes >= _PASSES_BEFORE_GROWTH and self.fits < self.limits.max_batch:
            self.fits, self._passes = min(2 * self.fits, self.limits.max_batch), 0

    def predicted_wait_s(self, images: int, share: float, like: Sample | None = None) -> float:
        """Until the last of `images` more would start, as the images before it are measured to take.

        share: of the device that this tier has. like: one of the images, whose key has its turns; None: they are like
        those before them, and come last.
        """
        before = [*self.active, *(self.queue.before(like.request.key, images) if like else self.queue)]
        ahead = [(float(sample.remaining), float(sample.request.rows)) for sample in before]
        if usual := [like] if like else before:
            passes, rows = ([one.passes for one in usual], [one.request.rows for one in usual])
            ahead += [(statistics.fmean(passes), statistics.fmean(rows))] * (images - 1)
        starts, leaves = list[float](), list[float]()  # in passes from now
        for taken, _ in ahead:
            starts.append(heapq.heappop(leaves) if len(leaves) >= self.fits else 0)
            heapq.heappush(leaves, starts[-1] + taken)
        if len(leaves) < self.fits:
            return 0.0
        until, row_s, decode_s = leaves[0], self.estimates.row_s.value, self.estimates.decode_s.value
        seconds = sum(
            wide * row_s * min(taken, until - start) + decode_s * (start + taken <= until)
            for start, (taken, wide) in zip(starts, ahead, strict=True)
        )
        return seconds / share

    def admit(self, samples: Sequence[Sample], share: float) -> None:
        """Queue all of a request's images or, with Busy, none.

        A key that has none waiting may go beyond a queue that others have filled: no flood shuts it out.
        """
        limits, queued = self.limits, len(self.queue)
        own = queued == 0 or self.queue.of(samples[0].request.key) > 0
        wait_s = self.predicted_wait_s(len(samples), share, samples[0])
        free = max(0, self.fits - len(self.active))
        if own and queued + len(samples) > limits.max_queued + free:
            raise errors.Busy(
                f"the {self.tier} tier has {queued} images waiting and takes {limits.max_queued}; try again later",
                _retry_after_s(wait_s),
            )
        if wait_s > limits.max_wait_s:
            raise errors.Busy(
                f"the {self.tier} tier would let this wait for {wait_s:.0f} s and admits waits of "
                f"{limits.max_wait_s:g} s; try again later",
                _retry_after_s(wait_s - limits.max_wait_s),
            )
        self.queue.push(samples)


def _retry_after_s(wait_s: float) -> float:
    return float(max(1, math.ceil(wait_s)))


class Schedule:
    """The tiers' turns: the busy lane that has had least for its weight (start-time fair queueing, Goyal et al. 1996).

    A lane that was idle starts level with the lane served last: it neither pays for its rest nor is paid for it.
    """

    def __init__(self, lanes: Iterable[Lane]) -> None:
        self.lanes = {lane.tier: lane for lane in lanes}
        self._clock_s = 0.0

    def share(self, lane: Lane) -> float:
        """Of the device that `lane` has beside the busy ones."""
        others = sum(other.limits.weight for other in self.lanes.values() if other is not lane and other.busy)
        return lane.limits.weight / (lane.limits.weight + others)

    def admit(self, tier: str, samples: Sequence[Sample]) -> None:
        """Queue a request's images. Raises Busy, and then queues none."""
        lane = self.lanes[tier]
        idle = not lane.busy
        lane.admit(samples, self.share(lane))
        if idle:
            lane.spent_s = max(lane.spent_s, self._clock_s)

    def next(self) -> Lane | None:
        """The lane whose turn it is; None: all are idle."""
        chosen = min((lane for lane in self.lanes.values() if lane.busy), key=lambda lane: lane.spent_s, default=None)
        if chosen is not None:
            self._clock_s = max(self._clock_s, chosen.spent_s)
        return chosen

    def drop_over(self) -> None:
        for lane in self.lanes.values():
            lane.drop_over()
