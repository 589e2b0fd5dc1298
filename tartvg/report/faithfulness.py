"""Does the policy look at the video? The controls of each policy as one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tartvg.evaluation.faithfulness import SHIFT_S
from tartvg.report.runs import of_targets
from tartvg.report.tables import DASH, Cell, Table, percent

WORDS = {"shuffled": "frames shuffled", "other": "another video", "shifted_stamps": f"stamps + {SHIFT_S:g} s"}


def read_controls(run_dir: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Target -> control -> numbers, from `<run_dir>/controls/*/summary.json`, in the order of the method."""
    paths = of_targets(run_dir, "controls", "summary.json")
    return {target: json.loads(path.read_text(encoding="utf-8")) for target, path in paths.items()}


def controls_table(run_dir: Path) -> Table | None:
    """One row per policy; None where no control was run."""
    found = read_controls(run_dir)
    kinds = [kind for kind in WORDS if any(kind in summary for summary in found.values())]
    if not kinds:
        return None
    columns = ["Policy", "mIoU, true video"]
    for kind in kinds:
        columns += [f"{what}, {WORDS[kind]}" for what, _ in _values_of(kind)]
    rows = []
    for target, summary in found.items():
        row = [Cell(target), _share(next(iter(summary.values()), {}), "real_miou")]
        for kind in kinds:
            values = summary.get(kind, {})
            row += [_share(values, name) for _, name in _values_of(kind)]
        rows.append(tuple(row))
    note = (
        "In percent, greedy answers. Same times: mean IoU of anchors and answers to the true video with those to the "
        "control; 100 means that the policy does not look. Changed: share of answers with any other time."
    )
    if "shifted_stamps" in kinds:
        note += (
            f" With all stamps {SHIFT_S:g} s later the truth is as much later. Moved along: mean IoU with the times of "
            "the true video moved; 100 means that the policy reads the stamps."
        )
    return Table("Does the policy look at the video?", tuple(columns), tuple(rows), note)


def _values_of(kind: str) -> list[tuple[str, str]]:
    """Titles and names of a control's numbers."""
    values = [("mIoU", "control_miou"), ("same times", "agreement"), ("changed", "changed_rate")]
    return [*values, ("moved along", "followed")] if kind == "shifted_stamps" else values


def _share(values: dict[str, Any], name: str) -> Cell:
    value = values.get(name)
    return Cell(DASH if value is None else percent(value))
