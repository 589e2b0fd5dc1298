"""Tables as data, and the three ways to show one: terminal (rich), Markdown, HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import rich.box
import rich.table

from tartvg.report.runs import LOGGED_STAGES, TARGETS, FilterSummary, Metrics
from tartvg.timing import PHASES
from tartvg.types import Estimate, Scorecard

DASH = "–"  # noqa: RUF001 - a typographic dash for "no value"
THRESHOLDS = (0.3, 0.5, 0.7)
PAPER_COLUMN = "paper: "
"""How the name of a column of the paper's own numbers begins, in every format."""
_PAPER_CLASS = ' class="theirs"'


@dataclass(frozen=True)
class Cell:
    """What one cell shows."""

    text: str
    interval: str = ""
    """The 95 % interval, shown smaller."""
    share: float | None = None
    """In [0, 1]: drawn as a bar in HTML."""
    is_paper: bool = False
    """A number of the paper's, not of a run: set apart in HTML."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def to_rich(table: Table) -> rich.table.Table:
    """For `rich.print`."""
    # Text objects, so that square brackets of intervals are not read as rich markup.
    from rich.text import Text

    shown = rich.table.Table(title=table.title, caption=table.note or None, box=rich.box.SIMPLE_HEAD)
    for number, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="left" if number == 0 else "right")
    for row in table.rows:
        shown.add_row(*(Text(f"{c.text}\n{c.interval}" if c.interval else c.text) for c in row))
    return shown


def to_markdown(table: Table) -> str:
    """A GitHub table with title and note around it."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    marks = ["---", *["---:"] * (len(table.columns) - 1)]
    rows = [line([f"{c.text} {c.interval}".strip() for c in row]) for row in table.rows]
    parts = [f"**{table.title}**", "", line(table.columns), line(marks), *rows]
    return "\n".join([*parts, "", table.note, ""] if table.note else [*parts, ""])


def to_html(table: Table) -> str:
    """An accessible table (caption, scoped headers) in a box that scrolls on its own; everything is escaped."""
    head = "".join(
        f'<th scope="col"{_PAPER_CLASS if column.startswith(PAPER_COLUMN) else ""}>{escape(column)}</th>'
        for column in table.columns
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0].text)}</th>{"".join(_td(c) for c in row[1:])}</tr>' for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(table.title)}" tabindex="0">'
        f'<table class="{"small" if len(table.columns) <= 4 else "wide"}">'
        f"<caption>{escape(table.title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _td(cell: Cell) -> str:
    interval = f'<span class="ci">{escape(cell.interval)}</span>' if cell.interval else ""
    text = escape(cell.text)
    if cell.share is not None:
        width = 100 * min(max(cell.share, 0.0), 1.0)
        text = f'<span class="share"><span style="width:{width:.1f}%"></span></span><b>{text}</b>'
    return f"<td{_PAPER_CLASS if cell.is_paper else ''}>{text}{interval}</td>"


def percent(value: float) -> str:
    """A share in [0, 1] with one decimal, without the sign."""
    return f"{100 * value:.1f}"


def _estimate(estimate: Estimate) -> Cell:
    return Cell(percent(estimate.value), f"[{percent(estimate.low)}, {percent(estimate.high)}]")


def stage_table(scores: Mapping[str, Scorecard]) -> Table:
    """One row per policy of the method, in its order; shares and IoUs in percent, dashes for one without scores."""
    thresholds = sorted({t for card in scores.values() for t in card.recall}) or list(THRESHOLDS)
    columns = (
        *(
            "Policy",
            "Format",
            "Valid: 2+ anchors",
            "Anchored",
            "Anchors per answer",
            "Refined",
            "Answer = last anchor",
            "mIoU",
        ),
        *(f"R1@{t:g}" for t in thresholds),
    )
    rows = []
    for target in (*TARGETS, *(t for t in scores if t not in TARGETS)):
        card = scores.get(target)
        if card is None:
            rows.append((Cell(target), *[Cell(DASH)] * (len(columns) - 1)))
            continue
        rows.append(
            (
                Cell(target),
                _estimate(card.format_rate),
                _estimate(card.valid_rate),
                Cell(percent(card.anchored_rate)),
                Cell(f"{card.count_mean:.2f}"),
                Cell(percent(card.refinement_rate)),
                Cell(percent(card.answer_match_rate)),
                _estimate(card.miou),
                *(_estimate(card.recall[t]) if t in card.recall else Cell(DASH) for t in thresholds),
            )
        )
    counts = "; ".join(
        f"{target}: {card.num_queries} queries, {card.num_unparsed} unreadable, {card.num_missing} missing"
        for target, card in scores.items()
    )
    note = "In percent, except anchors; in brackets 95 % intervals, resampled by video. Unreadable and missing count 0."
    return Table("Scores after each stage", columns, tuple(rows), f"{note} {counts}." if counts else "")


