"""What both kinds of training share: optimiser, learning rate, updates, checkpoints, and faults."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tartvg.config import GrpoConfig, LrDecay, MonitorsConfig, SftConfig, StageStopped, Strategy, TrainerConfig
from tartvg.launch.signals import AGAIN_CODE, PREEMPTION
from tartvg.monitors import Watch
from tartvg.policy.loading import save_adapter
from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch, stream_seed
from tartvg.records import dumps, flush_to_disk
from tartvg.tracking import Tracker
from tartvg.training import distributed
from tartvg.training.checkpoint import KEPT, adapter_weights, latest_checkpoint, restore_adapter, save_checkpoint
from tartvg.training.engine import ENGINES
from tartvg.training.faults import Faults, finite
from tartvg.training.out_of_memory import GroupLoss, LossOfRows, NothingFits, fit_update, is_out_of_memory, row_slices
from tartvg.training.preemption import InterruptibleModule, T
from tartvg.training.retreats import Retreats
from tartvg.training.validation import Selection

HEADLINES = {"reward": "reward/total_mean", "valid": "anchors/valid_rate", "loss": "loss/total"}


@dataclass(frozen=True)
class StageRun:
    """Where a training stage works and how it names its randomness."""

    stage: str
    folder: Path
    seed: int
    max_steps: int
    checkpoint_every: int
    checkpoint_minutes: float = math.inf
    """A checkpoint also after this time without one."""
    checkpoints_kept: int = KEPT
    max_skipped_steps: int = 5
    monitors: MonitorsConfig = field(default_factory=MonitorsConfig)
    target: int = 2
    """K, the number of anchors that the monitors compare with."""
    strategy: Strategy = Strategy.single

    @classmethod
    def from_config(
        cls, settings: TrainerConfig, stage: str, folder: Path, seed: int, max_steps: int, monitors: MonitorsConfig,
        target: int = 2,
    ) -> StageRun:  # fmt: skip
        """With the trainer's slice of the settings."""
        return cls(
            stage, folder, seed, max_steps, settings.checkpoint_every, settings.checkpoint_minutes,
            settings.checkpoints_kept, settings.max_skipped_steps, monitors, target, settings.strategy,
        )  # fmt: skip


