"""Attention of G completions to the one prompt that they follow, whose keys and values are stored once.

A completion attends to the prompt and to its own tokens so far. The two parts are computed apart, each by torch's fused
kernel, and joined by what the kernel returns beside its output, the logarithm of the softmax's denominator:

    l = log(exp(l_prompt) + exp(l_own)),   o = exp(l_prompt - l) o_prompt + exp(l_own - l) o_own

In the prompt's part the G completions are one long row of queries, so the prompt is not copied G times, and no matrix
of weights is ever kept. The gradient is as exact: a fused kernel's backward pass makes the weights again from
exp(score - l), so given the joined o and l it returns its part's share of the whole gradient (the argument of ring
attention, Liu et al., arXiv 2310.01889).

The kernels are torch's own but not part of its public interface. So they are used on a device only after they have
agreed there with plain attention, in values and gradients; elsewhere the caller goes the way that copies.

Legend: G completions, H query heads, K key/value heads, R = H / K, L prompt tokens, T completion tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tartvg.policy.kv_cache import ExpandedCache, PrefixCache, attending_by

PREFIX_ATTENTION = "tartvg_prefix"

Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, tuple[Any, ...]]]
"""query, key, value (B, H, T, D), is_causal, scale -> output, log-denominators (B, H, T), what backward needs."""
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""gradient, query, key, value, output, log-denominators, is_causal, scale, what forward kept -> three gradients."""


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logs = kernel(query, key, value, 0.0, is_causal, scale=scale)
    return out, logs, ()


def _cpu_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logs: Tensor, is_causal: bool,
    scale: float, kept: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads: tuple[Tensor, Tensor, Tensor] = kernel(
        gradient, query, key, value, out, logs, 0.0, is_causal, scale=scale
    )  # fmt: skip
    return grads


