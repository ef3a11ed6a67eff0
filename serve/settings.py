"""Everything that can be set of the service: `DIFFUSION_KD_...` in the environment, or an option of `python -m serve`.

The only module of `serve` that reads the environment. Sums are in US dollars, times in seconds, sizes in pixels.
"""

import ipaddress
import os
import pathlib
from typing import Annotated, Any, Literal

import pydantic
import pydantic_settings

_PREFIX, _OF_TESTS = "DIFFUSION_KD_", "DIFFUSION_KD_TEST_"

Positive = Annotated[float, pydantic.Field(gt=0, le=1e9, allow_inf_nan=False)]
Named = Annotated[str, pydantic.Field(min_length=1)]
Count = Annotated[int, pydantic.Field(ge=1)]
Size = Annotated[str, pydantic.Field(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]


class TierSettings(pydantic.BaseModel):
    """Limits of one tier.

    max_batch: images that share a pass. max_queued: images that may wait. max_wait_s: a request whose predicted wait is
    longer is refused at once. weight: share of the device while both tiers are busy. sizes: WIDTHxHEIGHT in pixels;
    empty: what the model was made for. aliases: further names of the tier. batch_invariant: no two images share a call
    of a network, so that an image is the same byte for byte whatever else runs; slower.
    """

    model_config = pydantic.ConfigDict(extra="forbid")

    max_batch: Count = 8
    max_queued: Count = 64
    max_wait_s: Positive = 60.0
    weight: Positive = 1.0
    sizes: tuple[Size, ...] = ()
    aliases: tuple[str, ...] = ()
    batch_invariant: bool = False


class TurboSettings(TierSettings):
    """default_steps: 0 is the fewest that the student was trained for."""

    max_wait_s: Positive = 10.0
    weight: Positive = 4.0
    default_steps: Annotated[int, pydantic.Field(ge=0, le=100)] = 0


class PremiumSettings(TierSettings):
    """default_steps, default_guidance_scale: of requests that name none. Guidance 1 is none."""

    default_steps: Annotated[int, pydantic.Field(ge=1, le=100)] = 50
    default_guidance_scale: Annotated[float, pydantic.Field(ge=1, le=30)] | None = None


class Settings(pydantic_settings.BaseSettings):
    """The service's settings; docs/operations.md has the table.

    In the environment, tiers are nested with two underscores: `DIFFUSION_KD_TURBO_TIER__MAX_BATCH=16`.
    """

    model_config = pydantic_settings.SettingsConfigDict(env_prefix=_PREFIX, env_nested_delimiter="__", extra="forbid")

    host: Named = "127.0.0.1"
    port: Annotated[int, pydantic.Field(ge=0, le=65535)] = 8000
    public_url: str | None = None
    auth: Literal["none", "keys"] = "none"
    admin_key: Annotated[pydantic.SecretStr, pydantic.Field(min_length=16)] | None = None

    premium: Named = "shapes-teacher"
    turbo: Named = "shapes-student"
    turbo_report: pathlib.Path | None = None
    device: Named = "auto"
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    turbo_tier: TurboSettings = TurboSettings()
    premium_tier: PremiumSettings = PremiumSettings()
    cpu_threads: Annotated[int, pydantic.Field(ge=0, le=1024)] = 0
    prompt_cache_mb: Annotated[float, pydantic.Field(ge=0)] = 256.0
    encode_threads: Count = 2

    data_folder: pathlib.Path = pathlib.Path("runs/service")
    database_url: str | None = None
    images_url: str | None = None
    s3_endpoint_url: str | None = None
    s3_public_endpoint_url: str | None = None
    s3_access_key: str | None = None
    s3_secret_key: pydantic.SecretStr | None = None
    limits_url: Named = "memory://"

    price_per_gpu_hour_usd: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 2.50
    max_body_mb: Positive = 1.0
    body_timeout_s: Positive = 10.0
    header_timeout_s: Positive = 10.0
    max_connections: Count = 1000
    drain_s: Positive = 30.0

    max_queued_jobs: Count = 10_000
    job_concurrency: Count = 16
    job_attempts: Count = 10
    lease_s: Positive = 30.0
    image_ttl_s: Positive = 3600.0
    job_ttl_s: Positive = 7 * 86400.0
    idempotency_ttl_s: Positive = 86400.0
    sweep_every_s: Positive = 60.0

    webhook_secret: pydantic.SecretStr | None = None
    webhook_allow_private: bool = False
    webhook_timeout_s: Positive = 10.0
    webhook_attempts: Count = 8

    playground: Literal["auto", "on", "off"] = "auto"
    runs_folder: pathlib.Path = pathlib.Path("runs")

    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: str | None = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.data_folder.absolute() / 'service.db'}"

    @property
    def images(self) -> str:
        return self.images_url or str(self.data_folder.absolute() / "images")

    @property
    def images_options(self) -> dict[str, Any]:
        """What fsspec's S3 needs besides the URL; what is not set comes from the usual places of AWS."""
        if not self.images.startswith("s3://"):
            return {}
        secret = self.s3_secret_key.get_secret_value() if self.s3_secret_key else None
        return {
            "endpoint_url": self.s3_endpoint_url,
            "public_endpoint_url": self.s3_public_endpoint_url,
            "key": self.s3_access_key,
            "secret": secret,
        }


def unknown_variables() -> list[str]:
    """Of the environment: those that look like settings of ours and are none."""
    ours = [name.upper() for name in os.environ if name.upper().startswith(_PREFIX)]
    known = {f"{_PREFIX}{field}".upper() for field in Settings.model_fields}
    return sorted(name for name in ours if name.split("__")[0] not in known and not name.startswith(_OF_TESTS))
