"""A group of rollouts -> the advantages, and the weight of the KL penalty, of each of its tokens.

Dimensions: G rollouts per prompt, K most paid anchors of a completion of the group, S segments, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tartvg.config import GrpoConfig
from tartvg.grpo import SCHEMES, Comparison, Earned, per_token
from tartvg.policy.offsets import tokens_until
from tartvg.response import read_marks
from tartvg.rewards import Rubric, rubric
from tartvg.types import Completion, RolloutGroup

NUMBER = re.compile(r"[0-9][0-9.]*")


def earned_by(group: RolloutGroup, judge: Rubric) -> Earned:
    """What each completion earned, term by term and anchor by anchor.

    Anchors above the cap have no segment; a term that pays them all the same pays the completion as a whole.
    """
    rewards, cap = [r.reward for r in group.rollouts], judge.anchors.max_count
    raw_G = [judge.raw_terms(r.response, group.prompt.sample) for r in group.rollouts]
    counts = [min(cap, len(reward.anchor_ious)) for reward in rewards]
    most = max(counts)

    def padded(rows: Sequence[Sequence[float]]) -> Tensor:
        filled = [[*row[:most], *[0.0] * (most - len(row))] for row in rows]
        return torch.tensor(filled, dtype=torch.float32).reshape(len(rows), most)

    terms, shares = {}, {}
    for name in raw_G[0]:
        values = [raw[name] for raw in raw_G]
        parts = [value for value in values if isinstance(value, Sequence)]
        if parts:
            shares[name] = padded(parts)
        whole = [float(sum(value[most:])) if isinstance(value, Sequence) else value for value in values]
        terms[name] = torch.tensor(whole, dtype=torch.float32)
    totals = torch.tensor([reward.total for reward in rewards], dtype=torch.float32)
    return Earned(totals, terms, shares, padded([reward.anchor_ious for reward in rewards]), torch.tensor(counts))


def segment_advantages(group: RolloutGroup, judge: Rubric, settings: GrpoConfig) -> Tensor:
    """Advantages (G, S) of the segments, or (G, 1) where all tokens of a completion have the same."""
    weights = {term.name: term.signed_weight(judge.reward) for term in rubric.TERMS}
    compare = Comparison(weights, settings.normalise, settings.advantage_scale)
    return SCHEMES[settings.credit](earned_by(group, judge), compare)


def token_advantages(group: RolloutGroup, judge: Rubric, settings: GrpoConfig, tokenizer: Any) -> Tensor:
    """Advantages (G, T) of all tokens up to the longest completion, or (G, 1) where they do not differ."""
    advantages_GS = segment_advantages(group, judge, settings)
    if advantages_GS.shape[1] == 1:
        return advantages_GS
    completions = [rollout.completion for rollout in group.rollouts]
    return per_token(advantages_GS, segments(completions, tokenizer, judge.anchors.max_count))


def segments(completions: Sequence[Completion], tokenizer: Any, cap: int) -> Tensor:
    """Number the segment of each token: int64 (G, T), as `tartvg.grpo.credit` has them.

    Text that the parser does not count as an anchor (unclosed, unreadable, outside the reasoning, above the cap)
    belongs to the segment that follows it, and so does whatever a completion that was cut off has begun.
    """
    ends_G = [
        tokens_until(tokenizer, c.token_ids, [end for _, end in read_marks(c.text).anchors[:cap]]) for c in completions
    ]
    longest, most = max(len(c.token_ids) for c in completions), max(map(len, ends_G))
    segments_GT = torch.full((len(completions), longest), most)
    for row, ends in enumerate(ends_G):
        for k in reversed(range(len(ends))):
            segments_GT[row, : ends[k]] = k
    return segments_GT


def kl_coefs(group: RolloutGroup, settings: GrpoConfig, tokenizer: Any) -> Tensor | None:
    """Weight of the KL penalty at each token (G, T); None where it is `grpo.kl_coef` everywhere."""
    if settings.kl_time_coef is None:
        return None
    completions = [rollout.completion for rollout in group.rollouts]
    longest = max(len(c.token_ids) for c in completions)
    coef_GT = torch.full((len(completions), longest), settings.kl_coef)
    for row, completion in enumerate(completions):
        for start, end in time_tokens(completion, tokenizer):
            coef_GT[row, start:end] = settings.kl_time_coef
    return coef_GT


def time_tokens(completion: Completion, tokenizer: Any) -> list[tuple[int, int]]:
    """Find the tokens, from and up to, that hold a digit of an anchor or of the answer."""
    marks = read_marks(completion.text)
    blocks = [*marks.anchors, *([marks.answer] if marks.answer else [])]
    numbers = [match.span() for block in blocks for match in NUMBER.finditer(completion.text, *block)]
    ends = tokens_until(tokenizer, completion.token_ids, [place for a, b in numbers for place in (a + 1, b)])
    return [(first - 1, last) for first, last in zip(ends[::2], ends[1::2], strict=True)]
