"""Recorded rollouts as the data of their page: JSON step by step, thinned out to what a page can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from tartvg.evaluation.score import answer_iou
from tartvg.records import dumps, group_from_json, read_jsonl
from tartvg.report.cards import MAX_CHARACTERS
from tartvg.response import read_marks
from tartvg.spans import iou
from tartvg.tracking.tables import fault_names
from tartvg.types import Rollout, RolloutGroup, Span

MAX_BYTES = 8_000_000
"""Of the data of a page, which stays below 10 MB with all that is around them."""
MAX_STEP_BYTES = 1_000_000
"""Of one step: further queries of it are left out, but for the first."""

Advantages = Callable[[RolloutGroup], Sequence[Sequence[float]]]
"""A group -> advantages (G, S) of the segments of its completions, as `tartvg.grpo.credit` has them."""


@dataclass(frozen=True)
class ChosenSteps:
    """Steps at even distances, the first and the last among them."""

    texts: tuple[str, ...]
    """JSON of each."""
    num_steps: int
    """All that are recorded."""


def choose_steps(path: Path, advantages: Advantages | None, max_bytes: int = MAX_BYTES) -> ChosenSteps:
    """Read a rollouts.jsonl once; every second step is dropped whenever what is kept exceeds `max_bytes`.

    Raises ValueError for a damaged file.
    """
    kept: dict[int, str] = {}
    groups: list[dict[str, Any]] = []
    number, stride, size = -1, 1, 0
    room = max_bytes - MAX_STEP_BYTES  # of which the last step needs some
    for number, groups in enumerate(_steps(path)):
        if number % stride:
            continue
        kept[number] = _step_json(groups, advantages)
        size += len(kept[number].encode())
        while len(kept) > 1 and size > room:
            stride *= 2
            kept = {n: text for n, text in kept.items() if n % stride == 0}
            size = sum(len(text.encode()) for text in kept.values())
    if groups and number not in kept:
        kept[number] = _step_json(groups, advantages)
    return ChosenSteps(tuple(kept.values()), number + 1)


def _steps(path: Path) -> Iterator[list[dict[str, Any]]]:
    for _, values in groupby(read_jsonl(path, is_partial_allowed=True), key=lambda value: value["step"]):
        yield list(values)


def _step_json(values: Sequence[dict[str, Any]], advantages: Advantages | None) -> str:
    texts: list[str] = []
    size = 0
    for value in values:
        text = dumps(group_json(group_from_json(value), advantages))
        size += len(text.encode())
        if texts and size > MAX_STEP_BYTES:
            break
        texts.append(text)
    return f'{{"step": {int(values[0]["step"])}, "of": {len(values)}, "groups": [{", ".join(texts)}]}}'


def group_json(group: RolloutGroup, advantages: Advantages | None) -> dict[str, Any]:
    """One query with its completions, in the order in which they were drawn."""
    sample, num = group.prompt.sample, len(group.rollouts)
    rows: Sequence[Sequence[float] | None] = advantages(group) if advantages else [None] * num
    apart = disagreements([rollout.response.answer for rollout in group.rollouts])
    return {
        "query": sample.query,
        "video": sample.video.name,
        "duration": sample.duration,
        "windows": sample.windows,
        "rollouts": [
            _rollout_json(rollout, sample.windows, row) | {"number": number, "disagreement": round(value, 3)}
            for number, (rollout, row, value) in enumerate(zip(group.rollouts, rows, apart, strict=True), start=1)
        ],
    }


def _rollout_json(rollout: Rollout, windows: Sequence[Span], advantages: Sequence[float] | None) -> dict[str, Any]:
    text, response, reward = rollout.completion.text, rollout.response, rollout.reward
    return {
        "parts": _shortened(parts_of(text, advantages)),
        "more": max(0, len(text) - MAX_CHARACTERS),
        "faults": fault_names([fault.value for fault in response.faults], rollout.completion.is_finished),
        "total": round(reward.total, 3),
        "terms": {name: round(value, 3) for name, value in reward.terms.items()},
        "anchors": response.anchors,
        "anchor_ious": [round(value, 3) for value in reward.anchor_ious],
        "answer": response.answer,
        "answer_iou": round(answer_iou(response.answer, windows), 3) if windows else 0.0,
    }


def parts_of(text: str, advantages: Sequence[float] | None) -> list[tuple[str, float | None]]:
    """Cut a completion where its tokens' advantage changes: behind each anchor that has a segment.

    `advantages` are those of its segments, the last one that of what follows the last anchor. The token that closes an
    anchor belongs to it with whatever else it says, which is at most a sign.
    """
    if advantages is None:
        return [(text, None)]
    ends = [end for _, end in read_marks(text).anchors[: len(advantages) - 1]]
    pieces = [text[start:end] for start, end in pairwise([0, *ends, len(text)])]
    values = [*advantages[: len(ends)], advantages[-1]]
    return [(piece, round(value, 3)) for piece, value in zip(pieces, values, strict=True) if piece]


def _shortened(parts: Sequence[tuple[str, float | None]]) -> list[tuple[str, float | None]]:
    found, left = [], MAX_CHARACTERS
    for text, value in parts:
        if left > 0:
            found.append((text[:left], value))
        left -= len(text)
    return found


def disagreements(answers: Sequence[Span | None]) -> list[float]:
    """1 minus the mean IoU of each answer with the others of its group, in [0, 1]; an unreadable one overlaps none."""
    found = []
    for i, answer in enumerate(answers):
        others = [other for j, other in enumerate(answers) if j != i]
        overlaps = [iou(answer, other) if answer is not None and other is not None else 0.0 for other in others]
        found.append(1.0 - fmean(overlaps) if overlaps else 0.0)
    return found
