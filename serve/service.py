"""The service without HTTP: what routes and the worker of jobs call.

A request is planned (does the tier do what is asked?), let through (rate, budget), admitted by the engine or refused at
once, made, billed, and recorded before it is answered. Cancelling the task that waits frees the device.
"""

import asyncio
import collections
import contextlib
import dataclasses
import datetime
import functools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from serve import budgets, catalogue, costs, errors, evaluation, ledger, patience, pictures, schemas
from serve.catalogue import Plan
from serve.engine import engine as engines
from serve.engine import errors as engine_errors
from serve.engine.requests import OnPreview, Result, Ticket
from serve.limits import RateLimiter
from serve.settings import Settings
from serve.store import Store, records
from serve.telemetry import Metrics

log = logging.getLogger(__name__)

_LATENCIES_KEPT = 1000
_POLL_S = 1.0
_SETTLED_S = 0.01
LARGE = 1_000_000
"""Bytes of images that take the event loop too long to encode: some milliseconds."""

T = TypeVar("T")
OWN_KEYS = ("anonymous", "admin")
"""Ids of the keys that the settings make."""
Event = schemas.PartialImageEvent | schemas.CompletedEvent


@dataclasses.dataclass(frozen=True, slots=True)
class Bill:
    """Seconds of the device, and their cost. premium_nanousd: what the premium tier would have cost."""

    device_s: float
    nanousd: int
    premium_nanousd: int


