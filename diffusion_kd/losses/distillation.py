"""Score distillation: the student's x0_hat is pulled towards the teacher's estimate of it. Pure functions.

L = E[ c(t) * || student_x0 - target ||^2 ], the gradient flowing through `student_x0` alone
(Sauer et al. 2023, ADD, equation 4).
"""

from typing import Literal

import torch
from torch import Tensor

from diffusion_kd.schedule import NoiseSchedule

Weighting = Literal["exp", "sds", "nfsd"]

NFSD_SCALE = 7.5
_NFSD_CLEAN_BELOW = 200


def weight(kind: Weighting, alpha: Tensor, sigma: Tensor) -> Tensor:
    """c(t), shaped as alpha and sigma.

    exp: alpha_t, less where the noise is strong. sds and nfsd: alpha_t / (2 sigma_t), under which the loss's
    gradient is that of score distillation, eps_hat - noise (Poole et al. 2022 with w(t) = 1). It grows without
    bound towards t = 0, so draw t >= 20. Source: Sauer et al. 2023 (ADD), section 3.3 and appendix A.
    """
    return alpha if kind == "exp" else alpha / (2 * sigma)


def distillation_loss(student: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared error, averaged over batch and elements. No gradient reaches the target.

    student, target: both x0 latents or both decoded images, (B, ...). weights: c(t), (B, 1, 1, 1) or (B,).
    Source: Sauer et al. 2023 (ADD), equation 4.
    """
    squared = (student - target.detach()).square().flatten(1).mean(1)
    return (weights.reshape(-1) * squared).mean()


def nfsd_target(
    student_x0: Tensor,
    cond_x0: Tensor,
    uncond_x0: Tensor,
    negative_x0: Tensor,
    x_t: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
) -> Tensor:
    """Noise-free score distillation as a target: student_x0 - sigma_t/alpha_t * (delta_D + s * delta_C), detached.

    delta_C = eps(y) - eps(0) and s = 7.5; delta_D = eps(0) where t < 200, else eps(0) - eps(negative prompt). With
    eps = (x_t - alpha_t * x0) / sigma_t each difference of eps is a difference of the teacher's x0 estimates.

    x_t: student_x0 noised to `timesteps`; cond_x0, uncond_x0, negative_x0: the teacher's estimates there with the
    prompt, without, and with a negative prompt; all (B, C, h, w). alpha_t must not be 0.
    Source: Katzir et al. 2023 (NFSD), section 4; as a target for ADD: our reading of ADD's appendix A.
    """
    alpha, _ = schedule.at(timesteps)
    clean = (timesteps < _NFSD_CLEAN_BELOW).reshape(-1, 1, 1, 1)
    denoising = uncond_x0 - torch.where(clean, x_t / alpha, negative_x0)
    return (student_x0 + denoising + NFSD_SCALE * (cond_x0 - uncond_x0)).detach()
