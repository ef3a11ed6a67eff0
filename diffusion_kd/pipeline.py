"""Prompts -> images: `TeacherPipeline` in many guided steps, `FewStepPipeline` in 1-4 steps without guidance.

An image depends on its own prompt and seed alone, whatever shares its batch: each has a generator of its own, on the
CPU, so a seed means the same on every device. What serving, evaluation and the playground call.
"""

import inspect
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_kd import artifact, errors
from diffusion_kd.networks import features
from diffusion_kd.schedule import student_timesteps
from diffusion_kd.types import Conditioning

_CLIP_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


class _Pipeline:
    """What both tiers share: encoding prompts, drawing noise by seed, decoding latents."""

    def __init__(self, parts: artifact.Parts) -> None:
        self.parts, self.size_px = parts, parts.size_px
        self.denoiser = parts.denoiser()
        self.stage_s = dict.fromkeys(("text", "denoise", "decode"), 0.0)
        """Seconds spent in each stage since the pipeline was made."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self.parts.unet.device
        return device

    def to(self, device: torch.device | str) -> "_Pipeline":
        self.parts.to(device)
        return self

    def _now_s(self) -> float:
        """The clock, once the device has done what it was told: CUDA works on while Python goes ahead."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        since = self._now_s()
        cond = self.parts.text.encode(prompts, (self.size_px, self.size_px))
        self.stage_s["text"] += self._now_s() - since
        return cond

    def _first_noise(self, generators: Sequence[torch.Generator], latents: Tensor | None) -> Tensor:
        """That of each seed, or `latents` for everyone. Raises ConfigError for latents of another shape."""
        drawn = self._noise(generators)
        if latents is None:
            return drawn
        if latents.shape not in (drawn.shape[1:], (1, *drawn.shape[1:])):
            raise errors.ConfigError(f"latents must be {tuple(drawn.shape[1:])}, not {tuple(latents.shape)}")
        return latents.to(drawn).expand_as(drawn)

    def _noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        config = self.parts.unet.config
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

    def _decode(self, latents: Tensor) -> Tensor:
        since = self._now_s()
        vae = self.parts.vae
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        images = images.float().clamp(-1, 1).cpu()
        self.stage_s["decode"] += self._now_s() - since
        return images  # type: ignore[no-any-return]


