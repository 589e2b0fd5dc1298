"""Draw the README's two pictures from a finished demo.

python run.py name=readme
python docs/pictures/make.py runs/readme

Writes film_strip.png and learning_curve.svg beside this file, on white, so that both read in light and dark mode.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from tartvg.records import prediction_from_json, read_jsonl
from tartvg.report.curves import series_of
from tartvg.report.strips import COLOURS, Lane, frame_times, lanes_of, thumbnails
from tartvg.spans import iou
from tartvg.types import Prediction, Span

HERE = Path(__file__).parent
NUM_FRAMES = 6
REWARD, FORMAT, MIOU = "#444444", "#0072B2", "#D55E00"
"""Okabe and Ito's palette; each curve is named beside it as well."""


def main(run: Path) -> None:
    """Draw both."""
    predictions = [prediction_from_json(line) for line in read_jsonl(run / "evaluate/grpo2/predictions.jsonl")]
    chosen = choose(predictions)
    path = HERE / "film_strip.png"
    path.write_bytes(film_strip(chosen))
    print(path, path.stat().st_size, chosen.query, chosen.sample_id, chosen.text)
    path = HERE / "learning_curve.svg"
    path.write_text(learning_curve(run))
    print(path, path.stat().st_size)


def choose(predictions: list[Prediction]) -> Prediction:
    """The greedy answer with the median IoU among those whose two anchors refine: neither the best nor the worst."""

    def ious(p: Prediction) -> tuple[float, float]:
        first, last = (iou(anchor, p.windows[0]) for anchor in p.anchors)
        return first, last

    refined = [
        p for p in predictions
        if p.sample_index == 0 and not p.faults and len(p.anchors) == 2 and ious(p)[0] + 0.1 < ious(p)[1]
    ]  # fmt: skip
    return sorted(refined, key=lambda p: (ious(p)[1], p.sample_id))[len(refined) // 2]


def film_strip(p: Prediction) -> bytes:
    """Frames above one time axis with the truth, both anchors and the answer."""
    lanes = [Lane("truth", "truth", p.windows), *lanes_of(p.anchors, p.answer)]
    images = thumbnails(Path(p.video), frame_times(p.duration, NUM_FRAMES), height=160)
    figure = Figure(figsize=(7.2, 3.3), dpi=180, layout="constrained", facecolor="white")
    frames, bars = figure.subplots(2, 1, sharex=True, height_ratios=[1.0, 1.5])
    width = p.duration / NUM_FRAMES
    for i, image in enumerate(images):
        frames.imshow(np.asarray(image), extent=(i * width, (i + 1) * width, 0, 1), aspect="auto")
        frames.axvline(i * width, color="white", linewidth=3 if i else 0)
    frames.set(xlim=(0, p.duration), ylim=(0, 1), yticks=[])
    frames.tick_params(bottom=False)
    frames.spines[:].set_visible(False)
    frames.set_title(f"“{p.query}”", loc="left", fontsize=13, color="#1a1a1a", parse_math=False)
    for i, lane in enumerate(reversed(lanes)):
        span = lane.spans[0]
        bars.broken_barh([(span.start, span.end - span.start)], (i - 0.34, 0.68), color=COLOURS[lane.kind])
        is_right = span.end < 0.7 * p.duration
        place = span.end if is_right else span.start
        bars.annotate(
            words(span, lane, p), (place, i), (5 if is_right else -5, 0), textcoords="offset points", va="center",
            ha="left" if is_right else "right", fontsize=11, color="#1a1a1a",
        )  # fmt: skip
    bars.set_yticks(range(len(lanes)), [lane.label for lane in reversed(lanes)], fontsize=12, color="#1a1a1a")
    bars.set_ylim(-0.6, len(lanes) - 0.4)
    bars.set_xlabel("seconds", color="#1a1a1a", fontsize=11)
    bars.tick_params(axis="y", length=0)
    bars.tick_params(axis="x", colors="#1a1a1a", labelsize=11)
    bars.grid(axis="x", color="#e2e2e2")
    bars.set_axisbelow(True)
    bars.spines[["top", "right", "left"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    small = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def words(span: Span, lane: Lane, p: Prediction) -> str:
    """The span in seconds, and for an anchor or answer its IoU with the truth."""
    text = f"{span.start:g} to {span.end:g} s"
    return text if lane.kind == "truth" else f"{text}, IoU {iou(span, p.windows[0]):.2f}"


def learning_curve(run: Path) -> str:
    """Reward above; format and mIoU below: of the training rollouts per step, and of the test queries per stage."""
    parts = {"svg.hashsalt": "readme", "font.family": "sans-serif"}
    with matplotlib.rc_context(parts):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.5])
        start, tests = 0, [(0, miou_of(run, "base"))]
        for stage in ("grpo1", "sft", "grpo2"):
            lines = [dict(line) for line in read_jsonl(run / stage / "metrics.jsonl")]
            end = start + len(lines)
            for axes in (above, below):
                axes.axvspan(start, end, color="#f3f3f1" if stage == "sft" else "white", linewidth=0)
                axes.axvline(end, color="#bbbbbb", linewidth=0.8)
            above.text((start + end) / 2, 8.6, stage, ha="center", fontsize=12, color="#1a1a1a")
            if stage != "sft":
                draw(above, start, series_of(lines, "reward/total_mean"), REWARD)
                draw(below, start, [(x, 100 * y) for x, y in series_of(lines, "reward/format_mean")], FORMAT)
                draw(below, start, rollout_miou(run / stage / "rollouts.jsonl"), MIOU)
            start = end
            tests.append((end, miou_of(run, stage)))
        below.plot(*zip(*tests, strict=True), "o", color=MIOU, markeredgecolor="white", markersize=9, clip_on=False)
        for x, y in tests:
            below.annotate(
                f"{y:.0f}", (x, y), (0 if x else 12, -18), textcoords="offset points", ha="center", fontsize=11,
                color=MIOU, bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            )  # fmt: skip
        above.set_ylim(-5, 8)
        above.set_ylabel("mean reward\n(best: 8)", fontsize=11, color="#1a1a1a")
        below.set_ylim(0, 102)
        below.set_ylabel("%", fontsize=11, color="#1a1a1a")
        below.set_xlabel("optimiser step", fontsize=11, color="#1a1a1a")
        below.text(0.985, 0.16, "format kept, training rollouts", transform=below.transAxes, ha="right", fontsize=11,
                   color=FORMAT)  # fmt: skip
        below.text(0.985, 0.05, "mIoU: line, training rollouts; dots, test queries", transform=below.transAxes,
                   ha="right", fontsize=11, color=MIOU)  # fmt: skip
        for axes in (above, below):
            axes.set_xlim(0, start)
            axes.grid(axis="y", color="#e2e2e2", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors="#1a1a1a", labelsize=11)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # As wide as the film strip on a page; the view box stays.
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 width="1296"', buffer.getvalue(), count=1)


def draw(axes: matplotlib.axes.Axes, start: int, points: list[tuple[float, float]], colour: str) -> None:
    """Draw one stage's curve: faint as measured, and its mean over five steps."""
    x, y = [start + 1 + p[0] for p in points], [p[1] for p in points]
    smooth = [sum(y[max(0, i - 4) : i + 1]) / len(y[max(0, i - 4) : i + 1]) for i in range(len(y))]
    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(x, smooth, color=colour, linewidth=2.2)


def rollout_miou(path: Path) -> list[tuple[float, float]]:
    """(step, mean IoU in percent) of all sampled answers; an unreadable one counts 0."""
    found: dict[int, list[float]] = {}
    for group in read_jsonl(path):
        truth = Span(*group["prompt"]["sample"]["windows"][0])
        for rollout in group["rollouts"]:
            answer = rollout["response"]["answer"]
            found.setdefault(group["step"], []).append(iou(Span(*answer), truth) if answer else 0.0)
    return [(step, 100 * sum(values) / len(values)) for step, values in sorted(found.items())]


def miou_of(run: Path, policy: str) -> float:
    """Test mIoU in percent."""
    scores = json.loads((run / "evaluate" / policy / "scores.json").read_text())
    return 100 * float(scores["miou"]["value"] if isinstance(scores["miou"], dict) else scores["miou"][0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
