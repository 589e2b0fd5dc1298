"""What lies in the place of a plain video: covers, several streams, repeated frames, cut recordings, other files."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from helpers.videos import FRAMES, RATE, numbers_on, picture, write, write_usual
from PIL import Image

from tartvg.data.examine import VideoFault, examine
from tartvg.data.packets import NoVideoStream, VideoError, open_video, scan
from tartvg.data.video import Clip, read_clip
from tartvg.report.strips import thumbnails

needs_ffprobe = pytest.mark.skipif(shutil.which("ffprobe") is None, reason="no ffprobe")
EVERY_HALF_SECOND = list(range(0, 48, RATE // 2))
"""Numbers of the sampled pictures of six seconds."""


def probed(path: Path, *options: str) -> dict:
    command = ["ffprobe", "-v", "error", *options, "-of", "json", str(path)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def assert_whole(clip: Clip) -> None:
    """That a clip is the one of `write_usual`."""
    assert numbers_on(clip) == EVERY_HALF_SECOND and clip.duration == pytest.approx(6.0, abs=0.15)
    assert clip.times == pytest.approx([number / RATE for number in EVERY_HALF_SECOND], abs=0.002)


# ---- covers ------------------------------------------------------------------------------------------------------


def box(kind: bytes, *content: bytes) -> bytes:
    """An atom of an mp4."""
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body)) + kind + body


def add_cover(path: Path) -> Path:
    """Put a cover picture in front of the tracks of an mp4 whose `moov` is its last atom, as taggers do."""
    data, jpeg = path.read_bytes(), io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(jpeg, "JPEG")
    begin = data.rindex(b"moov") - 4
    tracks, place = b"", begin + 8
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        tracks += data[place : place + size] if kind != b"udta" else b""
        place += size
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0), jpeg.getvalue()))
    handler = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    tags = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", cover)))
    path.write_bytes(data[:begin] + box(b"moov", tags, tracks))
    return path


def write_sound(container: av.container.OutputContainer, seconds: int) -> None:
    stream = container.add_stream("aac", rate=16000)
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000 * seconds), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 16000, 0, Fraction(1, 16000)
    for packet in (*stream.encode(frame), *stream.encode()):
        container.mux(packet)


def test_a_cover_in_front_of_the_video_is_none(tmp_path: Path) -> None:
    path = add_cover(write_usual(tmp_path))
    with av.open(str(path)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["mjpeg", "h264"]
    assert_whole(read_clip(path, FRAMES))
    assert examine(path, FRAMES, 6.0).faults == ()
    assert thumbnails(path, [0.1])[0].size == (120, 96)


def test_sound_with_a_cover_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        write_sound(container, 2)
    with pytest.raises(NoVideoStream, match=r"song\.m4a: no video stream, only a cover picture"):
        scan(add_cover(path))
    assert examine(path, FRAMES, 2.0).faults == (VideoFault.NO_VIDEO_STREAM,)


# ---- several streams ---------------------------------------------------------------------------------------------


def write_two(path: Path, default: int | None) -> Path:
    """Two streams of six seconds, each of its own height; the second one's pictures carry numbers from 100 on."""
    with av.open(str(path), "w") as container:
        streams = []
        for number in range(2):
            stream = container.add_stream("libx264", rate=RATE, options={"threads": "1", "bf": "0"})
            stream.width, stream.height, stream.pix_fmt = 80, (64, 96)[number], "yuv420p"
            stream.time_base = stream.codec_context.time_base = Fraction(1, RATE)
            if default is not None:
                stream.disposition = Disposition.default if number == default else Disposition(0)
            streams.append(stream)
        for index in range(48):
            for number, stream in enumerate(streams):
                image = picture(100 * number + index, stream.height, stream.width)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, RATE)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "default", "read"), [("a.mkv", 1, 1), ("b.mkv", 0, 0), ("c.mp4", 1, 1), ("d.avi", None, 0)]
)
def test_of_several_streams_the_default_one_is_read_and_the_check_says_so(
    name: str, default: int | None, read: int, tmp_path: Path
) -> None:
    path = write_two(tmp_path / name, default)
    clip = read_clip(path, FRAMES)
    assert numbers_on(clip) == [100 * read + number for number in EVERY_HALF_SECOND]
    facts = examine(path, FRAMES, 6.0)
    assert facts.faults == (VideoFault.SEVERAL_STREAMS,) and not facts.faults[0].is_error
    assert facts.detail == f"{path}: 2 video streams, of which the default one is read"


