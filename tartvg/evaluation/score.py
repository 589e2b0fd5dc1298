"""Predictions of one data set -> Scorecard. Stands alone: annotations and answers in, numbers out. No torch.

Rules, all of which move published numbers:

- Every annotated query is in the denominator. An answer that could not be read has IoU 0 (`num_unparsed`), and so has
  a query without a greedy prediction (`num_missing`).
- mIoU and R1 look at the greedy answer (`sample_index` 0). Format figures look at the sampled completions
  (`sample_index` >= 1), because they describe the policy's distribution; without any they look at the greedy ones.
- The truth is the sample's windows, never what the prediction's record says. Several windows: see `answer_iou`.
- R1@t counts IoU >= t (strict: > t) on plain floats, without a tolerance.
- Intervals are 95 % percentile bootstrap intervals over *videos*: queries about one video are not independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from tartvg.records import to_json
from tartvg.spans import iou, iou_with_union, refinement, refinement_rates, soft_iou
from tartvg.types import Estimate, Fault, GroundingSample, Prediction, Scorecard, Span

Rule = Literal["best", "first", "union"]
RULES: tuple[Rule, ...] = ("best", "first", "union")
THRESHOLDS = (0.3, 0.5, 0.7)
"""The paper's."""
ALL_THRESHOLDS = (0.1, *THRESHOLDS)
"""With the one that works on TACoS add."""
RENAMED = {"anchors_mean": "count_mean", "consistency_rate": "answer_match_rate"}
"""Fields of older scores.json files, and their names today."""


@dataclass(frozen=True)
class ScoringRules:
    """What moves a score and is no part of the answers: a scorecard on disk names it."""

    rule: Rule = "best"
    """The truth where a query has several windows: see `answer_iou`."""
    is_strict: bool = False
    """R1 counts IoU > threshold instead of >=."""
    is_clipped: bool = True
    """Windows that end after their video were cut there, by whoever read the annotations."""


def answer_iou(answer: Span | None, windows: Sequence[Span], rule: Rule = "best") -> float:
    """IoU in [0, 1] of an answer with a query's windows; 0 for an answer that could not be read.

    `best`: the window that overlaps most (the official rule of QVHighlights' R1). `first`: the first window, as with
    `reward.truth=first`. `union`: all windows together, as a set of seconds. Equal when there is one window.
    """
    if answer is None:
        return 0.0
    if rule == "best":
        return max(iou(answer, window) for window in windows)
    if rule == "first":
        return iou(answer, windows[0])
    if rule == "union":
        return iou_with_union(answer, tuple(windows))
    raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")


