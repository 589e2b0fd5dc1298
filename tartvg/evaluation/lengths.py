"""What QVHighlights is judged by beside mIoU and R1: mAP, and all scores by window length. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tartvg.evaluation.detection import LENGTHS, DetectionScores, Ranking, mean_average_precision, of_length
from tartvg.evaluation.score import ALL_THRESHOLDS, Rule, score
from tartvg.types import GroundingSample, Prediction


@dataclass(frozen=True)
class LengthScores:
    """Scores over the queries with windows of one length."""

    num_queries: int
    miou: float
    recall: dict[float, float]
    detection: DetectionScores


def scores_by_length(
    samples: Sequence[GroundingSample],
    predictions: Sequence[Prediction],
    ranking: Ranking,
    rule: Rule = "best",
    strict: bool = False,
) -> dict[str, LengthScores]:
    """By length (a key of `LENGTHS`); lengths that no true window has are left out. Raises ValueError as `score` does.

    mIoU and R1 are those of the `predictions`, mAP that of the `ranking`.
    """
    by_length = {}
    for name in LENGTHS:
        part = of_length(samples, name)
        if not part:
            continue
        ids = {s.sample_id for s in part}
        own = [p for p in predictions if p.sample_id in ids]
        scored = score(part, own, ALL_THRESHOLDS, rule, strict, resamples=0)
        recall = {t: e.value for t, e in scored.recall.items()}
        by_length[name] = LengthScores(len(part), scored.miou.value, recall, mean_average_precision(part, ranking))
    return by_length
