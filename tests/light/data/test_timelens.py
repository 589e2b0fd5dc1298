"""The readers of TimeLens-Bench, TimeLens-100K and TimeLens2-93K, on small files that have each quirk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tartvg.config import DatasetConfig, DatasetName, FramesConfig
from tartvg.data import timelens
from tartvg.data.annotations import ReadOptions
from tartvg.data.check import check_split
from tartvg.data.datasets import load_samples
from tartvg.types import Span

TEST, TRAIN = ReadOptions("test"), ReadOptions("train")
FLAT: dict[str, Any] = {"video_path": "didemo/a/b.mp4", "duration": 60.0, "source": "didemo", "query": "q",
                        "span": [[1, 2]]}  # fmt: skip


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_timelens_bench(tmp_path: Path) -> None:
    entry = {"duration": 30.5, "spans": [[1.0, 4.5], [9, 31.5]], "queries": [" A man  sits. ", "A dog?"]}
    path = tmp_path / "charades-timelens.json"
    path.write_text(json.dumps({"3MSZA": entry, "v_x.y": {**entry, "spans": [[0, 5], [0, 5]]}}))
    found = timelens.read_bench([path], TEST)
    assert [s.sample_id for s in found.samples] == [
        "timelens_test_3MSZA_0", "timelens_test_3MSZA_1", "timelens_test_v_x.y_0", "timelens_test_v_x.y_1"
    ]  # fmt: skip
    assert [str(s.video) for s in found.samples[1:3]] == ["3MSZA.mp4", "v_x.y.mp4"]
    assert [(s.query, s.windows) for s in found.samples[:2]] == [("A man sits", (Span(1, 4.5),)),
                                                                 ("A dog?", (Span(9, 30.5),))]  # fmt: skip
    assert (found.quirks.whitespace, found.quirks.beyond_end, found.quirks.max_overshoot) == (2, 1, 1.0)
    # TimeLens scores uncut windows.
    assert timelens.read_bench([path], ReadOptions("test", late_windows="keep")).samples[1].target == Span(9, 31.5)
    path.write_text(json.dumps({"a": {**entry, "queries": ["one"]}}))
    with pytest.raises(ValueError, match=r"video 'a': 2 spans but 1 queries"):
        timelens.read_bench([path], TEST)
    path.write_text(json.dumps({"a": {"duration": 3, "timestamps": [[0, 1]], "sentences": ["s"]}}))
    with pytest.raises(ValueError, match=r"video 'a': 'spans' is missing"):
        timelens.read_bench([path], TEST)


def test_timelens_100k_grouped_and_flat(tmp_path: Path) -> None:
    grouped = {
        "video_path": "cosmo_cap/a.mp4",
        "duration": 100,
        "source": "cosmo_cap",
        "events": [
            {"query": "one", "span": [[1, 2]]},
            {"query": "two.", "span": [[1, 2], [50, 60]]},
            {"query": "three", "span": [90, 101]},
        ],
    }
    path = lines(tmp_path / "timelens-100k.jsonl", grouped, {**FLAT, "source": None, "rollouts": ["[[1, 2]]", "?"]})
    found = timelens.read([path], TRAIN)
    assert [s.sample_id for s in found.samples] == [f"timelens_100k_{i}" for i in ("0_0", "0_1", "0_2", "1_0")]
    assert [s.windows for s in found.samples] == [
        (Span(1, 2),), (Span(1, 2), Span(50, 60)), (Span(90, 100),), (Span(1, 2),)
    ]  # fmt: skip
    assert [str(s.video) for s in found.samples[2:]] == ["cosmo_cap/a.mp4", "didemo/a/b.mp4"]
    assert [s.tags for s in found.samples[2:]] == [("cosmo_cap",), ()]
    q = found.quirks
    assert (q.queries, q.windows, q.videos, q.ambiguous, q.beyond_end, q.clipped) == (4, 5, 2, 1, 1, 1)


def test_the_query_is_taken_out_of_the_prompt_of_a_rollout(tmp_path: Path) -> None:
    prompts = [
        'You are given a video.\nTask: temporal retrieval.\nGiven the query: "he says "hi"", return ALL time spans (in '
        "seconds) where the query is relevant.",
        "Please find the visual event described by the sentence 'he says \"hi\"', determining its starting and ending "
        "times.\nReturn the result strictly as [[start, end]]] (in seconds).",
        'he says "hi"',
    ]
    rows = [{**FLAT, "query": prompt, "rollouts": []} for prompt in prompts]
    found = timelens.read([lines(tmp_path / "r.jsonl", *rows)], TRAIN)
    assert [s.query for s in found.samples] == ['he says "hi"'] * 3
    # An annotation that happens to look like one stays.
    found = timelens.read([lines(tmp_path / "r.jsonl", {**FLAT, "query": prompts[1]})], TRAIN)
    assert found.samples[0].query.startswith("Please find")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_path": "clips/0001"}, "video_path 'clips/0001' is no video file but, it seems, a folder of frames"),
        ({"video_path": "didemo/53819037@N00_8893941905_0a957d015a/"}, "a folder of frames, whose times nothing says"),
        ({"video_path": "/data/a.mp4"}, "is not a file below the folder of videos"),
        ({"video_path": "../a.mp4"}, "is not a file below the folder of videos"),
        ({"video_path": 7}, "video_path must be a string"),
        ({"video_start": 3.5}, "video_start 3.5 asks about a part of the video"),
        ({"span": []}, None),
        ({"span": [1]}, r"a window is \[start, end\]"),
        ({"span": [[1, 2, 3]]}, r"a window is \[start, end\]"),
        ({"span": "1-2"}, "expected an array, got str"),
        ({"span": [[1, 2], 3]}, r"a window is \[start, end\], got 3"),
        ({"duration": None}, "duration must be a number"),
        ({"source": 3}, "source must be a string"),
        ({"events": [3]}, "expected an object, got int"),
        ({"events": {}}, "expected an array"),
        ({"events": [{"span": [[1, 2]]}]}, "'query' is missing"),
        ({"events": [{"query": "q", "span": [[1, 2]], "video_end": 9}]}, "video_end 9 asks about a part"),
        ({"video_start": None, "video_end": None}, None),
    ],
)
def test_rows_that_are_refused_by_file_and_line(tmp_path: Path, change: dict[str, Any], message: str | None) -> None:
    path = lines(tmp_path / "t.jsonl", FLAT, {**FLAT, **change})
    if message is None:
        assert len(timelens.read([path], TRAIN).samples) == 2
        return
    with pytest.raises(ValueError, match=rf"t\.jsonl, line 2: .*{message}"):
        timelens.read([path], TRAIN)


def test_they_are_data_sets_like_the_others(tmp_path: Path) -> None:
    """Their files are found by name, validation is carved, and check_data reports what is missing."""
    lines(tmp_path / "timelens2-93k.jsonl", *({**FLAT, "video_path": f"video{i}.mp4"} for i in range(37)))
    settings = DatasetConfig(name=DatasetName.timelens2_93k, root=str(tmp_path))
    assert [s.video.stem for s in load_samples(settings, "val")] == ["video12", "video23", "video36"]
    assert len(load_samples(settings, "train")) == 34
    with pytest.raises(ValueError, match=r"dataset=timelens2_93k has no test split in .*: there is none"):
        load_samples(settings, "test")
    bench = DatasetConfig(name=DatasetName.charades_timelens, root=str(tmp_path))
    with pytest.raises(ValueError, match=r"no test split in .*: it needs charades-timelens\.json there"):
        load_samples(bench, "test")
    entry = {"duration": 30.5, "spans": [[1.0, 4.5]], "queries": ["q"]}
    (tmp_path / "charades-timelens.json").write_text(json.dumps({"a": entry, "b": entry}))
    assert check_split(bench, FramesConfig(), "test", tmp_path / "out", 0) == 1
    report = json.loads((tmp_path / "out/validation.json").read_text())
    assert (report["num_queries"], report["faulty_videos"]["missing"], report["lost_queries"]) == (2, 2, 2)
