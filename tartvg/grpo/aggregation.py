"""Token losses -> one number.

Dimensions: G rollouts per prompt, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tartvg.config import Aggregation


def _sequence_mean(values_GT: Tensor, mask_GT: Tensor, max_new_tokens: int) -> tuple[Tensor, float | Tensor]:
    means_G = values_GT.sum(dim=-1) / mask_GT.sum(dim=-1).clamp(min=1)
    return means_G.sum(), values_GT.shape[0]


def _token_mean(values_GT: Tensor, mask_GT: Tensor, max_new_tokens: int) -> tuple[Tensor, float | Tensor]:
    return values_GT.sum(), mask_GT.sum().clamp(min=1)


def _constant(values_GT: Tensor, mask_GT: Tensor, max_new_tokens: int) -> tuple[Tensor, float | Tensor]:
    return values_GT.sum(), values_GT.shape[0] * max_new_tokens


_KINDS: dict[Aggregation, Callable[[Tensor, Tensor, int], tuple[Tensor, float | Tensor]]] = {
    Aggregation.sequence_mean: _sequence_mean,
    Aggregation.token_mean: _token_mean,
    Aggregation.constant: _constant,
}


def aggregate(
    values_GT: Tensor,
    mask_GT: Tensor,
    kind: Aggregation,
    *,
    max_new_tokens: int,
    normaliser: float | Tensor | None = None,
) -> Tensor:
    """A scalar. `values_GT` must be 0 where `mask_GT` (0 or 1, floating) is 0.

    - sequence_mean: the sum of per-row token means, over G (GRPO, arXiv 2402.03300)
    - token_mean: the sum of tokens, over the number of tokens (DAPO, arXiv 2503.14476)
    - constant: the sum of tokens, over G * max_new_tokens (Dr. GRPO, arXiv 2503.20783)

    `normaliser` replaces the stated divisor, so that the losses of several groups or ranks share a global one and
    simply add up. A row without tokens adds 0 and still counts in G.
    """
    total, divisor = _KINDS[kind](values_GT, mask_GT, max_new_tokens)
    return total / (divisor if normaliser is None else normaliser)


def divisor(mask_GT: Tensor, kind: Aggregation, max_new_tokens: int) -> float:
    """What `aggregate` divides by for a whole group: the `normaliser` for the parts of it."""
    mask_GT = mask_GT.float()
    return float(_KINDS[kind](mask_GT, mask_GT, max_new_tokens)[1])
