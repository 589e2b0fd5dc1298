"""Which prompts each step trains on: a pure function of seed and step, so that a restart needs no sampler state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import DataLoader, Dataset

from tartvg.config import FramesConfig
from tartvg.data.video import Clip, VideoError, read_clip
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

    def __init__(self, step: int, prompts: Sequence[Prompt], clips: Sequence[Clip | None]) -> None:
        self.step = step
        self.prompts = tuple(prompts)
        self.clips = tuple(clips)


class StepDataset(Dataset[StepBatch]):
    """The steps from `start` to `stop`, as a sized data set: an endless stream would be prefetched one policy ahead.

    With `frames` the videos are decoded here, which is in the loader's worker processes.
    """

    def __init__(
        self, prompts: Sequence[Prompt], per_step: int, seed: int, start: int, stop: int, frames: FramesConfig | None
    ) -> None:
        self.prompts = prompts
        self.per_step = per_step
        self.seed = seed
        self.start = start
        self.stop = stop
        self.frames = frames

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> StepBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step = self.start + index
        chosen = [self.prompts[i] for i in step_indices(self.seed, step, self.per_step, len(self.prompts))]
        return StepBatch(step, chosen, [self._clip(p) for p in chosen])

    def _clip(self, prompt: Prompt) -> Clip | None:
        if self.frames is None:
            return None
        try:
            return read_clip(prompt.sample.video, self.frames)
        except VideoError:
            return None  # the policy reads it again, fails in the same way and reports it


def first(batch: list[StepBatch]) -> StepBatch:
    """Collate: a step is a batch already."""
    return batch[0]


def step_loader(dataset: StepDataset, num_workers: int) -> DataLoader[StepBatch]:
    """One item per step, in order."""
    return DataLoader(dataset, batch_size=1, shuffle=False, num_workers=num_workers, collate_fn=first)
