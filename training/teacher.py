"""Train the reference teacher from nothing: `python -m training.teacher --config shapes`. With `--teacher MODEL` it
fine-tunes that one instead (`training.finetune`).

Four stages, each resumable by running the same command again:

1. contrastive: both text encoders and the image encoder (the embedded feature network) learn to match captions
   and images;
2. vae: the autoencoder; its latents are then normalised per channel;
3. decoder: the decoder alone, on latents with a little noise;
4. unet: the denoiser, together with the text encoders, on cached latents.

On several GPUs `accelerate launch -m training.teacher`, on two cores `torchrun --nproc_per_node 2 -m training.teacher`.
"""

import argparse
import dataclasses
import logging
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion_kd import artifact, conditioning, errors, files, types
from diffusion_kd.networks import attention
from diffusion_kd.schedule import NoiseSchedule
from diffusion_kd.shapes import model
from training import compute, data, finetune, loop, release, stages
from training import config as configs

_log = logging.getLogger(__name__)

_DECODER_NOISE = 0.25
"""Most noise, in deviations of the latents, that the decoder learns to overlook."""

STAGES = ("contrastive", "vae", "decoder", "unet")


@dataclasses.dataclass
class TeacherConfig:
    """All settings of a teacher.

    scenes: how many shapes scenes are drawn (unused with a folder of images).
    stages: which to run or, where they are finished, to load, in their order. decoder and unet need vae, unet needs
        contrastive.
    prediction_type: `v_prediction` on zero-terminal-signal betas, or `epsilon` on SDXL's own.
    caption_dropout: share of captions replaced by nothing, so that guidance works.
    cell_weight: weight of the auxiliary loss that reads shape, colour and size in each cell; shapes only.
    kl_weight: weight of the autoencoder's KL term, per latent element.
    """

    seed: int = 0
    scenes: int = 120_000
    prediction_type: str = "v_prediction"
    caption_dropout: float = 0.1
    cell_weight: float = 0.1
    kl_weight: float = 1e-4
    stages: list[str] = dataclasses.field(default_factory=lambda: list(STAGES))
    contrastive: loop.LoopConfig = dataclasses.field(
        default_factory=lambda: loop.LoopConfig(images=400_000, batch_size=128, learning_rate=1e-3)
    )
    vae: loop.LoopConfig = dataclasses.field(
        default_factory=lambda: loop.LoopConfig(images=60_000, batch_size=16, learning_rate=2e-3, warmup_images=1_000)
    )
    decoder: loop.LoopConfig = dataclasses.field(
        default_factory=lambda: loop.LoopConfig(images=60_000, batch_size=16, learning_rate=1e-3, warmup_images=1_000)
    )
    unet: loop.LoopConfig = dataclasses.field(
        default_factory=lambda: loop.LoopConfig(
            images=640_000, batch_size=64, learning_rate=1e-3, decay_share=0.45, ema_decay=0.999
        )
    )

    def __post_init__(self) -> None:
        configs.require_seed(self.seed)
        fewest = data.ShapesImages.group_size
        errors.require(self.scenes >= fewest, "scenes", self.scenes, f"{fewest} or more")
        errors.require(0 <= self.caption_dropout <= 1, "caption_dropout", self.caption_dropout, "a share from 0 to 1")
        for name in ("cell_weight", "kl_weight"):
            errors.require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 (off) or more")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise errors.ConfigError(f"prediction_type is {self.prediction_type!r}; it must be epsilon or v_prediction")
        unknown = set(self.stages) - set(STAGES)
        if unknown:
            raise errors.ConfigError(f"stages names {', '.join(sorted(unknown))}; stages are {', '.join(STAGES)}")
        given = f"stages is [{', '.join(self.stages)}]"
        if not self.stages or self.stages != [stage for stage in STAGES if stage in self.stages]:
            raise errors.ConfigError(f"{given}; name at least one, each once, in the order {', '.join(STAGES)}")
        for stage, needed in (("decoder", "vae"), ("unet", "vae"), ("unet", "contrastive")):
            if stage in self.stages and needed not in self.stages:
                raise errors.ConfigError(f"{given}; {stage} needs {needed}, which is loaded if it is finished")


