"""TAR2: the cost of a wrong number of anchors."""

from __future__ import annotations

from collections.abc import Callable

from tartvg.config import CountPenalty
from tartvg.rewards.term import ScoredResponse

_FORMS: dict[CountPenalty, Callable[[int], float]] = {
    CountPenalty.abs: lambda deviation: float(abs(deviation)),
    CountPenalty.squared: lambda deviation: float(deviation**2),
    CountPenalty.indicator: lambda deviation: float(deviation != 0),
}


def tar2_cost(scored: ScoredResponse) -> float:
    """Return |N - K|, (N - K)^2 or [N != K], a cost >= 0 (arXiv 2508.07683, TAR2; the paper leaves the form open)."""
    return _FORMS[scored.reward.tar2_form](scored.response.num_anchors - scored.anchors.target)
