"""One question about one video: how stage=ground and the page of stage=serve ask it, greedily as evaluation does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tartvg.config import AnchorsConfig, SamplingConfig
from tartvg.data.video import Clip
from tartvg.policy.policy import Policy
from tartvg.policy.sampling import greedy
from tartvg.prompts import build_prompt
from tartvg.types import Completion, GroundingSample

Tell = Callable[[str], None]
"""Told the text so far, token after token. What it raises ends the answer."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of the first bytes of a letter."""


def ask(
    policy: Policy, video: Path, query: str, anchors: AnchorsConfig, sampling: SamplingConfig,
    clip: Clip | None = None, tell: Tell | None = None,
) -> Completion:  # fmt: skip
    """Answer greedily; `sampling` limits the length. Raises VideoError where no `clip` is given."""
    sample = GroundingSample(video.stem, video, query, (), 0.0 if clip is None else clip.duration, "test")
    prepared = policy.prepare(build_prompt(sample, anchors), clip)
    ids: list[int] = []

    def watch(newest: list[int]) -> None:
        ids.extend(newest)
        if tell is not None:
            tell(policy.text_of(ids).rstrip(UNFINISHED))

    return policy.sample([prepared], 1, greedy(sampling), [0], watch=watch if tell else None)[0][0]
