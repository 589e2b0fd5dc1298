"""SIGTERM, SIGUSR1 and SIGUSR2: what a cluster sends before it takes the machine away. No torch.

The process saves what it has, ends with `REQUEUE_CODE`, and the same command continues to the same result. A signal
ends it at once, by an exception at the next line of Python, except where state would be left half-changed: such a
stretch is between `hold()` and `release()`.

SIGUSR2 is submitit's: its handler notes the attempt and has SLURM requeue the job. That ends the job, so it must not
come before the run is saved: the handler is called when the process ends.

A signal belongs to a process, so there is one `PREEMPTION` for all rooms.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType

REFUSED_CODE = 2
"""The user can correct it, and one line says how."""
REQUEUE_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, try again."""
REQUEUED = signal.SIGUSR2
"""Whoever listened to it before the run did gets it after the run."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, REQUEUED)


class Preempted(SystemExit):
    """The process was asked to leave. A SystemExit, so that no `except Exception` takes it for a failure."""

    def __init__(self, reason: str) -> None:
        super().__init__(REQUEUE_CODE)
        self.reason = reason


class Preemption:
    """Listens to the signals of this process."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the signal that came, if one did."""
        self.is_held = False
        """Whether a signal waits."""
        self._owner = 0
        self._before: Callable[[int, None], object] | None = None
        """Who listened to `REQUEUED`, until it comes."""

    def listen(self) -> None:
        """Take the signals over, from whatever listens to them now. Only from the main thread."""
        self._owner = os.getpid()
        for number in SIGNALS:
            before = signal.signal(number, self._handle)
            if number == REQUEUED and callable(before) and before != self._handle:
                self._before = before

    def reset(self) -> None:
        """Forget a hold that an error has left behind."""
        self.is_held = False

    def hold(self) -> None:
        """Make signals wait from here on."""
        self.is_held = True

    def release(self, is_leaving: bool = False) -> None:
        """Obey a signal that came meanwhile, or whose exception was lost. Raises Preempted.

        `is_leaving`: another process of this run got the signal.
        """
        self.is_held = False
        if is_leaving or self.received is not None:
            raise Preempted(self.received or "a signal to another process of this run")

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked worker: its parent decides. It dies of SIGTERM, as it would have without us.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number).name
        if number == REQUEUED and self._before is not None:
            atexit.register(_pass_on, partial(self._before, number, None))
            self._before = None
        if not self.is_held:
            raise Preempted(self.received)


def _pass_on(handler: Callable[[], object]) -> None:
    """At the end of the process: what its exception would end has ended, and what SLURM sends in reply is too late."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with suppress(SystemExit):
        handler()


PREEMPTION = Preemption()
