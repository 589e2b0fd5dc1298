"""What a reward term is a function of, and what a row of `rubric.TERMS` says about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tartvg.config import AnchorsConfig, RewardConfig
from tartvg.types import GroundingSample, Response, Span


@dataclass(frozen=True)
class ScoredResponse:
    """One response beside its ground truth: the argument of every term."""

    response: Response
    """Its anchors end at the cap `anchors.max_count`, unless the term is paid above it."""
    sample: GroundingSample
    truth: tuple[Span, ...]
    """The windows that answer and anchors are compared with, as a union; see `truth_of`."""
    anchor_ious: tuple[float, ...]
    """Overlap of each anchor with `truth`, of the kind `reward.iou`: in (-1, 1] if soft, in [0, 1] if hard."""
    reward: RewardConfig
    anchors: AnchorsConfig


@dataclass(frozen=True)
class Term:
    """One row of the table of rewards."""

    name: str
    """Key in `RewardBreakdown.terms`, column of the rollout table, and `reward/<name>_mean` among the metrics."""
    title: str
    """Label on pages."""
    weight: str
    """Setting of `RewardConfig` that multiplies the term."""
    function: Callable[[ScoredResponse], float | Sequence[float]]
    """Value before the weight. A sequence gives the share of each anchor, and the term is its sum."""
    is_cost: bool = False
    """Subtracted from the total instead of added."""
    is_paid_above_cap: bool = False
    """Whether the function sees all anchors; otherwise it sees the first `anchors.max_count` only."""

    def signed_weight(self, reward: RewardConfig) -> float:
        """Return the factor of the term in the total, negative for a cost."""
        weight: float = getattr(reward, self.weight)
        return -weight if self.is_cost else weight
