"""Key/value caches that let G completions hang on one prompt, and the attention that reads them.

Legend: P prompts, G rollouts per prompt, R = P * G rows, H query heads, K key/value heads, D head width,
L prompt length (padded to the longest), T completion length.

The three caches are the `past_key_values` of the library's decoder layers, which call `update` and attend to what it
returns. None of them copies the prompt G times while sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SHARED_PREFIX_ATTENTION = "tartvg_shared_prefix"
CAUSAL: dict[str, Tensor | None] = {"full_attention": None}
"""Mask of a plain causal pass; our own dict keeps the library from building one."""


class PrefixCache:
    """Keeps the keys and values of one prompt, with their gradients: list of (1, K, L, D) per layer."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values and hand them back."""
        assert layer == len(self.keys), "a prefix is filled by one pass over the layers"
        self.keys.append(keys)
        self.values.append(values)
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Tokens held."""
        return int(self.keys[0].shape[2]) if self.keys else 0


class ExpandedCache:
    """One prompt's cache in front of G completions that run as one batch; gradients flow into the prompt."""

    def __init__(self, prefix: PrefixCache) -> None:
        self.prefix = prefix

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """(G, K, T, D) behind the prompt's keys and values: (G, K, L + T, D)."""
        rows = keys.shape[0]
        before_k = self.prefix.keys[layer].expand(rows, -1, -1, -1)
        before_v = self.prefix.values[layer].expand(rows, -1, -1, -1)
        return torch.cat([before_k, keys], dim=2), torch.cat([before_v, values], dim=2)

    def get_seq_length(self, *_: Any) -> int:
        """Prompt tokens."""
        return self.prefix.get_seq_length()


class DecodeCache:
    """P prompts, each stored once, and the growing completions of R = P * G rows.

    Prompts of different lengths are padded at the end; `prefix_bias` (P, 1, 1, L) is 0 or -inf.
    """

    def __init__(self, prefixes: Sequence[PrefixCache], group_size: int, max_new_tokens: int) -> None:
        lengths = [p.get_seq_length() for p in prefixes]
        longest = max(lengths)
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in range(len(prefixes[0].keys)):
            self.keys.append(_stack([p.keys[layer] for p in prefixes], longest))
            self.values.append(_stack([p.values[layer] for p in prefixes], longest))
        first = self.keys[0]
        used = torch.arange(longest, device=first.device) < torch.tensor(lengths, device=first.device)[:, None]
        self.prefix_bias = torch.zeros(used.shape, dtype=first.dtype, device=first.device)
        self.prefix_bias.masked_fill_(~used, float("-inf"))
        self.prefix_bias = self.prefix_bias[:, None, None, :]
        rows, heads, width = len(prefixes) * group_size, first.shape[1], first.shape[3]
        shape = (rows, heads, max_new_tokens, width)
        self.new_keys = [first.new_empty(shape) for _ in self.keys]
        self.new_values = [first.new_empty(shape) for _ in self.keys]
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append one token per row, (R, K, 1, D); returns the completions so far, (R, K, t, D)."""
        self.new_keys[layer][:, :, self.length] = keys[:, :, 0]
        self.new_values[layer][:, :, self.length] = values[:, :, 0]
        end = self.length + 1
        return self.new_keys[layer][:, :, :end], self.new_values[layer][:, :, :end]

    def get_seq_length(self, *_: Any) -> int:
        """Prompt and completion tokens."""
        return int(self.keys[0].shape[2]) + self.length

    def keep(self, prompts: Tensor) -> None:
        """Drop all rows of the prompts whose index is not in `prompts` (all their rows have ended)."""
        rows = (prompts[:, None] * self.group_size + torch.arange(self.group_size, device=prompts.device)).flatten()
        self.prefix_bias = self.prefix_bias[prompts]
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer][prompts]
            self.values[layer] = self.values[layer][prompts]
            self.new_keys[layer] = self.new_keys[layer][rows]
            self.new_values[layer] = self.new_values[layer][rows]


def _stack(tensors: Sequence[Tensor], longest: int) -> Tensor:
    return torch.cat([torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors])


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    shared: DecodeCache,
    **__: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token per row to its prompt (stored once for its group) and to its own completion.

    query (R, H, 1, D); key, value (R, K, t, D). One softmax over both parts, so the result is the one that a full
    cache gives. Returns (R, 1, H, D).
    """
    rows, heads, _, width = query.shape
    kv_heads, repeats, group = key.shape[1], heads // key.shape[1], shared.group_size
    prompts = rows // group
    by_row = query.view(rows, kv_heads, repeats, width) * scaling
    by_prompt = by_row.view(prompts, group, kv_heads, repeats, width).transpose(1, 2)
    flat = by_prompt.reshape(prompts, kv_heads, group * repeats, width)
    before = flat @ shared.keys[module.layer_idx].transpose(2, 3) + shared.prefix_bias
    own = (by_row @ key.transpose(2, 3)).view(prompts, group, kv_heads, repeats, -1).transpose(1, 2)
    own = own.reshape(prompts, kv_heads, group * repeats, -1)
    weights = torch.softmax(torch.cat([before, own], dim=-1), dim=-1, dtype=torch.float32).to(query.dtype)
    length = before.shape[-1]
    from_prompt = weights[..., :length] @ shared.values[module.layer_idx]
    from_prompt = from_prompt.view(prompts, kv_heads, group, repeats, width).transpose(1, 2)
    own_weights = weights[..., length:].view(prompts, kv_heads, group, repeats, -1).transpose(1, 2)
    from_own = own_weights.reshape(rows, kv_heads, repeats, -1) @ value
    out = from_prompt.reshape(rows, heads, width) + from_own.reshape(rows, heads, width)
    return out[:, None], None


ALL_ATTENTION_FUNCTIONS.register(SHARED_PREFIX_ATTENTION, shared_prefix_attention)


@contextmanager
def attending_by(language_model: Any, implementation: str) -> Iterator[None]:
    """Use a registered attention function inside the block."""
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before
