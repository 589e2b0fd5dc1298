"""Work that waits for other processes, done ahead of its use by threads. No torch."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from tartvg.data.decoder_process import SENT

Batch = TypeVar("Batch")
Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")
Task = tuple["Future[Result]", Callable[[Item], Result], Item]


def ahead(
    batches: Iterable[Batch], items_of: Callable[[Batch], Iterable[Item]], function: Callable[[Item], Result],
    num_threads: int, num_ahead: int,
) -> Iterator[tuple[Batch, dict[Item, Result]]]:  # fmt: skip
    """Yield each batch with `function` of its items, in order, while threads work on the batches that follow.

    These are the next batch, and more of them as long as they have fewer than `num_ahead` items and are fewer than
    `num_ahead`. `batches` and `items_of` run in the caller's thread; without threads `function` does, too. What
    `function` raises is raised where its batch is due.
    """
    source = iter(batches)
    if not num_threads:
        yield from ((batch, {item: function(item) for item in items_of(batch)}) for batch in source)
        return
    tasks: SimpleQueue[Task[Result, Item] | None] = SimpleQueue()
    begun: deque[tuple[Batch, dict[Item, Future[Result]]]] = deque()

    def begin() -> None:
        while not begun or (len(begun) < num_ahead and sum(len(futures) for _, futures in begun) < num_ahead):
            batch = next(source, None)
            if batch is None:
                return
            futures: dict[Item, Future[Result]] = {item: Future() for item in items_of(batch)}
            begun.append((batch, futures))
            for item, future in futures.items():
                tasks.put((future, function, item))

    try:
        for _ in range(num_threads):
            # Not a ThreadPoolExecutor: the end of the interpreter waits for its threads, which wait for a decoder.
            threading.Thread(target=_work, args=(tasks,), daemon=True).start()
        begin()
        while begun:
            batch, futures = begun.popleft()
            results = {item: future.result() for item, future in futures.items()}
            del futures
            begin()
            yield batch, results
            del results
    finally:
        for _, futures in begun:
            for future in futures.values():
                future.cancel()
        for _ in range(num_threads):
            tasks.put(None)


def _work(tasks: SimpleQueue[Task[Result, Item] | None]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SENT)  # these are for the main thread, which they wake up
    while (task := tasks.get()) is not None:
        future, function, item = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)
        del task, future
