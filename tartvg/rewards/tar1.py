"""TAR1: anchors near the truth, later ones counting more."""

from __future__ import annotations

from tartvg.rewards.term import ScoredResponse


def tar1_rewards(scored: ScoredResponse) -> list[float]:
    """Return i * IoU_i of each anchor i = 1..N; their sum is not normalised (arXiv 2508.07683, TAR1).

    Unnormalised because the paper's filter keeps totals above 6.4: divided by the sum of the weights, the best total
    would be 6.
    """
    return [position * iou for position, iou in enumerate(scored.anchor_ious, start=1)]
