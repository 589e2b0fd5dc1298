"""The memory-saving pass: prompt and completions as one row, layer by layer, nothing kept but the layers' inputs.

A prompt of thousands of video tokens leaves dozens of activations per token and layer behind for the backward pass.
Here each decoder layer is a checkpoint: forward keeps its input, backward runs it again, which costs a third of the
update's arithmetic. The library's own checkpointing cannot do that for a shared prompt, because it gives up the
key/value cache through which completions see it. So prompt and completions go through the linear layers as one row of
L + G * T tokens, and only attention tells them apart (`tartvg.policy.prefix_attention`). Where that cannot run, each
completion's attention is a checkpoint of its own: G copies of the prompt's keys and values never exist at a time, and
memory grows with the completions' own tokens alone.

Legend: G rollouts per prompt, L prompt tokens, T completion tokens, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tartvg.policy.deepstack import DeepStack
from tartvg.policy.kv_cache import attending_by
from tartvg.policy.prefix_attention import can_join, joined_attention, suffix_mask

PACKED_ATTENTION = "tartvg_packed"


@dataclass(frozen=True)
class Packing:
    """What a row holds: a prompt of `before` tokens, then `rows` completions of `own` tokens each."""

    before: int
    rows: int
    own: int
    attention: str
    """The library's implementation that computes each part."""
    is_joined: bool
    """Whether `joined_attention` computes the completions' part; then no mask is needed."""
    mask: Tensor | None
    """bool (1, 1, T, L + T): what a completion may see; None where the implementation knows it by itself."""


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, H, L + G*T, D); key, value (1, K, L + G*T, D). Returns (1, L + G*T, H, D)."""
    attend = partial(_attend, module, packing, kwargs)
    sizes = [packing.before] + [packing.own] * packing.rows
    before, *own = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    parts = [attend(None, *before)]
    if own and packing.is_joined:
        queries, keys, values = (torch.cat(part) for part in zip(*own, strict=True))
        out = joined_attention(queries, before[1], before[2], keys, values, kwargs["scaling"])
        return torch.cat([*parts, out.transpose(1, 2).flatten(0, 1)[None]], dim=1), None
    for row in own:
        inputs = (*row, before[1], before[2])
        if torch.is_grad_enabled():
            parts.append(checkpoint(attend, packing.mask, *inputs, use_reentrant=False))
        else:
            parts.append(attend(packing.mask, *inputs))
    return torch.cat(parts, dim=1), None


def _attend(
    module: Any, packing: Packing, kwargs: dict[str, Any], mask: Tensor | None,
    query: Tensor, key: Tensor, value: Tensor, *before: Tensor,
) -> Tensor:  # fmt: skip
    if before:
        key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
    out: Tensor = ALL_ATTENTION_FUNCTIONS[packing.attention](module, query, key, value, mask, **kwargs)[0]
    return out


ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)


def packed_states(
    language_model: Any, prompt: Tensor, deepstack: DeepStack, prompt_positions: Tensor, rows: Tensor,
    row_positions: Tensor, attention: str, use_reentrant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Hidden states of a prompt's last token, (1, 1, hidden), and of its completions, (G, T, hidden).

    prompt (1, L, hidden) and rows (G, T, hidden) are embeddings, and `deepstack` is added to the prompt's states;
    positions are int64 (3, L) and (T,), the latter shared by all rows. `attention` names the library's implementation.
    With `use_reentrant` each layer is repeated in a backward pass of its own (for ZeRO-3, see `Policy.logps`).
    """
    (group, own, width), before = rows.shape, prompt.shape[1]
    num_rows = group if own else 0
    is_joined = can_join(language_model, rows)  # asked out here: a layer that is run again must do the same again
    mask = None if is_joined else suffix_mask(before, own, attention, rows.device)
    packing = Packing(before, num_rows, own, attention, is_joined, mask)
    hidden = torch.cat([prompt, rows.reshape(1, group * own, width)], dim=1)
    positions = torch.cat([prompt_positions, row_positions.repeat(group).expand(3, -1)], dim=1)
    angles = language_model.rotary_emb(hidden, positions[:, None])
    if use_reentrant and torch.is_grad_enabled():
        hidden = hidden.detach().requires_grad_()  # such a pass needs an input with gradient; embeddings are frozen
    for index, layer in enumerate(language_model.layers):
        run = partial(_layer, language_model, layer, angles, packing)
        hidden = checkpoint(run, hidden, use_reentrant=use_reentrant) if torch.is_grad_enabled() else run(hidden)
        hidden = deepstack.added(index, hidden)
    hidden = language_model.norm(hidden[:, before - 1 :])
    return hidden[:, :1], hidden[:, 1:].reshape(group, own, width)


def _layer(language_model: Any, layer: Any, angles: tuple[Tensor, Tensor], packing: Packing, hidden: Tensor) -> Tensor:
    # backward runs this again, long after the forward pass: the implementation must be chosen in here
    with attending_by(language_model, PACKED_ATTENTION):
        out: Tensor = layer(hidden, attention_mask=None, position_embeddings=angles, packing=packing)
    return out
