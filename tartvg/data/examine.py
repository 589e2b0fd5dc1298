"""One video file -> what is wrong with it, before anybody trains on it. PyAV, no torch.

Two passes: over the packets (cheap; gives the true length and the spacing of the frames, because containers lie about
both), and over the frames that training would sample, by the function that training calls.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from av.error import FFmpegError

from tartvg.config import FramesConfig
from tartvg.data.packets import NoVideoStream, scan
from tartvg.data.video import read_clip


class VideoFault(str, Enum):
    """What is wrong with a video, the gravest first. All but the last two make its queries unusable or wrong."""

    MISSING = "missing"
    UNREADABLE = "unreadable"
    NO_VIDEO_STREAM = "no_video_stream"
    DURATION_DISAGREES = "duration_disagrees"
    """The file is shorter or longer than its annotation says: another cut, another encoding or another video."""
    SEVERAL_STREAMS = "several_video_streams"
    """Other cameras or sizes; covers do not count. Training reads the default one."""
    VARIABLE_FRAME_RATE = "variable_frame_rate"
    """Harmless here, since times come from the frames; code that divides indices by a frame rate is wrong on it."""

    @property
    def is_error(self) -> bool:
        """False for a mere warning."""
        return self not in (VideoFault.SEVERAL_STREAMS, VideoFault.VARIABLE_FRAME_RATE)


@dataclass(frozen=True)
class VideoFacts:
    """What one file is like."""

    duration: float | None = None
    """Seconds from the first frame to the end of the last; None when the file cannot be read."""
    num_frames: int = 0
    faults: tuple[VideoFault, ...] = ()
    detail: str = ""
    """The reason, in the words of the decoder where it has any."""


def examine(path: Path, frames: FramesConfig, annotated: float) -> VideoFacts:
    """Look at one file whose annotation says that it lasts `annotated` seconds. Never raises for a damaged file."""
    if not path.is_file():
        return VideoFacts(faults=(VideoFault.MISSING,), detail=f"{path}: no such file")
    try:
        table = scan(path, time.monotonic() + frames.timeout_s)
        clip = read_clip(path, frames)
    except NoVideoStream as error:
        return VideoFacts(faults=(VideoFault.NO_VIDEO_STREAM,), detail=str(error))
    except (FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        detail = str(error) if str(path) in str(error) else f"{path}: {error}"
        return VideoFacts(faults=(VideoFault.UNREADABLE,), detail=detail)
    faults, details = [], []
    # Annotations round, and count up to the last frame or past it; two seconds of a hundred are another file.
    if abs(clip.duration - annotated) > max(1.0, 0.02 * annotated):
        faults.append(VideoFault.DURATION_DISAGREES)
        details.append(f"{path}: lasts {clip.duration:.2f} s, annotated as {annotated:.2f} s")
    if table.num_streams > 1:
        faults.append(VideoFault.SEVERAL_STREAMS)
        details.append(f"{path}: {table.num_streams} video streams, of which the default one is read")
    if table.is_variable:
        faults.append(VideoFault.VARIABLE_FRAME_RATE)
        details.append(f"{path}: variable frame rate")
    return VideoFacts(clip.duration, len(table.shown), tuple(faults), "; ".join(details))