def _generators(prompts: Sequence[str], seeds: Sequence[int]) -> list[torch.Generator]:
    if len(prompts) != len(seeds) or not prompts:
        raise errors.ConfigError(
            f"need one seed for each prompt and at least one; got {len(prompts)} prompts, {len(seeds)} seeds"
        )
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class FewStepPipeline(_Pipeline):
    """A student: x0_hat at each of its timesteps, sent through fresh noise to the next."""

    def __init__(self, parts: artifact.Parts, timesteps: dict[int, list[int]]) -> None:
        super().__init__(parts)
        self.timesteps = timesteps

    @torch.inference_mode()
    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = 4,
        guidance_scale: float = 0.0,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) float32 in [-1, 1], on the CPU.

        steps: one of the counts the student was trained for. guidance_scale: must be 0.
        latents: (C, h, w), unit noise that every image starts from instead of its seed's; later noise is the seed's.
        Raises ConfigError for other values, or unless there is one seed for each prompt.
        """
        if steps not in self.timesteps:
            raise errors.ConfigError(
                f"this student takes {', '.join(map(str, sorted(self.timesteps)))} steps, not {steps}"
            )
        if guidance_scale != 0:
            raise errors.ConfigError(f"a student takes no guidance: guidance_scale must be 0, not {guidance_scale}")
        generators = _generators(prompts, seeds)
        cond = self._encode(prompts)
        since = self._now_s()
        x0: Tensor | None = None
        for timestep in self.timesteps[steps]:
            now = torch.full((len(prompts),), timestep, device=self.device)
            noise = self._first_noise(generators, latents) if x0 is None else self._noise(generators)
            x_t = noise if x0 is None else self.denoiser.schedule.add_noise(x0, noise, now)
            x0 = self.denoiser(x_t, now, cond)
        assert x0 is not None, "every step count has timesteps"
        self.stage_s["denoise"] += self._now_s() - since
        return self._decode(x0)


class TeacherPipeline(_Pipeline):
    """A teacher, sampled by the diffusers scheduler of its folder."""

    @torch.inference_mode()
    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = 50,
        guidance_scale: float = 5.0,
        negative_prompt: str | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) float32 in [-1, 1], on the CPU. guidance_scale: 1 or less is none.

        negative_prompt: what guidance leads away from; None: from the absence of a prompt.
        latents: (C, h, w), unit noise that every image starts from instead of its seed's.
        Raises ConfigError unless there is one seed for each prompt and 1 <= steps <= 1000.
        """
        scheduler = self.parts.scheduler
        if not 1 <= steps <= scheduler.config.num_train_timesteps:
            raise errors.ConfigError(f"a teacher takes 1 to {scheduler.config.num_train_timesteps} steps, not {steps}")
        generators = _generators(prompts, seeds)
        cond = self._encode(prompts)
        guided = guidance_scale > 1
        if guided:
            away = no_prompt(cond) if negative_prompt is None else self._encode([negative_prompt] * len(prompts))
            cond = Conditioning.concatenate([away, cond])
        scheduler.set_timesteps(steps, device=self.device)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options = {"generator": generators} if takes_generator else {}
        x_t = self._first_noise(generators, latents) * scheduler.init_noise_sigma
        since = self._now_s()
        for timestep in scheduler.timesteps:
            doubled = scheduler.scale_model_input(torch.cat([x_t, x_t]) if guided else x_t, timestep)
            prediction = self.parts.unet(
                doubled.to(self.parts.unet.dtype),
                timestep,
                cond.prompt_embeds,
                added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.time_ids},
                return_dict=False,
            )[0].float()
            if guided:
                without, with_text = prediction.chunk(2)
                prediction = without + guidance_scale * (with_text - without)
            x_t = scheduler.step(prediction, timestep, x_t, return_dict=False, **options)[0]
        self.stage_s["denoise"] += self._now_s() - since
        return self._decode(x_t)


def no_prompt(cond: Conditioning) -> Conditioning:
    """The conditioning without a prompt: zeros, as SDXL was trained with (`force_zeros_for_empty_prompt`)."""
    return Conditioning(torch.zeros_like(cond.prompt_embeds), torch.zeros_like(cond.pooled), cond.time_ids)


def load_teacher(name_or_path: str) -> TeacherPipeline:
    """A teacher from a folder, a hub id or `shapes-teacher`. Raises ModelError."""
    return TeacherPipeline(artifact.load(name_or_path))


def load_student(name_or_path: str) -> FewStepPipeline:
    """A student from its exported folder, a hub id or `shapes-student`. Raises ModelError.

    So it does if `distillation.json` and the scheduler disagree on what the U-Net predicts.
    """
    distillation = artifact.read_distillation(name_or_path)
    parts = artifact.load(name_or_path)
    said, found = distillation.prediction_type, parts.scheduler.config.prediction_type
    if said != found:
        raise errors.ModelError(
            f"{name_or_path}: {artifact.DISTILLATION_FILE} says prediction type {said!r} and the scheduler {found!r}; "
            "export the student anew"
        )
    return FewStepPipeline(parts, distillation.steps())


def trained_timesteps(most_steps: int) -> dict[str, list[int]]:
    """Timesteps, in sampling order, of each step count that a student of `most_steps` timesteps takes.

    Fewer steps take every other or so of the same timesteps, spread as diffusers' LCM scheduler spreads them; of
    four: 4 -> 999, 749, 499, 249; 3 -> 999, 749, 499; 2 -> 999, 499; 1 -> 999.
    """
    descending = student_timesteps(most_steps)[::-1]
    return {
        str(steps): [descending[index * most_steps // steps] for index in range(steps)]
        for steps in range(1, most_steps + 1)
    }


def load_feature_network(name_or_path: str) -> features.TextImageNetwork:
    """A CLIP model as text and image feature network: a transformers CLIP folder, a hub id or `shapes-encoder`."""
    return features.load_clip(artifact.resolve(name_or_path, _CLIP_WEIGHTS), name_or_path)
