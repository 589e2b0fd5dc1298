"""memory: what each GPU would need for these settings, whether it is there, and the same on 4, 8 and 16 GPUs."""

from __future__ import annotations

import torch

from tartvg.config import Config, SettingError
from tartvg.launch.processes import is_follower
from tartvg.memory import plan as memory


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
    limit = None if config.trainer.memory_gib is None else int(config.trainer.memory_gib * memory.GIB)
    if limit is None and config.trainer.accelerator == "gpu" and torch.cuda.is_available():
        limit = int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    if limit is not None:
        found = memory.describe(memory.check(config, limit))
        if not is_follower():
            print(found, flush=True)
