"""Toys for the engine: two tiers of one tiny SDXL, a U-Net that can be told what to do, an observer that counts."""

import contextlib
import dataclasses
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffusion_kd import artifact, pipeline
from eval import sampling
from serve.engine.engine import Engine
from serve.engine.lanes import Lane, Limits, Sample, Schedule
from serve.engine.models import Model
from serve.engine.observer import Unobserved
from serve.engine.requests import ImageRequest, Ticket
from tests import toys

TIMESTEPS = {int(steps): timesteps for steps, timesteps in pipeline.trained_timesteps(4).items()}
SIZE_PX = (toys.IMAGE_SIZE_PX, toys.IMAGE_SIZE_PX)
PATIENCE_S = 60.0
NUMPY_2 = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
"""What diffusers' schedulers make NumPy say."""


class Network:
    """A U-Net, text encoder or autoencoder as the engine calls it, that a test can count, halt and sabotage.

    before: called with the number of the call and the network's arguments. after: makes another result of its result.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.calls = 0
        self.before: Callable[[int, Any], None] = lambda call, given: None
        self.after: Callable[[Any, Any], Any] = lambda given, made: made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _call(self, work: Callable[..., Any], *given: Any, **options: Any) -> Any:
        self.calls += 1
        self.before(self.calls, given)
        return self.after(given, work(*given, **options))

    def __call__(self, *given: Any, **options: Any) -> Any:
        return self._call(self.inner, *given, **options)

    def encode(self, *given: Any, **options: Any) -> Any:
        return self._call(self.inner.encode, *given, **options)

    def decode(self, *given: Any, **options: Any) -> Any:
        return self._call(self.inner.decode, *given, **options)


def toy_models(scheduler: Any = None) -> dict[str, Model]:
    """Both tiers on the same toy; their U-Nets, text encoder and autoencoder are `Network`s."""
    parts = toys.tiny_parts()
    text, vae = Network(parts.text), Network(parts.vae)
    denoiser = parts.denoiser()
    scheduler = scheduler or parts.scheduler
    premium, turbo = (artifact.Parts(Network(parts.unet), vae, text, scheduler) for _ in range(2))  # type: ignore[arg-type]
    return {
        "premium": Model("toys/teacher", "ab" * 32, premium, denoiser),
        "turbo": Model("toys/student", "cd" * 32, turbo, denoiser, TIMESTEPS),
    }


class Counts(Unobserved):
    """What the engine did, in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        self.passes: list[tuple[str, int, float]] = []
        self.stages: list[tuple[str, str, float]] = []
        self.waits: list[tuple[str, float]] = []
        self.hits: list[bool] = []
        self.out_of_memory: list[str] = []

    def passed(self, tier: str, rows: int, seconds: float) -> None:
        self.passes.append((tier, rows, seconds))

    def staged(self, tier: str, stage: str, seconds: float) -> None:
        with self._lock:
            self.stages.append((tier, stage, seconds))

    def waited(self, tier: str, seconds: float) -> None:
        self.waits.append((tier, seconds))

    def looked_up(self, *, hit: bool) -> None:
        self.hits.append(hit)

    def ran_out_of_memory(self, tier: str) -> None:
        self.out_of_memory.append(tier)

    def rows(self, tier: str) -> list[int]:
        """Of each pass of a tier."""
        return [rows for passed_tier, rows, _ in self.passes if passed_tier == tier]

    def device_s(self) -> float:
        return sum(seconds for *_, seconds in self.passes) + sum(
            seconds for _, stage, seconds in self.stages if stage in ("text", "decode")
        )


class Halt:
    """Stops a network at one of its calls until `go` is set."""

    def __init__(self, network: Any, at_call: int = 1) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        self._at_call = at_call
        network.before = self._before

    def _before(self, call: int, given: Any) -> None:
        if call == self._at_call:
            self.reached.set()
            assert self.go.wait(PATIENCE_S)

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE_S)


