"""The engine's work as Prometheus' metrics."""

from serve.engine.engine import Engine
from serve.telemetry import Metrics


class EngineMetrics:
    """An `Observer` of the engine."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def waited(self, tier: str, seconds: float) -> None:
        self._metrics.queue_wait_seconds.labels(tier).observe(seconds)

    def passed(self, tier: str, rows: int, seconds: float) -> None:
        self._metrics.batch_rows.labels(tier).observe(rows)
        self._metrics.step_seconds.labels(tier).observe(seconds)
        self._metrics.stage_seconds.labels("denoise", tier).observe(seconds)

    def staged(self, tier: str, stage: str, seconds: float) -> None:
        self._metrics.stage_seconds.labels(stage, tier).observe(seconds)

    def looked_up(self, *, hit: bool) -> None:
        self._metrics.prompt_cache.labels("hit" if hit else "miss").inc()

    def ran_out_of_memory(self, tier: str) -> None:
        self._metrics.out_of_memory.labels(tier).inc()


def queues(metrics: Metrics, engine: Engine) -> None:
    """Queue depth and images on their way, asked for when the metrics are read."""
    for tier in engine.models:
        metrics.watch_queue(tier, lambda tier=tier: engine.queued(tier))  # type: ignore[misc]
        metrics.watch_active(tier, lambda tier=tier: engine.active(tier))  # type: ignore[misc]
