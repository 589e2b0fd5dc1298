"""Prediction files as other works and frameworks write them: which query, which answer, and what is refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tartvg.data import activitynet, charades_sta, tacos, tvgbench
from tartvg.data.annotations import ReadOptions
from tartvg.evaluation.formats import read_predictions
from tartvg.types import GroundingSample, Span

REAL = Path(os.environ.get("TARTVG_TEST_DATA", "/nowhere"))
needs_data = pytest.mark.skipif("TARTVG_TEST_DATA" not in os.environ, reason="TARTVG_TEST_DATA is not set")
SAID = "<answer>1.0 to 2.0</answer>"


def sample(number: int, query: str, *window: float, video: str = "v.mp4") -> GroundingSample:
    return GroundingSample(f"set_test_{number}", Path(video), query, (Span(*window),), 30.0, "test")


SAMPLES = [
    sample(0, "a dog runs", 0, 5),
    sample(1, "a dog runs away", 6, 9),
    sample(2, "a cat sleeps", 2, 9, video="w.mp4"),
    sample(3, "a cat sleeps", 12, 19, video="w.mp4"),
]


def read(tmp_path: Path, *rows: dict[str, Any], samples: list[GroundingSample] | None = None) -> dict[str, Span | None]:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {p.sample_id: p.answer for p in read_predictions(path, samples or SAMPLES).items}


def test_moment_detr_form_for_any_data_set(tmp_path: Path) -> None:
    """lighthouse numbers Charades' test queries from 12404 on; QD-DETR and UniVTG number as they like."""
    windows = {"pred_relevant_windows": [[1, 2, 0.9], [3, 4, 0.1]]}
    first = {"qid": 12404, "query": "a dog runs away.", "vid": "v", **windows}
    assert read(tmp_path, first) == {"set_test_1": Span(1, 2)}
    assert read(tmp_path, {"qid": 1, **windows}) == read(tmp_path, {"qid": "test_1", **windows}) == {
        "set_test_1": Span(1, 2)
    }  # fmt: skip
    # A number that is another row's here gives way to what the record says.
    assert read(tmp_path, {**first, "qid": 0}) == {"set_test_1": Span(1, 2)}
    with pytest.raises(ValueError, match=r"line 1: query 'a bird', but set_test_0 asks 'a dog runs'"):
        read(tmp_path, {"qid": 0, "query": "a bird", "vid": "v", **windows})
    with pytest.raises(ValueError, match=r"line 1: '99' is not among the 4 annotated queries; understood are ids such"):
        read(tmp_path, {"qid": 99, "query": "a bird", "vid": "v", **windows})


def test_a_question_that_is_asked_twice_is_answered_in_order_or_not_at_all(tmp_path: Path) -> None:
    def row(start: int) -> dict[str, Any]:
        return {"qid": 500 + start, "query": "a cat sleeps", "vid": "w", "pred_relevant_windows": [[start, 9, 1.0]]}

    assert read(tmp_path, row(1), row(2)) == {"set_test_2": Span(1, 9), "set_test_3": Span(2, 9)}
    with pytest.raises(ValueError, match=r"1 of the 2 queries 'a cat sleeps' about .* are answered, and nothing says"):
        read(tmp_path, row(1))
    with pytest.raises(ValueError, match="line 3: 'a cat sleeps' is asked 2 times and answered more often"):
        read(tmp_path, row(1), row(2), row(3))
    same = [sample(0, "q", 1, 2), sample(1, "q", 1, 2)]
    # The same truth: whichever it is, the scores are the same.
    twice = {"query": "q", "vid": "v", "pred_relevant_windows": [[1, 2, 1.0]]}
    assert read(tmp_path, twice, samples=same) == {"set_test_0": Span(1, 2)}


