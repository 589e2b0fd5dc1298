"""Chosen frames of a video file, resized and upright. PyAV, no torch.

Two ways to the same pixels. The quick one decodes only what the chosen frames need: it starts at the keyframe before
them, leaps over what lies between, and skips frames that no other frame refers to. The plain one decodes everything,
and is for files whose packets do not keep what they promise.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from tartvg.data.packets import PacketTable, VideoError, open_video

SKIPPABLE = ("h264", "mpeg4")
"""Codecs whose frames without references are marked so. HEVC's marks hold within one temporal layer only."""
SMALLEST_LEAP = 12
"""Packets between two needed runs that are decoded all the same: emptying the decoder costs as much."""
SEEK_BYTES = 4 * 2**20
"""Leaps over more than this move the reading position; shorter ones read on."""
THREADED_PIXELS = 256 * 256
"""Frames from this size on are decoded by several threads; for smaller ones starting the threads costs more."""

Picture = tuple[float, np.ndarray]
"""Time in seconds from the first frame, and the image: uint8 (height, width, 3)."""


class _NotAsPromised(Exception):
    """The quick way did not find what the packet table promised; the plain way decides."""


class Painter:
    """Decoded frame -> upright RGB image of the wanted size.

    `size_of(height, width)` gives the target of an upright frame of that size. One for all frames of a file: building
    the scaler's tables costs more than a resize.
    """

    def __init__(self, size_of: Callable[[int, int], tuple[int, int]]) -> None:
        self.size_of = size_of
        self.scaler = VideoReformatter()
        self.size: tuple[int, int] | None = None
        self.matrix: tuple[int, int, int, int] = (1, 0, 0, 1)

    def paint(self, frame: VideoFrame) -> np.ndarray:
        """uint8 (height, width, 3)."""
        if self.size is None:
            self.matrix = display_matrix(frame)
            size = (frame.width, frame.height) if is_sideways(self.matrix) else (frame.height, frame.width)
            self.size = self.size_of(*size)
        height, width = self.size[::-1] if is_sideways(self.matrix) else self.size
        scaled = self.scaler.reformat(frame, width=width, height=height, format="rgb24", interpolation="BICUBIC")
        return upright(scaled.to_ndarray(), self.matrix)


def display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """Signs of (a, b, c, d) of the frame's display matrix: x' = a x + c y, y' = b x + d y; the identity without one."""
    side_data: Any = frame.side_data
    for data in side_data:
        if data.type.name == "DISPLAYMATRIX":
            values = np.frombuffer(bytes(data), dtype="<i4")
            a, b, c, d = (int(values[i]) for i in (0, 1, 3, 4))
            if abs(b) > abs(a):
                return 0, (b > 0) - (b < 0), (c > 0) - (c < 0), 0
            return (a > 0) - (a < 0) or 1, 0, 0, (d > 0) - (d < 0) or 1
    return 1, 0, 0, 1


def is_sideways(matrix: tuple[int, int, int, int]) -> bool:
    """Return whether the matrix exchanges height and width."""
    return matrix[1] != 0


