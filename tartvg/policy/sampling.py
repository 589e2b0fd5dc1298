"""Drawing completions: every prompt is prefilled once, and its G rows share what was computed.

Legend: P prompts, G rollouts per prompt, R = P * G rows, T tokens of a completion, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tartvg.config import SamplingConfig


def restrict(logits: Tensor, settings: SamplingConfig) -> Tensor:
    """Probabilities after top-k and top-p: (R, V) -> (R, V), rows sum to 1. `logits` are divided by the temperature.

    top-k keeps the k most likely tokens (ties at the border are all kept); top-p keeps the smallest set of most likely
    tokens whose probability reaches p (Holtzman et al. 2020).
    """
    if 0 < settings.top_k < logits.shape[-1]:
        border = logits.topk(settings.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < border, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if settings.top_p < 1.0:
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        is_over = ordered.cumsum(dim=-1) - ordered >= settings.top_p
        kept = ordered.masked_fill(is_over, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, kept)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution: (R, V) and (R,) in [0, 1) -> int64 (R,).

    A row's token depends on its own number only, so a rollout does not change with the batch that it is drawn in.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    token = (cumulative <= threshold).sum(dim=-1)
    # rounding can step over the last possible token; go back to it
    last = (probabilities > 0).int().cumsum(dim=-1).argmax(dim=-1)
    return torch.minimum(token, last)


def uniforms(seeds: Sequence[int], group_size: int, num_tokens: int) -> Tensor:
    """The random numbers of all rows and tokens: float64 (P, G, T) in [0, 1).

    Each prompt has a stream of its own, which gives its rows one number each, token after token.
    """
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(num_tokens, group_size, generator=s, dtype=torch.float64).t() for s in streams])


def greedy(settings: SamplingConfig) -> SamplingConfig:
    """Keep the limits, without randomness."""
    return replace(settings, temperature=0.0, top_p=1.0, top_k=0)


def stream_seed(*parts: object) -> int:
    """Derive a seed from all parts and nothing else, so that rollouts survive a restart unchanged."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1
