"""Adversarial diffusion distillation (Sauer et al. 2023), complete, with named options beyond the paper.

A step has two phases on one batch:

    student:        x_s -> student_x0 -> images;  loss = adversarial + distillation_weight * distillation
                                                         (+ trajectory_weight * trajectory)
    discriminator:  hinge on the real images and on the student's, detached;  + R1 on the real features

The student's pictures are decoded once and looked at once: the adversarial term, the distances in pixel space and,
detached, the discriminator share them, so that no two decoder graphs are alive together.

Where the paper is silent or we deviate:

- student timesteps are {249, 499, 749, 999} (the paper names only the last);
- the last timestep's input is pure noise while its x0 formula keeps the finite alpha (`schedule`);
- at pure noise the image condition is zero: nothing of the real image has reached the student there;
- the teacher is guided (`teacher_guidance`), which the paper leaves open;
- distances are means over elements, where the paper writes a squared norm;
- one network serves as the discriminator's eyes and gives the image condition.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_kd import errors, schedule
from diffusion_kd.denoiser import Denoiser
from diffusion_kd.draws import Draws
from diffusion_kd.losses import adversarial, distillation, perceptual
from diffusion_kd.networks import discriminator, features
from diffusion_kd.objectives.base import Batch, Phase
from diffusion_kd.types import Conditioning


@dataclasses.dataclass
class ADDConfig:
    """The method's settings. The defaults are the paper's; what goes beyond it is off.

    student_steps: how many timesteps the student is trained at (N).
    adversarial_weight: weight of the discriminator's term (1 in the paper); 0 leaves it and its pixel heads out.
    distillation_weight: the paper's lambda; 0 leaves the term out.
    weighting: c(t): exp, sds or nfsd.
    distance_space: pixel or latent: where the student's x0 is compared with the teacher's, in the distillation and in
        the trajectory term.
    teacher_guidance: [w] fixed, or [low, high] drawn uniformly for each example; 1 is no guidance. nfsd has its own.
    teacher_timesteps: t is drawn uniformly from this closed range.
    r1_weight: the paper's gamma; 0 leaves R1 out. r1_interval: R1 every so many steps, that many times as strong.
    text_condition, image_condition: whether the heads are told the pooled text, the real image's embedding.

    Beyond the paper:
    terminal_probability: share of examples at the last timestep (pure noise); null draws all alike.
    latent_weight: weight of heads on the frozen teacher's features of noised latents (Sauer et al. 2024, LADD).
    latent_timesteps: the noise is drawn uniformly from this closed range; the less noise, the finer what they judge.
    mismatch_weight: weight of real images with another's caption as further fakes (Kang et al. 2024).
    finite_difference_weight: R1 and R2 by finite differences (Lin et al. 2025) on the pixel heads' features.
    trajectory_weight: weight of the distance (in pixel space in the feature network's maps as well) to where the
        teacher's deterministic sampler leads from the student's own input: each noise keeps its picture (Hu et al.
        2025, CMT).
    trajectory_steps: of that sampler from pure noise; a multiple of student_steps. trajectory_guidance: its w.
    """

    student_steps: int = 4
    adversarial_weight: float = 1.0
    distillation_weight: float = 2.5
    weighting: str = "exp"
    distance_space: str = "pixel"
    teacher_guidance: list[float] = dataclasses.field(default_factory=lambda: [5.0])
    teacher_timesteps: list[int] = dataclasses.field(default_factory=lambda: [20, 980])
    r1_weight: float = 1e-5
    r1_interval: int = 1
    text_condition: bool = True
    image_condition: bool = True
    terminal_probability: float | None = None
    latent_weight: float = 0.0
    latent_timesteps: list[int] = dataclasses.field(default_factory=lambda: [20, 980])
    mismatch_weight: float = 0.0
    finite_difference_weight: float = 0.0
    trajectory_weight: float = 0.0
    trajectory_steps: int = 8
    trajectory_guidance: float = 1.0

    def __post_init__(self) -> None:
        schedule.student_timesteps(self.student_steps)
        errors.require(self.weighting in ("exp", "sds", "nfsd"), "weighting", self.weighting, "exp, sds or nfsd")
        errors.require(
            self.distance_space in ("pixel", "latent"), "distance_space", self.distance_space, "pixel or latent"
        )
        errors.require(
            len(self.teacher_guidance) in (1, 2), "teacher_guidance", self.teacher_guidance, "[w] or [low, high]"
        )
        for name, scales in (
            ("teacher_guidance", self.teacher_guidance),
            ("trajectory_guidance", [self.trajectory_guidance]),
        ):
            fits = all(math.isfinite(scale) and scale >= 0 for scale in scales)
            errors.require(fits, name, getattr(self, name), "finite, 0 or more; 1 is no guidance")
        rises = self.teacher_guidance == sorted(self.teacher_guidance)
        errors.require(rises, "teacher_guidance", self.teacher_guidance, "[low, high] with low <= high")
        for name in ("teacher_timesteps", "latent_timesteps"):
            value = getattr(self, name)
            low, high = value if len(value) == 2 else (1, 0)
            errors.require(0 <= low <= high <= 999, name, value, "[low, high] within 0 and 999")
        errors.require(self.r1_interval >= 1, "r1_interval", self.r1_interval, "1 or more")
        for name in (
            "adversarial_weight",
            "distillation_weight",
            "r1_weight",
            "latent_weight",
            "mismatch_weight",
            "finite_difference_weight",
            "trajectory_weight",
        ):
            value = getattr(self, name)
            errors.require(math.isfinite(value) and value >= 0, name, value, "0 (off) or more")
        share = self.terminal_probability
        errors.require(share is None or 0 <= share <= 1, "terminal_probability", share, "null, or a share from 0 to 1")
        fits = self.trajectory_steps >= 1 and self.trajectory_steps % self.student_steps == 0
        errors.require(
            fits, "trajectory_steps", self.trajectory_steps, f"a multiple of student_steps, {self.student_steps}"
        )
        if self.adversarial_weight + self.latent_weight + self.distillation_weight + self.trajectory_weight == 0:
            raise errors.ConfigError(
                "adversarial_weight, latent_weight, distillation_weight and trajectory_weight are all 0; "
                "at least one must be above 0"
            )
        for name in ("mismatch_weight", "finite_difference_weight"):
            fits = self.adversarial_weight > 0 or getattr(self, name) == 0
            errors.require(fits, name, getattr(self, name), "0 without the pixel heads, as adversarial_weight is 0")

    @property
    def looks(self) -> bool:
        """Whether any term looks at pictures through the feature network."""
        return self.adversarial_weight > 0 or (self.distance_space == "pixel" and self.trajectory_weight > 0)


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    """What the pixel heads look at: features of the real images, and of the student's."""

    real: features.Features
    fake_maps: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
    """The student's estimate: x0 of the input x_s at `timesteps`.

    images: x0 decoded; None where no term wants it. maps: of the images; none where no term looks at them.
    """

    x_s: Tensor
    timesteps: Tensor
    x0: Tensor
    images: Tensor | None
    maps: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Fakes:
    """What the student's turn leaves, detached, for the discriminator's. seen: None without pixel heads."""

    x0: Tensor
    at_end: Tensor  # (B,) bool: made from pure noise
    seen: _Seen | None


class ADD:
    """The objective: a student and a discriminator against a frozen teacher.

    student, teacher: denoisers on the same schedule; the student usually starts as a copy of the teacher.
    vae: decodes latents like diffusers' AutoencoderKL. feature_network: what the pixel heads look through. Both and the
        teacher are frozen here.
    Raises ModelError if the student's prediction has no x0 at the last timestep.
    """

    def __init__(
        self,
        config: ADDConfig,
        *,
        student: Denoiser,
        teacher: Denoiser,
        vae: Any,
        feature_network: features.FeatureNetwork,
    ) -> None:
        self.config, self.student, self.teacher, self.vae = config, student, teacher, vae
        self.feature_network = feature_network
        self.timesteps = torch.tensor(schedule.student_timesteps(config.student_steps, len(student.schedule)))
        if student.prediction_type == "epsilon" and student.schedule.zero_terminal_signal:
            raise errors.ModelError(
                "an epsilon teacher on betas with zero terminal signal has no x0 at pure noise; "
                "use its betas without rescaling, or a v_prediction teacher"
            )
        text_dim = teacher.pooled_dim
        conditions = [text_dim] * config.text_condition + [feature_network.vector_dim] * config.image_condition
        self.latent_features = discriminator.LatentFeatures(teacher)
        self.heads = nn.ModuleDict()
        if config.adversarial_weight:
            self.heads["pixel"] = discriminator.Heads(feature_network.map_channels, conditions)
        if config.latent_weight:
            self.heads["latent"] = discriminator.Heads(
                self.latent_features.map_channels, [text_dim] * config.text_condition
            )
        for frozen in (teacher, vae, feature_network):
            frozen.requires_grad_(False)
        self.fakes: _Fakes | None = None

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (StudentPhase(self), DiscriminatorPhase(self)) if len(self.heads) else (StudentPhase(self),)

    # --- pieces that both phases use ---

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], with gradients."""
        images: Tensor = self.vae.decode(
            latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False
        )[0]
        return images.float()

    def conditions(self, cond: Conditioning, image_vectors: Tensor, at_end: Tensor) -> list[Tensor]:
        """What the pixel heads are told: pooled text and the real image's embedding, as configured."""
        told = [cond.pooled.float()] if self.config.text_condition else []
        if self.config.image_condition:
            told.append(torch.where(at_end[:, None], 0.0, image_vectors))
        return told

    def judge_latents(self, x0: Tensor, batch: Batch, draws: Draws) -> list[Tensor]:
        """Latent heads' logits of x0, noised to random timesteps."""
        timesteps = draws.integers(*self.config.latent_timesteps).to(x0.device)
        x_t = self.teacher.schedule.add_noise(x0, draws.normal_like(x0), timesteps)
        maps = self.latent_features(x_t, timesteps, batch.cond)
        told = [batch.cond.pooled.float()] if self.config.text_condition else []
        logits: list[Tensor] = self.heads["latent"](_float(maps), told)
        return logits

    def draw_student_timesteps(self, draws: Draws) -> Tensor:
        """(B,) of the student's timesteps; the last with `terminal_probability`, or all alike."""
        share = self.config.terminal_probability
        last = len(self.timesteps) - 1
        if share is None or last == 0:
            return self.timesteps[draws.integers(0, last)]
        others = draws.integers(0, last - 1)
        return self.timesteps[torch.where(draws.uniform() < share, last, others)]


