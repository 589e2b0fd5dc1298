"""What a GRPO step and an SFT step share: seed, learning rate, validation, log, alarms, checkpoint, stop."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import pytorch_lightning as pl
import torch

from tartvg.config import (
    FaithfulnessConfig,
    GrpoConfig,
    LrDecay,
    MonitorsConfig,
    SftConfig,
    StageStopped,
    Strategy,
    TrainerConfig,
)
from tartvg.grpo import LossOutput
from tartvg.launch.signals import PREEMPTION
from tartvg.monitors import Watch
from tartvg.policy.loading import save_adapter
from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch
from tartvg.policy.sampling import stream_seed
from tartvg.records import dumps, flush_to_disk
from tartvg.tracking import Tracker
from tartvg.training import distributed
from tartvg.training.checkpoint import Checkpoint, adapter_weights, restore_adapter, save_checkpoint
from tartvg.training.deepspeed import ZeroEngine
from tartvg.training.engine import Engine
from tartvg.training.faults import Faults, finite
from tartvg.training.preemption import Stop
from tartvg.training.throughput import Throughput
from tartvg.training.update import GroupLoss, LocalUpdate, Update, UpdateResult
from tartvg.training.validation import Validation
from tartvg.training.zero3 import LockstepUpdate, Zero3Engine

HEADLINES = {"reward": "reward/total_mean", "valid": "anchors/valid_rate", "loss": "loss/total"}
"""Metrics that the progress bar shows."""
ENGINES: dict[Strategy, type[Engine]] = {
    Strategy.single: Engine,
    Strategy.ddp: Engine,
    Strategy.zero2: ZeroEngine,
    Strategy.zero3: Zero3Engine,
    Strategy.zero3_offload: Zero3Engine,
}
T = TypeVar("T")


@dataclass(frozen=True)
class StageRun:
    """Where a training stage writes, how long it runs, and the seed of its randomness."""

    stage: str
    folder: Path
    seed: int
    max_steps: int
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    monitors: MonitorsConfig = field(default_factory=MonitorsConfig)
    faithfulness: FaithfulnessConfig = field(default_factory=FaithfulnessConfig)
    num_anchors: int = 2
    """K, the number of anchors that the monitors compare with."""
    rows_per_pass: int | None = None


def learning_rate_share(settings: GrpoConfig | SftConfig, step: int, max_steps: int) -> float:
    """Factor of `lr` at a step: a linear warm-up, then constant or linearly down to 1 / max_steps."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    return warmup * (1 - step / max_steps) if settings.lr_decay is LrDecay.linear else warmup


