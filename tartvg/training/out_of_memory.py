"""Work on the rows of a group that does not fit into memory: in smaller and smaller parts, and without it in the end.

It needs work that no other process waits for: all of a process that trains alone, and of several together sampling, the
reference, and the update up to the exchange of gradients. Under ZeRO-3 the others wait in every pass of the update; see
`tartvg.training.retreats`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
LossOfRows = Callable[[slice], Tensor]
"""Rows of a group -> their share of the step's loss."""
WHOLE = slice(None)


@dataclass(frozen=True)
class GroupLoss:
    """One group's share of a step's loss, which may be computed in parts."""

    sample_id: str
    num_rows: int
    num_tokens: int
    """Of the prompt once and of all rows: what the memory of its update grows with."""
    compute: LossOfRows
    parts: list[Any]
    """What `compute` notes about each part; emptied before the group is tried again."""


class NothingFits(Exception):
    """No group of a step fits into memory, not even one completion at a time."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def row_slices(rows: int, parts: int) -> list[slice]:
    """Contiguous slices of nearly equal length, none of them empty; `WHOLE` for one part."""
    if parts <= 1:
        return [WHOLE]
    bounds = [rows * i // min(parts, rows) for i in range(min(parts, rows) + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def fit_rows(work: Callable[[slice], T], rows: int, is_survivable: Callable[[BaseException], bool]) -> list[T]:
    """`work` on all rows at once, or in the fewest parts (1, 2, 4, ...) that fit.

    Raises what `work` raises, for an error that is not survivable and where one row alone does not fit.
    """
    parts = 1
    while True:
        try:
            return [work(part) for part in row_slices(rows, parts)]
        except Exception as error:
            if parts >= rows or not is_survivable(error):
                raise
        _free()
        parts = min(2 * parts, rows)


def fewer_rows(parts: int, rows: int) -> int:
    """The number of parts to try after this many did not fit; 0 when single rows did not."""
    return min(2 * parts, rows) if parts < rows else 0


def fit_update(
    update: Callable[[Sequence[Callable[[], Tensor]]], float],
    groups: Sequence[GroupLoss],
    is_survivable: Callable[[BaseException], bool],
    note: Callable[[GroupLoss, int, str], None],
) -> float:
    """`update` on the losses of all groups; a group that does not fit is computed in parts, and at last left out.

    `update` starts from zero gradients, so an attempt that failed leaves nothing behind. `note(group, parts, error)` is
    called before a group is tried in that many parts, 0 for a group that is left out. Returns what `update` returns.
    Raises NothingFits when no group is left.
    """
    parts = [1] * len(groups)
    while any(parts):
        begun: list[int] = []
        for group in groups:
            group.parts.clear()
        micro = [
            partial(_begin, begun, i, group.compute, part)
            for i, group in enumerate(groups)
            if parts[i]
            for part in row_slices(group.num_rows, parts[i])
        ]
        try:
            return update(micro)
        except Exception as error:
            if not is_survivable(error):
                raise
            reason = str(error)
        _free()
        failed = begun[-1]
        parts[failed] = fewer_rows(parts[failed], groups[failed].num_rows)
        note(groups[failed], parts[failed], reason)
    for group in groups:
        group.parts.clear()
    raise NothingFits


def merge_parts(parts: Sequence[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    """(loss metrics, tokens) of the parts of one group -> the metrics of the group.

    Losses were divided by the group's divisor, so they add up; ratios are means over tokens, and one is a maximum.
    """
    if len(parts) == 1:
        return parts[0][0]
    total = max(1, sum(tokens for _, tokens in parts))
    merged: dict[str, Tensor] = {}
    for name in parts[0][0]:
        values = torch.stack([metrics[name] for metrics, _ in parts])
        if name in ("loss/total", "loss/policy", "loss/kl"):
            merged[name] = values.sum()
        elif name == "loss/ratio_max":
            merged[name] = values.max()
        else:
            merged[name] = sum(
                (v * (tokens / total) for v, (_, tokens) in zip(values, parts, strict=True)), values[0] * 0
            )
    return merged


def _begin(begun: list[int], group: int, loss: LossOfRows, part: slice) -> Tensor:
    begun.append(group)
    return loss(part)


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
