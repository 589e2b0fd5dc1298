"""Video files -> frames with their true times, by PyAV. No torch.

Frame choice and resize follow the released model's own rules (Qwen2-VL video processor of transformers and
qwen-vl-utils): `fps` frames a second, an even number of them, sides that are multiples of 28 (or of what another
family of models has), a pixel budget per frame and one for all frames together. Resizing happens while decoding, by
libswscale.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from av.error import FFmpegError

from tartvg.config import FramesConfig
from tartvg.data.decode import Painter, pictures
from tartvg.data.packets import PacketTable, VideoError, scan

TEMPORAL_PATCH = 2
"""Frames that the vision tower merges into one grid step."""
FACTOR = 28
"""Sides are multiples of Qwen2.5-VL's patch size 14 times merge size 2, unless another number is given."""


@dataclass(frozen=True)
class Clip:
    """The sampled frames of one video."""

    frames: np.ndarray
    """uint8, (F, height, width, 3), F even, sides multiples of the model's patches."""
    times: tuple[float, ...]
    """Presentation time of each frame in seconds from the first frame of the file, ascending."""
    duration: float
    """Seconds from the first frame to the end of the last one."""

    @property
    def seconds_per_grid(self) -> float:
        """Seconds between two temporal grid steps: from the file's own length, never from a nominal rate.

        Not the mean distance of `times`: frame numbers are rounded down, and their mean distance is biased with them.
        """
        return TEMPORAL_PATCH * self.duration / len(self.times)


def num_sampled(num_frames: int, duration: float, settings: FramesConfig) -> int:
    """How many of `num_frames` frames are used: an even number, `fps` per second within the bounds."""
    upper = min(settings.max_frames, num_frames) // TEMPORAL_PATCH * TEMPORAL_PATCH
    wanted = min(max(duration * settings.fps, settings.min_frames), upper)
    # 1e-6: 13.99999 s of video is 14 s, not one grid step less
    return max(TEMPORAL_PATCH, math.floor((wanted + 1e-6) / TEMPORAL_PATCH) * TEMPORAL_PATCH)


def sampled_indices(num_frames: int, count: int) -> list[int]:
    """Indices of `count` frames at even steps from the first one; frames repeat if there are fewer than `count`."""
    return [min(int(i * num_frames / count), num_frames - 1) for i in range(count)]


def target_size(
    height: int, width: int, num_frames: int, settings: FramesConfig, side: int = FACTOR
) -> tuple[int, int]:
    """Height and width after the resize: multiples of `side`, nearest to the source within the pixel budgets.

    Raises ValueError for a strip that is over 200 times as long as it is wide.
    """
    share = settings.total_pixels * TEMPORAL_PATCH // num_frames
    max_pixels = max(min(settings.max_pixels, share), int(settings.min_pixels * 1.05))
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"aspect ratio of {height}x{width} is over 200")
    new_height = max(side, round(height / side) * side)
    new_width = max(side, round(width / side) * side)
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(side, math.floor(height / scale / side) * side)
        new_width = max(side, math.floor(width / scale / side) * side)
    elif new_height * new_width < settings.min_pixels:
        scale = math.sqrt(settings.min_pixels / (height * width))
        new_height = math.ceil(height * scale / side) * side
        new_width = math.ceil(width * scale / side) * side
    return new_height, new_width


def chosen_stamps(table: PacketTable, count: int) -> list[int]:
    """Stamps of the `count` frames that are sampled.

    Even steps over the frames, as long as these are even steps in time, too: the model takes the distance of two
    sampled frames for a constant. In a file with a variable frame rate the frame that is on the screen at each step is
    taken, and one that stays for long more than once.
    """
    shown = table.shown
    chosen = [shown[index] for index in sampled_indices(len(shown), count)]
    step = table.duration / count
    if all(abs(table.seconds(stamp) - i * step) <= step / 2 for i, stamp in enumerate(chosen)):
        return chosen
    times = [table.seconds(stamp) for stamp in shown]
    return [shown[bisect_right(times, i * step) - 1] for i in range(count)]


def _decode(path: Path, settings: FramesConfig, side: int, deadline: float) -> Clip:
    table = scan(path, deadline)
    count = num_sampled(len(table.shown), table.duration, settings)
    painter = Painter(lambda height, width: target_size(height, width, count, settings, side))
    half_a_step = table.duration / count / 2
    found = pictures(path, table, chosen_stamps(table, count), half_a_step, painter, deadline)
    return Clip(np.stack([image for _, image in found]), tuple(time for time, _ in found), table.duration)


def read_clip(path: Path, settings: FramesConfig, side: int = FACTOR) -> Clip:
    """Decode the sampled frames of a file, their sides multiples of `side`.

    Raises VideoError naming the file and what is wrong with it.

    `settings.timeout_s` is looked at between packets: a decoder that hangs inside one is not ended here, and one that
    crashes takes the process along. `tartvg.data.clips.ClipReader` does both in a process of its own.
    """
    if not path.is_file():
        raise VideoError(f"{path}: no such video file")
    try:
        return _decode(path, settings, side, time.monotonic() + settings.timeout_s)
    except VideoError:
        raise
    except (FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:  # mostly damaged headers
        raise VideoError(f"{path}: {error or type(error).__name__}") from error
