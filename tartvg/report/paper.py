"""What the paper reports (arXiv 2508.07683), by the override of the row that repeats it. Charades-STA, Qwen2.5-VL-7B.

None of it was measured here: tables show it in columns of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from tartvg.report.tables import DASH, Cell

METRICS = ("mIoU", "R1@0.3", "R1@0.7")
WHOLE_METHOD = {"mIoU": 61.1, "R1@0.3": 83.6, "R1@0.7": 50.2}
NUMBERS: dict[str, dict[str, float]] = {
    "anchors=one": {"mIoU": 59.3},
    "anchors=two": WHOLE_METHOD,
    "anchors=three": {"mIoU": 41.3},
    "reward=tar": WHOLE_METHOD,
    "experiments=stage_order/grpo_sft_grpo": WHOLE_METHOD,
}
NOTE = (
    "Columns that begin with “paper” hold what the paper reports for Charades-STA with a 7B model (arXiv 2508.07683): "
    "other data and another model, not comparable number by number. "
)
NOTES = {
    "anchors": "Its third row is “3 or more”.",
    "reward": "It adds that TAR3 raises R1@0.7 by 4.2, and gives no other number of its components.",
}


def paper_cells(overrides: Sequence[str]) -> dict[str, Cell] | None:
    """The paper's numbers for a row, by metric; None if it reports none."""
    for override in overrides:
        if override in NUMBERS:
            values = NUMBERS[override]
            return {m: Cell(f"{values[m]:.1f}" if m in values else DASH, is_paper=True) for m in METRICS}
    return None


def paper_note(axes: Sequence[str]) -> str:
    """What to say under a table with these axes and the paper's columns."""
    return NOTE + " ".join(NOTES[axis] for axis in axes if axis in NOTES)
