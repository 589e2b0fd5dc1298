"""Interval arithmetic on seconds: the only IoU in the house. Pure Python, no torch.

Every function takes two spans and never raises on finite numbers; a reversed span is an empty one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tartvg.types import Span

TOLERANCE = 0.005
"""Seconds: half a unit of the second decimal, which answers have."""
_ROUNDING = 1e-9
"""Slack of comparisons with the tolerance: 13.105 - 13.1 is 0.005 and a bit in floating point."""


def intersection(a: Span, b: Span) -> float:
    """Seconds that both spans cover; 0 when disjoint or when either is reversed."""
    if a.length < 0 or b.length < 0:
        return 0.0
    return max(0.0, min(a.end, b.end) - max(a.start, b.start))


def iou(a: Span, b: Span) -> float:
    """Intersection over union in [0, 1]; 0 when the union has no length."""
    overlap = intersection(a, b)
    if overlap <= 0.0:
        return 0.0
    return overlap / (a.length + b.length - overlap)


def soft_iou(a: Span, b: Span) -> float:
    """Overlap (negative: gap) over hull, in (-1, 1]: the paper's soft IoU, without max(0, .).

    (min(e, e') - max(s, s')) / (max(e, e') - min(s, s')): one-dimensional generalised IoU. Two spans that overlap
    get their IoU; two that do not get minus the share of the hull that lies between them. A hull without length
    (two equal instants) gives 0. A reversed span is never rewarded: its value is at most 0.
    """
    hull = max(a.end, b.end) - min(a.start, b.start)
    if a.length < 0 or b.length < 0:
        low = Span(min(a.start, a.end), max(a.start, a.end))
        other = Span(min(b.start, b.end), max(b.start, b.end))
        return min(0.0, soft_iou(low, other))
    if hull <= 0.0:
        return 0.0
    return (min(a.end, b.end) - max(a.start, b.start)) / hull


def is_same(a: Span, b: Span, tolerance: float = TOLERANCE) -> bool:
    """Whether both ends differ by no more than `tolerance` seconds."""
    return max(abs(a.start - b.start), abs(a.end - b.end)) <= tolerance + _ROUNDING


class Refinement(NamedTuple):
    """The first of some anchors beside the last; for a single anchor they are the same one."""

    first: float
    """IoU in [0, 1]."""
    last: float
    best: float
    """Of the best anchor."""
    is_equal: bool
    """Whether the last anchor repeats the first."""
    is_first_exact: bool
    """Whether the first anchor is the truth, to the second decimal: it cannot be refined."""
    trend: int
    """1 where the last anchor is closer to the truth than the first by soft IoU, -1 where it is farther, else 0."""


def refinement(anchors: Sequence[Span], windows: Sequence[Span]) -> Refinement:
    """Compare the first and the last of at least one anchor with the nearest of the true windows."""
    first, last = anchors[0], anchors[-1]
    ious = [max(iou(anchor, window) for window in windows) for anchor in anchors]
    before, after = (max(soft_iou(anchor, window) for window in windows) for anchor in (first, last))
    is_exact = any(is_same(first, window) for window in windows)
    return Refinement(ious[0], ious[-1], max(ious), is_same(first, last), is_exact, (after > before) - (after < before))


def refinement_rates(found: Sequence[Refinement]) -> dict[str, float]:
    """Shares in [0, 1] of answers; 0 of none. The last two are of those whose first anchor can be refined.

    equal_rate: the last anchor repeats the first; first_exact_rate: the first is the truth; inexact_refined_rate and
    inexact_worsened_rate: the last is closer to the truth than the first, and farther from it.
    """
    inexact = [r for r in found if not r.is_first_exact]
    return {
        "equal_rate": _share(r.is_equal for r in found),
        "first_exact_rate": _share(r.is_first_exact for r in found),
        "inexact_refined_rate": _share(r.trend > 0 for r in inexact),
        "inexact_worsened_rate": _share(r.trend < 0 for r in inexact),
    }


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def clip(span: Span, duration: float) -> Span:
    """The part of `span` inside [0, duration]; an instant at the nearer edge when nothing is inside."""
    return Span(min(max(span.start, 0.0), duration), min(max(span.end, 0.0), duration))


def union(spans: list[Span] | tuple[Span, ...]) -> list[Span]:
    """The same covered seconds as disjoint spans in ascending order; reversed and empty spans are left out."""
    merged: list[Span] = []
    for span in sorted(s for s in spans if s.length > 0):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def iou_with_union(prediction: Span, windows: tuple[Span, ...]) -> float:
    """IoU of one span with the union of several windows, as sets of seconds."""
    parts = union(windows)
    overlap = sum(intersection(prediction, part) for part in parts)
    if overlap <= 0.0:
        return 0.0
    return overlap / (prediction.length + sum(part.length for part in parts) - overlap)


def soft_iou_with_union(prediction: Span, windows: tuple[Span, ...]) -> float:
    """Soft IoU of one span A with the union W of several windows, in (-1, 1]; 0 without windows.

    (|A and W| - g) / (|A or W| + g), where g is the distance in seconds between A and the nearest part of W. Two
    disjoint intervals A and B leave a gap g inside their hull, which is thus |A or B| + g long, so their `soft_iou` is
    -g / (|A or B| + g); W in the place of B gives the form above. It is `iou_with_union` where A and W overlap, 0 where
    they touch, and falls towards -1 the farther A is from the nearest part. One window gives `soft_iou`, to the bit.
    """
    parts = union(windows)
    if len(parts) < 2:
        return soft_iou(prediction, (*parts, *windows)[0]) if windows else 0.0
    if prediction.length < 0:
        return min(0.0, soft_iou_with_union(Span(prediction.end, prediction.start), windows))
    overlap = iou_with_union(prediction, windows)
    if overlap > 0.0:
        return overlap
    gap = max(0.0, min(max(part.start - prediction.end, prediction.start - part.end) for part in parts))
    covered = prediction.length + sum(part.length for part in parts)
    return 0.0 - gap / (covered + gap)
