"""Characters of a completion -> its tokens, by decoding prefixes: whatever a tokenizer merges, this is what it said."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import Any


def tokens_until(tokenizer: Any, token_ids: Sequence[int], positions: Sequence[int]) -> list[int]:
    """For each character position of the decoded text: the fewest tokens whose text reaches it.

    A token that straddles a position is among them. Beyond the text it is all tokens. Each position costs a logarithm
    of the length in calls of `decode`; tokens that end within a character count with the token that begins it.
    """
    ids = list(token_ids)

    @cache
    def length(count: int) -> int:
        return len(tokenizer.decode(ids[:count], skip_special_tokens=True))

    return [min(len(ids), bisect_left(range(len(ids) + 1), position, key=length)) for position in positions]
