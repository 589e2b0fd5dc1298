"""Settings of the monitors: the bounds at which a training is reported as sick. Ours, unless a line says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from tartvg.config.choices import require


class MonitorName(Enum):
    """The failures that are watched for; `tartvg.monitors` holds one function for each."""

    reward_hacking = "reward_hacking"
    format_collapse = "format_collapse"
    stagnant_refinement = "stagnant_refinement"
    zero_variance = "zero_variance"
    truncation = "truncation"
    entropy_collapse = "entropy_collapse"
    kl_blowup = "kl_blowup"
    video_blindness = "video_blindness"
    non_finite = "non_finite"


class ControlName(Enum):
    """Videos that a query is asked about although they are not its own: does the answer notice?"""

    shuffled = "shuffled"
    """The same frames, pair by pair in another order."""
    other = "other"
    """The video of another query."""


@dataclass
class MonitorsConfig:
    """When to warn about a training, and when to stop it. No bound changes a number of the run."""

    watch: list[MonitorName] = field(default_factory=lambda: list(MonitorName))
    """Which monitors look; [] switches all of them off."""
    stop: list[MonitorName] = field(default_factory=list)
    """Which of them end the stage. It can be continued from its last checkpoint, with or without the monitor."""
    window: int = 5
    """Steps over which a metric is averaged before it is judged: one step of a few groups is mostly noise."""
    surplus_anchors: float = 0.5
    """reward_hacking: mean number of anchors above `anchors.target` [stated: 0.5]."""
    format_share: float = 0.5
    """format_collapse: the format rate is below this share of its best running mean [stated: half]."""
    format_high: float = 0.2
    """format_collapse: that best must have reached this much. Below it the rate of a few hundred completions halves
    by chance, and nothing that was learned is lost."""
    refinement_rate: float = 0.2
    """stagnant_refinement: share of refined anchors below this [stated: 0.2]. Chance is near one half."""
    min_pairs: float = 0.1
    """stagnant_refinement: successive anchors per completion that it takes to speak of refinement at all."""
    zero_variance_rate: float = 0.75
    """zero_variance: share of groups without any difference in reward above this. They teach nothing: at three
    quarters, a step costs four times what it teaches."""
    truncated_rate: float = 0.5
    """truncation: share of completions that hit the length limit above this. Their answers are cut off, so most of
    the reward then depends on a setting."""
    entropy_min: float = 0.02
    """entropy_collapse: nats per token below this. 0.02 is a policy that says the likeliest token 99.7 times in 100 (if
    it has two to choose from): groups become copies."""
    entropy_share: float = 0.1
    """entropy_collapse: also when below this share of the first window's entropy. Healthy runs of the tiny policy keep
    four fifths of theirs while they learn the format; at a tenth there is nothing left to choose from."""
    kl_max: float = 0.5
    """kl_blowup: nats per token from the reference above this. At 0.5 a completion of 100 tokens is e^50 times less
    likely under the reference: the language has become another one. Estimated by k1: a few odd tokens of a healthy run
    lifted k3, which is exponential in them, to 0.7 for one step."""
    kl_every: int = 10
    """Steps between two measurements of the KL where `grpo.kl_coef` is 0, so that nothing else needs the reference; 0:
    never. With a coefficient it is known at every step."""
    blind_agreement: float = 0.9
    """video_blindness: mean IoU above this between the answers to a video and to the same frames in another order."""
    control_every: int = 10
    """Steps between two such controls: two greedy completions per prompt; 0: never."""

    def __post_init__(self) -> None:
        require(self.window >= 1, "monitors.window", ">= 1", self.window)
        unwatched = [name.value for name in self.stop if name not in self.watch]
        require(not unwatched, "monitors.stop", "among monitors.watch", unwatched)
        for name in ("surplus_anchors", "entropy_min", "min_pairs"):
            require(getattr(self, name) >= 0, f"monitors.{name}", ">= 0", getattr(self, name))
        for name in ("format_share", "format_high", "refinement_rate", "zero_variance_rate", "truncated_rate",
                     "entropy_share", "blind_agreement"):  # fmt: skip
            require(0 <= getattr(self, name) <= 1, f"monitors.{name}", "in [0, 1]", getattr(self, name))
        require(self.kl_max > 0, "monitors.kl_max", "> 0", self.kl_max)
        for name in ("kl_every", "control_every"):
            require(getattr(self, name) >= 0, f"monitors.{name}", ">= 0", getattr(self, name))


@dataclass
class ControlsConfig:
    """The faithfulness controls after an evaluation: one more greedy answer per query and control."""

    kinds: list[ControlName] = field(default_factory=lambda: list(ControlName))
    """[] runs none."""
    limit: int | None = 200
    """Only the first queries: enough for an agreement to within a few points."""

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit >= 1, "controls.limit", "null or >= 1", self.limit)
