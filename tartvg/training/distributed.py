"""The rank of this process, and the few collectives that the stages use beside the gradient exchange.

The only module that asks for a rank. Everything works in a run of one process too, where nothing is sent. Messages are
numbers and text, never pickled objects. Every function but `rank`, `world_size` and `is_rank_zero` is collective: all
ranks call it, in the same order.

Two gloo groups carry the messages, apart from the group that reduces gradients. The first waits
`trainer.timeout_minutes`: within a step all ranks do the same work, so a rank that late is lost. The second serves
`broadcast`, which may wait for an evaluation that takes days.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tartvg.config import LaunchError, Strategy, TrainerConfig
from tartvg.launch.processes import is_started
from tartvg.policy.torch_setup import refuse_missing_gpus
from tartvg.records import to_json

BROADCAST_TIMEOUT = timedelta(days=30)
FAILED = -1
"""Broadcast by rank 0 instead of a result when its work failed."""


@dataclass
class _Groups:
    """Process groups of this run."""

    step: dist.ProcessGroup | None = None
    """Times out after `trainer.timeout_minutes`. None in a run of one process."""
    broadcast: dist.ProcessGroup | None = None
    """Times out after `BROADCAST_TIMEOUT`."""
    is_alone: bool = False
    """Whether this process, rank 0, works as a run of one for a while."""


_groups = _Groups()


def rank() -> int:
    """Rank of this process; rank 0 alone writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 while rank 0 works alone."""
    return 1 if _groups.step is None or _groups.is_alone else dist.get_world_size()


def is_rank_zero() -> bool:
    """Return whether this process writes and prints."""
    return rank() == 0


def init(settings: TrainerConfig) -> None:
    """Join the process group. A strategy for several processes makes a group of one where no launcher is used.

    Raises LaunchError when the launcher started another number of processes than the settings say, and SettingError
    where there are fewer GPUs.
    """
    expected = settings.devices * settings.num_nodes
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != expected:
        raise LaunchError(
            f"trainer.devices={settings.devices} and trainer.num_nodes={settings.num_nodes} make {expected} processes, "
            f"but {started} were started (WORLD_SIZE={started} in the environment; unset RANK and WORLD_SIZE if no "
            "launcher started this command)"
        )
    if settings.strategy is Strategy.single:
        return
    refuse_missing_gpus(settings)
    timeout = timedelta(minutes=settings.timeout_minutes)
    is_gpu = settings.accelerator == "gpu"
    backend = "nccl" if is_gpu else "gloo"
    if not is_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it once, at its first import
    if not is_started():
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        if is_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=timeout)
    _groups.step = dist.new_group(backend="gloo", timeout=timeout)
    _groups.broadcast = dist.new_group(backend="gloo", timeout=BROADCAST_TIMEOUT)


def destroy() -> None:
    """Leave the process group; from here on this process is a run of one."""
    if dist.is_initialized():
        _groups.step = _groups.broadcast = None
        dist.destroy_process_group()


# -- within a step -----------------------------------------------------------------------------------------------------


def all_reduce_max(*values: float) -> list[float]:
    """Element-wise maximum over ranks."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def all_reduce_sum(*values: float) -> list[float]:
    """Element-wise sum over ranks."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def any_rank(condition: bool) -> bool:
    """Return whether the condition holds on any rank, so that all take the same path."""
    return bool(all_reduce_max(float(condition))[0])


def all_gather_lines(lines: Sequence[str]) -> list[str]:
    """Lines of all ranks, those of rank 0 first. A line holds no newline."""
    if world_size() == 1:
        return list(lines)
    mine = torch.frombuffer(
        bytearray("".join(f"{line}\n" for line in lines).encode()) or bytearray(1), dtype=torch.uint8
    )
    sizes = [int(size) for size in _all_gather(torch.tensor([mine.numel() if lines else 0]))]
    padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
    padded[: mine.numel()] = mine[: padded.numel()]
    texts = [bytes(part[:size].tolist()).decode() for part, size in zip(_all_gather(padded), sizes, strict=True)]
    return [line for text in texts for line in text.split("\n")[:-1]]


def all_gather_ordered(indices: Sequence[int], rows: Sequence[Any]) -> list[Any]:
    """Rows of all ranks as JSON values, in the order of their indices; on one process the rows themselves.

    Numbers that are not finite keep their value: NaN and Infinity are no JSON, but Python reads and writes them.
    """
    if world_size() == 1:
        return list(rows)
    lines = all_gather_lines([json.dumps(to_json([i, row])) for i, row in zip(indices, rows, strict=True)])
    return [row for _, row in sorted(map(json.loads, lines), key=lambda pair: int(pair[0]))]


def _all_reduce(values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, operation, group=_groups.step)
    return [float(value) for value in tensor]


def _all_gather(tensor: Tensor) -> list[Tensor]:
    out = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(out, tensor, group=_groups.step)
    return out


# -- from rank 0 to the others -----------------------------------------------------------------------------------------


def broadcast(value: float) -> float:
    """Broadcast one number from rank 0; waits up to 30 days."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(tensor, src=0, group=_groups.broadcast)
    return float(tensor)


def receive() -> int:
    """Receive what rank 0 broadcasts. Exits in silence when rank 0 failed."""
    code = int(broadcast(0))
    if code == FAILED:
        time.sleep(5)  # a launcher stops all ranks as soon as one ends: rank 0 prints first
        sys.exit(1)
    return code


@contextmanager
def failing_together() -> Iterator[None]:
    """Run the block on rank 0 before it broadcasts; where the block fails, the ranks that wait in `receive` exit."""
    try:
        yield
    except BaseException:
        broadcast(FAILED)
        raise


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank 0 before the other ranks run it: it draws or downloads what they then find."""
    if not is_rank_zero():
        broadcast(0)
    yield
    if is_rank_zero():
        broadcast(0)


def on_rank_zero(work: Callable[[], int | None]) -> int | None:
    """Run `work` on rank 0 alone, as a run of one process, and broadcast its exit code to the others, who wait."""
    if not is_rank_zero():
        return receive() or None
    with failing_together(), _alone():
        result = work()
    broadcast(result or 0)
    return result


@contextmanager
def _alone() -> Iterator[None]:
    before, _groups.is_alone = _groups.is_alone, True
    try:
        yield
    finally:
        _groups.is_alone = before
