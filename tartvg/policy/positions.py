"""M-RoPE positions from their original definition, handed explicitly to every forward pass.

The released weights were trained so that a video's temporal ids follow absolute time and the text after it continues
from the largest id so far plus one. Libraries have changed that rule more than once; a policy that samples with one
rule and trains with another is off-policy without a sign of it. So nothing here is left to the library.

Legend: S sequence length, the first axis 3 is (temporal, height, width).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tartvg.policy.patches import MERGE


def video_positions(
    start: int, grid_thw: tuple[int, int, int], seconds_per_grid: float, tokens_per_second: float
) -> Tensor:
    """Positions of one video's tokens: int64 (3, T*H*W/4), all shifted by `start`.

    The temporal id of grid step t is floor(t * seconds_per_grid * tokens_per_second) (Qwen2.5-VL report, section 2.1).
    """
    grid_t, grid_h, grid_w = grid_thw[0], grid_thw[1] // MERGE, grid_thw[2] // MERGE
    # in float32 as the original code does it, so that a product that lands on a whole number rounds the same way
    temporal = (torch.arange(grid_t) * (seconds_per_grid * tokens_per_second)).long()
    t, h, w = torch.meshgrid(temporal, torch.arange(grid_h), torch.arange(grid_w), indexing="ij")
    return torch.stack([t, h, w]).reshape(3, -1) + start


def prompt_positions(
    num_before: int,
    num_after: int,
    grid_thw: tuple[int, int, int],
    seconds_per_grid: float,
    tokens_per_second: float,
) -> Tensor:
    """Positions of a prompt with text, one video, and text: int64 (3, S)."""
    before = torch.arange(num_before).expand(3, -1)
    video = video_positions(num_before, grid_thw, seconds_per_grid, tokens_per_second)
    after = torch.arange(num_after).expand(3, -1) + next_position(torch.cat([before, video], dim=1))
    return torch.cat([before, video, after], dim=1)


def next_position(positions: Tensor) -> int:
    """Return the position of the token that follows (3, S): the largest one so far plus one."""
    return int(positions.max()) + 1