def score(
    samples: Sequence[GroundingSample],
    predictions: Sequence[Prediction],
    thresholds: Sequence[float] = THRESHOLDS,
    rule: Rule = "best",
    strict: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    max_anchors: int | None = None,
) -> Scorecard:
    """Score predictions against the annotated queries; see the module for the conventions.

    `format_rate`: share of sampled completions without a fault. `valid_rate`: without a fault, with at least two
    anchors and, given `max_anchors`, not more than that. `count_mean`: anchors per completion. `anchored_rate`: share
    of completions with an anchor. `refinement_rate`: share of successive anchor pairs whose soft IoU with the best
    window grew; a tie did not grow; 0 without any pair.
    `answer_match_rate`: share of readable answers that are the last anchor, as the parser compares them
    (`Fault.ANSWER_MISMATCH`); an answer without anchors is not.
    `first_iou`, `last_iou`: IoU of the first and of the last anchor of greedy answers that have one. Of those with two
    or more: `equal_rate`, the last repeats the first; `first_exact_rate`, the first is the truth;
    `inexact_refined_rate`, `inexact_worsened_rate`: the last is closer to the truth than an inexact first, or farther.
    `oracle_iou`: mean over all queries of the best sampled answer's IoU, 0 for a query without one.

    `resamples` 0 gives intervals without width. Raises ValueError for an empty or repeated sample, a sample without
    windows, a prediction of an unknown sample, and a repeated (sample_id, sample_index).
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if resamples < 0:
        raise ValueError(f"resamples must be >= 0, got {resamples}")
    by_id = _index(samples)
    _check(by_id, predictions)
    greedy = {p.sample_id: p for p in predictions if p.sample_index == 0}
    sampled = [p for p in predictions if p.sample_index > 0] or list(greedy.values())
    ious = _greedy_ious(samples, greedy, rule)
    bootstrap = _Bootstrap.over(samples, resamples, seed)

    def over_queries(values: np.ndarray) -> Estimate:
        return bootstrap.ratio([s.video.as_posix() for s in samples], values)

    def over_completions(values: Iterable[bool]) -> Estimate:
        return bootstrap.ratio([by_id[p.sample_id].video.as_posix() for p in sampled], np.fromiter(values, float))

    best: dict[str, float] = {}
    for p in sampled:
        value = answer_iou(p.answer, by_id[p.sample_id].windows, rule)
        best[p.sample_id] = max(best.get(p.sample_id, 0.0), value)
    return Scorecard(
        num_queries=len(samples),
        num_unparsed=sum(p.answer is None for p in greedy.values()),
        num_missing=len(samples) - len(greedy),
        miou=over_queries(ious),
        recall={float(t): over_queries((ious > t if strict else ious >= t).astype(float)) for t in thresholds},
        format_rate=over_completions(not p.faults for p in sampled),
        valid_rate=over_completions(_is_valid(p, max_anchors) for p in sampled),
        count_mean=_mean([len(p.anchors) for p in sampled]),
        anchored_rate=_mean([bool(p.anchors) for p in sampled]),
        refinement_rate=_mean([grew for p in sampled for grew in _refinements(p, by_id[p.sample_id])]),
        answer_match_rate=_mean([_is_consistent(p) for p in sampled if p.answer is not None]),
        oracle_iou=sum(best.values()) / len(samples),
        **_first_and_last(list(greedy.values()), by_id),
    )


def paired_p_value(
    samples: Sequence[GroundingSample],
    a: Sequence[Prediction],
    b: Sequence[Prediction],
    rule: Rule = "best",
    permutations: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value in (0, 1] of "a and b have the same mIoU": a paired sign-flip test by video.

    Under the null hypothesis the two sets of greedy answers are exchangeable, so the summed IoU difference of each
    video may change its sign; all queries of a video flip together. p = (1 + hits) / (1 + permutations), so it is
    never 0, and it cannot fall below about 2 / 2^videos. Raises ValueError as `score` does.
    """
    by_id = _index(samples)
    difference = np.zeros(len(samples))
    for sign, predictions in ((1.0, a), (-1.0, b)):
        _check(by_id, predictions)
        difference += sign * _greedy_ious(samples, {p.sample_id: p for p in predictions if p.sample_index == 0}, rule)
    _, video_of = np.unique([s.video.as_posix() for s in samples], return_inverse=True)
    by_video = np.bincount(video_of, weights=difference)
    # Rounding must not decide ties: a permutation that only reorders the sum counts as equally extreme.
    bound = abs(by_video.sum()) - 1e-9
    rng, hits, left = np.random.default_rng(seed), 0, permutations
    while left > 0:
        signs = 2.0 * rng.integers(0, 2, size=(min(left, 500), len(by_video)), dtype=np.int8) - 1.0
        hits += int((np.abs(signs @ by_video) >= bound).sum())
        left -= len(signs)
    return (1 + hits) / (1 + permutations)


def scorecard_to_json(card: Scorecard, rules: ScoringRules) -> dict[str, Any]:
    """What scores.json holds: the scorecard, and how it was made."""
    return {**to_json(card), **to_json(rules)}


def scorecard_from_json(value: Mapping[str, Any]) -> Scorecard:
    """The scorecard of `scorecard_to_json` or `records.to_json`, whose thresholds are strings."""
    value = {RENAMED.get(name, name): item for name, item in value.items()}
    known = {f.name: value[f.name] for f in fields(Scorecard) if f.name in value}
    estimates = {name: _estimate(value[name]) for name in ("miou", "format_rate", "valid_rate")}
    recall = {float(t): _estimate(e) for t, e in value["recall"].items()}
    return Scorecard(**{**known, **estimates, "recall": recall})


