"""memory: what each GPU would need for these settings, whether it is there, and the same on 4, 8 and 16 GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tartvg.config import Config, SettingError
from tartvg.memory import plan as memory
from tartvg.memory.whole import WholeUpdates, whole_updates
from tartvg.training import distributed


def run_memory(config: Config) -> None:
    """Print the estimate and the table. Raises SettingError for a plan that cannot fit."""
    try:
        print(memory.table(config, config.trainer.memory_gib or memory.USUAL_GIB))
        print()
        print(memory.describe(memory.estimate(config)))
    except ValueError as error:
        raise SettingError(str(error)) from error
    refuse_what_cannot_fit(config)


def refuse_what_cannot_fit(config: Config) -> None:
    """Before anything is loaded: print the estimate, and raise SettingError if there is less memory than that.

    Silent where nothing says how much there is: on a CPU without `trainer.memory_gib`.
    """
    if (limit := limit_of(config)) is not None:
        print(memory.describe(memory.check(config, limit)), flush=True)


def limit_of(config: Config) -> int | None:
    """Bytes of a process's device, as the settings or the GPU say; None where nothing says it."""
    if config.trainer.memory_gib is not None:
        return int(config.trainer.memory_gib * memory.GIB)
    if config.trainer.accelerator == "gpu" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return None


def fits_whole(config: Config) -> Callable[[int, int], bool] | None:
    """The rule of `policy.activation_checkpointing: auto`, see `Policy.fits_whole`; None without it. Collective.

    Rank 0 traces. Under ZeRO-3 all ranks have to take the same passes, so there every group runs its layers twice.
    """
    if config.policy.activation_checkpointing != "auto" or config.trainer.strategy.zero_stage == 3:
        return None
    limit = limit_of(config)
    if limit is None:
        return lambda num_prompt, num_completion: True
    numbers = [0.0] * 9
    if distributed.is_rank_zero():
        found = whole_updates(config, limit)
        print(found, flush=True)
        numbers = [found.budget, *found.lengths, *found.tokens, *found.corners]
    budget, *rest = distributed.all_reduce_sum(*numbers)
    return WholeUpdates(budget, (rest[0], rest[1]), (rest[2], rest[3]), (rest[4], rest[5], rest[6], rest[7]))
