"""Train the reference teacher from nothing: `python -m training.teacher --config shapes`.

Three stages, each resumable by running the same command again:

1. contrastive: both text encoders and the image encoder (the embedded feature network) learn to match captions
   and images;
2. vae: the autoencoder; its latents are then normalised per channel;
3. unet: the denoiser, together with the text encoders, on cached latents.

On several processes: `accelerate launch --cpu --num_processes 2 -m training.teacher --config shapes`.
"""

import argparse
import dataclasses
import itertools
import logging
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from diffusion_kd import conditioning, errors, types
from diffusion_kd.schedule import NoiseSchedule
from diffusion_kd.shapes import model, scenes
from training import config as configs
from training import data, loop

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class TeacherConfig:
    """All settings of a teacher.

    scenes: how many shapes scenes are drawn (unused with a folder of images).
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
    kl_weight: float = 3e-4
    stages: list[str] = dataclasses.field(default_factory=lambda: ["contrastive", "vae", "unet"])
    contrastive: loop.StageConfig = dataclasses.field(
        default_factory=lambda: loop.StageConfig(images=400_000, batch_size=128, learning_rate=1e-3)
    )
    vae: loop.StageConfig = dataclasses.field(
        default_factory=lambda: loop.StageConfig(images=60_000, batch_size=16, learning_rate=2e-3, warmup_images=1_000)
    )
    unet: loop.StageConfig = dataclasses.field(
        default_factory=lambda: loop.StageConfig(
            images=2_000_000, batch_size=64, learning_rate=1e-3, ema_decay=0.999, checkpoint_every_s=120
        )
    )


class CellReader(nn.Module):
    """Reads what each cell shows out of a feature map (B, C, n, n) by one 1x1 convolution. A training aid, discarded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.read = nn.Conv2d(channels, sum(scenes.CELL_CLASSES), 1)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over facts and cells. labels: (B, 3, n, n)."""
        logits = self.read(features).float().split(scenes.CELL_CLASSES, 1)
        return torch.stack(
            [functional.cross_entropy(fact, labels[:, index]) for index, fact in enumerate(logits)]
        ).mean()


class Contrastive(nn.Module):
    """CLIP's loss (Radford et al. 2021) for both text encoders against one image encoder."""

    def __init__(self, text: conditioning.PromptEncoder, image_encoder: transformers.CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.text, self.image_encoder = text, image_encoder
        self.projection = nn.Linear(text.text_encoder.config.hidden_size, model.PROJECTION_DIM, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([np.log(1 / 0.07)] * 2, dtype=torch.float32))
        self.cells = CellReader(image_encoder.config.hidden_size)

    def forward(self, images: Tensor, ids: Tensor, ids_2: Tensor, labels: Tensor | None, cell_weight: float) -> dict[str, Tensor]:
        seen = self.image_encoder(images)
        image = functional.normalize(seen.image_embeds.float(), dim=-1)
        first = self.projection(self.text.text_encoder(ids).pooler_output)
        second = self.text.text_encoder_2(ids_2).text_embeds
        losses = {}
        for name, words, scale in (("text", first, self.log_scale[0]), ("text_2", second, self.log_scale[1])):
            logits = scale.exp().clamp(max=100) * image @ functional.normalize(words.float(), dim=-1).T
            target = torch.arange(len(logits), device=logits.device)
            losses[name] = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        if labels is not None:
            patches = seen.last_hidden_state[:, 1:].mT
            losses["cells"] = cell_weight * self.cells(patches.unflatten(-1, labels.shape[-2:]), labels)
        return losses


class Autoencoding(nn.Module):
    """L1 and squared error of the reconstruction, and a light KL."""

    def __init__(self, vae: diffusers.AutoencoderKL, kl_weight: float) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        restored = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2
        return {
            "l1": functional.l1_loss(restored, images),
            "squared": functional.mse_loss(restored, images),
            "kl": self.kl_weight * kl,
        }


class Denoising(nn.Module):
    """SDXL's objective on cached latents, the text encoders learning along."""

    def __init__(
        self,
        unet: diffusers.UNet2DConditionModel,
        text: conditioning.PromptEncoder,
        schedule: NoiseSchedule,
        prediction_type: types.PredictionType,
    ) -> None:
        super().__init__()
        self.unet, self.text = unet, text
        self.schedule, self.prediction_type = schedule, prediction_type
        self.cells = CellReader(unet.config.block_out_channels[-1])
        self._features: Tensor | None = None
        unet.up_blocks[0].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        self._features = output

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        ids: Tensor,
        ids_2: Tensor,
        dropped: Tensor,
        labels: Tensor | None,
        cell_weight: float,
    ) -> dict[str, Tensor]:
        cond = self.text(ids, ids_2, (model.IMAGE_SIZE_PX, model.IMAGE_SIZE_PX))
        kept = (~dropped).to(cond.pooled)
        x_t = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self.unet(
            x_t,
            timesteps,
            cond.prompt_embeds * kept[:, None, None],
            added_cond_kwargs={"text_embeds": cond.pooled * kept[:, None], "time_ids": cond.time_ids},
        ).sample.float()
        target = noise if self.prediction_type == "epsilon" else self.schedule.velocity(latents, noise, timesteps)
        losses = {"denoise": functional.mse_loss(prediction, target)}
        if labels is not None:
            assert self._features is not None, "the hook on the first up block has not run"
            losses["cells"] = cell_weight * self.cells(self._features, labels)
        self._features = None
        return losses


