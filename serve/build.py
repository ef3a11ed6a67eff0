"""Settings -> everything behind the routes, put together, started and closed in order."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import datetime
import logging
import os
import socket
import uuid
from typing import Any

import torch

from diffusion_kd import files
from diffusion_kd.errors import ConfigError
from serve import limits, pictures, telemetry, watch, webhooks
from serve.engine import engine as engines
from serve.engine import lanes, models
from serve.jobs import Jobs, Worker
from serve.service import Service
from serve.settings import Settings, TierSettings
from serve.store import ImageFolder, Store, StoreError

log = logging.getLogger(__name__)

_THREADS = 32
"""For what blocks: the database, image files."""

SETTLE_S = 5.0
"""For the records of requests that were cut off, and for what is under way in threads."""


@dataclasses.dataclass(slots=True)
class Built:
    """The service and what works behind it. `start` in an event loop, then `drain` if there is time, then `close`."""

    service: Service
    jobs: Jobs
    worker: Worker
    folder: ImageFolder
    limiter: limits.RateLimiter
    deliverer: webhooks.Deliverer | None
    _tasks: list[asyncio.Task[Any]] = dataclasses.field(default_factory=list)
    _threads: concurrent.futures.ThreadPoolExecutor = dataclasses.field(
        # Python's own pool has few threads: slow storage must not keep keys and leases waiting.
        default_factory=lambda: concurrent.futures.ThreadPoolExecutor(_THREADS, "blocking")
    )

    def start(self) -> list[asyncio.Task[Any]]:
        """The background tasks, which end with the service."""
        running = {"jobs": self.worker.run(), "sweep": self._sweep()}
        if self.deliverer is not None:
            running["webhooks"] = self.deliverer.run()
        asyncio.get_running_loop().set_default_executor(self._threads)
        self._tasks = [asyncio.create_task(work, name=name) for name, work in running.items()]
        for task in self._tasks:
            task.add_done_callback(_tell_death)
        return self._tasks

    async def drain(self) -> None:
        """Admit nothing more, finish what runs, as far as time allows; refuse what is left, and hand its jobs back."""
        timeout_s = self.service.settings.drain_s
        await asyncio.gather(self._drain_engine(timeout_s), self.worker.drain(timeout_s))

    async def _drain_engine(self, timeout_s: float) -> None:
        """Clients that wait in vain are told while there is somebody to tell them."""
        if not await asyncio.to_thread(self.service.engine.drain, timeout_s):
            await asyncio.to_thread(self.service.engine.close)

    async def close(self) -> None:
        """Drain, and end everything."""
        await self.drain()
        await self.service.settle(SETTLE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._threads_end()
        if self.deliverer is not None:
            await self._hand_back(self.deliverer.owner)
        await self.limiter.close()
        await asyncio.to_thread(self.service.engine.close)
        self.service.store.close()

    async def _threads_end(self) -> None:
        """A task is cancelled at once; what it does to the store in a thread goes on. Later work has threads anew."""
        asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor())
        try:
            async with asyncio.timeout(SETTLE_S):
                await asyncio.to_thread(self._threads.shutdown)
        except TimeoutError:
            log.warning("the service ends while the database or the images' folder has not answered")

    async def _hand_back(self, owner: str) -> None:
        """Webhooks that are under way go out again at once, from whoever is next, and not when their leases lapse."""
        try:
            await asyncio.to_thread(self.service.store.release_deliveries, owner)
        except StoreError as error:
            log.warning("webhooks cannot be handed back: %s", error)

    async def _sweep(self) -> None:
        """Delete what has expired, now and then."""
        settings, store = self.service.settings, self.service.store
        kept = datetime.timedelta(seconds=settings.job_ttl_s)
        while True:
            try:
                swept = await asyncio.to_thread(store.sweep, jobs_older_than=kept, delete_file=self.folder.delete)
                log.debug("swept %s", swept)
            except StoreError as error:
                log.warning("nothing can be swept: %s", error)
            await asyncio.sleep(settings.sweep_every_s)


def _tell_death(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the task %s has ended", task.get_name(), exc_info=error)


def check(settings: Settings) -> None:
    """Raises ConfigError for settings that would be unsafe or could not work."""
    if settings.auth == "none" and not settings.loopback:
        raise ConfigError(
            f"host is {settings.host!r}, which others can reach, and auth is 'none': anybody could spend your GPU. "
            "Give --auth keys and make a first key with: python -m serve keys create --name ME --scopes admin,generate"
        )
    if settings.webhook_secret is not None:
        webhooks.sign(settings.webhook_secret.get_secret_value(), "", 0, b"")


def build(settings: Settings, metrics: telemetry.Metrics | None = None) -> Built:
    """Open the store, load the models, start the engine. Blocks for as long as that takes.

    Raises ConfigError or ModelError for what cannot be used.
    """
    check(settings)
    metrics = metrics or telemetry.Metrics()
    with contextlib.ExitStack() as stack:
        store = open_store(settings)
        stack.callback(store.close)
        _check_keys(settings, store)
        folder = ImageFolder(settings.images, settings.images_options)
        folder.check()
        engine = start_engine(settings, watch.EngineMetrics(metrics))
        stack.callback(engine.close)
        watch.queues(metrics, engine)
        limiter = limits.RateLimiter(settings.limits_url)
        if settings.public_url is None and settings.host in ("0.0.0.0", "::"):
            log.warning("links in answers will name %s, which is no address; set public_url", public_url(settings))
        kept = pictures.Pictures(store, folder, public_url(settings))
        owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        service = Service(settings, engine, store, kept, limiter, metrics, owner)
        deliverer = _deliverer(settings, store, metrics)
        worker = Worker(service, deliverer)
        stack.pop_all()
        return Built(service, Jobs(service, worker), worker, folder, limiter, deliverer)


def open_store(settings: Settings) -> Store:
    """The store of the settings, with the key that they define, if any."""
    if settings.database_url is None:
        files.check_folder(settings.data_folder)
    store = Store(settings.database)
    if settings.admin_key is not None:
        store.ensure_key("admin", "admin of the settings", ["admin", "generate"], settings.admin_key.get_secret_value())
    else:
        store.revoke_key("admin")
    return store


def _check_keys(settings: Settings, store: Store) -> None:
    """Raises ConfigError where keys are asked for and none could make others."""
    where = f"--data-folder {settings.data_folder} " if settings.database_url is None else ""
    if settings.auth == "keys" and not any("admin" in key.scopes and key.prefix for key in store.list_keys()):
        raise ConfigError(
            "auth is 'keys' and there is no key of an admin; make one with: "
            f"python -m serve {where}keys create --name ME --scopes admin,generate"
        )


def start_engine(settings: Settings, observer: watch.EngineMetrics | None = None) -> engines.Engine:
    """Load both models and start the engine. On a CPU, one core is left to everything else."""
    torch.set_num_threads(settings.cpu_threads or max(1, len(os.sched_getaffinity(0)) - 1))
    pair = models.load_pair(settings.premium, settings.turbo, device=settings.device, precision=settings.precision)
    tiers: dict[str, TierSettings] = {"turbo": settings.turbo_tier, "premium": settings.premium_tier}
    engine = engines.Engine(
        pair,
        {name: limits_of(tier) for name, tier in tiers.items()},
        prompt_cache_bytes=int(settings.prompt_cache_mb * 1e6),
        encode_threads=settings.encode_threads,
        observer=observer,
    )
    try:
        engine.start()
    except BaseException:
        engine.close()
        raise
    return engine


def limits_of(tier: TierSettings) -> lanes.Limits:
    return lanes.Limits(
        max_batch=tier.max_batch,
        max_queued=tier.max_queued,
        max_wait_s=tier.max_wait_s,
        weight=tier.weight,
        batch_invariant=tier.batch_invariant,
    )


def public_url(settings: Settings) -> str:
    """Where clients reach the service."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return settings.public_url or f"http://{host}:{settings.port}"


def _deliverer(settings: Settings, store: Store, metrics: telemetry.Metrics) -> webhooks.Deliverer | None:
    if settings.webhook_secret is None:
        return None
    return webhooks.Deliverer(
        store,
        secret=settings.webhook_secret.get_secret_value(),
        allow_private=settings.webhook_allow_private,
        timeout_s=settings.webhook_timeout_s,
        most_attempts=settings.webhook_attempts,
        lease_s=settings.lease_s,
        count=lambda outcome: metrics.webhook_deliveries.labels(outcome).inc(),
    )
