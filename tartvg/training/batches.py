"""Which prompts each step trains on: a pure function of seed and step, so that a restart needs no sampler state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from torch.utils.data import Dataset

from tartvg.data.video import Clip
from tartvg.types import Prompt

_SOURCES = 1 << 32
"""Where the stream of sources begins: no epoch has this number."""


@lru_cache(maxsize=16)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(size)


def step_indices(seed: int, step: int, per_step: int, size: int) -> list[int]:
    """Return the indices of the items of one step: epochs one after another, each in an order of its own."""
    positions = range(step * per_step, (step + 1) * per_step)
    return [int(permutation(seed, position // size, size)[position % size]) for position in positions]


class Mixture:
    """Draws the prompts of a training on several data sets: from which one by chance, of each one in epochs.

    Positions count the prompts of all steps. The source of a position is drawn with the probability of its weight, by
    one stream of random numbers; the k-th position of a source is the k-th prompt of that source's epochs. So a
    position depends on the seed and on what comes before it, not on where a training starts or ends.
    """

    def __init__(self, sources: Sequence[str], weights: Mapping[str, float], seed: int, num_positions: int) -> None:
        """`sources` has one entry per prompt. Raises ValueError for a source of `weights` without any prompt."""
        self.seed = seed
        members: dict[str, list[int]] = defaultdict(list)
        for index, source in enumerate(sources):
            members[source].append(index)
        for source in weights:
            if source not in members:
                raise ValueError(f"no prompt is left of {source}")
        self.members = [members[source] for source in weights]
        shares = np.cumsum(list(weights.values())) / sum(weights.values())
        chance = np.random.default_rng([seed, _SOURCES]).random(num_positions)
        self.drawn = np.minimum(np.searchsorted(shares, chance, side="right"), len(shares) - 1)
        """The source of each position, by its position in `weights`."""
        self.turns = np.zeros(num_positions, dtype=int)
        """How many positions before have the same source."""
        for number in range(len(shares)):
            positions = np.flatnonzero(self.drawn == number)
            self.turns[positions] = np.arange(len(positions))

    def index(self, position: int) -> int:
        """The prompt of a position."""
        members = self.members[self.drawn[position]]
        epoch, turn = divmod(int(self.turns[position]), len(members))
        return members[permutation(self.seed, epoch, len(members))[turn]]


class StepBatch:
    """What the loader hands to a step. A plain class: Lightning must not look for tensors inside."""

    def __init__(self, step: int, prompts: Sequence[Prompt], indices: Sequence[int] | None = None) -> None:
        self.step = step
        self.prompts = tuple(prompts)
        self.indices = tuple(range(len(prompts)) if indices is None else indices)
        """Of each prompt among those of all processes."""
        self.clips: dict[Path, Clip] = {}
        """By video, what was decoded ahead; see `tartvg.training.prefetch`."""


class StepDataset(Dataset[StepBatch]):
    """The steps from `start` to `stop`. `share` is (r, n): rank r of n gets every n-th prompt of a step.

    `weights` are those of the sources of a mix, empty without one.
    """

    def __init__(
        self, prompts: Sequence[Prompt], per_step: int, seed: int, start: int, stop: int,
        share: tuple[int, int] = (0, 1), weights: Mapping[str, float] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.prompts = prompts
        self.per_step = per_step
        self.seed = seed
        self.start = start
        self.stop = stop
        self.share = share
        sources = [prompt.sample.source for prompt in prompts]
        self.mixture = Mixture(sources, weights, seed, per_step * stop) if weights else None

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> StepBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, (rank, world_size) = self.start + index, self.share
        indices = self.indices(step)
        positions = range(rank, len(indices), world_size)
        return StepBatch(step, [self.prompts[indices[position]] for position in positions], positions)

    def indices(self, step: int) -> list[int]:
        """The prompts of a step, of all ranks."""
        if self.mixture is None:
            return step_indices(self.seed, step, self.per_step, len(self.prompts))
        return [self.mixture.index(position) for position in range(step * self.per_step, (step + 1) * self.per_step)]
