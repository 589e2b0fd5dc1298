"""One pass over the packets of a video file: which frames there are and when each is shown. PyAV, no torch.

Containers lie about their length, their frame rate and their number of frames; packets do not. Nothing is decoded here.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

VARIABLE_SPACING = 0.2
"""A gap between frames is odd when it differs from the median gap by more than this share of it."""
VARIABLE_SHARE = 0.01
"""The frame rate is variable when more than this share of the gaps is odd: one dropped frame is not."""
LONG_STAY = 0.5
"""Seconds by which the last of several even frames must outlast the others for its own duration to be believed."""
MAX_PIXELS = 2**25
"""A frame of more pixels (8192 * 4096) is a damaged header: decoding it would take gigabytes."""
FORMATS = (
    "mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "ivf", "gif", "h264", "hevc", "m4v", "mpegvideo",
)  # fmt: skip
"""Demuxers, by FFmpeg's names, that may read a file (mov: mp4 and 3gp, too; matroska: webm; mpeg: mpg and vob; asf:
wmv). FFmpeg goes by the content, and some of the others open whatever a text file names."""
_ALLOWED = {"format_whitelist": ",".join(FORMATS)}
CUT_ANYWHERE = ("mpegts", "mpeg", "h264", "hevc", "m4v", "mpegvideo")
"""Demuxers of streams without an index: a recording begins at any packet, and can be decoded from a key frame on."""
_NO_VIDEOS = {
    b"version https://git-lfs": "a Git LFS pointer and not the video: run `git lfs pull` where it comes from",
    b"<!doctype html": "a web page and not a video: a server has sent it instead of the file",
    b"<html": "a web page and not a video: a server has sent it instead of the file",
    b"<": "an XML page and not a video: mostly the error of a server that was asked for the file",
}
"""How files begin that are often found in a video's place, and what they are."""


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
    """Bytes. A packet of none (Theora's, or of a dropped frame) shows the picture before once more."""
    time_base: Fraction
    gap: float
    """Mean seconds between two shown frames."""
    has_times: bool
    """Whether every packet carries a presentation time."""
    stay: float | None = None
    """Seconds that the last frame stays by its own packet, where frames are not evenly spaced or are but two.

    None: `gap`, as muxers make the last packet's duration up from a nominal rate."""
    head: int = 0
    """Packets in front that are left out, as nothing can be decoded from them; see `CUT_ANYWHERE`."""
    begin: int | None = None
    """With a head: packets behind it that are shown before this stamp are left out, too."""
    num_streams: int = 1
    """Video streams of the file, of which this is the default one."""

    @cached_property
    def shown(self) -> list[int]:
        """Stamps of the frames that are shown, ascending."""
        return sorted(stamp for stamp, is_shown in zip(self.stamps, self.is_shown, strict=True) if is_shown)

    @cached_property
    def drawn(self) -> list[int]:
        """Of `shown`, the stamps of packets that carry a picture."""
        empty = {stamp for stamp, size in zip(self.stamps, self.sizes, strict=True) if not size}
        return [stamp for stamp in self.shown if stamp not in empty]

    def source(self, stamp: int) -> int:
        """The stamp of the picture that a shown packet shows: its own, unless it has no bytes."""
        return self.drawn[max(0, bisect_right(self.drawn, stamp) - 1)]

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


class _Row(NamedTuple):
    stamp: int | None
    duration: int | None
    is_key: bool
    is_shown: bool
    size: int


def scan(path: Path, deadline: float = float("inf")) -> PacketTable:
    """Read all packets of the default video stream.

    `deadline` is a reading of `time.monotonic`. Raises VideoError, and PyAV's errors for what no demuxer recognises.
    """
    with open_video(path) as (container, stream):
        assert stream.time_base is not None
        rows: list[_Row] = []
        for packet in container.demux(stream):
            if time.monotonic() > deadline:
                raise VideoError(f"{path}: reading its packets took too long")
            if not is_end(packet):
                can_begin = packet.is_keyframe and packet.size > 0
                rows.append(_Row(packet.pts, packet.duration, can_begin, not packet.is_discard, packet.size))
        rate, base, num_streams = float(stream.average_rate or 0), stream.time_base, len(video_streams(container))
        declared = _declared_seconds(container, stream)
        head = _head(rows, container.format.name in CUT_ANYWHERE)
    begin = rows[head].stamp if 0 < head < len(rows) else None
    rows = [row for row in rows[head:] if begin is None or row.stamp is None or row.stamp >= begin]
    if not any(row.is_shown for row in rows):
        raise VideoError(f"{path}: no video frames")
    known = tuple(row.stamp for row in rows if row.stamp is not None)
    has_times = len(known) == len(rows)
    _, _, is_key, is_shown, sizes = zip(*rows, strict=True)
    if not has_times:
        gap = 1 / rate if rate else 0.5
        stamps = tuple(range(len(rows)))
        return PacketTable(stamps, is_key, is_shown, sizes, base, gap, False, None, head, begin, num_streams)
    times = [float(stamp * base) for stamp, is_one in zip(known, is_shown, strict=True) if is_one]
    gap = _mean_gap(times, base, rate)
    # The last in the order of decoding: mp4 keeps distances in that order, and only its last one is no distance.
    own = float(max(0, next(row for row in reversed(rows) if row.is_shown).duration or 0) * base)
    stay = own or None
    if _are_even(sorted(times), gap):
        own = min(own, declared - (max(times) - min(times)))
        stay = own if own > gap + LONG_STAY else None
    return PacketTable(known, is_key, is_shown, sizes, base, gap, True, stay, head, begin, num_streams)


