"""The output head: which tokens a policy may say, and how exactly their logits are computed.

Legend: N states, V rows of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

NEVER_SAMPLED = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def never_sampled(tokenizer: Any) -> list[int]:
    """Ids of `NEVER_SAMPLED`, as far as the tokenizer has them."""
    ids = [tokenizer.convert_tokens_to_ids(t) for t in NEVER_SAMPLED]
    return [i for i in ids if i is not None and i != tokenizer.unk_token_id]


def token_bias(banned: Sequence[int], num_words: int, size: int, device: torch.device) -> Tensor:
    """What is added to logits: float32 (V,), -inf for banned tokens and for rows that the tokenizer has no word for.

    Released heads have such rows. A bias instead of an index: a list of ids would be copied to the device each time.
    """
    bias = torch.zeros(size, device=device)
    bias[list(banned)] = float("-inf")
    bias[num_words:] = float("-inf")
    return bias


CHUNK = 16384
"""Rows of the head that are float32 at a time."""


def compute_in_float32(head: Any) -> None:
    """Let a linear head of 16 bits keep its products in float32.

    bfloat16 has steps of 0.06 to 0.13 at logits of 16, which is noise of 0.025 to 0.05 nats on each log-probability.
    The ratio of two policies that are a small update apart must not consist of it.
    """
    if head.weight.dtype != torch.float32:
        head.forward = partial(_logits, head)  # the module is called as before: ZeRO-3 has hooks on it


def _logits(head: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = _Float32Product.apply(hidden.flatten(0, -2), head.weight)
    return logits.unflatten(0, hidden.shape[:-1])


class _Float32Product(torch.autograd.Function):
    """hidden (N, width) and the frozen weight (V, width), both of 16 bits -> float32 (N, V)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        if hidden.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # the same kernel, its sums not rounded
            exact: Tensor = torch.ops.aten.mm.dtype(hidden, weight.t(), torch.float32)
            return exact
        return torch.cat([hidden.float() @ part.float().t() for part in weight.split(CHUNK)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return gradients[0].to(weight.dtype) @ weight, None
