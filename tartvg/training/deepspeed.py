"""DeepSpeed under Lightning on any device, and ZeRO-2: all of DeepSpeed's particulars but those of ZeRO-3."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor

from tartvg.config import TrainerConfig
from tartvg.training.engine import Accept, Engine, Losses

BUCKET = 4_000_000
"""Elements per message. DeepSpeed's default allocates 2 GB on every process, for an adapter of 0.2 GB."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_config(settings: TrainerConfig, max_grad_norm: float, **zero: Any) -> dict[str, Any]:
    """DeepSpeed's own settings; `zero` adds to or replaces those of its ZeRO section.

    Clipping is among them: under ZeRO torch's function sees no gradient, and says nothing. Accumulation is not: the
    micro-batches of a step are ours to count, see `ZeroEngine.step`.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # an adapter's AdamW is small; DeepSpeed's own would be compiled first
        "zero_optimization": {
            "stage": settings.strategy.zero_stage,
            "overlap_comm": False,  # gradients are reduced once, after the last micro-batch: nothing overlaps
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            **zero,
        },
    }


class AnyDeviceZero(DeepSpeedStrategy):
    """Lightning's strategy on the CPU as well.

    There three things of the library are in the way: its check for CUDA, the device number that it hands to DeepSpeed,
    and a C++ extension for messages that DeepSpeed would compile for a minute; gloo does without it.
    """

    model: Any
    """DeepSpeed's engine while the strategy runs."""

    @property
    def _is_cpu(self) -> bool:
        return bool(self.root_device.type == "cpu")

    def setup_environment(self) -> None:
        """Skip the library's check for CUDA."""
        if not self._is_cpu:
            super().setup_environment()
            return
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Meet without device numbers and without the extension."""
        if not self._is_cpu:
            super().setup_distributed()
            return
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: Trainer) -> None:
        """Leave every weight the type it has: Lightning would make a bf16 base fp32, twice its size."""
        with mock.patch.object(self.precision_plugin, "convert_module", lambda module: module):
            super().setup(trainer)

    def teardown(self) -> None:
        """Take the engine apart: hooks that it has put into the weights keep the whole policy alive otherwise."""
        import deepspeed

        engine = self.model
        super().teardown()
        if isinstance(engine, deepspeed.DeepSpeedEngine):  # not where the fit failed before there was one
            engine.destroy()
        self.model = None

    def init_deepspeed(self) -> None:
        """Build DeepSpeed's engine; on the CPU without the device number."""
        import deepspeed

        initialize = deepspeed.initialize

        def without_device(*args: Any, **kwargs: Any) -> Any:
            return initialize(*args, **{k: v for k, v in kwargs.items() if k != "args"})

        with ExitStack() as stack:
            if self._is_cpu:
                stack.enter_context(mock.patch.object(deepspeed, "initialize", without_device))
            super().init_deepspeed()


class ZeroEngine(Engine):
    """ZeRO-2: every rank holds all weights; gradients and optimiser state are partitioned."""

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's engine."""
        return self.module.trainer.strategy.model

    def step(self, losses: Losses, max_norm: float, accept: Accept) -> tuple[float, bool]:
        """Step once; `max_norm` stands in DeepSpeed's own settings, see `zero_config`.

        Without the block each backward pass would replace the gradients of the one before, silently. DeepSpeed itself
        skips a step whose norm is not finite, on all ranks, and reports infinity as its norm.
        """
        with self.deepspeed.coalesce_grad_reduction():
            try:
                self.backward(losses)
            except BaseException:
                for weight in self.parameters:
                    weight.grad = None  # or the end of the block would exchange it, with ranks that do not
                raise
        self.optimizer.step()
        self.optimizer.zero_grad()
        norm = float(self.deepspeed.get_global_grad_norm())
        is_taken = accept(norm)
        if is_taken == bool(self.deepspeed.optimizer.overflow):
            raise RuntimeError(f"DeepSpeed and this program disagree about a step with the gradient norm {norm}")
        return norm, is_taken

    def weights(self) -> dict[str, Tensor]:
        """Gather the optimiser's fp32 copies."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in self.named.items()}

    def optimizer_state(self) -> dict[str, Any]:
        """Gather the moments of every weight, numbered as in one process."""
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
        """Fill this rank's part. The moments must exist before DeepSpeed can fill them."""
        zero, rows = self.deepspeed.optimizer, state["state"]
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
        """The AdamW of this rank's part."""
        inner: torch.optim.Optimizer = self.deepspeed.optimizer.optimizer
        return inner

    def _flat_partitions(self, zero: Any) -> list[Tensor]:
        return list(zero.single_partition_of_fp32_groups)

    def _link(self, zero: Any) -> None:
        zero._lazy_init_hp_params_optimizer_state()

    def _fill(self, parameter: torch.nn.Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, key)