def is_end(packet: Packet) -> bool:
    """Return whether this is the packet behind the last one, which flushes the decoder. One of 0 bytes has times."""
    return not packet.size and packet.pts is None and packet.dts is None


def _head(rows: Sequence[_Row], is_cut_anywhere: bool) -> int:
    """How many packets come before the first that can be decoded."""
    first = next((number for number, row in enumerate(rows) if row.size), len(rows))
    if not is_cut_anywhere:
        return first
    # Streams that renew their pictures bit by bit have no key frames.
    return next((number for number, row in enumerate(rows) if row.is_key), first)


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float:
    """The length by the container's own word; 0 where it has none."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def video_streams(container: InputContainer) -> list[VideoStream]:
    """The streams of `V` in FFmpeg's language: a cover picture is called a video stream, and is none."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


@contextlib.contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its default video stream, the first if none is; the other streams are not read.

    Raises VideoError where there is none of a sane size, also for a container of none of the `FORMATS`, and PyAV's
    errors for what no demuxer recognises.
    """
    with _open(path) as container:
        streams = video_streams(container)
        if not streams:
            only = ", only a cover picture" if container.streams.video else ""
            raise NoVideoStream(f"{path}: no video stream{only}")
        stream = next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])
        context = stream.codec_context
        if context is None:
            raise VideoError(f"{path}: no decoder for its video stream")
        if context.width * context.height > MAX_PIXELS:
            raise VideoError(f"{path}: frames of {context.width}x{context.height}; the header is damaged")
        for other in container.streams:
            if other.index != stream.index:
                other.discard = Discard.all
        yield container, stream


def _open(path: Path) -> InputContainer:
    try:
        return av.open(_name(path), metadata_errors="replace", options=_ALLOWED)
    except FFmpegError as error:
        what = _no_video(path)
        if what is None and isinstance(error, ArgumentError) and (name := _refused_format(path)) is not None:
            what = f"its container format is {name}, which is not read"
        if what is None:
            raise
        raise VideoError(f"{path}: {what}") from error


def _name(path: Path) -> str:
    """A name that FFmpeg takes for nothing but a file: in a relative one, a colon would end a protocol."""
    return str(path.absolute())


def _no_video(path: Path) -> str | None:
    """What else a file is, where its first bytes say so."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return None
    if not head:
        return "an empty file (0 bytes)"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for beginning, what in _NO_VIDEOS.items() if text.startswith(beginning)), None)


def _refused_format(path: Path) -> str | None:
    """The demuxer that the list has kept from reading a file: only FFmpeg's log names it. None for another error."""
    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # else nothing is logged of a second such file
    try:
        with av.logging.Capture() as messages:
            av.open(_name(path), options=_ALLOWED).close()
    except FFmpegError:
        pass
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skips)
    return next((name for _, name, text in messages if text.startswith("Format not on whitelist")), None)


def _are_even(times: list[float], gap: float) -> bool:
    """Return whether several frames at `times` (ascending) are all about `gap` apart."""
    return len(times) > 2 and all(abs(b - a - gap) <= VARIABLE_SPACING * gap for a, b in pairwise(times))


def _mean_gap(times: list[float], base: Fraction, rate: float) -> float:
    """Mean seconds between frames, from their times; from the container's rate where these are too coarse."""
    gap = (max(times) - min(times)) / (len(times) - 1) if len(times) > 1 else 0.0
    counts_milliseconds = base == Fraction(1, 1000)  # Matroska: every frame's time is rounded
    if rate and (not gap or (counts_milliseconds and abs(gap * rate - 1) < 1e-3)):
        gap = 1 / rate
    return gap or 0.5


def has_variable_rate(times: list[float]) -> bool:
    """Return whether frames at `times` (seconds, ascending) are unevenly spaced, beyond a few dropped frames."""
    gaps = [later - earlier for earlier, later in pairwise(times)]
    if len(gaps) < 2:
        return False
    median = statistics.median(gaps)
    odd = sum(abs(gap - median) > VARIABLE_SPACING * median + 1e-9 for gap in gaps)
    return odd > max(1.0, VARIABLE_SHARE * len(gaps))
