"""rsIoU: overlap of the answer with the truth."""

from __future__ import annotations

from collections.abc import Callable

from tartvg import spans
from tartvg.config import IouKind
from tartvg.rewards.term import ScoredResponse
from tartvg.types import Span

OVERLAPS: dict[IouKind, Callable[[Span, tuple[Span, ...]], float]] = {
    IouKind.soft: spans.soft_iou_with_union,
    IouKind.hard: spans.iou_with_union,
}


def iou_reward(scored: ScoredResponse) -> float:
    """Return the answer's overlap with the truth, in (-1, 1] if soft and [0, 1] if hard (arXiv 2508.07683, rsIoU).

    An answer that could not be read gets `reward.unparsed_iou`; at -1, the infimum of soft IoU, being unreadable never
    beats being wrong.
    """
    answer, reward = scored.response.answer, scored.reward
    return reward.unparsed_iou if answer is None else OVERLAPS[reward.iou](answer, scored.truth)
