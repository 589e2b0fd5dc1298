"""Which prompts each step trains on: a pure function of seed and step, so that a restart needs no sampler state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from tartvg.data.video import Clip
from tartvg.types import Prompt


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def step_indices(seed: int, step: int, per_step: int, size: int) -> list[int]:
    """Indices of the items of one step: epochs one after another, each in an order of its own."""
    places = range(step * per_step, (step + 1) * per_step)
    return [int(permutation(seed, place // size, size)[place % size]) for place in places]


class StepBatch:
    """What the loader hands to a step. A plain class: Lightning must not look for tensors inside."""

    def __init__(self, step: int, prompts: Sequence[Prompt], places: Sequence[int] | None = None) -> None:
        self.step = step
        self.prompts = tuple(prompts)
        self.places = tuple(range(len(prompts)) if places is None else places)
        """Of each prompt among those of all processes."""
        self.clips: dict[Path, Clip] = {}
        """By video, what was decoded ahead; see `tartvg.training.prefetch`."""


class StepDataset(Dataset[StepBatch]):
    """The steps from `start` to `stop`. `share` is (r, n): rank r of n gets every n-th prompt of a step."""

    def __init__(
        self, prompts: Sequence[Prompt], per_step: int, seed: int, start: int, stop: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        self.prompts = prompts
        self.per_step = per_step
        self.seed = seed
        self.start = start
        self.stop = stop
        self.share = share

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> StepBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, (rank, world_size) = self.start + index, self.share
        indices = step_indices(self.seed, step, self.per_step, len(self.prompts))
        places = range(rank, len(indices), world_size)
        return StepBatch(step, [self.prompts[indices[place]] for place in places], places)
