"""What each tier can do, and what a request asks of it: bodies in, `Plan`s out, or the field that does not fit."""

import copy
import dataclasses
import secrets
from collections.abc import Mapping, Sequence

from diffusion_kd.errors import ConfigError
from serve import errors, schemas
from serve.engine.encoding import Encoding
from serve.engine.models import Model
from serve.engine.requests import ImageRequest
from serve.settings import PremiumSettings, Settings, TierSettings, TurboSettings

MOST_TEACHER_STEPS = 100
_MARKS = 2
"""Tokens that every prompt has: its beginning and its end."""

_SDXL_GUIDANCE = 5.0
# What its students are judged against; the small domain needs less than SDXL.
_SHAPES_GUIDANCE = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A checked request. downgraded_from: the tier that was asked for, where another serves."""

    body: schemas.GenerationBody
    request: ImageRequest
    model_version: str
    warnings: tuple[str, ...]
    downgraded_from: str | None = None

    @property
    def tier(self) -> str:
        return self.request.tier

    @property
    def size(self) -> str:
        width, height = self.request.size_px
        return f"{width}x{height}"


class Tier:
    """One tier: its model and its settings, made one."""

    def __init__(self, name: str, model: Model, settings: TierSettings) -> None:
        self.name, self.model, self.settings = name, model, settings
        native = model.parts.size_px
        self.sizes = [_size_px(size) for size in settings.sizes] or [(native, native)]
        for width, height in self.sizes:
            least = _multiple_px(model)
            if width % least or height % least:
                raise ConfigError(
                    f"the {name} tier cannot make {width}x{height}: its model makes multiples of {least} px"
                )
        self.is_student = model.timesteps is not None
        self.steps = sorted(model.timesteps or range(1, MOST_TEACHER_STEPS + 1))
        self.default_steps = _default_steps(settings, self.steps)
        self.default_guidance_scale = _default_guidance(settings, model)
        # Copies: a tokenizer must not be used by two threads, and the engine uses its own.
        self._tokenizers = copy.deepcopy(model.parts.text.tokenizers)

    def steps_of(self, given: int | None) -> int:
        if given is None:
            return self.default_steps
        if given not in self.steps:
            known = ", ".join(map(str, self.steps)) if self.is_student else f"{self.steps[0]} to {self.steps[-1]}"
            raise errors.InvalidField(
                f"num_inference_steps is {given}; the {self.name} tier takes {known}", param="num_inference_steps"
            )
        return given

    def guidance(self, body: schemas.GenerationBody) -> float:
        if not self.is_student:
            given = body.guidance_scale
            return self.default_guidance_scale if given is None else given
        for field in ("guidance_scale", "negative_prompt"):
            if getattr(body, field) is not None:
                raise errors.InvalidField(
                    f"{field} is not supported by the {self.name} tier: a student has its teacher's guidance in "
                    "its weights; leave it out, or ask for premium",
                    param=field,
                )
        return 1.0

    def size_px(self, given: str) -> tuple[int, int]:
        if given == "auto":
            return self.sizes[0]
        if (size := _size_px(given)) not in self.sizes:
            known = ", ".join(f"{width}x{height}" for width, height in self.sizes)
            raise errors.InvalidField(f"size is {given}; the {self.name} tier makes {known}", param="size")
        return size

    def check_count(self, count: int) -> None:
        """Raises InvalidField for more images than an idle tier would admit."""
        most = self.settings.max_batch + self.settings.max_queued
        if count > most:
            raise errors.InvalidField(f"n is {count}; the {self.name} tier takes {most} at once", param="n")

    def warnings(self, field: str, text: str) -> list[str]:
        """Says what the text encoders do not read of a prompt: what lies past their window."""
        window = min(tokenizer.model_max_length for tokenizer in self._tokenizers)
        if text.isascii() and len(text) + _MARKS <= window:  # a token is a character at least
            return []
        count = max(len(tokenizer(text, verbose=False).input_ids) for tokenizer in self._tokenizers)
        if count <= window:
            return []
        cut = "last was" if count - window == 1 else f"last {count - window} were"
        return [f"{field} has {count} tokens and the text encoders read {window}: the {cut} cut"]


class Catalogue:
    """The tiers by name and alias. Raises ConfigError for settings that no model of theirs can keep."""

    def __init__(self, models: Mapping[str, Model], settings: Settings) -> None:
        kinds: dict[str, TierSettings] = {"turbo": settings.turbo_tier, "premium": settings.premium_tier}
        self.tiers = {name: Tier(name, model, kinds[name]) for name, model in models.items()}
        self._names = {name: name for name in self.tiers}
        for name, tier in self.tiers.items():
            for alias in tier.settings.aliases:
                if alias in self._names:
                    raise ConfigError(f"the alias {alias!r} stands for two tiers")
                self._names[alias] = name

    def find(self, model: str) -> Tier:
        """The tier of a name or alias. Raises NotFound."""
        if model not in self._names:
            known, given = ", ".join(self._names), ascii(model)[1:-1][:100]
            raise errors.NotFound(f"no model '{given}'; there are {known}", param="model", code="model_not_found")
        return self.tiers[self._names[model]]

    def plan(self, body: schemas.GenerationBody, key: str) -> Plan:
        """What a body asks for. Raises InvalidField or NotFound, which name the field."""
        tier = self.find(body.model)
        steps, guidance_scale = tier.steps_of(body.num_inference_steps), tier.guidance(body)
        _check_output(body)
        _check_previews(body, steps, tier)
        if body.allow_downgrade and tier.is_student:
            raise errors.InvalidField(
                f"allow_downgrade is not supported by the {tier.name} tier: there is none below it; leave it out",
                param="allow_downgrade",
            )
        warnings = tier.warnings("prompt", body.prompt)
        if body.negative_prompt is not None:
            warnings += tier.warnings("negative_prompt", body.negative_prompt)
            if guidance_scale <= 1:
                raise errors.InvalidField(
                    f"negative_prompt needs guidance, and guidance_scale is {guidance_scale:g}", param="negative_prompt"
                )
        tier.check_count(body.n)
        seeds = _seeds(body)
        request = ImageRequest(
            tier=tier.name,
            prompt=body.prompt,
            seeds=seeds,
            steps=steps,
            size_px=tier.size_px(body.size),
            key=key,
            guidance_scale=guidance_scale,
            negative_prompt=body.negative_prompt,
            previews=body.partial_images,
            encoding=Encoding(body.output_format, 100 if body.output_compression is None else body.output_compression),
            about={"prompt": body.prompt, "tier": tier.name, "steps": steps, "model_version": tier.model.version},
        )
        return Plan(body, request, tier.model.version, tuple(warnings))

    def downgrade(self, plan: Plan) -> Plan | None:
        """The same by turbo, where it allows that and turbo can; what turbo does not honour is in the warnings."""
        if not plan.body.allow_downgrade:
            return None
        dropped = [
            name
            for name in ("num_inference_steps", "guidance_scale", "negative_prompt")
            if getattr(plan.body, name) is not None
        ]
        changes = {"model": "turbo", "allow_downgrade": False, "seed": plan.request.seeds[0], **dict.fromkeys(dropped)}
        try:
            lower = self.plan(plan.body.model_copy(update=changes), plan.request.key)
        except errors.ServiceError:
            return None
        said = f"the premium tier is busy: served by turbo{', without ' if dropped else ''}{', '.join(dropped)}"
        return dataclasses.replace(lower, warnings=(said, *lower.warnings), downgraded_from=plan.tier)


def _check_output(body: schemas.GenerationBody) -> None:
    if body.output_format == "png" and body.output_compression not in (None, 100):
        raise errors.InvalidField(
            "output_compression is not supported for png, which is lossless; leave it out, or ask for jpeg or webp",
            param="output_compression",
        )
    if body.stream and body.response_format == "url":
        raise errors.InvalidField(
            "response_format is url, and a stream carries the images themselves; ask for b64_json",
            param="response_format",
        )


def _check_previews(body: schemas.GenerationBody, steps: int, tier: Tier) -> None:
    if body.partial_images and not body.stream:
        raise errors.InvalidField(
            f"partial_images is {body.partial_images}, and previews need stream: true", param="partial_images"
        )
    if body.partial_images >= steps:
        raise errors.InvalidField(
            f"partial_images is {body.partial_images}; there is room for {steps - 1} in the {steps} "
            f"{'step' if steps == 1 else 'steps'} of this request to the {tier.name} tier",
            param="partial_images",
        )


def _seeds(body: schemas.GenerationBody) -> tuple[int, ...]:
    first = secrets.randbelow(schemas.MOST_SEED - body.n + 2) if body.seed is None else body.seed
    if first + body.n - 1 > schemas.MOST_SEED:
        raise errors.InvalidField(
            f"seed is {first} and n {body.n}: the last image's seed, {first + body.n - 1}, is over {schemas.MOST_SEED}",
            param="seed",
        )
    return tuple(range(first, first + body.n))


def _size_px(size: str) -> tuple[int, int]:
    width, height = size.split("x")
    return int(width), int(height)


def _multiple_px(model: Model) -> int:
    """The U-Net halves the latents in all blocks but the last."""
    return int(model.parts.downscale * 2 ** (len(model.parts.unet.config.block_out_channels) - 1))


def _default_steps(settings: TierSettings, known: Sequence[int]) -> int:
    assert isinstance(settings, TurboSettings | PremiumSettings)
    steps = settings.default_steps or known[0]
    if steps not in known:
        raise ConfigError(f"default_steps is {steps}; the model takes {', '.join(map(str, known))}")
    return steps


def _default_guidance(settings: TierSettings, model: Model) -> float:
    if not isinstance(settings, PremiumSettings):
        return 1.0
    if settings.default_guidance_scale is not None:
        return settings.default_guidance_scale
    return _SHAPES_GUIDANCE if model.source == "shapes-teacher" else _SDXL_GUIDANCE
