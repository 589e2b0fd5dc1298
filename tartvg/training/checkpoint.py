"""Checkpoints of a stage: the adapter, the optimiser and the step. Never the frozen base.

There is no random state to save: everything random is drawn from a seed made of (seed, stage, step, sample). A
checkpoint is written beside its place and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tartvg.policy.loading import ADAPTER

KEPT = 2
WEIGHTS = "adapter_model.safetensors"
OPTIMIZER = "optimizer.pt"


def save_checkpoint(folder: Path, step: int, model: PeftModel, optimizer: torch.optim.Optimizer) -> Path:
    """Write `folder/step_<step>`: the state after `step` finished steps. Older ones but the last are removed."""
    final = folder / f"step_{step:06d}"
    side = folder / f".{final.name}.{os.getpid()}"
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir(parents=True)
    weights = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, side / WEIGHTS)
    torch.save(optimizer.state_dict(), side / OPTIMIZER)
    if final.exists():
        shutil.rmtree(final)
    side.rename(final)
    for old in sorted(folder.glob("step_*"))[:-KEPT]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(folder: Path) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
    """Step, adapter weights and optimiser state of the newest checkpoint that can be read; None without any."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            weights = load_file(path / WEIGHTS)
            state = torch.load(path / OPTIMIZER, weights_only=True, map_location="cpu")
        except Exception as error:  # whatever the damage is, the one before is tried
            print(f"checkpoint {path} cannot be read ({error}); using the one before it")
            continue
        return int(path.name.removeprefix("step_")), weights, state
    return None


def restore_adapter(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Put saved adapter weights into the trainable adapter. Raises ValueError when a weight has no place."""
    result: Any = set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
    if result.unexpected_keys:
        raise ValueError(f"the checkpoint does not belong to this model: {sorted(result.unexpected_keys)[:3]}")
