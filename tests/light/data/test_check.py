from __future__ import annotations

import dataclasses
import json
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tartvg.config import DatasetConfig, DatasetName, FramesConfig
from tartvg.data.check import check_split
from tartvg.data.examine import VideoFault, examine
from tartvg.data.packets import has_variable_rate

FRAMES = FramesConfig(min_pixels=784, max_pixels=3136, total_pixels=200_000, timeout_s=20)


def write_video(path: Path, times_ms: list[int]) -> None:
    """Frames of 64x64 noise at the given times, in milliseconds; the last one stays for as long as the one before."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"bf": "0", "threads": "1"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for pts in times_ms:
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        for packet in packets:
            packet.duration = times_ms[-1] - times_ms[-2]
            container.mux(packet)


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_sound_video_has_no_fault(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", list(range(0, 4000, 125)))
    facts = examine(tmp_path / "a.mp4", FRAMES, annotated=4.0)
    assert (facts.faults, facts.num_frames) == ((), 32)
    assert facts.duration == pytest.approx(4.0)


def test_each_fault_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mp4"
    write_video(whole, list(range(0, 4000, 125)))
    write_video(tmp_path / "variable.mkv", [t + (70 if i % 3 else 0) for i, t in enumerate(range(0, 4000, 125))])
    write_sound(tmp_path / "sound.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video")
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "folder.mp4").mkdir()

    def faults(name: str, annotated: float = 4.0) -> tuple[VideoFault, ...]:
        facts = examine(tmp_path / name, FRAMES, annotated)
        assert not facts.faults or name in facts.detail
        return facts.faults

    assert faults("nowhere.mp4") == faults("folder.mp4") == (VideoFault.MISSING,)
    assert faults("empty.mp4") == faults("text.mp4") == faults("cut.mp4") == (VideoFault.UNREADABLE,)
    assert faults("sound.mp4") == (VideoFault.NO_VIDEO_STREAM,)
    assert faults("whole.mp4", 4.9) == ()
    assert faults("whole.mp4", 5.2) == faults("whole.mp4", 2.8) == (VideoFault.DURATION_DISAGREES,)
    assert faults("variable.mkv") == (VideoFault.VARIABLE_FRAME_RATE,)


def test_one_dropped_frame_is_no_variable_rate() -> None:
    even = [i / 30 for i in range(300)]
    assert not has_variable_rate(even)
    assert not has_variable_rate(even[:100] + even[101:])
    assert not has_variable_rate([round(t, 3) for t in even])  # Matroska counts milliseconds
    assert has_variable_rate([t for i, t in enumerate(even) if i % 5])
    assert not has_variable_rate([0.0]) and not has_variable_rate([])


def write_dataset(root: Path, videos: list[str]) -> DatasetConfig:
    rows = [
        {"video": v, "query": f"query {i}", "window": [0.5, 1.5], "duration": 2.0} for v in videos for i in range(2)
    ]
    root.mkdir(exist_ok=True)
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetConfig(name=DatasetName.jsonl, root=str(root))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_with_faults(tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    settings = write_dataset(tmp_path, ["a.mp4", "b.mp4", "gone.mp4", "broken.mp4", "long.mp4"])
    for name, end in (("a.mp4", 2000), ("b.mp4", 2000), ("long.mp4", 5000)):
        write_video(tmp_path / "videos" / name, list(range(0, end, 125)))
    (tmp_path / "videos/broken.mp4").write_bytes(b"\0" * 1000)
    assert check_split(settings, FRAMES, "test", tmp_path / "out", workers) == 1
    report = json.loads((tmp_path / "out/validation.json").read_text())
    assert (report["num_queries"], report["num_videos"], report["lost_queries"]) == (10, 5, 4)  # of two videos
    assert report["faulty_videos"] == {
        "missing": 1,
        "unreadable": 1,
        "no_video_stream": 0,
        "duration_disagrees": 1,
        "several_video_streams": 0,
        "variable_frame_rate": 0,
    }
    assert report["affected_queries"]["missing"] == 2
    assert [Path(f["video"]).name for f in report["findings"]] == ["broken.mp4", "gone.mp4", "long.mp4"]
    assert report["video_hours"] == pytest.approx(9 / 3600)
    assert "gone.mp4: no such file" in capsys.readouterr().out.replace("\n", "")


def test_a_video_of_another_length_is_an_error_but_not_lost(tmp_path: Path) -> None:
    """Training uses it, so its queries are not among those that it goes on without."""
    settings = write_dataset(tmp_path, ["long.mp4"])
    write_video(tmp_path / "videos/long.mp4", list(range(0, 5000, 125)))
    assert check_split(settings, FRAMES, "test", tmp_path / "out", 0) == 1
    report = json.loads((tmp_path / "out/validation.json").read_text())
    assert (report["affected_queries"]["duration_disagrees"], report["lost_queries"]) == (2, 0)


def test_a_split_without_queries_is_of_no_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training refuses it, too."""
    settings = write_dataset(tmp_path, ["a.mp4"])
    (tmp_path / "test.jsonl").write_text("\n")
    assert check_split(settings, FRAMES, "test", tmp_path / "out", 0) == 2
    assert "error: dataset=jsonl has no queries in split test" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/validation.json").read_text())["exit_code"] == 2


