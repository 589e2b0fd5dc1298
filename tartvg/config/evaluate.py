"""Settings of evaluation and of the faithfulness controls."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from tartvg.config.choices import require
from tartvg.config.fields import Effect, Settings, setting


def policy_label(policy: str) -> str:
    """Return the folder below `evaluate/` for one of evaluate.policies: its name, or the stage of an adapter folder."""
    return policy if policy.isidentifier() else Path(policy).resolve().parent.name


@dataclass
class EvaluateConfig(Settings, path="evaluate"):
    """Predictions and scores."""

    split: str = setting("test", among=("train", "val", "test"))
    """Whose queries are asked."""
    policies: list[str] = setting(["grpo2"], effect=Effect.content)
    """Policies to score: `base`, a stage of this run (`grpo1`, `sft`, `grpo2`) or an adapter folder."""
    num_samples: int = setting(4, at_least=0)
    """Sampled completions per query beside the greedy one; they give the format rate."""
    batch_size: int = setting(16, at_least=1)
    """Queries per batch."""
    num_queries: int | None = setting(None, at_least=1)
    """Score only the first so many queries; null: all."""
    temperature: float = setting(1.0, above=0)
    """Of the sampled completions."""
    num_shards: int | None = setting(None, at_least=1, effect=Effect.none)
    """Processes that share the batches; null: one for each of trainer.devices. The results do not depend on it."""
    shard: int | None = setting(None, effect=Effect.none)
    """null: this command starts all of its shards on this machine. A number from 0: it works on that share alone, and
    whichever ends last puts the results together; for several nodes that see the same runs_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard is not None:
            require(self.num_shards is not None, "evaluate.num_shards", "a number with evaluate.shard", None)
            bound = f"null or from 0 to {(self.num_shards or 1) - 1} (evaluate.num_shards - 1)"
            require(0 <= self.shard < (self.num_shards or 1), "evaluate.shard", bound, self.shard)


class ControlName(Enum):
    """Videos that a query is asked about although they are not its own: does the answer notice?"""

    shuffled = "shuffled"
    """The same frames, pair by pair in another order."""
    other = "other"
    """The video of another query."""
    shifted_stamps = "shifted_stamps"
    """The same frames, told five seconds later; only where the prompt says times in words, as Qwen3-VL's does."""


@dataclass
class FaithfulnessConfig(Settings, path="faithfulness"):
    """Asking about wrong videos, after an evaluation and while a stage trains: do the answers depend on the video?"""

    kinds: list[ControlName] = field(default_factory=lambda: [ControlName.shuffled, ControlName.other])
    """Controls after an evaluation, each one more greedy answer per query; [] runs none. shifted_stamps is left out,
    with a line that says so, for a model whose prompt has no stamps."""
    num_queries: int | None = setting(200, at_least=1)
    """Ask only the first so many queries after an evaluation: enough for an agreement to within a few points."""
    every: int = setting(10, at_least=0, effect=Effect.none)
    """Steps between two controls with shuffled frames while a GRPO stage trains, for the monitor video_blindness: two
    greedy completions per prompt; 0: never."""


@dataclass
class ExportConfig(Settings, path="export"):
    """stage=export: the adapter merged into its base, as a plain Hugging Face folder."""

    num_queries: int = setting(16, at_least=0)
    """Queries of evaluate.split on which the merged model is compared with base and adapter side by side; 0: none."""
