"""The arithmetic of a comparison: what sharing can save at most, and times taken in turns. No torch.

Legend: P prompt tokens, C completion tokens, G rollouts per prompt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


def token_ratio(prompt: int, completion: int, group: int) -> float:
    """G (P + C) / (P + G C): tokens of the naive pass over tokens of the shared one, the limit of what is linear."""
    return group * (prompt + completion) / (prompt + group * completion)


def own_share(prompt: int, completion: int) -> float:
    """C / (P + C): what one more completion may cost beside one more whole sequence."""
    return completion / (prompt + completion)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, several times."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    """Seconds of all threads of this process: what other work on the machine disturbs least."""

    @property
    def median_wall(self) -> float:
        """The middle wall time."""
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        """The middle CPU time."""
        return statistics.median(self.cpu)

    def over(self, other: Timing) -> tuple[float, float]:
        """How many times as long as `other`: ratios of the median wall and CPU times."""
        return self.median_wall / other.median_wall, self.median_cpu / other.median_cpu


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int, wait: Callable[[], None]) -> dict[str, Timing]:
    """Time the calls one after another, `repeats` times around, after one unmeasured turn each.

    Whatever disturbs the machine for a while disturbs all of them. `wait` returns when the device has finished.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            wait()
            if turn:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: Timing(*map(tuple, zip(*rows, strict=True))) for name, rows in seconds.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
