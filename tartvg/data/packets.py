"""One pass over the packets of a video file: which frames there are and when each is shown. PyAV, no torch.

Containers lie about their length, their frame rate and their number of frames; packets do not. Nothing is decoded here.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import av
from av.error import ArgumentError, FFmpegError
from av.stream import Discard

VARIABLE_SPACING = 0.2
"""A gap between frames is odd when it differs from the median gap by more than this share of it."""
VARIABLE_SHARE = 0.01
"""The frame rate is variable when more than this share of the gaps is odd: one dropped frame is not."""
MAX_PIXELS = 2**25
"""A frame of more pixels (8192 * 4096) is a damaged header: decoding it would take gigabytes."""
FORMATS = (
    "mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "ivf", "gif", "h264", "hevc", "m4v", "mpegvideo",
)  # fmt: skip
"""Demuxers, by FFmpeg's names, that may read a file (mov: mp4 and 3gp, too; matroska: webm; mpeg: mpg and vob; asf:
wmv). FFmpeg goes by the content, and some of the others open whatever a text file names."""
_ALLOWED = {"format_whitelist": ",".join(FORMATS)}


class VideoError(ValueError):
    """A file that cannot be used; the message says which and why."""


class NoVideoStream(VideoError):
    """A readable file that holds sound or something else, but no video."""


@dataclass(frozen=True)
class PacketTable:
    """The video packets of a file, in the order in which they are decoded."""

    stamps: tuple[int, ...]
    """Presentation time of each packet in units of `time_base`; its number where the container has no such times."""
    is_key: tuple[bool, ...]
    """Whether decoding can begin with the packet."""
    is_shown: tuple[bool, ...]
    """False for packets that an edit list cuts off: they are decoded for the others' sake only."""
    sizes: tuple[int, ...]
    """Bytes."""
    time_base: Fraction
    gap: float
    """Mean seconds between two shown frames."""
    has_times: bool
    """Whether every packet carries a presentation time."""
    stay: float | None = None
    """Seconds that the last frame stays by its own packet, where frames are not evenly spaced or are but two.

    None: `gap`, as muxers make the last packet's duration up from a nominal rate."""

    @cached_property
    def shown(self) -> list[int]:
        """Stamps of the frames that are shown, ascending."""
        return sorted(stamp for stamp, is_shown in zip(self.stamps, self.is_shown, strict=True) if is_shown)

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last one."""
        if self.stay is None:
            return len(self.shown) * self.gap
        return self.seconds(self.shown[-1]) + self.stay

    def seconds(self, stamp: int) -> float:
        """Seconds from the first shown frame."""
        if not self.has_times:
            return (stamp - self.shown[0]) * self.gap
        return float(stamp * self.time_base) - float(self.shown[0] * self.time_base)

    @cached_property
    def is_variable(self) -> bool:
        """Whether the frame rate varies."""
        return self.has_times and has_variable_rate([float(stamp * self.time_base) for stamp in self.shown])


def scan(path: Path, deadline: float = float("inf")) -> PacketTable:
    """Read all packets of the first video stream.

    `deadline` is a reading of `time.monotonic`. Raises VideoError, and PyAV's errors for what no demuxer recognises.
    """
    with open_video(path) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        stamps: list[int | None] = []
        durations: list[int | None] = []
        flags: list[tuple[bool, bool, int]] = []
        for packet in container.demux(stream):
            if time.monotonic() > deadline:
                raise VideoError(f"{path}: reading its packets took too long")
            if packet.size:  # the last one is empty and asks the decoder for the rest
                stamps.append(packet.pts)
                durations.append(packet.duration)
                flags.append((packet.is_keyframe, not packet.is_discard, packet.size))
        rate, base = float(stream.average_rate or 0), stream.time_base
    if not any(is_shown for _, is_shown, _ in flags):
        raise VideoError(f"{path}: no video frames")
    known = tuple(stamp for stamp in stamps if stamp is not None)
    has_times = len(known) == len(stamps)
    is_key, is_shown, sizes = zip(*flags, strict=True)
    if not has_times:
        return PacketTable(tuple(range(len(stamps))), is_key, is_shown, sizes, base, 1 / rate if rate else 0.5, False)
    times = [float(stamp * base) for stamp, is_one in zip(known, is_shown, strict=True) if is_one]
    gap = _mean_gap(times, base, rate)
    # The last in the order of decoding: mp4 keeps distances in that order, and only its last one is no distance.
    last = max(number for number, is_one in enumerate(is_shown) if is_one)
    stay = None if _are_even(sorted(times), gap) else float(max(0, durations[last] or 0) * base) or None
    return PacketTable(known, is_key, is_shown, sizes, base, gap, True, stay)


def open_video(path: Path) -> av.container.InputContainer:
    """Open a file that has a video stream of a sane size; other streams are not read.

    Raises VideoError, also for a container of none of the `FORMATS`, and PyAV's errors for what no demuxer recognises.
    """
    try:
        container = av.open(str(path), metadata_errors="replace", options=_ALLOWED)
    except ArgumentError as error:
        name = _refused_format(path)
        if name is None:
            raise
        raise VideoError(f"{path}: its container format is {name}, which is not read") from error
    try:
        if not container.streams.video:
            raise NoVideoStream(f"{path}: no video stream")
        context = container.streams.video[0].codec_context
        if context is None:
            raise VideoError(f"{path}: no decoder for its video stream")
        if context.width * context.height > MAX_PIXELS:
            raise VideoError(f"{path}: frames of {context.width}x{context.height}; the header is damaged")
        for stream in container.streams:
            if stream.index != container.streams.video[0].index:
                stream.discard = Discard.all
    except BaseException:
        container.close()
        raise
    return container


def _refused_format(path: Path) -> str | None:
    """The demuxer that the list has kept from reading a file: only FFmpeg's log names it. None for another error."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as messages:
            av.open(str(path), options=_ALLOWED).close()
    except FFmpegError:
        pass
    finally:
        av.logging.set_level(level)
    return next((name for _, name, text in messages if text.startswith("Format not on whitelist")), None)


def _are_even(times: list[float], gap: float) -> bool:
    """Whether several frames at `times` (ascending) are all about `gap` apart."""
    return len(times) > 2 and all(abs(b - a - gap) <= VARIABLE_SPACING * gap for a, b in pairwise(times))


def _mean_gap(times: list[float], base: Fraction, rate: float) -> float:
    """Mean seconds between frames, from their times; from the container's rate where these are too coarse."""
    gap = (max(times) - min(times)) / (len(times) - 1) if len(times) > 1 else 0.0
    counts_milliseconds = base == Fraction(1, 1000)  # Matroska: every frame's time is rounded
    if rate and (not gap or (counts_milliseconds and abs(gap * rate - 1) < 1e-3)):
        gap = 1 / rate
    return gap or 0.5


def has_variable_rate(times: list[float]) -> bool:
    """Whether frames at `times` (seconds, ascending) are unevenly spaced, beyond a dropped frame here and there."""
    gaps = [later - earlier for earlier, later in pairwise(times)]
    if len(gaps) < 2:
        return False
    median = statistics.median(gaps)
    odd = sum(abs(gap - median) > VARIABLE_SPACING * median + 1e-9 for gap in gaps)
    return odd > max(1.0, VARIABLE_SHARE * len(gaps))
