"""The parts of a mix of data sets, each for itself: scores of every policy, and rewards of every training stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from tartvg.evaluation.score import scorecard_from_json
from tartvg.report.runs import Metrics, of_targets
from tartvg.report.tables import DASH, THRESHOLDS, Cell, Table, percent
from tartvg.types import Scorecard

WINDOW = 10
"""Logged steps at either end of a stage that a mean is taken over."""


def source_tables(run_dir: Path, metrics: Mapping[str, Metrics]) -> list[Table]:
    """Scores, then rewards, of each source; without a mix there is no table."""
    return [table for table in (_scores(run_dir), _rewards(metrics)) if table is not None]


def _scores(run_dir: Path) -> Table | None:
    rows = []
    for target, path in of_targets(run_dir, "evaluate", "scores.json").items():
        parts = json.loads(path.read_text(encoding="utf-8")).get("by_source", {})
        rows += [_score_row(f"{target}, {source}", scorecard_from_json(card)) for source, card in parts.items()]
    columns = (
        "Policy and source",
        "Queries",
        "Format",
        "Valid: 2+ anchors",
        "mIoU",
        *(f"R1@{t:g}" for t in THRESHOLDS),
    )
    note = (
        "In percent; what each policy scores on the queries of one source, as if it had been evaluated on that alone."
    )
    return Table("Scores by source", columns, tuple(rows), note) if rows else None


def _score_row(name: str, card: Scorecard) -> tuple[Cell, ...]:
    recalls = (Cell(percent(card.recall[t].value) if t in card.recall else DASH) for t in THRESHOLDS)
    shares = (card.format_rate, card.valid_rate, card.miou)
    return (Cell(name), Cell(f"{card.num_queries:,}"), *(Cell(percent(share.value)) for share in shares), *recalls)


def _rewards(metrics: Mapping[str, Metrics]) -> Table | None:
    rows = []
    for stage, lines in metrics.items():
        names = {name.split("/")[1] for line in lines for name in line if _is_count(name)}
        rows += [_reward_row(stage, source, lines) for source in sorted(names)]
    columns = ("Stage and source", "Prompts", "Share", "Reward, first to last", "Format, %, first to last")
    note = f"Means over the first and the last {WINDOW} steps that hold a prompt of the source."
    return Table("Rewards by source", columns, tuple(rows), note) if rows else None


def _is_count(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 3 and (parts[0], parts[2]) == ("group", "count")


def _reward_row(stage: str, source: str, lines: Metrics) -> tuple[Cell, ...]:
    total = sum(value or 0 for line in lines for name, value in line.items() if _is_count(name))
    own = [line for line in lines if line.get(f"group/{source}/count")]
    count = sum(line[f"group/{source}/count"] or 0 for line in own)

    def ends(name: str, factor: float, digits: int) -> Cell:
        values = [value for line in own if (value := line.get(name)) is not None]
        if not values:
            return Cell(DASH)
        first, last = fmean(values[:WINDOW]), fmean(values[-WINDOW:])
        return Cell(f"{factor * first:.{digits}f} → {factor * last:.{digits}f}")

    rewards, formats = f"reward/{source}/total_mean", f"reward/{source}/format_mean"
    share = count / total
    return (
        Cell(f"{stage}, {source}"), Cell(f"{count:,.0f}"), Cell(f"{percent(share)} %", share=share),
        ends(rewards, 1, 2), ends(formats, 100, 1),
    )  # fmt: skip