def test_a_clean_folder_and_unusable_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = write_dataset(tmp_path, ["a.mp4"])
    write_video(tmp_path / "videos/a.mp4", list(range(0, 2000, 125)))
    assert check_split(settings, FRAMES, "test", tmp_path / "out", 0) == 0
    (tmp_path / "test.jsonl").write_text('{"video": "../a.mp4", "query": "q", "duration": 2}\n')
    assert check_split(settings, FRAMES, "test", tmp_path / "out", 0) == 2
    assert "line 1" in json.loads((tmp_path / "out/validation.json").read_text())["error"]
    assert check_split(settings, FRAMES, "val", tmp_path / "out", 0) == 2
    assert "no val split" in capsys.readouterr().out


MISBEHAVING = """
import os
import sys
from multiprocessing.connection import Connection

from tartvg.data import decoder_process


def examine(path, settings, annotated, examine=decoder_process.examine):
    if path.name == "crash.mp4":
        os._exit(11)
    if path.name == "hang.mp4":
        os.kill(os.getpid(), 19)
    if path.name == "raise.mp4":
        raise RuntimeError("on purpose")
    return examine(path, settings, annotated)


decoder_process.examine = examine
decoder_process.serve(Connection(int(sys.argv[-2])), int(sys.argv[-1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_crash_or_a_hang_takes_nothing_else_along(scripted, tmp_path: Path, monkeypatch, workers: int) -> None:
    names = ["a", "crash", "b", "hang", "c", "raise", "d"]
    settings = write_dataset(tmp_path / "data", [f"{name}.mp4" for name in names])
    for name in names:
        write_video(tmp_path / f"data/videos/{name}.mp4", list(range(0, 2000, 125)))
    monkeypatch.setattr("tartvg.data.clips.EXAMINE_GRACE_S", 1.0)
    scripted(MISBEHAVING)
    frames = dataclasses.replace(FRAMES, timeout_s=1.0)
    assert check_split(settings, frames, "test", tmp_path / "out", workers) == 1
    found = json.loads((tmp_path / "out/validation.json").read_text())["findings"]
    details = {Path(f["video"]).stem: f["detail"] for f in found}
    assert sorted(details) == ["crash", "hang", "raise"]
    assert "code 11" in details["crash"] and "code 1)" in details["raise"]
    assert "longer than 2 s" in details["hang"]


@pytest.mark.skipif("TARTVG_TEST_DATA" not in os.environ, reason="TARTVG_TEST_DATA is not set")
def test_charades_with_a_folder_of_made_videos(tmp_path: Path) -> None:
    for name in ("charades_sta_test.txt", "Charades_v1_test.csv"):
        (tmp_path / name).symlink_to(Path(os.environ["TARTVG_TEST_DATA"]) / "charades_sta" / name)
    # 3MSZA lasts 30.96 s and has 4 queries; AMT7R lasts 30.08 s and has 1; 06LBQ is damaged.
    write_video(tmp_path / "videos/3MSZA.mp4", list(range(0, 30960, 500)))
    write_video(tmp_path / "videos/AMT7R.mp4", list(range(0, 12000, 500)))
    (tmp_path / "videos/06LBQ.mp4").write_bytes(b"not a video")
    settings = DatasetConfig(name=DatasetName.charades_sta, root=str(tmp_path))
    assert check_split(settings, FRAMES, "test", tmp_path / "out", 0) == 1
    report = json.loads((tmp_path / "out/validation.json").read_text())
    assert (report["num_queries"], report["num_videos"]) == (3720, 1334)
    assert (report["quirks"]["beyond_end"], report["quirks"]["clipped"]) == (562, 562)
    counts = report["faulty_videos"]
    assert (counts["missing"], counts["unreadable"], counts["duration_disagrees"]) == (1331, 1, 1)
    assert report["lost_queries"] == 3720 - 4 - 1
