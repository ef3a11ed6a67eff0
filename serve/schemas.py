"""What travels over HTTP: OpenAI's Images API, and documented extensions of it."""

import base64
import hashlib
import json
from typing import Annotated, Any, Literal

import pydantic
import pydantic_core
from pydantic import Field

MOST_SEED = 2**32 - 1
PROMPT_CHARACTERS = 4000
Usd = Annotated[float, Field(ge=0, allow_inf_nan=False, description="US dollars")]
Milliseconds = Annotated[float, Field(ge=0)]


class _Body(pydantic.BaseModel):
    """Unknown fields are refused: what cannot be honoured is never accepted and ignored."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, given: Any) -> Any:
        """7.0 is a whole number, as JSON has it."""
        if not isinstance(given, dict):
            return given
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in given.items()
        }


class GenerationBody(_Body):
    """A request for images. Fields from `seed` on are extensions of OpenAI's API."""

    model: Annotated[str, Field(min_length=1, max_length=200, description="turbo, premium, or an alias")] = "turbo"
    prompt: Annotated[str, Field(min_length=1, max_length=PROMPT_CHARACTERS)]
    n: Annotated[int, Field(ge=1, le=10, description="image i uses seed + i")] = 1
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="quality of jpeg and webp; png takes none")
    ] = None
    stream: Annotated[bool, Field(description="server-sent events")] = False
    partial_images: Annotated[int, Field(ge=0, le=3, description="previews; needs stream, and more steps")] = 0
    user: Annotated[str | None, Field(max_length=200, description="kept in the job record")] = None
    seed: Annotated[int | None, Field(ge=0, le=MOST_SEED, description="drawn where absent, always returned")] = None
    num_inference_steps: Annotated[
        int | None, Field(ge=1, le=100, description="turbo: one of the student's counts")
    ] = None
    guidance_scale: Annotated[
        float | None, Field(ge=0, le=30, allow_inf_nan=False, description="premium only; 1 or less is none")
    ] = None
    negative_prompt: Annotated[str | None, Field(max_length=PROMPT_CHARACTERS, description="premium only")] = None
    allow_downgrade: Annotated[bool, Field(description="premium only: turbo may serve it under load")] = False

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        """As in OpenAI's API, null is as good as nothing."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: pydantic_core.CoreSchema, handler: pydantic.GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Says so in the reference."""
        document = handler.resolve_ref_schema(handler(schema))
        for name, field in document["properties"].items():
            if name not in document["required"] and "anyOf" not in field:
                about = {part: field.pop(part) for part in ("title", "description", "default") if part in field}
                document["properties"][name] = {"anyOf": [field, {"type": "null"}], **about}
        return document


class JobBody(GenerationBody):
    """As `GenerationBody`, without streaming."""

    webhook_url: Annotated[
        str | None, Field(min_length=1, max_length=2000, description="told, signed, when the job ends")
    ] = None


class ComputeMs(pydantic.BaseModel):
    """Milliseconds of the device by stage (the share of each shared pass), of encoding, and of waiting."""

    text: Milliseconds
    denoise: Milliseconds
    decode: Milliseconds
    encode: Milliseconds
    queue: Milliseconds


class UsageOut(pydantic.BaseModel):
    """premium_cost_usd: what the premium tier would have cost, at its default steps."""

    compute_ms: ComputeMs
    cost_usd: Usd
    premium_cost_usd: Usd


class ImageOut(pydantic.BaseModel):
    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesOut(pydantic.BaseModel):
    """downgraded_from: the tier that was asked for, where another one served."""

    created: int
    data: list[ImageOut]
    model: str
    model_version: str
    size: str
    output_format: str
    usage: UsageOut
    warnings: list[str]
    downgraded_from: str | None = None


class PartialImageEvent(pydantic.BaseModel):
    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    partial_image_index: int
    image_index: int
    created_at: int
    size: str
    output_format: str


class CompletedEvent(pydantic.BaseModel):
    """usage: of the whole request, on each of its images."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: str
    image_index: int
    seed: int
    created_at: int
    size: str
    output_format: str
    model: str
    model_version: str
    usage: UsageOut
    warnings: list[str]
    downgraded_from: str | None = None


JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class ErrorBody(pydantic.BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorOut(pydantic.BaseModel):
    error: ErrorBody


class JobOut(pydantic.BaseModel):
    """result: of a job that succeeded; in lists, images are given by their URL. error: of one that failed."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    created_at: int
    started_at: int | None
    finished_at: int | None
    attempts: int
    request: dict[str, Any]
    webhook_url: str | None
    result: ImagesOut | None
    error: ErrorBody | None


class JobsOut(pydantic.BaseModel):
    """after: what to pass on for the next page; None on the last one."""

    object: Literal["list"] = "list"
    data: list[JobOut]
    has_more: bool
    after: str | None


class CancelOut(pydantic.BaseModel):
    id: str
    outcome: Literal["cancelled", "cancellation_requested", "already_finished"]


class LatencyOut(pydantic.BaseModel):
    """Of the requests since the start, at most the last 1,000: from arrival to the last image."""

    requests: int
    p50_ms: float
    p99_ms: float


class EvaluationOut(pydantic.BaseModel):
    """Of the artifact that is served, from its report. steps: step count -> verdict."""

    verdict: str
    protocol: str
    steps: dict[str, str]
    report: str


class ModelOut(pydantic.BaseModel):
    """steps: what num_inference_steps may be, each or from the first to the last (`steps_are_a_range`)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "diffusion-kd"
    version: str
    aliases: list[str]
    sizes: list[str]
    steps: list[int]
    steps_are_a_range: bool
    default_steps: int
    default_guidance_scale: float | None
    max_batch: int
    max_queued: int
    max_wait_s: float
    queued: int
    latency: LatencyOut | None
    price_per_gpu_hour_usd: Usd
    image_cost_usd: Annotated[float, Field(ge=0, description="of one image at the defaults, as last measured")]
    evaluation: EvaluationOut | None


class ModelsOut(pydantic.BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelOut]


class UsageSums(pydantic.BaseModel):
    requests: int
    images: int
    compute_ms: Milliseconds
    cost_usd: Usd
    premium_cost_usd: Usd


class UsageDayOut(UsageSums):
    day: str
    tier: str


class UsageReport(pydantic.BaseModel):
    """Of the caller's key, by UTC day and tier; since and until are both counted in."""

    object: Literal["usage"] = "usage"
    since: str
    until: str
    total: UsageSums
    data: list[UsageDayOut]


Scope = Literal["generate", "admin"]


class KeyBody(_Body):
    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=2)] = ["generate"]
    requests_per_minute: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    monthly_budget_usd: Annotated[float | None, Field(ge=0, le=1_000_000_000, allow_inf_nan=False)] = None


class KeyOut(pydantic.BaseModel):
    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    prefix: str
    scopes: list[Scope]
    requests_per_minute: int | None
    monthly_budget_usd: float | None
    created_at: int
    revoked_at: int | None


class NewKeyOut(KeyOut):
    """secret: shown this once."""

    secret: str


class KeysOut(pydantic.BaseModel):
    object: Literal["list"] = "list"
    data: list[KeyOut]


class RevokedOut(pydantic.BaseModel):
    id: str
    revoked: bool


class HealthOut(pydantic.BaseModel):
    """checks: name -> "ok", or what is wrong."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, str]


def to_base64(file: bytes) -> str:
    return base64.b64encode(file).decode("ascii")


def fingerprint(kind: str, body: GenerationBody) -> str:
    """The same for the same request."""
    content = json.dumps([kind, body.model_dump(mode="json")], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
