"""What a stage sets in torch and in the allocator before it computes, and in a module while it does."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tartvg.config import SettingError, TrainerConfig

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def set_up_torch(settings: TrainerConfig) -> None:
    """Make a CPU run reproducible and quick.

    Not on a GPU: its attention adds gradients atomically all the same, and all memory would be filled before use.
    """
    keep_freed_memory()
    refuse_missing_gpus(settings)
    torch.set_num_threads(settings.num_threads)
    torch.use_deterministic_algorithms(settings.accelerator == "cpu")


def refuse_missing_gpus(settings: TrainerConfig) -> None:
    """Raise SettingError where the trainer asks for GPUs that are not here."""
    if settings.accelerator != "gpu":
        return
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    if not found:
        is_built = torch.version.cuda is not None or torch.version.hip is not None
        why = f"sees none{limit}; nvidia-smi shows the driver's" if is_built else "is built for CPUs only"
        raise SettingError(
            f"trainer.accelerator=gpu: there is no GPU here: torch {torch.__version__} {why}; trainer=cpu does without"
        )
    if found < settings.devices:
        raise SettingError(
            f"trainer.devices={settings.devices}: each process sees {found} GPUs here{limit}; under SLURM ask for them "
            "with --gpus-per-node, not --gpus-per-task"
        )


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to reuse large blocks; False where there is no such allocator.

    By default glibc returns large blocks to the kernel at once, and the next training step pays for every page again.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    limit = 2**31 - 1
    return bool(mallopt(_MMAP_THRESHOLD, limit) and mallopt(_TRIM_THRESHOLD, limit) and mallopt(_TOP_PAD, 64 << 20))


@contextmanager
def eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside the block; the mode before is restored."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
