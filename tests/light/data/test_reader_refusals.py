"""What a reader refuses: paths that leave their folder, values out of bounds, files that are none, and predictions
about something else than the query that they name."""

from __future__ import annotations

import gzip
import json
import os
import time
from fractions import Fraction
from pathlib import Path

import av
import pytest
from helpers.videos import FRAMES, write

from tartvg.config import DatasetConfig, DatasetName
from tartvg.data import activitynet, jsonl, tacos
from tartvg.data.annotations import ReadOptions
from tartvg.data.datasets import load_samples
from tartvg.data.packets import FORMATS, VideoError, open_video
from tartvg.data.video import read_clip
from tartvg.evaluation.formats import read_predictions
from tartvg.evaluation.naming import Clues, Index
from tartvg.records import to_json
from tartvg.types import GroundingSample, Prediction, Span

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


def test_links_inside_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    """`hf download` without --local-dir leaves links in snapshots/<commit>/ to the repository's own blobs/."""
    repository = tmp_path / "datasets--someone--clips"
    videos = repository / "snapshots" / "0123abc" / "videos"
    videos.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "5f4d").touch()
    (tmp_path / "private.mp4").touch()
    (videos / "a.mp4").symlink_to("../../../blobs/5f4d")
    (videos / "out.mp4").symlink_to("../../../../private.mp4")
    found = jsonl.read([own_row(tmp_path, video="a.mp4")], ReadOptions("test", videos))
    assert found.samples[0].video == videos / "a.mp4"
    with pytest.raises(ValueError, match=r"line 2: .* leads out of .*--local-dir"):
        jsonl.read([own_row(tmp_path, video="out.mp4")], ReadOptions("test", videos))


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
        ({"split": "validation"}, "split must be one of train, val, test, got 'validation'"),
        ({"split": None}, "split must be a string"),
    ],
)
def test_values_that_are_refused_by_file_and_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 2: .*{message}"):
        jsonl.read([own_row(tmp_path, **changes)], TEST)


def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "test.json"
    for content, message in [
        (b"\x80{}", "not UTF-8 at byte 0"),
        (b"\xff\xfe{", "not UTF-16 at byte 2"),
        (b"\x1f\x8b\x08", "not usable as gzip"),
        (gzip.compress(b"[]")[:-9], "not usable as gzip"),
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
    path.write_bytes(gzip.compress(b" " * 1000))
    monkeypatch.setattr("tartvg.data.parsing.MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="unpacks to more than 100 bytes"):
        activitynet.read([path], TEST)
    monkeypatch.setattr("tartvg.data.parsing.MAX_FILE_BYTES", 1)
    with pytest.raises(ValueError, match=r"\d+ bytes; an annotation file"):
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


@pytest.mark.slow
def test_the_command_names_file_and_line_without_a_traceback(tmp_path, small, run_command) -> None:
    own_row(tmp_path, video="/etc/passwd").rename(tmp_path / "train.jsonl")
    overrides = [o for o in small if not o.startswith("dataset.")]
    result = run_command(*overrides, "stage=grpo1", "dataset=jsonl", f"dataset.root={tmp_path}",
                         f"runs_dir={tmp_path}/runs", check=False)  # fmt: skip
    assert result.returncode == 2
    assert "train.jsonl, line 2: video '/etc/passwd'" in result.stderr and "Traceback" not in result.stderr


# ---- video files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ffconcat version 1.0\nfile usual.mp4\n", "concat"),
        ("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n", "sdp"),
    ],
)
def test_a_text_that_names_another_file_opens_none(tmp_path: Path, text: str, name: str) -> None:
    write(tmp_path / "usual.mp4", list(range(8)))
    path = tmp_path / "list.mp4"
    path.write_text(text)
    level = av.logging.get_level()
    for _ in range(2):
        with pytest.raises(VideoError, match=rf"list\.mp4: its container format is {name}, which is not read"):
            read_clip(path, FRAMES)
    assert av.logging.get_level() == level


def test_the_containers_that_are_read_are_demuxers_of_ffmpeg(tmp_path: Path) -> None:
    assert all(av.ContainerFormat(name, "r").is_input for name in FORMATS)
    for ending, codec in [("flv", "flv"), ("mpg", "mpeg2video"), ("wmv", "wmv2"), ("gif", "gif"), ("h264", "libx264")]:
        pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        # MPEG-2 knows a few rates only
        path = write(tmp_path / f"a.{ending}", list(range(8)), base=Fraction(1, 25), codec=codec, pix_fmt=pix_fmt)
        with open_video(path) as (container, _):
            assert len(container.streams.video) == 1, ending


def test_an_error_about_the_shape_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "strip.mp4", list(range(8)), size=(2, 404))
    with pytest.raises(VideoError, match=r"strip\.mp4: aspect ratio of 2x404 is over 200"):
        read_clip(path, FRAMES)


# ---- prediction files --------------------------------------------------------------------------------------------


def answered(sample: GroundingSample, span: Span) -> Prediction:
    return Prediction(sample.sample_id, 0, sample.query, sample.video.as_posix(), sample.windows, sample.duration, "",
                      (), span, (), True)  # fmt: skip


def named(ids: list[str], *names: object) -> list[str]:
    """The ids of the samples that completions with these names are taken for."""
    samples = [GroundingSample(i, Path("v.mp4"), "q", (Span(0, 2),), 9.0, "test") for i in ids]
    index = Index(samples)
    return [index.find(Clues(name=str(name)), "f").sample_id for name in names]


