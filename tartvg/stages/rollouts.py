"""rollouts: what grpo1 would draw if it never learned. The untouched base answers the prompts of grpo1's steps.

Its rollouts feed the filter where SFT is to come before any reinforcement learning (filter.source=rollouts). They also
say how hard each query is: difficulty.jsonl is what `difficulty` selects by, and with difficulty.passes every training
query is asked so many times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tartvg.config import Config
from tartvg.grpo.metrics import rollout_metrics
from tartvg.policy.loading import checked_base
from tartvg.policy.torch_setup import set_up_torch
from tartvg.records import read_jsonl, to_json
from tartvg.rewards import Rubric
from tartvg.stages.common import base_identity, keep_before, load_policy, prompts_of, say_windows, train_data
from tartvg.stages.difficulty import write_difficulties
from tartvg.stages.folder import StageFolder, run_dir
from tartvg.stages.keys import settings_of
from tartvg.tracking import Tracker
from tartvg.training.batches import StepDataset
from tartvg.training.grpo_module import GrpoModule
from tartvg.training.prefetch import StepLoader
from tartvg.training.step import StageRun

STAGE = "rollouts"


def run_rollouts(config: Config) -> None:
    """Write rollouts, difficulties and metrics into `<run>/rollouts/`; interrupted, it goes on with the next step."""
    set_up_torch(config.trainer)
    checked_base(config.policy)
    output = StageFolder(run_dir(config) / STAGE, config, lambda: key_of(config))
    with output.work() as is_needed:
        if is_needed:
            _draw(config, output.folder)
            write_difficulties(output.folder)


def key_of(config: Config) -> dict[str, Any]:
    """What the rollouts depend on: nothing that concerns learning."""
    order = ["difficulty.passes"] if config.difficulty.passes else ["grpo.max_steps", "dataset.parts"]
    found = settings_of(
        config, "policy", "anchors", "reward", "grpo.group_size", "grpo.prompts_per_step", "grpo.sampling",
        "grpo.sampling_batch_size", *order, "seed",
    )  # fmt: skip
    return {**found, **train_data(config), "base": base_identity(config)}


def _draw(config: Config, folder: Path) -> None:
    prompts, passes = prompts_of(config, "train"), config.difficulty.passes
    per_step = config.grpo.prompts_per_step
    max_steps = -(-passes * len(prompts) // per_step) if passes else config.grpo.max_steps
    weights = {} if passes else config.dataset.parts
    say_windows(STAGE, prompts, config.reward.truth)
    run = StageRun(STAGE, folder, config.seed, max_steps, config.trainer)
    start = _finished_steps(folder / "metrics.jsonl")
    keep_before(folder / "rollouts.jsonl", start)
    tracker = Tracker(folder, config.tracking, config.name, STAGE, to_json(config), config.seed, start)
    rubric = Rubric(config.reward, config.anchors)
    module = GrpoModule(load_policy(config, None), rubric, config.grpo, config.anchors, run, tracker)
    steps = StepDataset(prompts, per_step, config.seed, start, max_steps, weights=weights)
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
