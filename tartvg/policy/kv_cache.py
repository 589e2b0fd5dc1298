"""Key/value caches that let G completions hang on one prompt.

Legend: P prompts, G rollouts per prompt, R = P * G rows, K key/value heads, D head width,
L prompt length (padded to the longest), T completion length, or places for one.

`PrefixCache` and `ExpandedCache` are the `past_key_values` of the library's decoder layers, which call `update` and
attend to what it returns; `DecodeCache` serves the same call of our own (`tartvg.policy.decode_layers`). None of them
copies the prompt G times while sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PADDED_TO = 8
"""Places for keys behind a bias come in multiples of this: a CUDA kernel reads 16 bytes of the bias at a time."""


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

    def get_query_offset(self, *_: Any) -> int:
        """Tokens before those of the pass, which the library asks to see that a causal pass needs no mask."""
        return 0

    def get_mask_sizes(self, num_queries: int, *_: Any) -> tuple[int, int]:
        """Keys of the pass and tokens before the first of them, for the same question."""
        return num_queries, 0


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
    """P prompts, each stored once, and the growing completions of R = P * G rows, which stay where they are.

    Prompts of different lengths are padded at the end, and `prefix_bias` (P, 1, 1, L) is 0 or -inf; it is None where
    all are equally long. A completion has `num_places` for its tokens; `own_bias` (1, 1, 1, T) hides those behind the
    last one. `grow` adds up to `bucket` of them.
    """

    def __init__(self, prefixes: Sequence[PrefixCache], group_size: int, max_new_tokens: int, bucket: int) -> None:
        lengths = [p.get_seq_length() for p in prefixes]
        is_ragged = len(set(lengths)) > 1
        longest = _padded(max(lengths)) if is_ragged else lengths[0]
        self.group_size = group_size
        self.most_places, self.bucket = _padded(max_new_tokens), _padded(bucket)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in range(len(prefixes[0].keys)):
            self.keys.append(_stack([p.keys[layer] for p in prefixes], longest))
            self.values.append(_stack([p.values[layer] for p in prefixes], longest))
        first = self.keys[0]
        self.prefix_bias: Tensor | None = None
        if is_ragged:
            used = torch.arange(longest, device=first.device) < torch.tensor(lengths, device=first.device)[:, None]
            bias = torch.zeros(used.shape, dtype=first.dtype, device=first.device)
            self.prefix_bias = bias.masked_fill_(~used, float("-inf"))[:, None, None, :]
        rows, heads, width = len(prefixes) * group_size, first.shape[1], first.shape[3]
        self.num_places = min(self.bucket, self.most_places)
        shape = (rows, heads, self.num_places, width)
        # Zeros, not whatever was in memory: a weight of 0 times NaN is NaN.
        self.new_keys = [first.new_zeros(shape) for _ in self.keys]
        self.new_values = [first.new_zeros(shape) for _ in self.keys]
        self.place = torch.zeros(1, dtype=torch.long, device=first.device)
        self.own_bias: Tensor | None = None

    def open(self, place: Tensor) -> None:
        """Let the next pass write its tokens to that place, int64 (1,), and see all up to there."""
        keys = self.new_keys[0]
        is_later = torch.arange(self.num_places, device=keys.device) > place
        bias = torch.zeros(self.num_places, dtype=keys.dtype, device=keys.device)
        self.place, self.own_bias = place, bias.masked_fill_(is_later, float("-inf"))[None, None, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row, (R, K, 1, D); returns all places, (R, K, T, D)."""
        self.new_keys[layer].index_copy_(2, self.place, keys)
        self.new_values[layer].index_copy_(2, self.place, values)
        return self.new_keys[layer], self.new_values[layer]

    def grow(self) -> None:
        """Add places behind the ones that are there."""
        more = min(self.bucket, self.most_places - self.num_places)
        self.num_places += more
        for tensors in (self.new_keys, self.new_values):
            for layer, held in enumerate(tensors):
                tensors[layer] = torch.nn.functional.pad(held, (0, 0, 0, more))

    def keep(self, prompts: Tensor) -> Tensor:
        """Drop all rows of the prompts whose index is not in `prompts`; returns the indices of the others' rows."""
        rows = (prompts[:, None] * self.group_size + torch.arange(self.group_size, device=prompts.device)).flatten()
        if self.prefix_bias is not None:
            self.prefix_bias = self.prefix_bias[prompts]
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer][prompts]
            self.values[layer] = self.values[layer][prompts]
            self.new_keys[layer] = self.new_keys[layer][rows]
            self.new_values[layer] = self.new_values[layer][rows]
        return rows


def _padded(length: int) -> int:
    return -(-length // PADDED_TO) * PADDED_TO


def _stack(tensors: Sequence[Tensor], longest: int) -> Tensor:
    return torch.cat([torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors])


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
