"""Frames -> the patch rows that a vision tower reads. Plain torch, no torchvision.

Legend: F frames, T temporal grid steps, H and W grid rows and columns in patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

MERGE = 2
TEMPORAL_PATCH = 2


@dataclass(frozen=True)
class PatchForm:
    """How a family cuts and normalises pictures."""

    size: int
    """Pixels of a patch's side."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    white: float = 255.0
    """What pixels are divided by before; 1 where mean and std are those of whole numbers up to 255."""

    @property
    def side(self) -> int:
        """What the sides of a frame are multiples of: the patches that become one video token."""
        return self.size * MERGE


def patchify(frames: np.ndarray, form: PatchForm) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalised patches of a clip, in the order that the tower expects.

    frames: uint8 (F, height, width, 3), F a multiple of 2, sides multiples of `form.side`.
    Returns float32 (T*H*W, 3*2*size*size) and the grid (T, H, W). Patches of one 2x2 merge block are neighbours, blocks
    run over columns, rows, then time; within a patch the order is channel, frame, row, column.
    """
    num_frames, height, width, channels = frames.shape
    size, side = form.size, form.side
    if channels != 3 or num_frames % TEMPORAL_PATCH or height % side or width % side:
        raise ValueError(f"frames must be (even, {side} h, {side} w, 3), got {frames.shape}")
    mean, std = torch.tensor(form.mean)[:, None, None], torch.tensor(form.std)[:, None, None]
    # channels first before any arithmetic: an innermost axis of 3 makes every operation slow
    planes = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
    pixels = (planes.float() / form.white - mean) / std
    grid_t, grid_h, grid_w = num_frames // TEMPORAL_PATCH, height // size, width // size
    blocks = pixels.view(grid_t, TEMPORAL_PATCH, channels, grid_h // MERGE, MERGE, size, grid_w // MERGE, MERGE, size)
    # -> t, block row, block column, row in block, column in block, channel, frame, pixel row, pixel column
    rows = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return rows.reshape(grid_t * grid_h * grid_w, -1).contiguous(), (grid_t, grid_h, grid_w)


def embed_as_product(tower: Any) -> None:
    """Have a tower embed its patches by `patch_product` on a GPU.

    The CPU, whose runs are reproducible to the bit, stays with the library's Conv3d: the sums have another order.
    """
    module = tower.patch_embed
    convolve = module.forward

    def embed(rows: Tensor) -> Tensor:
        return patch_product(rows, module.proj.weight, module.proj.bias) if rows.is_cuda else convolve(rows)

    module.forward = embed


def patch_product(rows: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Embed patches: (N, 3*2*P*P) rows by the kernel (D, 3, 2, P, P) of a Conv3d and its bias (D,) -> (N, D).

    The kernel is as large as its stride, so each patch is one row of a matrix product.
    """
    return linear(rows.to(kernel.dtype), kernel.flatten(1), bias)
