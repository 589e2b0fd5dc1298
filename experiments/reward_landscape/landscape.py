"""Where the reward formula itself has its optimum: no model, only the rubric on answers made for the purpose.

python -m experiments.reward_landscape.landscape     prints the tables of experiments/reward_landscape
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tartvg.config import AnchorsConfig, CountPenalty, RewardConfig
from tartvg.response import parse_response
from tartvg.rewards.rubric import Rubric
from tartvg.types import GroundingSample, Span

MOST = 10
"""Anchors of the longest answer considered; also the cap that stands for none."""
TRUTH = Span(0.0, 1000.0)
TARGETS = (1, 2, 3)
QUALITIES = (0.2, 0.4, 0.6, 0.8, 1.0)


def answer_text(num_anchors: int, quality: float) -> str:
    """A well-formed answer whose anchors have a soft IoU just below `quality` with TRUTH, each refining the last."""
    ends = [quality * TRUTH.end - 0.01 * (num_anchors - i) for i in range(1, num_anchors + 1)]
    anchors = [Span(0.0, end) for end in ends]
    marks = " ".join(f"closer <timestamp>{a}</timestamp>" for a in anchors)
    return f"<think>look {marks}</think><answer>{anchors[-1] if anchors else Span(0.0, quality * TRUTH.end)}</answer>"


def totals(reward: RewardConfig, anchors: AnchorsConfig, quality: float) -> list[float]:
    """The total for N = 0 .. MOST anchors of one quality, all of them refinements."""
    rubric = Rubric(reward, anchors)
    sample = GroundingSample("landscape", Path("none.mp4"), "", (TRUTH,), TRUTH.end, "test")
    return [rubric.score(parse_response(answer_text(n, quality)), sample).total for n in range(MOST + 1)]


def optimum(values: Sequence[float]) -> int:
    """The number of anchors with the highest total, to a hundredth; of equal ones the smallest."""
    return max(range(len(values)), key=lambda n: (round(values[n], 2), -n))


def landscape_rows(is_capped: bool, quality: float = 1.0) -> list[list[str]]:
    """For each target and form of TAR2: the totals for 0 .. MOST anchors and the optimum."""
    rows = []
    for target in TARGETS:
        for form in CountPenalty:
            anchors = AnchorsConfig(count=target, max_count=target + 1 if is_capped else MOST)
            values = totals(RewardConfig(tar2_form=form), anchors, quality)
            rows.append([str(target), form.value, *(str(round(v)) for v in values), str(optimum(values))])
    return rows


def optimum_rows() -> list[list[str]]:
    """The optimum for each target, form, cap and quality of the anchors."""
    rows = []
    for target in TARGETS:
        for form in CountPenalty:
            for cap in (MOST, target + 1):
                anchors, reward = AnchorsConfig(count=target, max_count=cap), RewardConfig(tar2_form=form)
                best = [str(optimum(totals(reward, anchors, quality))) for quality in QUALITIES]
                rows.append([str(target), form.value, "none" if cap == MOST else str(cap), *best])
    return rows


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; numbers to the right."""
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print all three tables."""
    head = ["K", "TAR2", *(f"N={n}" for n in range(MOST + 1)), "best N"]
    print("Totals of near-perfect anchors, without a cap\n\n" + markdown(head, landscape_rows(is_capped=False)))
    print("\nThe same with the cap K + 1\n\n" + markdown(head, landscape_rows(is_capped=True)))
    columns = ["K", "TAR2", "cap", *(f"IoU {q:g}" for q in QUALITIES)]
    print("\nBest N for anchors of several qualities\n\n" + markdown(columns, optimum_rows()))


if __name__ == "__main__":
    main()
