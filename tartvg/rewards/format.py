"""rFormat: does the completion have the format?"""

from __future__ import annotations

from tartvg.config import FormatKind
from tartvg.rewards.term import ScoredResponse
from tartvg.types import Fault

THINK_FAULTS = {Fault.NO_THINK, Fault.THINK_UNCLOSED, Fault.THINK_REPEATED, Fault.UNWANTED_THINK}
"""What is wrong with the think block itself."""
FLOW_FAULTS = {
    *THINK_FAULTS, Fault.NO_ANSWER, Fault.ANSWER_UNCLOSED, Fault.ANSWER_REPEATED, Fault.ORDER, Fault.STRAY_TEXT,
}  # fmt: skip
"""What keeps the output from being one block after the other, whatever they hold."""
CLOSED, FLOW, NEVER_CLOSED = 0.4, 0.3, -0.3
"""Of the graded format: the think block is closed, the whole flow is there, it was opened and never closed."""


def format_reward(scored: ScoredResponse) -> float:
    """Return 1.0 if the output has the format, else 0.0; the paper's 3 is the weight (arXiv 2508.07683, rFormat).

    Any fault fails it, except those that a setting excuses: without `answer_is_last_anchor` the answer may differ from
    the last anchor, and without `needs_anchors` there may also be no anchor. More than `anchors.max_count` anchors fail
    it: TAR1 grows with the square of their number, so without a cap writing many beats writing the right number.

    With `reward.format_kind=graded` an output that fails still earns what it has of it: see `graded`.
    """
    excused: set[Fault] = set()
    if not scored.reward.answer_is_last_anchor:
        excused.add(Fault.ANSWER_MISMATCH)
    if not scored.reward.needs_anchors:
        excused |= {Fault.NO_ANCHOR, Fault.ANSWER_MISMATCH}
    is_within_cap = scored.response.num_anchors <= scored.anchors.max_count
    if is_within_cap and excused.issuperset(scored.response.faults):
        return 1.0
    return graded(scored) if scored.reward.format_kind is FormatKind.graded else 0.0


def graded(scored: ScoredResponse) -> float:
    """Return the share of an output without the whole format, in [-0.3, 0.7]; steps of ParaVT's reward.

    0.4 for a think block that is closed (or absent, where the answer alone is asked for), 0.3 more for an answer block
    after it and nothing else; -0.3 for one that was never closed.
    """
    faults = set(scored.response.faults)
    closed = CLOSED if not faults & THINK_FAULTS else 0.0
    flow = FLOW if not faults & FLOW_FAULTS else 0.0
    return closed + flow + (NEVER_CLOSED if Fault.THINK_UNCLOSED in faults else 0.0)
