"""Attention of one new token per row to its prompt, stored once for its group, and to its own completion.

Two kernels, joined by the logarithms of their softmax's denominators as in `tartvg.policy.prefix_attention`:

    o = o_own + sigmoid(l_prompt - l_own) (o_prompt - o_own)

Scores and denominators stay in float32 inside a kernel, whatever the type of the inputs. That matters in 16 bits: a
released Qwen2.5 has keys up to 175, scores in the hundreds, and bfloat16 steps of 1 to 2 at that size. Scores that are
rounded make a sampler that is another policy than the one that trains.

Legend: P prompts, G rollouts per prompt, R = P * G rows, H query heads, K key/value heads, D head width,
L prompt length (padded to the longest), T places for a row's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tartvg.policy.kv_cache import DecodeCache
from tartvg.policy.prefix_attention import NO_KERNEL, announce

Part = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
"""query (B, K, N, D), key, value (B, K, L, D), bias (B or 1, 1, 1, L) or None, scale -> output (B, K, N, D) and
log-denominators, float32 (B, K, N)."""


def plain_part(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in float32, written out: for devices without a kernel, and what the kernels are held against."""
    scores = (query.float() @ key.float().transpose(2, 3)) * scale
    if bias is not None:
        scores = scores + bias
    logs = scores.logsumexp(dim=-1)
    return ((scores - logs[..., None]).exp() @ value.float()).to(query.dtype), logs


def _cpu_part(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logs = kernel(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
    return out, logs


def _cuda_part(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    if bias is None and query.dtype != torch.float32:
        out, logs = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, False, False, scale=scale
        )[:2]  # fmt: skip
        return out, logs
    # flash attention takes no bias and no float32; this one wants 16 bytes of bias at a time (see `PADDED_TO`)
    full = None if bias is None else bias.expand(*query.shape[:3], -1)
    out, logs = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, full, True, 0.0, False, scale=scale
    )[:2]
    return out, logs[..., : query.shape[2]]  # padded to 32 queries


KERNELS: dict[str, Part] = {"cpu": _cpu_part, "cuda": _cuda_part}


@lru_cache(maxsize=8)
def part_of(device: torch.device, dtype: torch.dtype, width: int, queries: int) -> Part:
    """Torch's kernel, if it agrees here with `plain_part` for that head width and so many queries; else the latter.

    Asked once per device, type and shape, with real numbers also where the caller's have none.
    """
    with _disable_current_modes(), torch.no_grad():
        reason = _why_not(device, dtype, width, queries)
    if reason is not None:
        announce("a decoded token's attention is computed without a fused kernel", device, dtype, reason)
        return plain_part
    return KERNELS[device.type]


def _why_not(device: torch.device, dtype: torch.dtype, width: int, queries: int) -> str | None:
    if device.type not in KERNELS:
        return NO_KERNEL
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2, queries, width), (2, 2, 40, width), (2, 2, 40, width)]
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    try:
        query, key, value = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
        bias = torch.zeros(2, 1, 1, 40, device=device, dtype=dtype)
        bias[1, ..., 33:] = float("-inf")
        for each in (None, bias):
            parts = (KERNELS[device.type], plain_part)
            found, expected = (part(query, key, value, each, width**-0.5) for part in parts)
            gap = max(float((a.float() - b.float()).abs().max()) for a, b in zip(found, expected, strict=True))
            if not gap <= bound:
                return f"it is off by {gap:.1e}"
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, cache: DecodeCache, layer: int, scale: float
) -> Tensor:  # fmt: skip
    """query (R, H, D); key, value (R, K, T, D): the row's own. Returns (R, H * D).

    The result is that of one softmax over prompt and completion. The prompt is read once for its G rows.
    """
    rows, heads, width = query.shape
    kv_heads, group = key.shape[1], cache.group_size
    repeats, prompts = heads // kv_heads, rows // group
    part = part_of(query.device, query.dtype, width, repeats)
    by_row = query.reshape(rows, kv_heads, repeats, width)
    by_prompt = by_row.view(prompts, group, kv_heads, repeats, width).transpose(1, 2)
    flat = by_prompt.reshape(prompts, kv_heads, group * repeats, width)
    from_prompt, logs_prompt = part(flat, cache.keys[layer], cache.values[layer], cache.prefix_bias, scale)
    from_own, logs_own = part(by_row, key, value, cache.own_bias, scale)
    logs_prompt = logs_prompt.reshape(prompts, kv_heads, group, repeats).transpose(1, 2).reshape(logs_own.shape)
    from_prompt = from_prompt.reshape(prompts, kv_heads, group, repeats, width).transpose(1, 2).reshape(by_row.shape)
    share = torch.sigmoid(logs_prompt - logs_own)[..., None]
    # not a view: flash attention on CUDA returns another order of strides
    return torch.lerp(from_own.float(), from_prompt.float(), share).to(query.dtype).reshape(rows, -1)
