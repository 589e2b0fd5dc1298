"""What a training step asks of the strategy, in three versions: everything on each process, ZeRO-2, ZeRO-3.

`whole` holds all weights together, for everything without gradient: sampling, reference and vision take as many passes
as they need on each process. `update` is one optimiser step. The two state functions give and take what a checkpoint
holds: complete tensors in the format of a single process, so that a stage can go on under another strategy and with
another number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from tartvg.config import Strategy
from tartvg.training import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")
Losses = Sequence[Callable[[], Tensor]]
MayStep = Callable[[float], bool]
"""Gradient norm -> whether the step is taken; every process gives the same answer."""


class Engine(Protocol):
    """With several processes every method is collective: all of them call it, in the same order."""

    is_even: bool
    """Whether every process has to take the same passes through the model, in the same order (ZeRO-3)."""

    def whole(self) -> AbstractContextManager[None]:
        """Inside the block every process has all weights. Not inside `training_step`: the weights are in use there."""

    def update(self, losses: Losses, max_norm: float, may_step: MayStep) -> float:
        """One optimiser step on the sum of the losses, averaged over processes. Returns the gradient norm.

        `may_step` refuses exactly the steps whose norm is not finite: they change neither weights nor moments.
        """

    def weights(self) -> dict[str, Tensor]:
        """The trainable weights, complete, on the CPU, by the names of `policy.model`."""

    def optimizer_state(self) -> dict[str, Any]:
        """AdamW's `state_dict()` as if one process had trained."""

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Inverse of `optimizer_state`."""


class SingleEngine:
    """One process, or several that each hold everything (DDP): they exchange gradients in every backward pass."""

    is_even = False

    def __init__(self, module: LightningModule, named: dict[str, torch.nn.Parameter]) -> None:
        self.module = module
        self.named = named

    @property
    def optimizer(self) -> Any:
        """Lightning's wrapper: stepping it counts the step."""
        return self.module.optimizers()

    def whole(self) -> AbstractContextManager[None]:
        """They always are."""
        return nullcontext()

    def update(self, losses: Losses, max_norm: float, may_step: MayStep) -> float:
        """Gradients add up in place."""
        self.optimizer.zero_grad()
        self.backward(losses)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.named.values()), max_norm))
        if may_step(norm):
            self.optimizer.step()
        return norm

    def backward(self, losses: Losses) -> None:
        """One micro-batch at a time."""
        for loss in losses:
            self.module.manual_backward(loss())

    def weights(self) -> dict[str, Tensor]:
        """A copy."""
        return {name: p.detach().cpu().clone() for name, p in self.named.items()}

    def optimizer_state(self) -> dict[str, Any]:
        """torch's own."""
        state: dict[str, Any] = self.optimizer.optimizer.state_dict()
        return state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """torch's own."""
        self.optimizer.optimizer.load_state_dict(state)


class ZeroEngine(SingleEngine):
    """ZeRO-2: the weights are whole, gradients and optimiser state are split."""

    @property
    def engine(self) -> Any:
        """DeepSpeed's."""
        return self.module.trainer.strategy.model

    def update(self, losses: Losses, max_norm: float, may_step: MayStep) -> float:
        """Without the block each backward pass would replace the gradients of the one before, silently.

        `max_norm` stands in DeepSpeed's own settings, see `strategies.zero_config`. DeepSpeed itself leaves a step out
        whose norm is not finite, on all processes, and reports infinity as its norm.
        """
        with self.engine.coalesce_grad_reduction():
            try:
                self.backward(losses)
            except BaseException:
                for weight in self.named.values():
                    weight.grad = None  # or the end of the block would exchange it, with processes that do not
                raise
        self.optimizer.step()
        self.optimizer.zero_grad()
        norm = float(self.engine.get_global_grad_norm())
        if may_step(norm) == bool(self.engine.optimizer.overflow):
            raise RuntimeError(f"DeepSpeed and this program disagree about a step with the gradient norm {norm}")
        return norm

    def weights(self) -> dict[str, Tensor]:
        """The optimiser's own copies, gathered."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in self.named.items()}

    def optimizer_state(self) -> dict[str, Any]:
        """The moments of every weight, gathered and numbered as a single process would."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self._inner
        steps = [row["step"].detach().cpu() for row in inner.state.values() if "step" in row]
        state = {}
        for number, parameter in enumerate(self.named.values() if steps else ()):
            moments = {key: safe_get_full_optimizer_state(parameter, key).cpu().clone() for key in MOMENTS}
            state[number] = {"step": steps[0].clone(), **moments}
        groups = [{**group, "params": list(range(len(self.named)))} for group in inner.param_groups]
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Each process keeps its part. The moments must exist before DeepSpeed can fill them."""
        zero, rows = self.engine.optimizer, state["state"]
        if not rows:
            return
        for flat in self._flat_partitions(zero):
            empty = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._inner.state[flat] = {"step": rows[0]["step"].clone(), **empty}
        self._link(zero)
        for number, parameter in enumerate(self.named.values()):
            for key in MOMENTS:
                self._fill(parameter, rows[number][key].to(parameter.device), key)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The AdamW that works on this process's part."""
        inner: torch.optim.Optimizer = self.engine.optimizer.optimizer
        return inner

    def _flat_partitions(self, zero: Any) -> list[Tensor]:
        return list(zero.single_partition_of_fp32_groups)

    def _link(self, zero: Any) -> None:
        zero._lazy_init_hp_params_optimizer_state()

    def _fill(self, parameter: torch.nn.Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, key)


class Zero3Engine(ZeroEngine):
    """ZeRO-3: each module's weights are together only while it works."""

    is_even = True

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather all weights and lay DeepSpeed's hooks aside, which would fetch and release them pass by pass.

        They come back in their order, so the order of modules that DeepSpeed has recorded stays valid.
        """
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        offload = self.engine.optimizer.parameter_offload
        parameters = list(offload.module.parameters())
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()  # what an earlier pass still claims could not be released after
        with GatheredParameters(parameters):
            aside = []
            for handle in sorted((*offload.forward_hooks, *offload.backward_hooks), key=lambda h: int(h.id)):
                hooks = handle.hooks_dict_ref()
                aside.append((hooks, handle.id, hooks.pop(handle.id)))
            try:
                yield
            finally:
                for hooks, number, hook in aside:
                    hooks[number] = hook

    def _flat_partitions(self, zero: Any) -> list[Tensor]:
        return list(zero.fp32_partitioned_groups_flat)

    def _link(self, zero: Any) -> None:
        pass  # the flat partitions are looked up when they are needed

    def _fill(self, parameter: torch.nn.Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        # not the function for whole tensors: it refuses those that do not divide by the number of processes
        size = int(parameter.ds_tensor.numel())  # type: ignore[attr-defined]
        padded = value.new_zeros(size * distributed.world_size())
        padded[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(parameter, padded[distributed.rank() * size :][:size], key)


ENGINES: dict[Strategy, type[SingleEngine]] = {
    Strategy.single: SingleEngine,
    Strategy.ddp: SingleEngine,
    Strategy.zero2: ZeroEngine,
    Strategy.zero3: Zero3Engine,
    Strategy.zero3_offload: Zero3Engine,
}
