"""`Denoiser`: (x_t, timestep, conditioning) -> x0_hat, for any prediction type, with guidance folded in.

The only place that knows what a U-Net predicts. Losses, objectives and samplers see x0_hat alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from diffusion_kd.schedule import NoiseSchedule
from diffusion_kd.types import Conditioning, PredictionType

_TIME_IDS = 6


class Denoiser(nn.Module):
    """An SDXL U-Net read as a clean estimate.

    unet: called like diffusers' UNet2DConditionModel; predicts what `prediction_type` says at timesteps of `schedule`.
    """

    unet: Any

    def __init__(self, unet: nn.Module, schedule: NoiseSchedule, prediction_type: PredictionType) -> None:
        super().__init__()
        self.unet, self.schedule, self.prediction_type = unet, schedule, prediction_type

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text that the U-Net is told."""
        config = self.unet.config
        return int(config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim)

    def forward(self, x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """x0_hat (B, C, h, w) float32 of x_t (B, C, h, w) at timesteps (B,), without guidance."""
        return self.schedule.x0_from(self.predict(x_t, timesteps, cond), x_t, timesteps, self.prediction_type)

    def predict(self, x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """What the network itself says, (B, C, h, w) in its own precision: noise, velocity or x0."""
        # Frozen networks may be in another precision than those that learn; time ids are numbers up to thousands.
        dtype = self.unet.dtype
        prediction: Tensor = self.unet(
            x_t.to(dtype),
            timesteps,
            cond.prompt_embeds.to(dtype),
            added_cond_kwargs={"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids},
            return_dict=False,
        )[0]
        return prediction

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should say of x0 (B, C, h, w) under this noise."""
        if self.prediction_type == "v_prediction":
            return self.schedule.velocity(x0, noise, timesteps)
        return noise if self.prediction_type == "epsilon" else x0

    def guided(
        self, x_t: Tensor, timesteps: Tensor, cond: Conditioning, uncond: Conditioning, guidance_scale: Tensor | float
    ) -> Tensor:
        """x0_hat under classifier-free guidance, `uncond + w * (cond - uncond)`; w = 1 is no guidance.

        guidance_scale: one w, or (B,) of them. At a fixed x_t, x0 is affine in what any network predicts, so guiding
        x0 is guiding the prediction. Both halves share one pass. Source: Ho & Salimans 2022, in Imagen's form.
        """
        if isinstance(guidance_scale, float | int) and guidance_scale == 1:
            return self(x_t, timesteps, cond)  # type: ignore[no-any-return]
        both = Conditioning.concatenate([uncond, cond])
        without, with_text = self(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), both).chunk(2)
        weight = torch.as_tensor(guidance_scale, dtype=without.dtype, device=without.device).reshape(-1, 1, 1, 1)
        return without + weight * (with_text - without)  # type: ignore[no-any-return]

    @torch.no_grad()
    def endpoint(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        guidance_scale: float,
        *,
        steps: int,
    ) -> Tensor:
        """Where the probability flow ODE leads from x_t (B, C, h, w): x0 by DDIM's deterministic steps (eta = 0).

        timesteps: (B,), each on the grid of `steps` trailing timesteps between pure noise and 0; an example starts at
            its own.
        Source: Song et al. 2021 (DDIM), equation 12; trailing grid: Lin et al. 2023.
        """
        grid = [len(self.schedule) * index // steps - 1 for index in range(steps, 0, -1)]
        x_t, x0 = x_t.float().clone(), torch.zeros_like(x_t, dtype=torch.float32)
        for now, following in zip(grid, [*grid[1:], None], strict=True):
            active = (timesteps >= now).nonzero().flatten()
            if not len(active):
                continue
            at = torch.full_like(timesteps[active], now)
            clean = self.guided(x_t[active], at, cond[active], uncond[active], guidance_scale)
            if following is None:
                x0[active] = clean
            else:
                noise = self.schedule.noise_from(clean, x_t[active], at)
                x_t[active] = self.schedule.add_noise(clean, noise, torch.full_like(at, following))
        return x0
