"""Scores on real predictions equal the published ones; the stand-alone scorer on small files of every format."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tartvg.data import activitynet, charades_sta, qvhighlights, tvgbench
from tartvg.data.annotations import ReadOptions
from tartvg.evaluation.cli import main
from tartvg.evaluation.detection import LENGTHS, average_precisions, mean_average_precision, of_length
from tartvg.evaluation.formats import read_predictions
from tartvg.evaluation.score import answer_iou, score
from tartvg.records import to_json
from tartvg.response import parse_response
from tartvg.spans import iou
from tartvg.types import Fault, GroundingSample, Prediction, Span

REAL = Path(os.environ.get("TARTVG_TEST_DATA", "/nowhere"))
needs_data = pytest.mark.skipif("TARTVG_TEST_DATA" not in os.environ, reason="TARTVG_TEST_DATA is not set")
QVH = [
    ("sample_val_preds", "sample_val_preds_metrics_raw"),
    ("momentdetr_ckpt_val_preds", "momentdetr_ckpt_val_preds_metrics"),
]
TENTHS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


def qvh_samples() -> tuple[GroundingSample, ...]:
    return qvhighlights.read([REAL / "qvhighlights/highlight_val_release.jsonl"], ReadOptions("val")).samples


@needs_data
@pytest.mark.parametrize(("predictions", "metrics"), QVH)
def test_qvhighlights_equals_the_published_metrics_to_the_printed_digits(predictions: str, metrics: str) -> None:
    samples = qvh_samples()
    read = read_predictions(REAL / f"qvhighlights/{predictions}.jsonl", samples)
    published = json.loads((REAL / f"qvhighlights/{metrics}.json").read_text())
    cells = 0
    for part in ("full", *LENGTHS):
        subset = list(samples) if part == "full" else of_length(samples, part)
        ids = {s.sample_id for s in subset}
        detection = mean_average_precision(subset, read.ranking())
        card = score(subset, [p for p in read.items if p.sample_id in ids], TENTHS, resamples=0)
        found = {"average": detection.average, **{f"{t:g}": value for t, value in detection.at.items()}}
        for table, ours in (("MR-mAP", found), ("MR-R1", {f"{t:g}": e.value for t, e in card.recall.items()})):
            assert {t: f"{100 * v:.2f}" for t, v in ours.items()} == {
                t: f"{v:.2f}" for t, v in published[part][table].items()
            }
            cells += len(ours)
    assert cells == 4 * (11 + 10)


@needs_data
@pytest.mark.parametrize(
    ("predictions", "recall", "rules", "strict"),
    [
        ("sample_val_preds", (67.4839, 53.9355, 34.8387), (49.2115, 41.7469, 46.5952), (51.4839, 33.9355)),
        ("momentdetr_ckpt_val_preds", (67.1613, 53.2258, 34.0), (48.5178, 40.64, 46.5491), (50.3226, 32.6452)),
    ],
)
def test_the_rules_for_several_windows_and_the_strict_thresholds(
    predictions: str, recall: tuple[float, ...], rules: tuple[float, ...], strict: tuple[float, ...]
) -> None:
    samples = qvh_samples()
    items = read_predictions(REAL / f"qvhighlights/{predictions}.jsonl", samples).items
    cards = [score(samples, items, rule=rule, resamples=0) for rule in ("best", "first", "union")]
    assert [100 * c.miou.value for c in cards] == pytest.approx(rules, abs=5e-5)
    assert [100 * e.value for e in cards[0].recall.values()] == pytest.approx(recall, abs=5e-5)
    sharp = score(samples, items, (0.5, 0.7), strict=True, resamples=0)
    assert [100 * e.value for e in sharp.recall.values()] == pytest.approx(strict, abs=5e-5)


@needs_data
def test_iou_equals_the_logged_difficulty_of_time_rft() -> None:
    path = REAL / "tvgbench/train_2k5.json"
    samples = tvgbench.read([path], ReadOptions("train", late_windows="keep")).samples
    rows = json.loads(path.read_text())
    predicted = [Span(*row["pred"]) for row in rows]
    values = [100 * answer_iou(p, s.windows) for p, s in zip(predicted, samples, strict=True)]
    assert values == pytest.approx([row["difficulty"] for row in rows], abs=1e-9)
    items = [answer(s, p) for s, p in zip(samples, predicted, strict=True)]
    card = score(samples, items, resamples=0)
    assert 100 * card.miou.value == pytest.approx(34.365629, abs=5e-7)
    assert [100 * e.value for e in card.recall.values()] == pytest.approx([57.28, 21.24, 2.96])
    sharp = score(samples, items, strict=True, resamples=0)
    assert [100 * e.value for e in sharp.recall.values()] == pytest.approx([56.6, 16.92, 2.88])


@needs_data
def test_iou_equals_what_vtimellm_logged() -> None:
    options = ReadOptions("test", late_windows="keep")
    samples = {s.sample_id: s for s in activitynet.read([REAL / "activitynet/test.json"], options).samples}
    checked = 0
    for line in (REAL / "completions/vtimellm_example_log.txt").read_text().splitlines():
        record = json.loads(line)
        if record["task"] != "grounding":
            continue
        sample = samples[f"activitynet_test_{record['video_id']}_{record['info']['sentence_id']}"]
        match = re.search(r"from (\d+) to (\d+)", record["answer"])
        assert match is not None
        # Its answers are percent of the video.
        start, end = (int(percent) / 100 * sample.duration for percent in match.groups())
        assert round(iou(Span(start, end), sample.target), 2) == record["info"]["iou"]
        checked += 1
    assert checked == 6


@needs_data
def test_timechat_on_its_500_queries_and_on_all(tmp_path: Path) -> None:
    folder = REAL / "charades_sta"
    command = ["--dataset", "charades_sta", "--raw-windows", "--json", str(tmp_path / "out.json")]
    command += ["--annotations", str(folder / "charades_sta_test.txt"), str(folder / "Charades_v1_test.csv")]
    command += ["--predictions", str(folder / "timechat_tvg_example_pred_file.json")]
    assert main([*command, "--only-predicted"]) == 0
    card = json.loads((tmp_path / "out.json").read_text())["files"][0]["scorecard"]
    assert (card["num_queries"], card["num_unparsed"], card["num_missing"]) == (500, 280, 0)
    assert [100 * card["recall"][t]["value"] for t in ("0.3", "0.5", "0.7")] == pytest.approx([9.0, 3.4, 1.4])
    assert 100 * card["miou"]["value"] == pytest.approx(6.2998, abs=5e-5)
    assert main(command) == 0
    card = json.loads((tmp_path / "out.json").read_text())["files"][0]["scorecard"]
    assert (card["num_queries"], card["num_unparsed"], card["num_missing"]) == (3720, 280, 3220)
    assert 100 * card["miou"]["value"] == pytest.approx(6.2998 * 500 / 3720, abs=1e-4)


@needs_data
def test_the_parser_loses_and_invents_nothing_on_real_reasoning() -> None:
    rows = json.loads((REAL / "completions/rarft_hi_vtg_charades.json").read_text())
    anchors = answers = refusals = 0
    for row in rows:
        think = row["think"].replace("timestep>", "timestamp>")
        written = [(float(a), float(b)) for a, b in re.findall(r">([\d.]+) to ([\d.]+)<", think)]
        for item in row["GRPO"]:
            response = parse_response(f"{think}\n{item['a']}")
            assert [(s.start, s.end) for s in response.anchors] == written
            answers += 1
            if item["r"]:
                start, end = re.fullmatch(r"<answer>\s*([\d.]+) to ([\d.]+)\s*</answer>", item["a"]).groups()
                assert response.answer == Span(float(start), float(end))
                assert set(response.faults) <= {Fault.ANSWER_MISMATCH}
            else:
                assert response.answer is None and Fault.ANSWER_UNREADABLE in response.faults
                refusals += 1
        anchors += len(written)
    assert (len(rows), anchors, answers, refusals) == (1097, 4327, 2194, 1097)


@needs_data
def test_completions_of_time_r1_are_read_as_its_authors_read_them() -> None:
    samples = charades_sta.read([REAL / "charades_sta/charades_test.timer1.json"], ReadOptions("test")).samples
    path = REAL / "completions/time_r1_issue3_outputs.jsonl"
    items = read_predictions(path, samples).items
    logged = [json.loads(line)["pred"] for line in path.read_text().splitlines()]
    assert [[p.answer.start, p.answer.end] for p in items if p.answer] == logged
    assert [p.sample_id for p in items] == [f"charades_sta_test_{i}" for i in range(5)]
    other = [replace(samples[0], windows=samples[20].windows), *samples[1:]]
    with pytest.raises(ValueError, match=r"line 1: its target \[24.3, 30.4\] is not the truth"):
        read_predictions(path, other)


@needs_data
def test_3720_predictions_in_under_two_seconds(tmp_path: Path) -> None:
    folder = REAL / "charades_sta"
    truth = [folder / "charades_sta_test.txt", folder / "Charades_v1_test.csv"]
    samples = charades_sta.read(truth, ReadOptions("test")).samples
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(to_json(answer(s, Span(0, s.duration / 2)))) + "\n" for s in samples))
    command = [sys.executable, "-m", "tartvg.evaluation", "--dataset", "charades_sta", "--predictions", str(path)]
    before, started = os.times(), time.perf_counter()
    subprocess.run([*command, "--annotations", *map(str, truth)], check=True, capture_output=True)
    after = os.times()
    # The processor's time: the wall clock also measures what else the machine does.
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert min(spent, time.perf_counter() - started) < 2.0


# ---- small files -------------------------------------------------------------------------------------------------


def answer(sample: GroundingSample, span: Span | None, index: int = 0) -> Prediction:
    return Prediction(
        sample_id=sample.sample_id,
        sample_index=index,
        query=sample.query,
        video=sample.video.as_posix(),
        windows=sample.windows,
        duration=sample.duration,
        text="...",
        anchors=(),
        answer=span,
        faults=(),
        is_finished=True,
    )


def sample(name: str, *windows: tuple[float, float], query: str = "q") -> GroundingSample:
    return GroundingSample(name, Path("v.mp4"), query, tuple(Span(*w) for w in windows), 100.0, "val")


def test_average_precision_by_hand() -> None:
    windows = [Span(0, 10), Span(20, 30)]
    # A hit, a second hit on the same window (a miss), and at rank 3 the other window.
    ranked = [(Span(0, 10), 0.9), (Span(0, 9), 0.8), (Span(20, 30), 0.7)]
    assert average_precisions(ranked, windows)[0] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # Precision is made monotone: after a first miss, the later 2/3 counts for both steps.
    ranked = [(Span(50, 60), 0.9), (Span(0, 10), 0.8), (Span(20, 30), 0.7)]
    assert average_precisions(ranked, windows)[0] == pytest.approx(2 / 3)
    # IoU 0.9 counts up to the threshold 0.9.
    assert [v > 0 for v in average_precisions([(Span(0, 9), 1.0)], windows[:1])] == [True] * 9 + [False]
    # Scores rank, not the order of the list; but only the first ten of the list are looked at.
    assert average_precisions([(Span(50, 60), 0.1), (Span(0, 10), 0.2)], windows[:1])[0] == 1.0
    assert average_precisions([(Span(50, 60), 0.1)] * 10 + [(Span(0, 10), 0.2)], windows[:1])[0] == 0.0
    assert average_precisions([], windows) == [0.0] * 10


def test_every_query_counts_in_map() -> None:
    samples = [sample("a", (0, 10)), sample("b", (0, 10))]
    ranking = {"a": [(Span(0, 10), 1.0)]}
    assert mean_average_precision(samples, ranking).average == 0.5
    assert mean_average_precision([], ranking).average == 0.0
    with pytest.raises(ValueError, match="blind"):
        mean_average_precision([sample("c")], ranking)


def test_windows_by_length() -> None:
    samples = [sample("a", (0, 10), (20, 31)), sample("b", (0, 30)), sample("c", (0, 31))]
    parts = {name: {s.sample_id: len(s.windows) for s in of_length(samples, name)} for name in LENGTHS}
    assert parts == {"short": {"a": 1}, "middle": {"a": 1, "b": 1}, "long": {"c": 1}}


def write_own(tmp_path: Path, spans: list[Span | None]) -> tuple[Path, Path]:
    """Annotations of one query per span, window [0, 10], and our predictions; None is an unparsed answer."""
    truth, predicted = tmp_path / "test.jsonl", tmp_path / "predictions.jsonl"
    rows = [{"video": f"{i}.mp4", "query": "q", "window": [0, 10], "duration": 20} for i in range(len(spans) + 1)]
    truth.write_text("\n".join(json.dumps(row) for row in rows))
    lines = [
        to_json(answer(GroundingSample(f"test_{i}", Path(f"{i}.mp4"), "q", (), 20.0, "test"), span, index))
        for i, span in enumerate(spans)
        for index in (0, 1)
    ]
    predicted.write_text("\n".join(json.dumps({**line, "some_later_field": 1}) for line in lines))
    return truth, predicted


def test_the_command_on_our_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, predicted = write_own(tmp_path, [Span(0, 10), Span(0, 5), None])
    command = ["--dataset", "jsonl", "--annotations", str(truth), "--predictions", str(predicted)]
    assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "4 queries about 4 videos" in shown and "unparsed 1, missing 1" in shown and "IoU >= t" in shown
    assert re.search(r"mIoU +37.50 ", shown) and re.search(r"R1@0.5 +50.00 ", shown)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["files"][0]["scorecard"]["recall"]["0.7"]["value"] == 0.25
    assert len(report["annotations"][str(truth)]) == 64
    assert main([*command, "--strict"]) == 0
    assert re.search(r"R1@0.5 +25.00 ", capsys.readouterr().out)
    (tmp_path / "b").mkdir()
    _, better = write_own(tmp_path / "b", [Span(0, 10), Span(0, 10), Span(0, 10)])
    assert main([*command, "--predictions-b", str(better)]) == 0
    shown = capsys.readouterr().out
    assert "mIoU +37.50, p = 0." in shown and shown.count("(tartvg)") == 2


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, predicted = write_own(tmp_path, [Span(0, 10)])
    command = ["--dataset", "jsonl", "--annotations", str(truth), "--predictions", str(predicted)]

    def error(content: str) -> str:
        predicted.write_text(content)
        assert main(command) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1 and "Traceback" not in message
        return message

    good = json.loads(predicted.read_text().splitlines()[0])
    assert "no predictions" in error("\n")
    assert "are of no known format" in error('{"x": 1}')
    assert "line 2: not usable as JSON" in error(json.dumps(good) + "\n{")
    assert "'test_9' is not among the 2 annotated" in error(json.dumps({**good, "sample_id": "test_9"}))
    assert "line 2: 'test_0' is already answered in" in error(json.dumps(good) + "\n" + json.dumps(good))
    assert "asks 'q'" in error(json.dumps({**good, "query": "another"}))
    assert "not a record of predictions.jsonl" in error(json.dumps({**good, "answer": [1]}))
    assert "NaN is no number" in error(json.dumps({**good, "answer": [1, float("nan")]}))
    assert "not finite" in error(json.dumps(good).replace("[0, 10]", "[0, 1e999]").replace("10.0]", "1e999]"))
    truth.write_text(json.dumps({"video": "0.mp4", "query": "q", "duration": 20}))
    assert "blind" in error(json.dumps({**good, "sample_id": "test_0"}))


def test_formats_of_other_works(tmp_path: Path) -> None:
    samples = [
        GroundingSample("qvhighlights_7", Path("x_0_9.mp4"), "a dog", (Span(0, 2),), 9.0, "val"),
        GroundingSample("qvhighlights_8", Path("y_0_9.mp4"), "a cat", (Span(0, 2),), 9.0, "val"),
    ]
    path = tmp_path / "p.jsonl"
    row = {"qid": 7, "query": "A dog", "vid": "x_0_9", "pred_relevant_windows": [[3, 4, 0.1], [0, 2, 0.9]]}
    path.write_text(json.dumps({**row, "query": "a dog ."}) + '\n{"qid": 8, "pred_relevant_windows": []}')
    read = read_predictions(path, samples)
    assert read.format == "moment_detr" and [p.answer for p in read.items] == [Span(3, 4), None]
    assert read.ranking()["qvhighlights_7"] == ((Span(3, 4), 0.1), (Span(0, 2), 0.9))
    for change, message in [
        ({"vid": "z"}, "line 1: video 'z', but qvhighlights_7 is about x_0_9.mp4"),
        ({"qid": 9, "query": "a cat"}, "'9' is not among"),
        ({"qid": 7.0}, "the id must be a whole number"),
        ({"query": "a cat"}, "query 'a cat'"),
        ({"pred_relevant_windows": [[1]]}, r"a window is \[start, end, score\]"),
    ]:
        path.write_text(json.dumps({**row, "query": "a dog", **change}))
        with pytest.raises(ValueError, match=message):
            read_predictions(path, samples)

    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps({"8": {"timestamp": [[1, 2]], "query": "a cat", "vid": "y_0_9.mp4"}}))
    read = read_predictions(chat, samples)
    assert (read.format, read.items[0].sample_id, read.items[0].answer) == ("timechat", "qvhighlights_8", Span(1, 2))
    assert read.ranking() == {"qvhighlights_8": ((Span(1, 2), 1.0),)}
    chat.write_text(json.dumps({"5": {"timestamp": [], "vid": "y"}}))
    with pytest.raises(ValueError, match="'5' is not among the 2"):
        read_predictions(chat, samples)

    said = "<think><timestep>0.5 to 3</timestep></think>\n<answer>\n1.00 to 2.00\n</answer><|im_end|>"
    quoted = 'For example: "12.54 to 17.83" within the <answer> </answer> tags'
    rows = [{"qid": 7, "output_text": said}, {"sample_id": "qvhighlights_8", "completion": quoted}]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    read = read_predictions(path, samples)
    assert [p.answer for p in read.items] == [Span(1, 2), None]
    assert read.items[0].anchors == (Span(0.5, 3),) and "answer_unreadable" in read.items[1].faults


def test_only_predicted_with_two_files_that_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, first = write_own(tmp_path, [Span(0, 10), Span(0, 5), None])
    rows = first.read_text().splitlines()
    second = tmp_path / "second.jsonl"
    second.write_text("\n".join(rows[2:]))
    first.write_text("\n".join(rows[:4]))
    command = ["--dataset", "jsonl", "--annotations", str(truth), "--predictions", str(first), "--only-predicted"]
    assert main([*command, "--predictions-b", str(second)]) == 0
    shown = capsys.readouterr().out
    assert "1 queries about 1 videos" in shown and "mIoU +0.00, p = 1.0000" in shown
    second.write_text("\n".join(rows[4:]))
    assert main([*command, "--predictions-b", str(second)]) == 1
    assert capsys.readouterr().err == "error: --only-predicted: the files answer no query in common\n"


def test_options_out_of_range_are_named_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = ["--dataset", "jsonl", "--annotations", "nowhere", "--predictions", "nowhere"]
    (tmp_path / "file").touch()
    for option, value, message in [
        ("--seed", "-1", "--seed must be >= 0, got -1"),
        ("--resamples", "-5", "--resamples must be >= 0, got -5"),
        ("--json", str(tmp_path), f"--json {tmp_path}: a folder; name a file in it"),
        ("--json", f"{tmp_path}/file/a/b.json", f"--json {tmp_path}/file/a/b.json: {tmp_path}/file is no folder that"),
        ("--json", f"{tmp_path}/{'x' * 300}/b", "--json"),
    ]:
        assert main([*nowhere, option, value]) == 1
        shown = capsys.readouterr()
        assert shown.err.startswith(f"error: {message}") and shown.err.count("\n") == 1 and not shown.out
    truth, predicted = write_own(tmp_path, [Span(0, 10)])
    command = ["--dataset", "jsonl", "--annotations", str(truth), "--predictions", str(predicted)]
    assert main([*command, "--json", str(tmp_path / "new/folder/out.json")]) == 0
    assert (tmp_path / "new/folder/out.json").is_file()


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    truth, predicted = write_own(tmp_path, [Span(0, 10)])
    code = (
        "import sys; from tartvg.evaluation.cli import main; status = main(sys.argv[1:]);"
        "print(*(m for m in ('torch', 'av', 'rich', 'transformers', 'wandb') if m in sys.modules), file=sys.stderr);"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "--dataset", "jsonl", "--annotations", str(truth)]
    result = subprocess.run([*command, "--predictions", str(predicted)], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == ""
