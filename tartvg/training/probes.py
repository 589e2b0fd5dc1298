"""What is measured for the monitors alone: the distance to the reference, and whether answers depend on the video.

Rows are plain JSON values, one per group, so that they may be collected from several processes before they are
averaged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tartvg.config import SamplingConfig
from tartvg.data.packets import VideoError
from tartvg.data.video import Clip
from tartvg.evaluation.faithfulness import Pair, Said, compare
from tartvg.policy.controls import shuffled
from tartvg.policy.policy import Policy, PreparedPrompt, TokenBatch
from tartvg.policy.sampling import greedy
from tartvg.records import response_from_json, to_json
from tartvg.response import parse_response
from tartvg.training.out_of_memory import ALL_ROWS, in_fewest_parts
from tartvg.types import Completion, Prompt

Row = dict[str, Any]


def is_due(every: int, step: int) -> bool:
    """Return whether something that is measured every so many steps is measured at this one; 0 is never."""
    return every > 0 and step % every == 0


def drift_rows(tokens: Sequence[TokenBatch], references: Sequence[Tensor]) -> list[Row]:
    """Summed log-ratio of the policy that sampled and its reference (k1), and how many tokens it is over."""
    return [
        {"log_ratio": float((t.logps - r)[t.mask].double().sum()), "num_tokens": int(t.mask.sum())}
        for t, r in zip(tokens, references, strict=True)
    ]


def sampler_gap(tokens: TokenBatch, logps_GT: Tensor) -> Tensor:
    """Mean distance, in nats, of the log-probabilities recorded while sampling from those that training computes."""
    gap_GT = torch.where(tokens.mask, (tokens.logps - logps_GT).abs(), 0.0)
    return gap_GT.sum() / tokens.mask.sum().clamp(min=1)


def rows_of(tokens: TokenBatch, part: slice) -> TokenBatch:
    """Some completions of a group."""
    return tokens if part == ALL_ROWS else TokenBatch(tokens.ids[part], tokens.mask[part], tokens.logps[part])


def decodable(policy: Policy, prompts: Sequence[Prompt], who: str, clips: Mapping[Path, Clip]) -> list[PreparedPrompt]:
    """Prompts with their videos, for scores; one that cannot be decoded is left out, and `who` says so."""
    prepared = []
    for prompt in prompts:
        try:
            prepared.append(policy.prepare(prompt, clips.get(prompt.sample.video)))
        except VideoError as error:
            print(f"{who}: {prompt.sample.sample_id} counts as missing: {error}")
    return prepared


def greedy_answers(policy: Policy, prepared: Sequence[PreparedPrompt], settings: SamplingConfig) -> list[Completion]:
    """Decode one greedy completion of each prompt, all at once or in the fewest parts that fit into memory."""
    if not prepared:
        return []

    def sample(part: slice) -> list[list[Completion]]:
        return policy.sample(prepared[part], 1, greedy(settings), [0] * len(prepared[part]))

    return [completion for part in in_fewest_parts(sample, len(prepared)) for (completion,) in part]


def control_rows(policy: Policy, prepared: Sequence[PreparedPrompt], settings: SamplingConfig) -> list[Row]:
    """Greedy answers to each prompt with its frames in order, and with its frames shuffled."""
    both = [*prepared, *map(shuffled, prepared)]
    said = [to_json(parse_response(c.text)) for c in greedy_answers(policy, both, settings)]
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
