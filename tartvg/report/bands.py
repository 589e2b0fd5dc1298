"""Learning curves of several variants: the mean over their seeds with a band from the lowest to the highest seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tartvg.report.cells import Comparison
from tartvg.report.curves import (
    PANELS,
    SMOOTH_FROM,
    Panel,
    PanelSpec,
    dressed_axes,
    inline_svg,
    running_mean,
    series_of,
)
from tartvg.report.export import slug, write_figure

SIZE_INCHES = (5.2, 3.2)
# Okabe and Ito's palette, its yellow left out on white; line styles and markers tell the curves apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Band:
    """One variant's metric over steps; all lists are of one length."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    num_seeds: int


def band_of(curves: Sequence[Sequence[tuple[float, float]]], scale: float = 1.0) -> Band | None:
    """Mean, lowest and highest value at the steps that every curve has; None without any.

    Long curves are smoothed, each seed by itself, before they are compared.
    """
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    smooth = []
    for curve in curves:
        values = [scale * value for _, value in curve]
        if len(values) >= SMOOTH_FROM:
            values = running_mean(values, max(3, len(values) // 12))
        smooth.append(dict(zip((step for step, _ in curve), values, strict=True)))
    steps = sorted(set.intersection(*(set(values) for values in smooth)))
    if not steps:
        return None
    columns = [[values[step] for values in smooth] for step in steps]
    means = [sum(column) / len(column) for column in columns]
    return Band(steps, means, [min(c) for c in columns], [max(c) for c in columns], len(curves))


def panels_of(comparison: Comparison, stage: str, figures: Path | None = None) -> list[Panel]:
    """The panels of one stage that have data; written to `figures` as SVG and PNG, too, if given."""
    panels = []
    for spec in PANELS:
        if stage not in spec.stages:
            continue
        bands: dict[str, Band] = {}
        for variant in comparison.variants:
            runs = [e.run for e in comparison.of(variant) if e.run is not None]
            curves = [series_of(run.metrics.get(stage, []), spec.key) for run in runs]
            band = band_of(curves, 100 if spec.is_share else 1)
            if band is not None:
                bands[variant] = band
        if bands:
            title = f"{stage}: {spec.title}"
            with _drawn(spec, bands, title) as (figure, prefix):
                text = _describe(title, spec, bands)
                panels.append(Panel(title, inline_svg(figure, prefix, text), text))
                if figures is not None:
                    write_figure(figure, figures / slug(title))
    return panels


@contextmanager
def _drawn(spec: PanelSpec, bands: Mapping[str, Band], title: str) -> Iterator[tuple[Figure, str]]:
    salt = hashlib.sha256(title.encode()).hexdigest()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = dressed_axes(figure, spec.is_share)
        for number, (variant, band) in enumerate(bands.items()):
            colour = COLOURS[number % len(COLOURS)]
            style = LINES[(number + number // len(COLOURS)) % len(LINES)]
            if band.num_seeds > 1:
                axes.fill_between(band.steps, band.low, band.high, color=colour, alpha=0.15, linewidth=0)
            marker = "o" if len(band.steps) <= 2 else None
            label = f"{variant} ({band.num_seeds})"
            axes.plot(band.steps, band.mean, color=colour, linestyle=style, linewidth=2.0, marker=marker, label=label)
        # A dollar sign in a name is text and not mathematics.
        for text in axes.legend(frameon=False, fontsize=9, handlelength=3).get_texts():
            text.set_parse_math(False)
        yield figure, f"b{salt[:6]}"


def _describe(title: str, spec: PanelSpec, bands: Mapping[str, Band]) -> str:
    unit = "%" if spec.is_share else ""
    parts = [
        f"{variant} ({band.num_seeds} seeds): {band.mean[0]:.3g}{unit} at step {band.steps[0]:g}, "
        f"{band.mean[-1]:.3g}{unit} at step {band.steps[-1]:g}"
        for variant, band in bands.items()
    ]
    return f"{title}. {'; '.join(parts)}."
