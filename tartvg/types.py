"""The objects that flow through the framework, in pipeline order.

annotation -> GroundingSample -> Prompt -> Completion -> Response -> RewardBreakdown -> Rollout -> RolloutGroup
-> Trace -> Prediction -> Scorecard.  All are frozen, none imports torch, all times are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple


class Span(NamedTuple):
    """An interval of a video in seconds. `start < end` for annotations; a model may emit anything."""

    start: float
    end: float

    @property
    def length(self) -> float:
        """`end - start` in seconds; negative when reversed."""
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start:.2f} to {self.end:.2f}"


@dataclass(frozen=True)
class GroundingSample:
    """One question about one video: which seconds does `query` describe?"""

    sample_id: str
    """Unique and stable within a data set. Never (video, query): several data sets repeat that pair."""
    video: Path
    """The video file."""
    query: str
    """The normalised sentence; prompts and scores both use this text."""
    windows: tuple[Span, ...]
    """Ground truth, in seconds, at least one unless the annotation is a blind test set."""
    duration: float
    """Length of the video in seconds, as the annotation says."""
    split: str
    """`train`, `val` or `test`."""
    tags: tuple[str, ...] = ()
    """Free labels for reports, such as the kind of event."""
    source: str = field(default="", metadata={"is_left_out_when_empty": True})
    """The part of a mix that it comes from, with which its id begins; empty, and in no record, without a mix."""

    @property
    def own_id(self) -> str:
        """The id inside its data set, without the part of a mix."""
        return self.sample_id.removeprefix(f"{self.source}/") if self.source else self.sample_id

    @property
    def target(self) -> Span:
        """The first ground-truth window; `reward.truth` says what training makes of the others."""
        return self.windows[0]


@dataclass(frozen=True)
class Prompt:
    """What the model reads: the user turn's text, placed before the video of `sample`."""

    sample: GroundingSample
    text: str


@dataclass(frozen=True)
class Completion:
    """What the model said, with what is needed to train on it."""

    text: str
    token_ids: tuple[int, ...]
    """Completion tokens, including the end token when it was sampled."""
    logps: tuple[float, ...]
    """Log-probability (nats) of each token under the policy that sampled it, at its temperature (greedy: 1)."""
    is_finished: bool
    """False when the length limit cut the completion."""


class Fault(str, Enum):
    """One thing that is wrong with a completion's format. The parser reports each kind at most once."""

    NO_THINK = "no_think"
    THINK_UNCLOSED = "think_unclosed"
    THINK_REPEATED = "think_repeated"
    UNWANTED_THINK = "unwanted_think"
    """A think block where the answer alone was asked for."""
    NO_ANSWER = "no_answer"
    ANSWER_UNCLOSED = "answer_unclosed"
    ANSWER_REPEATED = "answer_repeated"
    ANSWER_UNREADABLE = "answer_unreadable"
    ANSWER_REVERSED = "answer_reversed"
    NO_ANCHOR = "no_anchor"
    ANCHOR_UNCLOSED = "anchor_unclosed"
    ANCHOR_UNREADABLE = "anchor_unreadable"
    ANCHOR_REVERSED = "anchor_reversed"
    ANCHOR_OUTSIDE_THINK = "anchor_outside_think"
    ANSWER_MISMATCH = "answer_mismatch"
    """The answer is not the last anchor."""
    STRAY_TEXT = "stray_text"
    """Text outside the two blocks."""
    ORDER = "order"
    """The answer comes before the end of the reasoning."""


@dataclass(frozen=True)
class Response:
    """A completion, read: the well-formed anchors in order, the answer, and everything that is wrong."""

    anchors: tuple[Span, ...]
    answer: Span | None
    """None when no answer could be read."""
    faults: tuple[Fault, ...]
    reasoning: str = ""
    """The text of the think block without its tags; empty when there is none."""

    @property
    def num_anchors(self) -> int:
        """N of the reward formulas."""
        return len(self.anchors)


@dataclass(frozen=True)
class RewardBreakdown:
    """The reward of one response: the total that trains, and the raw terms that it is made of."""

    total: float
    terms: Mapping[str, float]
    """Each term before its weight, by the names of `rewards.rubric.TERMS` and in that order."""
    anchor_ious: tuple[float, ...] = ()
    """Soft IoU of each anchor with the truth, in order."""


@dataclass(frozen=True)
class Rollout:
    """One sampled completion, read and judged."""

    completion: Completion
    response: Response
    reward: RewardBreakdown


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of one prompt: the unit of advantages and of the loss."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    step: int
    """Optimiser step that these rollouts belong to, from 0."""


@dataclass(frozen=True)
class Trace:
    """A rollout that passed the filter: one example for supervised fine-tuning."""

    sample_id: str
    text: str
    reward: float
    anchor_ious: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """One evaluated completion. `predictions.jsonl` holds one per line."""

    sample_id: str
    sample_index: int
    """0 is the greedy answer, 1.. are samples at the evaluation temperature."""
    query: str
    video: str
    windows: tuple[Span, ...]
    duration: float
    text: str
    anchors: tuple[Span, ...]
    answer: Span | None
    faults: tuple[str, ...]
    is_finished: bool
    seconds: float = 0.0
    """Wall time of the batch divided by its completions."""


class Estimate(NamedTuple):
    """A mean with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


NO_ESTIMATE = Estimate(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Scorecard:
    """Scores of one set of predictions. Shares and IoUs are in [0, 1]."""

    num_queries: int
    num_unparsed: int
    num_missing: int
    miou: Estimate
    recall: dict[float, Estimate] = field(default_factory=dict)
    """R1@threshold, keyed by the threshold."""
    format_rate: Estimate = NO_ESTIMATE
    """Share of sampled outputs whose format is right, whatever the number of anchors."""
    valid_rate: Estimate = NO_ESTIMATE
    """Share of sampled outputs with the right format and at least two anchors (the paper's format figure)."""
    count_mean: float = 0.0
    """Anchors per sampled output."""
    anchored_rate: float = 0.0
    """Share of sampled outputs whose reasoning holds at least one anchor."""
    refinement_rate: float = 0.0
    """Share of successive anchors whose soft IoU grew."""
    answer_match_rate: float = 0.0
    """Share of answers that equal the last anchor."""
    oracle_iou: float = 0.0
    """Mean over queries of the best sampled answer's IoU: what the policy could say if it chose well."""
    first_iou: float = 0.0
    """Mean IoU of the first anchor of the greedy answers that have one."""
    last_iou: float = 0.0
    """Mean IoU of the last anchor of the same."""
    equal_rate: float = 0.0
    """Share of greedy answers with several anchors whose last one repeats the first."""
    first_exact_rate: float = 0.0
    """Share of the same whose first anchor is the truth, to the second decimal."""
    inexact_refined_rate: float = 0.0
    """Share of those whose first anchor is not exact that end closer to the truth."""
    inexact_worsened_rate: float = 0.0
    """Share of the same that end farther from the truth."""
