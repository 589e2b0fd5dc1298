"""Videos as people make and break them: odd ones are read, damaged ones are refused by name, and times are true."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.videos import FRAMES, RATE, number_on, numbers_on, write, write_usual

from experiments.efficiency.bench import decoding as benchmark
from tartvg.config import FramesConfig
from tartvg.data import decode
from tartvg.data.clips import DECODERS, ClipReader
from tartvg.data.decode import Painter, needed_packets, pictures
from tartvg.data.packets import PacketTable, VideoError, scan
from tartvg.data.video import read_clip


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `write_usual` makes it."""
    return write_usual(tmp_path_factory.mktemp("videos"))


# ---- odd files are read ------------------------------------------------------------------------------------------


def test_the_frames_at_the_times_that_they_carry(usual: Path) -> None:
    clip = read_clip(usual, FRAMES)
    assert numbers_on(clip) == list(range(0, 48, 4))
    assert clip.times == pytest.approx([i / 2 for i in range(12)]) and clip.duration == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("odd.mp4", {"pix_fmt": "yuv444p", "size": (65, 81)}),
        ("deep.mp4", {"pix_fmt": "yuv420p10le"}),
        ("open.mkv", {"g": "12", "x264-params": "open-gop=1:bframes=3"}),
        ("old.avi", {"codec": "mpeg4", "bf": "2", "g": "12"}),
        ("late.mp4", {"stamps": list(range(800, 848))}),
        ("stream.ts", {"g": "12"}),
    ],
)
def test_odd_files(name: str, options: dict, tmp_path: Path) -> None:
    stamps = options.pop("stamps", list(range(48)))
    clip = read_clip(write(tmp_path / name, stamps, **options), FRAMES)
    assert numbers_on(clip) == list(range(0, 48, 4))
    assert clip.times == pytest.approx([i / 2 for i in range(12)], abs=0.002)
    assert clip.duration == pytest.approx(6.0, abs=0.15)


def test_a_variable_rate_is_sampled_evenly_in_time(tmp_path: Path) -> None:
    # Two seconds at 8 frames a second, then one picture that stays for two seconds, then two seconds more.
    path = write(tmp_path / "v.mp4", [*range(0, 16), 16, *range(32, 48)], g="5")
    clip = read_clip(path, FRAMES)
    assert clip.duration == pytest.approx(6.0)
    at = [number + (15 if number > 16 else 0) for number in numbers_on(clip)]
    assert [t * 8 for t in clip.times] == pytest.approx(at)
    steps = [i * clip.duration / len(clip.times) for i in range(len(clip.times))]
    assert all(
        t <= step + 1e-6 and (step - t < 1 / 8 + 1e-6 or t == 2.0) for t, step in zip(clip.times, steps, strict=True)
    )
    assert clip.times.count(2.0) > 2


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_rotated_file_stands_upright(rotation: int, tmp_path: Path) -> None:
    path = write(tmp_path / "r.mp4", list(range(8)), rotation=rotation, crf="10")
    with av.open(str(path)) as container:
        assert abs(next(container.decode(video=0)).rotation) in (rotation, 360 - rotation)
    flat = read_clip(write(tmp_path / "flat.mp4", list(range(8)), crf="10"), FRAMES)
    clip = read_clip(path, FRAMES)
    # av_display_rotation_set: the picture is turned clockwise by minus the angle that is stored counterclockwise
    turned = np.rot90(flat.frames, k=rotation // 90, axes=(1, 2))
    assert clip.frames.shape == turned.shape
    assert np.abs(clip.frames.astype(int) - turned).mean() < 6


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_upright_is_what_ffmpeg_shows(rotation: int, tmp_path: Path) -> None:
    path = write(tmp_path / "r.mp4", list(range(8)), rotation=rotation, crf="10")
    clip = read_clip(path, FRAMES)
    height, width = clip.frames.shape[1:3]
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-vf", f"scale={width}:{height}:flags=bicubic",
               "-frames:v", "1", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]  # fmt: skip
    shown = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    assert np.abs(shown.reshape(height, width, 3).astype(int) - clip.frames[0]).mean() < 6


def test_hours_are_sampled_by_leaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "long.mp4", list(range(0, 36_000, 40)), base=Fraction(1, 4), g="10")
    few = FramesConfig(max_frames=8, min_pixels=784, max_pixels=6272)
    clip = read_clip(path, few)
    assert clip.duration == pytest.approx(9000.0) and len(clip.times) == 8  # even: the last stays like the others
    assert numbers_on(clip) == [round(t * 4 / 40) % 256 for t in clip.times]
    monkeypatch.setattr(decode, "SEEK_BYTES", 0)
    again = read_clip(path, few)
    assert np.array_equal(again.frames, clip.frames) and again.times == clip.times
    table = scan(path)
    assert sum(needed_packets(table, table.shown[::113])) < 100


