"""The GRPO loss as a pure function: log-probabilities and advantages in, one number and its metrics out.

Dimensions: P prompts (each is one call), G rollouts per prompt, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tartvg.config import Aggregation, GrpoConfig, ImportanceLevel, KlEstimator
from tartvg.grpo.aggregation import aggregate
from tartvg.grpo.kl import MAX_LOG_RATIO, kl_tokens


@dataclass(frozen=True)
class LossSettings:
    """The variant of the objective."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.04
    kl_estimator: KlEstimator = KlEstimator.k3
    loss_aggregation: Aggregation = Aggregation.sequence_mean
    importance_level: ImportanceLevel = ImportanceLevel.token
    max_new_tokens: int = 1024
    """Divisor of the constant aggregation."""

    @classmethod
    def from_config(cls, config: GrpoConfig) -> LossSettings:
        """The loss's slice of the GRPO settings."""
        return cls(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_coef=config.kl_coef,
            kl_estimator=config.kl_estimator,
            loss_aggregation=config.loss_aggregation,
            importance_level=config.importance_level,
            max_new_tokens=config.sampling.max_new_tokens,
        )


@dataclass(frozen=True)
class LossInputs:
    """One group. Log-probabilities are in nats; what stands where the mask is 0 never matters, not even NaN."""

    logps_GT: Tensor
    """Under the policy that trains; carries the gradient."""
    old_logps_GT: Tensor
    """Under the policy that sampled."""
    ref_logps_GT: Tensor | None
    """Under the reference, the policy at the start of the stage; None only when kl_coef is 0."""
    advantages_GT: Tensor
    """Of each token, or (G, 1) where all tokens of a row have the same."""
    mask_GT: Tensor
    """True or 1 at completion tokens that count. A row may be empty."""
    kl_coef_GT: Tensor | None = None
    """Weight of the KL penalty at each token; None: `kl_coef` everywhere."""


@dataclass(frozen=True)
class LossOutput:
    """The loss to differentiate, detached scalars under `loss/`, and the number of tokens that they are about."""

    loss: Tensor
    metrics: dict[str, Tensor]
    num_tokens: int


def _token_ratio(log_ratio_GT: Tensor, mask_GT: Tensor) -> Tensor:
    return log_ratio_GT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _sequence_ratio(log_ratio_GT: Tensor, mask_GT: Tensor) -> Tensor:
    mean_G1 = log_ratio_GT.sum(dim=-1, keepdim=True) / mask_GT.sum(dim=-1, keepdim=True).clamp(min=1)
    return mean_G1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(log_ratio_GT)


_RATIOS: dict[ImportanceLevel, Callable[[Tensor, Tensor], Tensor]] = {
    ImportanceLevel.token: _token_ratio,
    ImportanceLevel.sequence: _sequence_ratio,
}


def grpo_loss(inputs: LossInputs, settings: LossSettings, normaliser: float | Tensor | None = None) -> LossOutput:
    """-aggregate(min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_coef KL), a scalar.

    rho = pi / pi_old per token (GRPO, arXiv 2402.03300) or, for the sequence level, the geometric mean of a row's
    token ratios, shared by its tokens (GSPO, arXiv 2507.18071). `normaliser`: see `aggregate`. Arithmetic is fp32 at
    least. Log-ratios are clamped to +-20 nats, so the result is finite whenever the unmasked inputs are.

    Metrics: loss/total = loss/policy + kl_coef * loss/kl (unless `kl_coef_GT` weights tokens apart), all three
    aggregated alike; loss/clip_fraction, the share of tokens whose clipped branch is the smaller; loss/ratio_mean and
    loss/ratio_max over tokens (0 without tokens).
    Raises ValueError when kl_coef > 0 and there is no reference. Source: arXiv 2508.07683, GRPO objective.
    """
    if settings.kl_coef > 0 and inputs.ref_logps_GT is None:
        raise ValueError("grpo.kl_coef must be 0 without reference log-probabilities, got " + repr(settings.kl_coef))
    assert inputs.logps_GT.shape == inputs.old_logps_GT.shape == inputs.mask_GT.shape
    assert inputs.advantages_GT.shape in (inputs.logps_GT.shape, (*inputs.logps_GT.shape[:1], 1))
    is_token_GT = inputs.mask_GT.bool()
    dtype = torch.promote_types(inputs.logps_GT.dtype, torch.float32)
    mask_GT = is_token_GT.to(dtype)

    def tokens(values_GT: Tensor) -> Tensor:
        # select instead of multiply: 0 * NaN is NaN, in the gradient too
        return torch.where(is_token_GT, values_GT.to(dtype), 0.0)

    def mean(values_GT: Tensor) -> Tensor:
        kind, longest = settings.loss_aggregation, settings.max_new_tokens
        return aggregate(tokens(values_GT), mask_GT, kind, max_new_tokens=longest, normaliser=normaliser)

    logps_GT = tokens(inputs.logps_GT)
    advantages_GT = inputs.advantages_GT.to(dtype)
    ratio_GT = _RATIOS[settings.importance_level](logps_GT - tokens(inputs.old_logps_GT), mask_GT)
    unclipped_GT = ratio_GT * advantages_GT
    clipped_GT = ratio_GT.clamp(1 - settings.clip_low, 1 + settings.clip_high) * advantages_GT
    policy = mean(-torch.minimum(unclipped_GT, clipped_GT))
    kl = penalty = torch.zeros_like(policy)
    if inputs.ref_logps_GT is not None:
        kl_GT = kl_tokens(logps_GT, tokens(inputs.ref_logps_GT), settings.kl_estimator)
        kl = mean(kl_GT)
        penalty = settings.kl_coef * kl if inputs.kl_coef_GT is None else mean(inputs.kl_coef_GT * kl_GT)
    loss = policy + penalty

    num_tokens = mask_GT.sum().clamp(min=1)
    metrics = {
        "loss/total": loss,
        "loss/policy": policy,
        "loss/kl": kl,
        "loss/clip_fraction": tokens(clipped_GT < unclipped_GT).sum() / num_tokens,
        "loss/ratio_mean": tokens(ratio_GT).sum() / num_tokens,
        "loss/ratio_max": tokens(ratio_GT).amax() if ratio_GT.numel() else torch.zeros_like(loss),
    }
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()}, int(is_token_GT.sum()))


def merged_metrics(outputs: Sequence[LossOutput]) -> dict[str, Tensor]:
    """Metrics of a group from those of its parts, whose losses were divided by the group's divisor.

    Losses add up, `loss/ratio_max` is a maximum, and the others are means over tokens.
    """
    if len(outputs) == 1:
        return outputs[0].metrics
    total = max(1, sum(output.num_tokens for output in outputs))
    merged: dict[str, Tensor] = {}
    for name in outputs[0].metrics:
        values = torch.stack([output.metrics[name] for output in outputs])
        if name in ("loss/total", "loss/policy", "loss/kl"):
            merged[name] = values.sum()
        elif name == "loss/ratio_max":
            merged[name] = values.max()
        else:
            shares = [output.num_tokens / total for output in outputs]
            merged[name] = sum((value * share for value, share in zip(values, shares, strict=True)), values[0] * 0)
    return merged
