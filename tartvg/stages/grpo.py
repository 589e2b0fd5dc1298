"""grpo1 and grpo2: reinforcement learning from the base, and from the fine-tuned policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tartvg.config import Config, GrpoConfig, require
from tartvg.policy.torch_setup import set_up_torch
from tartvg.rewards import Rubric
from tartvg.stages.common import adapter_of, base_identity, prompts_of
from tartvg.stages.folder import StageFolder, fingerprint, run_dir
from tartvg.stages.memory import refuse_what_cannot_fit
from tartvg.stages.train import Setup, train_stage
from tartvg.stages.validation import validation_key
from tartvg.training import distributed
from tartvg.training.batches import StepDataset
from tartvg.training.grpo_module import GrpoModule


def start_adapter(config: Config, stage: str) -> Path | None:
    """Where a stage starts: `init_adapter` if set, else the base for grpo1 and the sft adapter for grpo2."""
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
    count, per_step = distributed.world_size(), config.grpo.prompts_per_step
    require(per_step % count == 0, "grpo.prompts_per_step", f"a multiple of the {count} processes", per_step)
    start = start_adapter(config, stage)
    max_steps = config.grpo.steps_of(stage)
    # The filter and the other stage's steps are no part of this stage: what differs in them shares its result.
    key = {
        "policy": config.policy, "dataset": config.dataset, "anchors": config.anchors,
        "reward": config.reward, "grpo": own_settings(config.grpo), "max_steps": max_steps, "seed": config.seed,
        "base": base_identity(config),
        "adapter": None if start is None else fingerprint(start), "threads": config.trainer.num_threads,
        **validation_key(config),
    }  # fmt: skip
    place = StageFolder(run_dir(config) / stage, config, key)
    with place.work() as is_needed:
        if is_needed:
            _train(config, stage, place.folder, start, max_steps)


def own_settings(settings: GrpoConfig) -> GrpoConfig:
    """The settings that a stage's result depends on, without the number of steps, which each stage has of its own."""
    return replace(settings, max_steps=1, max_steps_grpo2=None, rows_per_pass=None)


def _train(config: Config, stage: str, folder: Path, start: Path | None, max_steps: int) -> None:
    with distributed.rank_zero_first():
        prompts = prompts_of(config, "train")
    distributed.on_rank_zero(lambda: refuse_what_cannot_fit(config))  # the trace takes seconds of every core

    def make_module(setup: Setup) -> GrpoModule:
        rubric = Rubric(config.reward, config.anchors)
        return GrpoModule(
            setup.policy, rubric, config.grpo, config.anchors, setup.run, setup.tracker, setup.checkpoint,
            setup.validation,
        )  # fmt: skip

    def make_steps(start_step: int) -> StepDataset:
        share = (distributed.rank(), distributed.world_size())
        return StepDataset(prompts, config.grpo.prompts_per_step, config.seed, start_step, max_steps, share)

    train_stage(
        config, stage, folder, max_steps, start, make_module, make_steps,
        inputs=[] if start is None else [(f"{start.parent.name}-adapter", "adapter", start)],
        outputs=[(f"{stage}-rollouts", "rollouts", folder / "rollouts.jsonl")],
    )  # fmt: skip