def test_a_number_in_a_name_is_never_a_position() -> None:
    """A wrong position gives numbers, too: each of these was read as the query in that row."""
    rows = [f"charades_sta_train_{i}" for i in (0, 1, 3, 4, 20)]  # row 2 was dropped
    assert named(rows, 3, "4", "charades_3", "charades_train_20", rows[1]) == [rows[2], rows[3], rows[2], rows[4],
                                                                              rows[1]]  # fmt: skip
    highlights = ["qvhighlights_2342", "qvhighlights_781", "qvhighlights_9"]
    assert named(highlights, 781, "qvhighlights_9") == highlights[1:]
    captions = ["activitynet_test_v_a_0", "activitynet_test_v_a_2", "activitynet_test_v_b_2"]
    assert named(captions, "v_b_2", "test_v_a_2", captions[0]) == [captions[2], captions[1], captions[0]]
    assert named(["tacos_test_s13-d21_0", "tacos_test_s13-d25_0"], "s13-d25_0") == ["tacos_test_s13-d25_0"]
    assert named(["my_clips_0", "my_clips_17"], 17, "clips_17", "Clips_17") == ["my_clips_17"] * 3
    for ids, name in [
        (rows, 2), (rows, "3MSZA_1"), (rows, "charades_test_1"), (rows, "data_1"), (highlights, 0), (captions, 2),
        (captions, "activitynet_1"), (captions, "v_c_1"), (["a", "test_1"], "1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="is not among the"):
            named(ids, name)
    with pytest.raises(ValueError, match="'b_1' may be any of a_b_1, a_b_b_1"):
        named(["a_b_1", "a_b_b_1"], "b_1")


def test_raw_completions_are_read_by_their_names(tmp_path: Path) -> None:
    ids = ["qvhighlights_2342", "qvhighlights_781"]
    samples = [GroundingSample(i, Path("x.mp4"), "q", (Span(0, 2),), 9.0, "val") for i in ids]
    path = tmp_path / "p.jsonl"
    said = {"output_text": "<answer>1.00 to 2.00</answer>"}
    path.write_text(json.dumps({"qid": 781, **said}))
    assert [p.sample_id for p in read_predictions(path, samples).items] == ["qvhighlights_781"]
    path.write_text(json.dumps([said, said]))
    with pytest.raises(ValueError, match="entry '0': nothing says which query it answers"):
        read_predictions(path, samples)
    path.write_text(json.dumps({"qid": 781, "video": "y.mp4", **said}))
    with pytest.raises(ValueError, match=r"video 'y\.mp4', but qvhighlights_781 is about x\.mp4"):
        read_predictions(path, samples)


def test_the_form_of_a_file_is_told_by_its_content(tmp_path: Path) -> None:
    samples = [GroundingSample(f"test_{i}", Path("v.mp4"), "q", (Span(0, 2),), 9.0, "test") for i in (0, 1)]
    chat = {f"{i}": {"timestamp": [[i, 2]], "vid": "v.mp4"} for i in (0, 1)}
    own = [to_json(answered(s, Span(i, 2))) for i, s in enumerate(samples)]
    lines = "\n".join(json.dumps(row) for row in own)
    forms = [
        json.dumps(chat),
        json.dumps(chat, indent=1),
        lines,
        f"\n{lines}\n\n",
        json.dumps(own),
        json.dumps(own, indent=1),
    ]
    for text in forms:
        for name in ("p.json", "p.jsonl", "p.txt"):
            path = tmp_path / name
            path.write_text(text)
            assert [p.answer for p in read_predictions(path, samples).items] == [Span(0, 2), Span(1, 2)], (name, text)
    path.write_text(json.dumps(own[1]))
    assert [p.sample_id for p in read_predictions(path, samples).items] == ["test_1"]
    path.write_text(lines.replace("{", '{"duration": NaN, ', 1))
    with pytest.raises(ValueError, match=r"line 1: not usable as JSON \(NaN"):
        read_predictions(path, samples)


@pytest.mark.parametrize(
    ("said", "is_same"),
    [
        ("/data/videos/x/a.mp4", True), ("x/a.mp4", True), ("a.mp4", True), ("a.mkv", True), ("a", True),
        ("/data/videos/y/a.mp4", False), ("y/a.mp4", False), ("x/b.mp4", False),
    ],
)  # fmt: skip
def test_our_own_records_are_compared_with_the_video(tmp_path: Path, said: str, is_same: bool) -> None:
    one = GroundingSample("test_0", Path("x/a.mp4"), "q", (Span(0, 2),), 9.0, "test")
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({**to_json(answered(one, Span(0, 2))), "video": said}))
    if is_same:
        assert read_predictions(path, [one]).items[0].answer == Span(0, 2)
    else:
        with pytest.raises(ValueError, match=r"line 1: video '.*', but test_0 is about x/a\.mp4"):
            read_predictions(path, [one])


def test_what_a_file_is_like_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stage reads its annotations several times: for its key, for its prompts, for each shard."""
    rows = [{"video": "a.mp4", "query": "q", "window": window, "duration": 5} for window in ([0, 1], [2, 2])]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "val.jsonl").write_text(json.dumps(rows[0]))
    settings = DatasetConfig(name=DatasetName.jsonl, root=str(tmp_path))
    with caplog.at_level("INFO"):
        for _ in range(3):
            assert len(load_samples(settings, "train")) == 1
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "2 queries, 2 windows, 1 videos, 1 zero length, 1 ambiguous, 1 dropped windows, 1 dropped",
        "1 training queries dropped",
    ]