def test_a_container_that_lies_about_its_length(tmp_path: Path) -> None:
    path = write(tmp_path / "liar.mkv", list(range(48)))
    data = bytearray(path.read_bytes())
    place = data.index(b"\x44\x89\x88") + 3  # Matroska's Duration: a float of eight bytes, in milliseconds
    (length,) = struct.unpack(">d", data[place : place + 8])
    data[place : place + 8] = struct.pack(">d", 50 * length)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.duration is not None and container.duration > 200 * 10**6
    clip = read_clip(path, FRAMES)
    assert clip.duration == pytest.approx(6.0) and numbers_on(clip) == list(range(0, 48, 4))


# ---- the quick way gives what the plain way gives ----------------------------------------------------------------


@pytest.mark.parametrize("options", [{"g": "12"}, {"g": "12", "x264-params": "open-gop=1:bframes=5:b-pyramid=2"}])
def test_quick_equals_plain(options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "q.mp4", list(range(120)), **options)
    table = scan(path)
    never = float("inf")

    def painter() -> Painter:
        return Painter(lambda height, width: (height, width))

    whole = decode._plain(path, table, table.shown, 0.0, painter(), never)
    monkeypatch.setattr(decode, "SMALLEST_LEAP", 2)
    rng = np.random.default_rng(0)
    for seek_bytes in (0, 10**9):
        monkeypatch.setattr(decode, "SEEK_BYTES", seek_bytes)
        for count in (1, 2, 5, 30):
            wanted = sorted(int(s) for s in rng.choice(table.shown, count, replace=False))
            found = pictures(path, table, wanted, 0.0, painter(), never)
            assert [t for t, _ in found] == [whole[s][0] for s in wanted]
            assert all(np.array_equal(image, whole[s][1]) for (_, image), s in zip(found, wanted, strict=True))
            if "x264-params" not in options:  # behind an open group of pictures the quick way may have to give up
                assert list(decode._quick(path, table, wanted, painter(), never)) == wanted


def test_a_file_that_breaks_its_promises_is_read_the_plain_way(usual: Path) -> None:
    table = scan(usual)
    # Every packet a keyframe: the quick way would begin with frames that cannot be decoded alone.
    liar = replace(table, is_key=(True,) * len(table.stamps))
    wanted = [table.shown[21], table.shown[45]]
    assert sum(needed_packets(liar, wanted)) < sum(needed_packets(table, wanted))

    def numbers(claimed: PacketTable) -> list[int]:
        painter = Painter(lambda height, width: (height, width))
        return [number_on(image) for _, image in pictures(usual, claimed, wanted, 0.1, painter, float("inf"))]

    assert numbers(liar) == numbers(table) == [21, 45]


# ---- times -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="no ffprobe")
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_times_are_those_of_ffprobe(name: str, tmp_path: Path) -> None:
    codec = {"codec": "mpeg4", "bf": "2"} if name.endswith("avi") else {}
    path = write(tmp_path / name, list(range(3, 51)), base=Fraction(1, 24), g="12", **codec)
    command = ["ffprobe", "-v", "error", "-select_streams", "v", "-show_entries", "frame=best_effort_timestamp_time",
               "-of", "json", str(path)]  # fmt: skip
    probed = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["frames"]
    theirs = [float(frame["best_effort_timestamp_time"]) for frame in probed if "best_effort_timestamp_time" in frame]
    table = scan(path)
    assert len(theirs) >= len(probed) - 1 and len(probed) == len(table.shown) == 48  # of an AVI it lacks the last one
    assert [table.seconds(s) for s in table.shown[: len(theirs)]] == pytest.approx(
        [t - theirs[0] for t in theirs], abs=2e-6
    )
    clip = read_clip(path, FRAMES)
    assert all(min(abs(t - (u - theirs[0])) for u in theirs) < 2e-6 for t in clip.times)
    assert clip.times == pytest.approx([number / 24 for number in numbers_on(clip)], abs=0.002)


# ---- damaged files are refused by name ---------------------------------------------------------------------------


