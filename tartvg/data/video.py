"""Video files -> frames with their true times, by PyAV. No torch.

Frame choice and resize follow the released model's own rules (Qwen2-VL video processor of transformers and
qwen-vl-utils): `fps` frames a second, an even number of them, sides that are multiples of 28, a pixel budget per
frame and one for all frames together. Resizing happens while decoding, by libswscale.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from tartvg.config import FramesConfig

TEMPORAL_PATCH = 2
"""Frames that the vision tower merges into one grid step."""
FACTOR = 28
"""Sides are multiples of patch size 14 times merge size 2."""


class VideoError(ValueError):
    """A file that cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Clip:
    """The sampled frames of one video."""

    frames: np.ndarray
    """uint8, (F, height, width, 3), F even, sides multiples of 28."""
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


def target_size(height: int, width: int, num_frames: int, settings: FramesConfig) -> tuple[int, int]:
    """Height and width after the resize: multiples of 28, nearest to the source within the pixel budgets."""
    share = settings.total_pixels * TEMPORAL_PATCH // num_frames
    max_pixels = max(min(settings.max_pixels, share), int(settings.min_pixels * 1.05))
    if max(height, width) / min(height, width) > 200:
        raise VideoError(f"aspect ratio of {height}x{width} is over 200")
    new_height = max(FACTOR, round(height / FACTOR) * FACTOR)
    new_width = max(FACTOR, round(width / FACTOR) * FACTOR)
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(FACTOR, math.floor(height / scale / FACTOR) * FACTOR)
        new_width = max(FACTOR, math.floor(width / scale / FACTOR) * FACTOR)
    elif new_height * new_width < settings.min_pixels:
        scale = math.sqrt(settings.min_pixels / (height * width))
        new_height = math.ceil(height * scale / FACTOR) * FACTOR
        new_width = math.ceil(width * scale / FACTOR) * FACTOR
    return new_height, new_width


def _presentation_times(container: av.container.InputContainer) -> tuple[list[float], float]:
    """Times of all frames and their mean distance, from the packets alone: containers lie about their frames."""
    stream = container.streams.video[0]
    stamps = sorted(p.pts for p in container.demux(stream) if p.pts is not None)
    assert stream.time_base is not None
    times = [float(stamp * stream.time_base) for stamp in stamps]
    gap = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    rate = float(stream.average_rate or 0)
    counts_milliseconds = stream.time_base == Fraction(1, 1000)  # Matroska: every frame's time is rounded
    if rate and (not gap or (counts_milliseconds and abs(gap * rate - 1) < 1e-3)):
        gap = 1 / rate
    return times, gap or 0.5


def _decode(path: Path, settings: FramesConfig, deadline: float) -> Clip:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise VideoError(f"{path}: no video stream")
        stamps, gap = _presentation_times(container)
    if not stamps:
        raise VideoError(f"{path}: no video frames")
    duration = len(stamps) * gap
    count = num_sampled(len(stamps), duration, settings)
    wanted = sampled_indices(len(stamps), count)
    frames: list[np.ndarray] = []
    times: list[float] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        scaler = VideoReformatter()  # one for all frames: building its tables costs more than a resize
        size: tuple[int, int] | None = None
        for index, frame in enumerate(container.decode(stream)):
            if time.monotonic() > deadline:
                raise VideoError(f"{path}: decoding took longer than {settings.timeout_s:g} s")
            if len(frames) == count:
                break
            if index != wanted[len(frames)]:
                continue
            size = size or target_size(frame.height, frame.width, count, settings)
            scaled = scaler.reformat(frame, width=size[1], height=size[0], format="rgb24", interpolation="BICUBIC")
            image = scaled.to_ndarray()
            while len(frames) < count and wanted[len(frames)] == index:
                frames.append(image)
                times.append(float(frame.time or 0.0) - stamps[0])
    if len(frames) < count:
        raise VideoError(f"{path}: {len(frames)} of {count} sampled frames could be decoded; the file is damaged")
    return Clip(np.stack(frames), tuple(times), duration)


def read_clip(path: Path, settings: FramesConfig) -> Clip:
    """Decode the sampled frames of a file. Raises VideoError naming the file and what is wrong with it."""
    if not path.is_file():
        raise VideoError(f"{path}: no such video file")
    try:
        return _decode(path, settings, time.monotonic() + settings.timeout_s)
    except (FFmpegError, OSError) as error:
        raise VideoError(f"{path}: {error}") from error
