"""Which training queries a stage kept by the success of the untouched base: the histogram as a table."""

from __future__ import annotations

import json
from pathlib import Path

from tartvg.report.runs import TRAINING_STAGES
from tartvg.report.tables import Cell, Table


def difficulty_tables(run_dir: Path) -> list[Table]:
    """One table per stage that selected its queries."""
    paths = ((stage, run_dir / stage / "difficulty.json") for stage in TRAINING_STAGES)
    return [_table(stage, path) for stage, path in paths if path.is_file()]


def _table(stage: str, path: Path) -> Table:
    found = json.loads(path.read_text(encoding="utf-8"))
    edges, most = found["edges"], max(found["measured"], default=0)

    def bar(count: int) -> Cell:
        return Cell(f"{count:,}", share=count / most if most else 0.0)

    bins = zip(edges, edges[1:], found["measured"], found["kept"], strict=False)
    rows = tuple((Cell(f"{low:.2f} to {high:.2f}"), bar(count), bar(kept)) for low, high, count, kept in bins)
    note = (
        f"Kept: {found['rule']}; {found['num_kept']:,} of {found['num_queries']:,} queries. "
        f"Not measured, and left out: {found['num_unmeasured']:,}."
    )
    return Table(f"Queries of {stage} by the base's mean", ("Mean", "Queries", "Kept"), rows, note)
