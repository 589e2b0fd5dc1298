"""Settings of the reinforcement-learning step."""

from __future__ import annotations

from dataclasses import dataclass, field

from tartvg.config.choices import (
    AdvantageScale,
    Aggregation,
    Credit,
    ImportanceLevel,
    KlEstimator,
    LrDecay,
    Normalise,
    require,
)
from tartvg.config.fields import Effect, Settings, setting


@dataclass
class SamplingConfig(Settings, path="grpo.sampling"):
    """How completions are drawn."""

    temperature: float = setting(1.0, at_least=0)
    """0 is greedy."""
    top_p: float = setting(1.0, above=0, at_most=1)
    """Share of the probability that the likeliest tokens keep; 1 switches it off."""
    top_k: int = setting(0, at_least=0)
    """Number of the likeliest tokens that remain; 0 switches it off."""
    max_new_tokens: int = setting(1024, at_least=1)
    """Longest completion."""


@dataclass
class GrpoConfig(Settings, path="grpo"):
    """The reinforcement-learning step."""

    max_steps: int = setting(40, at_least=1)
    """Rollout batches of grpo1, and of stage=rollouts."""
    max_steps_grpo2: int | None = setting(None, at_least=1)
    """Rollout batches of grpo2; null: as many as grpo1."""
    group_size: int = setting(8, at_least=2, because="advantages compare completions")
    """G completions per prompt."""
    prompts_per_step: int = setting(8, at_least=1)
    """Groups per optimiser step, over all processes."""
    sampling_batch_size: int | None = setting(None, at_least=1)
    """Prompts that a process samples in one batch; null: all of its step. 1 makes rollouts independent of the number of
    processes to the last bit, as rounding depends on the size of a batch."""
    rows_per_pass: int | None = setting(None, at_least=1, effect=Effect.rounding)
    """Completions of a group per forward pass of an update, and traces of a query in sft; null: all. Fewer need less
    memory and more time. Outside ZeRO-3 an update that runs out of memory finds the number by itself."""
    num_iterations: int = setting(1, at_least=1)
    """Updates per rollout batch (mu)."""
    lr: float = setting(1e-6, above=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = setting(0, at_least=0)
    """Steps over which the learning rate rises linearly to `lr`."""
    lr_decay: LrDecay = LrDecay.none
    """`linear` falls from `lr` to `lr / max_steps` in the last step."""
    max_grad_norm: float = setting(1.0, above=0)
    """Longer gradients are scaled down to this norm."""
    clip_low: float = setting(0.2, above=0, below=1)
    """The probability ratio is clipped below 1 minus this."""
    clip_high: float = setting(0.2, above=0)
    """The probability ratio is clipped above 1 plus this. Larger than clip_low is DAPO's clip-higher."""
    kl_coef: float = setting(0.04, at_least=0)
    """alpha: weight of the KL penalty; 0 skips the reference pass."""
    kl_time_coef: float | None = setting(None, at_least=0)
    """Weight of the KL penalty on the digits of times, in anchors and in the answer; null: `kl_coef`, as on all other
    tokens."""
    kl_estimator: KlEstimator = KlEstimator.k3
    """Schulman's estimator of the KL penalty."""
    advantage_scale: AdvantageScale = AdvantageScale.sample_std
    """What divides the centred rewards of a group."""
    credit: Credit = Credit.outcome
    """What the tokens up to an anchor are paid for: the whole completion, as all others (`outcome`, the paper); what is
    earned from there on (`return_to_go`); that anchor's own terms (`own_term`), with the answer's IoU for the
    answer alone (`own_part`), or without TAR3 (`turn`); or how much better the last anchor is than the one before
    (`potential`)."""
    normalise: Normalise = Normalise.total
    """Whether completions are compared by the weighted sum of the terms, or by each term before its weight (GDPO)."""
    loss_aggregation: Aggregation = Aggregation.sequence_mean
    """How token losses become one number: the mean of the sequences' means, the mean over all tokens of a step, or the
    sum over a constant (Dr. GRPO)."""
    importance_level: ImportanceLevel = ImportanceLevel.token
    """One probability ratio per token (GRPO) or per sequence (GSPO)."""
    drop_zero_variance: bool = False
    """Leave groups whose rewards are all equal out of the loss: they have no advantage, only a KL penalty. They are
    recorded and counted all the same (group/zero_variance_rate). Nothing is drawn in their place."""
    mask_truncated: bool = False
    """Leave completions that hit the length limit out of the loss."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        temperature = self.sampling.temperature
        require(temperature > 0, "grpo.sampling.temperature", "> 0 (a group needs variety)", temperature)

    @property
    def needs_reference(self) -> bool:
        """Whether any token has a KL penalty."""
        return bool(self.kl_coef or self.kl_time_coef)

    def steps_of(self, stage: str) -> int:
        """Rollout batches of `grpo1`, `rollouts` or `grpo2`."""
        return self.max_steps_grpo2 or self.max_steps if stage == "grpo2" else self.max_steps
