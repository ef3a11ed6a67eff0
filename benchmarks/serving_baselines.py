"""The servers that `benchmarks.serving` compares the service with: `python -m benchmarks.serving_baselines naive`.

`naive` is what a first deployment looks like: one diffusers pipeline a tier, one request at a time behind a lock.
`batching` is the usual next step: requests of a tier that wait together run together, from their first step to their
last. Neither has keys, a database, a bounded queue, previews or jobs: what those cost is the service's own to bear.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import pathlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import anyio.to_thread
import diffusers
import fastapi
import numpy as np
import pydantic
import torch
import uvicorn
from numpy.typing import NDArray

from diffusion_kd import artifact, errors, pipeline
from eval import sampling
from serve.engine import encoding, models
from serve.settings import PremiumSettings

TIERS = ("turbo", "premium")
BATCHING_DELAY_S = 0.005
"""How long the first request of a batch waits for company, as SGLang's recommended setting has it."""


class Body(pydantic.BaseModel):
    """The part of the service's body that the benchmark sends."""

    model: str
    prompt: str
    seed: int


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How a tier samples. guidance_scale: 0 of the student, which has none."""

    source: str
    steps: int
    guidance_scale: float


Generate = Callable[[Body], NDArray[np.uint8]]
"""Pixels (H, W, 3) of a request; blocks until they are made."""


def recipes(teacher: str, student: str, guidance_scale: float) -> dict[str, Recipe]:
    """The steps that the service takes unless a request names others."""
    fewest = min(artifact.read_distillation(student).steps())
    return {
        "turbo": Recipe(student, fewest, 0.0),
        "premium": Recipe(teacher, PremiumSettings().default_steps, guidance_scale),
    }


@contextlib.asynccontextmanager
async def _threads_for_all(_: fastapi.FastAPI) -> AsyncIterator[None]:
    """The framework's 40 threads would be a queue before the queue."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1000
    yield


def create_app(generate: Generate) -> fastapi.FastAPI:
    """Generation and a health check; the handler runs on a thread of the framework's pool, as plain `def` ones do."""
    app = fastapi.FastAPI(lifespan=_threads_for_all)

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/images/generations")
    def images(body: Body) -> dict[str, Any]:
        about = {"prompt": body.prompt, "tier": body.model, "seed": body.seed}
        file = encoding.encode(generate(body), encoding.Encoding(), about)
        return {
            "created": int(time.time()),
            "data": [{"b64_json": base64.b64encode(file).decode(), "seed": body.seed}],
        }

    return app


# --- naive ------------------------------------------------------------------------------------------


class Naive:
    """One call of a diffusers pipeline for each request, one at a time."""

    def __init__(self, by_tier: dict[str, Recipe], device: torch.device) -> None:
        self._recipes, self._lock = by_tier, threading.Lock()
        self._pipelines = {tier: _diffusers_pipeline(recipe.source, device) for tier, recipe in by_tier.items()}

    def __call__(self, body: Body) -> NDArray[np.uint8]:
        recipe = self._recipes[body.model]
        with self._lock:
            image = self._pipelines[body.model](
                body.prompt,
                num_inference_steps=recipe.steps,
                guidance_scale=recipe.guidance_scale,
                generator=torch.Generator().manual_seed(body.seed),
                output_type="np",
            ).images[0]
        return (image * 255).round().astype(np.uint8)  # type: ignore[no-any-return]


def _diffusers_pipeline(source: str, device: torch.device) -> Any:
    folder: pathlib.Path = artifact.resolve(source)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    made: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=dtype, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made.to(device)


# --- batching ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Waiting:
    body: Body
    since_s: float
    pixels: concurrent.futures.Future[NDArray[np.uint8]]


Draw = Callable[[str, Sequence[str], Sequence[int]], torch.Tensor]
"""(tier, prompts, seeds) -> images (B, 3, H, W) in [-1, 1] on the CPU."""


class Batching:
    """Whole generations of up to `max_batch` requests of one tier, the tier of the oldest request first.

    A batch starts when it is full, or when its oldest request has waited for `delay_s`; while the device is busy,
    batches grow.
    """

    def __init__(self, draw: Draw, max_batch: int, delay_s: float = BATCHING_DELAY_S) -> None:
        self._draw, self._max_batch, self._delay_s = draw, max_batch, delay_s
        self._queues = {tier: collections.deque[_Waiting]() for tier in TIERS}
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="device", daemon=True).start()

    def __call__(self, body: Body) -> NDArray[np.uint8]:
        one = _Waiting(body, time.monotonic(), concurrent.futures.Future())
        with self._changed:
            self._queues[body.model].append(one)
            self._changed.notify()
        return one.pixels.result()

    def _run(self) -> None:
        while True:
            tier, batch = self._next()
            try:
                images = self._draw(tier, [one.body.prompt for one in batch], [one.body.seed for one in batch])
                for one, pixels in zip(batch, sampling.to_uint8(images), strict=True):
                    one.pixels.set_result(pixels)
            except Exception as error:  # noqa: BLE001 - whoever waits is told
                for one in batch:
                    one.pixels.set_exception(error)

    def _next(self) -> tuple[str, list[_Waiting]]:
        with self._changed:
            self._changed.wait_for(lambda: any(self._queues.values()))
            tier = min((tier for tier in TIERS if self._queues[tier]), key=lambda tier: self._queues[tier][0].since_s)
            queue = self._queues[tier]
            left_s = queue[0].since_s + self._delay_s - time.monotonic()
            self._changed.wait_for(lambda: len(queue) >= self._max_batch, max(0.0, left_s))
            return tier, [queue.popleft() for _ in range(min(len(queue), self._max_batch))]


def load_samplers(by_tier: dict[str, Recipe], device: torch.device) -> Draw:
    """This project's pipelines, in the precision that the service takes on that device."""
    pair = models.load_pair(by_tier["premium"].source, by_tier["turbo"].source, device=str(device))
    premium, turbo = pair["premium"], pair["turbo"]
    assert turbo.timesteps is not None, "a student has timesteps"
    samplers: dict[str, Any] = {
        "premium": pipeline.TeacherPipeline(premium.parts),
        "turbo": pipeline.FewStepPipeline(turbo.parts, dict(turbo.timesteps)),
    }

    def draw(tier: str, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        recipe = by_tier[tier]
        images: torch.Tensor = samplers[tier](prompts, seeds, steps=recipe.steps, guidance_scale=recipe.guidance_scale)
        return images

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_baselines", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("naive", "batching"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--premium", default="shapes-teacher")
    parser.add_argument("--turbo", default="shapes-student")
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    by_tier = recipes(given.premium, given.turbo, given.guidance_scale)
    if given.kind == "naive":
        generate: Generate = Naive(by_tier, device)
    else:
        generate = Batching(load_samplers(by_tier, device), given.max_batch)
    for tier in TIERS:  # the first call is slower than any later one
        generate(Body(model=tier, prompt="rehearsal", seed=0))
    uvicorn.run(create_app(generate), port=given.port, log_level="warning")


if __name__ == "__main__":
    errors.run(main)
