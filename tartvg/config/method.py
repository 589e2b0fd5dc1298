"""Settings of the method: anchors, reward, GRPO, SFT, the tiny base, evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tartvg.config.choices import (
    AdvantageScale,
    Aggregation,
    CountPenalty,
    ImportanceLevel,
    IouKind,
    KlEstimator,
    LrDecay,
    PromptStyle,
    SettingError,
    require,
)


@dataclass
class FilterConfig:
    """Which rollouts become traces [stated: 6.4, 2, 0.5 and 0.7]. All bounds are strict, except the count."""

    min_reward: float = 6.4
    min_anchors: int = 2
    min_ious: list[float] = field(default_factory=lambda: [0.5, 0.7])
    """Soft IoU that anchor 1, 2, ... must exceed."""
    max_per_query: int | None = None
    """Keep at most this many of a query's traces, the best first; null keeps all."""
    source: str = "grpo1"
    """Stage whose rollouts are read: `grpo1`, or `rollouts`, which draws them from the untouched base."""

    def __post_init__(self) -> None:
        require(self.min_anchors >= 0, "anchors.filter.min_anchors", ">= 0", self.min_anchors)
        require(all(-1 <= v <= 1 for v in self.min_ious), "anchors.filter.min_ious", "a list in [-1, 1]", self.min_ious)
        require(
            self.max_per_query is None or self.max_per_query >= 1,
            "anchors.filter.max_per_query",
            "null or >= 1",
            self.max_per_query,
        )
        require(self.source in ("grpo1", "rollouts"), "anchors.filter.source", "grpo1 or rollouts", self.source)


@dataclass
class AnchorsConfig:
    """How many timestamp anchors the reasoning should have."""

    target: int = 2
    """K: two are best in the paper."""
    max: int = 3
    """Hard cap: above it the format reward is 0 and surplus anchors earn nothing. Without it K = 2 can be hacked."""
    prompt: PromptStyle = PromptStyle.tar
    filter: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        require(self.target >= 1, "anchors.target", ">= 1", self.target)
        require(self.max >= 1, "anchors.max", ">= 1", self.max)
        require(self.max >= self.target, "anchors.max", f">= anchors.target ({self.target})", self.max)


@dataclass
class RewardConfig:
    """Weights and forms of the reward's terms; they apply as written."""

    format_weight: float = 3.0
    iou_weight: float = 1.0
    tar1_weight: float = 1.0
    beta: float = 5.0
    """Weight of the penalty for a wrong number of anchors (TAR2)."""
    gamma: float = 1.0
    """Weight of the refinement term (TAR3)."""
    iou: IouKind = IouKind.soft
    tar2_form: CountPenalty = CountPenalty.abs
    needs_anchors: bool = True
    """The format needs at least one anchor; False for the TimeZero baseline."""
    answer_is_last_anchor: bool = True
    """The format needs the answer to equal the last anchor."""
    unparsed_iou: float = -1.0
    """IoU reward of an answer that cannot be read: the infimum of soft IoU."""

    def __post_init__(self) -> None:
        for name in ("format_weight", "iou_weight", "tar1_weight", "beta", "gamma"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"reward.{name}", "finite and >= 0", value)
        require(-1 <= self.unparsed_iou <= 0, "reward.unparsed_iou", "in [-1, 0]", self.unparsed_iou)


@dataclass
class SamplingConfig:
    """How completions are drawn."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 switches it off."""
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "sampling.temperature", ">= 0", self.temperature)
        require(0 < self.top_p <= 1, "sampling.top_p", "in (0, 1]", self.top_p)
        require(self.top_k >= 0, "sampling.top_k", ">= 0", self.top_k)
        require(self.max_new_tokens >= 1, "sampling.max_new_tokens", ">= 1", self.max_new_tokens)