def test_time_r1_numbers_rows_and_repeats_the_truth(tmp_path: Path) -> None:
    def row(name: str, *target: float, duration: float = 30.0) -> dict[str, Any]:
        return {"qid": name, "pred": [1, 2], "target": list(target), "duration": duration, "output_text": SAID}

    assert read(tmp_path, row("Charades_sta_test_2", 2, 9)) == {"set_test_2": Span(1, 2)}
    for name, target, duration, message in [
        ("Charades_sta_test_2", (12, 19), 30.0, r"its target \[12.0, 19.0\] is not the truth of set_test_2"),
        ("activitynet_2", (2, 9), 99.0, "a video of 99 s, but that of set_test_2 lasts 30 s"),
        ("activitynet_4", (2, 9), 30.0, "'activitynet_4' is not among the 4 annotated queries; understood are ids such "
                                        "as 'set_test_0', their numbers and, beside a target, the number of the row"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"line 1: {message}"):
            read(tmp_path, row(name, *target, duration=duration))
    with pytest.raises(ValueError, match="'activitynet_2' is not among"):
        read(tmp_path, {"qid": "activitynet_2", "output_text": SAID})  # nothing to check the row by
    training = [GroundingSample(s.sample_id, s.video, s.query, s.windows, s.duration, "train") for s in SAMPLES]
    with pytest.raises(ValueError, match="'activitynet_2' is not among"):
        read(tmp_path, row("activitynet_2", 2, 9), samples=training)  # rows may be missing


def test_files_of_frameworks(tmp_path: Path) -> None:
    prompt = 'When does "a dog runs away" happen?'
    messages = [{"role": "user", "content": f"<video>{prompt}"}, {"role": "assistant", "content": SAID}]
    swift = {"response": SAID, "labels": None, "videos": ["/data/v.mp4"], "messages": messages}
    # The longest query that the prompt quotes.
    assert read(tmp_path, swift) == {"set_test_1": Span(1, 2)}
    assert read(tmp_path, {**swift, "videos": [{"path": "v.mp4"}]}) == {"set_test_1": Span(1, 2)}
    lmms = {"doc_id": 1, "target": "[6, 9]", "filtered_resps": [SAID], "doc_hash": "x", "input": prompt}
    assert read(tmp_path, lmms) == {"set_test_1": Span(1, 2)}
    assert read(tmp_path, {**lmms, "filtered_resps": [[SAID]]}) == {"set_test_1": Span(1, 2)}
    factory = [{"prompt": f"user: {q} ?", "predict": SAID, "label": ""} for q in ("a dog runs", "a dog runs away")]
    assert read(tmp_path, *factory) == {"set_test_0": Span(1, 2), "set_test_1": Span(1, 2)}
    omni = {"original_data": {"query": "a dog runs", "video_file": "x/v.mp4", "relevant_windows": [[0, 5]]},
            "model_output": SAID, "pred_relevant_window": [0, 1]}  # fmt: skip
    assert read(tmp_path, omni) == {"set_test_0": Span(1, 2)}
    chat = {"video_path": "/v.mp4", "query": "a dog runs", "answer": SAID, "timestamp": [[0, 0]], "iou": 0, "ans": []}
    assert read(tmp_path, chat) == {"set_test_0": Span(1, 2)}
    for rows, message in [
        ([factory[1], factory[0]], "line 2: its prompt does not ask 'a dog runs away', as set_test_1 does"),
        ([{**lmms, "target": "[7, 9]"}], r"line 1: its target \[7.0, 9.0\] is not the truth of set_test_1"),
        ([{**lmms, "doc_id": 4}], "line 1: row 4 is none of the 4 annotated queries"),
        ([{**lmms, "doc_id": -1}], "line 1: row -1 is none of"),
        ([{"predict": SAID}], "line 1: row 0 is none of the 4 annotated queries, or nothing confirms it"),
        ([{**swift, "videos": ["z.mp4"]}], "line 1: none of the 4 annotated queries asks this about 'z.mp4'"),
        ([{"response": SAID}], "line 1: nothing says which query it answers; sample_id, qid, id would"),
        (
            [{"prediction": SAID}],
            "keys 'prediction' are of no known format .*timelens: VIDEO>>>.*output_text, completion",
        ),
        ([{"response": [3]}], "line 1: none of output_text, .* is a string"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(tmp_path, *rows)


def test_what_a_record_with_a_name_may_also_hold(tmp_path: Path) -> None:
    """A prompt in other words, and how long the model took."""
    assert read(tmp_path, {"id": 1, "output": SAID, "prompt": "When is it?", "duration": 0.8}) == {
        "set_test_1": Span(1, 2)
    }


def test_keys_of_timelens_and_lmms_eval(tmp_path: Path) -> None:
    key = "v.mp4>>>a dog runs>>>[0, 5]"
    other = "w.mp4>>>a cat sleeps>>>[12, 19]"
    path = tmp_path / "p.json"
    forms: list[Any] = [
        {key: {"timestamps": [[1.0, 2.0]], "answers": "1 - 2"}, other: {"timestamps": [], "answers": ""}},
        {key: {"answers": SAID, "duration": 30}, other: {"answers": "no"}},
        {key: SAID, other: "no"},
    ]
    for form in forms:
        for text in (json.dumps(form), json.dumps(form, indent=1), "\n".join(json.dumps({k: form[k]}) for k in form)):
            path.write_text(text)
            found = read_predictions(path, SAMPLES)
            assert found.format == "timelens"
            # The truth in the key tells two queries of the same words apart.
            assert {p.sample_id: p.answer for p in found.items} == {"set_test_0": Span(1, 2), "set_test_3": None}
    for bad, message in [
        ({"v.mp4>>>a dog runs": SAID}, "is not VIDEO>>>QUERY"),
        ({"v.mp4>>>a dog runs>>>[1, 5]": SAID}, "none of the 4 annotated queries asks this about 'v.mp4'"),
        ({key: 3}, "answers must be a string"),
    ]:
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=rf"entry 'v.mp4>>>.*{message}"):
            read_predictions(path, SAMPLES)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gzip"])
def test_encodings_and_gzip(tmp_path: Path, encoding: str) -> None:
    rows = [{"video": f"{i}.mp4", "query": "ein Hund läuft\u2028", "window": [0, 5], "duration": 9} for i in (0, 1)]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    content = gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding)
    truth, said = tmp_path / f"test.jsonl{'.gz' if encoding == 'gzip' else ''}", tmp_path / "p"
    truth.write_bytes(content)
    text = json.dumps([{"id": 1, "output": SAID}])
    said.write_bytes(gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding))
    from tartvg.data import jsonl

    samples = jsonl.read([truth], ReadOptions("test")).samples
    assert [s.sample_id for s in samples] == ["test_0", "test_1"] and samples[0].query == "ein Hund läuft"
    assert [p.sample_id for p in read_predictions(said, samples).items] == ["test_1"]


