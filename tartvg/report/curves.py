"""Metrics over steps as small SVG panels: one colour and one line style per stage."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tartvg.report.runs import Metrics

STEP = "progress/step"
SIZE_INCHES = (4.6, 2.7)
# Okabe and Ito's palette: told apart with every common colour blindness; the line styles survive grey printing.
STYLES: dict[str, tuple[str, str]] = {
    "grpo1": ("#0072B2", "-"),
    "sft": ("#D55E00", "-"),
    "grpo2": ("#009E73", "--"),
}
SMOOTH_FROM = 30
"""Curves with at least this many points are drawn faint, with their running mean on top."""


@dataclass(frozen=True)
class PanelSpec:
    """Which metric a panel shows."""

    key: str
    title: str
    stages: tuple[str, ...]
    is_share: bool = False


PANELS = (
    PanelSpec("reward/total_mean", "Reward (mean total)", ("grpo1", "grpo2")),
    PanelSpec("anchors/valid_rate", "Valid outputs (right format, 2+ anchors)", ("grpo1", "grpo2"), is_share=True),
    PanelSpec("anchors/count_mean", "Anchors per output", ("grpo1", "grpo2")),
    PanelSpec("anchors/refinement_rate", "Refined anchors", ("grpo1", "grpo2"), is_share=True),
    PanelSpec("anchors/first_iou_mean", "IoU of the first anchor", ("grpo1", "grpo2"), is_share=True),
    PanelSpec("anchors/last_iou_mean", "IoU of the last anchor", ("grpo1", "grpo2"), is_share=True),
    PanelSpec("anchors/gain_mean", "Gain from the first to the last anchor (IoU)", ("grpo1", "grpo2")),
    PanelSpec("anchors/held_back_mean", "Held back: best anchor minus the first (IoU)", ("grpo1", "grpo2")),
    PanelSpec("anchors/equal_rate", "Last anchor repeats the first", ("grpo1", "grpo2"), is_share=True),
    PanelSpec("anchors/first_exact_rate", "First anchor is exact", ("grpo1", "grpo2"), is_share=True),
    PanelSpec(
        "anchors/inexact_refined_rate", "Refined, of those not exact at first", ("grpo1", "grpo2"), is_share=True
    ),
    PanelSpec(
        "anchors/inexact_worsened_rate", "Made worse, of those not exact at first", ("grpo1", "grpo2"), is_share=True
    ),
    # Not loss/kl: this one is the same estimate in every run, and is measured without a KL penalty, too.
    PanelSpec("rollout/kl", "KL to the reference (nats per token)", ("grpo1", "grpo2")),
    PanelSpec("rollout/entropy", "Entropy (nats per token)", ("grpo1", "grpo2")),
    PanelSpec("rollout/truncated_rate", "Outputs cut off by the length limit", ("grpo1", "grpo2"), is_share=True),
    PanelSpec("loss/total", "GRPO loss", ("grpo1", "grpo2")),
    PanelSpec("loss/total", "SFT loss", ("sft",)),
    PanelSpec("eval/val/miou", "Validation mIoU", ("grpo1", "sft", "grpo2"), is_share=True),
    PanelSpec("optim/grad_norm", "Gradient norm, before clipping", ("grpo1", "sft", "grpo2")),
)


@dataclass(frozen=True)
class Panel:
    """One drawn curve panel."""

    title: str
    svg: str
    """An `<svg>` element without network references, to be put inline."""
    description: str
    """First and last value of each stage, in words."""


def draw_panels(metrics: Mapping[str, Metrics]) -> tuple[list[Panel], list[str]]:
    """The panels that have data, and the titles of those that have none."""
    drawn, absent = [], []
    for spec in PANELS:
        series = {stage: series_of(metrics.get(stage, []), spec.key) for stage in spec.stages}
        series = {stage: points for stage, points in series.items() if points}
        if series:
            drawn.append(Panel(spec.title, _draw(spec, series), _describe(spec, series)))
        else:
            absent.append(spec.title)
    return drawn, absent


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to `window - 1` values before it."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def series_of(lines: Metrics, key: str) -> list[tuple[float, float]]:
    """(step, value) of one metric where both are known."""
    points = [(line.get(STEP), line.get(key)) for line in lines]
    return [(step, value) for step, value in points if step is not None and value is not None]


def _describe(spec: PanelSpec, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    unit = "%" if spec.is_share else ""
    scale = 100 if spec.is_share else 1
    parts = [
        f"{stage}: {scale * points[0][1]:.3g}{unit} at step {points[0][0]:g}, "
        f"{scale * points[-1][1]:.3g}{unit} at step {points[-1][0]:g}"
        for stage, points in series.items()
    ]
    return f"{spec.title}. {'; '.join(parts)}."


def _draw(spec: PanelSpec, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    salt = hashlib.sha256(f"{spec.key} {spec.title}".encode()).hexdigest()
    # Text stays text: small, selectable, in the page's own font. The salt keeps ids of inline panels apart.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = dressed_axes(figure, spec.is_share)
        for stage, points in series.items():
            colour, style = STYLES[stage]
            steps, values = [p[0] for p in points], [p[1] * (100 if spec.is_share else 1) for p in points]
            if len(points) >= SMOOTH_FROM:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
                values = running_mean(values, max(3, len(points) // 12))
            marker = "o" if len(points) <= 2 else None
            axes.plot(steps, values, color=colour, linestyle=style, linewidth=2.0, marker=marker, label=stage)
        axes.legend(frameon=False, fontsize=10.5, handlelength=2.4)
        return inline_svg(figure, f"p{salt[:6]}", _describe(spec, series))


def dressed_axes(figure: Figure, is_share: bool) -> Axes:
    """Axes over optimiser steps in the page's look; shares are percent."""
    axes = figure.add_subplot()
    axes.set_xlabel("optimiser step of the stage", color="#444", fontsize=10.5)
    if is_share:
        axes.set_ylim(-3, 103)
        axes.set_ylabel("%", color="#444", fontsize=10.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y", color="#e2e2e2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999")
    axes.tick_params(colors="#444", labelsize=10)
    return axes


def inline_svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an `<svg>` element for a page: named for screen readers, ids of its own, no network address."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML neither the metadata block nor the namespace declarations are needed; both name network addresses.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", svg, count=1)
    # Several panels share the page, and ids are the page's.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
