"""grpo1 and grpo2: reinforcement learning from the base, and from the fine-tuned policy."""

from __future__ import annotations

from pathlib import Path

from tartvg.config import Config
from tartvg.policy.loading import save_adapter
from tartvg.records import read_jsonl, to_json, write_jsonl
from tartvg.rewards import Rubric
from tartvg.stages.common import adapter_of, base_identity, load_policy, prompts_of, set_up
from tartvg.stages.folder import StageFolder, fingerprint, run_dir
from tartvg.tracking import Tracker
from tartvg.training.grpo_module import GrpoModule
from tartvg.training.loop import StageRun, make_trainer
from tartvg.training.plan import StepDataset, step_loader


def start_adapter(config: Config, stage: str) -> Path | None:
    """Where a stage starts: `init_adapter` if set, else the base for grpo1 and the sft adapter for grpo2."""
    if config.init_adapter is not None:
        return adapter_of(config, config.init_adapter)
    return adapter_of(config, "sft") if stage == "grpo2" else None


def run_grpo(config: Config, stage: str) -> None:
    """Train one GRPO stage into `<run>/<stage>/`: adapter, rollouts.jsonl, metrics.jsonl, checkpoints."""
    set_up(config)
    start = start_adapter(config, stage)
    max_steps = (stage == "grpo2" and config.grpo.grpo2_max_steps) or config.grpo.max_steps
    key = {
        "policy": config.policy, "dataset": config.dataset, "anchors": config.anchors, "reward": config.reward,
        "grpo": config.grpo, "max_steps": max_steps, "seed": config.seed, "base": base_identity(config),
        "adapter": None if start is None else fingerprint(start), "threads": config.trainer.num_threads,
    }  # fmt: skip
    place = StageFolder(run_dir(config) / stage, config, key)
    with place.work() as is_needed:
        if is_needed:
            _train(config, stage, place.folder, start, max_steps)


def _train(config: Config, stage: str, folder: Path, start: Path | None, max_steps: int) -> None:
    prompts = prompts_of(config, "train")
    policy = load_policy(config, start)
    run = StageRun(stage, folder, config.seed, max_steps, config.trainer.checkpoint_every)
    rubric = Rubric(config.reward, config.anchors)
    tracker = Tracker(folder, config.tracking, config.name, stage, to_json(config), config.seed)
    module = GrpoModule(policy, rubric, config.grpo, config.anchors, run, tracker)
    tracker.resume_at(module.start_step)
    keep_before(folder / "rollouts.jsonl", module.start_step)
    frames = config.policy.frames if config.trainer.num_workers else None
    steps = StepDataset(prompts, config.grpo.prompts_per_step, config.seed, module.start_step, max_steps, frames)
    with tracker:
        if len(steps):
            make_trainer(config.trainer, folder).fit(module, step_loader(steps, config.trainer.num_workers))
        save_adapter(policy.model, folder / "adapter", config.policy.path)
        tracker.artifact(f"{stage}-adapter", "adapter", folder / "adapter")
        tracker.artifact(f"{stage}-rollouts", "rollouts", folder / "rollouts.jsonl")


def keep_before(path: Path, step: int) -> None:
    """Drop the rollouts of steps that a resumed stage is about to draw again."""
    if path.is_file():
        rows = read_jsonl(path, is_partial_allowed=True)
        write_jsonl(path, [row for row in rows if row["step"] < step])
