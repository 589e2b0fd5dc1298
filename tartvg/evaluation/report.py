"""What the stand-alone scorer found, and how it is shown. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tartvg.evaluation.conventions import CONVENTIONS, Convention
from tartvg.evaluation.detection import DetectionScores
from tartvg.evaluation.lengths import LengthScores
from tartvg.evaluation.score import THRESHOLDS
from tartvg.types import Estimate, Scorecard


@dataclass(frozen=True)
class FileScores:
    """Everything about one prediction file."""

    path: str
    sha256: str
    format: str
    scorecard: Scorecard
    warning: str | None = None
    """What is likely to be wrong with these scores."""
    detection: DetectionScores | None = None
    """QVHighlights only, as is `by_length`."""
    by_length: dict[str, LengthScores] | None = None


@dataclass(frozen=True)
class Comparison:
    """b - a in mIoU and its two-sided p-value (paired sign-flip test by video)."""

    miou_difference: float
    p_value: float


@dataclass(frozen=True)
class Report:
    """What `--json` writes."""

    dataset: str
    split: str
    annotations: dict[str, str]
    """File -> SHA-256."""
    num_queries: int
    num_videos: int
    quirks: str
    convention: Convention
    """The rules of these scores."""
    files: tuple[FileScores, ...]
    comparison: Comparison | None = None


@dataclass(frozen=True)
class ConventionReport:
    """What `--json` writes under all conventions: one prediction file, scored by the rules of each."""

    dataset: str
    split: str
    annotations: dict[str, str]
    """File -> SHA-256."""
    path: str
    sha256: str
    conventions: dict[str, Convention]
    scorecards: dict[str, Scorecard]
    """By the name of the convention; without intervals."""


def render(report: Report) -> str:
    """The report as text: conventions first, then the numbers, in percent."""
    convention = report.convention
    denominator = "queries that every file answers" if convention.is_only_predicted else "every annotated query"
    lines = [
        f"{report.dataset} {report.split}: {report.num_queries} queries about {report.num_videos} videos",
        f"  annotations   {report.quirks}",
        f"  denominator   {denominator}",
        f"  convention    {_name(convention)}",
        f"  reading       {_reading(convention)}",
        f"  several windows: {convention.rule}; R1@t: IoU {_sign(convention)} t; "
        f"windows {'cut at the end of the video' if convention.is_clipped else 'as annotated'}",
    ]
    for file in report.files:
        lines += ["", *_render_file(file)]
    if report.comparison is not None:
        difference, p = report.comparison.miou_difference, report.comparison.p_value
        lines += ["", f"second - first: mIoU {100 * difference:+.2f}, p = {p:.4f} (paired sign flips by video)"]
    return "\n".join(lines)


def render_conventions(report: ConventionReport) -> str:
    """One line for each convention: its rules, then the scores in percent."""
    lines = [f"{report.path}, {report.dataset} {report.split}, by the rules of several works; scores in percent", ""]
    head = (
        "convention",
        "reading",
        "windows",
        "cut",
        "R1@t",
        "queries",
        "unread",
        "mIoU",
        "R1@0.3",
        "R1@0.5",
        "R1@0.7",
    )
    rows: list[tuple[str, ...]] = [head]
    for name, convention in report.conventions.items():
        card = report.scorecards[name]
        scores = (card.miou, *(card.recall[t] for t in THRESHOLDS))
        rows.append(
            (
                name,
                _reading(convention),
                convention.rule,
                "yes" if convention.is_clipped else "no",
                f"IoU {_sign(convention)} t",
                str(card.num_queries),
                str(card.num_unparsed),
                *(f"{100 * estimate.value:.2f}" for estimate in scores),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 5 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _name(convention: Convention) -> str:
    """Whose rules these are, and whether an option has changed one."""
    name = next(name for name, known in CONVENTIONS.items() if known.source == convention.source)
    return name if convention == CONVENTIONS[name] else f"{name}, changed by options"


def _reading(convention: Convention) -> str:
    reading = convention.reading or "as stored, else strict"
    return reading if convention.rounding is None else f"{reading}, to {convention.rounding:g} s"


def _sign(convention: Convention) -> str:
    return ">" if convention.is_strict else ">="


def _render_file(file: FileScores) -> list[str]:
    card = file.scorecard
    lines = [
        f"{file.path} ({file.format})",
        f"  unparsed {card.num_unparsed}, missing {card.num_missing}: both count as IoU 0",
        *([f"  warning: {file.warning}"] if file.warning else []),
        f"  {'':<10}{'value':>7}   95 % interval (bootstrap by video)",
    ]
    estimates: list[tuple[str, Estimate]] = [("mIoU", card.miou)]
    estimates += [(f"R1@{t:g}", estimate) for t, estimate in card.recall.items()]
    lines += [f"  {name:<10}{100 * e.value:7.2f}   {100 * e.low:.2f} to {100 * e.high:.2f}" for name, e in estimates]
    if file.detection is None or file.by_length is None:
        return lines
    head: list[Any] = ["", "queries", "mIoU", "R1@0.5", "R1@0.7", "mAP", "mAP@0.5", "mAP@0.75"]
    rows = [(name, part) for name, part in file.by_length.items()]
    recall = {t: e.value for t, e in card.recall.items()}
    rows.append(("full", LengthScores(card.num_queries, card.miou.value, recall, file.detection)))
    lines += ["", "  " + f"{head[0]:<10}" + "".join(f"{cell:>10}" for cell in head[1:])]
    for name, part in rows:
        found = part.detection
        values = (part.miou, part.recall[0.5], part.recall[0.7], found.average, found.at[0.5], found.at[0.75])
        lines.append(f"  {name:<10}{part.num_queries:>10}" + "".join(f"{100 * value:10.2f}" for value in values))
    return lines