class StepModule(pl.LightningModule):
    """A policy trained by whole steps: `on_train_batch_start` collects, `training_step` learns from it.

    Everything without gradient comes first, outside `training_step`: DeepSpeed's forward hooks wrap that method, and
    under ZeRO-3 the parameters cannot be gathered inside it. `checkpoint` is the state to continue from.
    """

    def __init__(
        self, policy: Policy, settings: GrpoConfig | SftConfig, run: StageRun, tracker: Tracker,
        checkpoint: Checkpoint | None = None, validation: Validation | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.settings = settings
        self.run = run
        self.tracker = tracker
        self.validation = validation
        self.start_step = 0 if checkpoint is None else checkpoint.step
        self.watch = Watch(run.monitors, run.num_anchors)
        num_weights = sum(p.numel() for p in policy.language_model.parameters())
        self.throughput = Throughput(num_weights, policy.device)
        self.faults = Faults(run.folder, run.trainer.max_skipped_steps, is_active=distributed.is_rank_zero())
        self.stop = Stop(run.stage, self.save)
        named = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        self.engine = ENGINES[run.trainer.strategy](self, named)
        self.update = self._make_update()
        self.trained: dict[str, torch.Tensor] | None = None
        """Adapter weights at the end of training, complete on every rank."""
        self.step_metrics: dict[str, float] = {}
        """Of the step under way, from before the update."""
        self.headline: dict[str, float] = {}
        self._optimizer_state: dict[str, Any] | None = None
        self._saved_at = time.monotonic()
        if checkpoint is not None:
            self._optimizer_state = checkpoint.optimizer
            self.faults.in_row = checkpoint.counters.get("skipped_in_row", 0)
            restore_adapter(policy.model, checkpoint.weights)
        policy.train()  # a Hugging Face model arrives in eval mode, and fit() leaves it there

    def _make_update(self) -> Update:
        max_norm, rows = self.settings.max_grad_norm, self.run.rows_per_pass
        if isinstance(self.engine, Zero3Engine):
            return LockstepUpdate(self.engine, self.stop, self.policy, max_norm, rows)
        return LocalUpdate(self.engine, self.stop, self.faults, max_norm, rows)

    # -- called by Lightning -------------------------------------------------------------------------------------------

    def cpu(self) -> Self:
        """Stay: at the end of `fit` Lightning would copy the whole base to main memory, on every rank."""
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the adapter."""
        return torch.optim.AdamW(self.engine.parameters, lr=self.settings.lr, weight_decay=0.0)

    def on_train_start(self) -> None:
        """Restore what exists only now: the strategy's optimiser, and the metrics before this step."""
        self.watch.replay(self.tracker.history())
        if self._optimizer_state is not None:
            self.engine.load_optimizer_state(self._optimizer_state)
            self._optimizer_state = None
        self.stop.begin_training(self.start_step)

    def on_train_end(self) -> None:
        """Validate and take the weights while the strategy still has them."""
        self.validate(self.run.max_steps)
        self.trained = self.engine.weights()

    # -- the parts of a step -------------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Validate when due; seed; set the learning rate. A step's randomness depends on seed, stage and step only."""
        self.stop.check()
        self.throughput.begin()
        self.step_metrics = self.validate(step)
        ranks = [f"process {distributed.rank()}"] if distributed.rank() else []  # dropout differs between ranks
        torch.manual_seed(stream_seed(self.run.seed, self.run.stage, step, *ranks))
        for group in self._raw_optimizer().param_groups:
            group["lr"] = self.settings.lr * learning_rate_share(self.settings, step, self.run.max_steps)

    def without_gradient(self, work: Callable[[], T]) -> T:
        """Run work with all parameters gathered; a signal ends it at once and raises Preempted on all ranks."""
        with self.engine.gathered_parameters() if self.is_fitting else nullcontext():
            found = self.stop.interruptible(work)
        self.stop.check()
        assert found is not None
        return found

    def as_group_loss(
        self, prepared: PreparedPrompt, tokens: TokenBatch, compute: Callable[[slice], LossOutput]
    ) -> GroupLoss:
        """Describe the loss of one prompt and its completions to `update`."""
        self.throughput.num_trained += prepared.inputs.length + int(tokens.mask.sum())
        return GroupLoss(prepared.prompt.sample.sample_id, len(tokens.ids), int(tokens.mask.sum()), compute)

    def skip(self, step: int, is_fault: bool) -> dict[str, float]:
        """Metrics of a step without an update, on every rank. Raises SettingError after too many faults in a row."""
        if is_fault:
            self.faults.empty(step)
        return {"optim/skipped": 1.0}

    def check_update(
        self, step: int, result: UpdateResult, offending_groups: Callable[[UpdateResult], list[dict[str, Any]]]
    ) -> dict[str, float]:
        """Metrics of an update; one that was not finite is counted, and its groups are written down.

        `offending_groups` describes what this rank trained on, each with its `loss`. Recorded are the groups whose loss
        is not finite, or all of them where only the gradient is not. Raises SettingError after too many in a row.
        """
        metrics = {"optim/grad_norm": result.grad_norm}
        if result.is_taken:
            self.faults.passed()
            return metrics
        lines = distributed.all_gather_lines([dumps(finite(row)) for row in offending_groups(result)])
        rows = [json.loads(line) for line in lines]
        self.faults.skipped(step, result.grad_norm, [row for row in rows if row["loss"] is None] or rows)
        return metrics | {"optim/skipped": 1.0}

    def end(self, step: int, metrics: dict[str, float]) -> None:
        """Log; save where a checkpoint is due or a rank was asked to stop. Raises Preempted and StageStopped."""
        self.faults.share()
        metrics = metrics | self.step_metrics
        times = self.policy.timer.flush()
        times = dict(zip(times, distributed.all_reduce_max(*times.values()), strict=True))
        metrics |= times | self.throughput.metrics(times)
        metrics["optim/lr"] = self._raw_optimizer().param_groups[0]["lr"]
        self.headline = {label: metrics[name] for label, name in HEADLINES.items() if name in metrics}
        self.tracker.log(metrics, step)
        alarms = self.watch.see(metrics, step)
        self.tracker.alarms(alarms)
        done = step + 1
        self.stop.end_step(done)
        is_last = done == self.run.max_steps
        is_overdue = time.monotonic() - self._saved_at >= 60 * self.run.trainer.checkpoint_minutes
        is_asked = self.stop.is_asked()
        if is_asked or is_last or done % self.run.trainer.checkpoint_every == 0 or distributed.any_rank(is_overdue):
            self.save()
        fatal = self.watch.stops(alarms)
        if not is_last and distributed.any_rank(bool(fatal)):
            if self.stop.saved_step != done:  # or the same command would come to the same alarm again
                self.save()
            why = "; ".join(f"{alarm.monitor}, {alarm.text}" for alarm in fatal[:1])
            raise StageStopped(f"{self.run.stage} by monitors.stop: {why}")
        if is_asked:
            PREEMPTION.release(is_leaving=True)

    # -- validation, checkpoints and the result ------------------------------------------------------------------------

    @property
    def is_fitting(self) -> bool:
        """Whether the strategy holds the weights; it never does where no step is left to do."""
        return self.stop.finished_steps is not None and self.trained is None

    def validate(self, step: int) -> dict[str, float]:
        """Metrics of the policy after so many steps, where validation is due."""
        validation = self.validation
        if validation is None or not validation.is_due(step):
            return {}
        if step not in validation.rows:
            row = validation.row(step, self.without_gradient(lambda: validation.answers(self.policy)))
            weights = self.engine.weights() if self.is_fitting else None
            validation.keep(row, lambda folder: self._save_adapter(folder, weights))
        metrics = validation.known(step)
        if step == self.run.max_steps:  # no step follows that would log them
            self.tracker.log(metrics, step)
        return metrics

    def save(self) -> None:
        """Write a checkpoint of the finished steps: on rank 0, from what all ranks hold."""
        assert self.stop.finished_steps is not None
        weights = adapter_weights(self.policy.model, self.engine.weights())
        state = self.engine.optimizer_state()
        if distributed.is_rank_zero():
            # A checkpoint is continued, not compared: the logs before it must be on the disk first.
            for log in (path for path in self.run.folder.glob("*.jsonl") if path.is_file()):
                flush_to_disk(log)
            counters = {"skipped_in_row": self.faults.in_row}
            folder, kept = self.run.folder / "checkpoints", self.run.trainer.checkpoints_kept
            save_checkpoint(folder, self.stop.finished_steps, weights, state, counters, kept)
        self.stop.saved()
        self._saved_at = time.monotonic()

    def save_result(self) -> None:
        """Write the stage's adapter, after training or where no step was left to do."""
        if self.trained is None:
            self.validate(self.run.max_steps)
        if not distributed.is_rank_zero():
            return
        folder = self.run.folder / "adapter"
        best = None if self.validation is None else self.validation.chosen()
        if best is None:
            self._save_adapter(folder, self.trained)
        else:
            shutil.copytree(best, folder, dirs_exist_ok=True)

    def _save_adapter(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        save_adapter(self.policy.model, folder, self.policy.settings.path, weights)

    def _raw_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizers()
        return optimizer.optimizer
