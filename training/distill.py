"""Distil a teacher into a 1-4 step student: `accelerate launch -m training.distill --config shapes_add`.

Run the same command again to go on where it stopped. The averaged student is exported to `<out>/student`, as a plain
diffusers folder, or as a LoRA file, with `distillation.json`. `--plan` says what a run will take before it begins.
"""

import argparse
import dataclasses
import logging
import math
import pathlib
import statistics
from collections.abc import Mapping

import accelerate
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_kd import artifact, errors, files, licences, pipeline
from diffusion_kd.networks import features
from diffusion_kd.objectives import add
from diffusion_kd.shapes import model
from training import cache, checkpoint, compute, data, feed, loop, networks, parallel, plan, release, tracking
from training import config as configs

_log = logging.getLogger(__name__)

SAMPLE_SEEDS = 2
"""Pictures of each fixed prompt at each report: how different they are is their diversity."""


@dataclasses.dataclass
class DistillConfig(compute.ComputeConfig):
    """All settings of a distillation. Those of how it computes are `compute.ComputeConfig`'s.

    objective: keys of `add.ADDConfig`. training: keys of `loop.LoopConfig`.
    scenes: how many shapes scenes are drawn (unused with --data or --prompts).
    feature_network: what the pixel discriminator looks through: `shapes-encoder` or a CLIP folder or hub id,
        `dinov2` or `dinov2:PATH` (ViT-S/14, as in ADD), `open_clip:ARCHITECTURE:WEIGHTS`.
    negative_prompt: for the nfsd weighting alone, which needs one.
    discriminator_learning_rate: of the heads; their Adam has beta1 = 0.
    size_px: height and width to train and to sample at; 0: the teacher's own, 1024 for SDXL. A prepared cache has sizes
        of its own, of about this area.
    pixel_decoder: a small AutoencoderTiny (TAESDXL), by folder or hub id, that decodes the pictures of the losses;
        empty: the teacher's own decoder, which takes a multiple of the memory.
    """

    seed: int = 0
    size_px: int = 0
    scenes: int = 120_000
    feature_network: str = "shapes-encoder"
    negative_prompt: str = ""
    discriminator_learning_rate: float = 1e-3
    pixel_decoder: str = ""
    objective: add.ADDConfig = dataclasses.field(default_factory=add.ADDConfig)
    training: loop.LoopConfig = dataclasses.field(
        default_factory=lambda: loop.LoopConfig(
            images=16_000, batch_size=16, learning_rate=1e-4, warmup_images=800, ema_decay=0.98, weight_decay=0.0
        )
    )

    def __post_init__(self) -> None:
        eyes = self.feature_network.split(":")
        configs.require_seed(self.seed)
        for name, fits, wanted in (
            ("size_px", self.size_px >= 0, "0 (the teacher's own) or more"),
            ("scenes", self.scenes >= data.ShapesImages.group_size, f"{data.ShapesImages.group_size} or more"),
            (
                "feature_network",
                eyes[0] != "open_clip" or (len(eyes) > 2 and all(eyes)),
                "open_clip:ARCHITECTURE:WEIGHTS",
            ),
            ("discriminator_learning_rate", 0 < self.discriminator_learning_rate < math.inf, "a number above 0"),
            (
                "negative_prompt",
                self.objective.weighting != "nfsd" or bool(self.negative_prompt.strip()),
                "set for the nfsd weighting, for example to 'a blurry mess'",
            ),
        ):
            errors.require(fits, name, getattr(self, name), wanted)
        self.check()
        if self.lora_rank and self.objective.latent_weight and (self.gradient_checkpointing or self.compile):
            raise errors.ConfigError(
                "options contradict each other: latent_weight with lora_rank and gradient_checkpointing or compile: "
                "the teacher's features come out of the U-Net that it shares with the student, adapters off; set one "
                "of them to 0 or false"
            )

    def micro_batch(self, processes: int) -> int:
        """Examples that a process computes at once."""
        return self.training.batch_size // processes // self.training.accumulate

    def check_shares(self, processes: int) -> None:
        """Raise ConfigError if the method cannot do with so few examples at once."""
        few = self.objective.mismatch_weight > 0 and self.micro_batch(processes) < 2
        errors.require(
            not few,
            "mismatch_weight",
            self.objective.mismatch_weight,
            "0 where a process has one example at a time: its caption has no neighbour to be mistaken for",
        )

    def decisive(self) -> dict[str, object]:
        """The settings that decide what is learnt, besides how long, or how a checkpoint looks."""
        own = ("seed", "size_px", "scenes", "feature_network", "negative_prompt", "pixel_decoder")
        return {
            **super().decisive(),
            **{name: getattr(self, name) for name in (*own, "discriminator_learning_rate")},
            "objective": dataclasses.asdict(self.objective),
            "training": self.training.decisive(),
        }

    def check_size(self, size_px: int, *, shapes: bool) -> None:
        """Raise ConfigError if a teacher of this size cannot learn from shapes (if asked to) or be judged as set."""
        if shapes and size_px != model.IMAGE_SIZE_PX:
            raise errors.ConfigError(
                f"the teacher makes {size_px} px images and shapes have {model.IMAGE_SIZE_PX} px; "
                "give images of your own with --data, or prompts with --prompts"
            )
        blind = self.feature_network == "shapes-encoder" and size_px != model.IMAGE_SIZE_PX
        if blind and self.objective.looks:
            raise errors.ConfigError(
                f"the teacher makes {size_px} px images and shapes-encoder knows shapes of {model.IMAGE_SIZE_PX} px "
                "alone; set feature_network=dinov2"
            )


