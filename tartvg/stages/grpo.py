"""grpo1 and grpo2: reinforcement learning from the base, and from the fine-tuned policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tartvg.config import Config, require
from tartvg.policy.loading import checked_base
from tartvg.policy.torch_setup import set_up_torch
from tartvg.rewards import Rubric
from tartvg.stages.common import adapter_of, base_identity, prompts_of, say_windows, train_data
from tartvg.stages.difficulty import choose, difficulty_key
from tartvg.stages.folder import StageFolder, run_dir
from tartvg.stages.keys import STEPS, fingerprint, settings_of
from tartvg.stages.memory import refuse_what_cannot_fit
from tartvg.stages.train import Setup, train_stage
from tartvg.stages.validation import validation_key
from tartvg.training import distributed
from tartvg.training.batches import StepDataset
from tartvg.training.grpo_module import GrpoModule


def start_adapter(config: Config, stage: str) -> Path | None:
    """Return where a stage starts: `init_adapter` if set, else the base for grpo1 and the sft adapter for grpo2."""
    if config.init_adapter is not None:
        return adapter_of(config, config.init_adapter)
    return adapter_of(config, "sft") if stage == "grpo2" else None


def run_grpo1(config: Config) -> None:
    """Train from the base, or from `init_adapter`."""
    run_grpo(config, "grpo1")


def run_grpo2(config: Config) -> None:
    """Train from the adapter of sft, or from `init_adapter`."""
    run_grpo(config, "grpo2")


def run_grpo(config: Config, stage: str) -> None:
    """Train one GRPO stage into `<run>/<stage>/`: adapter, rollouts.jsonl, metrics.jsonl, checkpoints."""
    set_up_torch(config.trainer)
    checked_base(config.policy)
    count, per_step = distributed.world_size(), config.grpo.prompts_per_step
    require(per_step % count == 0, "grpo.prompts_per_step", f"a multiple of the {count} processes", per_step)
    start = start_adapter(config, stage)
    max_steps = config.grpo.steps_of(stage)
    output = StageFolder(run_dir(config) / stage, config, lambda: key_of(config, stage, start), is_training=True)
    with output.work() as is_needed:
        if is_needed:
            _train(config, stage, output.folder, start, max_steps)


def key_of(config: Config, stage: str, start: Path | None) -> dict[str, Any]:
    """What the stage's result depends on. The filter and the other stage's steps are no part of it."""
    found = settings_of(config, "policy", "dataset.parts", "anchors", "reward", "grpo", "seed")
    own = STEPS[stage == "grpo2"]
    return {
        **{name: value for name, value in found.items() if name not in STEPS}, own: config.grpo.steps_of(stage),
        **train_data(config), **validation_key(config), **difficulty_key(config), "base": base_identity(config),
        "adapter": None if start is None else fingerprint(start),
    }  # fmt: skip


def _train(config: Config, stage: str, folder: Path, start: Path | None, max_steps: int) -> None:
    with distributed.rank_zero_first():
        prompts = prompts_of(config, "train")
        prompts = choose(config, stage, folder, prompts, is_writing=distributed.is_rank_zero())
        if distributed.is_rank_zero():
            say_windows(stage, prompts, config.reward.truth)
    distributed.on_rank_zero(lambda: refuse_what_cannot_fit(config))  # the trace takes seconds of every core

    def make_module(setup: Setup) -> GrpoModule:
        rubric = Rubric(config.reward, config.anchors)
        return GrpoModule(
            setup.policy, rubric, config.grpo, config.anchors, setup.run, setup.tracker, setup.checkpoint,
            setup.validation,
        )  # fmt: skip

    def make_steps(start_step: int) -> StepDataset:
        share = (distributed.rank(), distributed.world_size())
        return StepDataset(
            prompts, config.grpo.prompts_per_step, config.seed, start_step, max_steps, share, config.dataset.parts
        )

    train_stage(
        config, stage, folder, max_steps, start, make_module, make_steps,
        inputs=[] if start is None else [(f"{start.parent.name}-adapter", "adapter", start)],
        outputs=[(f"{stage}-rollouts", "rollouts", folder / "rollouts.jsonl")],
    )  # fmt: skip
