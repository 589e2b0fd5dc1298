"""Settings of devices and of how they work together."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from tartvg.config.choices import require
from tartvg.config.fields import Effect, Settings, setting


class Strategy(Enum):
    """How Lightning runs the modules."""

    single = "single"
    ddp = "ddp"
    zero2 = "zero2"
    zero3 = "zero3"
    zero3_offload = "zero3_offload"

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage: 2 partitions gradients and moments, 3 the weights too; 0 without it."""
        return {"zero2": 2, "zero3": 3, "zero3_offload": 3}.get(self.value, 0)

    @property
    def is_offloaded(self) -> bool:
        """Whether weights and optimiser state lie in main memory."""
        return self is Strategy.zero3_offload


@dataclass
class Zero3Config(Settings, path="trainer.zero3", effect=Effect.rounding):
    """What DeepSpeed's ZeRO stage 3 partitions; its own names and units, elements of a parameter."""

    param_persistence_threshold: int = setting(100_000, at_least=0)
    """A parameter with at most this many elements stays whole on every process; 0 partitions all of them."""
    max_reuse_distance: int = setting(1_000_000_000, at_least=0)
    """A parameter that is used again within so many elements stays whole until then; 0 partitions it after each use.
    DeepSpeed's default, 2 GB in bf16: about four layers of the 7B."""


@dataclass
class TrainerConfig(Settings, path="trainer"):
    """Devices and how they work together."""

    accelerator: str = setting("cpu", among=("cpu", "gpu"), effect=Effect.rounding)
    """Kind of device."""
    devices: int = setting(1, at_least=1, effect=Effect.rounding)
    """Processes per node, one per device."""
    num_nodes: int = setting(1, at_least=1, effect=Effect.rounding)
    """Machines."""
    strategy: Strategy = setting(Strategy.single, effect=Effect.rounding)
    """How the processes share the work; `single` is one process."""
    zero3: Zero3Config = field(default_factory=Zero3Config)
    timeout_minutes: float = setting(60.0, above=0, effect=Effect.none)
    """How long a process waits for the others inside a step before the run fails."""
    num_threads: int = setting(1, at_least=1, effect=Effect.rounding)
    """CPU threads of torch; part of what makes a CPU run bit-reproducible."""
    num_workers: int = setting(0, at_least=0, effect=Effect.none)
    """Processes that decode video ahead; 0 decodes each video when it is used, in one process. Main memory holds the
    clips of two batches (`grpo.prompts_per_step`, `evaluate.batch_size`), of small ones up to this many more clips;
    one clip takes up to about 30 MB with the default `policy.frames`. A validation's come on top of the training's."""
    checkpoint_every: int = setting(5, at_least=1, effect=Effect.none)
    """Optimiser steps between checkpoints."""
    checkpoint_minutes: float = setting(30.0, above=0, effect=Effect.none)
    """Longest time between two checkpoints; a step is always finished first."""
    checkpoints_kept: int = setting(2, at_least=2, effect=Effect.none)
    """Older ones are removed. Two is the least: the newest, and the one to use when the newest is damaged."""
    max_skipped_steps: int = setting(5, at_least=1, effect=Effect.none)
    """Steps in a row that may be left out because their loss or gradient is not finite, before the stage stops."""
    memory_gib: float | None = setting(None, above=0, effect=Effect.none)
    """Memory of one GPU in GiB, or on a CPU of the process: a plan that needs more is refused before the start.
    null: what the GPU says; on a CPU, no limit."""
    progress_bar: bool = setting(True, effect=Effect.none)
    """Show how far a stage is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_alone = self.devices * self.num_nodes == 1
        require(
            self.strategy is not Strategy.single or is_alone, "trainer.devices", "1 with strategy=single", self.devices
        )
