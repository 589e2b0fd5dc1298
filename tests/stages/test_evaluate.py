"""stage=evaluate: whoever makes the batches, and whatever interrupts them, the files say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forking import start as start_command
from helpers.settings import composed
from interruptions import kill_when, metrics, rows

from tartvg.config import SettingError
from tartvg.data.planted import encode
from tartvg.data.scene import RULES, make_scene
from tartvg.evaluation.cli import main
from tartvg.evaluation.detection import mean_average_precision
from tartvg.evaluation.formats import read_predictions
from tartvg.evaluation.score import score
from tartvg.evaluation.submission import submission
from tartvg.records import to_json
from tartvg.stages.evaluate import key_of, refuse_equal_labels
from tartvg.stages.shards import are_complete, batch_files, missing_of, num_shards
from tartvg.types import GroundingSample, Prediction, Span


def predicted(sample: GroundingSample, index: int, answer: Span | None) -> Prediction:
    return Prediction(sample.sample_id, index, sample.query, sample.video.name, sample.windows, 9.0, "", (), answer, (),
                      True)  # fmt: skip


def test_a_submission_has_every_query_and_no_empty_list(tmp_path: Path) -> None:
    samples = [
        GroundingSample(f"qvhighlights_{i}", Path(f"videos/v{i}_0_9.mp4"), f"query {i}", (Span(0, 2),), 9.0, "val")
        for i in (7, 8, 9)
    ]
    said = [Span(1, 2), Span(3, 4), None, Span(3, 4), Span(1, 2), Span(0, 5)]
    made = submission(
        samples, [predicted(samples[0], i, a) for i, a in enumerate(said)] + [predicted(samples[1], 0, None)]
    )
    assert [row["qid"] for row in made] == [7, 8, 9] and made[0]["vid"] == "v7_0_9"
    assert made[0]["pred_relevant_windows"] == [[1, 2, 1.0], [3, 4, 0.4], [0, 5, 0.2]]
    assert made[1]["pred_relevant_windows"] == made[2]["pred_relevant_windows"] == [[0.0, 0.0, 1.0]]
    path = tmp_path / "submission.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    read = read_predictions(path, samples)
    assert read.format == "moment_detr" and read.items[0].answer == Span(1, 2)
    many = [predicted(samples[0], i, Span(i, i + 1)) for i in range(15)]
    assert len(submission(samples, many)[0]["pred_relevant_windows"]) == 10


def test_predictions_and_their_submission_have_the_same_scores(tmp_path: Path) -> None:
    """The file that a server scores says what predictions.jsonl says, sampled answers and unread ones included."""
    samples = [
        GroundingSample(f"qvhighlights_{i}", Path(f"v{i}.mp4"), "q", (Span(0, 10), Span(20, 30)), 60.0, "val")
        for i in range(4)
    ]
    said: list[list[Span | None]] = [
        [Span(0, 9), Span(20, 28), Span(20, 28), Span(40, 50), None],
        [None, Span(0, 10), Span(0, 10), Span(20, 30)],  # greedy unread: no sampled answer may stand in for it
        [None],
        [],
    ]
    items = [predicted(s, i, span) for s, spans in zip(samples, said, strict=True) for i, span in enumerate(spans)]
    own, made = tmp_path / "predictions.jsonl", tmp_path / "submission.jsonl"
    own.write_text("\n".join(json.dumps(to_json(item)) for item in items))
    made.write_text("\n".join(json.dumps(row) for row in submission(samples, items)))
    first, second = (read_predictions(path, samples) for path in (own, made))
    detection = [mean_average_precision(samples, read.ranking()) for read in (first, second)]
    assert detection[0] == detection[1]
    # Query 0: hits at ranks 1 and 2. Query 1: hits at ranks 2 and 3, behind the answer that could not be read.
    assert detection[0].at[0.5] == pytest.approx((1 + 2 / 3) / 4)
    cards = [score(samples, read.items, resamples=0) for read in (first, second)]
    assert cards[0].miou.value == cards[1].miou.value == pytest.approx(0.9 / 4)


def test_every_batch_belongs_to_one_shard(tmp_path: Path) -> None:
    files = batch_files(tmp_path, 23, 5)
    assert [f.name for f in files] == ["000000.jsonl", "000005.jsonl", "000010.jsonl", "000015.jsonl", "000020.jsonl"]
    for count in (1, 2, 5, 7):
        assert sorted(n for shard in range(count) for n in missing_of(files, shard, count)) == list(range(5))
    files[3].touch()
    assert missing_of(files, 1, 2) == [1] and missing_of(files, 0, 1) == [0, 1, 2, 4]
    assert not are_complete(files)
    for file in files:
        file.touch()
    assert are_complete(files)


def test_there_are_as_many_shards_as_devices_unless_a_number_is_given() -> None:
    assert num_shards(composed()) == 1
    assert num_shards(composed("trainer=ddp", "trainer.devices=3")) == 3
    assert num_shards(composed("trainer=ddp", "trainer.devices=3", "evaluate.num_shards=5")) == 5
    with pytest.raises(SettingError, match=r"evaluate\.num_shards .* a number with evaluate\.shard"):
        composed("evaluate.shard=0")


def test_two_targets_never_share_a_place(tmp_path: Path) -> None:
    refuse_equal_labels(["base", "grpo2", f"{tmp_path}/a/sft/adapter", "base"])
    for other in ("grpo2", f"{tmp_path}/b/grpo2/adapter"):
        with pytest.raises(
            SettingError, match=rf"evaluate\.policies: {other} and .*/a/grpo2/adapter would both be .*name="
        ):
            refuse_equal_labels([other, f"{tmp_path}/a/grpo2/adapter"])


def test_the_key_of_an_evaluation_holds_the_annotations_and_the_videos(untrained_base, tmp_path: Path) -> None:
    row = {"video": "a.mp4", "query": "q", "window": [0, 1], "duration": 5}
    (tmp_path / "videos").mkdir()
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    config = composed("dataset=jsonl", f"dataset.root={tmp_path}", f"policy.path={untrained_base}")
    keys = [key_of(config, None)]
    (tmp_path / "videos/a.mp4").write_bytes(b"a video that was missing")
    keys.append(key_of(config, None))
    (tmp_path / "test.jsonl").write_text(json.dumps({**row, "window": [0, 2]}))
    keys.append(key_of(config, None))
    assert keys[2] == key_of(config, None) and keys[0] != keys[1] != keys[2] != keys[0]


def results(folder: Path) -> dict[str, object]:
    """All files of a finished evaluation, without wall time."""
    assert not (folder / "batches").exists() and json.loads((folder / "manifest.json").read_text())["finished"]
    said = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder / "predictions.jsonl")]
    return {"scores": (folder / "scores.json").read_bytes(), "metrics": metrics(folder / "metrics.jsonl"), "said": said}


@pytest.mark.slow
def test_shards_and_a_kill_change_nothing(small, untrained_base, run_command, tmp_path: Path) -> None:
    command = [*small, "stage=evaluate", f"policy.path={untrained_base}", "evaluate.policies=[base]",
               "evaluate.batch_size=1", "grpo.sampling.max_new_tokens=12", f"runs_dir={tmp_path}"]  # fmt: skip

    def folder(name: str) -> Path:
        return tmp_path / name / "evaluate" / "base"

    run_command(*command, "name=one")
    expected = results(folder("one"))
    assert len({row["sample_id"] for row in expected["said"]}) == 8
    for count in (2, 5):
        run_command(*command, f"name=shards{count}", f"evaluate.num_shards={count}")
        assert results(folder(f"shards{count}")) == expected
    batches = folder("killed") / "batches"
    process = start_command([*command, "name=killed", "evaluate.num_shards=2"])
    kill_when(process, lambda: batches.exists() and len(list(batches.glob("[0-9]*.jsonl"))) >= 2)
    assert not json.loads((folder("killed") / "manifest.json").read_text())["finished"]
    run_command(*command, "name=killed")  # and goes on with one process
    assert results(folder("killed")) == expected
    # Shards that are started one by one, as on several nodes: the last one puts the results together.
    first = run_command(*command, "name=apart", "evaluate.num_shards=2", "evaluate.shard=1")
    assert "shard 1 is done" in first.stdout and not (folder("apart") / "scores.json").exists()
    run_command(*command, "name=apart", "evaluate.num_shards=2", "evaluate.shard=0")
    assert results(folder("apart")) == expected
    refused = run_command(*command, "evaluate.num_shards=2", "evaluate.shard=2", check=False)
    assert refused.returncode == 2 and "evaluate.shard" in refused.stderr


@pytest.mark.slow
def test_what_fails_after_the_predictions_costs_no_predictions(small, untrained_base, run_command, tmp_path) -> None:
    command = [*small, "stage=evaluate", f"policy.path={untrained_base}", "evaluate.policies=[base]", "name=r",
               "grpo.sampling.max_new_tokens=8", f"runs_dir={tmp_path}", "evaluate.num_shards=2"]  # fmt: skip
    folder = tmp_path / "r/evaluate/base"
    run_command(*command, "evaluate.shard=1")
    (folder / "scores.json").mkdir()  # so that the scores cannot be written
    assert run_command(*command, "evaluate.shard=0", check=False).returncode != 0
    made = (folder / "predictions.jsonl").read_bytes()  # with the seconds that it took
    (folder / "scores.json").rmdir()
    run_command(*command)
    assert (folder / "predictions.jsonl").read_bytes() == made
    assert len(rows(folder / "predictions.jsonl")) == len(results(folder)["said"]) == 16


@pytest.mark.slow
def test_a_split_without_labels_says_that_nothing_was_scored(untrained_base, run_command, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    encode(tmp_path / "videos/a.mp4", make_scene(5, RULES["planted"]))
    row = {"qid": 7, "query": "the red circle", "vid": "a", "duration": 15}
    (tmp_path / "highlight_test_release.jsonl").write_text(json.dumps(row))
    shown = run_command(
        "stage=evaluate", "dataset=qvhighlights", f"dataset.root={tmp_path}", f"policy.path={untrained_base}",
        "evaluate.policies=[base]", "evaluate.num_samples=0", "grpo.sampling.max_new_tokens=8", "faithfulness.kinds=[]",
        "tracking.mode=off", "trainer.num_threads=1", "trainer.progress_bar=false", f"runs_dir={tmp_path}", "name=r",
    ).stdout  # fmt: skip
    assert "nothing was scored, because dataset=qvhighlights, split test, has no labels" in shown.splitlines()[-1]
    assert shown.splitlines()[-1].endswith("submission.jsonl was written")
    assert [r["qid"] for r in rows(tmp_path / "r/evaluate/base/submission.jsonl")] == [7]
    assert not (tmp_path / "r/evaluate/base/scores.json").exists()


@pytest.mark.slow
def test_qvhighlights_gets_its_own_scores(untrained_base, run_command, tmp_path: Path) -> None:
    """Average precision and the lengths of windows, beside what every data set has: as the scorer says of the file."""
    (tmp_path / "videos").mkdir()
    encode(tmp_path / "videos/a.mp4", make_scene(5, RULES["planted"]))
    row = {"qid": 7, "query": "the red circle", "vid": "a", "duration": 15, "relevant_windows": [[0, 15], [2, 6]]}
    annotations = tmp_path / "highlight_val_release.jsonl"
    annotations.write_text(json.dumps(row))
    run_command(
        "stage=evaluate", "dataset=qvhighlights", f"dataset.root={tmp_path}", f"policy.path={untrained_base}",
        "evaluate.split=val", "evaluate.policies=[base]", "evaluate.num_samples=2", "grpo.sampling.max_new_tokens=64",
        "faithfulness.kinds=[]", "tracking.mode=off", "trainer.num_threads=1", "trainer.progress_bar=false",
        f"runs_dir={tmp_path}", "name=r",
    )  # fmt: skip
    folder = tmp_path / "r/evaluate/base"
    own, again = json.loads((folder / "scores.json").read_text()), tmp_path / "again.json"
    assert main(["--dataset", "qvhighlights", "--annotations", str(annotations), "--json", str(again),
                 "--predictions", str(folder / "submission.jsonl")]) == 0  # fmt: skip
    (file,) = json.loads(again.read_text())["files"]
    assert list(own["recall"]) == ["0.1", "0.3", "0.5", "0.7"]
    assert (own["detection"], own["by_length"]) == (file["detection"], file["by_length"])
    assert list(own["by_length"]) == ["short", "middle"]
    (logged,) = rows(folder / "metrics.jsonl")
    assert logged["eval/qvhighlights/map"] == own["detection"]["average"]


@pytest.mark.slow
def test_a_video_that_cannot_be_decoded_counts_as_missing(untrained_base, run_command, tmp_path: Path) -> None:
    """Evaluation keeps it in the denominator, training goes on without it, and both name it in one list."""
    data = tmp_path / "data"
    (data / "videos").mkdir(parents=True)
    good = data / "videos" / "good.mp4"
    encode(good, make_scene(5, RULES["planted"]))
    (data / "videos" / "bad.mp4").write_bytes(good.read_bytes()[:5000])
    lines = [{"video": f"{v}.mp4", "query": f"the {q}", "window": [1, 4], "duration": 15} for v in ("good", "bad")
             for q in ("red circle", "blue square")]  # fmt: skip
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["dataset=jsonl", f"dataset.root={data}", f"policy.path={untrained_base}", f"runs_dir={tmp_path}",
               "name=r", "grpo.sampling.max_new_tokens=8", "tracking.mode=off", "trainer.num_threads=1",
               "trainer.progress_bar=false"]  # fmt: skip
    shown = run_command(*command, "stage=evaluate", "evaluate.policies=[base]", "evaluate.num_samples=0").stdout
    assert shown.count("counts as missing") == 2 and "bad.mp4" in shown
    card = json.loads((tmp_path / "r/evaluate/base/scores.json").read_text())
    assert (card["num_queries"], card["num_missing"]) == (4, 2)
    assert (card["rule"], card["is_strict"], card["is_clipped"]) == ("best", False, True)
    assert {row["video"] for row in rows(tmp_path / "r/evaluate/base/predictions.jsonl")} == {str(good)}
    trained = run_command(*command, "stage=grpo1", "grpo.max_steps=1", "grpo.prompts_per_step=4", "grpo.group_size=2")
    assert trained.stdout.count("training goes on without") == 2
    assert len(rows(tmp_path / "r/grpo1/rollouts.jsonl")) == 2
    (entry,) = rows(tmp_path / "r/quarantine.jsonl")
    assert entry["video"].endswith("bad.mp4") and "bad.mp4" in entry["reason"]
    (data / "videos" / "bad.mp4").write_bytes(good.read_bytes())
    shown = run_command(*command, "stage=evaluate", "evaluate.policies=[base]", "evaluate.num_samples=0").stdout
    assert "its settings or inputs changed" in shown
    assert json.loads((tmp_path / "r/evaluate/base/scores.json").read_text())["num_missing"] == 0


@pytest.mark.slow
def test_the_jobs_of_the_parallel_launcher_evaluate(small, untrained_base, run_command, tmp_path: Path) -> None:
    """Its processes have a parent of their own kind, and evaluation asks after parents."""
    command = [*small, "stage=evaluate", f"policy.path={untrained_base}", "evaluate.policies=[base]",
               "grpo.sampling.max_new_tokens=8", f"runs_dir={tmp_path}", "name=p"]  # fmt: skip
    run_command("-m", "hydra/launcher=parallel", *command, "evaluate.num_samples=0,1")
    scores = list((tmp_path / "p").glob("*/evaluate/base/scores.json"))
    assert [json.loads(path.read_text())["num_queries"] for path in scores] == [8, 8]
