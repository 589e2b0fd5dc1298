"""TAR3: each anchor should improve on the one before."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def refinements(anchor_ious: Sequence[float]) -> list[int]:
    """delta_2 .. delta_N: +1 where IoU grew, -1 where it did not; a tie is -1, so repeating an anchor costs."""
    return [1 if after > before else -1 for before, after in pairwise(anchor_ious)]


def tar3_reward(anchor_ious: Sequence[float]) -> float:
    """sum over i = 2..N of delta_i (arXiv 2508.07683, TAR3); 0 for fewer than two anchors."""
    return float(sum(refinements(anchor_ious)))
