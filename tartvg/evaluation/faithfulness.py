"""Does the reasoning depend on the video? Answers to the true video beside answers to a control. No torch.

A control is the same question about a video that should change the answer: the same frames in another order, the
video of another query, or the same frames with other times. A policy that reads its times off the video answers these
differently; one that has learnt which times are usual answers them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean

from tartvg.spans import iou
from tartvg.types import Span

TOLERANCE = 0.005
"""Seconds; half a unit of the format's last digit."""
SHIFT_S = 5.0
"""Seconds by which the control `shifted_stamps` moves all times that the prompt tells."""


@dataclass(frozen=True)
class Said:
    """The times of one answer."""

    anchors: tuple[Span, ...]
    answer: Span | None

    @property
    def spans(self) -> tuple[Span, ...]:
        """Anchors in order, then the answer; empty when nothing could be read."""
        return (*self.anchors, self.answer) if self.answer is not None else self.anchors

    def later(self, seconds: float) -> Said:
        """The same answer with all its times moved."""
        answer = None if self.answer is None else moved(self.answer, seconds)
        return Said(tuple(moved(anchor, seconds) for anchor in self.anchors), answer)


def moved(span: Span, seconds: float) -> Span:
    """A span so many seconds later."""
    return Span(span.start + seconds, span.end + seconds)


@dataclass(frozen=True)
class Pair:
    """One question about its own video and about a control, both answered greedily."""

    real: Said
    control: Said


@dataclass(frozen=True)
class Agreement:
    """How alike the answers of a policy are with and without the right video. Shares and IoUs are in [0, 1]."""

    num_pairs: int
    """Questions with times in at least one of the two answers; nothing else is compared."""
    agreement: float
    """Mean over these questions of the mean IoU of times that stand at the same place: 1 for a blind policy."""
    changed_rate: float
    """Share of these questions whose times differ anywhere, by more than 5 ms."""


def compare(pairs: Sequence[Pair]) -> Agreement | None:
    """Agreement over all pairs; None when no answer holds a time.

    Times are compared in order: first anchor with first anchor, and so on, then answer with answer. A time without
    its counterpart has IoU 0.
    """
    told = [pair for pair in pairs if pair.real.spans or pair.control.spans]
    if not told:
        return None
    alike = [_overlaps(pair) for pair in told]
    changed = [_is_changed(pair) for pair in told]
    return Agreement(len(told), fmean(map(fmean, alike)), fmean(changed))


def _places(pair: Pair) -> list[tuple[Span | None, Span | None]]:
    anchors = list(zip_longest(pair.real.anchors, pair.control.anchors))
    if pair.real.answer is None and pair.control.answer is None:
        return anchors
    return [*anchors, (pair.real.answer, pair.control.answer)]


def _overlaps(pair: Pair) -> list[float]:
    return [0.0 if a is None or b is None else iou(a, b) for a, b in _places(pair)]


def _is_changed(pair: Pair) -> bool:
    return any(
        a is None or b is None or max(abs(a.start - b.start), abs(a.end - b.end)) > TOLERANCE for a, b in _places(pair)
    )