def test_files_that_are_no_video(usual: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all" * 99)
    (tmp_path / "half.mp4").write_bytes(usual.read_bytes()[: usual.stat().st_size // 2])
    os.mkfifo(tmp_path / "pipe.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name in ("empty.mp4", "text.mp4", "half.mp4", "pipe.mp4", "sound.mp4", "absent.mp4"):
        with pytest.raises(VideoError, match=name):
            read_clip(tmp_path / name, FRAMES)


def damaged(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """A copy with one kind of damage. The frames lie in front, the index and all headers in `moov` behind them."""
    head = data.rindex(b"moov") - 4
    kind = rng.choice(["cut", "bits", "index", "header"])
    copy = bytearray(data)
    if kind == "cut":
        return kind, bytes(copy[: rng.integers(len(copy))])
    start, stop = (40, head) if kind == "bits" else (head, len(copy))
    if kind == "header":
        size = int(rng.integers(1, 9))
        place = int(rng.integers(start, stop - size))
        copy[place : place + size] = rng.bytes(size)
    else:
        for place in rng.integers(start, stop, rng.integers(1, 30)):
            copy[place] ^= 1 << int(rng.integers(8))
    return kind, bytes(copy)


@pytest.mark.campaign
@pytest.mark.slow
def test_300_damaged_files(usual: Path, tmp_path: Path) -> None:
    front = tmp_path / "front.mp4"  # index in front: a cut file still opens
    with av.open(str(usual)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    rng = np.random.default_rng(0)
    settings = FramesConfig(min_pixels=784, max_pixels=6272, timeout_s=60)
    reader = ClipReader(tmp_path / "quarantine.jsonl")
    outcomes: dict[tuple[str, str], int] = {}
    slowest = 0.0
    for number in range(300):
        source_data = (front if number % 3 == 0 else usual).read_bytes()
        kind, data = (
            ("cut", source_data[: int(rng.integers(len(source_data)))])
            if number % 3 == 0
            else damaged(source_data, rng)
        )
        path = tmp_path / f"{number:03d}.mp4"
        path.write_bytes(data)
        started = time.monotonic()
        try:
            clip = reader.read(path, settings)
        except VideoError as error:
            assert path.name in str(error) and str(error) != str(path)
            outcome = "quarantined"
        else:
            outcome = "decoded"
            assert len(clip.frames) == len(clip.times) and list(clip.times) == sorted(clip.times)
            if kind in ("cut", "bits"):  # here the headers are whole: each picture is the one of its time
                assert [round(t * RATE) for t in clip.times] == numbers_on(clip), path.name
        slowest = max(slowest, time.monotonic() - started)
        outcomes[kind, outcome] = outcomes.get((kind, outcome), 0) + 1
    print(outcomes, f"slowest {slowest:.1f} s")
    assert slowest < settings.timeout_s + 5
    assert sum(outcomes.values()) == 300 and {outcome for _, outcome in outcomes} == {"quarantined", "decoded"}
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert len(rows) == sum(count for (_, outcome), count in outcomes.items() if outcome == "quarantined")
    assert all(row["reason"] and Path(row["video"]).name in row["reason"] for row in rows)


# ---- the benchmark -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_reads_the_same_frames_with_every_decoder(tmp_path: Path) -> None:
    short, long = tmp_path / "short.mp4", tmp_path / "long.mp4"
    benchmark.draw(short, seconds=3)
    benchmark.repeat(short, long, 3)
    chosen, absent = benchmark.readers()
    assert set(chosen) | set(absent) == {
        "tartvg", "tartvg, in a process of its own", "torchcodec", "decord", "ffmpeg"
    }  # fmt: skip
    # ffmpeg rounds times differently
    frames = {name: read(long, 9 * benchmark.RATE) for name, read in chosen.items() if name != "ffmpeg"}
    for name, found in frames.items():
        assert found.shape == (18, 140, 280, 3)
        assert np.abs(found.astype(int) - frames["tartvg"]).mean() < 5, name
    shown = benchmark.table("9 s", 18, {"tartvg": [1.0, 2.0], "other": [2.0, 6.0]})
    assert "| other | 4 | 2.50 |" in shown
    DECODERS.stop()


# ---- the last frame ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two.mp4", "two.mkv", "two.avi", "two.ts"])
def test_the_last_frame_stays_for_its_own_time(name: str, tmp_path: Path) -> None:
    """Two frames a minute apart are a minute, not two: their mean distance says nothing about the last one."""
    path = write(tmp_path / name, [0, 480], codec="mpeg4" if name.endswith("avi") else "libx264")
    table = scan(path)
    assert table.gap == pytest.approx(60.0, abs=0.001) and table.duration == pytest.approx(60.125, abs=0.001)
    assert read_clip(path, FRAMES).duration == table.duration


@pytest.mark.parametrize("name", ["e.mp4", "e.mkv", "e.avi", "e.ts"])
def test_even_frames_last_as_long_as_their_mean_distance_says(name: str, tmp_path: Path) -> None:
    """To the last bit: the packets of Matroska round their durations to milliseconds."""
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    table = scan(write(tmp_path / name, list(range(48)), base=Fraction(1, 24), codec=codec))
    assert table.stay is None and table.duration == len(table.shown) * table.gap == pytest.approx(2.0)
