"""What each stage of a teacher's training minimises: modules that map a batch to named losses.

labelled: whether batches say what each cell shows. Without, nothing reads cells: several processes would wait for its
gradients.
"""

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from diffusion_kd import conditioning, types
from diffusion_kd.schedule import NoiseSchedule
from diffusion_kd.shapes import model, scenes


class CellReader(nn.Module):
    """Reads what each cell shows out of a feature map (B, C, n, n) by a 1x1 convolution. A training aid, discarded."""

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

    def __init__(
        self,
        text: conditioning.PromptEncoder,
        image_encoder: transformers.CLIPVisionModelWithProjection,
        *,
        labelled: bool = True,
    ) -> None:
        super().__init__()
        self.text, self.image_encoder = text, image_encoder
        self.projection = nn.Linear(text.text_encoder.config.hidden_size, model.PROJECTION_DIM, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([np.log(1 / 0.07)] * 2, dtype=torch.float32))
        self.cells = CellReader(image_encoder.config.hidden_size) if labelled else None

    def forward(
        self, images: Tensor, ids: Tensor, ids_2: Tensor, labels: Tensor | None, cell_weight: float
    ) -> dict[str, Tensor]:
        seen = self.image_encoder(images)
        image = functional.normalize(seen.image_embeds.float(), dim=-1)
        first = self.projection(self.text.text_encoder(ids).pooler_output)
        second = self.text.text_encoder_2(ids_2).text_embeds
        losses = {}
        for name, words, scale in (("text", first, self.log_scale[0]), ("text_2", second, self.log_scale[1])):
            logits = scale.exp().clamp(max=100) * image @ functional.normalize(words.float(), dim=-1).T
            target = torch.arange(len(logits), device=logits.device)
            losses[name] = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2
        if self.cells is not None and labels is not None:
            patches = seen.last_hidden_state[:, 1:].mT
            losses["cells"] = cell_weight * self.cells(patches.unflatten(-1, labels.shape[-2:]), labels)
        return losses


class Autoencoding(nn.Module):
    """L1 and squared error of the reconstruction, a light KL, and the cells read out of the latents.

    Latents out of which a linear layer reads what lies where are far easier to denoise (Yao et al. 2025, VA-VAE,
    align them with a pretrained network's features; here the scenes themselves are known).
    """

    vae: Any

    def __init__(self, vae: Any, kl_weight: float, *, labelled: bool = True) -> None:
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight
        self.cells = CellReader(model.LATENT_CHANNELS) if labelled else None

    def forward(self, images: Tensor, noise: Tensor, labels: Tensor | None, cell_weight: float) -> dict[str, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        restored = self.vae.decode(latents).sample.float()
        kl = (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2
        losses = {
            "l1": functional.l1_loss(restored, images),
            "squared": functional.mse_loss(restored, images),
            "kl": self.kl_weight * kl,
        }
        if self.cells is not None and labels is not None:
            losses["cells"] = cell_weight * self.cells(latents, labels)
        return losses


class Decoding(nn.Module):
    """The decoder alone, on latents with a little noise: a denoiser's latents are never quite clean."""

    vae: Any

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        for fixed in (vae.encoder, vae.quant_conv):
            fixed.requires_grad_(False)

    def forward(self, latents: Tensor, images: Tensor) -> dict[str, Tensor]:
        restored = self.vae.decode(latents).sample.float()
        return {"l1": functional.l1_loss(restored, images), "squared": functional.mse_loss(restored, images)}


class Denoising(nn.Module):
    """SDXL's objective on cached latents, the text encoders learning along."""

    unet: Any

    def __init__(
        self,
        unet: Any,
        text: conditioning.PromptEncoder,
        schedule: NoiseSchedule,
        prediction_type: types.PredictionType,
        *,
        labelled: bool = True,
    ) -> None:
        super().__init__()
        self.unet, self.text = unet, text
        self.schedule, self.prediction_type = schedule, prediction_type
        self.cells = CellReader(unet.config.block_out_channels[-1]) if labelled else None
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
        if self.cells is not None and labels is not None:
            assert self._features is not None, "the hook on the first up block has not run"
            losses["cells"] = cell_weight * self.cells(self._features, labels)
        self._features = None
        return losses
