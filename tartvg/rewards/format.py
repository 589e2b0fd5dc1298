"""rFormat: does the completion have the format?"""

from __future__ import annotations

from tartvg.rewards.term import ScoredResponse
from tartvg.types import Fault


def format_reward(scored: ScoredResponse) -> float:
    """Return 1.0 if the output has the format, else 0.0; the paper's 3 is the weight (arXiv 2508.07683, rFormat).

    Any fault fails it, except those that a setting excuses: without `answer_is_last_anchor` the answer may differ from
    the last anchor, and without `needs_anchors` there may also be no anchor. More than `anchors.max` anchors fail it:
    TAR1 grows with the square of their number, so without a cap writing many beats writing the right number.
    """
    excused: set[Fault] = set()
    if not scored.reward.answer_is_last_anchor:
        excused.add(Fault.ANSWER_MISMATCH)
    if not scored.reward.needs_anchors:
        excused |= {Fault.NO_ANCHOR, Fault.ANSWER_MISMATCH}
    is_within_cap = scored.response.num_anchors <= scored.anchors.max
    return float(is_within_cap and excused.issuperset(scored.response.faults))
