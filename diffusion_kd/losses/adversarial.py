"""Adversarial losses over the heads of a discriminator. Pure functions.

`logits` is a sequence with one entry per head, each (B, N_k): a judgement of every token that the head sees.
Losses are summed over heads, averaged over batch and tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def hinge_discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Hinge loss of the discriminator: 2 per head when it cannot tell, 0 when it is sure.

    Source: Sauer et al. 2023 (ADD), section 3.2, without the R1 term.
    """
    return hinge_real_loss(real) + hinge_fake_loss(fake)


def hinge_real_loss(logits: Sequence[Tensor]) -> Tensor:
    """max(0, 1 - D): what should be called real."""
    return torch.stack([functional.relu(1 - head).mean() for head in logits]).sum()


def hinge_fake_loss(logits: Sequence[Tensor]) -> Tensor:
    """max(0, 1 + D): what should be called fake."""
    return torch.stack([functional.relu(1 + head).mean() for head in logits]).sum()


def generator_loss(fake: Sequence[Tensor]) -> Tensor:
    """-D: the student's half. Source: Sauer et al. 2023 (ADD), section 3.2."""
    return -torch.stack([head.mean() for head in fake]).sum()


def r1_penalty(logits: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """Squared gradient norm of each head's judgements, summed, with respect to its own input features of real images.

    features: what the heads saw, (B, C_k, ...) each, with gradient required before the heads ran.
    Summed over heads and feature elements, averaged over the batch. Not with respect to pixels, nor to the heads'
    weights. Source: Sauer et al. 2023 (ADD), section 3.2, after Mescheder et al. 2018.
    """
    total = torch.stack([head.sum() for head in logits]).sum()
    gradients = torch.autograd.grad(total, list(features), create_graph=True)
    return torch.stack([gradient.flatten(1).square().sum(1).mean() for gradient in gradients]).sum()


def finite_difference_penalty(logits: Sequence[Tensor], shaken: Sequence[Tensor]) -> Tensor:
    """Mean squared change of the judgements when the heads' input is shaken: R1 on real pictures, R2 on fake ones.

    Needs no second derivative. Source: Lin et al. 2025 (APT), the approximate R1.
    """
    return torch.stack([(a - b).square().mean() for a, b in zip(logits, shaken, strict=True)]).sum()
