"""How the processes of a training share the work: Lightning's strategies, and DeepSpeed's particulars in one place.

`single` and `ddp` keep the whole model on every process. `zero2` splits gradients and optimiser state, `zero3` the
weights too, and `zero3_offload` keeps them in main memory. The modules do not know which one runs: what differs is an
`Engine` (see `engines.py`) and the classes here.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, Strategy

from tartvg.config import Strategy as Name
from tartvg.config import TrainerConfig
from tartvg.config.choices import ZERO3

BUCKET = 4_000_000
"""Numbers that travel in one message. DeepSpeed's default allocates 2 GB on every process, for an adapter of 0.2 GB."""


def zero_config(settings: TrainerConfig, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's own settings. Clipping is among them: torch's function sees no gradient under ZeRO, and says nothing.

    Accumulation is not: the micro-batches of a step are ours to count, see `engines.ZeroEngine`.
    """
    is_offloaded = settings.strategy is Name.zero3_offload
    zero: dict[str, Any] = {
        "stage": 3 if settings.strategy in ZERO3 else 2,
        "overlap_comm": False,  # gradients are reduced once, after the last micro-batch: there is nothing to overlap
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": settings.persist_below,
        "stage3_max_reuse_distance": settings.keep_within,
    }
    if is_offloaded:
        place = {"device": "cpu", "pin_memory": settings.accelerator == "gpu"}
        zero |= {"offload_param": place, "offload_optimizer": place}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # an adapter's AdamW is small; DeepSpeed's own would be compiled first
        "zero_optimization": zero,
    }


class AnyDeviceZero(DeepSpeedStrategy):
    """Lightning's strategy, on the CPU as well, and loading a large model piece by piece.

    On the CPU three things of the library are in the way: its check for CUDA, the device number that it hands to
    DeepSpeed, and a C++ extension for messages that DeepSpeed would compile for a minute; gloo does without it.
    Under ZeRO-3 the weights are split one by one from the checkpoint's files, which all processes of a machine have
    mapped and none has copied, where the files have the precision that is asked for. The adapter is complete by that
    time: splitting while the modules are built would leave its B matrices other than zero, silently.
    """

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

    def init_deepspeed(self) -> None:
        """Split the weights, then build the engine; on the CPU without the device number."""
        import deepspeed

        real = deepspeed.initialize

        def without_device(*args: Any, **kwargs: Any) -> Any:
            return real(*args, **{k: v for k, v in kwargs.items() if k != "args"})

        if self.zero_stage_3:
            assert self.model is not None
            one_by_one()(module=self.model, config_dict_or_path=self.config)
            for buffer in self.model.buffers():
                buffer.data = buffer.data.to(self.root_device)
        with ExitStack() as stack:
            if self._is_cpu:
                stack.enter_context(mock.patch.object(deepspeed, "initialize", without_device))
            super().init_deepspeed()

    def teardown(self) -> None:
        """Give torch its own linear layer back: ZeRO-3 replaces it for the whole process, for good."""
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patches

        super().teardown()
        torch.nn.functional.linear = getattr(Patches, "linear_bk", torch.nn.functional.linear)


def one_by_one() -> type[Any]:
    """DeepSpeed's class that splits weights; made here, as its import is slow and reads the environment."""
    import deepspeed

    class OneByOne(deepspeed.zero.Init):
        """It writes process 0's weight over each other's: on the CPU into the mapped file, which would copy all of it.

        A page of a mapped file that was written to stays in memory as long as any weight of that file is there.
        """

        def _zero_init_param(self, param: torch.nn.Parameter) -> None:
            if param.device.type == "cpu":
                param.data = param.data.clone()
            super()._zero_init_param(param)

    return OneByOne


def make_strategy(settings: TrainerConfig, max_grad_norm: float) -> Strategy | str:
    """Lightning's strategy for `trainer.strategy`."""
    if settings.strategy is Name.single:
        return "auto"
    if settings.strategy is Name.ddp:
        return DDPStrategy(cluster_environment=TorchElasticEnvironment())
    return AnyDeviceZero(cluster_environment=TorchElasticEnvironment(), config=zero_config(settings, max_grad_norm))
