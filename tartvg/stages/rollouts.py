"""rollouts: what grpo1 would draw if it never learned. The untouched base answers the prompts of grpo1's steps.

Its rollouts feed the filter where SFT is to come before any reinforcement learning (filter.source=rollouts).
"""

from __future__ import annotations

from pathlib import Path

import torch

from tartvg.config import Config
from tartvg.grpo.metrics import rollout_metrics
from tartvg.policy.loading import checked_base
from tartvg.policy.torch_setup import set_up_torch
from tartvg.records import read_jsonl, to_json
from tartvg.rewards import Rubric
from tartvg.stages.common import base_identity, keep_before, load_policy, prompts_of
from tartvg.stages.folder import StageFolder, run_dir
from tartvg.tracking import Tracker
from tartvg.training.batches import StepDataset
from tartvg.training.grpo_module import GrpoModule
from tartvg.training.prefetch import StepLoader
from tartvg.training.step import StageRun

STAGE = "rollouts"


def run_rollouts(config: Config) -> None:
    """Write `<run>/rollouts/rollouts.jsonl` and its metrics; interrupted, it goes on with the next step."""
    set_up_torch(config.trainer)
    checked_base(config.policy)
    max_steps, settings = config.grpo.max_steps, config.grpo
    key = {
        "policy": config.policy, "dataset": config.dataset, "reward": config.reward, "prompt": config.anchors.prompt,
        "target": config.anchors.count, "cap": config.anchors.max_count, "group_size": settings.group_size,
        "prompts_per_step": settings.prompts_per_step, "sampling": settings.sampling,
        "at_once": settings.sampling_batch_size, "max_steps": max_steps,
        "seed": config.seed, "base": base_identity(config), "threads": config.trainer.num_threads,
    }  # fmt: skip
    place = StageFolder(run_dir(config) / STAGE, config, key)
    with place.work() as is_needed:
        if is_needed:
            _draw(config, place.folder, max_steps)


def _draw(config: Config, folder: Path, max_steps: int) -> None:
    prompts = prompts_of(config, "train")
    run = StageRun(STAGE, folder, config.seed, max_steps, config.trainer.checkpoint_every)
    start = _finished_steps(folder / "metrics.jsonl")
    keep_before(folder / "rollouts.jsonl", start)
    tracker = Tracker(folder, config.tracking, config.name, STAGE, to_json(config), config.seed, start)
    rubric = Rubric(config.reward, config.anchors)
    module = GrpoModule(load_policy(config, None), rubric, config.grpo, config.anchors, run, tracker)
    steps = StepDataset(prompts, config.grpo.prompts_per_step, config.seed, start, max_steps)
    with tracker, torch.no_grad():
        for batch in StepLoader(steps, module.policy, config.trainer.num_workers):
            groups = [group for _, _, group in module.sample_and_score(module.prepare(batch), batch.step)]
            module.record(groups, batch.step)
            tracker.log(rollout_metrics(groups, config.anchors.count) | module.policy.timer.flush(), batch.step)
            if config.trainer.progress_bar:
                print(f"rollouts: step {batch.step + 1} of {max_steps}", end="\r", flush=True)
        tracker.artifact(f"{STAGE}-rollouts", "rollouts", folder / "rollouts.jsonl")


def _finished_steps(path: Path) -> int:
    """Steps whose metrics are written: a step's rollouts are written before them."""
    return sum(1 for _ in read_jsonl(path, is_partial_allowed=True)) if path.is_file() else 0
