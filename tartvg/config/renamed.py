"""Settings that are called otherwise now, or are gone: the refusal of an old name says what to give instead. No torch.

Nothing is translated: a command that runs says what it means.
"""

from __future__ import annotations

from collections.abc import Iterable

from tartvg.config.choices import SettingError

RENAMED: dict[str, str] = {
    "stage=validate": "stage=check_data",
    "selection": "validation",
    "selection.every": "validation.every",
    "selection.num_queries": "validation.num_queries",
    "selection.keep": "validation.keep_best",
    "policy.memory_saving": "policy.activation_checkpointing",
    "policy.feature_cache_mb": "policy.feature_cache_gib",
    "policy.feature_cache_dir_mb": "policy.feature_cache_dir_gib",
    "trainer.persist_below": "trainer.zero3.param_persistence_threshold",
    "trainer.keep_within": "trainer.zero3.max_reuse_distance",
    "trainer.memory_gb": "trainer.memory_gib",
    "trainer.timeout_min": "trainer.timeout_minutes",
    "grpo.grpo2_max_steps": "grpo.max_steps_grpo2",
    "grpo.prompts_at_once": "grpo.sampling_batch_size",
    "grpo.advantage": "grpo.advantage_scale",
    "grpo.kl": "grpo.kl_estimator",
    "grpo.importance": "grpo.importance_level",
    "grpo.aggregation": "grpo.loss_aggregation",
    "anchors.target": "anchors.count",
    "anchors.max": "anchors.max_count",
    "anchors.filter": "filter",
    "anchors.filter.min_reward": "filter.min_reward",
    "anchors.filter.min_anchors": "filter.min_anchors",
    "anchors.filter.min_ious": "filter.min_ious",
    "anchors.filter.max_per_query": "filter.max_per_query",
    "anchors.filter.source": "filter.source",
    "dataset.limit": "dataset.num_queries",
    "evaluate.limit": "evaluate.num_queries",
    "evaluate.targets": "evaluate.policies",
    "controls": "faithfulness",
    "controls.kinds": "faithfulness.kinds",
    "controls.limit": "faithfulness.num_queries",
    "monitors.control_every": "faithfulness.every",
}
"""Old name -> new name, of settings, of whole groups and of choices (`group=choice`)."""

_MONITOR = "its bound is a constant of tartvg/monitors.py"
_PRETRAIN = "the embedded base is made by `python -m experiments.tiny_base`"
_SFT = "sft trains at a constant rate, as in tartvg/config/sft.py"
REMOVED: dict[str, str] = {
    "selection.split": "validation asks the val split",
    "grpo.whole_budget": "give grpo.max_steps the steps of both stages, as in experiments/stage_order",
    "grpo.rollouts_per_step": "give grpo.prompts_per_step, as in sweeps/group_size.yaml",
    "grpo.advantage_eps": "it is a constant of tartvg/grpo/advantages.py",
    "grpo.weight_decay": "adapters train without weight decay",
    "sft.weight_decay": "adapters train without weight decay",
    "sft.max_grad_norm": _SFT,
    "sft.warmup_steps": _SFT,
    "sft.lr_decay": _SFT,
    "tracking.num_examples": "tables show 4 of the best and 4 of the worst",
    "monitors.window": "it is a constant of tartvg/monitors.py",
    "monitors.surplus_anchors": _MONITOR,
    "monitors.format_share": _MONITOR,
    "monitors.format_high": _MONITOR,
    "monitors.refinement_rate": _MONITOR,
    "monitors.min_pairs": _MONITOR,
    "monitors.zero_variance_rate": _MONITOR,
    "monitors.truncated_rate": _MONITOR,
    "monitors.entropy_min": _MONITOR,
    "monitors.entropy_share": _MONITOR,
    "monitors.kl_max": _MONITOR,
    "monitors.blind_agreement": _MONITOR,
    "stage=pretrain": _PRETRAIN,
    "pretrain": _PRETRAIN,
}
"""Setting that is gone -> what holds instead."""


def refusal_of(name: str) -> str | None:
    """Word the refusal of an old setting, group or `group=choice`; None for any other name."""
    if name in RENAMED:
        return f"{name} is now called {RENAMED[name]}"
    if name in REMOVED:
        return f"{name} is no setting any more: {REMOVED[name]}"
    parent = name.rpartition(".")[0]
    return refusal_of(parent) if parent and "=" not in name else None


def refuse_old_names(overrides: Iterable[str]) -> None:
    """Raise SettingError for the first override of a command line that has an old name, whatever its prefix."""
    for override in overrides:
        key, _, values = override.partition("=")
        key = key.lstrip("+~").partition("@")[0]
        for name in (key, *(f"{key}={value.strip()}" for value in values.split(","))):
            said = refusal_of(name)
            if said is not None:
                raise SettingError(said)
