"""One image on its way from noise to x0, a step at a time, so that images at different steps can share a pass.

Both kinds draw from a generator of the image's own, on the CPU: a seed means the same whatever shares the batch. They
do what `pipeline.TeacherPipeline` and `pipeline.FewStepPipeline` do, which tests compare them with.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_kd.denoiser import Denoiser


class Trajectory(Protocol):
    """x_t: latents (1, C, h, w) float32; of an image that is done, its x0."""

    x_t: Tensor

    @property
    def remaining(self) -> int:
        """Steps that are left; 0: done."""

    @property
    def timestep(self) -> Tensor:
        """Of the next step, (1,)."""

    def network_input(self) -> Tensor:
        """What the network sees at the next step, (1, C, h, w) float32."""

    def x0_hat(self, prediction: Tensor) -> Tensor:
        """The clean estimate (1, C, h, w) at this step, for a preview."""

    def advance(self, prediction: Tensor) -> None:
        """Take one step by the network's prediction (1, C, h, w) float32, guidance already in it."""


def noise(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randn(tuple(shape), generator=generator).to(device)


class FewStepTrajectory:
    """A student's: x0_hat at each of its timesteps, sent through fresh noise to the next."""

    def __init__(
        self, denoiser: Denoiser, timesteps: Sequence[int], shape: Sequence[int], seed: int, device: torch.device
    ) -> None:
        self._denoiser, self._shape, self._device = denoiser, shape, device
        self._generator = torch.Generator().manual_seed(seed)
        self._timesteps = [torch.tensor([timestep], device=device) for timestep in timesteps]
        self._taken = 0
        self.x_t = noise(shape, self._generator, device)

    @property
    def remaining(self) -> int:
        return len(self._timesteps) - self._taken

    @property
    def timestep(self) -> Tensor:
        return self._timesteps[self._taken]

    def network_input(self) -> Tensor:
        return self.x_t

    def x0_hat(self, prediction: Tensor) -> Tensor:
        return self._denoiser.schedule.x0_from(prediction, self.x_t, self.timestep, self._denoiser.prediction_type)

    def advance(self, prediction: Tensor) -> None:
        self.x_t = self.x0_hat(prediction)
        self._taken += 1
        if self.remaining:
            fresh = noise(self._shape, self._generator, self._device)
            self.x_t = self._denoiser.schedule.add_noise(self.x_t, fresh, self.timestep)


class TeacherTrajectory:
    """A teacher's, by the diffusers scheduler of its folder; a scheduler counts its steps, so each image has a copy."""

    def __init__(
        self, denoiser: Denoiser, scheduler: Any, steps: int, shape: Sequence[int], seed: int, device: torch.device
    ) -> None:
        self._denoiser, self._scheduler = denoiser, copy.deepcopy(scheduler)
        self._scheduler.set_timesteps(steps, device=device)
        generator = torch.Generator().manual_seed(seed)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self._options = {"generator": generator} if takes_generator else {}
        self._taken = 0
        self.x_t = noise(shape, generator, device) * self._scheduler.init_noise_sigma

    @property
    def remaining(self) -> int:
        return len(self._scheduler.timesteps) - self._taken

    @property
    def timestep(self) -> Tensor:
        timestep: Tensor = self._scheduler.timesteps[self._taken]
        return timestep.reshape(1)

    def network_input(self) -> Tensor:
        scaled: Tensor = self._scheduler.scale_model_input(self.x_t, self._scheduler.timesteps[self._taken])
        return scaled

    def x0_hat(self, prediction: Tensor) -> Tensor:
        # Whatever a scheduler calls x_t, what the network sees is the variance preserving one. Euler's timesteps may
        # lie between two entries of the table.
        nearest = self.timestep.round().long()
        seen = self.network_input()
        return self._denoiser.schedule.x0_from(prediction, seen, nearest, self._denoiser.prediction_type)

    def advance(self, prediction: Tensor) -> None:
        timestep = self._scheduler.timesteps[self._taken]
        self.x_t = self._scheduler.step(prediction, timestep, self.x_t, return_dict=False, **self._options)[0]
        self._taken += 1
