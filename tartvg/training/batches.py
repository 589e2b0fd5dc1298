"""Which prompts each step trains on: a pure function of seed and step, so that a restart needs no sampler state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from torch.utils.data import Dataset

from tartvg.config import FramesConfig
from tartvg.data.clips import ClipReader
from tartvg.data.packets import VideoError
from tartvg.data.video import Clip
from tartvg.training.prefetch import OrderedLoader
from tartvg.types import Prompt

GRACE_S = 30.0
"""Seconds on top of the time limits of an item's videos before its worker counts as hanging."""


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

    def __init__(
        self, step: int, prompts: Sequence[Prompt], clips: Sequence[Clip | None],
        places: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """A clip is None where it is still to be read."""
        self.step = step
        self.places = tuple(range(len(prompts)) if places is None else places)
        """Of each prompt among those of all processes."""
        self.prompts = tuple(prompts)
        self.clips = tuple(clips)


class StepDataset(Dataset[StepBatch]):
    """The steps from `start` to `stop`, as a sized data set: an endless stream would be prefetched one policy ahead.

    With `frames` the videos are decoded here, which is in the loader's worker processes. `share` is (r, n): of n
    processes this is number r, and it gets every n-th prompt of a step.
    """

    def __init__(
        self, prompts: Sequence[Prompt], per_step: int, seed: int, start: int, stop: int,
        frames: FramesConfig | None, clips: ClipReader | None = None, share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        self.prompts = prompts
        self.per_step = per_step
        self.seed = seed
        self.start = start
        self.stop = stop
        self.frames = frames
        self.clips = clips or ClipReader()
        self.share = share

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> StepBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        places, chosen = self.chosen(index)
        return StepBatch(self.start + index, chosen, [self._clip(p) for p in chosen], places)

    def chosen(self, index: int) -> tuple[range, list[Prompt]]:
        """Places and prompts of one item."""
        indices = step_indices(self.seed, self.start + index, self.per_step, len(self.prompts))
        places = range(self.share[0], len(indices), self.share[1])
        return places, [self.prompts[indices[place]] for place in places]

    def isolated(self, index: int) -> StepBatch:
        """The same item with nothing read ahead: it is left to the policy's decoder, which may crash or hang."""
        places, chosen = self.chosen(index)
        return StepBatch(self.start + index, chosen, [None] * len(chosen), places)

    def _clip(self, prompt: Prompt) -> Clip | None:
        if self.frames is None:
            return None
        try:
            return self.clips.read(prompt.sample.video, self.frames)
        except VideoError:
            return None  # the policy finds it on the list of the run and reports it


def first(batch: list[StepBatch]) -> StepBatch:
    """Collate: a step is a batch already."""
    return batch[0]


def step_loader(dataset: StepDataset, num_workers: int) -> OrderedLoader[StepBatch]:
    """One item per step, in order."""
    decoding = 0.0 if dataset.frames is None else dataset.frames.timeout_s
    return OrderedLoader(dataset, num_workers, decoding * dataset.per_step + GRACE_S)
