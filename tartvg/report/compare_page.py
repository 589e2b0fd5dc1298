"""Pages about several runs: one that compares the variants, one for each stage. Self-contained, like a run's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, stdev

from omegaconf.errors import OmegaConfBaseException

from tartvg.config import AnchorsConfig, RewardConfig, SettingError
from tartvg.records import write_atomic
from tartvg.report.bands import panels_of
from tartvg.report.cards import case_html, choose_extremes, rollouts_html
from tartvg.report.cells import Comparison, Entry, status_line
from tartvg.report.compare import (
    anchors_table,
    budget_table,
    comparison_table,
    differences,
    miou_of,
    pairs_of,
    reference_of,
    significance_table,
    status_table,
)
from tartvg.report.curves import Panel
from tartvg.report.export import write_tables
from tartvg.report.page import NO_PAGES, html_page, key_html, page_links, remarks_html
from tartvg.report.runs import LOGGED_STAGES, OWN, RunFolder, first_and_last_groups, settings_of, typed
from tartvg.report.tables import DASH, Cell, Table, to_html
from tartvg.rewards import Rubric
from tartvg.types import GroundingSample

FOLDER = "report"
LAST_SHARE = 0.1
"""A stage's closing values are means over this share of its steps, at least one."""


@dataclass(frozen=True)
class StagePage:
    """A page that has been written."""

    name: str
    """Of its file."""
    panels: list[Panel]


def build_comparison(
    comparison: Comparison,
    samples_by_id: Mapping[str, GroundingSample],
    folder: Path,
    remarks: Sequence[str] = (),
    links: Mapping[str, str] = NO_PAGES,
) -> tuple[Path, list[Table]]:
    """Write `<folder>/report.html` and, in `<folder>/report/`, a page per stage, tables and figures.

    `remarks` are what the reader has to know first, `links` further addresses by name. Returns the page and its tables.
    Raises ValueError for damaged files of a run.
    """
    reference = reference_of(comparison)
    tested = significance_table(differences(comparison, reference, samples_by_id))
    scored = [comparison_table(comparison), *([tested] if tested else []), anchors_table(comparison)]
    tables = [*scored, budget_table(comparison)]
    title = f"TAR-TVG: {comparison.title}"
    place = folder / FOLDER
    pages = write_stage_pages(comparison, place)
    scores = "".join(map(to_html, scored))
    sections = [
        ("scores", "Scores", scores),
        ("curves", "Learning curves", panels_html([panel for page in pages.values() for panel in page.panels])),
        ("examples", "Test queries", _gallery(comparison, reference, samples_by_id)),
        ("budget", "Budget", to_html(tables[-1])),
        ("runs", "Runs", to_html(status_table(comparison)) + _commands(comparison)),
    ]
    lead = f"<p>{escape(status_line(comparison))}</p>{remarks_html(remarks)}{page_links({**addresses(pages), **links})}"
    write_atomic(folder / "report.html", html_page(title, lead, sections))
    write_tables([*tables, status_table(comparison)], place, title)
    return folder / "report.html", tables


def write_stage_pages(comparison: Comparison, place: Path) -> dict[str, StagePage]:
    """`<place>/<stage>.html` for every stage that logged anything, and its curves in `<place>/figures/`.

    Returns the pages by the stages' names.
    """
    pages = {}
    for stage in LOGGED_STAGES:
        table = closing_table(comparison, stage)
        if table is None:
            continue
        panels = panels_of(comparison, stage, place / "figures")
        sections = [
            ("values", "Closing values", to_html(table)),
            ("curves", "Learning curves", panels_html(panels)),
            ("rollouts", "What the policy said", _rollouts(comparison, stage)),
        ]
        back = page_links({"All stages": "../report.html"})
        write_atomic(place / f"{stage}.html", html_page(f"{comparison.title}: {stage}", back, sections))
        write_tables([table], place / stage, f"{comparison.title}: {stage}")
        pages[stage] = StagePage(f"{stage}.html", panels)
    return pages


def addresses(pages: Mapping[str, StagePage]) -> dict[str, str]:
    """The stages' pages as links from the page above them."""
    return {stage: f"{FOLDER}/{page.name}" for stage, page in pages.items()}


