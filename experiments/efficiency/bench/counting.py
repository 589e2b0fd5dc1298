"""What a call does: floating-point operations, tokens through the language model, videos through the tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tartvg.policy.decode_layers import DecodePass
from tartvg.policy.policy import Policy


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


_CPU_ATTENTION: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""torch counts its attention kernels for GPUs only. As there, a causal mask saves nothing in the count."""


@dataclass(frozen=True)
class Counts:
    """The work of one call."""

    flops: int
    tokens: int
    """Tokens through the first decoder layer, forward passes only; a pass repeated in backward counts again."""
    videos: int
    """Videos through the vision tower."""


def count(policy: Policy, call: Callable[[], object]) -> Counts:
    """Run the call once and count."""
    tokens, videos = [0], [0]

    def note_layer(_: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = inputs[0] if inputs else kwargs["hidden_states"]
        tokens[0] += hidden.shape[0] * hidden.shape[1]

    def note_tower(_: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else inputs[1]
        videos[0] += len(grid)

    def note_step(decoder: DecodePass, ids: Any, *rest: Any) -> Any:
        tokens[0] += len(ids)
        return step(decoder, ids, *rest)

    step = DecodePass.__call__
    hooks = [
        policy.language_model.layers[0].register_forward_pre_hook(note_layer, with_kwargs=True),
        policy.core.model.visual.register_forward_pre_hook(note_tower, with_kwargs=True),
    ]
    DecodePass.__call__ = note_step  # type: ignore[method-assign]
    try:
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as flops:
            call()
    finally:
        DecodePass.__call__ = step  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()
    return Counts(flops.get_total_flops(), tokens[0], videos[0])
