"""Completions as rows of W&B tables. The complete record is rollouts.jsonl and predictions.jsonl; these are samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tartvg import rewards
from tartvg.spans import iou
from tartvg.types import Prediction, Rollout, RolloutGroup, Span

ANSWER_COLUMNS = ("rank", "sample_id", "query", "text", "truth", "anchors", "answer", "iou", "faults")


def example_columns() -> tuple[str, ...]:
    """Return the columns of `example_rows`; every reward term has one."""
    terms = (term.name for term in rewards.rubric.TERMS)
    return ("step", "rank", "query", "text", "truth", "anchors", "answer", "total", *terms, "anchor_ious")


def example_rows(groups: Sequence[RolloutGroup], step: int, num: int) -> list[list[Any]]:
    """Rows of `example_columns`: the best `num` completions first, then the worst, none of them twice."""
    ranked = sorted(
        ((group, rollout) for group in groups for rollout in group.rollouts),
        key=lambda pair: pair[1].reward.total,
        reverse=True,
    )
    return [_example_row(rank, group, rollout, step) for rank, (group, rollout) in _extremes(ranked, num)]


def answer_rows(predictions: Sequence[Prediction], num: int) -> list[list[Any]]:
    """Rows of `ANSWER_COLUMNS`: the greedy answers with the highest IoU first, then those with the lowest."""
    greedy = [(p, _overlap(p)) for p in predictions if p.sample_index == 0]
    ranked = sorted(greedy, key=lambda pair: pair[1], reverse=True)
    return [
        [
            rank, p.sample_id, p.query, p.text, _text(p.windows), _text(p.anchors), _answer(p.answer),
            value, ", ".join(p.faults),
        ]
        for rank, (p, value) in _extremes(ranked, num)
    ]  # fmt: skip


def _extremes(ranked: Sequence[Any], num: int) -> list[tuple[str, Any]]:
    best, rest = ranked[:num], ranked[num:]
    return [("best", item) for item in best] + [("worst", item) for item in rest[::-1][:num]]


def _example_row(rank: str, group: RolloutGroup, rollout: Rollout, step: int) -> list[Any]:
    response, reward = rollout.response, rollout.reward
    return [
        step,
        rank,
        group.prompt.sample.query,
        rollout.completion.text,
        _text(group.prompt.sample.windows),
        _text(response.anchors),
        _answer(response.answer),
        reward.total,
        *(reward.terms[term.name] for term in rewards.rubric.TERMS),
        ", ".join(f"{value:.3f}" for value in reward.anchor_ious),
    ]


def _overlap(p: Prediction) -> float:
    return max((iou(p.answer, window) for window in p.windows), default=0.0) if p.answer is not None else 0.0


def _answer(span: Span | None) -> str:
    return "unreadable" if span is None else str(span)


def _text(spans: Sequence[Span]) -> str:
    return ", ".join(str(span) for span in spans)
