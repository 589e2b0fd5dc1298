"""Who this process is among the processes of a run, and the few words that they exchange.

The one place that asks for a rank. Everything here also works in a run of one process, where nothing is sent. What is
sent are numbers and text, never pickled objects. Every function but `rank`, `world_size` and `is_rank_zero` is
collective: all processes call it, in the same order.

Messages travel in gloo groups, apart from the group that moves gradients, and are of two kinds. In a step all processes
do the same: one that lets the others wait for `trainer.timeout_min` is lost, and the run with it. The leader's word
(`broadcast`) may come after an evaluation of days.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tartvg.config import SettingError, Strategy, TrainerConfig

PATIENCE = timedelta(days=30)
"""How long the others wait for the leader's word."""


@dataclass
class _Company:
    """The other processes of this run."""

    in_step: dist.ProcessGroup | None = None
    """Waits for `trainer.timeout_min`. None: there is nobody to talk to."""
    for_leader: dist.ProcessGroup | None = None
    """Waits for `PATIENCE`."""
    is_away: bool = False
    """Whether this process, the leader, works alone for a while, as a run of its own."""


_company = _Company()


def rank() -> int:
    """0 for the leader, which alone writes files and speaks to the user."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes that work together; 1 while the leader works alone."""
    return 1 if _company.in_step is None or _company.is_away else dist.get_world_size()


def is_rank_zero() -> bool:
    """Whether this process writes."""
    return rank() == 0


def init(settings: TrainerConfig) -> None:
    """Meet the other processes of the run. Without a launcher this process is the whole run.

    Raises SettingError when the launcher started another number of processes than the settings say.
    """
    expected = settings.devices * settings.num_nodes
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != expected:
        raise SettingError(
            f"trainer.devices={settings.devices} and trainer.num_nodes={settings.num_nodes} make {expected} processes, "
            f"but {started} were started"
        )
    if settings.strategy is Strategy.single:
        return
    is_gpu = settings.accelerator == "gpu"
    if not is_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it once, at its first import
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        dist.init_process_group(_backend(is_gpu), store=store, rank=0, world_size=1, timeout=_timeout(settings))
    else:
        if is_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(_backend(is_gpu), timeout=_timeout(settings))
    _company.in_step = dist.new_group(backend="gloo", timeout=_timeout(settings))
    _company.for_leader = dist.new_group(backend="gloo", timeout=PATIENCE)


def _backend(is_gpu: bool) -> str:
    return "nccl" if is_gpu else "gloo"


def _timeout(settings: TrainerConfig) -> timedelta:
    return timedelta(minutes=settings.timeout_min)


def destroy() -> None:
    """Say goodbye: after it this process is a run of its own."""
    if dist.is_initialized():
        _company.in_step = _company.for_leader = None
        dist.destroy_process_group()


def all_reduce_max(*values: float) -> list[float]:
    """Element by element the largest number of any process."""
    return _reduced(values, dist.ReduceOp.MAX)


def all_reduce_sum(*values: float) -> list[float]:
    """Element by element the sum over processes."""
    return _reduced(values, dist.ReduceOp.SUM)


def _reduced(values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, operation, group=_company.in_step)
    return [float(value) for value in tensor]


def broadcast(value: float) -> float:
    """The leader's number, whatever the others say, and whenever it comes."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(tensor, src=0, group=_company.for_leader)
    return float(tensor)


def all_gather_lines(lines: Sequence[str]) -> list[str]:
    """The lines of all processes, those of process 0 first. A line holds no newline."""
    if world_size() == 1:
        return list(lines)
    mine = torch.frombuffer(
        bytearray("".join(f"{line}\n" for line in lines).encode()) or bytearray(1), dtype=torch.uint8
    )
    sizes = [int(size) for size in _each(torch.tensor([mine.numel() if lines else 0]))]
    padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
    padded[: mine.numel()] = mine[: padded.numel()]
    texts = [bytes(part[:size].tolist()).decode() for part, size in zip(_each(padded), sizes, strict=True)]
    return [line for text in texts for line in text.split("\n")[:-1]]


def _each(tensor: Tensor) -> list[Tensor]:
    out = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(out, tensor, group=_company.in_step)
    return out


def receive() -> int:
    """What the leader tells the others with `broadcast`. Where it failed, they end here without a word."""
    code = int(broadcast(0))
    if code < 0:
        time.sleep(5)  # a launcher stops the rest as soon as one ends: the leader must speak first
        sys.exit(1)
    return code


@contextmanager
def failing_together() -> Iterator[None]:
    """What the leader does before it tells something: where the block fails, the others, who wait in `receive`, end."""
    try:
        yield
    except BaseException:
        broadcast(-1)
        raise


def any_rank(is_so: bool) -> bool:
    """Whether it is so on any process: all must take the same path."""
    return bool(all_reduce_max(float(is_so))[0])


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """The leader does the block before the others do: it draws or downloads what they then find."""
    if not is_rank_zero():
        broadcast(0)
    yield
    if is_rank_zero():
        broadcast(0)


def on_rank_zero(work: Callable[[], int | None]) -> int | None:
    """The leader works alone, the others wait; all get its result. Where it fails, the others end without a word."""
    if not is_rank_zero():
        return receive() or None
    with failing_together(), _away():
        result = work()
    broadcast(result or 0)
    return result


@contextmanager
def _away() -> Iterator[None]:
    """The leader is a run of its own for the block. Blocks may be nested."""
    before, _company.is_away = _company.is_away, True
    try:
        yield
    finally:
        _company.is_away = before
