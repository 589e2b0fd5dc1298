"""The experiment's picture: what was measured beside what is possible, and memory over the group size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(answers: dict[str, Any], path: Path) -> None:
    """Left the sweep, right the memory; a panel whose question was not asked stays away."""
    panels = [name for name in ("sweep", "memory") if name in answers]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False)
    for name, axis in zip(panels, axes[0], strict=True):
        {"sweep": _sweep, "memory": _memory}[name](axis, answers[name])
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _sweep(axis: Any, answer: dict[str, Any]) -> None:
    points = answer["points"]
    limits, measured = [p["limit"] for p in points], [p["cpu"] for p in points]
    top = 1.1 * max(*limits, *measured)
    axis.plot([1, top], [1, top], color="0.6", linewidth=1, label="token ratio")
    axis.scatter(limits, measured, zorder=3)
    for number, p in enumerate(sorted(points, key=lambda p: (p["limit"], p["cpu"]))):
        offset, side = ((6, -9), "left") if number % 2 else ((-6, 4), "right")  # neighbours must stay readable
        axis.annotate(f"{p['P']}, {p['C']}, {p['G']}", (p["limit"], p["cpu"]), fontsize=8, xytext=offset, ha=side,
                      textcoords="offset points")  # fmt: skip
    axis.set_xlabel("token ratio G (P + C) / (P + G C)")
    axis.set_ylabel("naive over shared update, CPU time")
    axis.set_title("P, C, G at each point")
    axis.legend(frameon=False)


def _memory(axis: Any, answer: dict[str, Any]) -> None:
    for way, found in answer["ways"].items():
        axis.plot(found["sizes"], found["mib"], marker="o", label=way)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("G, completions of a prompt")
    axis.set_ylabel("peak memory of the update, MiB")
    axis.set_title(f"P = {answer['P']}, C = {answer['C']}")
    axis.legend(frameon=False)