def _images(config: TeacherConfig, folder: pathlib.Path | None) -> data.CaptionedImages:
    if folder is None:
        return data.ShapesImages(config.scenes, config.seed)
    return data.FolderImages(folder, model.IMAGE_SIZE_PX)


class Build:
    """One training of a teacher: its parts, its data and its run folder."""

    def __init__(self, config: TeacherConfig, folder: pathlib.Path, images: data.CaptionedImages) -> None:
        self.accelerator = accelerate.Accelerator(mixed_precision="bf16")
        self.config, self.folder, self.images = config, folder, images
        torch.manual_seed(config.seed)
        tokenizer = model.build_tokenizer(images.captions(range(min(len(images), 20_000)), config.seed))
        self.text = conditioning.PromptEncoder(
            tokenizer, tokenizer, model.build_text_encoder(tokenizer), model.build_text_encoder_2(tokenizer)
        )
        self.image_encoder = model.build_image_encoder()
        self.vae = model.build_vae()
        self.unet = model.build_unet()

    def _rng(self, stage: int, step: int) -> np.random.Generator:
        return np.random.default_rng((self.config.seed, stage, step, self.accelerator.process_index))

    def _pick(self, rng: np.random.Generator, count: int, group_size: int = 1) -> list[int]:
        groups = rng.integers(len(self.images) // group_size, size=-(-count // group_size))
        return [int(group) * group_size + member for group in groups for member in range(group_size)][:count]

    def _tokens(self, indices: list[int], seed: int) -> dict[str, Tensor]:
        ids, ids_2 = self.text.tokenize(self.images.captions(indices, seed))
        return {"ids": ids, "ids_2": ids_2}

    def _to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def train_contrastive(self) -> None:
        def draw(step: int, count: int) -> dict[str, Any]:
            indices = self._pick(self._rng(1, step), count, self.images.group_size)
            labels = self.images.cell_labels(indices, model.LATENT_SIZE)
            return self._to_device(
                {
                    "images": data.to_tensor(self.images.images_uint8(indices)),
                    **self._tokens(indices, step),
                    "labels": None if labels is None else torch.from_numpy(labels),
                    "cell_weight": 10 * self.config.cell_weight,
                }
            )

        module = Contrastive(self.text, self.image_encoder)
        loop.fit(self.accelerator, "contrastive", module, draw, self.config.contrastive, self.folder / "contrastive")

    def train_vae(self) -> None:
        def draw(step: int, count: int) -> dict[str, Any]:
            rng = self._rng(2, step)
            images = data.to_tensor(self.images.images_uint8(self._pick(rng, count)))
            shape = (count, model.LATENT_CHANNELS, model.LATENT_SIZE, model.LATENT_SIZE)
            return self._to_device({"images": images, "noise": torch.from_numpy(rng.standard_normal(shape, np.float32))})

        module = Autoencoding(self.vae, self.config.kl_weight)
        loop.fit(self.accelerator, "vae", module, draw, self.config.vae, self.folder / "vae")
        self._normalise_latents()

    @torch.no_grad()
    def _normalise_latents(self) -> None:
        """Fold a per-channel shift and scale into the 1x1 convolutions around the latents, so that each has unit variance.

        diffusers' SDXL pipeline knows one `scaling_factor` for all channels, and four channels at most where it
        knows more; the convolutions can hold the rest exactly.
        """
        self.vae.to(self.accelerator.device).eval()
        indices = range(0, len(self.images), max(len(self.images) // 2048, 1))
        latents = torch.cat([self._encode(list(chunk)) for chunk in itertools.batched(indices, 128)]) if hasattr(itertools, "batched") else torch.cat(
            [self._encode(list(indices[start : start + 128])) for start in range(0, len(indices), 128)]
        )
        mean, deviation = latents.mean((0, 2, 3)).to(self.accelerator.device), latents.std((0, 2, 3)).to(self.accelerator.device)
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
            return self.vae.encode(images).latent_dist.mean.float().cpu()

    def cache_latents(self) -> Tensor:
        """Encode every image once, shared among the processes. Returns (N, C, h, w) float16 on the CPU."""
        path = self.folder / "latents.pt"
        mine = self.folder / f"latents.{self.accelerator.process_index}.pt"
        if not path.exists():
            count, workers = len(self.images), self.accelerator.num_processes
            own = range(self.accelerator.process_index * count // workers, (self.accelerator.process_index + 1) * count // workers)
            parts = [self._encode(list(own[start : start + 128])).half() for start in range(0, len(own), 128)]
            torch.save(torch.cat(parts), mine)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                parts = [torch.load(self.folder / f"latents.{worker}.pt") for worker in range(workers)]
                loop.save_atomically(torch.cat(parts), path)
            self.accelerator.wait_for_everyone()
            mine.unlink()
        return torch.load(path, mmap=True)

    def train_unet(self) -> None:
        latents = self.cache_latents()
        schedule = NoiseSchedule.from_scheduler(model.build_noise_scheduler(self.config.prediction_type))
        module = Denoising(self.unet, self.text, schedule, types.prediction_type(self.config.prediction_type))
        # SDXL reads the token states before the last layer, so the first encoder's last layer has no gradient here.
        for unused in (self.text.text_encoder.encoder.layers[-1], self.text.text_encoder.final_layer_norm):
            unused.requires_grad_(False)

        def draw(step: int, count: int) -> dict[str, Any]:
            rng = self._rng(3, step)
            indices = self._pick(rng, count)
            chosen = latents[indices].float()
            labels = self.images.cell_labels(indices, model.LATENT_SIZE)
            strata = (rng.permutation(count) + rng.random(count)) / count
            return self._to_device(
                {
                    "latents": chosen,
                    "noise": torch.from_numpy(rng.standard_normal(chosen.shape, np.float32)),
                    "timesteps": torch.from_numpy((strata * len(schedule)).astype(np.int64)),
                    **self._tokens(indices, step),
                    "dropped": torch.from_numpy(rng.random(count) < self.config.caption_dropout),
                    "labels": None if labels is None else torch.from_numpy(labels),
                    "cell_weight": self.config.cell_weight,
                }
            )

        averaged = loop.fit(self.accelerator, "unet", module, draw, self.config.unet, self.folder / "unet")
        self.unet, self.text = averaged.unet, averaged.text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.teacher", description="Train a small SDXL teacher.")
    parser.add_argument("--config", default="shapes", help="a YAML file or a name in training/configs")
    parser.add_argument("--data", type=pathlib.Path, help="a folder with images and metadata.jsonl instead of shapes")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/teacher"), help="the run's folder")
    parser.add_argument("overrides", nargs="*", help="key=value")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = configs.load(TeacherConfig, given.config, given.overrides)
    images = _images(config, given.data)
    given.out.mkdir(parents=True, exist_ok=True)
    build = Build(config, given.out, images)
    for stage in config.stages:
        getattr(build, f"train_{stage}")()


if __name__ == "__main__":
    try:
        main()
    except errors.DiffusionKDError as error:
        sys.exit(f"error: {error}")
