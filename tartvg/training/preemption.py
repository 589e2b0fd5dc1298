"""Where the ranks of a training (one or more) stop together after a signal, with the finished steps saved.

A rank that left while others wait for it in a collective would hang them. So signals are held during training, and
act in two places only. Inside `interruptible()`, where a rank computes alone, a signal ends the work at once. In
`check()`, which all ranks call, everyone saves and exits if any rank got a signal. The step under way is lost; the
same command repeats it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tartvg.launch.signals import PREEMPTION, Preempted
from tartvg.training import distributed

T = TypeVar("T")


class Stop:
    """Interruption of one training stage."""

    def __init__(self, stage: str, save: Callable[[], None]) -> None:
        self.stage = stage
        self.save = save
        """Write a checkpoint of the finished steps, and report it by `saved`. Collective."""
        self.finished_steps: int | None = None
        """Steps of which the weights are the result; None before the training starts."""
        self.saved_step = 0
        self.is_updating = False
        """Whether the weights lie between two steps, so that nobody can stop."""

    def begin_training(self, step: int) -> None:
        """Start after `step` saved steps; from here on signals are held."""
        self.saved_step = self.finished_steps = step
        PREEMPTION.listen()  # again: Lightning has taken SIGTERM
        PREEMPTION.hold()

    def begin_update(self) -> None:
        """Mark that the weights change from here to `end_step`."""
        self.is_updating = True

    def end_step(self, finished_steps: int) -> None:
        """Mark that the weights are the result of so many steps."""
        self.finished_steps, self.is_updating = finished_steps, False

    def saved(self) -> None:
        """Note that a checkpoint of the finished steps is written."""
        assert self.finished_steps is not None
        self.saved_step = self.finished_steps

    def interruptible(self, work: Callable[[], T]) -> T | None:
        """Run work in which this rank waits for no other; None where a signal ended it. Call `check` right after."""
        if not self._can_stop:
            return work()
        try:
            self.expose()
            return work()
        except Preempted:
            return None
        finally:
            PREEMPTION.hold()

    def expose(self) -> None:
        """Let signals, also one that came before, raise Preempted from here to `PREEMPTION.hold()`."""
        if self._can_stop:
            PREEMPTION.release()

    def check(self) -> None:
        """Save the finished steps and raise Preempted on all ranks, if any rank got a signal. Collective."""
        if self._can_stop and self.is_asked():
            if self.saved_step != self.finished_steps:
                self.save()
            PREEMPTION.release(is_leaving=True)

    def is_asked(self) -> bool:
        """Return whether any rank got a signal. Collective."""
        return distributed.any_rank(PREEMPTION.received is not None)

    @contextmanager
    def around_training(self) -> Iterator[None]:
        """Stop for a signal that came after the last check, and say what is saved."""
        try:
            yield
            PREEMPTION.release(self.is_asked())
        except Preempted as stop:
            if distributed.is_rank_zero():
                print(f"{stop.reason}: stage {self.stage} is saved at step {self.saved_step}", flush=True)
            raise
        finally:
            PREEMPTION.reset()

    @property
    def _can_stop(self) -> bool:
        return self.finished_steps is not None and not self.is_updating