# ---- lighthouse's annotations, and files about the real ones ------------------------------------------------------


def test_annotations_of_lighthouse(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    rows = [
        {"qid": 12404, "query": "q.", "duration": 9.5, "vid": "A1", "relevant_windows": [[0.5, 9.5]]},
        {"qid": "A1_1", "query": "r", "duration": 9.5, "vid": "A1", "relevant_windows": [[1, 2]]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for reader, ids, video in [
        (charades_sta, ["charades_sta_test_0", "charades_sta_test_1"], "A1.mp4"),
        (activitynet, ["activitynet_test_A1_0", "activitynet_test_A1_1"], "A1.mp4"),
        (tacos, ["tacos_test_A1_0", "tacos_test_A1_1"], "A1.avi"),
    ]:
        found = reader.read([path], ReadOptions("test")).samples
        assert [s.sample_id for s in found] == ids and {str(s.video) for s in found} == {video}
        assert [(s.query, s.windows, s.duration) for s in found] == [("q", (Span(0.5, 9.5),), 9.5),
                                                                     ("r", (Span(1, 2),), 9.5)]  # fmt: skip


@needs_data
def test_lighthouse_form_of_charades_is_the_test_set(tmp_path: Path) -> None:
    truth = [REAL / "charades_sta/charades_sta_test.txt", REAL / "charades_sta/Charades_v1_test.csv"]
    text = charades_sta.read(truth, ReadOptions("test")).samples
    path = tmp_path / "charades_test_release.jsonl"
    rows = [
        {"qid": 12404 + i, "query": f"{s.query}.", "duration": s.duration, "vid": s.video.stem,
         "relevant_windows": [list(s.target)]}
        for i, s in enumerate(text)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert charades_sta.read([path], ReadOptions("test")).samples == text
    with pytest.raises(ValueError, match="this is the test set of Charades-STA"):
        charades_sta.read([path], ReadOptions("train"))
    said = tmp_path / "hl_test_submission.jsonl"
    said.write_text("".join(
        json.dumps({"qid": r["qid"], "query": r["query"], "vid": r["vid"],
                    "pred_relevant_windows": [[*r["relevant_windows"][0], 1.0]]}) + "\n" for r in rows
    ))  # fmt: skip
    found = read_predictions(said, text)
    assert [p.sample_id for p in found.items] == [s.sample_id for s in text]
    assert all(p.answer == s.target for p, s in zip(found.items, text, strict=True))


@needs_data
def test_time_r1_files_for_its_own_benchmark_and_activitynet(tmp_path: Path) -> None:
    """As `evaluate.py` of xiaomi-research/time-r1 names them: the file of the source and the row."""
    bench = tvgbench.read([REAL / "tvgbench/tvgbench.json"], ReadOptions("test")).samples
    sources = [Path(row["source"]).stem for row in json.loads((REAL / "tvgbench/tvgbench.json").read_text())]
    captions = activitynet.read([REAL / "activitynet/test.json"], ReadOptions("test")).samples[:500]
    for samples, names in ((bench, sources), (captions, ["activitynet"] * 500)):
        rows = [
            {"qid": f"{name.replace('.', '_').replace('-', '_')}_{i}", "pred": [1, 2], "target": list(s.target),
             "duration": s.duration, "output_text": SAID}
            for i, (s, name) in enumerate(zip(samples, names, strict=True))
        ]  # fmt: skip
        found = read(tmp_path, *rows, samples=list(samples))
        assert list(found) == [s.sample_id for s in samples]
