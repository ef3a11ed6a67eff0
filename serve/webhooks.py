"""Signed webhooks: from an outbox to receivers on the public internet, so that no receiver can hold up anything.

Signatures are those of Standard Webhooks 1.0 (https://www.standardwebhooks.com), which has libraries to verify
them with. Delivery is at least once: `webhook-id` is the delivery's and stays the same over all attempts.

No redirect is followed and no proxy of the environment is used; where a webhook may go at all, `receivers` decides.
Knows no database and no engine: the outbox is a protocol of four short calls that block, made in threads.
"""

import asyncio
import base64
import binascii
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import hmac
import json
import logging
import random
import secrets
import socket
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

import httpcore

from diffusion_kd import errors
from serve import receivers

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, MOST_BACKOFF_S = 5.0, 6 * 3600.0
PER_RECEIVER = 2
"""Attempts under way at once to one host and port."""

_MOST_HELD, _CLAIM = 1000, 100
"""Deliveries claimed and not yet settled by one process; those claimed in one call."""

_MOST_ANSWER_BYTES = 16 * 1024
_SECRET_PREFIX = "whsec_"
_FEWEST_SECRET_BYTES, _MOST_SECRET_BYTES = 24, 64


class _AttemptFailed(Exception):
    """One attempt came to nothing. final: no use trying again."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class Delivery(Protocol):
    """One message to one receiver. attempts: claims so far, this one included. next_at: when it was due."""

    @property
    def id(self) -> str: ...
    @property
    def job_id(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def event(self) -> str: ...
    @property
    def payload(self) -> Mapping[str, Any]: ...
    @property
    def attempts(self) -> int: ...
    @property
    def next_at(self) -> datetime.datetime: ...


class Outbox(Protocol):
    """Where deliveries wait. Its methods block and are called from threads."""

    def claim_deliveries(self, owner: str, limit: int, lease_s: float, /) -> Sequence[Delivery]:
        """At most `limit` due deliveries, which nobody else is given for `lease_s` seconds."""
        ...

    def delivery_done(self, delivery_id: str, /) -> object: ...

    def retry_delivery(self, delivery_id: str, next_at: datetime.datetime, error: str, /) -> object: ...

    def fail_delivery(self, delivery_id: str, error: str, /) -> object: ...


# --- signatures -------------------------------------------------------------------------------------


def new_secret() -> str:
    """A fresh signing secret of 256 random bits, `whsec_<base64>`."""
    return _SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def sign(secret: str, message_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks for one attempt.

    secret: `whsec_<base64 of 24 to 64 bytes>`. timestamp_s: seconds since 1970, when the attempt is made.
    Raises ConfigError for a secret of another form.
    """
    signed = f"{message_id}.{timestamp_s}.".encode() + body
    signature = base64.b64encode(hmac.digest(_key(secret), signed, hashlib.sha256)).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(timestamp_s), "webhook-signature": f"v1,{signature}"}


def _key(secret: str) -> bytes:
    """The bytes behind a secret, which no message of ours repeats."""
    wanted = (
        f"{_SECRET_PREFIX} and the base64 of {_FEWEST_SECRET_BYTES} to {_MOST_SECRET_BYTES} random bytes; "
        f"make one with: echo {_SECRET_PREFIX}$(openssl rand -base64 32)"
    )
    try:
        if not secret.startswith(_SECRET_PREFIX):
            raise ValueError
        key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    except (ValueError, binascii.Error):
        raise errors.ConfigError(f"the webhook secret is not of the form {wanted}") from None
    if not _FEWEST_SECRET_BYTES <= len(key) <= _MOST_SECRET_BYTES:
        raise errors.ConfigError(f"the webhook secret holds {len(key)} bytes; it must be {wanted}")
    return key


# --- delivery ---------------------------------------------------------------------------------------


def backoff_s(attempts: int, jitter: float) -> float:
    """Seconds until the next attempt: 5, 15, 45..., at most 6 hours, less a part so that retries spread.

    attempts: made so far, 1 or more. jitter: in [0, 1]; 1 takes a fifth away.
    """
    return float(min(FIRST_BACKOFF_S * 3 ** min(attempts - 1, 20), MOST_BACKOFF_S) * (1 - 0.2 * jitter))


def body_of(delivery: Delivery) -> bytes:
    """What is sent, and signed: the payload as JSON in UTF-8, equal for every attempt."""
    return json.dumps(delivery.payload, ensure_ascii=False, separators=(",", ":")).encode()


