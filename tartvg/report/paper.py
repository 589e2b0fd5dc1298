"""What the paper reports (arXiv 2508.07683), by the override of the row that repeats it. Charades-STA, Qwen2.5-VL-7B.

None of it was measured here: tables show it in columns of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from tartvg.report.tables import DASH, Cell, Table

METRICS = ("mIoU", "R1@0.3", "R1@0.7")
WHOLE_METHOD = {"mIoU": 61.1, "R1@0.3": 83.6, "R1@0.7": 50.2}
STATED = frozenset(
    {
        "anchors=two",
        "reward=tar",
        "experiments=stage_order/grpo_sft_grpo",
        "reward.beta=5",
        "reward.gamma=1",
        "filter.min_reward=6.4",
        "filter.min_ious=[0.5,0.7]",
    }
)
"""Settings of the paper's method that it states."""
LEFT_OPEN = frozenset(
    {
        "grpo.kl_coef=0.04", "grpo.group_size=8", "reward.tar2_form=abs", "grpo.credit=outcome", "reward.truth=best",
        "difficulty=all",
    }
)  # fmt: skip
"""What we take for the paper's method where it states nothing; conf/ says why."""
DEVIATIONS: dict[str, dict[str, float]] = {"anchors=one": {"mIoU": 59.3}, "anchors=three": {"mIoU": 41.3}}
"""Single changes of the method for which the paper has numbers."""
NOTE = (
    "Columns that begin with “paper” hold what the paper reports for Charades-STA with a 7B model (arXiv 2508.07683): "
    "other data and another model, not comparable number by number. "
)
NOTES = {
    "anchors": "Its third row is “3 or more”.",
    "reward": "It adds that TAR3 raises R1@0.7 by 4.2, and gives no other number of its components.",
}


def repeats_paper(choices: Sequence[str]) -> bool:
    """Return whether a row repeats the paper's method; `choices` are the overrides that tell it from the other rows."""
    return bool(choices) and all(choice in STATED | LEFT_OPEN for choice in choices)


def paper_cells(choices: Sequence[str]) -> dict[str, Cell] | None:
    """The paper's numbers for a row, by metric; None if it reports none for just these choices."""
    changed = [choice for choice in choices if choice not in STATED | LEFT_OPEN]
    if not changed and STATED.intersection(choices):
        return {m: _cell(WHOLE_METHOD, m) for m in METRICS}
    if len(changed) == 1 and changed[0] in DEVIATIONS:
        return {m: _cell(DEVIATIONS[changed[0]], m) for m in METRICS}
    return None


def paper_note(axes: Sequence[str]) -> str:
    """What to say under a table with these axes and the paper's columns."""
    return NOTE + " ".join(NOTES[axis] for axis in axes if axis in NOTES)


def paper_tables() -> tuple[Table, Table]:
    """What the paper reports: other data and another model than a run's."""
    note = "Reported by the paper. Other data and another model: not comparable with this run number by number."
    scores = tuple(_cell(WHOLE_METHOD, m) for m in METRICS)
    anchors = tuple(_cell(v, "mIoU") for v in (DEVIATIONS["anchors=one"], WHOLE_METHOD, DEVIATIONS["anchors=three"]))
    return (
        Table("The paper: Charades-STA, 7B", ("", *METRICS), ((Cell("TAR-TVG"), *scores),), note),
        Table("The paper: number of anchors", ("", "1", "2", "3 or more"), ((Cell("mIoU"), *anchors),), note),
    )


def _cell(values: dict[str, float], metric: str) -> Cell:
    return Cell(f"{values[metric]:.1f}" if metric in values else DASH, is_paper=True)