def _estimate(value: Any) -> Estimate:
    """An estimate by name; in older files a list."""
    return Estimate(**value) if isinstance(value, Mapping) else Estimate(*value)


def _index(samples: Sequence[GroundingSample]) -> dict[str, GroundingSample]:
    by_id: dict[str, GroundingSample] = {}
    for sample in samples:
        if sample.sample_id in by_id:
            raise ValueError(f"sample {sample.sample_id!r} is there twice")
        if not sample.windows:
            raise ValueError(f"sample {sample.sample_id!r} has no windows: a blind test set cannot be scored")
        by_id[sample.sample_id] = sample
    if not by_id:
        raise ValueError("there are no samples to score")
    return by_id


def _check(by_id: Mapping[str, GroundingSample], predictions: Sequence[Prediction]) -> None:
    seen: set[tuple[str, int]] = set()
    for p in predictions:
        key = (p.sample_id, p.sample_index)
        if p.sample_id not in by_id:
            raise ValueError(f"prediction for {p.sample_id!r}, which is not among the {len(by_id)} samples")
        if key in seen:
            raise ValueError(f"prediction {p.sample_id!r}, sample_index {p.sample_index} is there twice")
        seen.add(key)


def _greedy_ious(samples: Sequence[GroundingSample], greedy: Mapping[str, Prediction], rule: Rule) -> np.ndarray:
    answers = [greedy[s.sample_id].answer if s.sample_id in greedy else None for s in samples]
    return np.array([answer_iou(answer, s.windows, rule) for s, answer in zip(samples, answers, strict=True)])


def _is_valid(p: Prediction, max_anchors: int | None) -> bool:
    return not p.faults and len(p.anchors) >= 2 and (max_anchors is None or len(p.anchors) <= max_anchors)


def _is_consistent(p: Prediction) -> bool:
    return bool(p.anchors) and Fault.ANSWER_MISMATCH.value not in p.faults


def _refinements(p: Prediction, sample: GroundingSample) -> list[bool]:
    """For each anchor but the first: is it closer to the truth than the one before?"""
    values = [max(soft_iou(anchor, window) for window in sample.windows) for anchor in p.anchors]
    return [later > earlier for earlier, later in pairwise(values)]


def _first_and_last(greedy: Sequence[Prediction], by_id: Mapping[str, GroundingSample]) -> dict[str, float]:
    anchored = [(p, refinement(p.anchors, by_id[p.sample_id].windows)) for p in greedy if p.anchors]
    return {
        "first_iou": _mean([found.first for _, found in anchored]),
        "last_iou": _mean([found.last for _, found in anchored]),
        **refinement_rates([found for p, found in anchored if len(p.anchors) >= 2]),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


@dataclass(frozen=True)
class _Bootstrap:
    """Resampled videos: `counts[r, v]` says how often resample r drew video v."""

    row_of: dict[str, int]
    counts: np.ndarray

    @classmethod
    def over(cls, samples: Sequence[GroundingSample], resamples: int, seed: int) -> _Bootstrap:
        # Sorted, so that the order of the annotations does not change the interval.
        videos = sorted({s.video.as_posix() for s in samples})
        counts = np.random.default_rng(seed).multinomial(len(videos), np.full(len(videos), 1 / len(videos)), resamples)
        return cls({video: row for row, video in enumerate(videos)}, counts)

    def ratio(self, videos: Sequence[str], values: np.ndarray) -> Estimate:
        """The mean of `values` with its interval; `videos[i]` is the cluster of `values[i]`. Empty: all zeros."""
        if len(values) == 0:
            return Estimate(0.0, 0.0, 0.0)
        rows = [self.row_of[video] for video in videos]
        sums = np.bincount(rows, weights=values, minlength=len(self.row_of))
        numbers = np.bincount(rows, minlength=len(self.row_of))
        mean = float(sums.sum() / numbers.sum())
        drawn = self.counts @ numbers
        # A resample may hold only videos without any completion; it says nothing about the mean.
        means = (self.counts @ sums)[drawn > 0] / drawn[drawn > 0]
        if len(means) == 0:
            return Estimate(mean, mean, mean)
        low, high = np.percentile(means, [2.5, 97.5])
        return Estimate(mean, float(low), float(high))