@dataclass
class GrpoConfig:
    """The reinforcement-learning step."""

    max_steps: int = 40
    """Rollout batches of one GRPO stage."""
    grpo2_max_steps: int | None = None
    """The same for grpo2 when it should differ; null uses max_steps."""
    whole_budget: bool = False
    """grpo1 also gets the steps of grpo2: for a run with a single GRPO stage that may cost as much as one with two."""
    group_size: int = 8
    """G completions per prompt."""
    prompts_per_step: int = 8
    """Groups per optimiser step, over all processes."""
    rollouts_per_step: int | None = None
    """Completions per optimiser step; sets prompts_per_step to this over group_size. null leaves it as it is."""
    prompts_at_once: int | None = None
    """Prompts that a process samples in one batch; null: all of its step. 1 makes rollouts independent of the number of
    processes to the last bit, as rounding depends on the size of a batch."""
    rows_per_pass: int | None = None
    """Completions of a group per forward pass of an update, and traces of a query in sft; null: all. Fewer need less
    memory and more time. Outside ZeRO-3 an update that runs out of memory finds the number by itself."""
    num_iterations: int = 1
    """Updates per rollout batch (mu)."""
    lr: float = 1e-6
    warmup_steps: int = 0
    lr_decay: LrDecay = LrDecay.none
    """`linear` falls from `lr` to `lr / max_steps` in the last step."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    """Larger than clip_low is DAPO's clip-higher."""
    kl_coef: float = 0.04
    """alpha: weight of the KL penalty; 0 skips the reference pass."""
    kl: KlEstimator = KlEstimator.k3
    advantage: AdvantageScale = AdvantageScale.sample_std
    advantage_eps: float = 1e-4
    aggregation: Aggregation = Aggregation.sequence_mean
    importance: ImportanceLevel = ImportanceLevel.token
    drop_zero_variance: bool = False
    """Leave groups whose rewards are all equal out of the loss: they have no advantage, only a KL penalty. They are
    recorded and counted all the same (group/zero_variance_rate). Nothing is drawn in their place."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        require(self.max_steps >= 1, "grpo.max_steps", ">= 1", self.max_steps)
        require(
            self.grpo2_max_steps is None or self.grpo2_max_steps >= 1,
            "grpo.grpo2_max_steps",
            "null or >= 1",
            self.grpo2_max_steps,
        )
        require(self.group_size >= 2, "grpo.group_size", ">= 2 (advantages compare completions)", self.group_size)
        if self.rollouts_per_step is not None:
            fits = self.rollouts_per_step >= 1 and self.rollouts_per_step % self.group_size == 0
            require(fits, "grpo.rollouts_per_step", "a multiple of grpo.group_size", self.rollouts_per_step)
            self.prompts_per_step = self.rollouts_per_step // self.group_size
        require(self.prompts_per_step >= 1, "grpo.prompts_per_step", ">= 1", self.prompts_per_step)
        at_once = self.prompts_at_once
        require(at_once is None or at_once >= 1, "grpo.prompts_at_once", "null or >= 1", at_once)
        rows = self.rows_per_pass
        require(rows is None or rows >= 1, "grpo.rows_per_pass", "null or >= 1", rows)
        require(self.num_iterations >= 1, "grpo.num_iterations", ">= 1", self.num_iterations)
        require(self.lr > 0, "grpo.lr", "> 0", self.lr)
        require(self.warmup_steps >= 0, "grpo.warmup_steps", ">= 0", self.warmup_steps)
        require(self.weight_decay >= 0, "grpo.weight_decay", ">= 0", self.weight_decay)
        require(self.max_grad_norm > 0, "grpo.max_grad_norm", "> 0", self.max_grad_norm)
        require(0 < self.clip_low < 1, "grpo.clip_low", "in (0, 1)", self.clip_low)
        require(self.clip_high > 0, "grpo.clip_high", "> 0", self.clip_high)
        require(self.kl_coef >= 0, "grpo.kl_coef", ">= 0", self.kl_coef)
        require(self.advantage_eps >= 0, "grpo.advantage_eps", ">= 0", self.advantage_eps)
        require(
            self.sampling.temperature > 0,
            "grpo.sampling.temperature",
            "> 0 (a group needs variety)",
            self.sampling.temperature,
        )

    def steps_of(self, stage: str) -> int:
        """Rollout batches of `grpo1`, `rollouts` or `grpo2`."""
        second = self.grpo2_max_steps or self.max_steps
        if stage == "grpo2":
            return second
        return self.max_steps + (second if self.whole_budget else 0)


@dataclass
class SftConfig:
    """Supervised fine-tuning of a fresh base on the filtered traces."""

    epochs: int = 2
    batch_size: int = 16
    """Traces per optimiser step."""
    lr: float = 2e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    lr_decay: LrDecay = LrDecay.none

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "sft.epochs", ">= 1", self.epochs)
        require(self.batch_size >= 1, "sft.batch_size", ">= 1", self.batch_size)
        require(self.lr > 0, "sft.lr", "> 0", self.lr)
        require(self.weight_decay >= 0, "sft.weight_decay", ">= 0", self.weight_decay)
        require(self.max_grad_norm > 0, "sft.max_grad_norm", "> 0", self.max_grad_norm)
        require(self.warmup_steps >= 0, "sft.warmup_steps", ">= 0", self.warmup_steps)


@dataclass
class PretrainConfig:
    """Making the tiny stand-in for a pretrained model: perception first, then the imprecise habit."""

    start: str = ""
    """A finished tiny base to go on from: `embedded:tiny` or a folder. Only the repeat phase runs then."""
    output: str = "runs/tiny_base"
    """Folder that receives the model in Hugging Face format."""
    num_videos: int = 1000
    """Planted videos, drawn with their own seed; none of them is in the data set of the stages."""
    tower_steps: int = 1000
    perception_steps: int = 2400
    habit_steps: int = 900
    repeat_steps: int = 400
    batch_size: int = 32
    lr: float = 2e-3
    habit_lr: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("num_videos", "tower_steps", "perception_steps", "habit_steps", "repeat_steps", "batch_size"):
            require(getattr(self, name) >= 1, f"pretrain.{name}", ">= 1", getattr(self, name))
        require(self.lr > 0, "pretrain.lr", "> 0", self.lr)
        require(self.habit_lr > 0, "pretrain.habit_lr", "> 0", self.habit_lr)


@dataclass
class SelectionConfig:
    """Watching a training on queries that it does not train on, and choosing among its states."""

    every: int = 0
    """Steps between two measurements, of greedy answers; 0: none. The last step is measured, too."""
    split: str = "val"
    num_queries: int | None = 64
    """The first so many of the split; null: all."""
    keep: str = "last"
    """Which weights are the stage's result: `last`, or `best`, those with the highest mIoU of all measurements."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "selection.every", ">= 0", self.every)
        if self.split == "test":
            raise SettingError(
                "selection.split=test: a policy chosen by its test scores has none left that say anything; use val"
            )
        require(self.split == "val", "selection.split", "val", self.split)
        require(self.num_queries is None or self.num_queries >= 1, "selection.num_queries", "null or >= 1",
                self.num_queries)  # fmt: skip
        require(self.keep in ("last", "best"), "selection.keep", "last or best", self.keep)
        require(self.every > 0 or self.keep == "last", "selection.keep", "last without selection.every", self.keep)


