"""What is measured for the monitors alone: the distance to the reference, and whether answers depend on the video.

Rows are plain JSON values, one per group, so that they may be collected from several processes before they are
averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tartvg.config import SamplingConfig
from tartvg.evaluation.faithfulness import Pair, Said, compare
from tartvg.policy.controls import shuffled
from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch
from tartvg.policy.sampling import greedy
from tartvg.records import response_from_json, to_json
from tartvg.response import parse_response

Row = dict[str, Any]


def is_due(every: int, step: int) -> bool:
    """Whether something that is measured every so many steps is measured at this one; 0 is never."""
    return every > 0 and step % every == 0


def drift_rows(tokens: Sequence[TokenBatch], references: Sequence[Tensor]) -> list[Row]:
    """Summed log-ratio of the policy that sampled and its reference (k1), and how many tokens it is over."""
    return [
        {"log_ratio": float((t.logps - r)[t.mask].double().sum()), "num_tokens": int(t.mask.sum())}
        for t, r in zip(tokens, references, strict=True)
    ]


def control_rows(policy: Policy, prepared: Sequence[PreparedPrompt], settings: SamplingConfig) -> list[Row]:
    """Greedy answers to each prompt with its frames in order, and with its frames shuffled."""
    both = [*prepared, *map(shuffled, prepared)]
    answers = policy.sample(both, 1, greedy(settings), [0] * len(both)) if both else []
    said = [to_json(parse_response(completion.text)) for (completion,) in answers]
    pairs = zip(said[: len(prepared)], said[len(prepared) :], strict=True)
    return [{"real": real, "control": control} for real, control in pairs]


def measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rows of all groups as metrics; what was not measured is not there.

    - rollout/kl: nats per token from the reference, estimated by k1 over all tokens
    - anchors/shuffled_agreement, anchors/shuffled_changed_rate: see `Agreement`
    """
    metrics = {}
    drifts = [row for row in rows if "log_ratio" in row]
    if drifts:
        count = max(1, sum(row["num_tokens"] for row in drifts))
        metrics["rollout/kl"] = sum(row["log_ratio"] for row in drifts) / count
    found = compare([Pair(_said(row["real"]), _said(row["control"])) for row in rows if "real" in row])
    if found is not None:
        metrics["anchors/shuffled_agreement"] = found.agreement
        metrics["anchors/shuffled_changed_rate"] = found.changed_rate
    return metrics


def _said(value: dict[str, Any]) -> Said:
    response = response_from_json(value)
    return Said(response.anchors, response.answer)
