"""The rubric: named terms and weights -> the total that trains, and the raw terms that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

from tartvg.config import AnchorsConfig, RewardConfig
from tartvg.rewards.format import format_reward
from tartvg.rewards.iou import OVERLAPS, iou_reward
from tartvg.rewards.tar1 import tar1_reward
from tartvg.rewards.tar2 import tar2_cost
from tartvg.rewards.tar3 import tar3_reward
from tartvg.spans import soft_iou
from tartvg.types import GroundingSample, Response, RewardBreakdown


@dataclass(frozen=True)
class Rubric:
    """Judges one response against one sample; holds settings only, so equal inputs get equal rewards."""

    reward: RewardConfig
    anchors: AnchorsConfig

    def score(self, response: Response, sample: GroundingSample) -> RewardBreakdown:
        """format_weight * format + iou_weight * iou + tar1_weight * TAR1 - beta * TAR2 + gamma * TAR3.

        Every term that can be read is paid, even when the format fails. Of more than `anchors.max_count` anchors
        TAR1 and TAR3 see the first so many only, while TAR2 counts all. The truth is `sample.target`; a sample without
        windows (a blind test set) raises ValueError. Source: arXiv 2508.07683, total reward.
        """
        if not sample.windows:
            raise ValueError(f"sample {sample.sample_id!r} has no ground-truth window to reward against")
        setting, truth = self.reward, sample.target
        overlap = OVERLAPS[setting.iou]
        paid_ious = [overlap(anchor, truth) for anchor in response.anchors[: self.anchors.max_count]]
        form = format_reward(
            response,
            max_anchors=self.anchors.max_count,
            needs_anchors=setting.needs_anchors,
            answer_is_last_anchor=setting.answer_is_last_anchor,
        )
        iou = iou_reward(response.answer, truth, kind=setting.iou, unparsed=setting.unparsed_iou)
        tar1 = tar1_reward(paid_ious)
        tar2 = tar2_cost(response.num_anchors, self.anchors.count, setting.tar2_form)
        tar3 = tar3_reward(paid_ious)
        total = (
            setting.format_weight * form
            + setting.iou_weight * iou
            + setting.tar1_weight * tar1
            - setting.beta * tar2
            + setting.gamma * tar3
        )
        anchor_ious = tuple(soft_iou(anchor, truth) for anchor in response.anchors)
        return RewardBreakdown(total, form, iou, tar1, tar2, tar3, anchor_ious)
