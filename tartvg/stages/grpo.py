"""grpo1 and grpo2: reinforcement learning from the base, and from the fine-tuned policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tartvg.config import Config, FilterConfig, GrpoConfig, require
from tartvg.policy.torch_setup import set_up_torch
from tartvg.records import to_json
from tartvg.rewards import Rubric
from tartvg.stages.choice import selection_key, selection_of
from tartvg.stages.common import adapter_of, base_identity, clip_reader, keep_before, load_policy, prompts_of
from tartvg.stages.folder import StageFolder, fingerprint, run_dir
from tartvg.stages.memory import refuse_what_cannot_fit
from tartvg.tracking import Tracker
from tartvg.training import distributed
from tartvg.training.batches import StepDataset, step_loader
from tartvg.training.faults import FAULTS
from tartvg.training.grpo_module import GrpoModule
from tartvg.training.step import StageRun
from tartvg.training.trainer import make_trainer


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
        "policy": config.policy, "dataset": config.dataset, "anchors": replace(config.anchors, filter=FilterConfig()),
        "reward": config.reward, "grpo": own_settings(config.grpo), "max_steps": max_steps, "seed": config.seed,
        "base": base_identity(config),
        "adapter": None if start is None else fingerprint(start), "threads": config.trainer.num_threads,
        **selection_key(config),
    }  # fmt: skip
    place = StageFolder(run_dir(config) / stage, config, key)
    with place.work() as is_needed:
        if is_needed:
            _train(config, stage, place.folder, start, max_steps)


def own_settings(settings: GrpoConfig) -> GrpoConfig:
    """The settings without the number of steps, which each stage works out for itself."""
    return replace(settings, max_steps=1, grpo2_max_steps=None, whole_budget=False, rollouts_per_step=None)


def _train(config: Config, stage: str, folder: Path, start: Path | None, max_steps: int) -> None:
    with distributed.rank_zero_first():
        prompts = prompts_of(config, "train")
    refuse_what_cannot_fit(config)
    policy = load_policy(config, start, is_trained=True)
    run = StageRun.from_config(
        config.trainer, stage, folder, config.seed, max_steps, config.monitors, config.anchors.target
    )
    rubric = Rubric(config.reward, config.anchors)
    is_rank_zero = distributed.is_rank_zero()
    tracker = Tracker(folder, config.tracking, config.name, stage, to_json(config), config.seed, is_active=is_rank_zero)
    module = GrpoModule(policy, rubric, config.grpo, config.anchors, run, tracker)
    module.selection = selection_of(config, folder, max_steps)
    tracker.resume_at(module.start_step)
    if is_rank_zero:
        keep_before(folder / "rollouts.jsonl", module.start_step)
        keep_before(folder / FAULTS, module.start_step)
    frames = config.policy.frames if config.trainer.num_workers else None
    share = (distributed.rank(), distributed.world_size())
    steps = StepDataset(
        prompts, config.grpo.prompts_per_step, config.seed, module.start_step, max_steps, frames, clip_reader(config),
        share,
    )  # fmt: skip
    with tracker, module.preemptible():
        if start is not None:
            tracker.uses(f"{start.parent.name}-adapter", "adapter", start)
        if len(steps):
            trainer = make_trainer(config.trainer, folder, config.grpo.max_grad_norm)
            trainer.fit(module, step_loader(steps, config.trainer.num_workers))
        module.save_result()
        tracker.artifact(f"{stage}-adapter", "adapter", folder / "adapter")
        tracker.artifact(f"{stage}-rollouts", "rollouts", folder / "rollouts.jsonl")