class Service:
    """Everything behind the routes. owner: this process among those that share the store."""

    def __init__(
        self,
        settings: Settings,
        engine: engines.Engine,
        store: Store,
        pictures_of_store: pictures.Pictures,
        limiter: RateLimiter,
        metrics: Metrics,
        owner: str,
    ) -> None:
        self.settings, self.engine, self.store, self.metrics, self.owner = settings, engine, store, metrics, owner
        self.catalogue = catalogue.Catalogue(engine.models, settings)
        self.pictures = pictures_of_store
        self.price = costs.Price(settings.price_per_gpu_hour_usd)
        self._claims: dict[tuple[str, str], asyncio.Event] = {}
        self._unsettled = 0
        self.budgets, self.ledger = budgets.Budgets(store), ledger.Ledger(store)
        self.limiter = limiter
        self.latencies_s = {tier: collections.deque[float](maxlen=_LATENCIES_KEPT) for tier in engine.models}
        self.evaluation = evaluation.find(engine.models["turbo"], settings.turbo_report)
        self._anonymous = store.ensure_key(OWN_KEYS[0], "anonymous", ["generate", "admin"], None)

    async def authenticate(self, secret: str | None) -> records.Key:
        """Whose request it is. Raises Unauthorized where keys are asked for and this is none."""
        if self.settings.auth == "none":
            return self._anonymous
        if secret is None:
            raise errors.Unauthorized("no API key; send one as Authorization: Bearer dkd_...", code="missing_api_key")
        key = await asyncio.to_thread(self.store.find_key, secret)
        if key is None:
            raise errors.Unauthorized("the API key is not known, or was revoked")
        return key

    # --- making images ------------------------------------------------------------------------------

    async def generate(
        self, key: records.Key, body: schemas.GenerationBody, idempotency_key: str | None = None
    ) -> schemas.ImagesOut:
        """Images of a body. Raises ServiceError; cancelled, it frees the device within one step."""
        plan = self.catalogue.plan(body, key.id)
        await self.check_rate(key)
        async with self.once(key, idempotency_key, "images", body) as first:
            if first.answer is not None:
                return await self.render(first.answer)
            async with (
                self.admitted(key, plan) as (plan, ticket),
                self._making(key, plan, ticket, first) as made,
            ):
                files = await asyncio.shield(made)
            return await self.render(first.known, files=files)

    async def stream(
        self, key: records.Key, body: schemas.GenerationBody, idempotency_key: str | None = None
    ) -> AsyncGenerator[Event | None]:
        """None once the request is admitted, its previews as they come, and each image at the end."""
        plan = self.catalogue.plan(body, key.id)
        await self.check_rate(key)
        loop, waiting = asyncio.get_running_loop(), asyncio.Queue[schemas.PartialImageEvent | None]()

        def on_preview(index: int, number: int, file: bytes) -> None:
            loop.call_soon_threadsafe(waiting.put_nowait, _partial(plan, index, number, file))

        async with self.once(key, idempotency_key, "images", body) as first:
            files: Sequence[bytes] | None = None
            if first.answer is not None:
                yield None
            else:
                async with (
                    self.admitted(key, plan, on_preview) as (plan, ticket),
                    self._making(key, plan, ticket, first) as made,
                ):
                    made.add_done_callback(lambda _: waiting.put_nowait(None))
                    yield None
                    while (partial := await waiting.get()) is not None:
                        yield partial
                    files = await asyncio.shield(made)
            answer = await self.render(first.known, files=files)
        for event in _completed(answer):
            yield event

    @contextlib.asynccontextmanager
    async def _making(
        self, key: records.Key, plan: Plan, ticket: Ticket, first: "First"
    ) -> AsyncIterator[asyncio.Task[Sequence[bytes]]]:
        """The files of an admitted request, to be awaited with a shield; its answer is left in `first`.

        From the moment that it is made, it is recorded to the end, whether or not the client still listens or has read
        what came before: a repeat finds the answer.
        """
        made = asyncio.create_task(self._made(key, plan, ticket, first))
        try:
            yield made
        finally:
            if ticket.over:
                await asyncio.gather(made, return_exceptions=True)
            else:
                made.cancel()

    async def _made(self, key: records.Key, plan: Plan, ticket: Ticket, first: "First") -> Sequence[bytes]:
        result = await self.outcome(ticket)
        return await _to_the_end(self._settle(key, plan, result, first))

    async def _settle(self, key: records.Key, plan: Plan, result: Result, first: "First") -> Sequence[bytes]:
        bill, images = self.bill(plan, result), list[records.Image]()
        if (keep_s := self._keep_s(first, plan.body)) is not None:
            images = [self.pictures.record(key.id, plan.request.encoding.format, keep_s) for _ in result.files]
            try:
                await asyncio.to_thread(self.pictures.keep, images, result.files)
            except OSError as error:
                log.error("images cannot be kept: %s", error)
                raise pictures.unavailable() from None
        await self.ledger.record(self.usage(key, plan, bill))
        self.count_cost(plan, bill)
        first.answer = self.answer(plan, result, bill, images)
        return result.files

    def _keep_s(self, first: "First", body: schemas.GenerationBody) -> float | None:
        """How long the images of an answer are kept; None: not at all. One that may be asked for again keeps them."""
        if first.repeatable:
            return max(self.settings.image_ttl_s, self.settings.idempotency_ttl_s)
        return self.settings.image_ttl_s if body.response_format == "url" else None

    @contextlib.asynccontextmanager
    async def admitted(
        self, key: records.Key, plan: Plan, on_preview: OnPreview | None = None, *, charged: bool = True
    ) -> AsyncIterator[tuple[Plan, Ticket]]:
        """A request in the engine, for the time of the block; it is cancelled if the block ends before it is made.

        Yields the plan that is carried out, which may be turbo's, and its ticket. charged: for what a request has taken
        when it is cancelled; else half a bill would be a way to use the device for nothing.
        """
        async with self.budgets.held(key, self.predicted_nanousd(plan)):
            plan, ticket = self._submit(plan, on_preview)
            try:
                yield plan, ticket
            finally:
                unmade = not ticket.over
                ticket.cancel()
                if charged and unmade:
                    await _to_the_end(self.charge_unmade(key, plan, ticket))

    async def charge_unmade(self, key: records.Key, plan: Plan, ticket: Ticket) -> None:
        """What a request had taken when it was taken back: compute without images."""
        if (device_s := ticket.taken.device_s) > 0:
            cost = self.price.nanousd(device_s)
            bill = Bill(device_s, cost, cost)
            await self.ledger.record(dataclasses.replace(self.usage(key, plan, bill), images=0))
            self.count_cost(plan, bill)

    def _submit(self, plan: Plan, on_preview: OnPreview | None) -> tuple[Plan, Ticket]:
        try:
            return plan, self.engine.submit(plan.request, on_preview)
        except engine_errors.Draining as error:
            raise errors.Overloaded(str(error), code="draining", retry_after_s=error.retry_after_s) from None
        except engine_errors.Busy as error:
            if (lower := self.catalogue.downgrade(plan)) is None:
                raise errors.Overloaded(str(error), retry_after_s=error.retry_after_s) from None
            return self._submit(lower, on_preview)

    async def outcome(self, ticket: Ticket) -> Result:
        """What the engine made. Raises Internal, or Overloaded where the service closed first."""
        try:
            result = await asyncio.wrap_future(ticket.future)
        except engine_errors.Cancelled:
            raise errors.Overloaded(
                "the service closed before the images were made; send the request again",
                code="draining",
                retry_after_s=1,
            ) from None
        except engine_errors.Failed as error:
            raise errors.Internal(str(error), code=_code(error)) from None
        self.latencies_s[ticket.request.tier].append(time.monotonic() - ticket.submitted_s)
        self.metrics.images.labels(ticket.request.tier).inc(len(result.files))
        return result

    async def check_rate(self, key: records.Key) -> None:
        wait_s = await self.limiter.take(key.id, key.requests_per_minute)
        if wait_s is not None:
            raise errors.RateLimited(
                f"the key may send {key.requests_per_minute} requests a minute; try again in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )

    # --- what it costs ------------------------------------------------------------------------------

    def predicted_nanousd(self, plan: Plan) -> int:
        """What a plan will cost, as the last requests are measured."""
        request = plan.request
        image_s = self.engine.predicted_device_s(request.tier, request.steps, guided=request.guided)
        return self.price.nanousd(image_s * len(request.seeds))

    def image_nanousd(self, tier: str) -> int:
        """What an image of a tier costs at its defaults, as the last requests are measured."""
        known = self.catalogue.tiers[tier]
        guided = known.default_guidance_scale > 1
        return self.price.nanousd(self.engine.predicted_device_s(tier, known.default_steps, guided=guided))

    def bill(self, plan: Plan, result: Result) -> Bill:
        device_s = result.compute.device_s
        cost = self.price.nanousd(device_s)
        if plan.tier == "premium":
            return Bill(device_s, cost, cost)
        return Bill(device_s, cost, self.image_nanousd("premium") * len(result.files))

    def usage(self, key: records.Key, plan: Plan, bill: Bill) -> records.Usage:
        """What is recorded of a request."""
        return records.Usage(
            key_id=key.id,
            tier=plan.tier,
            images=len(plan.request.seeds),
            compute_ms=1000 * bill.device_s,
            cost_nanousd=bill.nanousd,
            premium_cost_nanousd=bill.premium_nanousd,
            at=datetime.datetime.now(datetime.UTC),
        )

    def count_cost(self, plan: Plan, bill: Bill) -> None:
        self.metrics.cost_usd.labels(plan.tier).inc(costs.to_usd(bill.nanousd))

    # --- answers ------------------------------------------------------------------------------------

    def answer(self, plan: Plan, result: Result, bill: Bill, images: Sequence[records.Image]) -> dict[str, Any]:
        """An answer as it is stored: its images by id, where they are kept."""
        ids: Sequence[str | None] = [image.id for image in images] if images else [None] * len(result.files)
        compute = {
            name: round(1000 * getattr(result.compute, f"{name}_s"), 3) for name in schemas.ComputeMs.model_fields
        }
        return {
            "created": int(time.time()),
            "images": [{"id": one, "seed": seed} for one, seed in zip(ids, plan.request.seeds, strict=True)],
            "response_format": plan.body.response_format,
            "model": plan.tier,
            "model_version": plan.model_version,
            "size": plan.size,
            "output_format": plan.body.output_format,
            "usage": {
                "compute_ms": compute,
                "cost_usd": costs.to_usd(bill.nanousd),
                "premium_cost_usd": costs.to_usd(bill.premium_nanousd),
            },
            "warnings": list(plan.warnings),
            "downgraded_from": plan.downgraded_from,
        }

    async def render(
        self, answer: dict[str, Any], *, files: Sequence[bytes] | None = None, links_only: bool = False
    ) -> schemas.ImagesOut:
        """An answer as it is sent. files: its images, if they are at hand; else they are read.

        links_only: by their URL, however they were asked for; null for one that has expired.
        Raises NotFound for an image that has expired.
        """
        ids, seeds = zip(*((image["id"], image["seed"]) for image in answer["images"]), strict=True)
        if links_only or answer["response_format"] == "url":
            urls = await asyncio.to_thread(self.pictures.urls, ids)
            data = [schemas.ImageOut(url=url, seed=seed) for url, seed in zip(urls, seeds, strict=True)]
        else:
            read = await asyncio.to_thread(self.pictures.read_all, ids) if files is None else files
            data = await in_thread_if(sum(map(len, read)) > LARGE, functools.partial(_inline, read, seeds))
        known = {name: value for name, value in answer.items() if name not in ("images", "response_format")}
        return schemas.ImagesOut(data=data, **known)

    # --- once --------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def once(
        self, key: records.Key, idempotency_key: str | None, kind: str, body: schemas.GenerationBody
    ) -> AsyncIterator["First"]:
        """The first of all requests with this key works in the block and leaves its answer; the others are given it.

        idempotency_key: None: every request is the first. kind: what is asked for; images and jobs are different
        requests. A request that fails is forgotten, so that it can be sent again. Raises Conflict for another body or
        kind.
        """
        self._unsettled += 1
        try:
            async with self._once(key, idempotency_key, kind, body) as first:
                yield first
        finally:
            self._unsettled -= 1

    async def settle(self, timeout_s: float) -> None:
        """Wait until all that has begun is recorded, also for those who have left. A store that is away prevents it."""
        until_s = time.monotonic() + timeout_s
        while self._unsettled and time.monotonic() < until_s:
            await asyncio.sleep(_SETTLED_S)
        if self._unsettled:
            log.error("the service ends before %d requests are recorded", self._unsettled)

    @contextlib.asynccontextmanager
    async def _once(
        self, key: records.Key, idempotency_key: str | None, kind: str, body: schemas.GenerationBody
    ) -> AsyncIterator["First"]:
        if idempotency_key is None:
            yield First(None, repeatable=False)
            return
        claim, fingerprint = (key.id, idempotency_key), schemas.fingerprint(kind, body)
        while (found := await self._claim(*claim, fingerprint)).state == "running":
            settled = self._claims.get(claim, asyncio.Event())  # another process that works on it tells nobody
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(settled.wait(), _POLL_S)
        if found.state == "conflict":
            raise errors.Conflict("this Idempotency-Key was used for another request; use a new one")
        first = First(found.answer)
        if found.state == "done":
            yield first
            return
        settled = self._claims[claim] = asyncio.Event()
        try:
            yield first
        finally:
            settle: Callable[[], object] = functools.partial(self.store.forget_idempotent, *claim, self.owner)
            if first.answer is not None:
                settle = functools.partial(self.store.complete_idempotent, *claim, self.owner, first.answer)
            await _to_the_end(patience.patiently(settle))  # whether or not the client still listens
            del self._claims[claim]
            settled.set()

    async def _claim(self, key_id: str, idempotency_key: str, fingerprint: str) -> records.Idempotent:
        """Ask whether to do the work. Cancelled, it gives back what the database may yet give it."""
        asked = asyncio.ensure_future(
            asyncio.to_thread(
                self.store.begin_idempotent,
                key_id,
                idempotency_key,
                fingerprint,
                self.owner,
                self.settings.lease_s,
                self.settings.idempotency_ttl_s,
            )
        )
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            await asyncio.shield(self._give_back(asked, key_id, idempotency_key))
            raise

    async def _give_back(self, asked: asyncio.Future[records.Idempotent], key_id: str, idempotency_key: str) -> None:
        if (await asked).state == "new":
            await asyncio.to_thread(self.store.forget_idempotent, key_id, idempotency_key, self.owner)


