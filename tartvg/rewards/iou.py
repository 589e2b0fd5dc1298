"""rsIoU: overlap of the answer with the truth."""

from __future__ import annotations

from collections.abc import Callable

from tartvg import spans
from tartvg.config import IouKind
from tartvg.types import Span

OVERLAPS: dict[IouKind, Callable[[Span, Span], float]] = {
    IouKind.soft: spans.soft_iou,
    IouKind.hard: spans.iou,
}


def iou_reward(answer: Span | None, truth: Span, *, kind: IouKind, unparsed: float) -> float:
    """Overlap of the answer with the truth, in (-1, 1] if soft and [0, 1] if hard (arXiv 2508.07683, rsIoU).

    An answer that could not be read gets `unparsed`; at -1, the infimum of soft IoU, being unreadable never beats
    being wrong.
    """
    return unparsed if answer is None else OVERLAPS[kind](answer, truth)
