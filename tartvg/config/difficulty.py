"""Settings of the curriculum: which training queries GRPO asks, by how well the untouched base answers them."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from tartvg.config.choices import DifficultyRule, require
from tartvg.config.fields import Effect, Settings, setting


@dataclass
class DifficultyConfig(Settings, path="difficulty"):
    """Which training queries grpo1 and grpo2 keep, by the base's own success; stage=rollouts measures it."""

    keep: DifficultyRule = DifficultyRule.all
    """`all` measures nothing. `band`: a mean in [low, high]. `gaussian`: each with a chance of
    exp(-(mean - centre)^2 / (2 width^2)). `undecided`: queries of which some rollouts are right and some wrong."""
    measure: str = setting("iou", among=("iou", "reward"))
    """What a mean is of: the IoU of the answers, 0 where one cannot be read, or the total reward."""
    low: float = setting(0.0, above=-inf, below=inf)
    """Of the band, inclusive."""
    high: float = setting(1.0, above=-inf, below=inf)
    """Of the band, inclusive."""
    centre: float = setting(0.3, above=-inf, below=inf)
    """Mean that is always kept."""
    width: float = setting(0.2, above=0, below=inf)
    """Standard deviation around `centre`."""
    right_iou: float = setting(0.5, above=0, at_most=1)
    """IoU from which on a rollout counts as right."""
    passes: int = setting(0, at_least=0)
    """So many times stage=rollouts asks every training query; 0: it asks the prompts of grpo1's steps instead."""
    file: str | None = setting(None, effect=Effect.content)
    """difficulty.jsonl of another run's stage=rollouts; null: that of this run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.low <= self.high, "difficulty.low", f"<= difficulty.high ({self.high:g})", self.low)
