"""The Lightning trainer that runs a stage's module, and its progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies import Strategy as LightningStrategy

from tartvg.config import Strategy, TrainerConfig
from tartvg.training.deepspeed import AnyDeviceZero, zero_config
from tartvg.training.zero3 import make_zero3_strategy


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
        """Return the numbers behind the bar."""
        module: Any = pl_module
        return {name: f"{value:.2f}" for name, value in module.headline.items()}


def make_strategy(settings: TrainerConfig, max_grad_norm: float) -> LightningStrategy | str:
    """Build Lightning's strategy for `trainer.strategy`."""
    if settings.strategy is Strategy.single:
        return "auto"
    if settings.strategy is Strategy.ddp:
        return DDPStrategy(cluster_environment=TorchElasticEnvironment())
    if settings.strategy is Strategy.zero2:
        config = zero_config(settings, max_grad_norm)
        return AnyDeviceZero(cluster_environment=TorchElasticEnvironment(), config=config)
    return make_zero3_strategy(settings, max_grad_norm)


def make_trainer(settings: TrainerConfig, folder: Path, max_grad_norm: float = 1.0) -> pl.Trainer:
    """Make a Lightning trainer that does what the modules say and nothing beside it."""
    return pl.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=make_strategy(settings, max_grad_norm),
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
