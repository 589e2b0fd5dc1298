"""Out-of-memory fallback: recompute rows in 2, 4, 8 ... parts until they fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")
ALL_ROWS = slice(None)
FAILED_ALLOCATION = re.compile(
    r"can't allocate memory"  # torch's allocator on the CPU
    r"|CU(BLAS|DNN|SOLVER|SPARSE|FFT)_\w*ALLOC(ATION)?_FAILED"  # workspaces and handles of CUDA's libraries
    r"|CU(DA|BLAS|DNN)\b.*out of memory",  # a kernel, a graph or the driver, past torch's allocator
    re.IGNORECASE,
)
"""What a RuntimeError that is no OutOfMemoryError says of it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, so that less work at once may fit.

    One inside NCCL does not count: other ranks wait in that call, and none of them would try again.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and "nccl" not in text.lower() and bool(FAILED_ALLOCATION.search(text))


def row_slices(num_rows: int, num_parts: int) -> list[slice]:
    """Contiguous slices of nearly equal length, none of them empty; `ALL_ROWS` for one part."""
    if num_parts <= 1:
        return [ALL_ROWS]
    num_parts = min(num_parts, num_rows)
    bounds = [num_rows * i // num_parts for i in range(num_parts + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def more_parts(num_parts: int, num_rows: int) -> int:
    """Number of parts to try after `num_parts` did not fit; 0 when single rows did not."""
    return min(2 * num_parts, num_rows) if num_parts < num_rows else 0


def in_fewest_parts(work: Callable[[slice], T], num_rows: int) -> list[T]:
    """Run `work` on all rows at once, or in the fewest parts (1, 2, 4, ...) that fit; returns one result per part.

    Raises the out-of-memory error of a single row, and any other error at once.
    """
    num_parts = 1
    while True:
        try:
            return [work(part) for part in row_slices(num_rows, num_parts)]
        except Exception as error:
            if num_parts >= num_rows or not is_out_of_memory(error):
                raise
        free_cached_memory()
        num_parts = more_parts(num_parts, num_rows)


def free_cached_memory() -> None:
    """Return the allocator's unused blocks to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
