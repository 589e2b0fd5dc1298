"""All that only ZeRO-3 needs: partitioned loading, gathered parameters, and updates in lockstep.

Under ZeRO-3 every rank contributes its share of the weights to every pass of every other rank. So all ranks take the
same passes through the same modules in the same order. A rank with fewer micro-batches runs empty ones, and all call
the output head equally often. No rank can try a pass again by itself: running out of memory ends the run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from torch import Tensor

from tartvg.config import TrainerConfig
from tartvg.grpo import LossOutput
from tartvg.policy.policy import Policy
from tartvg.training import distributed
from tartvg.training.deepspeed import AnyDeviceZero, ZeroEngine, zero_config
from tartvg.training.out_of_memory import is_out_of_memory, row_slices
from tartvg.training.preemption import Stop
from tartvg.training.update import GroupLoss, Outputs, UpdateResult, is_finite, parts_of


def make_zero3_strategy(settings: TrainerConfig, max_grad_norm: float) -> Zero3Strategy:
    """Build Lightning's strategy for `trainer.strategy` zero3 and zero3_offload."""
    more: dict[str, Any] = {
        "stage3_param_persistence_threshold": settings.zero3.param_persistence_threshold,
        "stage3_max_reuse_distance": settings.zero3.max_reuse_distance,
    }
    if settings.strategy.is_offloaded:
        device = {"device": "cpu", "pin_memory": settings.accelerator == "gpu"}
        more |= {"offload_param": device, "offload_optimizer": device}
    config = zero_config(settings, max_grad_norm, **more)
    return Zero3Strategy(cluster_environment=TorchElasticEnvironment(), config=config)


class Zero3Strategy(AnyDeviceZero):
    """Partitions a large base weight by weight, from the checkpoint's files.

    All processes of a machine have the files mapped and none has copied them, where the files have the precision that
    is asked for. The adapter is complete by that time: partitioning while the modules are built would leave its B
    matrices other than zero, silently.
    """

    def init_deepspeed(self) -> None:
        """Partition the weights, then build DeepSpeed's engine."""
        assert self.model is not None
        weight_by_weight()(module=self.model, config_dict_or_path=self.config)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.root_device)
        super().init_deepspeed()

    def teardown(self) -> None:
        """Free the partitions, and restore torch's own linear layer, which ZeRO-3 replaces for good."""
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patches

        weights: list[torch.nn.Parameter] = [] if self.model is None else list(self.model.parameters())
        super().teardown()
        for weight in weights:
            if hasattr(weight, "ds_tensor"):
                weight.ds_tensor.data = weight.ds_tensor.new_empty(0)
        torch.nn.functional.linear = getattr(Patches, "linear_bk", torch.nn.functional.linear)


def weight_by_weight() -> type[Any]:
    """DeepSpeed's class that partitions weights; made here, as its import is slow and reads the environment."""
    import deepspeed

    class WeightByWeight(deepspeed.zero.Init):
        """Leaves the mapped checkpoint file alone.

        DeepSpeed broadcasts rank 0's weight in place. On the CPU that would write into the mapped file, and a page
        that was written to stays in memory as long as any weight of that file is there.
        """

        def _zero_init_param(self, param: torch.nn.Parameter) -> None:
            if param.device.type == "cpu":
                param.data = param.data.clone()
            super()._zero_init_param(param)

    return WeightByWeight


class Zero3Engine(ZeroEngine):
    """ZeRO-3: the weights are partitioned too, and gathered module by module."""

    @contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """Gather all weights and detach DeepSpeed's hooks, which would fetch and release them module by module.

        The hooks come back in their order, so the order of modules that DeepSpeed has recorded stays valid.
        """
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        offload = self.deepspeed.optimizer.parameter_offload
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


class LockstepUpdate:
    """The update under ZeRO-3: all ranks take every pass together."""

    def __init__(
        self, engine: Zero3Engine, stop: Stop, policy: Policy, max_norm: float, rows_per_pass: int | None
    ) -> None:
        self.engine = engine
        self.stop = stop
        self.policy = policy
        self.max_norm = max_norm
        self.rows_per_pass = rows_per_pass

    def __call__(self, groups: Sequence[GroupLoss], step: int) -> UpdateResult | None:
        """See `Update`. Ends the process where memory runs out, naming the `grpo.rows_per_pass` that needs less."""
        passes = [
            (index, part)
            for index, group in enumerate(groups)
            for part in row_slices(group.num_rows, parts_of(group.num_rows, self.rows_per_pass))
        ]
        most_calls = max((self.policy.num_head_calls(group.num_tokens) for group in groups), default=1)
        num_passes, num_calls = map(int, distributed.all_reduce_max(len(passes), most_calls))
        if not num_passes:
            return None
        outputs: list[Outputs] = [[] for _ in groups]
        losses: list[Callable[[], Tensor]] = [partial(self._pass, groups, outputs, *each) for each in passes]
        # Ranks with fewer micro-batches run empty ones so that collectives match.
        losses += [self._empty_pass] * (num_passes - len(passes))
        try:
            with self.policy.lockstep(num_calls):
                norm, is_taken = self.engine.step(losses, self.max_norm, self._accept)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            end_out_of_memory(error, self.rows_per_pass or max(group.num_rows for group in groups))
        return UpdateResult(norm, is_taken, outputs)

    def _pass(self, groups: Sequence[GroupLoss], outputs: list[Outputs], index: int, part: slice) -> Tensor:
        self.stop.check()
        output = groups[index].compute(part)
        outputs[index].append(LossOutput(output.loss.detach(), output.metrics, output.num_tokens))
        return output.loss * distributed.world_size()  # strategies average over ranks: this restores the sum

    def _empty_pass(self) -> Tensor:
        self.stop.check()
        return self.policy.empty_pass() * distributed.world_size()

    def _accept(self, norm: float) -> bool:
        self.stop.begin_update()
        return is_finite(norm)


def end_out_of_memory(error: Exception, num_rows: int) -> NoReturn:
    """Print what to change and end this process with code 2; the other ranks wait for it in a pass and end with it."""
    change = f"grpo.rows_per_pass={num_rows // 2}" if num_rows > 1 else "policy.activation_checkpointing=true"
    reason = str(error).splitlines()[0]
    print(
        f"error: rank {distributed.rank()} ran out of memory in an update of {num_rows} completions a pass under "
        f"ZeRO-3 ({reason}); give the same command with {change}: it continues from the last checkpoint",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(2)  # an exception would close the process group on its way, while others are in the middle of a pass
