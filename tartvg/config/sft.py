"""Settings of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tartvg.config.choices import LrDecay
from tartvg.config.fields import Settings, setting


@dataclass
class SftConfig(Settings, path="sft"):
    """Supervised fine-tuning of a fresh base on the filtered traces."""

    epochs: int = setting(2, at_least=1)
    """Passes over the traces."""
    batch_size: int = setting(16, at_least=1)
    """Traces per optimiser step."""
    lr: float = setting(2e-5, above=0)
    """Learning rate of AdamW, constant."""
    warmup_steps: ClassVar[int] = 0
    lr_decay: ClassVar[LrDecay] = LrDecay.none
    max_grad_norm: ClassVar[float] = 1.0
    """No settings: a few hundred traces are a few dozen steps, too few for a schedule."""
