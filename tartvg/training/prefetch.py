"""Clips ahead of their use: threads over decoder processes, while the policy answers the batch before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from tartvg.data.ahead import ahead
from tartvg.data.packets import VideoError
from tartvg.data.video import Clip
from tartvg.policy.policy import Policy
from tartvg.training.batches import StepBatch
from tartvg.types import Prompt

T = TypeVar("T")
Step = TypeVar("Step", bound=StepBatch)
Step_co = TypeVar("Step_co", bound=StepBatch, covariant=True)
Clips = dict[Path, Clip]
"""By video. What is missing in it is left to `Policy.prepare`: it is cached, or not read ahead, or cannot be read."""


def clips_ahead(
    batches: Iterable[T], videos_of: Callable[[T], Iterable[Path]], policy: Policy, num_workers: int
) -> Iterator[tuple[T, Clips]]:
    """Yield each batch with its clips, in order, while `num_workers` decoders work on the next ones; 0: no clips.

    In main memory are the clips of the batch that is used and of the next one; of smaller batches `num_workers` more
    clips, and what completes the last of their batches. A clip takes 3 bytes a pixel: by `FramesConfig` about
    6 `total_pixels` at most, or 3.15 `max_frames` x `min_pixels` if that is more. The policy's answers do not depend
    on `num_workers`.
    """

    def unknown(batch: T) -> list[Path]:
        return [video for video in dict.fromkeys(videos_of(batch)) if not policy.has_features(video)]

    def read(video: Path) -> Clip | None:
        try:
            return policy.read(video)
        except VideoError:
            return None  # the policy finds it on the list of the run and reports it

    if not num_workers:
        yield from ((batch, {}) for batch in batches)
        return
    read_ahead = ahead(batches, unknown, read, num_workers, num_workers)
    while True:
        with policy.timer("decode"):  # what is left of it: waiting for the decoders
            following = next(read_ahead, None)
        if following is None:
            return
        batch, found = following
        clips = {video: clip for video, clip in found.items() if clip is not None}
        found.clear()
        yield batch, clips


def videos_of(prompts: Iterable[Prompt]) -> list[Path]:
    """Return the video of each prompt."""
    return [prompt.sample.video for prompt in prompts]


class Steps(Protocol[Step_co]):
    """The steps of a training."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Step_co: ...


class StepLoader(Generic[Step]):
    """One item per step, in order, with clips ahead; sized, as an endless stream would be fetched one policy ahead."""

    def __init__(self, steps: Steps[Step], policy: Policy, num_workers: int) -> None:
        """`num_workers` decoders work ahead; with 0 each clip is decoded where it is used."""
        self.steps = steps
        self.policy = policy
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        batches = (self.steps[index] for index in range(len(self)))
        for batch, clips in clips_ahead(batches, lambda b: videos_of(b.prompts), self.policy, self.num_workers):
            batch.clips = clips
            yield batch
            clips.clear()


def split(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut a sequence into batches of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]
