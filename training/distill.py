"""Distil a teacher into a 1-4 step student: `accelerate launch -m training.distill --config shapes_add`.

Run the same command again to go on where it stopped. The averaged student is exported to `<out>/student` as a plain
diffusers folder with `distillation.json`.
"""

import argparse
import copy
import dataclasses
import datetime
import logging
import math
import pathlib
import statistics
import subprocess
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils import tensorboard

import diffusion_kd
from diffusion_kd import artifact, errors, files, pipeline
from diffusion_kd.denoiser import Denoiser
from diffusion_kd.networks import features
from diffusion_kd.objectives import add
from diffusion_kd.objectives.base import Batch, Objective
from diffusion_kd.shapes import model
from training import config as configs
from training import data, loop

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class DistillConfig:
    """All settings of a distillation.

    objective: keys of `add.ADDConfig`. training: keys of `loop.LoopConfig`.
    scenes: how many shapes scenes are drawn (unused with --data or --prompts).
    feature_network: what the pixel discriminator looks through: `shapes-encoder` or a CLIP folder or hub id,
        `dinov2` or `dinov2:PATH` (ViT-S/14, as in ADD), `open_clip:ARCHITECTURE:WEIGHTS`.
    negative_prompt: for the nfsd weighting alone, which needs one.
    discriminator_learning_rate: of the heads; their Adam has beta1 = 0.
    precision: of the networks' arithmetic: fp32 or bf16. Weights, x0 and losses stay float32.
    """

    seed: int = 0
    scenes: int = 120_000
    feature_network: str = "shapes-encoder"
    negative_prompt: str = ""
    discriminator_learning_rate: float = 1e-3
    precision: str = "bf16"
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
            ("scenes", self.scenes >= data.ShapesImages.group_size, f"{data.ShapesImages.group_size} or more"),
            (
                "feature_network",
                eyes[0] != "open_clip" or (len(eyes) > 2 and all(eyes)),
                "open_clip:ARCHITECTURE:WEIGHTS",
            ),
            ("discriminator_learning_rate", 0 < self.discriminator_learning_rate < math.inf, "a number above 0"),
            ("precision", self.precision in ("fp32", "bf16"), "fp32 or bf16"),
            (
                "negative_prompt",
                self.objective.weighting != "nfsd" or bool(self.negative_prompt.strip()),
                "set for the nfsd weighting, for example to 'a blurry mess'",
            ),
        ):
            errors.require(fits, name, getattr(self, name), wanted)

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


def load_feature_network(name: str, size_px: int) -> features.FeatureNetwork:
    """The discriminator's eyes, by the names of `DistillConfig.feature_network`. Raises ModelError."""
    kind, _, rest = name.partition(":")
    if kind == "dinov2":
        return features.DinoFeatures(weights=rest or True, size_px=min(518, size_px // 14 * 14))
    if kind == "open_clip":
        architecture, _, weights = rest.partition(":")
        return features.OpenClipFeatures(architecture, weights or None)
    return pipeline.load_feature_network(name)


def launch(config: DistillConfig) -> accelerate.Accelerator:
    """This process among its fellows; they wait up to a day for one another, for one may draw or export alone."""
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))
    precision = "no" if config.precision == "fp32" else config.precision
    return accelerate.Accelerator(mixed_precision=precision, kwargs_handlers=[patience])