def filter_table(summary: FilterSummary) -> Table:
    """What the filter kept and what each clause rejected, as counts and as shares of all rollouts."""

    def row(name: str, count: int) -> tuple[Cell, ...]:
        share = count / summary.num_rollouts if summary.num_rollouts else 0.0
        return Cell(name), Cell(f"{count:,}"), Cell(f"{percent(share)} %", share=share)

    rejected = sorted(summary.rejected.items(), key=lambda item: -item[1])
    return Table(
        "From rollouts to traces",
        ("Rollouts", "Count", "Share"),
        (
            row("read", summary.num_rollouts),
            row("kept as traces", summary.num_kept),
            *(row(f"rejected: {clause}", count) for clause, count in rejected),
        ),
    )


def seconds_table(metrics: Mapping[str, Metrics], manifests: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Seconds of each phase (the sum of `time/<phase>_s`) by stage, and the stage's own wall clock. None: no times."""
    sums: dict[str, dict[str, float]] = {}
    for stage in LOGGED_STAGES:
        for line in metrics.get(stage, []):
            for name, value in line.items():
                if name.startswith("time/") and name.endswith("_s") and value is not None:
                    total = sums.setdefault(stage, {})
                    phase = name.removeprefix("time/").removesuffix("_s")
                    total[phase] = total.get(phase, 0.0) + value
    found = {phase for total in sums.values() for phase in total}
    phases = [*(p for p in PHASES if p in found), *sorted(found - set(PHASES))]
    walls = {stage: m["seconds"] for stage, m in manifests.items() if isinstance(m.get("seconds"), (int, float))}
    stages = [*(s for s in manifests if s in walls or s in sums), *(s for s in sums if s not in manifests)]
    if not stages:
        return None

    def cell(value: float | None) -> Cell:
        return Cell(DASH if value is None else duration(value))

    rows = tuple(
        (Cell(s), *(cell(sums.get(s, {}).get(p)) for p in phases), cell(walls.get(s)))
        for s in stages
    )  # fmt: skip
    columns = ("Stage", *(p.replace("_", " ") for p in phases), "whole stage")
    return Table("Where the time went", columns, rows, "Sums over all logged steps of rank 0, on the wall clock.")


def throughput_table(metrics: Mapping[str, Metrics]) -> Table | None:
    """Mean throughput and peak memory by stage, over the steps that log them. None: no stage does."""
    names = {
        "Seconds per step": "perf/seconds_per_step",
        "Tokens/s sampled": "perf/tokens_per_second_sampled",
        "Tokens/s trained": "perf/tokens_per_second_trained",
        "MFU, %": "perf/mfu",
        "Peak memory, GiB": "memory/peak_gib",
    }

    def cell(stage: str, name: str) -> Cell:
        values = [value for line in metrics.get(stage, []) if (value := line.get(name)) is not None]
        if not values:
            return Cell(DASH)
        if name == "memory/peak_gib":
            return Cell(f"{max(values):.2f}")
        mean = sum(values) / len(values)
        return Cell(f"{100 * mean:.1f}" if name == "perf/mfu" else f"{mean:.2f}" if mean < 100 else f"{mean:.0f}")

    stages = [s for s in LOGGED_STAGES if any(line.get("memory/peak_gib") is not None for line in metrics.get(s, []))]
    rows = tuple((Cell(stage), *(cell(stage, name) for name in names.values())) for stage in stages)
    note = "Means over logged steps, over all ranks; memory is the peak of the rank that needs most."
    return Table("Throughput and memory", ("Stage", *names), rows, note) if rows else None


def duration(seconds: float) -> str:
    """Seconds for people: `0.42 s`, `12.3 s`, `4 min 05 s`, `3 h 07 min`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