def upright(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The image as a player shows it; phones write what the sensor saw and say how they were held."""
    a, b, c, d = matrix
    if is_sideways(matrix):
        image = image.transpose(1, 0, 2)
    across, down = (c, b) if is_sideways(matrix) else (a, d)
    return image[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def pictures(
    path: Path, table: PacketTable, wanted: Sequence[int], tolerance: float, painter: Painter, deadline: float
) -> list[Picture]:
    """The frames with the stamps `wanted` (ascending, repeats allowed) of a file whose packets `scan` has read.

    Where a frame cannot be decoded the next one that can takes its place, with its own time, if it is at most
    `tolerance` seconds later (earlier at the end of the file): files that were cut out of longer ones begin with frames
    that nobody can decode. Raises VideoError when there is none, and after any decoding error behind the first
    frame: a damaged picture must not be learned from.
    """
    unique = sorted({table.source(stamp) for stamp in wanted})
    found: dict[int, Picture] = {}
    if table.has_times and len(set(table.stamps)) == len(table.stamps):
        try:
            found = _quick(path, table, unique, painter, deadline)
        except (_NotAsPromised, FFmpegError):
            found = {}
    if not found:
        painter.size = None
        found = _plain(path, table, unique, tolerance, painter, deadline)
    return [_repeated(found[table.source(stamp)], table, stamp) for stamp in wanted]


def _repeated(picture: Picture, table: PacketTable, stamp: int) -> Picture:
    """The picture at a packet that shows it once more; itself at its own packet."""
    source = table.source(stamp)
    return picture if source == stamp else (picture[0] + table.seconds(stamp) - table.seconds(source), picture[1])


def _packets(
    path: Path, container: InputContainer, stream: VideoStream, table: PacketTable, deadline: float
) -> Iterator[Packet]:
    """The packets that a decoder is given: without the table's head, and without those of 0 bytes."""
    for number, packet in enumerate(container.demux(stream)):
        if time.monotonic() > deadline:
            raise VideoError(f"{path}: decoding took too long")
        is_early = table.begin is not None and packet.pts is not None and packet.pts < table.begin
        # An empty packet means the end to a decoder.
        if packet.size and number >= table.head and not is_early:
            yield packet


# -- the quick way -----------------------------------------------------------------------------------------------------


def needed_packets(table: PacketTable, wanted: Collection[int]) -> list[bool]:
    """Which packets, in the order of decoding, have to be decoded to see the frames with the stamps `wanted`."""
    needed = [False] * len(table.stamps)
    chosen = set(wanted)
    keys: list[int] = []
    filled = 0
    for number, stamp in enumerate(table.stamps):
        if table.is_key[number]:
            keys.append(number)
        if stamp in chosen:
            # A frame that is shown before its keyframe may refer to what came before that.
            start = next((k for k in reversed(keys) if table.stamps[k] <= stamp), 0)
            needed[max(start, filled) : number + 1] = [True] * (number + 1 - max(start, filled))
            filled = number + 1
    last = None
    for number, is_needed in enumerate(needed):
        if is_needed:
            if last is not None and 1 < number - last <= SMALLEST_LEAP:
                needed[last + 1 : number] = [True] * (number - last - 1)
            last = number
    return needed


def _quick(
    path: Path, table: PacketTable, wanted: Sequence[int], painter: Painter, deadline: float
) -> dict[int, Picture]:
    chosen, found = set(wanted), {}
    for frame in _quick_frames(path, table, chosen, deadline):
        if frame.pts in chosen:
            if frame.is_corrupt:
                raise _NotAsPromised
            found[frame.pts] = (table.seconds(frame.pts), painter.paint(frame))
            if len(found) == len(chosen):
                return found
    raise _NotAsPromised


def _quick_frames(path: Path, table: PacketTable, chosen: set[int], deadline: float) -> Iterator[VideoFrame]:
    needed = needed_packets(table, chosen)
    place = {stamp: number for number, stamp in enumerate(table.stamps)}
    with open_video(path) as (container, stream):
        context = _configured(stream.codec_context)
        can_skip = context.name in SKIPPABLE
        is_leaping, target, floor = False, 0, min(table.stamps)
        for packet in _packets(path, container, stream, table, deadline):
            if packet.pts not in place:
                raise _NotAsPromised
            number = place[packet.pts]
            if not is_leaping and not needed[number]:
                yield from context.decode(None)
                context.flush_buffers()
                if True not in needed[number:]:
                    return
                is_leaping, target = True, needed.index(True, number)
                floor = table.stamps[target]
                if sum(table.sizes[number:target]) > SEEK_BYTES:
                    container.seek(floor, stream=stream, backward=True)
            if is_leaping:
                if number < target:
                    continue
                if number > target:  # the container's index is wrong
                    raise _NotAsPromised
                is_leaping = False
            if table.stamps[number] < floor:
                continue  # shown before the keyframe that was leapt to: it may refer to what was left out
            context.skip_frame = "NONREF" if can_skip and packet.pts not in chosen else "DEFAULT"
            yield from context.decode(packet)
        yield from context.decode(None)


# -- the plain way -----------------------------------------------------------------------------------------------------


def _plain(
    path: Path, table: PacketTable, wanted: Sequence[int], tolerance: float, painter: Painter, deadline: float
) -> dict[int, Picture]:
    if table.has_times:
        try:
            return _by_time(path, table, wanted, tolerance, painter, deadline)
        except _NotAsPromised:
            painter.size = None
    return _by_count(path, table, wanted, painter, deadline)


def _by_time(
    path: Path, table: PacketTable, wanted: Sequence[int], tolerance: float, painter: Painter, deadline: float
) -> dict[int, Picture]:
    found: dict[int, Picture] = {}
    last: tuple[int, VideoFrame] | None = None
    for frame in _all_frames(path, table, deadline):
        if frame.pts is None or (last is not None and frame.pts <= last[0]):
            raise _NotAsPromised  # the container guessed its times
        last = frame.pts, frame
        due = wanted[len(found) : bisect_right(wanted, frame.pts)]
        if due:
            found |= dict.fromkeys(due, _stand_in(path, table, due, last, tolerance, painter))
        if len(found) == len(wanted):
            return found
    if last is None:
        raise VideoError(f"{path}: no frame could be decoded")
    rest = wanted[len(found) :]
    return found | dict.fromkeys(rest, _stand_in(path, table, rest, last, tolerance, painter))


def _stand_in(
    path: Path,
    table: PacketTable,
    due: Sequence[int],
    found: tuple[int, VideoFrame],
    tolerance: float,
    painter: Painter,
) -> Picture:
    """The picture of the frame that stands for all that are due; refused where one of them is too far away."""
    at = table.seconds(found[0])
    worst = max((table.seconds(stamp) for stamp in due), key=lambda t: abs(t - at))
    if abs(worst - at) > tolerance:
        raise VideoError(f"{path}: the frame at {worst:.2f} s could not be decoded; the nearest is at {at:.2f} s")
    return at, painter.paint(found[1])


def _by_count(
    path: Path, table: PacketTable, wanted: Sequence[int], painter: Painter, deadline: float
) -> dict[int, Picture]:
    """The n-th frame that comes out is the n-th that is shown, which only holds if all of them come out."""
    chosen, found, count = set(wanted), {}, 0
    for count, frame in enumerate(_all_frames(path, table, deadline), start=1):
        if count > len(table.drawn):
            break
        stamp = table.drawn[count - 1]
        if stamp in chosen:
            found[stamp] = (table.seconds(stamp), painter.paint(frame))
    if count != len(table.drawn):
        raise VideoError(f"{path}: {count} frames came out of {len(table.drawn)} packets, which carry no times")
    return found


def _all_frames(path: Path, table: PacketTable, deadline: float) -> Iterator[VideoFrame]:
    """Every frame that can be decoded. Raises VideoError for the first error behind the first frame."""
    has_begun = False
    with open_video(path) as (container, stream):
        context = _configured(stream.codec_context)
        for packet in chain(_packets(path, container, stream, table, deadline), [None]):
            try:
                frames = context.decode(packet)
            except FFmpegError as error:
                if has_begun:
                    raise VideoError(f"{path}: damaged: {error}") from error
                continue
            for frame in frames:
                if not frame.is_corrupt:
                    has_begun = True
                    yield frame


def _configured(context: VideoCodecContext) -> VideoCodecContext:
    is_large = context.width * context.height >= THREADED_PIXELS
    context.thread_type = "AUTO" if is_large else "SLICE"
    context.thread_count = 0 if is_large else 1
    context.options = {"err_detect": "explode"}  # else damaged blocks are painted over, and nobody is told
    return context
