"""What the store gives and takes. Times are aware and UTC; money is whole nano-dollars (1e-9 USD)."""

import dataclasses
import datetime
from typing import Any, Literal

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FinalStatus = Literal["succeeded", "failed", "cancelled"]
Side = Literal["left", "right"]
Choice = Literal["left", "right", "neither"]
Winner = Literal["turbo", "premium", "neither"]
Cancelled = Literal["cancelled", "cancellation_requested", "already_finished"]


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """An API key, without its secret.

    prefix: the secret's first characters, for people to tell keys apart.
    requests_per_minute, monthly_budget_nanousd: None means no limit.
    """

    id: str
    name: str
    prefix: str
    scopes: frozenset[str]
    requests_per_minute: int | None
    monthly_budget_nanousd: int | None
    created_at: datetime.datetime
    revoked_at: datetime.datetime | None


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    """What one request or job took. premium_cost_nanousd: what the premium tier would have cost."""

    key_id: str
    tier: str
    images: int
    compute_ms: float
    cost_nanousd: int
    premium_cost_nanousd: int
    at: datetime.datetime


@dataclasses.dataclass(frozen=True, slots=True)
class UsageDay:
    """The sums of one key, UTC day and tier."""

    day: datetime.date
    tier: str
    requests: int
    images: int
    compute_ms: float
    cost_nanousd: int
    premium_cost_nanousd: int


@dataclasses.dataclass(frozen=True, slots=True)
class Idempotent:
    """Where a request with an idempotency key stands.

    new: the caller does the work and then completes or forgets it. running: somebody is at it.
    done: `answer` is the first one. conflict: the key came with another body.
    """

    state: Literal["new", "running", "done", "conflict"]
    answer: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """Asynchronous work.

    started_at: of the latest attempt. attempts: how often it was claimed, without those that were given back.
    answer: of a succeeded one. error: of a failed one.
    """

    id: str
    key_id: str
    status: JobStatus
    request: dict[str, Any]
    webhook_url: str | None
    created_at: datetime.datetime
    started_at: datetime.datetime | None
    finished_at: datetime.datetime | None
    attempts: int
    answer: dict[str, Any] | None
    error: dict[str, Any] | None
    cancel_requested: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook message to send. attempts: with the present one. next_at: when it was due."""

    id: str
    job_id: str
    url: str
    event: str
    payload: dict[str, Any]
    attempts: int
    next_at: datetime.datetime


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """A stored picture. path: its name in the ImageFolder. job_id: None for a picture of no job, or of a swept one."""

    id: str
    key_id: str
    job_id: str | None
    path: str
    media_type: str
    created_at: datetime.datetime
    expires_at: datetime.datetime


@dataclasses.dataclass(frozen=True, slots=True)
class Vote:
    """Which of two pictures of one prompt and seed somebody liked better, not knowing which was whose.

    id: of the pair that was shown, made by the service. voter: who, as far as a browser tells; of 1 to 64 characters.
    turbo_side: where turbo's picture was. guidance_scale: of premium; turbo has none.
    """

    id: str
    key_id: str
    voter: str
    at: datetime.datetime
    prompt: str
    seed: int
    turbo_version: str
    premium_version: str
    turbo_steps: int
    premium_steps: int
    guidance_scale: float
    turbo_side: Side
    choice: Choice

    @property
    def winner(self) -> Winner:
        if self.choice == "neither":
            return "neither"
        return "turbo" if self.choice == self.turbo_side else "premium"


@dataclasses.dataclass(frozen=True, slots=True)
class Swept:
    """How many rows of each kind a sweep deleted."""

    images: int
    jobs: int
    idempotency: int
    deliveries: int
