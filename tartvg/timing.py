"""Where the seconds go: wall time by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = ("decode", "vision", "sample", "reward", "reference", "update", "monitor")
"""The phases of a GRPO step, in order; metrics call them `time/<phase>_s`. The last is no part of the method."""


class PhaseTimer:
    """Adds up the seconds spent inside `with timer("vision"):` blocks. Blocks must not nest."""

    def __init__(self) -> None:
        self.wait: Callable[[], None] = lambda: None
        """Wait for a device that works on while Python goes ahead, so that a phase is charged for its own work only."""
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._owner: str | None = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the block as `phase`."""
        self.wait()
        start = time.perf_counter()
        try:
            yield
            self.wait()  # not after an error, of which it could raise another one
        finally:
            self.seconds[self._owner or phase] += time.perf_counter() - start

    @contextmanager
    def booked_as(self, phase: str) -> Iterator[None]:
        """Whatever is timed inside the block counts as `phase`: what is measured for monitors is no sampling."""
        self._owner = phase
        try:
            yield
        finally:
            self._owner = None

    def flush(self) -> dict[str, float]:
        """The sums since the last flush as metrics, then start again from zero."""
        metrics = {f"time/{phase}_s": value for phase, value in self.seconds.items()}
        self.seconds = dict.fromkeys(PHASES, 0.0)
        return metrics