@dataclasses.dataclass(slots=True)
class First:
    """answer: of the first request; None: it is this one. repeatable: others may come and want it."""

    answer: dict[str, Any] | None
    repeatable: bool = True

    @property
    def known(self) -> dict[str, Any]:
        """The answer, once there is one."""
        assert self.answer is not None, "the request was made"
        return self.answer


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """`work` is done to its end even if who waits for it is cancelled, which then takes effect."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


async def in_thread_if(large: bool, work: Callable[[], T]) -> T:
    """What is large keeps a thread busy, and not the event loop."""
    return await asyncio.to_thread(work) if large else work()


def _code(error: engine_errors.Failed) -> str:
    if isinstance(error, engine_errors.OutOfMemory):
        return "out_of_memory"
    return "not_finite" if isinstance(error, engine_errors.NotFinite) else "generation_failed"


def _partial(plan: Plan, index: int, number: int, file: bytes) -> schemas.PartialImageEvent:
    return schemas.PartialImageEvent(
        b64_json=schemas.to_base64(file),
        partial_image_index=number,
        image_index=index,
        created_at=int(time.time()),
        size=plan.size,
        output_format=plan.body.output_format,
    )


def _inline(files: Sequence[bytes], seeds: Sequence[int]) -> list[schemas.ImageOut]:
    return [
        schemas.ImageOut(b64_json=schemas.to_base64(file), seed=seed) for file, seed in zip(files, seeds, strict=True)
    ]


def _completed(answer: schemas.ImagesOut) -> list[schemas.CompletedEvent]:
    return [
        schemas.CompletedEvent(
            b64_json=image.b64_json or "",
            image_index=index,
            seed=image.seed,
            created_at=answer.created,
            **answer.model_dump(exclude={"created", "data"}),
        )
        for index, image in enumerate(answer.data)
    ]
