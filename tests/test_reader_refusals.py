"""What a reader refuses: paths that leave their folder, values out of bounds, files that are none."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tartvg.config import DatasetConfig, DatasetName
from tartvg.data import activitynet, jsonl, tacos
from tartvg.data.annotations import ReadOptions
from tartvg.data.datasets import load_samples

TEST = ReadOptions("test")


def own_row(tmp_path: Path, **changes: object) -> Path:
    row = {"video": "a.mp4", "query": "q", "windows": [[1, 2]], "duration": 9, **changes}
    path = tmp_path / "own.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "video",
    [
        "../a.mp4",
        "x/../../a.mp4",
        "/etc/passwd",
        "//etc/passwd",
        "",
        ".",
        "..",
        "a\0.mp4",
        "a\nb.mp4",
        "..\\a.mp4",
        "x" * 1001,
    ],
)
def test_videos_stay_in_their_folder(tmp_path: Path, video: str) -> None:
    for videos in (None, tmp_path):
        with pytest.raises(ValueError, match=r"own\.jsonl, line 2: video .* is not a file below"):
            jsonl.read([own_row(tmp_path, video=video)], ReadOptions("test", videos))


def test_links_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    videos, outside = tmp_path / "videos", tmp_path / "outside"
    videos.mkdir()
    outside.mkdir()
    (outside / "a.mp4").touch()
    (videos / "inside.mp4").touch()
    (videos / "a.mp4").symlink_to(outside / "a.mp4")
    (videos / "folder").symlink_to(outside)
    (videos / "fine.mp4").symlink_to(videos / "inside.mp4")
    for name in ("a.mp4", "folder/a.mp4"):
        with pytest.raises(ValueError, match=r"line 2: .* leads out of"):
            jsonl.read([own_row(tmp_path, video=name)], ReadOptions("test", videos))
    (tmp_path / "link").symlink_to(videos)
    for folder in (videos, tmp_path / "link"):
        found = jsonl.read([own_row(tmp_path, video="fine.mp4")], ReadOptions("test", folder))
        assert found.samples[0].video == folder / "fine.mp4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": "x" * 100_001}, "query has 100001 characters"),
        ({"query": 3}, "query must be a string"),
        ({"windows": [[1, 2, 3]]}, r"a window is \[start, end\]"),
        ({"windows": 5}, "expected an array"),
        ({"windows": [[float("nan"), 2]]}, "NaN is no number"),
        ({"windows": [[1, float("inf")]]}, "Infinity is no number"),
        ({"windows": [[1, 10**400]]}, "end must be"),
        ({"windows": [[True, 2]]}, "start must be a number"),
        ({"windows": [[1, 2e7]]}, "end must be finite and at most"),
        ({"duration": 0}, "duration must be > 0"),
        ({"duration": None}, "duration must be a number"),
        ({"sample_id": 7}, "sample_id must be a string"),
    ],
)
def test_values_that_are_refused_by_file_and_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 2: .*{message}"):
        jsonl.read([own_row(tmp_path, **changes)], TEST)


def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test.json"
    for content, message in [
        (b"\xff\xfe", "not UTF-8"),
        (b"[", "not usable as JSON"),
        (b"[" * 100_000, "not usable as JSON"),
        (b'{"v": {}, "v": {}}', "'v' is there twice"),
        (b'{"v": {}}', "'timestamps' is missing"),
        (b"[]", "expected an object"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"test\.json") as caught:
            activitynet.read([path], TEST)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="no such file"):
        activitynet.read([tmp_path / "nowhere.json"], TEST)
    with pytest.raises(ValueError, match="directory"):
        activitynet.read([tmp_path], TEST)
    monkeypatch.setattr("tartvg.data.parsing.MAX_FILE_BYTES", 1)
    with pytest.raises(ValueError, match="2 bytes"):
        activitynet.read([path], TEST)


def test_ten_million_characters_are_refused_quickly_and_named(tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"own\.jsonl, line 2: query has 10000000 characters") as caught:
        jsonl.read([own_row(tmp_path, query="x" * 10_000_000)], TEST)
    assert time.process_time() - start < 5 and len(str(caught.value)) < 500


def test_a_tiny_frame_rate_makes_no_infinite_time(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    entry = {"fps": 1e-300, "num_frames": 1e-299, "timestamps": [[0, 1e7]], "sentences": ["s"]}
    path.write_text(json.dumps({"v.avi": entry}))
    with pytest.raises(ValueError, match=r"test\.json, video 'v\.avi', sentence 0: end must be finite"):
        tacos.read([path], TEST)


def test_a_pipe_or_a_device_is_no_annotation_file(tmp_path: Path) -> None:
    """It would never end; its size says 0."""
    os.mkfifo(tmp_path / "own.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("own.jsonl", "zero.jsonl"):
        with pytest.raises(ValueError, match=rf"{name}: a pipe or device, not a file"):
            jsonl.read([tmp_path / name], TEST)


def test_a_refused_file_harms_no_other(tmp_path: Path) -> None:
    """One split is refused, by file and line; the other is read, and no file has changed."""
    good = {"video": "a.mp4", "query": "q", "windows": [[1, 2]], "duration": 9}
    bad = {**good, "video": "../../etc/passwd"}
    for name, rows in (("train", [good, bad]), ("val", [good]), ("test", [good, good])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    settings = DatasetConfig(name=DatasetName.jsonl, root=str(tmp_path))
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: video '\.\./\.\./etc/passwd' is not a file below"):
        load_samples(settings, "train")
    assert len(load_samples(settings, "test")) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command_names_file_and_line_without_a_traceback(tmp_path, small, run_command) -> None:
    own_row(tmp_path, video="/etc/passwd").rename(tmp_path / "train.jsonl")
    overrides = [o for o in small if not o.startswith("dataset.")]
    result = run_command(*overrides, "stage=grpo1", "dataset=jsonl", f"dataset.root={tmp_path}",
                         f"runs_dir={tmp_path}/runs", check=False)  # fmt: skip
    assert result.returncode == 2
    assert "train.jsonl, line 2: video '/etc/passwd'" in result.stderr and "Traceback" not in result.stderr