def target_label(target: str) -> str:
    """The folder below `evaluate/` of a value of evaluate.targets: its own name, or the stage of an adapter folder."""
    return target if target.isidentifier() else Path(target).resolve().parent.name


@dataclass
class EvaluateConfig:
    """Predictions and scores."""

    split: str = "test"
    targets: list[str] = field(default_factory=lambda: ["grpo2"])
    """Policies to score: `base`, a stage of this run (`grpo1`, `sft`, `grpo2`) or an adapter folder."""
    num_samples: int = 4
    """Sampled completions per query beside the greedy one; they give the format rate."""
    batch_size: int = 16
    """Queries per batch."""
    limit: int | None = None
    """Score only the first queries."""
    temperature: float = 1.0
    num_shards: int = 1
    """Processes that share the batches. The results do not depend on it."""
    shard: int | None = None
    """null: this command starts all of its shards on this machine. A number from 0: it works on that share alone, and
    whichever ends last puts the results together; for several nodes that see the same runs_dir."""

    def __post_init__(self) -> None:
        require(self.split in ("train", "val", "test"), "evaluate.split", "train, val or test", self.split)
        require(self.num_samples >= 0, "evaluate.num_samples", ">= 0", self.num_samples)
        require(self.batch_size >= 1, "evaluate.batch_size", ">= 1", self.batch_size)
        require(self.limit is None or self.limit >= 1, "evaluate.limit", "null or >= 1", self.limit)
        require(self.temperature > 0, "evaluate.temperature", "> 0", self.temperature)
        require(self.num_shards >= 1, "evaluate.num_shards", ">= 1", self.num_shards)
        bound = f"null or from 0 to {self.num_shards - 1} (evaluate.num_shards - 1)"
        require(self.shard is None or 0 <= self.shard < self.num_shards, "evaluate.shard", bound, self.shard)
