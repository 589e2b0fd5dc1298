"""What a training step asks of the strategy: all weights for inference, an optimiser step, and the state to save.

State goes in and out as complete tensors in the format of one process, so that a stage can continue under another
strategy and on another number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

Losses = Sequence[Callable[[], Tensor]]
Accept = Callable[[float], bool]
"""Gradient norm -> whether the step is taken; the same answer on every rank."""


class Engine:
    """Every process holds all weights and the whole optimiser: one process, or DDP.

    With several processes every method is collective.
    """

    def __init__(self, module: LightningModule, named: dict[str, torch.nn.Parameter]) -> None:
        self.module = module
        self.named = named
        """Trainable weights by the names of `policy.model`."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Trainable weights."""
        return list(self.named.values())

    @property
    def optimizer(self) -> Any:
        """Lightning's wrapper: stepping it counts the step."""
        return self.module.optimizers()

    def gathered_parameters(self) -> AbstractContextManager[None]:
        """Gather all weights on every rank, for passes without gradient. Do not enter it inside `training_step`."""
        return nullcontext()

    def step(self, losses: Losses, max_norm: float, accept: Accept) -> tuple[float, bool]:
        """Step on the sum of the losses, averaged over ranks. Returns the gradient norm and whether it was taken."""
        self.optimizer.zero_grad()
        self.backward(losses)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, max_norm))
        is_taken = accept(norm)
        if is_taken:
            self.optimizer.step()
        return norm, is_taken

    def backward(self, losses: Losses) -> None:
        """Accumulate gradients, one micro-batch at a time."""
        for loss in losses:
            self.module.manual_backward(loss())

    def weights(self) -> dict[str, Tensor]:
        """Trainable weights, complete, copied to the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.named.items()}

    def optimizer_state(self) -> dict[str, Any]:
        """AdamW's `state_dict()` as one process would have it."""
        state: dict[str, Any] = self.optimizer.optimizer.state_dict()
        return state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restore what `optimizer_state` returned."""
        self.optimizer.optimizer.load_state_dict(state)
