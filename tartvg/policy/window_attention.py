"""Attention of the vision tower, all windows of one size in one call.

The library loops over windows one by one unless a flash kernel is there: thousands of small calls for one video. A
video's windows are nearly all of the same size, so they are a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# The library hands over the window borders only to implementations whose name says "flash".
WINDOW_ATTENTION = "tartvg_windows_like_flash"


def window_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """query, key, value (1, H, N, D); windows are the half-open ranges of `cu_seq_lens_q`. Returns (1, N, H, D)."""
    starts = cu_seq_lens_q[:-1].long()
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).long()
    out = torch.empty_like(query)
    for length in lengths.unique().tolist():
        rows = (starts[lengths == length, None] + torch.arange(length, device=starts.device)).flatten()
        is_everything = rows.shape[0] == query.shape[2]
        parts = [t if is_everything else t[:, :, rows] for t in (query, key, value)]
        heads, width = query.shape[1], query.shape[3]
        batches = [t.view(heads, -1, length, width).transpose(0, 1) for t in parts]
        q, k, v = batches
        part = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        part = part.transpose(0, 1).reshape(1, heads, -1, width)
        out = part if is_everything else out.index_copy(2, rows, part)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(WINDOW_ATTENTION, window_attention)
