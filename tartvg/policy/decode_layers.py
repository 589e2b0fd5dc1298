"""The decoder for one token per row: the library's modules without what surrounds them.

A step of decoding has little arithmetic, so what it costs is the number of operations. The library's layers and PEFT's
adapters make many that a single token does not need. Here are the ones that count, on the same weights; the library's
own pass is what tests hold it against.

Legend: R rows, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tartvg.policy.decode_attention import shared_prefix_attention
from tartvg.policy.kv_cache import DecodeCache

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Adapted:
    """A linear layer with LoRA: W x + b + s B A x (Hu et al., arXiv 2106.09685).

    A and s B have the type of W, copied once per sampling. They are not merged into W: in bf16 a change of 1e-4 is as
    large as W's rounding.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    """A, transposed: (in, rank). Rank 0 without an adapter."""
    up: Tensor
    """s B, transposed: (rank, out)."""

    @classmethod
    def of(cls, layer: Any) -> Adapted:
        """From PEFT's layer, with the adapters that are active, or from a plain one."""
        base = getattr(layer, "base_layer", layer)
        names = [] if base is layer or layer.disable_adapters else layer.active_adapters
        weight = base.weight
        downs = [weight.new_zeros(0, weight.shape[1])] + [layer.lora_A[n].weight for n in names]
        ups = [weight.new_zeros(weight.shape[0], 0)] + [layer.scaling[n] * layer.lora_B[n].weight for n in names]
        down, up = torch.cat([x.to(weight.dtype) for x in downs]), torch.cat([x.to(weight.dtype) for x in ups], dim=1)
        return cls(weight, base.bias, down.t(), up.t())

    def __call__(self, x: Tensor) -> Tensor:
        """(R, in) -> (R, out)."""
        out = torch.nn.functional.linear(x, self.weight, self.bias)
        return out.addmm_(x @ self.down, self.up) if len(self.up) else out


@dataclass(frozen=True)
class DecodeLayer:
    """One layer of the decoder."""

    index: int
    width: int
    scale: float
    attention_norm: Map
    query: Adapted
    query_norm: Map
    """Of each head, before its rotation; the identity where a family has none."""
    key: Adapted
    key_norm: Map
    value: Adapted
    out: Adapted
    mlp_norm: Map
    gate: Adapted
    up: Adapted
    down: Adapted
    activation: Map

    @classmethod
    def of(cls, layer: Any) -> DecodeLayer:
        """From the library's layer, with the adapters that are active."""
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            index=attention.layer_idx,
            width=attention.head_dim,
            scale=attention.scaling,
            attention_norm=layer.input_layernorm,
            query=Adapted.of(attention.q_proj),
            query_norm=getattr(attention, "q_norm", _same),
            key=Adapted.of(attention.k_proj),
            key_norm=getattr(attention, "k_norm", _same),
            value=Adapted.of(attention.v_proj),
            out=Adapted.of(attention.o_proj),
            mlp_norm=layer.post_attention_layernorm,
            gate=Adapted.of(mlp.gate_proj),
            up=Adapted.of(mlp.up_proj),
            down=Adapted.of(mlp.down_proj),
            activation=mlp.act_fn,
        )

    def __call__(self, hidden: Tensor, angles: tuple[Tensor, Tensor], cache: DecodeCache) -> Tensor:
        """(R, hidden) -> (R, hidden); angles are cosine and sine, (R, 1, D)."""
        rows = len(hidden)
        x = self.attention_norm(hidden)
        query = self.query_norm(self.query(x).view(rows, -1, self.width))
        key = self.key_norm(self.key(x).view(rows, -1, self.width))
        turned = _turned(torch.cat([query, key], dim=1), *angles)
        query, key = turned.split([query.shape[1], key.shape[1]], dim=1)
        value = self.value(x).view(rows, -1, 1, self.width)
        keys, values = cache.update(key[:, :, None], value, self.index)
        attended = shared_prefix_attention(query, keys, values, cache, self.index, self.scale)
        hidden = hidden + self.out(attended)
        x = self.mlp_norm(hidden)
        return hidden + self.down(self.activation(self.gate(x)) * self.up(x))


def _same(x: Tensor) -> Tensor:
    return x


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): (R, H, D) -> (R, H, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class DecodePass:
    """The whole decoder for one token per row. Made once per sampling, as adapters change between two."""

    def __init__(self, language_model: Any) -> None:
        self.embed: Map = language_model.embed_tokens
        self.angles: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = language_model.rotary_emb
        self.layers = [DecodeLayer.of(layer) for layer in language_model.layers]
        self.norm: Map = language_model.norm

    def __call__(self, ids: Tensor, positions: Tensor, cache: DecodeCache) -> Tensor:
        """ids and positions, int64 (R,) -> the last layer's states, (R, hidden), after the norm."""
        hidden = self.embed(ids)
        angles = self.angles(hidden, positions[None, :, None].expand(3, -1, -1))
        for layer in self.layers:
            hidden = layer(hidden, angles, cache)
        return self.norm(hidden)
