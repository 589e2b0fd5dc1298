"""Settings of the monitors: which failures of a training are watched for."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from tartvg.config.choices import require
from tartvg.config.fields import Effect, Settings, setting


class MonitorName(Enum):
    """The failures that are watched for; `tartvg.monitors` holds one function for each."""

    reward_hacking = "reward_hacking"
    format_collapse = "format_collapse"
    stagnant_refinement = "stagnant_refinement"
    sandbagging = "sandbagging"
    zero_variance = "zero_variance"
    truncation = "truncation"
    entropy_collapse = "entropy_collapse"
    kl_blowup = "kl_blowup"
    video_blindness = "video_blindness"
    non_finite = "non_finite"


@dataclass
class MonitorsConfig(Settings, path="monitors", effect=Effect.none):
    """When to warn about a training, and when to stop it. tartvg/monitors.py has the bounds."""

    watch: list[MonitorName] = field(default_factory=lambda: list(MonitorName))
    """Which monitors look; [] switches all of them off."""
    stop: list[MonitorName] = field(default_factory=list)
    """Which of them end the stage. It can be continued from its last checkpoint, with or without the monitor."""
    kl_every: int = setting(10, at_least=0)
    """Steps between two measurements of the KL where `grpo.kl_coef` is 0, so that nothing else needs the reference; 0:
    never. With a coefficient it is known at every step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unwatched = [name.value for name in self.stop if name not in self.watch]
        require(not unwatched, "monitors.stop", "among monitors.watch", unwatched)