@needs_ffprobe
def test_the_stream_is_the_first_of_ffprobes_v(tmp_path: Path) -> None:
    for path in (add_cover(write_usual(tmp_path)), write_two(tmp_path / "two.mkv", 0)):
        (theirs,) = probed(path, "-select_streams", "V:0", "-show_entries", "stream=index,height")["streams"]
        with open_video(path) as (_, stream):
            assert (stream.index, stream.height) == (theirs["index"], theirs["height"])


# ---- packets of 0 bytes ------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
def test_repeated_frames_are_read(tmp_path: Path) -> None:
    """Theora: each second shows one picture, and its repeats are packets of 0 bytes."""
    path = tmp_path / "still.ogv"
    pictures = b"".join(picture(number // RATE).tobytes() for number in range(6 * RATE))
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "80x64", "-r", str(RATE), "-i", "-"]
    command = ["ffmpeg", "-v", "error", *raw, "-c:v", "libtheora", "-q:v", "10", str(path)]
    subprocess.run(command, input=pictures, check=True)
    table = scan(path)
    count = len(table.shown)
    assert table.sizes.count(0) > count / 2 and 5 * RATE < count <= 6 * RATE  # it keeps the last repeats to itself
    clip = read_clip(path, FRAMES)
    assert clip.duration == pytest.approx(count / RATE)
    assert clip.times == pytest.approx([int(i * count / len(clip.times)) / RATE for i in range(len(clip.times))])
    assert numbers_on(clip) == [int(t) for t in clip.times]
    assert examine(path, FRAMES, clip.duration).faults == ()
    assert len(thumbnails(path, [0.5, 3.5])) == 2


# ---- where a file begins and ends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "base", "options"),
    [
        ("cut.ts", "libx264", Fraction(1, RATE), {"bf": "2"}),
        ("open.ts", "libx264", Fraction(1, RATE), {"x264-params": "open-gop=1:bframes=3"}),
        ("cut.mpg", "mpeg2video", Fraction(1, 25), {"bf": "2"}),
    ],
)
def test_a_recording_that_begins_inside_a_group_of_pictures_begins_at_its_key_frame(
    name: str, codec: str, base: Fraction, options: dict[str, str], tmp_path: Path
) -> None:
    settings = {"g": "24", "sc_threshold": "0", "b": "4M", **options}
    whole = write(tmp_path / f"whole{name}", list(range(96)), base, codec, **settings)
    size = 188 if name.endswith("ts") else 2048
    data = whole.read_bytes()
    path = tmp_path / name
    path.write_bytes(data[len(data) // 10 // size * size :])  # behind the first key frame, before the second
    table = scan(path)
    assert table.head > 0 and table.is_key[0]
    if shutil.which("ffprobe"):
        packets = probed(path, "-select_streams", "V:0", "-show_entries", "packet=flags")["packets"]
        assert ["K" in packet["flags"] for packet in packets].index(True) == table.head
    clip = read_clip(path, FRAMES)
    assert numbers_on(clip)[0] == 24 and clip.times[0] == 0.0
    assert [24 + round(t / base) for t in clip.times] == numbers_on(clip)
    assert clip.duration == pytest.approx(float(72 * base), abs=float(base))


def test_a_recording_that_is_whole_keeps_its_first_frame(tmp_path: Path) -> None:
    whole = scan(write(tmp_path / "whole.ts", list(range(48)), g="12"))
    assert (whole.head, whole.begin, len(whole.shown)) == (0, None, 48)


def write_stays(path: Path, num_frames: int, last_s: float) -> Path:
    """Even frames, of which the last one has its own duration."""
    base = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"bf": "0", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        packets = []
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = 125 * number, base
            packets += stream.encode(frame)
        packets += stream.encode()
        for number, packet in enumerate(packets):
            packet.duration = 125 if number + 1 < num_frames else round(1000 * last_s)
            container.mux(packet)
    return path


@pytest.mark.parametrize("name", ["slide.mp4", "slide.mkv", "slide.mov"])
def test_a_last_frame_that_stays_for_half_a_minute_is_half_a_minute(name: str, tmp_path: Path) -> None:
    path = write_stays(tmp_path / name, 32, 30.0)
    clip = read_clip(path, FRAMES)
    assert clip.duration == pytest.approx(31 / RATE + 30.0, abs=0.002)
    step = clip.duration / 32  # no more frames than the file has
    assert numbers_on(clip) == [min(31, int(i * step * RATE)) for i in range(32)] == [0, 8, 16, 25] + [31] * 28
    if shutil.which("ffprobe"):
        assert clip.duration == pytest.approx(float(probed(path, "-show_format")["format"]["duration"]), abs=0.002)


def test_a_last_frame_that_outlasts_its_container_is_not_believed(tmp_path: Path) -> None:
    path = write_stays(tmp_path / "liar.mp4", 32, 30.0)
    data = bytearray(path.read_bytes())
    place = data.index(b"mdhd") + 4 + 16  # version and flags, created, modified, time scale; then the length
    scale, length = struct.unpack_from(">II", data, place - 4)
    assert length == pytest.approx(33.875 * scale)
    struct.pack_into(">I", data, place, 4 * scale)
    path.write_bytes(data)
    assert scan(path).duration == pytest.approx(4.0)


def test_times_count_from_the_picture_where_the_sound_begins_earlier(tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, RATE)
        write_sound(container, 11)
        for index in range(48):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts, frame.time_base = 5 * RATE + index, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    first: dict[str, float] = {}
    with av.open(str(path)) as container:
        for packet in container.demux():
            if packet.pts is not None:
                first.setdefault(packet.stream.type, float(packet.pts * packet.time_base))
    assert first == pytest.approx({"audio": 0.0, "video": 5.0}, abs=0.1)
    assert_whole(read_clip(path, FRAMES))


# ---- names and other files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["2024-01-01T10:00:00.mp4", "file:usual.mp4", "concat:usual.mp4", "subfile,,start,0,end,9,,:usual.mp4"]
)
def test_a_name_is_never_a_protocol(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder in front: FFmpeg reads what stands before a colon as one."""
    monkeypatch.chdir(tmp_path)
    usual = write_usual(tmp_path)
    usual.rename(name)
    path = Path(name)
    assert_whole(read_clip(path, FRAMES))
    assert not examine(path, FRAMES, 6.0).faults and len(thumbnails(path, [1.0])) == 1
    path.write_bytes(b"ffconcat version 1.0\nfile other.mp4\n")
    with pytest.raises(VideoError, match="its container format is concat"):
        read_clip(path, FRAMES)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", r"an empty file \(0 bytes\)"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "a Git LFS pointer.*git lfs pull",
        ),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "an XML page and not a video"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page and not a video"),
        (b"<HTML><body>404</body></HTML>", "a web page and not a video"),
    ],
)
def test_what_lies_in_a_videos_place_is_said(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=rf"a\.mp4: {what}"):
        read_clip(path, FRAMES)
    facts = examine(path, FRAMES, 2.0)
    assert facts.faults == (VideoFault.UNREADABLE,) and facts.detail.startswith(f"{path}: a")