def learning_rate_share(settings: GrpoConfig | SftConfig, step: int, max_steps: int) -> float:
    """What part of `lr` a step takes: a linear warm-up, then constant or linearly down to 1 / max_steps."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    return warmup * (1 - step / max_steps) if settings.lr_decay is LrDecay.linear else warmup


class StepModule(InterruptibleModule):
    """A policy trained by whole steps: each `training_step` ends with an optimiser step and, at times, a checkpoint."""

    def __init__(self, policy: Policy, settings: GrpoConfig | SftConfig, run: StageRun, tracker: Tracker) -> None:
        super().__init__(run.stage, run.strategy)
        self.automatic_optimization = False
        self.policy = policy
        self.settings = settings
        self.run = run
        self.tracker = tracker
        self.watch = Watch(run.monitors, run.target)
        self.engine = ENGINES[run.strategy](self, self._named())
        self.trained: dict[str, Tensor] | None = None
        """The adapter's weights at the end of training, complete on every process."""
        self.selection: Selection | None = None
        self.asked: dict[str, float] = {}
        """What `selection` found before this step."""
        self._resumed: dict[str, Any] | None = None
        self.start_step = 0
        self.headline: dict[str, float] = {}
        """What the progress bar shows of the last step."""
        self.faults = Faults(run.folder, run.max_skipped_steps, is_active=distributed.is_rank_zero())
        self.retreats = Retreats(run.folder)
        self.found_bad = False
        """Whether the last update was left out, because its loss or gradient was not finite."""
        self._saved_at = time.monotonic()
        found = latest_checkpoint(run.folder / "checkpoints")
        if found is not None:
            self.start_step, self._resumed = found.step, found.optimizer
            self.faults.in_row = found.counters.get("skipped_in_row", 0)
            restore_adapter(policy.model, found.weights)
        if distributed.all_reduce_max(self.start_step, -self.start_step) != [self.start_step, -self.start_step]:
            raise RuntimeError(f"the processes find different checkpoints in {run.folder}: do they share that folder?")
        policy.train()  # a Hugging Face model arrives in eval mode, and fit() leaves it there

    def _named(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad}

    def trainable(self) -> list[torch.nn.Parameter]:
        """The adapter's weights."""
        return list(self._named().values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the adapter."""
        return torch.optim.AdamW(self.trainable(), lr=self.settings.lr, weight_decay=self.settings.weight_decay)

    def on_train_start(self) -> None:
        """The strategy's parts exist only now, and the lines before the start are the tracker's to cut."""
        self.watch.replay(self.tracker.history())
        if self._resumed is not None:
            self.engine.load_optimizer_state(self._resumed)
            self._resumed = None
        self.begin_training(self.start_step)

    def on_train_end(self) -> None:
        """The strategy gives up its parts after this."""
        self.ask_at(self.run.max_steps)
        self.trained = self.engine.weights()

    def ask_at(self, step: int) -> dict[str, float]:
        """What the policy answers after so many steps, where that is due; its metrics. Not inside `training_step`."""
        selection = self.selection
        if selection is None or not selection.is_due(step):
            return {}
        if step not in selection.rows:
            answers = self.with_whole_weights(lambda: selection.answers(self.policy, self.is_survivable))
            row = selection.row(step, answers)
            weights = self.engine.weights() if self.is_held else None
            selection.keep(row, lambda folder: self._save_adapter(folder, weights))
        metrics = selection.known(step)
        if step == self.run.max_steps:  # no step follows that would log them
            self.tracker.log(metrics, step)
        return metrics

    @property
    def is_held(self) -> bool:
        """Whether the strategy holds the weights; it does not where no step was left to do."""
        return self.finished_steps is not None

    def with_whole_weights(self, work: Callable[[], T]) -> T:
        """The result of work without gradient, in which no process waits for another. Not inside `training_step`.

        Raises Preempted on all processes where one was asked to leave.
        """
        with self.engine.whole() if self.is_held else nullcontext():
            found = self.until_signal(work)
        self.leave_if_asked()
        assert found is not None
        return found

    def save_result(self) -> None:
        """Write the adapter that is the stage's result, after the training or where no step of it was left to do."""
        if self.trained is None:
            self.ask_at(self.run.max_steps)
        if not distributed.is_rank_zero():
            return
        folder = self.run.folder / "adapter"
        chosen = self.selection.chosen() if self.selection is not None else None
        if chosen is None:
            self._save_adapter(folder, self.trained)
        else:
            shutil.copytree(chosen, folder, dirs_exist_ok=True)

    def _save_adapter(self, folder: Path, weights: dict[str, Tensor] | None) -> None:
        save_adapter(self.policy.model, folder, self.policy.settings.path, weights)

    def is_survivable(self, error: BaseException) -> bool:
        """Whether memory ran out before the optimiser's step, from which there is no second try.

        A process that trains alone holds signals from there on; processes that leave together always do, and what they
        try again ends before the step.
        """
        return is_out_of_memory(error) and (self.leaves_together or not PREEMPTION.is_held)

    def _raw_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizers()
        return optimizer.optimizer

    def begin_step(self, step: int) -> None:
        """Everything random in a step depends on seed, stage and step only. Not inside `training_step`."""
        self.asked = self.ask_at(step)
        others = [f"process {distributed.rank()}"] if distributed.rank() else []  # dropout differs between processes
        torch.manual_seed(stream_seed(self.run.seed, self.run.stage, step, *others))
        for group in self._raw_optimizer().param_groups:
            group["lr"] = self.settings.lr * learning_rate_share(self.settings, step, self.run.max_steps)

    def fitting_update(self, groups: Sequence[GroupLoss], step: int, num_chunks: int = 0) -> float:
        """`update` on the losses of these groups, in smaller parts where memory asks for it; retreats are recorded.

        Raises NothingFits, on every process or on none.
        """

        def note(group: GroupLoss, parts: int, error: str) -> None:
            self.note_retreat(step, group, parts, error=error.splitlines()[0])

        if self.engine.is_even:
            return self.even_update(groups, step, num_chunks)
        if not self.leaves_together:
            return fit_update(self.update, groups, self.is_survivable, note)
        trained = self.trainable()
        sums = [torch.zeros_like(weight) for weight in trained]

        def accumulate(losses: Sequence[Callable[[], Tensor]]) -> float:
            for total in sums:
                total.zero_()
            for loss in losses:
                for total, gradient in zip(sums, torch.autograd.grad(loss(), trained, allow_unused=True), strict=True):
                    if gradient is not None:
                        total += gradient
            return 0.0

        def fit() -> None:
            try:
                fit_update(accumulate, groups, self.is_survivable, note)
            except NothingFits:
                accumulate([])

        self.until_signal(fit)
        self.leave_if_asked()
        if not distributed.all_reduce_sum(sum(len(group.parts) for group in groups))[0]:
            raise NothingFits
        # What the strategy sees is one pass that cannot fail: a loss with these gradients.
        return self.update([lambda: torch.stack([(g * w).sum() for g, w in zip(sums, trained, strict=True)]).sum()])

    def even_update(self, groups: Sequence[GroupLoss], step: int, num_chunks: int) -> float:
        """`update` of processes that take every pass together. Lack of memory ends them, see `Retreats`."""
        begun: list[GroupLoss] = []

        def begin(group: GroupLoss, part: slice) -> Tensor:
            begun.append(group)
            return group.compute(part)

        losses = []
        for group in groups:
            parts = self.retreats.parts(step, group)
            if self.retreats.is_new(step, group):
                self.note_retreat(step, group, parts)
            losses += [partial(begin, group, part) for part in (row_slices(group.num_rows, parts) if parts else [])]
        if not distributed.all_reduce_sum(len(losses))[0]:
            raise NothingFits
        try:
            return self.update(losses, num_chunks)
        except Exception as error:
            if not begun or not is_out_of_memory(error):
                raise
            parts = self.retreats.add(step, begun[-1])
            then = f"will be computed in {parts} parts" if parts else "will be left out"
            print(f"step {step}: out of memory: {begun[-1].sample_id} {then}: {error}", flush=True)
        # No exception: what it passes on its way would say goodbye to the others, who are in the middle of a pass.
        os._exit(AGAIN_CODE)

    def loss_of(self, prepared: PreparedPrompt, tokens: TokenBatch, compute: LossOfRows, parts: list[Any]) -> GroupLoss:
        """What `fitting_update` needs to know of one prompt and its completions."""
        size = prepared.inputs.length + tokens.ids.numel()
        return GroupLoss(prepared.prompt.sample.sample_id, len(tokens.ids), size, compute, parts)

    def note_retreat(self, step: int, group: GroupLoss, parts: int, **more: str) -> None:
        """Record that a group of this process is computed in parts, or left out."""
        action = f"tried in {parts} parts" if parts else "left out"
        self.faults.record_own(step, "out_of_memory", samples=[group.sample_id], action=action, **more)

    def update(self, losses: Sequence[Callable[[], Tensor]], num_chunks: int = 0) -> float:
        """One optimiser step on the sum of the losses of all processes. Returns the gradient norm.

        A process with fewer micro-batches than another runs empty ones, so that nobody waits for ever. Strategies
        average over processes: the factor makes it a sum again. Processes that were asked to leave do so before the
        next micro-batch.
        """
        count = distributed.world_size()
        if count > 1:
            missing = int(distributed.all_reduce_max(len(losses))[0]) - len(losses)
            idle = [lambda: self.policy.idle(num_chunks)] * missing
            losses = [partial(self.in_turn, loss, count) for loss in (*losses, *idle)]
        return self.engine.update(losses, self.settings.max_grad_norm, self.may_step)

    def in_turn(self, loss: Callable[[], Tensor], factor: int) -> Tensor:
        """A micro-batch of several processes."""
        self.leave_if_asked()
        return loss() * factor

    def may_step(self, norm: float) -> bool:
        """Whether an update with this gradient norm is taken: the same on every process."""
        self.found_bad = distributed.any_rank(not math.isfinite(norm))
        self.begin_change()
        return not self.found_bad

    def even_chunks(self, tokens: Sequence[TokenBatch]) -> int:
        """How often every process has to call the head in each micro-batch; 0 where each may call as it likes."""
        if not self.engine.is_even:
            return 0
        return int(distributed.all_reduce_max(max(map(self.policy.num_chunks, tokens), default=1))[0])

    def nothing_to_learn(self, step: int, is_fault: bool) -> dict[str, float]:
        """A step without an update, on every process: its metrics. Raises SettingError after too many faults."""
        if is_fault:
            self.faults.empty(step)
        return {"optim/skipped": 1.0}

    def judge_update(
        self, step: int, metrics: dict[str, float], offending_groups: Callable[[], list[dict[str, Any]]]
    ) -> None:
        """Count an update that was left out and keep what it was made of. Raises SettingError after too many.

        `offending_groups` gives what this process trained on, with its `loss`. Kept is what had a non-finite loss, or
        all of it where only the gradient was not finite.
        """
        if not self.found_bad:
            self.faults.passed()
            return
        metrics["optim/skipped"] = 1.0
        rows = [
            json.loads(line)
            for line in distributed.all_gather_lines([dumps(finite(row)) for row in offending_groups()])
        ]
        offenders = [row for row in rows if row["loss"] is None] or rows
        self.faults.skipped(step, metrics["optim/grad_norm"], offenders)

    def end_step(self, step: int, metrics: dict[str, float]) -> None:
        """Log, and save where a checkpoint is due or the process was asked to leave. Raises Preempted."""
        self.faults.share()
        metrics |= self.asked
        times = self.policy.timer.flush()
        metrics |= dict(zip(times, distributed.all_reduce_max(*times.values()), strict=True))
        metrics["optim/lr"] = self._raw_optimizer().param_groups[0]["lr"]
        self.headline = {label: metrics[name] for label, name in HEADLINES.items() if name in metrics}
        self.tracker.log(metrics, step)
        alarms = self.watch.see(metrics, step)
        self.tracker.alarms(alarms)
        done = step + 1
        self.end_change(done)
        is_leaving = distributed.any_rank(PREEMPTION.received is not None)
        is_due = is_leaving or done == self.run.max_steps or done % self.run.checkpoint_every == 0
        if is_due or distributed.any_rank(time.monotonic() - self._saved_at >= 60 * self.run.checkpoint_minutes):
            self.save()
        stops = self.watch.stops(alarms)
        if done < self.run.max_steps and distributed.any_rank(bool(stops)):
            if self.saved_step != done:  # or the same command would come to the same alarm again
                self.save()
            why = "; ".join(f"{alarm.monitor}, {alarm.text}" for alarm in stops[:1])
            raise StageStopped(f"{self.run.stage} by monitors.stop: {why}")
        if is_leaving or not self.leaves_together:
            PREEMPTION.release(is_leaving)

    def save(self) -> None:
        """A checkpoint of the finished steps; the leader's, made of what all processes hold."""
        assert self.finished_steps is not None
        counters = {"skipped_in_row": self.faults.in_row}
        weights = adapter_weights(self.policy.model, self.engine.weights())
        state = self.engine.optimizer_state()
        if distributed.is_rank_zero():
            # A checkpoint is continued, not compared: what it follows must be on the disk before it is.
            for log in (path for path in self.run.folder.glob("*.jsonl") if path.is_file()):
                flush_to_disk(log)
            folder = self.run.folder / "checkpoints"
            save_checkpoint(folder, self.finished_steps, weights, state, counters, self.run.checkpoints_kept)
        self.saved_step, self._saved_at = self.finished_steps, time.monotonic()
