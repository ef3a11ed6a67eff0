"""The noise schedule: timestep -> (alpha_t, sigma_t), and conversions among x0, noise and velocity.

`x_t = alpha_t * x0 + sigma_t * noise` with `alpha_t**2 + sigma_t**2 = 1` (variance preserving).
Tables are float64; conversions run in float32 at least, whatever the networks' precision.

Pure noise at the last timestep: SDXL's betas leave alpha_999 = 0.068, so training inputs there still show the
image while sampling starts at pure noise. `add_noise(..., pure_noise_at_end=True)` feeds pure noise there,
as sampling does, while the x0 formula keeps the finite alpha: with alpha = 0 an epsilon network's
`(x_t - sigma_t * eps) / alpha_t` would be infinite. (Yin et al. 2024, DMD2, do the same.) On betas rescaled to
zero terminal signal (Lin et al. 2023) alpha_999 is 0 exactly and only velocity or x0 networks are defined there.
"""

from typing import Any

import torch
from torch import Tensor

from diffusion_kd import errors
from diffusion_kd.types import PredictionType


class NoiseSchedule:
    """Tables of a variance preserving diffusion.

    alphas_cumprod: (T,) products of 1 - beta, in [0, 1], falling; `alpha_t**2` of each timestep.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        squared = alphas_cumprod.detach().to("cpu", torch.float64)
        if squared.ndim != 1 or not bool(((squared >= 0) & (squared <= 1)).all()):
            raise errors.ModelError("a noise schedule needs a 1-d table of alphas_cumprod within [0, 1]")
        self.alphas = squared.sqrt()
        self.sigmas = (1 - squared).sqrt()

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """The training tables of a diffusers scheduler, rebuilt in float64 from what its `config` says of the betas.

        Sampling schedulers alter their own `alphas_cumprod` (Euler clamps the last one), so the betas decide.
        Raises ModelError for a beta schedule that is not variance preserving or not known.
        """
        config = scheduler.config
        count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config.trained_betas, dtype=torch.float64)
        elif config.beta_schedule == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float64)
        elif config.beta_schedule == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
        else:
            raise errors.ModelError(
                f"beta schedule {config.beta_schedule!r} is not supported; supported are linear, scaled_linear"
            )
        squared = torch.cumprod(1 - betas, 0)
        return cls(_zero_terminal_signal(squared) if config.get("rescale_betas_zero_snr") else squared)

    def __len__(self) -> int:
        return len(self.alphas)

    @property
    def zero_terminal_signal(self) -> bool:
        """Whether nothing of x0 is left at the last timestep."""
        return bool(self.alphas[-1] == 0)

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of (B,) timesteps, each (B, 1, 1, 1) float32 on their device."""
        index = timesteps.to("cpu", torch.int64)
        alpha, sigma = self.alphas[index], self.sigmas[index]
        return tuple(table.to(timesteps.device, torch.float32).reshape(-1, 1, 1, 1) for table in (alpha, sigma))  # type: ignore[return-value]

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor, *, pure_noise_at_end: bool = False) -> Tensor:
        """x_t of x0 (B, C, h, w) and unit noise. pure_noise_at_end: rows at the last timestep are the noise alone."""
        alpha, sigma = self.at(timesteps)
        x_t = alpha * x0 + sigma * noise
        if pure_noise_at_end:
            last = (timesteps == len(self) - 1).reshape(-1, 1, 1, 1)
            x_t = torch.where(last, noise, x_t)
        return x_t

    def velocity(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha_t * noise - sigma_t * x0 (Salimans & Ho 2022, section 4)."""
        alpha, sigma = self.at(timesteps)
        return alpha * noise - sigma * x0

    def x0_from(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor, kind: PredictionType) -> Tensor:
        """x0_hat of a network's prediction, (B, C, h, w), in float32.

        Raises ModelError for an epsilon network where alpha_t is 0: its x0 is not defined there.
        """
        alpha, sigma = self.at(timesteps)
        prediction, x_t = prediction.float(), x_t.float()
        if kind == "sample":
            return prediction
        if kind == "v_prediction":
            return alpha * x_t - sigma * prediction
        if bool((alpha == 0).any()):
            raise errors.ModelError(
                "an epsilon network has no x0 at zero terminal signal; use v_prediction, or betas without rescaling"
            )
        return (x_t - sigma * prediction) / alpha

    def noise_from(self, x0: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """eps_hat = (x_t - alpha_t * x0) / sigma_t, (B, C, h, w)."""
        alpha, sigma = self.at(timesteps)
        return (x_t - alpha * x0) / sigma


def _zero_terminal_signal(squared: Tensor) -> Tensor:
    """Shift and scale alpha_t so that the last is 0 and the first stays (Lin et al. 2023, algorithm 1)."""
    alphas = squared.sqrt()
    first, last = alphas[0], alphas[-1]
    return ((alphas - last) * first / (first - last)) ** 2


def student_timesteps(steps: int, length: int = 1000) -> tuple[int, ...]:
    """The timesteps a student is trained at, ascending; the last is pure noise: 4 -> (249, 499, 749, 999).

    They are diffusers' `timestep_spacing="trailing"`, so training and sampling meet. (`linspace(0, 999, 4)`, seen
    elsewhere, spends a quarter of the work on t = 0 and misses the others.) LCM's scheduler, which samples an exported
    student, counts in whole `length // steps`: three would end at 998, where nothing is pure noise.
    Raises ConfigError unless steps is 1, 2 or 4.
    """
    if steps not in (1, 2, 4):
        raise errors.ConfigError(f"student_steps must be 1, 2 or 4, not {steps}")
    return tuple(length * index // steps - 1 for index in range(1, steps + 1))
