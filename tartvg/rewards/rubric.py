"""The table of reward terms, and the rubric that weights them: one total that trains, and the terms behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tartvg.config import AnchorsConfig, RewardConfig
from tartvg.rewards.format import format_reward
from tartvg.rewards.iou import OVERLAPS, iou_reward
from tartvg.rewards.tar1 import tar1_rewards
from tartvg.rewards.tar2 import tar2_cost
from tartvg.rewards.tar3 import tar3_rewards
from tartvg.rewards.term import ScoredResponse, Term
from tartvg.rewards.truth import truth_of
from tartvg.spans import soft_iou_with_union
from tartvg.types import GroundingSample, Response, RewardBreakdown

TERMS: tuple[Term, ...] = (
    Term("format", "format", "format_weight", format_reward, is_paid_above_cap=True),
    Term("iou", "answer IoU", "iou_weight", iou_reward, is_paid_above_cap=True),
    Term("tar1", "TAR1", "tar1_weight", tar1_rewards),
    Term("tar2", "TAR2", "beta", tar2_cost, is_cost=True, is_paid_above_cap=True),
    Term("tar3", "TAR3", "gamma", tar3_rewards),
)
"""All terms, in the order of summation. Metrics, tables, the dashboard and the report's cards follow this table."""


@dataclass(frozen=True)
class Rubric:
    """Scores one response against one sample; holds settings only, so equal inputs get equal rewards."""

    reward: RewardConfig
    anchors: AnchorsConfig

    def score(self, response: Response, sample: GroundingSample) -> RewardBreakdown:
        """Sum the terms times their weights: by default format, IoU, TAR1, -TAR2 and TAR3.

        Every term that can be read is paid, even when the format fails. The truth is what `reward.truth` makes of the
        windows; a sample without any (a blind test set) raises ValueError. Source: arXiv 2508.07683, total reward.
        """
        values = self.raw_terms(response, sample)
        terms = {name: float(sum(v)) if isinstance(v, Sequence) else v for name, v in values.items()}
        total = 0.0
        for term in TERMS:
            total += term.signed_weight(self.reward) * terms[term.name]
        truth = truth_of(response, sample, self.reward.truth)
        ious = tuple(soft_iou_with_union(anchor, truth) for anchor in response.anchors)
        return RewardBreakdown(total, terms, ious)

    def raw_terms(self, response: Response, sample: GroundingSample) -> dict[str, float | Sequence[float]]:
        """Compute every term before its weight; a term of anchors gives one value per paid anchor.

        Raises ValueError for a sample without windows.
        """
        truth = truth_of(response, sample, self.reward.truth)
        overlap, cap = OVERLAPS[self.reward.iou], self.anchors.max_count
        ious = tuple(overlap(anchor, truth) for anchor in response.anchors)
        whole = ScoredResponse(response, sample, truth, ious, self.reward, self.anchors)
        capped = replace(whole, response=replace(response, anchors=response.anchors[:cap]), anchor_ious=ious[:cap])
        return {term.name: term.function(whole if term.is_paid_above_cap else capped) for term in TERMS}
