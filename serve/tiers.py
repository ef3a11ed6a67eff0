"""A tier as clients see it: what it can, what it costs, how long it takes, and how it was judged."""

import statistics
import time

from serve import costs, schemas
from serve.service import Service

_STARTED = int(time.time())


def describe(service: Service, name: str) -> schemas.ModelOut:
    """name: of the tier itself."""
    tier = service.catalogue.tiers[name]
    return schemas.ModelOut(
        id=name,
        created=_STARTED,
        version=tier.model.version,
        aliases=list(tier.settings.aliases),
        sizes=[f"{width}x{height}" for width, height in tier.sizes],
        steps=tier.steps if tier.is_student else [tier.steps[0], tier.steps[-1]],
        steps_are_a_range=not tier.is_student,
        default_steps=tier.default_steps,
        default_guidance_scale=None if tier.is_student else tier.default_guidance_scale,
        max_batch=tier.settings.max_batch,
        max_queued=tier.settings.max_queued,
        max_wait_s=tier.settings.max_wait_s,
        queued=service.engine.queued(name),
        latency=_latency(list(service.latencies_s[name])),
        price_per_gpu_hour_usd=service.price.per_gpu_hour_usd,
        image_cost_usd=costs.to_usd(service.image_nanousd(name)),
        evaluation=service.evaluation if tier.is_student else None,
    )


def _latency(seconds: list[float]) -> schemas.LatencyOut | None:
    if not seconds:
        return None
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return schemas.LatencyOut(requests=len(ordered), p50_ms=1000 * statistics.median(ordered), p99_ms=1000 * p99)