@dataclasses.dataclass(slots=True)
class _Receiver:
    """A host and port. held: deliveries that are under way or wait for it. silent_until_s: on the loop's clock."""

    gate: asyncio.Semaphore = dataclasses.field(default_factory=lambda: asyncio.Semaphore(PER_RECEIVER))
    held: int = 0
    silent_until_s: float = 0.0


class Deliverer:
    """Sends what is due in an outbox, each delivery as its own task.

    secret: `whsec_<base64>`. allow_private: see `receivers.check_url`. timeout_s: of one attempt, from the resolution
    of the name to the end of the answer, however slowly it trickles. most_attempts: after them a delivery has failed.
    concurrency: attempts under way at once, of which one receiver gets `PER_RECEIVER`. lease_s: beside the time of four
    attempts, after which another process may send what this one has claimed and not sent. poll_s: between two looks at
    the outbox when nobody wakes it. count: told the outcome of each attempt, `delivered`, `retried` or `failed`.
    resolve, ssl_context: other than the system's resolver and the usual authorities; for closed networks and tests.
    Raises ConfigError for a malformed secret.

    When a receiver does not answer at all, deliveries that wait for it are put off with it rather than each waiting
    for a timeout of its own. When the run ends, attempts under way are dropped; their leases lapse and they are made
    again.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        secret: str,
        allow_private: bool = False,
        timeout_s: float = 10.0,
        most_attempts: int = 8,
        concurrency: int = 16,
        lease_s: float = 60.0,
        poll_s: float = 2.0,
        count: Callable[[str], object] | None = None,
        resolve: receivers.Resolve | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        errors.require(timeout_s > 0, "timeout_s", timeout_s, "above 0")
        errors.require(most_attempts >= 1, "most_attempts", most_attempts, "1 or more")
        errors.require(concurrency >= 1, "concurrency", concurrency, "1 or more")
        _key(secret)
        self._outbox, self._secret, self._allow_private = outbox, secret, allow_private
        self._timeout_s, self._most_attempts, self._poll_s = timeout_s, most_attempts, poll_s
        self._lease_s = lease_s + 4 * timeout_s
        self.owner = f"webhooks-{uuid.uuid4().hex}"
        self._count = count
        self._ssl_context = ssl_context or httpcore.default_ssl_context()
        # Lookups have threads of their own: a name server that does not answer must not fill those of everybody else.
        self._lookups = concurrent.futures.ThreadPoolExecutor(2 * concurrency, thread_name_prefix="webhook-lookup")
        self._connections = receivers.CheckedConnections(resolve or self._look_up, allow_private=allow_private)
        self._slots = asyncio.Semaphore(concurrency)
        self._woken = asyncio.Event()
        self._receivers: collections.defaultdict[str, _Receiver] = collections.defaultdict(_Receiver)
        self._held: dict[str, asyncio.Task[None]] = {}
        self._random = random.Random()

    def wake(self) -> None:
        """Look at the outbox at once. To be called in the event loop's thread."""
        self._woken.set()

    async def run(self) -> None:
        """Deliver until cancelled. Once only; an outbox that fails is logged and asked again."""
        try:
            while True:
                self._woken.clear()
                if await self._take() == _CLAIM:
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await self._woken.wait()
        finally:
            for task in self._held.values():
                task.cancel()
            await asyncio.gather(*self._held.values(), return_exceptions=True)
            self._lookups.shutdown(wait=False, cancel_futures=True)

    async def _take(self) -> int:
        """Claim what is due and start a task for each; how many were claimed."""
        room = min(_CLAIM, _MOST_HELD - len(self._held))
        if room <= 0:
            return 0
        try:
            claimed = await asyncio.to_thread(self._outbox.claim_deliveries, self.owner, room, self._lease_s)
        except Exception:  # a database that is away for a while must not end deliveries for good
            logger.exception("the outbox of webhooks cannot be read; asking again in %g s", self._poll_s)
            return 0
        leased_until_s = asyncio.get_running_loop().time() + self._lease_s
        for delivery in claimed:
            if delivery.id not in self._held:
                task = asyncio.create_task(self._settle(delivery, leased_until_s))
                self._held[delivery.id] = task
                task.add_done_callback(functools.partial(self._let_go, delivery.id))
        return len(claimed)

    def _let_go(self, delivery_id: str, _: asyncio.Task[None]) -> None:
        del self._held[delivery_id]

    async def _settle(self, delivery: Delivery, leased_until_s: float) -> None:
        """One attempt and what follows from it; raises nothing but cancellation."""
        try:
            target = receivers.target(delivery.url, allow_private=self._allow_private)
            async with self._turn(target.receiver) as receiver:
                # One that waited so long is somebody's again, perhaps ours.
                if asyncio.get_running_loop().time() + self._timeout_s < leased_until_s:
                    await self._attempt(delivery, target, receiver)
                    await self._delivered(delivery)
        except receivers.WebhookRefused as refusal:
            await self._failed(delivery, str(refusal), final=True)
        except _AttemptFailed as failure:
            await self._failed(delivery, str(failure), final=failure.final)
        except Exception:  # the lease lapses and it is tried again; the other deliveries go on
            logger.exception("webhook %s of job %s broke off", delivery.id, delivery.job_id)

    @contextlib.asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[_Receiver]:
        """Wait for one of the receiver's places, then for one of everybody's."""
        receiver = self._receivers[name]
        receiver.held += 1
        try:
            async with receiver.gate, self._slots:
                yield receiver
        finally:
            receiver.held -= 1
            if not receiver.held:
                self._receivers.pop(name, None)

    async def _attempt(self, delivery: Delivery, target: receivers.Target, receiver: _Receiver) -> None:
        """Send it once. Raises _AttemptFailed or receivers.WebhookRefused unless the receiver answered 2xx."""
        clock = asyncio.get_running_loop().time
        if clock() < receiver.silent_until_s:
            raise _AttemptFailed(f"{target.receiver} did not answer a moment ago")
        try:
            status = await self._post(delivery, target)
        except _AttemptFailed:
            receiver.silent_until_s = clock() + self._timeout_s
            raise
        if not 200 <= status < 300:
            advice = "; redirects are not followed" if 300 <= status < 400 else ""
            raise _AttemptFailed(f"{target.receiver} answered {status}{advice}", final=status == 410)

    async def _post(self, delivery: Delivery, target: receivers.Target) -> int:
        """The status of the answer. Raises _AttemptFailed where none came."""
        body = body_of(delivery)
        headers = sign(self._secret, delivery.id, int(time.time()), body) | {
            "host": target.receiver,
            "content-type": "application/json",
            "content-length": str(len(body)),
            "user-agent": "diffusion-kd-webhooks",
            "connection": "close",
        }
        url = httpcore.URL(scheme=target.scheme, host=target.host, port=target.port, target=target.path)
        request = httpcore.Request(
            "POST",
            url,
            headers=list(headers.items()),
            content=body,
            extensions={"timeout": {"connect": self._timeout_s}},
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(request)
        except TimeoutError:
            reason = f"{target.receiver} did not answer within {self._timeout_s:g} s"
        except (OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            reason = f"{target.receiver} gave no answer: {errors.first_line(error)}"
        raise _AttemptFailed(reason)

    async def _exchange(self, request: httpcore.Request) -> int:
        async with httpcore.AsyncHTTPConnection(
            request.url.origin, ssl_context=self._ssl_context, network_backend=self._connections
        ) as connection:
            response = await connection.handle_async_request(request)
            try:
                # A little of the answer is read, so that a receiver is not cut off in the middle of an "ok".
                read = 0
                async for chunk in response.aiter_stream():
                    read += len(chunk)
                    if read >= _MOST_ANSWER_BYTES:
                        break
            finally:
                await response.aclose()
            return response.status

    async def _look_up(self, host: str, port: int) -> Sequence[str]:
        look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._lookups, look_up)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    async def _delivered(self, delivery: Delivery) -> None:
        await asyncio.to_thread(self._outbox.delivery_done, delivery.id)
        self._tell("delivered")

    async def _failed(self, delivery: Delivery, reason: str, *, final: bool) -> None:
        """Put it off, or give it up."""
        try:
            if final or delivery.attempts >= self._most_attempts:
                await asyncio.to_thread(self._outbox.fail_delivery, delivery.id, reason)
                logger.warning(
                    "webhook %s of job %s is given up after attempt %d: %s",
                    *(delivery.id, delivery.job_id, delivery.attempts, reason),
                )
                self._tell("failed")
                return
            wait_s = backoff_s(delivery.attempts, self._random.random())
            next_at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=wait_s)
            await asyncio.to_thread(self._outbox.retry_delivery, delivery.id, next_at, reason)
            logger.info("webhook %s of job %s goes again in %.0f s: %s", delivery.id, delivery.job_id, wait_s, reason)
            self._tell("retried")
        except Exception:  # the lease lapses and it is tried again; the other deliveries go on
            logger.exception("what became of webhook %s could not be written down", delivery.id)

    def _tell(self, outcome: str) -> None:
        if self._count is not None:
            self._count(outcome)
