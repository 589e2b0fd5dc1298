"""What the training stages grpo1, sft and grpo2 share: from the last checkpoint to the adapter that is the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tartvg.config import Config
from tartvg.policy.policy import Policy
from tartvg.records import to_json
from tartvg.stages.common import keep_before, load_policy
from tartvg.stages.memory import fits_whole
from tartvg.stages.validation import validation_of
from tartvg.tracking import Tracker
from tartvg.training import distributed
from tartvg.training.checkpoint import Checkpoint, latest_checkpoint
from tartvg.training.faults import FAULTS
from tartvg.training.prefetch import StepLoader, Steps
from tartvg.training.step import StageRun, StepModule
from tartvg.training.trainer import make_trainer
from tartvg.training.validation import Validation

Artifact = tuple[str, str, Path]
"""Name, type and place of what a stage reads or writes, for W&B."""


@dataclass(frozen=True)
class Setup:
    """What a module is built from."""

    policy: Policy
    run: StageRun
    tracker: Tracker
    checkpoint: Checkpoint | None
    validation: Validation | None


def train_stage(
    config: Config,
    stage: str,
    folder: Path,
    max_steps: int,
    adapter: Path | None,
    make_module: Callable[[Setup], StepModule],
    make_steps: Callable[[int], Steps[Any]],
    inputs: Iterable[Artifact] = (),
    outputs: Iterable[Artifact] = (),
) -> None:
    """Train one stage in `folder`, from its last checkpoint if there is one, and write `folder/adapter`.

    `adapter` is where the policy starts (None: the base). `make_steps` gets the step to start from.
    """
    checkpoint = find_checkpoint(folder)
    start_step = 0 if checkpoint is None else checkpoint.step
    is_rank_zero = distributed.is_rank_zero()
    tracker = Tracker(
        folder, config.tracking, config.name, stage, to_json(config), config.seed, start_step, is_active=is_rank_zero
    )
    run = StageRun(
        stage, folder, config.seed, max_steps, config.trainer, config.monitors, config.faithfulness,
        config.anchors.count, config.grpo.rows_per_pass,
    )  # fmt: skip
    validation = validation_of(config, folder, max_steps)
    policy = load_policy(config, adapter, is_trained=True)
    policy.fits_whole = fits_whole(config)
    module = make_module(Setup(policy, run, tracker, checkpoint, validation))
    if is_rank_zero:
        keep_before(folder / "rollouts.jsonl", start_step)
        keep_before(folder / FAULTS, start_step)
    with tracker, module.stop.around_training():
        for artifact in inputs:
            tracker.uses(*artifact)
        if start_step < max_steps:
            trainer = make_trainer(config.trainer, folder, module.settings.max_grad_norm)
            trainer.fit(module, StepLoader(make_steps(start_step), policy, config.trainer.num_workers))
        module.save_result()
        for artifact in ((f"{stage}-adapter", "adapter", folder / "adapter"), *outputs):
            tracker.artifact(*artifact)


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """Find the newest sound checkpoint of a stage. Raises RuntimeError where ranks find different ones."""
    found = latest_checkpoint(folder / "checkpoints")
    step = 0 if found is None else found.step
    if distributed.all_reduce_max(step, -step) != [step, -step]:
        raise RuntimeError(f"the processes find different checkpoints in {folder}: do they share that folder?")
    return found
