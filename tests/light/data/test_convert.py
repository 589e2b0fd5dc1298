"""`python -m tartvg.data convert`: what is written says the same, or the loss is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tartvg.config import DatasetName
from tartvg.data.__main__ import main
from tartvg.data.annotations import ReadOptions
from tartvg.data.convert import FORMS, convert
from tartvg.data.datasets import SOURCES
from tartvg.types import Span

REAL = Path(os.environ.get("TARTVG_TEST_DATA", "/nowhere"))
needs_data = pytest.mark.skipif("TARTVG_TEST_DATA" not in os.environ, reason="TARTVG_TEST_DATA is not set")
ELSEWHERE = {"order", "ids", "names of videos", "splits", "tags"}
ONE_WINDOW = {*ELSEWHERE, "left out", "windows", "durations"}
MAY_LOSE = {"jsonl": set(), "timelens": ELSEWHERE, "moment_detr": ELSEWHERE, "timezero": ONE_WINDOW,
            "timelens_bench": ONE_WINDOW}  # fmt: skip

# (video, query, windows): what any data set says, before it is put in one's form.
TIMES = st.integers(0, 600).map(lambda n: n / 10)
ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.text(max_size=12), st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=3)),
    min_size=1,
    max_size=6,
)


def grouped(rows: list[Any], times: str, texts: str, ending: str = "", **entry: Any) -> dict[str, Any]:
    videos = {f"v.{v}{ending}": {**entry, times: [], texts: []} for v, _, _ in rows}
    for v, query, windows in rows:
        videos[f"v.{v}{ending}"][times].append(windows[0])
        videos[f"v.{v}{ending}"][texts].append(query)
    return videos


def content(name: DatasetName, rows: list[Any]) -> str:
    """The file of this data set that says these rows."""
    plain = [{"duration": 50.5 + v, "query": q, "windows": w, "video": f"f/v.{v}.mp4"} for v, q, w in rows]
    forms: dict[DatasetName, Any] = {
        DatasetName.jsonl: [{**row, "tags": ["x", "y"][: len(row["query"])]} for row in plain],
        DatasetName.qvhighlights: [
            {"qid": 7 * i, "query": q, "vid": f"v.{v}", "duration": 50, "relevant_windows": w}
            for i, (v, q, w) in enumerate(rows)
        ],
        DatasetName.charades_sta: grouped(rows, "timestamps", "sentences", duration=50.5),
        DatasetName.activitynet: grouped(rows, "timestamps", "sentences", duration=50.5),
        DatasetName.tacos: grouped(rows, "timestamps", "sentences", ".avi", fps=29.4, num_frames=700),
        DatasetName.tvgbench: [
            {"path": f"a/v{v}.mp4", "question": q, "answer": f"{w[0][0]}-{w[0][1]}", "duration": 50.5 + v, "start": v,
             "end": 60, "dataset_name": "d"}
            for v, q, w in rows
        ],
        DatasetName.charades_timelens: grouped(rows, "spans", "queries", duration=50.5),
        DatasetName.timelens_100k: [
            {"video_path": f"f/v.{v}.mp4", "duration": 50.5, "source": "s", "events": [{"query": q, "span": w}]}
            for v, q, w in rows
        ],
    }  # fmt: skip
    value = forms[name]
    return "\n".join(json.dumps(row) for row in value) if name in LINES else json.dumps(value)


READERS = [DatasetName.jsonl, DatasetName.qvhighlights, DatasetName.charades_sta, DatasetName.activitynet,
           DatasetName.tacos, DatasetName.tvgbench, DatasetName.charades_timelens,
           DatasetName.timelens_100k]  # fmt: skip
LINES = (DatasetName.jsonl, DatasetName.qvhighlights, DatasetName.timelens_100k)


def test_every_reader_is_among_them() -> None:
    assert {source.read for source in SOURCES.values()} == {SOURCES[name].read for name in READERS}


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(READERS), form=st.sampled_from(list(FORMS)), rows=ROWS)
def test_round_trips(tmp_path_factory: Any, name: DatasetName, form: str, rows: list[Any]) -> None:
    check_round_trip(tmp_path_factory, name, form, rows)


@pytest.mark.campaign
@settings(max_examples=1000, deadline=None)
@given(name=st.sampled_from(READERS), form=st.sampled_from(list(FORMS)), rows=ROWS)
def test_round_trips_at_length(tmp_path_factory: Any, name: DatasetName, form: str, rows: list[Any]) -> None:
    check_round_trip(tmp_path_factory, name, form, rows)


def check_round_trip(tmp_path_factory: Any, name: DatasetName, form: str, rows: list[Any]) -> None:
    """Any reader's file in any form, read again, says the same queries and, where the form has room, the same windows;
    through our own form it says everything."""
    folder = tmp_path_factory.mktemp("trip")
    path = folder / ("source.jsonl" if name in LINES else "source.json")
    path.write_text(content(name, rows), encoding="utf-8")
    keep = ReadOptions("test", late_windows="keep", reversed_windows="keep")
    source = SOURCES[name].read([path], keep).samples
    assert len(source) == len(rows)
    ours, out = folder / "ours.jsonl", folder / f"out{FORMS[form].ending}"
    assert convert(name, [path], "test", "jsonl", ours).losses == {}
    done = convert(DatasetName.jsonl, [ours], "test", form, out)
    assert set(done.losses) <= MAY_LOSE[form] and done.num_queries == len(source) - done.losses.get("left out", 0)
    written = FORMS[form].read([out], keep).samples
    said = sorted((s.query, s.windows[:1] if "windows" in MAY_LOSE[form] else s.windows) for s in source)
    assert sorted((s.query, s.windows) for s in written) == said
    back = folder / "back.jsonl"
    reader = next(n for n, s in SOURCES.items() if s.read is FORMS[form].read)
    assert convert(reader, [out], "test", "jsonl", back).losses == {}


CASES = [
    ("charades_sta", "charades_sta/charades_sta_{0}.txt charades_sta/Charades_v1_{0}.csv", "test", 3720),
    ("charades_sta", "charades_sta/charades_sta_{0}.txt charades_sta/Charades_v1_{0}.csv", "train", 12408),
    ("qvhighlights", "qvhighlights/highlight_{0}_release.jsonl", "val", 1550),
    ("qvhighlights", "qvhighlights/highlight_{0}_release.jsonl", "test", 1542),
    ("tacos", "tacos/{0}.json", "test", 4001),
    ("activitynet", "activitynet/{0}.json", "test", 17031),
    ("tvgbench", "tvgbench/tvgbench.json", "test", 800),
]


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(("name", "files", "split", "count"), CASES)
def test_the_real_files_in_every_form(tmp_path: Path, name: str, files: str, split: str, count: int) -> None:
    paths = [REAL / file.format(split) for file in files.split()]
    keep = ReadOptions(split, late_windows="keep", reversed_windows="keep")
    source = SOURCES[DatasetName(name)].read(paths, keep).samples
    assert len(source) == count
    for form, chosen in FORMS.items():
        out = tmp_path / f"{form}{chosen.ending}"
        done = convert(DatasetName(name), paths, split, form, out)
        assert set(done.losses) <= MAY_LOSE[form]
        is_blind = not source[0].windows
        if "windows" in MAY_LOSE[form]:
            assert done.losses.get("left out", 0) == (count if is_blind else 0)
            assert done.losses.get("windows", 0) == sum(len(s.windows) > 1 for s in source)
        written = chosen.read([out], ReadOptions(split if form == "jsonl" else "test", late_windows="keep",
                                                 reversed_windows="keep")).samples  # fmt: skip
        number = 1 if "windows" in MAY_LOSE[form] else None
        said = sorted((s.video.stem, s.query, s.windows[:number]) for s in source if s.windows or number is None)
        assert sorted((s.video.stem, s.query, s.windows) for s in written) == said


def test_losses_are_named_with_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"video": "x/a.mkv", "query": "one", "windows": [[1, 2], [4, 5]], "duration": 9, "tags": ["t", "u"]},
        {"video": "b.mp4", "query": "two", "window": [3, 2], "duration": 9, "sample_id": "mine"},
        {"video": "b.mp4", "query": "three", "duration": 9},
        {"video": "x/a.mkv", "query": "four", "window": [8, 12], "duration": 9.5},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["convert", "--dataset", "jsonl", "--annotations", str(path), "--to"]

    def lost(form: str) -> str:
        out = tmp_path / f"{form}{FORMS[form].ending}"
        assert main([*command, form, "--out", str(out)]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == 3 and shown[0].startswith("read   4 queries, 4 windows, 2 videos, 1 blind, 1 reversed")
        return shown[2].removeprefix("lost   ")

    assert lost("jsonl") == "nothing"
    assert lost("timezero") == (
        "left out of 1 queries, order of 3 queries, ids of 3 queries, names of videos of 2 queries, "
        "windows of 1 queries, durations of 1 queries, tags of 1 queries"
    )
    assert json.loads((tmp_path / "timezero.json").read_text()) == {
        "x/a": {"duration": 9.0, "timestamps": [[1, 2], [8, 12]], "sentences": ["one", "four"]},
        "b": {"duration": 9.0, "timestamps": [[3, 2]], "sentences": ["two"]},
    }
    assert lost("timelens") == "ids of 4 queries, tags of 1 queries"
    assert json.loads((tmp_path / "timelens.jsonl").read_text().splitlines()[0]) == {
        "video_path": "x/a.mkv", "duration": 9.0, "source": "t",
        "events": [{"query": "one", "span": [[1, 2], [4, 5]]}],
    }  # fmt: skip
    assert lost("moment_detr") == "ids of 4 queries, names of videos of 2 queries, tags of 1 queries"
    assert json.loads((tmp_path / "moment_detr.jsonl").read_text().splitlines()[2]) == {
        "qid": 2, "query": "three", "vid": "b", "duration": 9.0
    }  # fmt: skip


def test_what_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.jsonl"
    row = {"video": "a.mp4", "query": "q", "window": [1, 2], "duration": 9}

    def error(rows: list[dict[str, Any]], form: str, out: str, *options: str) -> str:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["convert", "--dataset", "jsonl", "--annotations", str(path), "--to", form]
        assert main([*command, "--out", str(tmp_path / out), *options]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    assert "x.json: a file of the form jsonl ends in .jsonl" in error([row], "jsonl", "x.json")
    assert "own.jsonl: exists already" in error([row], "jsonl", "own.jsonl")
    assert "line 1: duration must be > 0" in error([{**row, "duration": 0}], "jsonl", "x.jsonl")
    assert "own.jsonl: no queries of split train" in error([{**row, "split": "val"}], "jsonl", "x.jsonl", "--split",
                                                           "train")  # fmt: skip
    assert "a.mp4 and a.mkv have the same name" in error([row, {**row, "video": "a.mkv"}], "moment_detr", "x.jsonl")
    assert "the form timelens cannot hold this" in error([{**row, "video": "a"}], "timelens", "x.jsonl")
    assert not list(tmp_path.glob("x.*"))


def test_windows_are_written_as_annotated(tmp_path: Path) -> None:
    """Cut windows would make another benchmark of it."""
    path, out = tmp_path / "own.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"video": "a.mp4", "query": "q", "window": [1, 12], "duration": 9}))
    convert(DatasetName.jsonl, [path], "train", "jsonl", out)
    assert json.loads(out.read_text())["windows"] == [[1, 12]]
    keep = ReadOptions("train", late_windows="keep")
    assert SOURCES[DatasetName.jsonl].read([out], keep).samples[0].target == Span(1, 12)


def test_the_command_needs_no_torch_and_no_video_library(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"video": "a.mp4", "query": "q", "window": [1, 2], "duration": 9}))
    code = (
        "import sys; from tartvg.data.__main__ import main; status = main(sys.argv[1:]);"
        "print(*(m for m in ('torch', 'av', 'rich', 'numpy', 'transformers') if m in sys.modules), file=sys.stderr);"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "convert", "--dataset", "jsonl", "--annotations", str(path), "--to"]
    result = subprocess.run([*command, "timezero", "--out", str(tmp_path / "o.json")], capture_output=True, text=True)
    assert (result.returncode, result.stderr.strip()) == (0, "")
