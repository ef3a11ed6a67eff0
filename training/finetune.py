"""Fine-tune an SDXL-class teacher, all weights or LoRA: narrow tasks keep their quality when the teacher knows them.

`python -m training.teacher --teacher MODEL --data CACHE --out runs/teacher`. Its text encoders and autoencoder stay as
they are; what comes out is a plain diffusers folder, a teacher for `training.distill`.
"""

import argparse
import dataclasses
import json
import logging
import math
import pathlib
import tempfile
from collections.abc import Mapping

import accelerate
import torch
from torch import Tensor, nn

from diffusion_kd import artifact, errors, files, licences, pipeline
from diffusion_kd.denoiser import Denoiser
from diffusion_kd.networks import lora_file
from diffusion_kd.objectives.base import Batch
from diffusion_kd.types import Conditioning
from training import cache, compute, data, feed, loop, parallel, release, tracking
from training import config as configs

_log = logging.getLogger(__name__)

STAGE = "unet"
"""The run's one stage, named as the last of a teacher that is made from nothing."""


@dataclasses.dataclass
class FineTuneConfig(compute.ComputeConfig):
    """All settings of a fine-tuning. Those of how it computes are `compute.ComputeConfig`'s.

    size_px: height and width to train at; 0: the teacher's own. A prepared cache has sizes of its own.
    caption_dropout: share of captions replaced by nothing, so that guidance goes on working.
    sample_steps, sample_guidance: of the pictures at each report.
    """

    seed: int = 0
    size_px: int = 0
    caption_dropout: float = 0.1
    sample_steps: int = 20
    sample_guidance: float = 5.0
    training: loop.LoopConfig = dataclasses.field(
        default_factory=lambda: loop.LoopConfig(images=16_000, batch_size=16, learning_rate=1e-5, warmup_images=800)
    )

    def __post_init__(self) -> None:
        configs.require_seed(self.seed)
        for name, fits, wanted in (
            ("size_px", self.size_px >= 0, "0 (the teacher's own) or more"),
            ("caption_dropout", 0 <= self.caption_dropout <= 1, "a share from 0 to 1"),
            ("sample_steps", 1 <= self.sample_steps <= 1000, "1 to 1000"),
            ("sample_guidance", 0 <= self.sample_guidance < math.inf, "finite, 0 or more; 1 is no guidance"),
        ):
            errors.require(fits, name, getattr(self, name), wanted)
        self.check()

    def decisive(self) -> dict[str, object]:
        own = {name: getattr(self, name) for name in ("seed", "size_px", "caption_dropout")}
        return {**super().decisive(), **own, "training": self.training.decisive()}


class Denoising(nn.Module):
    """SDXL's objective: the squared error of what the U-Net predicts, at uniform timesteps."""

    def __init__(self, denoiser: Denoiser, caption_dropout: float) -> None:
        super().__init__()
        self.denoiser, self._dropout = denoiser, caption_dropout

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        draws, x0 = batch.draws(0), batch.latents
        timesteps = draws.integers(0, len(self.denoiser.schedule) - 1).to(x0.device)
        noise = draws.normal_like(x0)
        dropped = (draws.uniform() < self._dropout).to(x0.device)
        cond = _without(batch.cond, dropped)
        x_t = self.denoiser.schedule.add_noise(x0, noise, timesteps)
        predicted = self.denoiser.predict(x_t, timesteps, cond).float()
        target = self.denoiser.target(x0, noise, timesteps)
        return {"denoise": nn.functional.mse_loss(predicted, target)}


def _without(cond: Conditioning, dropped: Tensor) -> Conditioning:
    """Captions of the examples `dropped` (B,) replaced by none: zeros, as SDXL was trained with."""
    kept = (~dropped).to(cond.pooled)
    return Conditioning(cond.prompt_embeds * kept[:, None, None], cond.pooled * kept[:, None], cond.time_ids)


