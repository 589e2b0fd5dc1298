"""How many rollouts until a policy is that good, and where it levels off: from the validation curves of finished runs.

python -m experiments.budget.reach runs/budget runs/thinking

prints a row per variant of the sweeps or runs given, with the seeds in order.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tartvg.report.cells import Entry, read_runs
from tartvg.report.curves import series_of
from tartvg.report.runs import config_of
from tartvg.report.tables import Cell, Table, to_markdown

MARKS = (0.80, 0.85)
"""Validation mIoU that is waited for."""
STAGES = ("grpo1", "grpo2")
METRIC = "eval/val/miou"
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


def curve_of(entry: Entry) -> Curve | None:
    """Return the curve of a run's last GRPO stage; None where no stage was measured while it trained."""
    run, before, points = entry.run, 0, []
    for stage in STAGES:
        if run is None or stage not in run.metrics:
            continue
        prompts, group, steps = (
            int(config_of(run, f"grpo.{name}", 0, stage)) for name in ("prompts_per_step", "group_size", "max_steps")
        )
        measured = series_of(run.metrics[stage], METRIC)
        points = [(before + prompts * group * int(step), value) for step, value in measured] or points
        before += prompts * group * steps  # of grpo1; nothing follows grpo2
    return Curve(entry.variant, entry.seed, *map(tuple, zip(*points, strict=True))) if points else None


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
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders of sweeps or of runs; what was not measured is left out"
    )
    entries = read_runs(parser.parse_args().runs, "budget", Path("runs")).entries
    curves = [curve for entry in entries if (curve := curve_of(entry)) is not None]
    print(to_markdown(table_of(curves)))


if __name__ == "__main__":
    main()
