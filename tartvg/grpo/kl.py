"""Per-token estimators of KL(policy || reference).

Dimensions: G rollouts per prompt, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tartvg.config import KlEstimator

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped at 20 nats before exp: exp(20) = 5e8 is far beyond any clip range and keeps fp32 finite.

Outside the clamp the gradient through the exponential is zero; the linear term of k3 keeps its own."""


def _k1(delta_GT: Tensor) -> Tensor:
    return -delta_GT


def _k2(delta_GT: Tensor) -> Tensor:
    return delta_GT.square() / 2


def _k3(delta_GT: Tensor) -> Tensor:
    # expm1 keeps the difference of two nearly equal numbers exact for small deltas
    return torch.expm1(delta_GT.clamp(max=MAX_LOG_RATIO)) - delta_GT


_ESTIMATORS: dict[KlEstimator, Callable[[Tensor], Tensor]] = {
    KlEstimator.k1: _k1,
    KlEstimator.k2: _k2,
    KlEstimator.k3: _k3,
}


def kl_tokens(logps_GT: Tensor, ref_logps_GT: Tensor, estimator: KlEstimator) -> Tensor:
    """With D = log pi_ref - log pi: k1 = -D, k2 = D^2 / 2, k3 = exp(D) - D - 1, shape (G, T), in nats.

    Source: Schulman, "Approximating KL divergence"; GRPO, arXiv 2402.03300, uses k3.
    """
    return _ESTIMATORS[estimator](ref_logps_GT - logps_GT)