class FineTuning:
    """One run: a teacher, data of one's own and a folder. Parameters as of `distill.Distillation`."""

    def __init__(
        self,
        config: FineTuneConfig,
        teacher: str,
        images: data.CaptionedImages | cache.CachedImages,
        folder: pathlib.Path,
        *,
        parts: artifact.Parts,
        accelerator: accelerate.Accelerator,
        acceptance: licences.Acceptance | None = None,
        teacher_licence: str = "",
        base: str | None = None,
    ) -> None:
        self._base = base
        self.config, self.teacher_name, self.folder = config, teacher, folder
        self.accelerator, self.parts = accelerator, parts
        self.acceptance, self.teacher_licence = acceptance or licences.Acceptance(), teacher_licence
        parts.encoders_to(accelerator.device, config.frozen_dtype)
        self.denoiser = parts.denoiser()
        torch.manual_seed(config.seed)
        config.prepare(parts.unet, accelerator.device)
        encoder = feed.Encoder(parts, accelerator)
        self.feed: feed.Feed = (
            feed.CacheFeed(images, encoder, config.seed)
            if isinstance(images, cache.CachedImages)
            else feed.ImageFeed(images, encoder, config.seed)
        )

    def run(self) -> pathlib.Path:
        """Train and export. Returns the new teacher's folder.

        Raises ConfigError if another run stands in its own, ArtifactError if a licence forbids it.
        """
        origin = {"teacher": self.teacher_name, "data": self.feed.source, "data_licences": self.feed.licences}
        origin |= {"base": self._base} if self._base else {}
        files.check_replaceable(self.folder / "teacher", release.FINE_TUNING)
        lineage = origin | release.require_licences(origin, self.acceptance, teacher_licence=self.teacher_licence)
        configs.claim(self.folder, origin | self.config.decisive(), write=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            configs.save(self.config, self.folder / "config.yaml")
        module = Denoising(self.denoiser, self.config.caption_dropout)
        rate = self.config.training.learning_rate
        loop.fit(
            self.accelerator,
            [loop.Learner(STAGE, module, rate, (0.9, 0.999), self.parts.unet)],
            lambda place: {"batch": self.feed.batch(place)},
            self.config.training,
            self.folder / STAGE,
            averaged=self.parts.unet,
            computing=self.config,
            on_report=self._show_samples,
        )
        return self._export(lineage)

    def _show_samples(self, images_seen: int, progress: tracking.Progress) -> None:
        """The same eight captions and seeds every time."""
        sampler = pipeline.TeacherPipeline(self.parts)
        captions = self.feed.prompts(8)
        settings = {"steps": self.config.sample_steps, "guidance_scale": self.config.sample_guidance}
        with self.accelerator.autocast():
            row = [sampler([text], [seed], **settings)[0] for seed, text in enumerate(captions)]  # type: ignore[arg-type]
        progress.picture("samples", torch.cat(row, -1), images_seen)

    def _export(self, lineage: Mapping[str, object]) -> pathlib.Path:
        """Every process takes part, as each may hold a shard; the main one writes."""
        folder = self.folder / "teacher"
        unet = parallel.on_cpu(self.parts.unet, main=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            whole = self._whole(unet)
            seen = loop.images_seen(self.folder / STAGE, self.config.training)
            told = {**lineage, "images_seen": seen, "config": dataclasses.asdict(self.config)}
            text = json.dumps({**told, "code": release.code_version()}, indent=2) + "\n"
            artifact.save_pipeline(folder, parts=whole, extra={release.FINE_TUNING: text})
            _log.info("exported %s", folder)
        self.accelerator.wait_for_everyone()
        return folder

    def _whole(self, unet: nn.Module) -> artifact.Parts:
        """The parts to hand on, in full precision: what did not learn may have been kept in half."""
        if self.config.frozen_precision == "fp32" and not self.config.lora_rank:
            return dataclasses.replace(self.parts, unet=unet)
        fresh = compute.sized(artifact.load(self.teacher_name, base=self._base), self.config.size_px)
        if not self.config.lora_rank:
            return dataclasses.replace(fresh, unet=unet)
        with tempfile.TemporaryDirectory() as folder:
            lora_file.write(pathlib.Path(folder), lora_file.weights(unet, torch.float32))
            lora_file.fuse(fresh.unet, pathlib.Path(folder) / lora_file.NAME)
        return fresh


def main(given: argparse.Namespace) -> None:
    """Of `training.teacher` with --teacher."""
    config = configs.load(FineTuneConfig, given.config or "sdxl_teacher", given.overrides)
    files.check_folder(given.out)
    if given.data is None:
        raise errors.ConfigError("a teacher is fine-tuned on data of your own; give a cache or a folder with --data")
    accelerator = compute.launch(config)
    parts = compute.load_teacher(config, given.teacher, base=given.base, size_px=config.size_px)
    FineTuning(
        config,
        given.teacher,
        feed.open_folder(given.data, parts, config.size_px or parts.size_px),
        given.out,
        parts=parts,
        accelerator=accelerator,
        acceptance=release.acceptance(given),
        teacher_licence=given.teacher_licence,
        base=given.base,
    ).run()
    compute.close(accelerator)
