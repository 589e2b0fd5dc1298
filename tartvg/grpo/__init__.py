"""GRPO without a model: rewards -> advantages -> loss, and the metrics of a batch of rollout groups."""

from __future__ import annotations

from tartvg.grpo.advantages import group_advantages
from tartvg.grpo.aggregation import aggregate
from tartvg.grpo.credit import SCHEMES, Comparison, Earned, per_token
from tartvg.grpo.kl import kl_tokens
from tartvg.grpo.loss import LossInputs, LossOutput, LossSettings, grpo_loss, merged_metrics
from tartvg.grpo.metrics import rollout_metrics

__all__ = [
    "SCHEMES",
    "Comparison",
    "Earned",
    "LossInputs",
    "LossOutput",
    "LossSettings",
    "aggregate",
    "group_advantages",
    "grpo_loss",
    "kl_tokens",
    "merged_metrics",
    "per_token",
    "rollout_metrics",
]