def _cuda_forward(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    out, logs, *kept, _ = kernel(query, key, value, 0.0, is_causal, False, scale=scale)
    return out, logs, tuple(kept)


def _cuda_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logs: Tensor, is_causal: bool,
    scale: float, kept: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward
    ends_q, ends_k, max_q, max_k, seed, offset = kept
    grads: tuple[Tensor, Tensor, Tensor] = kernel(
        gradient, query, key, value, out, logs, ends_q, ends_k, max_q, max_k, 0.0, is_causal, seed, offset, scale=scale
    )
    return grads


KERNELS: dict[str, tuple[Forward, Backward]] = {
    "cpu": (_cpu_forward, _cpu_backward),
    "cuda": (_cuda_forward, _cuda_backward),
}


def _as_one_row(x: Tensor, kv_heads: int) -> Tensor:
    """(G, H, T, D) -> (1, K, G*R*T, D): all queries that read the same key/value head."""
    group, heads, length, width = x.shape
    by_head = x.reshape(group, kv_heads, heads // kv_heads * length, width).transpose(0, 1)
    return by_head.reshape(1, kv_heads, -1, width)


def _as_rows(x: Tensor, like: Tensor) -> Tensor:
    """(1, K, G*R*T, D) -> (G, H, T, D)."""
    group, heads, length, _ = like.shape
    return x.reshape(x.shape[1], group, -1, x.shape[3]).transpose(0, 1).reshape(group, heads, length, -1)


class _JoinedAttention(torch.autograd.Function):
    """query (G, H, T, D), prompt's key and value (1, K, L, D), own key and value (G, K, T, D) -> (G, H, T, D)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, prompt_key: Tensor, prompt_value: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:  # fmt: skip
        forward, _ = KERNELS[query.device.type]
        kv_heads, repeats = key.shape[1], query.shape[1] // key.shape[1]
        row = _as_one_row(query, kv_heads)
        out_prompt, logs_prompt, kept_prompt = forward(row, prompt_key, prompt_value, False, scale)
        keys, values = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        out_own, logs_own, kept_own = forward(query.contiguous(), keys, values, True, scale)
        logs_of_prompt, logs_of_own = _as_rows(logs_prompt[..., None], query), logs_own[..., None]
        logs = torch.logaddexp(logs_of_prompt, logs_of_own)
        out = _as_rows(out_prompt, query) * (logs_of_prompt - logs).exp() + out_own * (logs_of_own - logs).exp()
        out = out.to(query.dtype)
        ctx.save_for_backward(query, prompt_key, prompt_value, key, value, out, logs)
        ctx.scale, ctx.kept = scale, (kept_prompt, kept_own)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, prompt_key, prompt_value, key, value, out, logs = ctx.saved_tensors
        _, backward = KERNELS[query.device.type]
        gradient = gradients[0].contiguous()
        kv_heads, repeats = key.shape[1], query.shape[1] // key.shape[1]
        row, row_gradient, row_out, row_logs = (_as_one_row(x, kv_heads) for x in (query, gradient, out, logs))
        of_row, of_prompt_key, of_prompt_value = backward(
            row_gradient, row, prompt_key, prompt_value, row_out, row_logs[..., 0], False, ctx.scale, ctx.kept[0]
        )
        keys, values = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        of_query, of_keys, of_values = backward(
            gradient, query.contiguous(), keys, values, out, logs[..., 0], True, ctx.scale, ctx.kept[1]
        )
        of_query = of_query + _as_rows(of_row, query)
        of_key, of_value = (x.unflatten(1, (kv_heads, repeats)).sum(dim=2) for x in (of_keys, of_values))
        return of_query, of_prompt_key, of_prompt_value, of_key, of_value, None


def joined_attention(
    query: Tensor, prompt_key: Tensor, prompt_value: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Causal attention of G completions behind one prompt.

    query (G, H, T, D); prompt_key, prompt_value (1, K, L, D); key, value (G, K, T, D). Returns (G, H, T, D). For
    devices and types for which `is_exact` holds.
    """
    out: Tensor = _JoinedAttention.apply(query, prompt_key, prompt_value, key, value, scale)
    return out


def copied_attention(
    query: Tensor, prompt_key: Tensor, prompt_value: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Compute the same numbers from G copies of the prompt's keys and values, one per query head."""
    (group, heads, length, _), before = query.shape, prompt_key.shape[2]
    keys = torch.cat([prompt_key.expand(group, -1, -1, -1), key], dim=2)
    values = torch.cat([prompt_value.expand(group, -1, -1, -1), value], dim=2)
    repeats = heads // key.shape[1]
    keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
    return scaled_dot_product_attention(query, keys, values, attn_mask=_seen(before, length, query.device), scale=scale)


@lru_cache(maxsize=8)
def is_exact(device: torch.device, dtype: torch.dtype, width: int, repeats: int) -> bool:
    """Return whether joined attention runs here and agrees with attention over copies, in values and gradients.

    Agreement is to 1e-5 (float32) or 2e-2 (16 bits) of the largest number, for heads of that width of which `repeats`
    read the same key. Asked once per device, type and shape, with real numbers also where the caller's have none
    (`tartvg.memory.footprint`). Says why where the answer is no.
    """
    with _disable_current_modes(), torch.enable_grad():
        reason = _why_not(device, dtype, width, repeats)
    if reason is not None:
        announce("completions attend to copies of their prompt, which takes time and memory", device, dtype, reason)
    return reason is None


NO_KERNEL = "torch has no such kernel there"


def announce(what: str, device: torch.device, dtype: torch.dtype, reason: str) -> None:
    """Print that a slower way is taken, and why."""
    where = f"attention on {device.type} in {str(dtype).removeprefix('torch.')}"
    print(f"{where}: {what}, as the fused kernel is not used: {reason}")


def can_join(language_model: Any, states: Tensor) -> bool:
    """`is_exact` for the heads of this model, where `states` are."""
    config = language_model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return is_exact(states.device, states.dtype, width, heads // config.num_key_value_heads)


def _why_not(device: torch.device, dtype: torch.dtype, width: int, repeats: int) -> str | None:
    if device.type not in KERNELS:
        return NO_KERNEL
    generator = torch.Generator().manual_seed(0)
    rows, prompt, own = (3, 2 * repeats, 5, width), (1, 2, 33, width), (3, 2, 5, width)
    shapes = [rows, prompt, prompt, own, own, rows]
    found = []
    try:
        *inputs, weight = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
        for attend in (joined_attention, copied_attention):
            leaves = [x.clone().requires_grad_() for x in inputs]
            query, prompt_key, prompt_value, key, value = leaves
            out = attend(query, prompt_key, prompt_value, key, value, width**-0.5)
            found.append([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]  # another version of torch, or no such kernel
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    gaps = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True)]
    return None if all(gap <= bound for gap in gaps) else f"it is off by {max(gaps):.1e}"


def prefix_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    prefix: PrefixCache, **__: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend in the library's decoder layers: query (G, H, T, D); key, value (G, K, T, D). Returns (G, T, H, D)."""
    layer = module.layer_idx
    out = joined_attention(query, prefix.keys[layer], prefix.values[layer], key, value, scaling)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(PREFIX_ATTENTION, prefix_attention)


def suffix_mask(before: int, own: int, attention: str, device: torch.device) -> Tensor | None:
    """Mask of T tokens that follow L others: bool (1, 1, T, L + T).

    None for flash attention, which takes no such mask and aligns a causal one at the end, which is the same.
    """
    if attention == "flash_attention_2":
        return None
    return _seen(before, own, device)[None, None]


def _seen(before: int, own: int, device: torch.device) -> Tensor:
    """Mask what each of T tokens behind L others may see: bool (T, L + T)."""
    return torch.ones(own, before + own, dtype=torch.bool, device=device).tril(before)


def suffix_states(language_model: Any, rows: Tensor, steps: Tensor, prefix: PrefixCache, attention: str) -> Tensor:
    """Hidden states (G, T, hidden) of G completions behind the prompt in `prefix`.

    rows (G, T, hidden) are embeddings and steps (T,) their positions, the same for all. `attention` names the library's
    implementation, for where `can_join` does not hold.
    """
    positions = steps.expand(3, rows.shape[0], -1)
    if can_join(language_model, rows):
        with attending_by(language_model, PREFIX_ATTENTION):
            out = language_model(
                inputs_embeds=rows,
                position_ids=positions,
                attention_mask=None,
                use_cache=False,
                prefix=prefix,
            )
    else:
        out = language_model(
            inputs_embeds=rows,
            position_ids=positions,
            attention_mask=suffix_mask(prefix.get_seq_length(), len(steps), attention, rows.device),
            past_key_values=ExpandedCache(prefix),
            use_cache=True,
        )
    states: Tensor = out.last_hidden_state
    return states
