"""stage=evaluate: whoever makes the batches, and whatever interrupts them, the files say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import start_command
from interruptions import kill_when, metrics, rows

from tartvg.data.planted import encode
from tartvg.data.scene import RULES, make_scene
from tartvg.evaluation.formats import read_predictions
from tartvg.evaluation.submission import submission
from tartvg.stages.shards import batch_files, missing_of
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
    assert made[1]["pred_relevant_windows"] == made[2]["pred_relevant_windows"] == [[0.0, 0.0, 0.0]]
    path = tmp_path / "submission.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    read = read_predictions(path, samples)
    assert read.format == "moment_detr" and read.items[0].answer == Span(1, 2)
    many = [predicted(samples[0], i, Span(i, i + 1)) for i in range(15)]
    assert len(submission(samples, many)[0]["pred_relevant_windows"]) == 10


def test_every_batch_belongs_to_one_shard(tmp_path: Path) -> None:
    files = batch_files(tmp_path, 23, 5)
    assert [f.name for f in files] == ["000000.jsonl", "000005.jsonl", "000010.jsonl", "000015.jsonl", "000020.jsonl"]
    for count in (1, 2, 5, 7):
        assert sorted(n for shard in range(count) for n in missing_of(files, shard, count)) == list(range(5))
    files[3].touch()
    assert missing_of(files, 1, 2) == [1] and missing_of(files, 0, 1) == [0, 1, 2, 4]


def results(folder: Path) -> dict[str, object]:
    """All files of a finished evaluation, without wall time."""
    assert not (folder / "batches").exists() and json.loads((folder / "manifest.json").read_text())["finished"]
    said = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder / "predictions.jsonl")]
    return {"scores": (folder / "scores.json").read_bytes(), "metrics": metrics(folder / "metrics.jsonl"), "said": said}


@pytest.mark.slow
def test_shards_and_a_kill_change_nothing(small, untrained_base, run_command, tmp_path: Path) -> None:
    command = [*small, "stage=evaluate", f"policy.path={untrained_base}", "evaluate.targets=[base]",
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
    shown = run_command(*command, "stage=evaluate", "evaluate.targets=[base]", "evaluate.num_samples=0").stdout
    assert shown.count("counts as missing") == 2 and "bad.mp4" in shown
    card = json.loads((tmp_path / "r/evaluate/base/scores.json").read_text())
    assert (card["num_queries"], card["num_missing"]) == (4, 2)
    trained = run_command(*command, "stage=grpo1", "grpo.max_steps=1", "grpo.prompts_per_step=4", "grpo.group_size=2")
    assert trained.stdout.count("training goes on without") == 2
    assert len(rows(tmp_path / "r/grpo1/rollouts.jsonl")) == 2
    (entry,) = rows(tmp_path / "r/quarantine.jsonl")
    assert entry["video"].endswith("bad.mp4") and "bad.mp4" in entry["reason"]


@pytest.mark.slow
def test_the_jobs_of_the_parallel_launcher_evaluate(small, untrained_base, run_command, tmp_path: Path) -> None:
    """Its processes have a parent of their own kind, and evaluation asks after parents."""
    command = [*small, "stage=evaluate", f"policy.path={untrained_base}", "evaluate.targets=[base]",
               "grpo.sampling.max_new_tokens=8", f"runs_dir={tmp_path}", "name=p"]  # fmt: skip
    run_command("-m", "hydra/launcher=parallel", *command, "evaluate.num_samples=0,1")
    scores = list((tmp_path / "p").glob("*/evaluate/base/scores.json"))
    assert [json.loads(path.read_text())["num_queries"] for path in scores] == [8, 8]
