"""Rewards of a group -> advantages.

Dimensions: G rollouts per prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tartvg.config import AdvantageScale


def group_advantages(rewards_G: Tensor, scale: AdvantageScale, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean) / (std + eps) over the last dimension; same shape as the input, leading dimensions are free.

    `scale` chooses the sample std (over G - 1), the population std (over G) or no division (Dr. GRPO). A group whose
    rewards are all equal gets exact zeros, whatever the rounding of its mean. Raises ValueError for rewards that are
    not finite. Source: GRPO, arXiv 2402.03300; Dr. GRPO, arXiv 2503.20783.
    """
    rewards_G = rewards_G if rewards_G.is_floating_point() else rewards_G.float()
    if not torch.isfinite(rewards_G).all():
        raise ValueError(f"rewards must be finite, got {rewards_G.tolist()}")
    centred_G = rewards_G - rewards_G.mean(dim=-1, keepdim=True)
    is_flat = (rewards_G == rewards_G[..., :1]).all(dim=-1, keepdim=True)
    if scale is AdvantageScale.none:
        divisor: Tensor = torch.ones_like(centred_G[..., :1])
    else:
        correction = 1 if scale is AdvantageScale.sample_std else 0
        freedom = max(rewards_G.shape[-1] - correction, 1)
        divisor = (centred_G.square().sum(dim=-1, keepdim=True) / freedom).sqrt() + eps
    # a flat group divides by 1, so that eps = 0 makes no NaN
    advantages_G = centred_G / torch.where(is_flat, 1.0, divisor)
    return torch.where(is_flat, 0.0, advantages_G)
