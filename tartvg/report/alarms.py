"""What the monitors reported while a run trained, as a table."""

from __future__ import annotations

from pathlib import Path

from tartvg.records import read_jsonl
from tartvg.report.runs import TRAINING_STAGES
from tartvg.report.tables import Cell, Table


def alarms_table(run_dir: Path) -> Table | None:
    """One row per alarm, stage by stage, from `<run_dir>/<stage>/alarms.jsonl`; None without any."""
    rows = []
    for stage in TRAINING_STAGES:
        path = run_dir / stage / "alarms.jsonl"
        for alarm in read_jsonl(path, is_partial_allowed=True) if path.exists() else ():
            value = "not finite" if alarm["value"] is None else f"{alarm['value']:.3g}"
            rows.append(
                (Cell(stage), Cell(alarm["monitor"]), Cell(str(alarm["step"])), Cell(value), Cell(alarm["text"]))
            )
    if not rows:
        return None
    note = "Each begins at its step; tartvg/monitors.py says what the bounds mean."
    return Table("Alarms", ("Stage", "Monitor", "Step", "Value", "What it says"), tuple(rows), note)