@contextlib.contextmanager
def running(
    models: Mapping[str, Model],
    counts: Counts | None = None,
    limits: Mapping[str, Limits] | None = None,
    **options: Any,
) -> Iterator[Engine]:
    """An engine at work; what its rehearsals were counted as is forgotten.

    limits: by tier, else `options` are those of all. options: prompt_cache_bytes and encode_threads of `Engine`, too.
    """
    ours = {name: options.pop(name) for name in ("prompt_cache_bytes", "encode_threads") if name in options}
    engine = Engine(models, limits or dict.fromkeys(models, Limits(**options)), observer=counts, **ours)
    try:
        engine.start()
        if counts is not None:
            counts.clear()
        for model in models.values():
            for part in _networks(model.parts).values():
                if isinstance(part, Network):
                    part.calls = 0
        yield engine
    finally:
        engine.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, as long as patience lasts."""
    give_up_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s, "it never happened"
        time.sleep(0.001)


def request(tier: str = "premium", **changes: Any) -> ImageRequest:
    """One image of a red circle; turbo in 1 step, premium in 3."""
    usual: dict[str, Any] = {
        "prompt": "a red circle",
        "seeds": (0,),
        "steps": 1 if tier == "turbo" else 3,
        "size_px": SIZE_PX,
    }
    return ImageRequest(tier=tier, **(usual | changes))


def pixels(file: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) of an image file."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def images(ticket: Ticket) -> list[NDArray[np.uint8]]:
    return [pixels(file) for file in ticket.result(PATIENCE_S).files]


def by_pipeline(models: Mapping[str, Model], wanted: ImageRequest) -> list[NDArray[np.uint8]]:
    """The images of a request as the library's own pipelines make them, one by one."""
    model = models[wanted.tier]
    parts = dataclasses.replace(
        model.parts, **{name: getattr(part, "inner", part) for name, part in _networks(model.parts).items()}
    )
    made = []
    for seed in wanted.seeds:
        if model.timesteps is None:
            teacher = pipeline.TeacherPipeline(parts)
            image = teacher(
                [wanted.prompt],
                [seed],
                steps=wanted.steps,
                guidance_scale=wanted.guidance_scale,
                negative_prompt=wanted.negative_prompt,
            )
        else:
            image = pipeline.FewStepPipeline(parts, dict(model.timesteps))([wanted.prompt], [seed], steps=wanted.steps)
        made.append(sampling.to_uint8(image)[0])
    return made


def _networks(parts: artifact.Parts) -> dict[str, Any]:
    return {"unet": parts.unet, "vae": parts.vae, "text": parts.text}


def furthest(ours: Sequence[NDArray[np.uint8]], theirs: Sequence[NDArray[np.uint8]]) -> int:
    """The largest difference of a pixel, of 255."""
    assert len(ours) == len(theirs) > 0
    return max(int(np.abs(one.astype(int) - other).max()) for one, other in zip(ours, theirs, strict=True))


def rows_of(models: Mapping[str, Model], prompt: str) -> Callable[[Any], Tensor]:
    """Which rows of a U-Net's arguments (x_t, timesteps, prompt_embeds) are of that prompt: (B,) bool."""
    text: Any = models["premium"].parts.text
    known = text.inner.encode([prompt], SIZE_PX).prompt_embeds

    def find(given: Any) -> Tensor:
        return torch.isclose(given[2], known, atol=1e-5).flatten(1).all(1)

    return find


# --- without networks -------------------------------------------------------------------------------


class Walk:
    """A trajectory that only counts."""

    def __init__(self, passes: int) -> None:
        self.remaining = passes


def waiting(lane: Lane, count: int = 1, **changes: Any) -> list[Sample]:
    """Samples of one request, not queued yet."""
    changes = {"seeds": tuple(range(count)), **changes}
    ticket = Ticket(request(lane.tier, **changes), None, lambda: None)
    return [Sample(ticket, index, ticket.request.steps) for index in range(count)]


def fake_turn(lane: Lane, row_s: float) -> tuple[float, list[Sample]]:
    """What the engine does with a lane whose turn it is, by the clock of a device that takes `row_s` a row.

    Returns the seconds that it took, and who joined.
    """
    joined = lane.join()
    for sample in joined:
        sample.trajectory = Walk(sample.passes)  # type: ignore[assignment]
    chosen = lane.turn()
    for sample in chosen:
        sample.trajectory.remaining -= 1  # type: ignore[misc, union-attr]
    lane.active = [sample for sample in lane.active if sample.remaining]
    seconds = row_s * sum(sample.request.rows for sample in chosen)
    lane.spent_s += seconds / lane.limits.weight
    return seconds, joined


def schedule(**limits: Limits) -> Schedule:
    return Schedule(Lane(tier, limit) for tier, limit in limits.items())
