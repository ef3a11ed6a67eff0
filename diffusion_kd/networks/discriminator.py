"""Discriminator heads: trained judges on the maps of a frozen feature network.

One head for each depth; a head judges every token of its map and is conditioned by projection on what the picture
should show. The architecture follows StyleGAN-T's discriminator (Sauer et al. 2023), which ADD uses; GroupNorm
stands in for its batch statistics, so that an example's judgement does not depend on its batch. A conditioned head
starts at judgement 0 everywhere: a head that has learnt nothing yet pushes the student nowhere.

Also here: the teacher's own U-Net as a feature network, for judging noised latents (Sauer et al. 2024, LADD).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from diffusion_kd.denoiser import Denoiser
from diffusion_kd.types import Conditioning

_PROJECTION = 64


def _convolution(channels_in: int, channels_out: int, kernel: int) -> nn.Module:
    padding = kernel // 2
    convolution = nn.Conv1d(channels_in, channels_out, kernel, padding=padding, padding_mode="circular")
    return parametrizations.spectral_norm(convolution)


def _block(channels: int, kernel: int) -> nn.Module:
    groups = math.gcd(channels, 8)
    return nn.Sequential(_convolution(channels, channels, kernel), nn.GroupNorm(groups, channels), nn.LeakyReLU(0.2))


class Head(nn.Module):
    """Judges the tokens of one feature map; conditioned by projection if `condition_dim` is not 0."""

    def __init__(self, channels: int, condition_dim: int, kernel: int = 9) -> None:
        super().__init__()
        self.first, self.second = _block(channels, 1), _block(channels, kernel)
        self.judge = _convolution(channels, _PROJECTION if condition_dim else 1, 1)
        self.project = nn.Linear(condition_dim, _PROJECTION) if condition_dim else None
        if self.project is not None:
            nn.init.zeros_(self.project.weight)
            nn.init.zeros_(self.project.bias)

    def forward(self, features: Tensor, condition: Tensor | None) -> Tensor:
        """features: (B, C, h, w); condition: (B, condition_dim). Returns logits (B, h * w), unbounded."""
        tokens = self.first(features.flatten(2))
        tokens = (tokens + self.second(tokens)) / math.sqrt(2)
        judged: Tensor = self.judge(tokens).float()
        if self.project is None:
            return judged[:, 0]
        assert condition is not None, "a conditioned head was given no condition"
        projected: Tensor = self.project(condition).float()
        return (judged * projected[..., None]).sum(1) / math.sqrt(_PROJECTION)


class Heads(nn.Module):
    """A head for each map of a feature network.

    condition_dims: widths of what conditions the heads, e.g. pooled text and image embedding; empty for none.
    """

    def __init__(self, map_channels: Sequence[int], condition_dims: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(channels, sum(condition_dims)) for channels in map_channels)

    def forward(self, maps: Sequence[Tensor], conditions: Sequence[Tensor]) -> list[Tensor]:
        """maps: (B, C_k, h_k, w_k) each; conditions: (B, P_i) each, normalised here. Returns (B, N_k) each."""
        condition = None
        if conditions:
            # Unit norm times the root of the width, so that text and image weigh the same in the projection.
            condition = torch.cat(
                [functional.normalize(part, dim=-1) * math.sqrt(part.shape[-1]) for part in conditions], -1
            )
        return [head(features, condition) for head, features in zip(self.heads, maps, strict=True)]


class _FeaturesComplete(Exception):
    """Ends a U-Net's forward pass once its middle block has run: what comes after is not needed."""


class LatentFeatures(nn.Module):
    """Down and middle blocks of the frozen teacher as features of noised latents. Gradients reach the latents."""

    def __init__(self, teacher: Denoiser) -> None:
        super().__init__()
        self._teacher = (teacher,)  # in a tuple: the objective owns the teacher, this only reads it
        widths = teacher.unet.config.block_out_channels
        self.map_channels: tuple[int, ...] = (*widths, widths[-1])

    def forward(self, x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> tuple[Tensor, ...]:
        """x_t: (B, C, h, w) latents noised to timesteps (B,). Returns a map for each block, shallow to deep."""
        (teacher,) = self._teacher
        maps: list[Tensor] = []

        def keep_down(block: nn.Module, inputs: object, output: tuple[Tensor, tuple[Tensor, ...]]) -> None:
            hidden, states = output
            maps.append(hidden if block.downsamplers is None else states[-2])  # before the block's downsampling

        def keep_middle(block: nn.Module, inputs: object, output: Tensor) -> None:
            maps.append(output)
            raise _FeaturesComplete

        handles = [block.register_forward_hook(keep_down) for block in teacher.unet.down_blocks]
        handles.append(teacher.unet.mid_block.register_forward_hook(keep_middle))
        try:
            teacher(x_t, timesteps, cond)
        except _FeaturesComplete:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return tuple(maps)
