"""One optimiser step: the gradient of this rank, in parts where memory asks for it, then one exchange.

Each rank sums the gradients of its groups alone, so whatever goes wrong there (too little memory, a signal) is
handled without the others. The exchange that follows is one backward pass whose gradients are these sums: nothing in
it allocates more than the adapter's size. This holds for one process, DDP and ZeRO-2. Under ZeRO-3 a rank has no
weights of its own to work with: that update stands beside its engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tartvg.grpo import LossOutput
from tartvg.launch.signals import PREEMPTION, Preempted
from tartvg.training import distributed
from tartvg.training.engine import Engine
from tartvg.training.faults import Faults
from tartvg.training.out_of_memory import free_cached_memory, is_out_of_memory, more_parts, row_slices
from tartvg.training.preemption import Stop

Outputs = list[LossOutput]
"""Of the parts of one group, in order; empty for a group that was left out."""


@dataclass(frozen=True)
class GroupLoss:
    """One group's share of a step's loss."""

    sample_id: str
    num_rows: int
    """Completions, or traces."""
    num_tokens: int
    """Tokens of the completions, without padding."""
    compute: Callable[[slice], LossOutput]
    """Rows of the group -> their share of the loss."""


@dataclass(frozen=True)
class UpdateResult:
    """What came of an optimiser step."""

    grad_norm: float
    """Before clipping, over all ranks."""
    is_taken: bool
    """False where the norm was not finite: weights and moments are unchanged then. The same on every rank."""
    outputs: list[Outputs]
    """Of each group of this rank."""


class Update(Protocol):
    """One optimiser step on the sum of the losses of all ranks. Collective."""

    def __call__(self, groups: Sequence[GroupLoss], step: int) -> UpdateResult | None:
        """Update the weights; None where no rank could compute any group."""


class LocalUpdate:
    """The update of strategies under which every rank holds all weights."""

    def __init__(self, engine: Engine, stop: Stop, faults: Faults, max_norm: float, rows_per_pass: int | None) -> None:
        self.engine = engine
        self.stop = stop
        self.faults = faults
        self.max_norm = max_norm
        self.rows_per_pass = rows_per_pass

    def __call__(self, groups: Sequence[GroupLoss], step: int) -> UpdateResult | None:
        """See `Update`."""
        try:  # `Stop.interruptible` without its frame, as this is where one reads a traceback
            self.stop.expose()
            gradients, outputs = self.gradients(groups, step)
        except Preempted:
            pass
        finally:
            PREEMPTION.hold()
        self.stop.check()
        if not distributed.all_reduce_sum(sum(map(len, outputs)))[0]:
            return None
        self.stop.begin_update()
        # DDP averages over ranks: the factor restores the sum.
        weights, factor = self.engine.parameters, distributed.world_size()
        products = [(gradient * weight).sum() for gradient, weight in zip(gradients, weights, strict=True)]
        norm, is_taken = self.engine.step([lambda: torch.stack(products).sum() * factor], self.max_norm, is_finite)
        return UpdateResult(norm, is_taken, outputs)

    def gradients(self, groups: Sequence[GroupLoss], step: int) -> tuple[list[Tensor], list[Outputs]]:
        """Summed gradients of this rank's groups by trainable weight, and the outputs of each group.

        A group that does not fit into memory is computed in 2, 4, 8 ... parts, and left out if a single row does not
        fit. An attempt that failed leaves nothing behind: the sums start from zero again.
        """
        weights = self.engine.parameters
        sums = [torch.zeros_like(weight) for weight in weights]
        num_parts = [parts_of(group.num_rows, self.rows_per_pass) for group in groups]
        while True:
            outputs: list[Outputs] = [[] for _ in groups]
            for total in sums:
                total.zero_()
            index = 0
            try:
                for index, group in enumerate(groups):
                    for part in row_slices(group.num_rows, num_parts[index]) if num_parts[index] else []:
                        output = group.compute(part)
                        found = torch.autograd.grad(output.loss, weights, allow_unused=True)
                        for total, gradient in zip(sums, found, strict=True):
                            if gradient is not None:
                                total += gradient
                        outputs[index].append(LossOutput(output.loss.detach(), output.metrics, output.num_tokens))
                return sums, outputs
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            free_cached_memory()
            num_parts[index] = more_parts(num_parts[index], groups[index].num_rows)
            action = f"tried in {num_parts[index]} parts" if num_parts[index] else "left out"
            ids = [groups[index].sample_id]
            self.faults.record_own(step, "out_of_memory", samples=ids, action=action, error=reason)


def is_finite(norm: float) -> bool:
    """Return whether every rank has a finite gradient norm. Collective."""
    return not distributed.any_rank(not math.isfinite(norm))


def parts_of(num_rows: int, rows_per_pass: int | None) -> int:
    """Number of parts with at most `rows_per_pass` rows each; None: one part."""
    return 1 if rows_per_pass is None else -(-num_rows // rows_per_pass)