def closing_table(comparison: Comparison, stage: str) -> Table | None:
    """Mean of each metric over the last steps of a stage, by variant, over seeds; None if nobody ran the stage."""
    values: dict[str, dict[str, list[float]]] = {}
    for variant in comparison.variants:
        for entry in comparison.of(variant):
            lines = entry.run.metrics.get(stage, []) if entry.run else []
            for name, value in closing(lines).items():
                values.setdefault(name, {}).setdefault(variant, []).append(value)
    if not values:
        return None
    rows = []
    for name in sorted(values):
        cells = [Cell(_spread(values[name].get(variant, []))) for variant in comparison.variants]
        rows.append((Cell(name), *cells))
    note = f"Means over the last {LAST_SHARE:.0%} of a stage's steps; mean ± standard deviation over seeds."
    return Table(f"{stage}: closing values", ("metric", *comparison.variants), tuple(rows), note)


def closing(lines: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Mean of every metric, except times and progress, over the last lines."""
    last = lines[-max(1, round(LAST_SHARE * len(lines))) :]
    names = {n for line in last for n in line if not n.startswith(("time/", "perf/", "memory/", "progress/"))}
    found = {name: [v for line in last if (v := line.get(name)) is not None] for name in names}
    return {name: mean(values) for name, values in found.items() if values}


def _spread(values: Sequence[float]) -> str:
    """Like `spread`, with three digits for numbers of any size."""
    if not values:
        return DASH
    text = f"{mean(values):.3g}"
    return f"{text} ± {stdev(values):.2g}" if len(values) > 1 else text


def panels_html(panels: Sequence[Panel]) -> str:
    """Figures side by side."""
    figures = "".join(f"<figure><figcaption>{escape(p.title)}</figcaption>{p.svg}</figure>" for p in panels)
    note = '<p class="note">Lines: mean over seeds, their number in brackets. Bands: lowest to highest seed.</p>'
    return f'<div class="panels">{figures}</div>{note}' if panels else ""


def rubric_of(run: RunFolder, place: str = OWN) -> Rubric | None:
    """What judged the rollouts of a place of the run; None where its settings cannot be read."""
    settings = settings_of(run, place)
    try:
        return Rubric(typed(RewardConfig, settings.reward), typed(AnchorsConfig, settings.anchors))
    except (OmegaConfBaseException, SettingError, AttributeError):
        return None


def _gallery(comparison: Comparison, reference: str, samples_by_id: Mapping[str, GroundingSample]) -> str:
    """The reference and the variant that differs most from it, on the first seed that both have."""
    pair = _pair(comparison, reference)
    if pair is None:
        return ""
    before, after = pair
    assert before.run and after.run and before.final and after.final
    cases = choose_extremes(
        before.run.predictions.get(before.final, []), after.run.predictions.get(after.final, []), samples_by_id
    )
    if not cases:
        return ""
    names = tuple(e.variant if before.final == after.final else f"{e.variant}, {e.final}" for e in pair)
    rubrics = (rubric_of(before.run), rubric_of(after.run))
    cards = "".join(case_html(case, (names[0], names[1]), samples_by_id, rubrics) for case in cases)
    return (
        f"<p>Greedy answers of “{escape(names[0])}” and “{escape(names[1])}”, seed {escape(after.seed)}, chosen by "
        "rule and not by hand: what changed most between the two, and the best and worst of the second. Under each "
        f"text the reward terms that its own run gives it, before weights.</p>{key_html()}{cards}"
    )


def _pair(comparison: Comparison, reference: str) -> tuple[Entry, Entry] | None:
    chosen, widest = None, -1.0
    for variant in (v for v in comparison.variants if v != reference):
        pairs = pairs_of(comparison, reference, variant)
        gap = abs(mean(miou_of(other) - miou_of(base) for base, other in pairs)) if pairs else -1.0
        if gap > widest:
            chosen, widest = pairs[0], gap
    return chosen


def _rollouts(comparison: Comparison, stage: str) -> str:
    """First and last step of each variant's first seed."""
    parts = []
    for variant in comparison.variants:
        entry = next((e for e in comparison.of(variant) if e.run and stage in e.run.rollouts), None)
        if entry is None or entry.run is None:
            continue
        cards = "".join(rollouts_html(groups) for groups in first_and_last_groups(entry.run.rollouts[stage]))
        label = f"{variant}, seed {entry.seed}: first and last step"
        parts.append(f"<details open><summary>{escape(label)}</summary>{cards}</details>" if cards else "")
    return "".join(parts)


def _commands(comparison: Comparison) -> str:
    commands = {
        str(manifest["command"])
        for e in comparison.entries
        if e.run
        for manifest in e.run.manifests.values()
        if manifest.get("command")
    }
    return "".join(f"<pre><code>{escape(command)}</code></pre>" for command in sorted(commands))
