"""What both kinds of training share: optimiser, learning rate, accumulation, checkpoints, and the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from torch import Tensor

from tartvg.config import GrpoConfig, SftConfig, TrainerConfig
from tartvg.policy.policy import Policy, stream_seed
from tartvg.tracking import Tracker
from tartvg.training.checkpoint import latest_checkpoint, restore_adapter, save_checkpoint

HEADLINES = {"reward": "reward/total_mean", "valid": "anchors/valid_rate", "loss": "loss/total"}


@dataclass(frozen=True)
class StageRun:
    """Where a training stage works and how it names its randomness."""

    stage: str
    folder: Path
    seed: int
    max_steps: int
    checkpoint_every: int


class StepModule(pl.LightningModule):
    """A policy trained by whole steps: each `training_step` ends with an optimiser step and, at times, a checkpoint."""

    def __init__(self, policy: Policy, settings: GrpoConfig | SftConfig, run: StageRun, tracker: Tracker) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.settings = settings
        self.run = run
        self.tracker = tracker
        self._resumed: dict[str, Any] | None = None
        self.start_step = 0
        self.headline: dict[str, float] = {}
        """What the progress bar shows of the last step."""
        found = latest_checkpoint(run.folder / "checkpoints")
        if found is not None:
            self.start_step, weights, self._resumed = found
            restore_adapter(policy.model, weights)
        policy.train()  # a Hugging Face model arrives in eval mode, and fit() leaves it there

    def trainable(self) -> list[torch.nn.Parameter]:
        """The adapter's weights."""
        return [p for p in self.policy.model.parameters() if p.requires_grad]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the adapter."""
        return torch.optim.AdamW(self.trainable(), lr=self.settings.lr, weight_decay=self.settings.weight_decay)

    def on_train_start(self) -> None:
        """The optimiser exists only now."""
        if self._resumed is not None:
            self._raw_optimizer().load_state_dict(self._resumed)
            self._resumed = None

    def _raw_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizers()
        return optimizer.optimizer

    def begin_step(self, step: int) -> None:
        """Everything random in a step depends on seed, stage and step only."""
        torch.manual_seed(stream_seed(self.run.seed, self.run.stage, step))
        warmup = min(1.0, (step + 1) / (self.settings.warmup_steps + 1))
        for group in self._raw_optimizer().param_groups:
            group["lr"] = self.settings.lr * warmup

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> float:
        """One optimiser step on the sum of the losses, one micro-batch at a time. Returns the gradient norm."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for loss in losses:
            self.manual_backward(loss())
        norm = torch.nn.utils.clip_grad_norm_(self.trainable(), self.settings.max_grad_norm)
        optimizer.step()
        return float(norm)

    def end_step(self, step: int, metrics: dict[str, float]) -> None:
        """Log, and save where a checkpoint is due."""
        metrics |= self.policy.timer.flush()
        metrics["optim/lr"] = self._raw_optimizer().param_groups[0]["lr"]
        self.headline = {label: metrics[name] for label, name in HEADLINES.items() if name in metrics}
        self.tracker.log(metrics, step)
        done = step + 1
        if done % self.run.checkpoint_every == 0 or done == self.run.max_steps:
            save_checkpoint(self.run.folder / "checkpoints", done, self.policy.model, self._raw_optimizer())


class StageBar(TQDMProgressBar):
    """A progress bar that says which stage it is and how it goes."""

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Lightning would call it an epoch."""
        super().on_train_epoch_start(trainer)
        module: Any = trainer.lightning_module
        self.train_progress_bar.reset(total=module.run.max_steps)
        self.train_progress_bar.initial = module.start_step
        self.train_progress_bar.set_description(module.run.stage)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """The numbers behind the bar."""
        module: Any = pl_module
        return {name: f"{value:.2f}" for name, value in module.headline.items()}


def make_trainer(settings: TrainerConfig, folder: Path) -> pl.Trainer:
    """A Lightning trainer that does what the modules say and nothing beside it."""
    return pl.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[StageBar(refresh_rate=1)] if settings.progress_bar else [],
        enable_progress_bar=settings.progress_bar,
        use_distributed_sampler=False,
        default_root_dir=str(folder),
        precision="32-true",
    )
