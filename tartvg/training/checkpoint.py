"""Checkpoints of a stage: the adapter, the optimiser and the step. Never the frozen base.

There is no random state to save: everything random is drawn from a seed made of (seed, stage, step, sample).

    checkpoints/step_000012/
      adapter_model.safetensors   weights
      optimizer.pt                tensors and plain values; read with weights_only
      checkpoint.json             step, counters, size and SHA-256 of every file: written last

A checkpoint is written beside its place, flushed to the disk and renamed, so it is there whole or not at all. What the
disk or a copy damages later does not match its checksums, and the checkpoint before is used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tartvg.config import SettingError
from tartvg.policy.loading import ADAPTER, ADAPTER_FILE, refuse_other_weights
from tartvg.records import flush_to_disk

KEPT = 2
"""Fewest checkpoints that stay: the newest, and the one that is used when the newest is damaged."""
MANIFEST = "checkpoint.json"
OPTIMIZER = "optimizer.pt"
MAX_MANIFEST_BYTES = 1 << 20


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not what was written; the message says in what."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` finished steps."""

    step: int
    weights: dict[str, Tensor]
    """Of the adapter, by PEFT's names."""
    optimizer: dict[str, Any]
    """`state_dict()` of the optimiser."""
    counters: dict[str, int] = field(default_factory=dict)
    """Small numbers that a module keeps over its steps."""


def adapter_weights(model: PeftModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the adapter's weights on the CPU by PEFT's names; from `state` where the model's are partitioned."""
    weights = get_peft_model_state_dict(model, state_dict=state and dict(state), adapter_name=ADAPTER)
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def save_checkpoint(
    folder: Path, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any],
    counters: Mapping[str, int] | None = None, kept: int = KEPT,
) -> Path:  # fmt: skip
    """Write `folder/step_<step>` and remove older ones, so that the newest `kept` sound ones stay.

    Raises SettingError when it cannot be written (a full disk, say): the earlier ones are untouched then.
    """
    final = folder / f"step_{step:06d}"
    side = folder / f".{final.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step_*"):  # of processes that were killed while they wrote
            shutil.rmtree(left, ignore_errors=True)
        side.mkdir()
        _write(side, step, weights, optimizer, counters or {})
        if final.exists():
            shutil.rmtree(final)  # a damaged one: a sound one would have been continued
        side.rename(final)
        flush_to_disk(folder)
    except OSError as error:
        shutil.rmtree(side, ignore_errors=True)
        raise SettingError(_cannot_write(folder, step, error)) from error
    _prune(folder, max(kept, KEPT))
    return final


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest sound checkpoint, or None. Damaged ones are named and passed over.

    Raises SettingError for one that is whole but holds anything other than tensors and plain values: it is not ours.
    """
    paths = sorted(folder.glob("step_*"), reverse=True)
    for path in paths:
        try:
            return _read(path)
        except DamagedCheckpoint as error:
            print(f"checkpoint {path} is damaged ({error}); using the one before it", flush=True)
    if paths:
        print(f"{folder}: no checkpoint is sound; the stage starts from its first step", flush=True)
    return None


def restore_adapter(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Put saved weights into the trainable adapter. Raises ValueError for those of another one."""
    refuse_other_weights(model, weights.keys(), "the checkpoint")
    set_peft_model_state_dict(model, dict(weights), adapter_name=ADAPTER)


def check_files(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files all have the size and the checksum that it states.

    Raises DamagedCheckpoint.
    """
    try:
        with (path / MANIFEST).open("rb") as file:
            manifest = json.loads(file.read(MAX_MANIFEST_BYTES))
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{MANIFEST}: {type(error).__name__}: {error}") from error
    if path.name != f"step_{step:06d}" or not files.keys() >= {ADAPTER_FILE, OPTIMIZER}:
        raise DamagedCheckpoint(f"{MANIFEST} belongs to another checkpoint")
    for name, (size, digest) in files.items():
        if Path(name).name != name or name in (".", ".."):
            raise DamagedCheckpoint(f"{MANIFEST}: {name!r} is no file name")
        try:
            found = (path / name).stat().st_size
            if found != size:
                raise DamagedCheckpoint(f"{name}: {found} bytes instead of {size}")
            if _digest(path / name) != digest:
                raise DamagedCheckpoint(f"{name}: its checksum differs")
        except OSError as error:
            raise DamagedCheckpoint(f"{name}: {error.strerror or error}") from error
    return manifest


def _read(path: Path) -> Checkpoint:
    manifest = check_files(path)
    try:
        weights = load((path / ADAPTER_FILE).read_bytes())
        optimizer = torch.load(path / OPTIMIZER, weights_only=True, map_location="cpu")
        counters = {str(k): int(v) for k, v in manifest.get("counters", {}).items()}
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise SettingError(
            f"{path}: refused, as it holds something other than tensors and plain values. Pickled Python objects run "
            "code when they are read, and no checkpoint of this program has any; remove that folder to go on"
        ) from error
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        raise DamagedCheckpoint(str(error)) from error
    return Checkpoint(manifest["step"], weights, optimizer, counters)


def _write(
    side: Path, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], counters: Mapping[str, int]
) -> None:
    # Through memory: both libraries' own writers hide the system's reason for a failed write.
    packed = io.BytesIO()
    torch.save(dict(optimizer), packed)
    files = {}
    for name, content in ((ADAPTER_FILE, save(dict(weights))), (OPTIMIZER, packed.getbuffer())):
        (side / name).write_bytes(content)
        flush_to_disk(side / name)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"step": step, "counters": dict(counters), "files": files}
    (side / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    flush_to_disk(side / MANIFEST)
    flush_to_disk(side)


def _prune(folder: Path, kept: int) -> None:
    """Remove all but the newest `kept` sound ones: a damaged one must not push a sound one out."""
    sound = 0
    for path in sorted(folder.glob("step_*"), reverse=True):
        if sound >= kept:
            shutil.rmtree(path, ignore_errors=True)
            continue
        try:
            check_files(path)
            sound += 1
        except DamagedCheckpoint as error:
            print(f"checkpoint {path} is damaged ({error}); removed, as newer ones are there", flush=True)
            shutil.rmtree(path, ignore_errors=True)


def _cannot_write(folder: Path, step: int, error: OSError) -> str:
    reason = error.strerror or str(error)
    before = [path.name for path in sorted(folder.glob("step_*"))]
    intact = f"the last one, {before[-1]}, is intact" if before else "there is none before it"
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    return (
        f"the checkpoint of step {step} cannot be written to {folder}: {reason} ({free / 2**20:.1f} MB free); "
        f"{intact}. Make room and give the same command again: it continues there"
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
