"""Every reader, on small files that have each quirk, and on the real ones where `TARTVG_TEST_DATA` says they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tartvg.config import DatasetConfig, DatasetName, PlantedConfig
from tartvg.data import activitynet, charades_sta, jsonl, qvhighlights, tacos, tvgbench
from tartvg.data.annotations import Annotations, LateWindows, ReadOptions
from tartvg.data.datasets import load_annotations, load_samples, read_files
from tartvg.data.splits import carve, is_validation_video
from tartvg.types import Span

REAL = Path(os.environ.get("TARTVG_TEST_DATA", "/nowhere"))
needs_data = pytest.mark.skipif("TARTVG_TEST_DATA" not in os.environ, reason="TARTVG_TEST_DATA is not set")
TEST, TRAIN = ReadOptions("test"), ReadOptions("train")


def real(name: str, reader: object, split: str, **options: object) -> Annotations:
    paths = [REAL / n.format(split) for n in name.split(" + ")]
    return reader.read(paths, ReadOptions(split, **options))  # type: ignore[attr-defined, arg-type]


# One line per file: rows (query, window), videos, reversed or empty, late by > 0 / 0.5 / 1 s, most late,
# exact duplicates, (video, query) with several windows (None: not tabulated), outer whitespace.
TABLE = [
    (
        "charades_sta/charades_sta_{0}.txt + charades_sta/Charades_v1_{0}.csv",
        charades_sta,
        "train",
        (12408, 5338, 4, 1805, 1619, 734, 1.54, 0, None, 0),
    ),
    (
        "charades_sta/charades_sta_{0}.txt + charades_sta/Charades_v1_{0}.csv",
        charades_sta,
        "test",
        (3720, 1334, 0, 562, 514, 228, 1.5, 0, 0, 0),
    ),
    (
        "charades_sta/charades_test.timer1.json",
        charades_sta,
        "test",
        (3720, 1334, 0, 562, 514, 228, 1.5, 0, 0, 0),
    ),
    (
        "qvhighlights/highlight_{0}_release.jsonl",
        qvhighlights,
        "train",
        (12803, 7100, 0, 0, 0, 0, 0, 0, 2363, 0),
    ),
    ("qvhighlights/highlight_{0}_release.jsonl", qvhighlights, "val", (2803, 1519, 0, 0, 0, 0, 0, 0, 530, 0)),
    ("tacos/{0}.json", tacos, "train", (9790, 75, 0, 43, 38, 0, 0.51, 1201, None, 21)),
    ("tacos/{0}.json", tacos, "val", (4436, 27, 0, 0, 0, 0, 0, 516, 229, 12)),
    ("tacos/{0}.json", tacos, "test", (4001, 25, 0, 5, 0, 0, 0.238, 567, 216, 20)),
    ("activitynet/{0}.json", activitynet, "val", (17505, 4917, 0, 5, 0, 0, 0.01, 0, None, 11639)),
    ("activitynet/{0}.json", activitynet, "test", (17031, 4885, 0, 1, 0, 0, 0.01, 0, None, 11483)),
    # 540 files for the 462 videos: clips at different offsets are different files.
    ("tvgbench/tvgbench.json", tvgbench, "test", (800, 540, 11, 27, 21, 10, 4.85, 0, 1, 135)),
    ("tvgbench/train_2k5.json", tvgbench, "train", (2500, 2475, 0, 34, 31, 29, 14062.209, 0, 0, 0)),
]


@needs_data
@pytest.mark.parametrize(("name", "reader", "split", "expected"), TABLE, ids=lambda v: v if isinstance(v, str) else "")
def test_counts_of_the_real_files(name: str, reader: object, split: str, expected: tuple[float | None, ...]) -> None:
    annotations = real(name, reader, split, late_windows="keep", reversed_windows="keep")
    q = annotations.quirks
    late = [w.end - s.duration for s in annotations.samples for w in s.windows if w.end > s.duration + 1e-6]
    found = [q.windows, q.videos, q.reversed + q.zero_length, q.beyond_end]
    found += [sum(v > bound for v in late) for bound in (0.5, 1.0)]
    found += [round(q.max_overshoot, 3), q.duplicates, q.ambiguous, q.whitespace]
    assert [f for f, e in zip(found, expected, strict=True) if e is not None] == pytest.approx(
        [e for e in expected if e is not None], abs=0.0006
    )
    assert len(late) == q.beyond_end
    assert (q.negative_start, q.empty, q.blind) == (0, 0, 0)
    assert len({s.sample_id for s in annotations.samples}) == len(annotations.samples)
    # The four reversed rows of Charades-STA are kept here by policy, and nothing else may go either.
    assert q.dropped == q.dropped_windows == q.clipped == 0


@needs_data
@pytest.mark.parametrize(("name", "reader", "split", "expected"), TABLE, ids=lambda v: v if isinstance(v, str) else "")
def test_the_default_policies_on_the_real_files(
    name: str, reader: object, split: str, expected: tuple[float | None, ...]
) -> None:
    annotations = real(name, reader, split)
    q = annotations.quirks
    assert q.dropped == q.dropped_windows == (4 if name.startswith("charades") and split == "train" else 0)
    # Three of the reversed rows of Charades-STA also end in the video's future; they are gone, not cut.
    assert q.clipped == (1802 if q.dropped else q.beyond_end)
    assert sum(len(s.windows) for s in annotations.samples) == q.windows - q.dropped_windows
    assert all(w.end <= s.duration for s in annotations.samples for w in s.windows)
    assert all(s.query == s.query.strip() and s.query for s in annotations.samples)


@needs_data
@pytest.mark.slow
def test_durations_and_windows_of_the_real_files() -> None:
    means = {}
    for name, reader, split, _ in TABLE:
        annotations = real(name, reader, split, late_windows="keep", reversed_windows="keep")
        durations = {s.video: s.duration for s in annotations.samples}
        lengths = [w.length for s in annotations.samples for w in s.windows]
        means[name, split] = (sum(durations.values()) / len(durations), sum(lengths) / len(lengths))
    assert means["tacos/{0}.json", "test"] == pytest.approx((367.152, 31.87), abs=0.005)
    assert means["activitynet/{0}.json", "val"] == pytest.approx((118.225, 37.73), abs=0.005)
    assert means["charades_sta/charades_test.timer1.json", "test"] == pytest.approx((29.481, 7.971), abs=0.005)
    assert means["qvhighlights/highlight_{0}_release.jsonl", "train"][1] == pytest.approx(25.084, abs=0.005)
    assert means["tvgbench/tvgbench.json", "test"][1] == pytest.approx(12.135, abs=0.005)
    assert means["tvgbench/train_2k5.json", "train"] == pytest.approx((146.846, 32.03), abs=0.005)


@needs_data
def test_qvhighlights_queries_and_ids() -> None:
    found = {s: real("qvhighlights/highlight_{0}_release.jsonl", qvhighlights, s) for s in ("train", "val", "test")}
    assert {s: a.quirks.queries for s, a in found.items()} == {"train": 7218, "val": 1550, "test": 1542}
    assert [max(len(s.windows) for s in found[n].samples) for n in ("train", "val")] == [24, 25]
    assert found["test"].quirks.blind == 1542 and not any(s.windows for s in found["test"].samples)
    ids = [s.sample_id for a in found.values() for s in a.samples]
    assert len(set(ids)) == len(ids) == 10310 and "qvhighlights_2579" in ids


@needs_data
def test_both_forms_of_charades_give_the_same_samples() -> None:
    text = real(TABLE[1][0], charades_sta, "test")
    assert real(TABLE[2][0], charades_sta, "test").samples == text.samples
    assert text.samples[0].sample_id == "charades_sta_test_0"
    assert (text.samples[0].video.name, text.samples[0].query) == ("3MSZA.mp4", "person turn a light on")
    assert "person #1" in text.samples[3145].query
    assert real("tvgbench/tvgbench.json", tvgbench, "test").samples[-1].duration > 0
    assert len({s.video.stem.rsplit("_", 2)[0] for s in real(TABLE[10][0], tvgbench, "test").samples}) <= 462


@needs_data
@pytest.mark.parametrize("split", ["val", "train"])
def test_the_charades_test_set_is_refused_as_anything_else(split: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="test set of Charades-STA"):
        real(TABLE[2][0], charades_sta, split)
    table = REAL / "charades_sta/Charades_v1_test.csv"
    shuffled = tmp_path / "other.txt"
    lines = (REAL / "charades_sta/charades_sta_test.txt").read_text().splitlines()
    shuffled.write_text("\r\n".join(lines[::-1]))
    with pytest.raises(ValueError, match="carves a validation split"):
        charades_sta.read([shuffled, table], ReadOptions(split))
    root = tmp_path / "root"
    root.mkdir()
    (root / "val.json").symlink_to(REAL / "charades_sta/charades_test.timer1.json")
    with pytest.raises(ValueError, match=r"val\.json: this is the test set"):
        load_samples(DatasetConfig(name=DatasetName.charades_sta, root=str(root)), "val")


@needs_data
@pytest.mark.slow
def test_validation_is_carved_out_of_the_training_videos_of_charades() -> None:
    settings = DatasetConfig(name=DatasetName.charades_sta, root=str(REAL / "charades_sta"))
    train, val, test = (load_samples(settings, split) for split in ("train", "val", "test"))
    assert len(train) + len(val) == 12404 and len(test) == 3720
    assert 550 < len(val) < 700
    videos = [{s.video for s in part} for part in (train, val, test)]
    assert not videos[0] & videos[1] and not videos[0] & videos[2] and not videos[1] & videos[2]
    assert {s.split for s in val} == {"val"} and val[0].video.parent == REAL / "charades_sta/videos"
    settings.reversed_windows = "swap"
    assert (
        len(load_samples(settings, "train")) + len(load_samples(settings, "val")) == 12405
    )  # three lie beyond the end
    settings.num_queries = 7
    assert [len(load_samples(settings, split)) for split in ("train", "val", "test")] == [7, 7, 7]
    assert load_samples(settings, "val") == val[:7]


# ---- small files -------------------------------------------------------------------------------------------------


def charades(tmp_path: Path, lines: str, lengths: str = "A1,10.0\nB2,20.5\n") -> list[Path]:
    (tmp_path / "sta.txt").write_text(lines, encoding="utf-8")
    (tmp_path / "v1.csv").write_text("id,length\n" + lengths, encoding="utf-8")
    return [tmp_path / "sta.txt", tmp_path / "v1.csv"]


def dump(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_charades_text(tmp_path: Path) -> None:
    paths = charades(
        tmp_path, "A1 1.0 4.5##person #1, the cook,  stirs.\r\nB2 9.0 21.0##a ## b.\n\nB2 8.0 3.0##turned.\n"
    )
    found = charades_sta.read(paths, TEST)
    assert [s.query for s in found.samples] == ["person #1, the cook, stirs", "a ## b", "turned"]
    assert [s.windows[0] for s in found.samples] == [Span(1, 4.5), Span(9, 20.5), Span(8, 3)]
    assert [s.sample_id for s in found.samples] == [f"charades_sta_test_{i}" for i in range(3)]
    assert [str(s.video) for s in found.samples] == ["A1.mp4", "B2.mp4", "B2.mp4"]
    raw = charades_sta.read(paths, ReadOptions("test", late_windows="keep"))
    assert raw.samples[1].windows == (Span(9, 21),)
    train = charades_sta.read(paths, TRAIN)
    assert [s.sample_id for s in train.samples] == ["charades_sta_train_0", "charades_sta_train_1"]
    assert (train.quirks.reversed, train.quirks.dropped, train.quirks.clipped) == (1, 1, 1)
    assert "1 reversed" in train.quirks.summary() and "1 dropped" in train.quirks.summary()
    swapped = charades_sta.read(paths, ReadOptions("train", reversed_windows="swap"))
    assert swapped.samples[2].windows == (Span(3, 8),) and swapped.quirks.swapped == 1


def test_late_windows_are_cut_left_out_or_kept(tmp_path: Path) -> None:
    paths = charades(tmp_path, "A1 1.0 12.0##late\nA1 1.0 10.0##in time\nA1 1.0 10.0000001##a rounding\n")

    def ends(split: str, policy: LateWindows) -> list[float]:
        samples = charades_sta.read(paths, ReadOptions(split, late_windows=policy)).samples
        return [window.end for sample in samples for window in sample.windows]

    assert ends("train", "clip") == ends("test", "clip") == ends("test", "drop") == [10.0, 10.0, 10.0]
    assert ends("train", "drop") == [10.0, 10.0]
    assert ends("train", "keep") == ends("test", "keep") == [12.0, 10.0, 10.0000001]
    quirks = charades_sta.read(paths, ReadOptions("train", late_windows="drop")).quirks
    assert (quirks.beyond_end, quirks.dropped_windows, quirks.dropped, quirks.clipped) == (1, 1, 1, 0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("A1 1.0 2.0##ok.\nA1 1.0 2.0 no separator\n", "line 2: expected `ID START END##sentence`"),
        ("A1 1.0##no end\n", "line 1: expected"),
        ("ZZ 1.0 2.0##unknown\n", "line 1: video 'ZZ' is not in"),
        ("A1 nan 2.0##x\n", "line 1: start must be finite"),
        ("A1 1.0 inf##x\n", "line 1: end must be finite"),
        ("A1 1.0 1e300##x\n", "line 1: end must be finite"),
        ("A1 one 2.0##x\n", "line 1: start must be a number, got 'one'"),
        ("A1 1.0 2.0##" + "x" * 10_000_000, "line 1: the sentence has 10000000 characters"),
    ],
)
def test_charades_lines_that_are_refused(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        charades_sta.read(charades(tmp_path, lines), TEST)
    assert message in str(caught.value) and "sta.txt" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_charades_needs_lengths_that_are_numbers(tmp_path: Path) -> None:
    paths = charades(tmp_path, "A1 1 2##x\n")
    with pytest.raises(ValueError, match="Charades_v1"):
        charades_sta.read(paths[:1], TEST)
    for length in ("", "-3", "0", "nan"):
        with pytest.raises(ValueError, match=r"v1\.csv, line 2: duration must"):
            charades_sta.read(charades(tmp_path, "A1 1 2##x\n", f"A1,{length}\n"), TEST)
    with pytest.raises(ValueError, match=r"one \.txt, \.json or \.jsonl"):
        charades_sta.read(paths[1:], TEST)


def test_qvhighlights(tmp_path: Path) -> None:
    path = tmp_path / "val.jsonl"
    row = {"qid": 3, "query": "q", "vid": "x_0.0_150.0", "duration": 150}
    path.write_text(json.dumps({**row, "relevant_windows": [[0, 2], [10, 20]]}))  # no final newline
    sample = qvhighlights.read([path], ReadOptions("val")).samples[0]
    assert (sample.sample_id, str(sample.video)) == ("qvhighlights_3", "x_0.0_150.0.mp4")
    assert sample.windows == (Span(0, 2), Span(10, 20))
    path.write_text(json.dumps(row))
    assert qvhighlights.read([path], TEST).samples[0].windows == ()
    with pytest.raises(ValueError, match="line 1: 'relevant_windows' is missing"):
        qvhighlights.read([path], ReadOptions("val"))
    path.write_text(f"{json.dumps(row)}\n\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=r"line 3: id 'qvhighlights_3' is also in .*line 1"):
        qvhighlights.read([path], TEST)


def test_activitynet(tmp_path: Path) -> None:
    entry = {"duration": 20, "timestamps": [[0, 5.5], [4, 20.01]], "sentences": ["One. ", "  Two."]}
    path = dump(tmp_path / "test.json", {"v_a": entry, "v_b": entry})
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "v_b.mkv").touch()
    found = activitynet.read([path], ReadOptions("test", videos))
    assert [s.sample_id for s in found.samples][1:3] == ["activitynet_test_v_a_1", "activitynet_test_v_b_0"]
    assert [s.video.name for s in found.samples][1:3] == ["v_a.mp4", "v_b.mkv"]
    assert [s.query for s in found.samples[:2]] == ["One", "Two"]
    assert found.samples[1].windows == (Span(4, 20),)
    assert (found.quirks.whitespace, found.quirks.beyond_end) == (4, 2)
    dump(path, {"v_a": {**entry, "sentences": ["One."]}})
    with pytest.raises(ValueError, match=r"video 'v_a': 2 timestamps but 1 sentences"):
        activitynet.read([path], TEST)


def test_tacos_counts_frames(tmp_path: Path) -> None:
    entry = {
        "fps": 29.4,
        "num_frames": 294,
        "timestamps": [[147, 294], [0, 300], [0, 300]],
        "sentences": ["a", "b", "b"],
    }
    path = dump(tmp_path / "test.json", {"s1-d2.avi": entry})
    found = tacos.read([path], TEST)
    assert found.samples[0].windows == (Span(5, 10),) and found.samples[0].duration == 10
    assert (str(found.samples[0].video), found.samples[2].sample_id) == ("s1-d2.avi", "tacos_test_s1-d2_2")
    assert (found.quirks.duplicates, found.quirks.beyond_end, len(found.samples)) == (1, 2, 3)
    with pytest.raises(ValueError, match="fps must be > 0"):
        tacos.read([dump(path, {"x.avi": {**entry, "fps": 0}})], TEST)


def test_tvgbench(tmp_path: Path) -> None:
    whole = {"path": "./x/y/KW.mp4", "question": " a ", "answer": "13.4-28.1", "start": None, "end": None}
    whole |= {"duration": 30.12, "dataset_name": "charades", "qsemtype": "Human Pose"}
    clip = {**whole, "answer": "2.007376774549086917-2.007376774549086917", "start": 53.0556, "end": 152.4256}
    clip.pop("dataset_name")
    clip["bins"] = {"dataset": "egonlq"}
    path = dump(tmp_path / "b.json", [whole, clip])
    found = tvgbench.read([path], TEST)
    assert [str(s.video) for s in found.samples] == ["KW.mp4", "KW_53.06_152.43.mp4"]
    assert [s.tags[0] for s in found.samples] == ["charades", "egonlq"]
    assert found.samples[0].windows == (Span(13.4, 28.1),) and found.samples[1].windows[0].length == 0
    assert (found.quirks.zero_length, found.quirks.whitespace) == (1, 2)
    for answer in ("13.4", "a-b", "1-2-3", "-1-2", "1.2.3-4"):
        with pytest.raises(ValueError, match="entry 0"):
            tvgbench.read([dump(path, [{**whole, "answer": answer}])], TEST)
    train = {"video": "./v/a_00:01.mp4", "duration": 157.8, "timestamp": [120, 14220], "sentence": "s"}
    late = {**train, "timestamp": [200, 300]}
    found = tvgbench.read([dump(path, [train, late])], TRAIN)
    assert found.samples[0].windows == (Span(120, 157.8),)
    assert (len(found.samples), found.quirks.outside, found.quirks.dropped) == (1, 1, 1)
    # A test row that lies beyond the end is kept as it is.
    assert tvgbench.read([path], TEST).samples[1].windows == (Span(200, 300),)


def test_jsonl(tmp_path: Path) -> None:
    rows = [
        {"video": "k/a.mp4", "query": "she opens the oven.", "windows": [[1, 2], [4, 5]], "duration": 9, "tags": ["x"]},
        {"video": "b.mp4", "query": "q", "window": [1, 2], "duration": 9, "sample_id": "mine", "note": "ignored"},
        {"video": "c.mp4", "query": "q", "window": [1, 2], "duration": 9, "split": "train"},
        {"video": "b.mp4", "query": " ", "duration": 9},
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    found = jsonl.read([path], TEST)
    assert [s.sample_id for s in found.samples] == ["test_0", "mine", "test_3"]
    assert found.samples[0].windows == (Span(1, 2), Span(4, 5)) and found.samples[0].tags == ("x",)
    assert (found.quirks.other_split, found.quirks.blind, found.quirks.empty) == (1, 1, 1)


def test_carving_is_stable_and_by_video(tmp_path: Path) -> None:
    chosen = [i for i in range(20_000) if is_validation_video(f"video{i}")]
    assert 900 < len(chosen) < 1100
    assert chosen[:3] == [12, 23, 36]
    names = [f"video{i}.mp4" for i in range(37)]
    rows = [{"video": name, "query": q, "window": [0, 1], "duration": 5} for name in names for q in "ab"]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    settings = DatasetConfig(name=DatasetName.jsonl, root=str(tmp_path))
    val, train = load_samples(settings, "val"), load_samples(settings, "train")
    assert {s.video.stem for s in val} == {f"video{i}" for i in (12, 23, 36)} and {s.split for s in val} == {"val"}
    assert len(val) == 6 and len(train) == 68
    assert carve(reversed(val + train), "val") == val[::-1]
    # With a validation file of its own nothing is carved.
    (tmp_path / "val.jsonl").write_text(json.dumps({**rows[0], "video": "other.mp4"}))
    assert (len(load_samples(settings, "train")), len(load_samples(settings, "val"))) == (74, 1)


def test_an_official_validation_split_is_never_carved(tmp_path: Path) -> None:
    """Without its file the stage names it, and trains on all of the training file."""
    entry = {"duration": 20, "fps": 1, "num_frames": 20, "timestamps": [[0, 5]], "sentences": ["one"]}
    dump(tmp_path / "train.json", {f"video{i}": entry for i in range(13)})
    rows = [
        {"qid": i, "query": "q", "vid": f"video{i}", "duration": 9, "relevant_windows": [[0, 2]]} for i in range(13)
    ]
    (tmp_path / "highlight_train_release.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = {"tacos": "val.json", "activitynet": "val_1.json or val", "qvhighlights": "highlight_val_release.jsonl"}
    for name, file in files.items():
        settings = DatasetConfig(name=DatasetName(name), root=str(tmp_path))
        assert len(load_samples(settings, "train")) == 13
        with pytest.raises(ValueError, match=f"no val split in .*: it needs {file}"):
            load_samples(settings, "val")


def test_the_scorer_splits_a_training_file_as_the_stages_do(tmp_path: Path) -> None:
    rows = [{"video": f"video{i}.mp4", "query": "q", "window": [0, 1], "duration": 5} for i in range(37)]
    path, other = tmp_path / "train.jsonl", tmp_path / "mine.jsonl"
    for file in (path, other):
        file.write_text("\n".join(json.dumps(row) for row in rows))
    settings = DatasetConfig(name=DatasetName.jsonl, root=str(tmp_path))

    def ids(split: str, file: Path = path) -> list[str]:
        return [s.sample_id for s in read_files(DatasetName.jsonl, [file], split).samples]

    for split, count in (("train", 34), ("val", 3)):
        assert ids(split) == [s.sample_id for s in load_samples(settings, split)] and len(ids(split)) == count
    assert len(ids("val", other)) == 37  # a file of another name is what it is said to be
    path.with_name("val.jsonl").write_text(json.dumps(rows[0]))
    assert ids("train") == [s.sample_id for s in load_samples(settings, "train")] and len(ids("train")) == 37
    assert ids("val", path.with_name("val.jsonl")) == [s.sample_id for s in load_samples(settings, "val")] == ["val_0"]
    table, sta = tmp_path / "Charades_v1_train.csv", tmp_path / "charades_sta_train.txt"
    table.write_text("id,length\n" + "".join(f"video{i},9\n" for i in range(37)))
    sta.write_text("".join(f"video{i} 0.0 1.0##q.\n" for i in range(37)))
    found = read_files(DatasetName.charades_sta, [sta, table], "val").samples
    assert [s.sample_id for s in found] == [f"charades_sta_train_{i}" for i in (12, 23, 36)]


def test_a_split_that_is_not_there_names_its_files(tmp_path: Path) -> None:
    settings = DatasetConfig(name=DatasetName.charades_sta, root=str(tmp_path))
    with pytest.raises(ValueError, match=r"no test split in .*charades_sta_test\.txt \+ Charades_v1_test\.csv or"):
        load_samples(settings, "test")
    with pytest.raises(ValueError, match=r"no val split in .*charades_sta_train\.txt"):
        load_samples(settings, "val")
    with pytest.raises(ValueError, match="split must be one of"):
        load_annotations(settings, "dev")


def test_planted_goes_through_the_same_door(tmp_path: Path) -> None:
    settings = DatasetConfig(name=DatasetName.planted, root=str(tmp_path), num_queries=2)
    settings.planted = PlantedConfig(num_train=1, num_val=1, num_test=1, queries_per_video=3)
    samples = load_samples(settings, "val")
    assert len(samples) == 2 and samples[0].video.is_file() and samples[0].split == "val"
    # The scorer reads the same queries from the drawn folder's own file.
    file = next(tmp_path.glob("*/annotations.jsonl"))
    stored = read_files(DatasetName.planted, [file], "val")
    assert [s.sample_id for s in stored.samples][:2] == [s.sample_id for s in samples]
    assert stored.quirks.other_split == 6