class Distillation:
    """One run: a teacher, its student, the data and a folder.

    images: captioned images, or a prepared cache. start: a student to go on from, by name or folder; the teacher itself
    if None. parts: the teacher, if it is loaded already. accelerator: from `compute.launch`, if it is made already.
    acceptance, teacher_licence: of `release.require_licences`. base: of a teacher that is a single file.
    Raises ModelError if the start is not of the teacher's architecture, ConfigError if it cannot be what is asked for.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: str,
        images: data.CaptionedImages | cache.CachedImages,
        folder: pathlib.Path,
        *,
        start: str | None = None,
        parts: artifact.Parts | None = None,
        accelerator: accelerate.Accelerator | None = None,
        acceptance: licences.Acceptance | None = None,
        teacher_licence: str = "",
        base: str | None = None,
    ) -> None:
        self.config, self.teacher_name, self.folder, self.base = config, teacher, folder, base
        self.start, self.teacher_licence = start, teacher_licence
        self.acceptance = acceptance or licences.Acceptance()
        self.code = release.code_version()
        self.accelerator = accelerator or compute.launch(config)
        config.check_shares(self.accelerator.num_processes)
        self.parts = (
            compute.sized(parts, config.size_px)
            if parts
            else compute.load_teacher(config, teacher, base=base, size_px=config.size_px)
        )
        torch.manual_seed(config.seed)
        self.objective = self._objective()
        self.feed = self._feed(images)

    def _objective(self) -> add.ADD:
        config, parts = self.config, self.parts
        return networks.make_objective(
            config,
            parts,
            feature_network=networks.load_feature_network(config.feature_network, parts.size_px),
            device=self.accelerator.device,
            tiny_decoder=artifact.load_tiny_decoder(config.pixel_decoder, parts) if config.pixel_decoder else None,
            student=networks.earlier_student(self.start, parts) if self.start else None,
        )

    def _feed(self, images: data.CaptionedImages | cache.CachedImages) -> feed.Feed:
        encoder = feed.Encoder(self.parts, self.accelerator, self.config.negative_prompt)
        if not isinstance(images, cache.CachedImages):
            return feed.ImageFeed(images, encoder, self.config.seed)
        looks = self.objective.decode if self.config.objective.looks else None
        return feed.CacheFeed(images, encoder, self.config.seed, decode=looks)

    def run(self) -> pathlib.Path:
        """Train and export. Returns the artifact's folder.

        Raises ConfigError if another run stands in its own, ArtifactError if a licence forbids the student.
        """
        files.check_replaceable(self.folder / "student", artifact.DISTILLATION_FILE)
        release.require_licences(self._origin(), self.acceptance, teacher_licence=self.teacher_licence)
        self._claim()
        loop.fit(
            self.accelerator,
            self._learners(),
            lambda place: {"batch": self.feed.batch(place)},
            self.config.training,
            self.folder / "training",
            averaged=self.objective.student.unet,
            computing=self.config,
            on_report=self._show_samples,
        )
        return self._export()

    def _learners(self) -> list[loop.Learner]:
        rates = {
            "student": self.config.training.learning_rate,
            "discriminator": self.config.discriminator_learning_rate,
        }
        betas = {"student": (0.9, 0.99), "discriminator": (0.0, 0.99)}
        large = {"student": self.objective.student.unet}
        return [
            loop.Learner(phase.name, phase, rates[phase.name], betas[phase.name], large.get(phase.name))
            for phase in self.objective.phases
        ]

    def _claim(self) -> None:
        first = self.accelerator.is_main_process
        configs.claim(self.folder, self._origin() | self.config.decisive(), write=first)
        if first:
            configs.save(self.config, self.folder / "config.yaml")

    def _origin(self) -> dict[str, object]:
        origin = {"teacher": self.teacher_name, "start": self.start, "data": self.feed.source}
        more = {"base": self.base, "data_licences": self.feed.licences}
        return origin | {key: value for key, value in more.items() if value}

    # --- pictures and the artifact ---

    def _student_parts(self, unet: nn.Module, others: artifact.Parts) -> artifact.Parts:
        scheduler = artifact.student_scheduler(others.scheduler, self.config.objective.student_steps)
        return dataclasses.replace(others, unet=unet, scheduler=scheduler)

    def _show_samples(self, images_seen: int, progress: tracking.Progress) -> Tensor:
        """The same eight captions and seeds every time, a row for each step count.

        Returns pictures of the same captions from several seeds, in one step: (prompts, seeds, 3, H, W) in [-1, 1].
        """
        timesteps = {int(n): t for n, t in pipeline.trained_timesteps(self.config.objective.student_steps).items()}
        student = pipeline.FewStepPipeline(self._student_parts(self.objective.student.unet, self.parts), timesteps)
        captions = self.feed.prompts(8)
        count = len(captions)
        rows = {steps: self._sample(student, captions, range(count), steps) for steps in sorted(timesteps)}
        progress.picture("samples", torch.cat([torch.cat(list(row), -1) for row in rows.values()], -2), images_seen)
        eyes = self.objective.feature_network
        if isinstance(eyes, features.TextImageNetwork):
            progress.log(
                {
                    f"samples/{n}_steps/clip_score[{eyes.name}]": _agreement(eyes, row, captions)
                    for n, row in rows.items()
                },
                images_seen,
            )
        more = [
            self._sample(student, captions, range(count * seed, count * (seed + 1)), 1)
            for seed in range(1, SAMPLE_SEEDS)
        ]
        return torch.stack([rows[1], *more], 1)

    def _sample(self, student: pipeline.FewStepPipeline, captions: list[str], seeds: range, steps: int) -> Tensor:
        """No more pictures at once than a training step makes, as so many fit."""
        size = max(1, self.config.micro_batch(self.accelerator.num_processes))
        with self.accelerator.autocast():
            return torch.cat(
                [
                    student(captions[first : first + size], seeds[first : first + size], steps=steps)
                    for first in range(0, len(captions), size)
                ]
            )

    def _export(self) -> pathlib.Path:
        """Every process takes part, as each may hold a shard of the student; the main one writes."""
        folder = self.folder / "student"
        unet = parallel.on_cpu(self.objective.student.unet, main=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            # Frozen parts in half precision are good enough to train by and not to hand on.
            others = self.parts
            if self.config.frozen_precision != "fp32":
                others = artifact.load(self.teacher_name, base=self.base)
            parts = self._student_parts(unet, others)
            seen = loop.images_seen(self.folder / "training", self.config.training)
            release.export(
                folder,
                parts=parts,
                distillation=describe(self.config, parts, self._origin(), seen, self.code),
                lora=self.config.lora_rank > 0,
                acceptance=self.acceptance,
                teacher_licence=self.teacher_licence,
            )
            _log.info("exported %s", folder)
        self.accelerator.wait_for_everyone()
        return folder


def describe(
    config: DistillConfig, parts: artifact.Parts, origin: Mapping[str, object], images_seen: int, code: str
) -> artifact.Distillation:
    """What `distillation.json` says of a student. parts: as `artifact.export_student` takes them. code: its version."""
    lineage = {
        **origin,
        "images_seen": images_seen,
        "checkpoint": checkpoint.folder_name(images_seen // config.training.batch_size),
        "seed": config.seed,
        "config": dataclasses.asdict(config),
        "code": code,
    }
    return artifact.Distillation(
        objective="add",
        student_timesteps=pipeline.trained_timesteps(config.objective.student_steps),
        prediction_type=parts.scheduler.config.prediction_type,
        size_px=parts.size_px,
        lineage=lineage,
    )


def _agreement(eyes: features.TextImageNetwork, images: Tensor, captions: list[str]) -> float:
    """Mean cosine of pictures (B, 3, H, W) and their captions."""
    weight = next(eyes.parameters())
    with torch.no_grad():
        seen = eyes(images.to(weight)).vector
        return float(functional.cosine_similarity(seen.float(), eyes.embed_text(captions).float()).mean())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.distill", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="shapes_add", help="a YAML file or a name in training/configs")
    parser.add_argument(
        "--teacher",
        default="shapes-teacher",
        help="an SDXL-layout folder, a .safetensors file, a hub id or shapes-teacher",
    )
    parser.add_argument("--base", help="configs and tokenizers for a .safetensors file: a folder or a hub id")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=pathlib.Path, help="a cache of training.prepare, or a folder of images")
    source.add_argument(
        "--prompts", type=pathlib.Path, help="a text file, a prompt a line: the teacher makes the images"
    )
    parser.add_argument("--student", help="an earlier student to go on from (a folder, a hub id or shapes-student)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/distill"), help="the run's folder")
    release.add_arguments(parser)
    plan.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", help="key=value, nested keys with dots")
    return parser.parse_intermixed_args(arguments)


def open_data(
    given: argparse.Namespace, config: DistillConfig, parts: artifact.Parts, accelerator: accelerate.Accelerator
) -> data.CaptionedImages | cache.CachedImages:
    """What to learn from, as the command line names it. Raises DataError, or ConfigError if it does not fit."""
    size_px = config.size_px or parts.size_px
    config.check_size(size_px, shapes=given.data is None and given.prompts is None)
    if given.data is not None:
        return feed.open_folder(given.data, parts, size_px)
    if given.prompts is None:
        return data.ShapesImages(config.scenes, config.seed)
    return data.teacher_images(
        given.teacher,
        given.prompts,
        given.out / "teacher_images",
        parts=parts,
        accelerator=accelerator,
        guidance_scale=statistics.mean(config.objective.teacher_guidance),
        seed=config.seed,
    )


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = configs.load(DistillConfig, given.config, given.overrides)
    if given.plan:
        plan.show(config, given.teacher, given, cached=given.data is not None and cache.is_cache(given.data))
        return
    files.check_folder(given.out)
    accelerator = compute.launch(config)
    if given.prompts is not None:  # before the teacher draws for hours
        origin = {"teacher": given.teacher, "start": given.student}
        release.require_licences(origin, release.acceptance(given), teacher_licence=given.teacher_licence)
    parts = compute.load_teacher(config, given.teacher, base=given.base, size_px=config.size_px)
    Distillation(
        config,
        given.teacher,
        open_data(given, config, parts, accelerator),
        given.out,
        start=given.student,
        parts=parts,
        accelerator=accelerator,
        acceptance=release.acceptance(given),
        teacher_licence=given.teacher_licence,
        base=given.base,
    ).run()
    compute.close(accelerator)


if __name__ == "__main__":
    errors.run(main)