class StudentPhase(Phase):
    """The student's turn. Only its parameters are this module's."""

    name = "student"

    def __init__(self, objective: ADD) -> None:
        super().__init__()
        self.student = objective.student
        self._objective = (objective,)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (objective,) = self._objective
        config, draws = objective.config, batch.draws(0)
        made = self._make(batch, draws)
        at_end = made.timesteps == objective.timesteps[-1].item()
        seen = _Seen(self._look(batch.images), made.maps) if config.adversarial_weight else None
        losses = self._adversarial(batch, made.x0, seen, at_end, draws)
        if config.distillation_weight:
            losses["distillation"] = config.distillation_weight * self._distillation(batch, made, draws)
        if config.trajectory_weight:
            losses["trajectory"] = config.trajectory_weight * self._trajectory(batch, made)
        if seen is not None:
            seen = _Seen(seen.real, tuple(layer.detach() for layer in seen.fake_maps))
        objective.fakes = _Fakes(made.x0.detach(), at_end, seen)
        return losses

    def _make(self, batch: Batch, draws: Draws) -> _Made:
        (objective,) = self._objective
        config = objective.config
        timesteps = objective.draw_student_timesteps(draws).to(batch.latents.device)
        noise = draws.normal_like(batch.latents)
        x_s = objective.student.schedule.add_noise(batch.latents, noise, timesteps, pure_noise_at_end=True)
        x0 = self.student(x_s, timesteps, batch.cond)
        in_pixels = config.distance_space == "pixel"
        images = objective.decode(x0) if config.looks or (in_pixels and config.distillation_weight) else None
        maps = _float(objective.feature_network(images).maps) if config.looks else ()
        return _Made(x_s, timesteps, x0, images, maps)

    @torch.no_grad()
    def _look(self, images: Tensor) -> features.Features:
        (objective,) = self._objective
        seen = objective.feature_network(images)
        return features.Features(_float(seen.maps), seen.vector.float())

    def _adversarial(
        self, batch: Batch, student_x0: Tensor, seen: _Seen | None, at_end: Tensor, draws: Draws
    ) -> dict[str, Tensor]:
        (objective,) = self._objective
        config, losses = objective.config, {}
        objective.heads.requires_grad_(False)
        try:
            if seen is not None:
                told = objective.conditions(batch.cond, seen.real.vector, at_end)
                logits = objective.heads["pixel"](seen.fake_maps, told)
                losses["adversarial"] = config.adversarial_weight * adversarial.generator_loss(logits)
            if config.latent_weight:
                logits = objective.judge_latents(student_x0, batch, draws)
                losses["adversarial_latent"] = config.latent_weight * adversarial.generator_loss(logits)
        finally:
            objective.heads.requires_grad_(True)
        return losses

    def _distillation(self, batch: Batch, made: _Made, draws: Draws) -> Tensor:
        (objective,) = self._objective
        config = objective.config
        target, timesteps = self._target(batch, made.x0.detach(), draws)
        alpha, sigma = objective.teacher.schedule.at(timesteps)
        weights = distillation.weight(config.weighting, alpha, sigma)  # type: ignore[arg-type]
        if config.distance_space == "latent":
            return distillation.distillation_loss(made.x0, target, weights)
        assert made.images is not None, "a distance in pixels needs the student's images"
        with torch.no_grad():
            target = objective.decode(target)
        return distillation.distillation_loss(made.images, target, weights)

    @torch.no_grad()
    def _target(self, batch: Batch, x0: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The teacher's estimate of the student's x0, noised to random timesteps; one teacher step."""
        (objective,) = self._objective
        config, teacher = objective.config, objective.teacher
        timesteps = draws.integers(*config.teacher_timesteps).to(x0.device)
        x_t = teacher.schedule.add_noise(x0, draws.normal_like(x0), timesteps)
        if config.weighting == "nfsd":
            assert batch.negative is not None, "nfsd needs a negative prompt"
            with_text, without, negative = (
                teacher(x_t, timesteps, cond) for cond in (batch.cond, batch.uncond, batch.negative)
            )
            target = distillation.nfsd_target(x0, with_text, without, negative, x_t, timesteps, teacher.schedule)
            return target, timesteps
        guidance: Tensor | float = config.teacher_guidance[0]
        if len(config.teacher_guidance) == 2:
            weakest, strongest = config.teacher_guidance
            guidance = weakest + (strongest - weakest) * draws.uniform().to(x0.device)
        return teacher.guided(x_t, timesteps, batch.cond, batch.uncond, guidance), timesteps

    def _trajectory(self, batch: Batch, made: _Made) -> Tensor:
        """How far the student's estimate is from where the teacher's deterministic sampler leads from its input."""
        (objective,) = self._objective
        config = objective.config
        end = objective.teacher.endpoint(
            made.x_s,
            made.timesteps,
            batch.cond,
            batch.uncond,
            config.trajectory_guidance,
            steps=config.trajectory_steps,
        )
        if config.distance_space == "latent":
            return perceptual.pseudo_huber((made.x0 - end).square().mean((1, 2, 3))).mean()
        assert made.images is not None, "a distance in pixels needs the student's images"
        target = objective.decode(end)
        squared = perceptual.map_distance(made.maps, self._look(target).maps)
        return perceptual.pseudo_huber(squared).mean() + (made.images - target).abs().mean()


class DiscriminatorPhase(Phase):
    """The discriminator's turn, on what the student has just made. Only the heads' parameters are this module's."""

    name = "discriminator"

    def __init__(self, objective: ADD) -> None:
        super().__init__()
        self.heads = objective.heads
        self._objective = (objective,)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (objective,) = self._objective
        assert objective.fakes is not None, "the student's phase must run first"
        fakes, objective.fakes = objective.fakes, None
        losses: dict[str, Tensor] = {}
        if fakes.seen is not None:
            losses |= self._pixel(batch, fakes.seen, fakes.at_end)
        if objective.config.latent_weight:
            draws = batch.draws(1)
            real = objective.judge_latents(batch.latents, batch, draws)
            fake = objective.judge_latents(fakes.x0, batch, draws)
            losses["hinge_latent"] = adversarial.hinge_discriminator_loss(real, fake)
        return losses

    def _pixel(self, batch: Batch, seen: _Seen, at_end: Tensor) -> dict[str, Tensor]:
        (objective,) = self._objective
        config, heads = objective.config, self.heads["pixel"]
        lazily = config.r1_weight > 0 and batch.step % config.r1_interval == 0
        real_maps = tuple(layer.requires_grad_(lazily) for layer in seen.real.maps)
        fake_maps = seen.fake_maps
        told = objective.conditions(batch.cond, seen.real.vector, at_end)
        real_logits, fake_logits = heads(real_maps, told), heads(fake_maps, told)
        losses = {"hinge": adversarial.hinge_discriminator_loss(real_logits, fake_logits)}
        if lazily:
            weight = config.r1_weight * config.r1_interval
            losses["r1"] = weight * adversarial.r1_penalty(real_logits, real_maps)
        if config.mismatch_weight and told:
            # Real images under a neighbour's caption (and embedding): what is real but not what was asked for.
            mismatched = heads(real_maps, [part.roll(1, 0) for part in told])
            losses["mismatch"] = config.mismatch_weight * adversarial.hinge_fake_loss(mismatched)
        if config.finite_difference_weight:
            draws = batch.draws(2)
            penalty = torch.stack(
                [
                    adversarial.finite_difference_penalty(logits, heads(_shaken(maps, draws), told))
                    for logits, maps in ((real_logits, real_maps), (fake_logits, fake_maps))
                ]
            ).sum()
            losses["finite_difference"] = config.finite_difference_weight * penalty
        return losses


def _float(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(layer.float() for layer in maps)


def _shaken(maps: Sequence[Tensor], draws: Draws, share: float = 0.05) -> tuple[Tensor, ...]:
    """Maps with noise of `share` of each example's own deviation."""
    return tuple(
        layer + share * layer.detach().std(tuple(range(1, layer.ndim)), keepdim=True) * draws.normal_like(layer)
        for layer in maps
    )
