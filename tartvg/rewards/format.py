"""rFormat: does the completion have the format?"""

from __future__ import annotations

from tartvg.types import Fault, Response


def format_reward(
    response: Response, *, max_anchors: int, needs_anchors: bool = True, answer_is_last_anchor: bool = True
) -> float:
    """1.0 if the output has the format, else 0.0; the paper's 3 is the weight (arXiv 2508.07683, rFormat).

    Any fault fails it, except those that a setting excuses: without `answer_is_last_anchor` the answer may differ from
    the last anchor, and without `needs_anchors` there may also be no anchor. More than `max_anchors` anchors fail it:
    TAR1 grows with the square of their number, so without a cap writing many beats writing the right number.
    """
    excused: set[Fault] = set()
    if not answer_is_last_anchor:
        excused.add(Fault.ANSWER_MISMATCH)
    if not needs_anchors:
        excused |= {Fault.NO_ANCHOR, Fault.ANSWER_MISMATCH}
    is_well_formed = all(fault in excused for fault in response.faults) and response.num_anchors <= max_anchors
    return 1.0 if is_well_formed else 0.0
