"""Rewards: one file per term, pure functions of one response and one sample; `Rubric` adds them up. No torch."""

from __future__ import annotations

from tartvg.rewards.format import format_reward
from tartvg.rewards.iou import iou_reward
from tartvg.rewards.rubric import Rubric
from tartvg.rewards.tar1 import tar1_reward
from tartvg.rewards.tar2 import tar2_cost
from tartvg.rewards.tar3 import refinements, tar3_reward

__all__ = ["Rubric", "format_reward", "iou_reward", "refinements", "tar1_reward", "tar2_cost", "tar3_reward"]
