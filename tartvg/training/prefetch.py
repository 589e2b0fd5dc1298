"""The items of a data set in order, made ahead by worker processes that may die or hang.

Not torch's DataLoader: when one of its workers is killed while it sends (the system does that to whoever takes too much
memory), the training waits for the rest of the message for ever. Here the end of a process ends its pipe.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

MAX_DEATHS = 2
"""Workers that may die over one item before it is made the careful way."""

Item = TypeVar("Item", covariant=True)


class Source(Protocol[Item]):
    """What can be loaded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item: ...

    def isolated(self, index: int, /) -> Item:
        """The same item, made so that nothing that goes wrong in it harms this process."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection


class OrderedLoader(Generic[Item]):
    """Iterates over `source`, with `num_workers` items in the making; 0 makes them here, without protection.

    A worker that dies, or takes longer than `timeout_s` seconds over one item, is replaced and nothing is lost. An
    error that an item raises is raised here.
    """

    def __init__(self, source: Source[Item], num_workers: int, timeout_s: float) -> None:
        self.source = source
        self.num_workers = num_workers
        self.timeout_s = timeout_s

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[Item]:
        if not self.num_workers:
            yield from (self.source[index] for index in range(len(self)))
            return
        workers = [self._start() for _ in range(min(self.num_workers, len(self)))]
        try:
            for place in range(len(workers)):
                self._ask(workers, place, place)
            for index in range(len(self)):
                place = index % len(workers)
                item = self._receive(workers, place, index)
                self._ask(workers, place, index + len(workers))
                yield item
        finally:
            for worker in workers:
                _stop(worker)

    def _start(self) -> _Worker:
        # fork, as torch does: the source need not travel. Our copy of their end is closed before the next fork.
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self.source, theirs, ours), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _ask(self, workers: list[_Worker], place: int, index: int) -> None:
        """Give a worker its next item, if there is one; its successor, where it died after the last."""
        if index >= len(self):
            return
        try:
            workers[place].connection.send(index)
        except OSError:
            _stop(workers[place])
            workers[place] = self._start()
            workers[place].connection.send(index)

    def _receive(self, workers: list[_Worker], place: int, index: int) -> Item:
        for attempt in range(MAX_DEATHS):
            if attempt:
                self._ask(workers, place, index)
            worker = workers[place]
            try:
                if not worker.connection.poll(self.timeout_s):
                    raise EOFError
                item, error = worker.connection.recv()
            except (EOFError, OSError):
                code = _stop(worker)
                print(f"item {index}: a process that decodes videos ended or hung (code {code}); replaced", flush=True)
                workers[place] = self._start()
                continue
            if error is not None:
                raise error
            return item
        return self.source.isolated(index)


def _serve(source: Any, connection: Connection, other: Connection) -> None:
    other.close()
    while True:
        try:
            index = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = (source[index], None)
        except Exception as error:
            answer = (None, error)
        connection.send(answer)


def _stop(worker: _Worker) -> int | None:
    """End it; its exit code."""
    worker.connection.close()
    worker.process.kill()
    worker.process.join()
    return worker.process.exitcode
