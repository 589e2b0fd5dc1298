"""How a training is interrupted: what is finished is saved, and several processes leave together.

A signal ends a process that trains alone at once, except while an update is under way. Processes that wait for each
other must not do that: one that is gone leaves the others in the middle of a message. They hold signals, let them end
only what each does on its own, and leave where they meet: after sampling, before every micro-batch, after the step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytorch_lightning as pl

from tartvg.config import Strategy
from tartvg.launch.signals import PREEMPTION, Preempted
from tartvg.training import distributed

T = TypeVar("T")


class InterruptibleModule(pl.LightningModule):
    """A module whose training can stop after any number of steps."""

    def __init__(self, name: str, strategy: Strategy) -> None:
        super().__init__()
        self.name = name
        self.leaves_together = strategy is not Strategy.single
        """Whether a signal waits until all processes meet."""
        self.finished_steps: int | None = None
        """Of which the weights are the result; None before the training has begun."""
        self.saved_step = 0
        self.is_changed = False
        """Whether an update of the step under way may have been taken: nobody can leave before the end of the step."""

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint of the finished steps. Collective."""

    def begin_training(self, step: int) -> None:
        """So many steps are done and saved."""
        self.saved_step = self.finished_steps = step
        PREEMPTION.listen()  # again: Lightning has taken SIGTERM
        if self.leaves_together:
            PREEMPTION.hold()

    def begin_change(self) -> None:
        """From here to the end of the step the weights belong to no whole number of steps."""
        self.is_changed = True
        PREEMPTION.hold()

    def end_change(self, steps: int) -> None:
        """The weights are the result of so many steps."""
        self.finished_steps, self.is_changed = steps, False

    @property
    def can_leave(self) -> bool:
        """Whether this is a place to leave for several processes."""
        return self.leaves_together and self.finished_steps is not None and not self.is_changed

    def until_signal(self, work: Callable[[], T]) -> T | None:
        """The result of work in which no process waits for another; None where a signal ended it.

        Comes before `leave_if_asked`, where all processes of that signal leave. A process that trains alone leaves at
        any signal.
        """
        if not self.can_leave:
            return work()
        try:
            PREEMPTION.release()
            return work()
        except Preempted:
            return None
        finally:
            PREEMPTION.hold()

    def leave_if_asked(self) -> None:
        """Save what is finished and leave, where one of several processes was asked to. Raises Preempted on all.

        The step that is under way is lost; after the restart it is the same again.
        """
        if self.can_leave and distributed.any_rank(PREEMPTION.received is not None):
            if self.saved_step != self.finished_steps:
                self.save()
            PREEMPTION.release(is_leaving=True)

    @contextmanager
    def preemptible(self) -> Iterator[None]:
        """Around the training: when the process is asked to leave, what is finished is saved before it does.

        The step that was under way is lost; after the restart it is the same again. Several processes have saved before
        they leave, see `leave_if_asked`.
        """
        try:
            yield
            if self.leaves_together:  # a signal after the last step was held, and may not have reached the others yet
                PREEMPTION.release(distributed.any_rank(PREEMPTION.received is not None))
        except Preempted as stop:
            PREEMPTION.hold()
            if self.finished_steps not in (None, self.saved_step) and not self.leaves_together:
                self.save()
            if distributed.is_rank_zero():
                print(f"{stop.reason}: stage {self.name} is saved at step {self.saved_step}", flush=True)
            raise
        finally:
            PREEMPTION.reset()
