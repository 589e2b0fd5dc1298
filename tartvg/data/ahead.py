"""Work that waits for other processes, done ahead of its use by threads. No torch."""

from __future__ import annotations

import _thread
import signal
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

from tartvg.data.decoder_process import SENT

Batch = TypeVar("Batch")
Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")
Reply = SimpleQueue[tuple[Any, BaseException | None]]
"""Of one item: what `function` returned, or raised.

Not a Future, which waits in Python: the exception of a signal in the middle of that leaves its lock in a state that
raises another exception in its place. This one waits in C.
"""


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
    tasks: SimpleQueue[tuple[Reply, Item] | None] = SimpleQueue()
    begun: deque[tuple[Batch, dict[Item, Reply]]] = deque()
    is_over = False

    def begin() -> None:
        while not begun or (len(begun) < num_ahead and sum(len(replies) for _, replies in begun) < num_ahead):
            batch = next(source, None)
            if batch is None:
                return
            replies: dict[Item, Reply] = {item: SimpleQueue() for item in items_of(batch)}
            begun.append((batch, replies))
            for item, reply in replies.items():
                tasks.put((reply, item))

    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SENT)  # these are for the main thread, which they wake up
        while (task := tasks.get()) is not None and not is_over:
            reply, item = task
            try:
                reply.put((function(item), None))
            except BaseException as error:
                reply.put((None, error))
            del task, reply

    try:
        for _ in range(num_threads):
            # Not a ThreadPoolExecutor: the end of the interpreter waits for its threads, which wait for a decoder.
            # Nor a threading.Thread: its start waits in Python, as a Future does.
            _thread.start_new_thread(work, ())
        begin()
        while begun:
            batch, replies = begun.popleft()
            results = {item: _result(reply) for item, reply in replies.items()}
            begin()
            yield batch, results
            del results
    finally:
        is_over = True
        for _ in range(num_threads):
            tasks.put(None)


def _result(reply: Reply) -> Any:
    result, error = reply.get()
    if error is not None:
        raise error
    return result