def _images(config: TeacherConfig, folder: pathlib.Path | None) -> data.CaptionedImages:
    if folder is None:
        return data.ShapesImages(config.scenes, config.seed)
    return data.FolderImages(folder, model.IMAGE_SIZE_PX)


class Build:
    """One training of a teacher: its parts, its data and its run folder."""

    def __init__(
        self, config: TeacherConfig, folder: pathlib.Path, images: data.CaptionedImages, *, train_further: bool = True
    ) -> None:
        self.train_further = train_further
        self.accelerator = compute.launch(compute.ComputeConfig())
        self.config, self.folder, self.images = config, folder, images
        kept = ("seed", "prediction_type", "caption_dropout", "cell_weight", "kl_weight")
        origin = {"data": images.source} | {key: getattr(config, key) for key in kept}
        configs.claim(folder, origin, write=self.accelerator.is_main_process)
        self.labelled = self._labels([0]) is not None
        torch.manual_seed(config.seed)
        tokenizer = self._tokenizer()
        self.text = conditioning.PromptEncoder(
            tokenizer, tokenizer, model.build_text_encoder(tokenizer), model.build_text_encoder_2(tokenizer)
        )
        self.image_encoder = model.build_image_encoder()
        self.vae = model.build_vae()
        self.unet = model.build_unet()
        if self.accelerator.device.type == "cpu":
            attention.use(self.unet, "plain")

    def _tokenizer(self) -> transformers.CLIPTokenizer:
        """Learnt from the captions once; a run that goes on reads what it learnt."""
        folder = self.folder / "tokenizer"
        if not folder.is_dir():
            count = min(len(self.images), 20_000)
            tokenizer = model.build_tokenizer(self.images.captions(range(count), self.config.seed))
            if self.accelerator.is_main_process:
                with files.written_whole(folder) as unfinished:
                    model.save_tokenizer(tokenizer, unfinished)
        self.accelerator.wait_for_everyone()
        return transformers.CLIPTokenizer.from_pretrained(folder)

    def _rng(self, stage: int, place: loop.Place) -> np.random.Generator:
        """For the whole batch, of which each process takes its rows: so their number changes nothing."""
        return np.random.default_rng((self.config.seed, *place.seed, stage, place.step))

    def _pick(self, rng: np.random.Generator, place: loop.Place, group_size: int = 1) -> list[int]:
        groups = rng.integers(len(self.images) // group_size, size=-(-place.batch_size // group_size))
        drawn = [int(group) * group_size + member for group in groups for member in range(group_size)]
        return [drawn[row] for row in place.rows]

    def _tokens(self, indices: list[int], seed: int) -> dict[str, Tensor]:
        ids, ids_2 = self.text.tokenize(self.images.captions(indices, seed))
        return {"ids": ids, "ids_2": ids_2}

    def _labels(self, indices: list[int]) -> Tensor | None:
        labels = self.images.cell_labels(indices, model.LATENT_SIZE)
        return None if labels is None else torch.from_numpy(labels)

    def _to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _fit(self, stage: str, module: nn.Module, draw: loop.Draw) -> None:
        """Train `module`, or restore it; it holds its average afterwards."""
        config: loop.LoopConfig = getattr(self.config, stage)
        learner = loop.Learner(stage, module, config.learning_rate)
        if self.train_further:
            loop.fit(self.accelerator, [learner], draw, config, self.folder / stage, averaged=module)
        else:
            loop.restore(self.accelerator, [learner], config, self.folder / stage, averaged=module)

    def train_contrastive(self) -> None:
        def draw(place: loop.Place) -> dict[str, Any]:
            indices = self._pick(self._rng(1, place), place, self.images.group_size)
            return self._to_device(
                {
                    "images": data.to_tensor(self.images.images_uint8(indices)),
                    **self._tokens(indices, place.step),
                    "labels": self._labels(indices),
                    "cell_weight": 10 * self.config.cell_weight,
                }
            )

        module = stages.Contrastive(self.text, self.image_encoder, labelled=self.labelled)
        self._fit("contrastive", module, draw)
        # The text encoders go on learning with the U-Net; the feature network keeps what they know now.
        self.clip = model.join_clip(self.text.text_encoder_2, self.image_encoder)

    def train_vae(self) -> None:
        def draw(place: loop.Place) -> dict[str, Any]:
            rng = self._rng(2, place)
            indices = self._pick(rng, place)
            shape = (place.batch_size, model.LATENT_CHANNELS, model.LATENT_SIZE, model.LATENT_SIZE)
            return self._to_device(
                {
                    "images": data.to_tensor(self.images.images_uint8(indices)),
                    "noise": _rows(rng.standard_normal(shape, np.float32), place),
                    "labels": self._labels(indices),
                    "cell_weight": self.config.cell_weight,
                }
            )

        module = stages.Autoencoding(self.vae, self.config.kl_weight, labelled=self.labelled)
        self._fit("vae", module, draw)
        self._normalise_latents()

    @torch.no_grad()
    def _normalise_latents(self) -> None:
        """Fold a shift and scale of each channel into the 1x1 convolutions around the latents: unit variance for all.

        diffusers' SDXL pipeline knows one `scaling_factor` for all channels, and four channels at most where it
        knows more; the convolutions can hold the rest exactly.
        """
        self.vae.to(self.accelerator.device).eval()
        indices = range(0, len(self.images), max(len(self.images) // 2048, 1))
        latents = torch.cat([self._encode(list(indices[start : start + 128])) for start in range(0, len(indices), 128)])
        latents = latents.to(self.accelerator.device)
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        _log.info("latent deviations before normalising: %s", " ".join(f"{value:.2f}" for value in deviation))
        channels = model.LATENT_CHANNELS
        encode, decode = self.vae.quant_conv, self.vae.post_quant_conv
        encode.weight[:channels] /= deviation[:, None, None, None]
        encode.bias[:channels] = (encode.bias[:channels] - mean) / deviation
        encode.bias[channels:] -= 2 * deviation.log()
        decode.bias += decode.weight[:, :, 0, 0] @ mean
        decode.weight *= deviation[None, :, None, None]

    @torch.no_grad()
    def _encode(self, indices: list[int]) -> Tensor:
        images = data.to_tensor(self.images.images_uint8(indices)).to(self.accelerator.device)
        with self.accelerator.autocast():
            latents: Tensor = self.vae.encode(images).latent_dist.mean.float().cpu()
        return latents

    def cache_latents(self) -> tuple[Tensor, Tensor | None]:
        """Encode every image once, shared among the processes.

        Returns latents (N, C, h, w) float16 and cell labels (N, 3, h, w) uint8 or None, on the CPU.
        """
        path = self.folder / "latents.pt"
        if not path.exists():
            if self.accelerator.is_main_process:
                files.sweep(self.folder)
            self.accelerator.wait_for_everyone()
            rank, workers, count = self.accelerator.process_index, self.accelerator.num_processes, len(self.images)
            own = range(rank * count // workers, (rank + 1) * count // workers)
            chunks = [list(own[start : start + 128]) for start in range(0, len(own), 128)]
            labels = [known.to(torch.uint8) for chunk in chunks if (known := self._labels(chunk)) is not None]
            part = {
                "latents": torch.cat([self._encode(chunk).half() for chunk in chunks]),
                "labels": torch.cat(labels) if labels else None,
            }
            _save(part, self.folder / f"latents.{rank}.pt")
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self._join_parts([self.folder / f"latents.{worker}.pt" for worker in range(workers)], path)
            self.accelerator.wait_for_everyone()
        cached = torch.load(path, mmap=True)
        return cached["latents"], cached["labels"]

    @staticmethod
    def _join_parts(paths: list[pathlib.Path], joined: pathlib.Path) -> None:
        parts = [torch.load(path) for path in paths]
        labels = None if parts[0]["labels"] is None else torch.cat([part["labels"] for part in parts])
        _save({"latents": torch.cat([part["latents"] for part in parts]), "labels": labels}, joined)
        for path in paths:
            path.unlink()

    def train_decoder(self) -> None:
        latents, _ = self.cache_latents()

        def draw(place: loop.Place) -> dict[str, Any]:
            rng = self._rng(4, place)
            indices = self._pick(rng, place)
            chosen = latents[indices].float()
            whole = (place.batch_size, *chosen.shape[1:])
            strength = _rows(rng.random((place.batch_size, 1, 1, 1), np.float32), place) * _DECODER_NOISE
            shaken = chosen + strength * _rows(rng.standard_normal(whole, np.float32), place)
            return self._to_device({"latents": shaken, "images": data.to_tensor(self.images.images_uint8(indices))})

        self._fit("decoder", stages.Decoding(self.vae), draw)

    def train_unet(self) -> None:
        latents, labels = self.cache_latents()
        schedule = NoiseSchedule.from_scheduler(model.build_noise_scheduler(self.config.prediction_type))
        kind = types.prediction_type(self.config.prediction_type)
        module = stages.Denoising(self.unet, self.text, schedule, kind, labelled=self.labelled)
        # SDXL reads the token states before the last layer, so the first encoder's last layer has no gradient here.
        for unused in (self.text.text_encoder.encoder.layers[-1], self.text.text_encoder.final_layer_norm):
            unused.requires_grad_(False)

        def draw(place: loop.Place) -> dict[str, Any]:
            rng = self._rng(3, place)
            indices = self._pick(rng, place)
            chosen = latents[indices].float()
            count = place.batch_size
            strata = (rng.permutation(count) + rng.random(count)) / count
            return self._to_device(
                {
                    "latents": chosen,
                    "noise": _rows(rng.standard_normal((count, *chosen.shape[1:]), np.float32), place),
                    "timesteps": _rows((strata * len(schedule)).astype(np.int64), place),
                    **self._tokens(indices, place.step),
                    "dropped": _rows(rng.random(count) < self.config.caption_dropout, place),
                    "labels": None if labels is None else labels[indices].long(),
                    "cell_weight": self.config.cell_weight,
                }
            )

        self._fit("unet", module, draw)

    def train(self) -> None:
        """Run all stages, each going on from its checkpoint, then export."""
        for stage in STAGES:
            if stage in self.config.stages:
                getattr(self, f"train_{stage}")()
        if self.accelerator.is_main_process and "unet" in self.config.stages:
            self.export()

    def export(self) -> None:
        """Write the teacher as an SDXL-layout pipeline folder, and the embedded feature network beside it."""
        parts = artifact.Parts(self.unet, self.vae, self.text, model.build_noise_scheduler(self.config.prediction_type))
        artifact.save_pipeline(self.folder / "teacher", parts=parts)
        with files.written_whole(self.folder / "encoder") as unfinished:
            model.save_clip(self.clip, self.text.tokenizers[0], unfinished)
        _log.info("exported %s and %s", self.folder / "teacher", self.folder / "encoder")


def _rows(drawn: NDArray[Any], place: loop.Place) -> Tensor:
    """This process's rows of what was drawn for the whole batch."""
    return torch.from_numpy(drawn[place.rows.start : place.rows.stop])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.teacher", description="Train a small SDXL teacher, or fine-tune one of your own."
    )
    parser.add_argument(
        "--config", help="a YAML file or a name in training/configs: shapes, or with --teacher sdxl_teacher"
    )
    parser.add_argument(
        "--teacher",
        help="fine-tune this one: an SDXL-layout folder, a .safetensors file or a hub id; else from nothing",
    )
    parser.add_argument("--base", help="configs and tokenizers for a .safetensors file: a folder or a hub id")
    parser.add_argument("--data", type=pathlib.Path, help="a folder of captioned images (with --teacher also a cache)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/teacher"), help="the run's folder")
    parser.add_argument("--export-now", action="store_true", help="train no further; export what the checkpoints hold")
    release.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", help="key=value")
    given = parser.parse_intermixed_args(arguments)
    if given.teacher is None and given.base is not None:
        parser.error("--base goes with --teacher")
    if given.teacher is not None and given.export_now:
        parser.error("--export-now is for a teacher from nothing; with --teacher, run the same command again")
    return given


def _save(content: object, path: pathlib.Path) -> None:
    with files.replacing(path) as unfinished:
        torch.save(content, unfinished)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if given.teacher is not None:
        finetune.main(given)
        return
    config = configs.load(TeacherConfig, given.config or "shapes", given.overrides)
    files.check_folder(given.out)
    if given.export_now:
        loop.require_checkpoint(given.out / config.stages[0])
    images = _images(config, given.data)
    build = Build(config, given.out, images, train_further=not given.export_now)
    if build.accelerator.is_main_process:
        configs.save(config, given.out / "config.yaml")
    build.train()
    compute.close(build.accelerator)


if __name__ == "__main__":
    errors.run(main)
