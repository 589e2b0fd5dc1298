"""Completions as rows of W&B tables. The complete record is rollouts.jsonl and predictions.jsonl; these are samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from tartvg import rewards
from tartvg.spans import iou
from tartvg.types import Prediction, Rollout, RolloutGroup, Span

Item = TypeVar("Item")
ANSWER_COLUMNS = ("rank", "faults", "sample_id", "query", "text", "truth", "anchors", "answer", "iou")
"""`faults` are one value, so that W&B groups by what is wrong together; `rank` 1 is the best."""
NO_FAULT, CUT_OFF = "none", "cut_off"


def example_columns() -> tuple[str, ...]:
    """Return the columns of `example_rows`; every reward term has one."""
    terms = (term.name for term in rewards.rubric.TERMS)
    return ("step", "rank", "faults", "query", "text", "truth", "anchors", "answer", "total", *terms, "anchor_ious")


def example_rows(groups: Sequence[RolloutGroup], step: int, num: int) -> list[list[Any]]:
    """Rows of `example_columns` by total reward: the best `num` completions and the worst, none of them twice."""
    ranked = sorted(
        ((group, rollout) for group in groups for rollout in group.rollouts),
        key=lambda pair: pair[1].reward.total,
        reverse=True,
    )
    return [_example_row(rank, group, rollout, step) for rank, (group, rollout) in _extremes(ranked, num)]


def answer_rows(predictions: Sequence[Prediction], num: int) -> list[list[Any]]:
    """Rows of `ANSWER_COLUMNS` by IoU: the `num` best greedy answers and the worst, none of them twice."""
    return [
        [
            rank, _joined(fault_names(p.faults, p.is_finished)), p.sample_id, p.query, p.text, _text(p.windows),
            _text(p.anchors), _answer(p.answer), _overlap(p),
        ]
        for rank, p in extreme_answers(predictions, num)
    ]  # fmt: skip


def extreme_answers(predictions: Sequence[Prediction], num: int) -> list[tuple[int, Prediction]]:
    """The greedy answers with the `num` highest and the `num` lowest IoUs, with their ranks."""
    return _extremes(sorted((p for p in predictions if p.sample_index == 0), key=_overlap, reverse=True), num)


def fault_names(faults: Sequence[str], is_finished: bool) -> list[str]:
    """What is wrong with a completion, as names; whether the length limit cut it off is among them."""
    return [*faults, *([] if is_finished else [CUT_OFF])]


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names) or NO_FAULT


def _extremes(ranked: Sequence[Item], num: int) -> list[tuple[int, Item]]:
    numbered = list(enumerate(ranked, start=1))
    return numbered[:num] + numbered[max(num, len(numbered) - num) :]


def _example_row(rank: int, group: RolloutGroup, rollout: Rollout, step: int) -> list[Any]:
    response, reward = rollout.response, rollout.reward
    return [
        step,
        rank,
        _joined(fault_names([fault.value for fault in response.faults], rollout.completion.is_finished)),
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
