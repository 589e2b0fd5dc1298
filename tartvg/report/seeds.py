"""Several runs of the same settings as one table: mean ± sample standard deviation over their seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from tartvg.report.runs import LOGGED_STAGES, TARGETS, RunFolder, read_run
from tartvg.report.tables import DASH, Cell, Table
from tartvg.types import Scorecard

COLUMNS: dict[str, Callable[[Scorecard], float]] = {
    "format": lambda card: 100 * card.format_rate.value,
    "valid: 2+ anchors": lambda card: 100 * card.valid_rate.value,
    "refined": lambda card: 100 * card.refinement_rate,
    "mIoU": lambda card: 100 * card.miou.value,
    "R1@0.3": lambda card: 100 * card.recall[0.3].value,
    "R1@0.5": lambda card: 100 * card.recall[0.5].value,
    "R1@0.7": lambda card: 100 * card.recall[0.7].value,
}

ANCHOR_COLUMNS: dict[str, Callable[[Scorecard], float]] = {
    "IoU: first anchor": lambda card: 100 * card.first_iou,
    "last anchor": lambda card: 100 * card.last_iou,
    "gain": lambda card: 100 * (card.last_iou - card.first_iou),
    "equal": lambda card: 100 * card.equal_rate,
    "first exact": lambda card: 100 * card.first_exact_rate,
    "refined": lambda card: 100 * card.inexact_refined_rate,
    "made worse": lambda card: 100 * card.inexact_worsened_rate,
}
"""Of greedy answers; the last two are shares of those whose first anchor is not exact."""


def spread(values: Sequence[float]) -> str:
    """`61.1 ± 0.4`; a single value has no spread."""
    if not values:
        return DASH
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def scores_table(runs: Sequence[RunFolder]) -> Table:
    """One row per policy of the method; percent, and anchors as a count."""
    rows = []
    for target in TARGETS:
        cards = [run.scores[target] for run in runs if target in run.scores]
        cells = [Cell(spread([read(card) for card in cards])) for read in COLUMNS.values()]
        rows.append((Cell(target), *cells, Cell(spread([card.count_mean for card in cards]))))
    queries = {card.num_queries for run in runs for card in run.scores.values()}
    note = f"Percent, mean ± standard deviation over {len(runs)} runs of {'/'.join(map(str, sorted(queries)))} queries."
    return Table("Scores over seeds", ("policy", *COLUMNS, "anchors"), tuple(rows), note)


def gains_table(runs: Sequence[RunFolder]) -> Table:
    """mIoU of each run by itself: what the spread hides."""
    rows = []
    for run in runs:
        values = [100 * run.scores[t].miou.value if t in run.scores else None for t in TARGETS]
        rows.append((Cell(run.path.name), *(Cell(DASH if v is None else f"{v:.1f}") for v in values)))
    return Table("mIoU of each run", ("run", *TARGETS), tuple(rows))


def phases_table(runs: Sequence[RunFolder]) -> Table:
    """Seconds of each phase, summed over a stage, and the stage's wall clock."""
    stages = [s for s in LOGGED_STAGES if any(s in run.metrics or s in run.manifests for run in runs)]
    totals = [{stage: _sums(run, stage) for stage in stages if stage in run.metrics} for run in runs]
    names = list(dict.fromkeys(name for total in totals for sums in total.values() for name in sums))
    rows = []
    for stage in stages:
        sums = [total[stage] for total in totals if stage in total]
        walls = [float(r.manifests[stage]["seconds"]) for r in runs if stage in r.manifests]
        cells = [Cell(spread([s[name] for s in sums if name in s])) for name in names]
        rows.append((Cell(stage), *cells, Cell(spread(walls))))
    return Table("Seconds by phase", ("stage", *names, "whole stage"), tuple(rows))


def _sums(run: RunFolder, stage: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for line in run.metrics[stage]:
        for name, value in line.items():
            if name.startswith("time/") and value is not None:
                phase = name.removeprefix("time/").removesuffix("_s")
                sums[phase] = sums.get(phase, 0.0) + value
    return sums


def tables(folders: Sequence[Path]) -> list[Table]:
    """All three tables. Raises ValueError naming a folder that is no run."""
    runs = [read_run(folder) for folder in folders]
    return [scores_table(runs), gains_table(runs), phases_table(runs)]
