"""TAR3: each anchor should improve on the one before."""

from __future__ import annotations

from itertools import pairwise

from tartvg.rewards.term import ScoredResponse


def tar3_rewards(scored: ScoredResponse) -> list[float]:
    """Return 0 for the first anchor, then delta_2 .. delta_N (arXiv 2508.07683, TAR3).

    delta is +1 where IoU grew and -1 where it did not; a tie is -1, so repeating an anchor costs.
    """
    ious = scored.anchor_ious
    return [0.0] * min(1, len(ious)) + [1.0 if after > before else -1.0 for before, after in pairwise(ious)]
