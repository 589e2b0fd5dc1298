"""Decoding speed beside torchcodec, decord and ffmpeg: `python -m experiments.efficiency.bench.decoding`.

Two H.264 files of 854x480 at 30 frames a second are drawn, one of 30 s and one of ten minutes, and each decoder reads
2 frames a second of them at 224 px (140x280 here: the shape is kept, and sides are multiples of 28). The decoders take
turns, so that what else the machine does hits all of them; the ratio of each round's times is more trustworthy than the
times. The others open a file once a reading and are told how many frames it has, which ours has to find out. A decoder
that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np

from tartvg.config import FramesConfig
from tartvg.data.clips import decode_isolated
from tartvg.data.video import num_sampled, read_clip, sampled_indices, target_size

WIDTH, HEIGHT, RATE, SECONDS = 854, 480, 30, 30
SETTINGS = FramesConfig(
    max_frames=4096, min_pixels=784, max_pixels=224 * 224, total_pixels=224 * 224 * 4096, timeout_s=3600.0
)
Reader = Callable[[Path, int], np.ndarray]
"""A file and how many frames it has -> uint8 (sampled frames, height, width, 3)."""


def draw(path: Path, seconds: int = SECONDS) -> None:
    """A textured background that pans, and a box that crosses it; B-frames and a keyframe every 250 frames."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:HEIGHT, 0 : WIDTH + 400].astype(np.float32)
    texture = np.sin(x / 17) * 40 + np.cos(y / 11 + x / 70) * 40 + rng.normal(120, 12, x.shape)
    ground = np.clip(texture, 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = Fraction(1, RATE)
        for number in range(seconds * RATE):
            left = int(abs(number * 1.5 % 800 - 400))
            part = ground[:, left : left + WIDTH]
            image = np.stack([part, np.roll(part, number // 4, axis=0), 255 - part], axis=-1)
            box = number * 5 % (WIDTH - 120)
            image[150:270, box : box + 120] = (200, 40, number * 3 % 255)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def repeat(source: Path, path: Path, times: int) -> None:
    """The packets of a file, one round after another: a long video without encoding it."""
    with av.open(str(source)) as container, av.open(str(path), "w") as output:
        stream = container.streams.video[0]
        copy = output.add_stream_from_template(stream)
        packets = [p for p in container.demux(stream) if p.size]
        assert stream.duration is not None
        for packet in (p for number in range(times) for p in _later(packets, number * stream.duration)):
            packet.stream = copy
            output.mux(packet)


def _later(packets: Sequence[av.Packet], offset: int) -> list[av.Packet]:
    moved = []
    for packet in packets:
        assert packet.pts is not None and packet.dts is not None
        copy = av.Packet(bytes(packet))
        copy.pts, copy.dts, copy.duration = packet.pts + offset, packet.dts + offset, packet.duration
        copy.time_base, copy.is_keyframe = packet.time_base, packet.is_keyframe
        moved.append(copy)
    return moved


def _size(count: int) -> tuple[int, int]:
    return target_size(HEIGHT, WIDTH, count, SETTINGS)


def _count(num_frames: int) -> int:
    return num_sampled(num_frames, num_frames / RATE, SETTINGS)


def _torchcodec(path: Path, num_frames: int) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    count = _count(num_frames)
    decoder = VideoDecoder(str(path), num_ffmpeg_threads=0, dimension_order="NHWC", transforms=[Resize(_size(count))])
    return np.asarray(decoder.get_frames_at(sampled_indices(num_frames, count)).data)


def _decord(path: Path, num_frames: int) -> np.ndarray:
    import decord

    count = _count(num_frames)
    height, width = _size(count)
    reader = decord.VideoReader(str(path), width=width, height=height, num_threads=0)
    return np.asarray(reader.get_batch(sampled_indices(num_frames, count)).asnumpy())


def _ffmpeg(path: Path, num_frames: int) -> np.ndarray:
    height, width = _size(_count(num_frames))
    filters = f"fps={SETTINGS.fps:g},scale={width}:{height}:flags=bicubic"
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-vf", filters, "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    made = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(made, np.uint8).reshape(-1, height, width, 3)


def readers() -> tuple[dict[str, Reader], list[str]]:
    """Those that run here, and the names of those that do not."""
    ours: dict[str, Reader] = {
        "tartvg": lambda path, _: read_clip(path, SETTINGS).frames,
        "tartvg, in a process of its own": lambda path, _: decode_isolated(path, SETTINGS).frames,
    }
    others: dict[str, Reader] = {"torchcodec": _torchcodec, "decord": _decord, "ffmpeg": _ffmpeg}
    is_here = {"ffmpeg": shutil.which("ffmpeg") is not None}
    is_here |= {name: find_spec(name) is not None for name in ("torchcodec", "decord")}
    return ours | {name: r for name, r in others.items() if is_here[name]}, [n for n in others if not is_here[n]]


def measure(path: Path, num_frames: int, chosen: dict[str, Reader], rounds: int) -> dict[str, list[float]]:
    """Seconds of each reader in each round, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(rounds + 1):
        for name, read in chosen.items():
            started = time.perf_counter()
            frames = read(path, num_frames)
            taken = time.perf_counter() - started
            assert frames.shape[3] == 3 and frames.dtype == np.uint8
            if number:
                seconds[name].append(taken)
    return seconds


def table(name: str, num_sampled: int, seconds: dict[str, list[float]]) -> str:
    """Markdown: sampled frames a second (median round), and how many times as fast we are (median of the rounds)."""
    lines = [f"| {name} | frames/s | tartvg is ... times as fast |", "| --- | ---: | ---: |"]
    ours = seconds["tartvg"]
    for reader, taken in seconds.items():
        ratio = statistics.median(theirs / own for theirs, own in zip(taken, ours, strict=True))
        lines.append(f"| {reader} | {num_sampled / statistics.median(taken):.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the files, run the rounds, print one table per file."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.efficiency.bench.decoding", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--repeats", type=int, default=20, help="length of the long file in half minutes (default: 20)")
    options = parser.parse_args(arguments)
    chosen, absent = readers()
    with tempfile.TemporaryDirectory() as folder:
        short, long = Path(folder, "short.mp4"), Path(folder, "long.mp4")
        draw(short)
        repeat(short, long, options.repeats)
        for path, length in ((short, SECONDS), (long, SECONDS * options.repeats)):
            seconds = measure(path, RATE * length, chosen, options.rounds)
            print(table(f"{length} s", 2 * length, seconds) + "\n", flush=True)
    for name in absent:
        print(f"not measured, because it is not installed: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
