"""The batches of an evaluation, shared between processes: which are whose, and the processes of one machine.

A batch is a fixed run of queries and a file of its own, whoever makes it. So the number of processes, and a kill
between two batches, change nothing in what the files say once they are put together.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from pathlib import Path

from tartvg.config import Config

Work = Callable[[Config, str, Path, int, int], None]
"""Settings, target, folder of the batches, shard, process that waits for it; makes the batches of that shard."""


def batch_files(folder: Path, num_prompts: int, batch_size: int) -> list[Path]:
    """The files of all batches, in the order of the queries."""
    return [folder / f"{start:06d}.jsonl" for start in range(0, num_prompts, batch_size)]


def missing_of(files: Sequence[Path], shard: int, count: int) -> list[int]:
    """Numbers of the batches of one shard of `count` that are not there yet. A file that is there is whole."""
    return [number for number in range(shard, len(files), count) if not files[number].exists()]


def are_complete(files: Sequence[Path]) -> bool:
    """Whether no batch is missing, whoever has to make it."""
    return not missing_of(files, 0, 1)


def is_orphan(parent: int | None) -> bool:
    """Whether the process `parent` that started this one for a shard is gone: then nobody waits for it."""
    return parent is not None and os.getppid() != parent


def num_shards(config: Config) -> int:
    """Processes that share the batches: one for each device of this machine, unless the user says how many."""
    return config.evaluate.num_shards or config.trainer.devices


@contextmanager
def helpers(work: Work, config: Config, target: str, folder: Path, num_batches: int) -> Iterator[None]:
    """Run all shards but the first that have a batch beside the block, and wait for them behind it.

    Raises RuntimeError when one of them fails. What is done is kept, and the same command goes on from there.
    """
    # Not fork: this process may hold threads (torch, CUDA) that a forked child would inherit half-alive.
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    try:
        for shard in range(1, min(num_shards(config), num_batches)):
            processes.append(context.Process(target=work, args=(config, target, folder, shard, os.getpid())))
            processes[-1].start()
        yield
        for shard, process in enumerate(processes, start=1):
            process.join()
            if process.exitcode != 0:
                raise RuntimeError(f"evaluate: shard {shard} ended with code {process.exitcode}; run it again to go on")
    finally:
        for process in processes:
            process.kill()
            process.join()