class Distillation:
    """One run: a teacher, its student, the data and a folder.

    start: a student to go on from, by name or folder; the teacher itself if None.
    parts: the teacher, if it is loaded already. accelerator: from `launch`, if it is made already.
    Raises ModelError if the start is not of the teacher's architecture.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: str,
        images: data.CaptionedImages,
        folder: pathlib.Path,
        *,
        start: str | None = None,
        parts: artifact.Parts | None = None,
        accelerator: accelerate.Accelerator | None = None,
    ) -> None:
        self.config, self.teacher_name, self.images, self.folder = config, teacher, images, folder
        self.start = start
        self.code = _code_version()
        self.accelerator = accelerator or launch(config)
        self.parts = (parts or artifact.load(teacher)).to(self.accelerator.device)
        torch.manual_seed(config.seed)
        student = copy.deepcopy(self.parts.denoiser())
        if start is not None:
            _go_on_from(student, self.parts, start)
        student.requires_grad_(True)
        self.objective: Objective = add.ADD(
            config.objective,
            student=student,
            teacher=self.parts.denoiser(),
            vae=self.parts.vae,
            feature_network=load_feature_network(config.feature_network, self.parts.size_px).to(
                self.accelerator.device
            ),
        )

    def run(self) -> pathlib.Path:
        """Train and export. Returns the artifact's folder. Raises ConfigError if another run stands in its own."""
        self._claim()
        rates = {
            "student": self.config.training.learning_rate,
            "discriminator": self.config.discriminator_learning_rate,
        }
        betas = {"student": (0.9, 0.99), "discriminator": (0.0, 0.99)}
        learners = [
            loop.Learner(phase.name, phase, rates[phase.name], betas[phase.name]) for phase in self.objective.phases
        ]
        averaged = loop.fit(
            self.accelerator,
            learners,
            self._draw,
            self.config.training,
            self.folder / "training",
            averaged=self.objective.student.unet,
            on_report=self._show_samples,
        )
        if self.accelerator.is_main_process:
            self._export(averaged)
        self.accelerator.wait_for_everyone()
        return self.folder / "student"

    def _claim(self) -> None:
        origin = {"teacher": self.teacher_name, "start": self.start, "data": self.images.source}
        settings = dataclasses.asdict(self.config) | {"training": self.config.training.decisive()}
        first = self.accelerator.is_main_process
        configs.claim(self.folder, origin | settings, write=first)
        if first:
            configs.save(self.config, self.folder / "config.yaml")

    def _draw(self, step: int, count: int) -> dict[str, Any]:
        rank = self.accelerator.process_index
        rng = np.random.default_rng((self.config.seed, step, rank))
        indices = [int(index) for index in rng.integers(len(self.images), size=count)]
        images = data.to_tensor(self.images.images_uint8(indices)).to(self.accelerator.device)
        size = (images.shape[-2], images.shape[-1])
        cond = self.parts.text.encode(self.images.captions(indices, step), size)
        negative = self.config.negative_prompt
        batch = Batch(
            images=images,
            latents=self._encode(images),
            cond=cond,
            uncond=pipeline.no_prompt(cond),
            negative=self.parts.text.encode([negative] * count, size) if negative else None,
            step=step,
            seed=(self.config.seed, rank),
        )
        return {"batch": batch}

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        vae = self.parts.vae
        with self.accelerator.autocast():
            return vae.encode(images).latent_dist.mean.float() * vae.config.scaling_factor  # type: ignore[no-any-return]

    def _student_parts(self, unet: nn.Module) -> artifact.Parts:
        scheduler = artifact.student_scheduler(self.parts.scheduler, self.config.objective.student_steps)
        return dataclasses.replace(self.parts, unet=unet, scheduler=scheduler)

    def _show_samples(self, images_seen: int, unet: nn.Module, writer: tensorboard.SummaryWriter) -> None:
        """The same eight captions and seeds every time, a row for each step count, to TensorBoard."""
        timesteps = pipeline.trained_timesteps(self.config.objective.student_steps)
        student = pipeline.FewStepPipeline(self._student_parts(unet), {int(n): t for n, t in timesteps.items()})
        count = min(8, len(self.images))
        captions = self.images.captions([index * len(self.images) // count for index in range(count)], 0)
        rows = [student(captions, range(len(captions)), steps=steps) for steps in sorted(student.timesteps)]
        grid = torch.cat([torch.cat(list(row), -1) for row in rows], -2)
        writer.add_image("samples", (grid + 1) / 2, images_seen)

    def _export(self, unet: nn.Module) -> None:
        parts = self._student_parts(unet)
        artifact.export_student(
            self.folder / "student",
            parts=parts,
            distillation=artifact.Distillation(
                objective="add",
                student_timesteps=pipeline.trained_timesteps(self.config.objective.student_steps),
                prediction_type=parts.scheduler.config.prediction_type,
                size_px=parts.size_px,
                lineage={
                    "teacher": self.teacher_name,
                    "start": self.start,
                    "data": self.images.source,
                    "images_seen": loop.images_seen(self.folder / "training", self.config.training),
                    "seed": self.config.seed,
                    "config": dataclasses.asdict(self.config),
                    "code": self.code,
                },
            ),
        )
        _log.info("exported %s", self.folder / "student")


def _go_on_from(student: Denoiser, teacher: artifact.Parts, start: str) -> None:
    """Give a copy of the teacher the weights of an earlier student of it."""
    earlier = artifact.load(start)
    if earlier.scheduler.config.prediction_type != student.prediction_type:
        raise errors.ModelError(
            f"{start} predicts {earlier.scheduler.config.prediction_type} and the teacher {student.prediction_type}; "
            "start from a student of this teacher"
        )
    try:
        student.unet.load_state_dict(earlier.unet.state_dict())
    except RuntimeError as error:
        raise errors.ModelError(
            f"{start} is not of the teacher's architecture ({errors.first_line(error)}); "
            "start from a student of this teacher"
        ) from None
    if not _same_weights(teacher.vae, earlier.vae):
        raise errors.ModelError(
            f"{start} has another autoencoder than the teacher, so its latents mean something else; "
            "start from a student of this teacher"
        )


def _same_weights(module: nn.Module, other: nn.Module) -> bool:
    """Whether they agree to within half precision, in which a student may be stored."""
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        weight.shape == theirs[name].shape
        and torch.allclose(weight.cpu().float(), theirs[name].cpu().float(), rtol=1e-2, atol=1e-4)
        for name, weight in ours.items()
    )


def _code_version() -> str:
    """The package's version and, in a checkout with git at hand, its commit."""
    here = pathlib.Path(__file__).parent
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        asked = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return diffusion_kd.__version__
    return f"{diffusion_kd.__version__}+{asked.stdout.strip()}" if asked.returncode == 0 else diffusion_kd.__version__


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.distill", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="shapes_add", help="a YAML file or a name in training/configs")
    parser.add_argument("--teacher", default="shapes-teacher", help="an SDXL-layout folder, a hub id or shapes-teacher")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=pathlib.Path, help="a folder with images and metadata.jsonl instead of shapes")
    source.add_argument(
        "--prompts", type=pathlib.Path, help="a text file, a prompt a line: the teacher makes the images"
    )
    parser.add_argument("--student", help="an earlier student to go on from (a folder, a hub id or shapes-student)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/distill"), help="the run's folder")
    parser.add_argument("overrides", nargs="*", help="key=value, nested keys with dots")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = configs.load(DistillConfig, given.config, given.overrides)
    files.check_folder(given.out)
    accelerator = launch(config)
    parts = artifact.load(given.teacher)
    config.check_size(parts.size_px, shapes=given.data is None and given.prompts is None)
    if given.data is not None:
        images: data.CaptionedImages = data.FolderImages(given.data, parts.size_px)
    elif given.prompts is not None:
        images = data.teacher_images(
            given.teacher,
            given.prompts,
            given.out / "teacher_images",
            parts=parts,
            accelerator=accelerator,
            guidance_scale=statistics.mean(config.objective.teacher_guidance),
            seed=config.seed,
        )
    else:
        images = data.ShapesImages(config.scenes, config.seed)
    distillation = Distillation(
        config, given.teacher, images, given.out, start=given.student, parts=parts, accelerator=accelerator
    )
    distillation.run()


if __name__ == "__main__":
    errors.run(main)
