"""Settings of the timestamp anchors, and of the filter that turns rollouts into traces."""

from __future__ import annotations

from dataclasses import dataclass

from tartvg.config.choices import PromptStyle, require
from tartvg.config.fields import Settings, setting


@dataclass
class AnchorsConfig(Settings, path="anchors"):
    """How many timestamp anchors the reasoning should have."""

    count: int = setting(2, at_least=1)
    """K: two are best in the paper."""
    max_count: int = setting(3, at_least=1)
    """Hard cap: above it the format reward is 0 and surplus anchors earn nothing. Without it K = 2 can be hacked."""
    prompt: PromptStyle = PromptStyle.tar
    """What the model is asked: for anchors, as TimeZero asks, or for the answer alone (`direct`). That one's format
    allows nothing else; give `reward=timezero` with it."""

    @property
    def is_direct(self) -> bool:
        """Whether the answer alone is asked for."""
        return self.prompt is PromptStyle.direct

    def __post_init__(self) -> None:
        super().__post_init__()
        bound = f">= anchors.count ({self.count})"
        require(self.max_count >= self.count, "anchors.max_count", bound, self.max_count)


@dataclass
class FilterConfig(Settings, path="filter"):
    """Which rollouts become traces [stated: 6.4, 2, 0.5 and 0.7]. All bounds are strict, except the count."""

    min_reward: float = 6.4
    """Total reward that a trace must exceed."""
    min_anchors: int = setting(2, at_least=0)
    """Fewest anchors of a trace."""
    min_ious: list[float] = setting([0.5, 0.7], at_least=-1, at_most=1)
    """Soft IoU that anchor 1, 2, ... must exceed."""
    max_per_query: int | None = setting(None, at_least=1)
    """Keep at most this many of a query's traces, the best first; null keeps all."""
    source: str = setting("grpo1", among=("grpo1", "rollouts"))
    """Stage whose rollouts are read: `grpo1`, or `rollouts`, which draws them from the untouched base."""
