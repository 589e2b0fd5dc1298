"""TAR1: anchors near the truth, later ones counting more."""

from __future__ import annotations

from collections.abc import Sequence


def tar1_reward(anchor_ious: Sequence[float]) -> float:
    """sum over i = 1..N of i * IoU_i, not normalised (arXiv 2508.07683, TAR1).

    Unnormalised because the paper's filter keeps totals above 6.4: divided by the sum of the weights, the best total
    would be 6.
    """
    return sum(position * iou for position, iou in enumerate(anchor_ious, start=1))
