"""The output head: which tokens a policy may say.

Legend: V rows of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
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
