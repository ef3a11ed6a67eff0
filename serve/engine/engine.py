"""`Engine`: the one owner of the device. Requests in, pictures out; knows no HTTP and no database.

One thread owns the device and turns forever: let new images join, read their prompts, take one step for every image of
the tier whose turn it is, decode those that are done. So a request joins and leaves at any step, images at different
steps share a pass, and tiers take turns by passes and never wait for a whole generation. Other threads encode the files
meanwhile.
"""

import concurrent.futures
import logging
import threading
import time
from collections.abc import Mapping, Sequence

import torch

from serve.engine import encoding, errors, lanes
from serve.engine.lanes import Lane, Limits, Sample
from serve.engine.models import Model
from serve.engine.observer import Observer, Unobserved
from serve.engine.requests import ImageRequest, OnPreview, Ticket
from serve.engine.stages import Pixels, Stages

log = logging.getLogger(__name__)

_FAILURES_UNTIL_SICK = 8
_FILES_PER_THREAD = 8


class Engine:
    """Batches the requests of all tiers, a denoising step at a time.

    models, limits: by tier. prompt_cache_bytes: embeddings that are kept. encode_threads: that write image files.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        limits: Mapping[str, Limits],
        *,
        prompt_cache_bytes: int = 1 << 28,
        encode_threads: int = 2,
        observer: Observer | None = None,
    ) -> None:
        self.models = dict(models)
        self._observer = observer or Unobserved()
        self._stages = Stages(self.models, prompt_cache_bytes, self._observer)
        self._schedule = lanes.Schedule(Lane(tier, limits[tier]) for tier in models)
        self._changed = threading.Condition()
        self._draining = self._closing = False
        self._open = set[Ticket]()
        self._encoders = concurrent.futures.ThreadPoolExecutor(encode_threads, "encode")
        # A device that is faster than its encoders waits for them, so that pictures do not pile up in memory.
        self._unwritten = threading.BoundedSemaphore(encode_threads * _FILES_PER_THREAD)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the device's thread and measure each tier, so that costs and waits are known from the first request."""
        self._thread.start()
        for _ in range(2):  # the first round is slower than any later one
            for lane in self._schedule.lanes.values():
                lane.estimates = lanes.Estimates()
            for tier in self.models:
                self._rehearse(tier)

    def submit(self, request: ImageRequest, on_preview: OnPreview | None = None) -> Ticket:
        """Queue a request. Raises Busy, or Draining, at once where it is not admitted; then nothing of it is kept."""
        ticket = Ticket(request, on_preview, self._tidy)
        passes = self.models[request.tier].passes(request.steps)
        samples = [Sample(ticket, index, passes) for index in range(len(request.seeds))]
        with self._changed:
            if self._draining:
                raise errors.Draining("the service is closing; send the request again, to another one", 1.0)
            self._schedule.admit(request.tier, samples)
            self._open.add(ticket)
            self._changed.notify_all()
        ticket.future.add_done_callback(lambda _: self._forget(ticket))
        return ticket

    def predicted_wait_s(self, tier: str, images: int = 1) -> float:
        """Seconds until that many more images would all have started."""
        with self._changed:
            lane = self._schedule.lanes[tier]
            return lane.predicted_wait_s(images, self._schedule.share(lane))

    def predicted_device_s(self, tier: str, steps: int, *, guided: bool) -> float:
        """Seconds of the device that one image takes, as the last ones are measured to have taken."""
        estimates = self._schedule.lanes[tier].estimates
        return estimates.text_s.value + estimates.image_s(self.models[tier].passes(steps), 2 if guided else 1)

    def queued(self, tier: str) -> int:
        """Images that wait."""
        with self._changed:
            return len(self._schedule.lanes[tier].queue)

    def active(self, tier: str) -> int:
        """Images between their first step and their decoding."""
        return len(self._schedule.lanes[tier].active)

    @property
    def healthy(self) -> bool:
        """Whether images come out: a device on which many fail in a row does not recover by itself."""
        return self._thread.is_alive() and self._stages.failures < _FAILURES_UNTIL_SICK

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self, timeout_s: float) -> bool:
        """Admit nothing more and wait for what is admitted; whether all of it was done in time."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._open, timeout_s)

    def close(self) -> None:
        """Stop; what is left is cancelled."""
        with self._changed:
            self._draining = self._closing = True
            left = list(self._open)
            self._changed.notify_all()
        for ticket in left:
            ticket.cancel()
        if self._thread.ident is not None:
            self._thread.join()
        self._encoders.shutdown()

    def _forget(self, ticket: Ticket) -> None:
        with self._changed:
            self._open.discard(ticket)
            self._changed.notify_all()

    def _tidy(self) -> None:
        """A request was cancelled: its waiting images make room at once."""
        with self._changed:
            for lane in self._schedule.lanes.values():
                lane.queue.drop_over()

    def _rehearse(self, tier: str) -> None:
        model = self.models[tier]
        teacher = model.timesteps is None
        request = ImageRequest(
            tier=tier,
            prompt=f"rehearsal {time.monotonic()}",  # new to the cache
            seeds=(0,),
            steps=min(model.timesteps or [2]),
            guidance_scale=2.0 if teacher else 1.0,
            size_px=(model.parts.size_px, model.parts.size_px),
        )
        self.submit(request).result()

    @torch.inference_mode()
    def _run(self) -> None:
        """The device's thread."""
        while (lane := self._next()) is not None:
            try:
                self._turn(lane)
            except Exception:
                # The thread must live: what was on its way fails, what waits goes on.
                log.exception("a turn of the %s tier failed", lane.tier)
                self._stages.failures += 1
                for sample in lane.active:
                    sample.ticket.fail(errors.Failed("the image could not be made"))

    def _next(self) -> Lane | None:
        """The lane whose turn it is, once there is one; None: the engine closes."""
        with self._changed:
            while True:
                self._schedule.drop_over()
                if (lane := self._schedule.next()) is not None or self._closing:
                    return lane
                self._changed.wait()

    def _turn(self, lane: Lane) -> None:
        began_s = self._stages.now_s()
        with self._changed:
            joined = lane.join()
            chosen = lane.turn()
        self._begin(lane, joined)
        chosen = [sample for sample in chosen if not sample.ticket.over]
        pixels: list[Pixels] = []
        if chosen:
            previews = self._stages.step(lane, chosen)
            done = [sample for sample in chosen if not sample.remaining]
            finals = [(sample, None, sample.trajectory.x_t) for sample in done if sample.trajectory]
            pixels = self._stages.decode(lane, [*previews, *finals])
            with self._changed:  # not before: if the turn fails, they are among those that fail
                lane.active = [sample for sample in lane.active if sample.remaining]
        lane.spent_s += (self._stages.now_s() - began_s) / lane.limits.weight
        self._write(lane, pixels)

    def _begin(self, lane: Lane, joined: Sequence[Sample]) -> None:
        now_s = time.monotonic()
        for sample in joined:
            sample.compute.queue_s = now_s - sample.ticket.submitted_s
            self._observer.waited(lane.tier, sample.compute.queue_s)
        self._stages.read_prompts(lane, joined)
        for sample in joined:
            with self._stages.failing_alone(lane, sample):
                sample.trajectory = self.models[lane.tier].begin(sample.request, sample.request.seeds[sample.index])
                sample.previews = preview_steps(sample.remaining, sample.request.previews)

    def _write(self, lane: Lane, pixels: Sequence[Pixels]) -> None:
        for one in pixels:
            self._unwritten.acquire()
            sample = one[0]
            sample.writing = self._encoders.submit(self._write_file, lane.tier, one, sample.writing)

    def _write_file(self, tier: str, pixels: Pixels, before: concurrent.futures.Future[None] | None) -> None:
        """On an encoder's thread. before: the image's file that goes out first, and was begun first."""
        sample, preview, image_uint8 = pixels
        try:
            began_s = time.perf_counter()
            request = sample.request
            about = {**request.about, "seed": request.seeds[sample.index]}
            file = encoding.encode(image_uint8, request.encoding, about)
            seconds = time.perf_counter() - began_s
            if before is not None:
                before.result()
            self._observer.staged(tier, "encode", seconds)
            sample.compute.encode_s += seconds
            if preview is not None:
                sample.ticket.preview(sample.index, preview, file)
            else:
                self._stages.failures = 0
                sample.ticket.deliver(sample.index, file)
        except Exception:
            log.exception("an image file could not be written")
            sample.ticket.fail(errors.Failed("the image could not be written"))
        finally:
            self._unwritten.release()


def preview_steps(passes: int, previews: int) -> dict[int, int]:
    """Passes left -> number of the preview shown then, spread evenly: 50, 3 -> {38: 0, 25: 1, 12: 2}."""
    return {passes - round(passes * (number + 1) / (previews + 1)): number for number in range(previews)}
