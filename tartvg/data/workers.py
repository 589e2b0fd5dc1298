"""Run one function over many inputs in processes that may crash or hang without taking the others along.

Decoders are C code: a damaged file can end the process or never return. `concurrent.futures` gives up its whole pool on
the first, and waits for ever on the second. Results come back as JSON, never as pickles, so that a process that was
taken over by its file has no way back into the one that asked.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

In = TypeVar("In")
MAX_REPLY_BYTES = 2**24
"""A longer result is taken for the work of a damaged process."""
_STARTING_S = 20.0
"""Allowance for a process that has just been started and still imports."""


class WorkerError(RuntimeError):
    """A process that crashed, or was ended because it took too long. The message is the reason."""


@dataclass
class _Worker(Generic[In]):
    process: BaseProcess
    connection: Connection
    item: In | None = None
    deadline: float = float("inf")


def map_isolated(
    function: Callable[[In], Any], items: Sequence[In], workers: int, timeout_s: float
) -> Iterator[tuple[In, Any]]:
    """(item, function(item)) in the order in which they finish; a WorkerError in place of what never came.

    `function` and `items` are pickled on their way there; `function` gives a JSON value and should not raise. A process
    that works on one item for longer than `timeout_s` seconds is killed and replaced. `workers` 0 runs everything in
    this process, without that protection.
    """
    if workers == 0:
        yield from ((item, function(item)) for item in items)
        return
    # Not fork: this process may hold threads (torch, CUDA) that a forked child would inherit half-alive.
    context = multiprocessing.get_context("spawn")
    waiting = deque(items)
    busy: list[_Worker[In]] = []
    idle: list[_Worker[In]] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                worker = idle.pop() if idle else _start(context, function)
                worker.item, worker.deadline = waiting.popleft(), time.monotonic() + timeout_s + _STARTING_S
                worker.connection.send(worker.item)
                busy.append(worker)
            ready = wait([w.connection for w in busy], timeout=0.5)
            for worker in list(busy):
                if worker.connection in ready:
                    result = _receive(worker)
                elif time.monotonic() > worker.deadline:
                    result = WorkerError(f"took longer than {timeout_s:g} s")
                else:
                    continue
                busy.remove(worker)
                if isinstance(result, WorkerError):
                    _stop(worker)
                else:
                    idle.append(worker)
                assert worker.item is not None
                yield worker.item, result
    finally:
        for worker in busy + idle:
            _stop(worker)


def _start(context: multiprocessing.context.SpawnContext, function: Callable[[In], Any]) -> _Worker[In]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()  # else a crash of the child would not close the pipe
    return _Worker(process, ours)


def _serve(function: Callable[[In], Any], connection: Connection) -> None:
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        connection.send_bytes(json.dumps(function(item)).encode())


def _receive(worker: _Worker[In]) -> Any:
    """The value that the process has sent, or a WorkerError."""
    try:
        return json.loads(worker.connection.recv_bytes(MAX_REPLY_BYTES))
    except (EOFError, OSError):
        worker.process.join(timeout=5)
        return WorkerError(f"its process ended with code {worker.process.exitcode}")
    except (ValueError, RecursionError):
        return WorkerError("its process replied with something else than JSON")


def _stop(worker: _Worker[In]) -> None:
    worker.connection.close()
    worker.process.kill()
    worker.process.join()
