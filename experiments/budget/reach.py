"""How many rollouts until a policy is that good, and where it levels off: from the validation curves of finished runs.

python -m experiments.budget.reach runs/budget/* runs/thinking/*

prints a row per variant (a run's folder without its seed), with the seeds in order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tartvg.records import read_jsonl
from tartvg.report.tables import Cell, Table, to_markdown

MARKS = (0.80, 0.85)
"""Validation mIoU that is waited for."""
STAGES = ("grpo1", "grpo2")
ROWS = "validation.jsonl"
LEVEL_OF = 3
"""Last measurements whose mean is where a curve has come to."""


@dataclass(frozen=True)
class Curve:
    """One run's validation: rollouts sampled so far, those of earlier stages included, and mIoU."""

    variant: str
    seed: str
    rollouts: tuple[int, ...]
    miou: tuple[float, ...]

    def reached(self, mark: float) -> int | None:
        """Return the rollouts at the first measurement of that mark or more; None if it never came."""
        return next((n for n, value in zip(self.rollouts, self.miou, strict=True) if value >= mark), None)

    @property
    def level(self) -> float:
        """The mean of the last measurements."""
        last = self.miou[-LEVEL_OF:]
        return sum(last) / len(last)


def read_curve(run: Path) -> Curve | None:
    """Read the curve of a run's last GRPO stage; None where no stage was measured while it trained."""
    before, points = 0, []
    for stage in STAGES:
        path = run / stage / ROWS
        if not path.is_file():
            continue
        grpo = yaml.safe_load((run / stage / "config.yaml").read_text(encoding="utf-8"))["grpo"]
        per_step = grpo["prompts_per_step"] * grpo["group_size"]
        points = [(before + per_step * int(row["step"]), float(row["miou"])) for row in read_jsonl(path)]
        before += per_step * int(grpo["max_steps"])  # of grpo1; nothing follows grpo2
    choices = run.name.split(",")
    seed = next((choice for choice in choices if choice.startswith("seed=")), "seed=?")
    variant = ",".join(choice for choice in choices if choice != seed)
    return Curve(variant, seed, *map(tuple, zip(*points, strict=True))) if points else None


def table_of(curves: Sequence[Curve]) -> Table:
    """One row per variant: level, and rollouts to each mark, for its seeds in order."""
    rows = []
    for variant in dict.fromkeys(curve.variant for curve in curves):
        own = sorted((c for c in curves if c.variant == variant), key=lambda c: c.seed)
        cells = [Cell(variant), Cell(f"{own[0].rollouts[-1]:,}"), Cell(", ".join(f"{100 * c.level:.1f}" for c in own))]
        for mark in MARKS:
            reached = [c.reached(mark) for c in own]
            cells.append(Cell(", ".join("never" if n is None else f"{n:,}" for n in reached)))
        rows.append(tuple(cells))
    columns = ("variant", "rollouts", "mIoU at the end", *(f"rollouts to {mark:.0%}" for mark in MARKS))
    note = f"Greedy answers on the validation split; at the end: mean of the last {LEVEL_OF} measurements."
    return Table("Rollouts and validation mIoU", columns, tuple(rows), note)


def main() -> None:
    """Print the table of the runs given."""
    parser = argparse.ArgumentParser(prog="python -m experiments.budget.reach", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; those that were not measured are left out")
    curves = [curve for run in parser.parse_args().runs if (curve := read_curve(run)) is not None]
    print(to_markdown(table_of(curves)))


if __name__ == "__main__":
    main()
