"""The headline numbers of a stage: its last and its best value of every metric, from metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

HIGHER_IS_BETTER = (
    "reward/total_mean",
    "reward/format_mean",
    "reward/iou_mean",
    "anchors/valid_rate",
    "anchors/target_rate",
    "anchors/refinement_rate",
    "anchors/answer_match_rate",
    "anchors/first_iou_mean",
    "anchors/last_iou_mean",
    "eval/val/miou",
)
LOWER_IS_BETTER = ("loss/total",)
"""Of supervised training only: the loss of GRPO is zero on average and says nothing."""


def best_and_last(lines: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """`last/<metric>` of every metric and `best/<metric>` where one direction is better; finite values only.

    W&B keeps the last value by itself, but only of what the present process logged: a resumed run needs the file.
    """
    last: dict[str, float] = {}
    best: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            if value is None or not math.isfinite(value):
                continue
            last[name] = value
            if name in HIGHER_IS_BETTER:
                best[name] = max(value, best.get(name, -math.inf))
            elif name in LOWER_IS_BETTER:
                best[name] = min(value, best.get(name, math.inf))
    if "reward/total_mean" in last:
        best = {name: value for name, value in best.items() if name not in LOWER_IS_BETTER}
    return {f"last/{n}": v for n, v in last.items()} | {f"best/{n}": v for n, v in best.items()}
