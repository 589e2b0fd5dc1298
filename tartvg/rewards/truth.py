"""Which of a query's windows is the truth for one response."""

from __future__ import annotations

from tartvg.config import Truth
from tartvg.spans import soft_iou
from tartvg.types import GroundingSample, Response, Span


def truth_of(response: Response, sample: GroundingSample, rule: Truth) -> tuple[Span, ...]:
    """Return the windows that the answer and all anchors are compared with: one, or all for the union.

    `best` takes the window of highest soft IoU with the answer, the earlier in the annotation of equals, so that the
    anchors refine one moment instead of jumping between two. Without a readable answer the last anchor stands in for
    it, and without an anchor nothing is compared. Raises ValueError for a sample without windows.
    """
    windows = sample.windows
    if not windows:
        raise ValueError(f"sample {sample.sample_id!r} has no ground-truth window to reward against")
    if rule is Truth.all:
        return windows
    said = response.answer or next(reversed(response.anchors), None)
    if rule is Truth.first or said is None:
        return (sample.target,)
    return (max(windows, key=lambda window: soft_iou(said, window)),)
