"""The detection scores of QVHighlights: mean average precision, and all scores by length of the true window. No torch.

One answer is no ranking; what several answers to one query are as a ranking, `ranked_answers` says for the scores and
for a submission alike.

After the benchmark's own evaluator (moment_detr `standalone_eval`, arXiv 2107.09609), which follows ActivityNet's:
per query the first 10 predicted windows, sorted by score, each matched to the unused true window that it overlaps most;
average precision with the all-point interpolation of VOC 2011; averaged over queries and then over thresholds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tartvg.spans import iou
from tartvg.types import GroundingSample, Prediction, Span

MAP_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
MAX_WINDOWS = 10
"""Predicted windows per query that count; the rest of a list is cut before it is sorted."""
LENGTHS = {"short": (0.0, 10.0), "middle": (10.0, 30.0), "long": (30.0, 150.0)}
"""Seconds: above the first, up to and with the second."""

Ranked = tuple[tuple[Span, float], ...]
"""The windows predicted for one query, each with its score."""
Ranking = Mapping[str, Sequence[tuple[Span, float]]]
"""By sample id."""
NO_ANSWER = Span(0.0, 0.0)
"""Stands for an answer that could not be read: a window without length overlaps with nothing."""
UNANSWERED: Ranked = ((NO_ANSWER, 1.0),)


@dataclass(frozen=True)
class DetectionScores:
    """Mean average precision over the queries, in [0, 1]."""

    average: float
    """Over all thresholds: what papers call mAP or mAP avg."""
    at: dict[float, float]
    """By IoU threshold."""


def ranked_answers(predictions: Iterable[Prediction]) -> dict[str, Ranked]:
    """The answers to each query that has any, at most `MAX_WINDOWS`, the best first.

    The greedy answer comes first with score 1, because the official R1 takes the first of a list; unreadable or absent
    it keeps that place as `NO_ANSWER`, so that no sampled answer is scored in its stead. The sampled answers follow,
    scored by the share of the samples that gave them, below 1.
    """
    greedy: dict[str, Span | None] = {}
    sampled: dict[str, Counter[Span]] = {}
    for p in predictions:
        counter = sampled.setdefault(p.sample_id, Counter())
        if p.sample_index == 0:
            greedy[p.sample_id] = p.answer
        elif p.answer is not None:
            counter[p.answer] += 1
    ranking: dict[str, Ranked] = {}
    for sample_id, others in sampled.items():
        first, total = greedy.get(sample_id) or NO_ANSWER, others.total() + 1
        windows = [(span, round(count / total, 4)) for span, count in others.most_common() if span != first]
        ranking[sample_id] = ((first, 1.0), *windows[: MAX_WINDOWS - 1])
    return ranking


def mean_average_precision(samples: Sequence[GroundingSample], ranking: Ranking) -> DetectionScores:
    """mAP over all `samples`; a sample that `ranking` lacks, or lists no window for, has average precision 0.

    Raises ValueError for a sample without windows.
    """
    if not samples:
        return DetectionScores(0.0, dict.fromkeys(MAP_THRESHOLDS, 0.0))
    totals = [0.0] * len(MAP_THRESHOLDS)
    for sample in samples:
        if not sample.windows:
            raise ValueError(f"sample {sample.sample_id!r} has no windows: a blind test set cannot be scored")
        for i, value in enumerate(average_precisions(ranking.get(sample.sample_id, ()), sample.windows)):
            totals[i] += value
    at = {t: total / len(samples) for t, total in zip(MAP_THRESHOLDS, totals, strict=True)}
    return DetectionScores(sum(at.values()) / len(at), at)


def average_precisions(predicted: Sequence[tuple[Span, float]], windows: Sequence[Span]) -> list[float]:
    """Average precision of one query's ranking at each of `MAP_THRESHOLDS`."""
    ranked = sorted(predicted[:MAX_WINDOWS], key=lambda item: -item[1])
    overlaps = []
    for window, _ in ranked:
        values = ((iou(window, truth), number) for number, truth in enumerate(windows))
        overlaps.append(sorted((v for v in values if v[0] >= MAP_THRESHOLDS[0]), reverse=True))
    return [_average_precision(overlaps, len(windows), threshold) for threshold in MAP_THRESHOLDS]


def _average_precision(overlaps: list[list[tuple[float, int]]], num_true: int, threshold: float) -> float:
    """`overlaps[i]`: (IoU, true window) of the i-th best prediction, descending."""
    used: set[int] = set()
    hits: list[bool] = []
    for candidates in overlaps:
        match = next((n for value, n in candidates if value >= threshold and n not in used), None)
        hits.append(match is not None)
        if match is not None:
            used.add(match)
    # Precision at each hit, made monotone from the end: the area under the interpolated curve.
    area, best, found = 0.0, 0.0, len(used)
    for position in range(len(hits), 0, -1):
        if hits[position - 1]:
            best = max(best, found / position)
            area += best / num_true
            found -= 1
    return area


def of_length(samples: Sequence[GroundingSample], name: str) -> list[GroundingSample]:
    """The samples with only their windows of that length (a key of `LENGTHS`); queries without any are left out."""
    low, high = LENGTHS[name]
    kept = [replace(s, windows=tuple(w for w in s.windows if low < w.length <= high)) for s in samples]
    return [sample for sample in kept if sample.windows]
