from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tracking import answer, artifacts, group, lines, tracker, wandb_records

from tartvg.config import TrackingConfig, TrackingMode
from tartvg.launch.terminal import warn_once
from tartvg.tracking.summary import best_and_last
from tartvg.tracking.tables import ANSWER_COLUMNS, answer_rows, example_columns, example_rows, fault_names
from tartvg.tracking.tracker import MAX_ARTIFACT_NAME, Tracker, artifact_name, heeding_environment, tags_of
from tartvg.tracking.wandb_backend import scrub
from tartvg.types import Span


def test_metrics_are_flat_lines_with_one_axis(tmp_path: Path) -> None:
    with tracker(tmp_path / "new" / "grpo1") as t:
        t.log({"reward/total_mean": np.float32(1.5), "eval/planted/miou": 1}, step=0)
        t.log({"loss/total": 0.25, "progress/step": 1}, step=1)
    assert lines(tmp_path / "new" / "grpo1") == [
        {"progress/step": 0, "reward/total_mean": 1.5, "eval/planted/miou": 1.0},
        {"progress/step": 1, "loss/total": 0.25},
    ]
    assert not (tmp_path / "new" / "grpo1" / "wandb").exists()


@pytest.mark.parametrize("name", ["miou", "rewards/total", "reward/", "reward", "/x", "eval/miou", "eval//miou"])
def test_names_outside_the_vocabulary_are_refused(tmp_path: Path, name: str) -> None:
    for is_active in (True, False):
        with tracker(tmp_path, is_active=is_active) as t, pytest.raises(ValueError, match="metric"):
            t.log({name: 1.0}, step=0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_contradictory_step_is_refused(tmp_path: Path) -> None:
    with tracker(tmp_path) as t, pytest.raises(ValueError, match="progress/step"):
        t.log({"progress/step": 3}, step=2)


def test_values_that_are_not_finite_are_null_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracker(tmp_path) as t:
        t.log({"loss/kl": float("nan"), "loss/total": 1.0}, step=0)
        t.log({"loss/kl": float("inf"), "loss/total": 2.0}, step=1)
    assert [line["loss/kl"] for line in lines(tmp_path)] == [None, None]
    assert capsys.readouterr().err.count("loss/kl") == 1


def test_a_killed_and_resumed_run_ends_with_the_same_file(tmp_path: Path) -> None:
    def write(t: Tracker, steps: range) -> None:
        for step in steps:
            t.log({"loss/total": 1 / (step + 3)}, step)
            if step % 2:
                t.log({"eval/planted/miou": step / 7}, step)

    with tracker(tmp_path / "whole") as t:
        write(t, range(6))
    with tracker(tmp_path / "killed") as t:
        write(t, range(5))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"progress/step": 5, "loss/to')
    with tracker(tmp_path / "killed", resume_step=3) as t:
        assert [line["progress/step"] for line in lines(tmp_path / "killed")] == [0, 1, 1, 2]
        write(t, range(3, 6))
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_starting_anew_removes_the_old_lines(tmp_path: Path) -> None:
    for _ in range(2):
        with tracker(tmp_path) as t:
            t.log({"loss/total": 1.0}, step=0)
    assert len(lines(tmp_path)) == 1


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with tracker(tmp_path / "x", TrackingConfig(), is_active=False) as t:
        t.log({"loss/total": 1.0}, step=0)
        t.examples([group(1.0)], step=0)
        t.artifact("adapter", "adapter", tmp_path / "missing")
        t.summary({"miou": 0.5})
    assert not (tmp_path / "x").exists()


def test_examples_are_the_extremes_without_repetition() -> None:
    rows = example_rows([group(1.0, 5.0), group(3.0, -2.0, 4.0)], step=9, num=2)
    at = example_columns().index
    assert [(row[at("rank")], row[at("total")]) for row in rows] == [(1, 5.0), (2, 4.0), (4, 1.0), (5, -2.0)]
    assert rows[0][at("truth")] == "1.00 to 3.00"
    assert rows[0][at("anchors")] == "0.00 to 3.00, 1.00 to 3.00"
    assert rows[3][at("answer")] == "unreadable"
    assert all(len(row) == len(example_columns()) and row[at("step")] == 9 for row in rows)
    assert [row[at("total")] for row in example_rows([group(1.0, 5.0)], 0, num=4)] == [5.0, 1.0]


def test_completions_can_be_grouped_by_what_is_wrong_with_them() -> None:
    assert fault_names((), True) == [] and fault_names(("no_think", "order"), False) == ["no_think", "order", "cut_off"]
    answers = [answer("a", Span(1.0, 3.0)), answer("b", None), replace(answer("c", None), faults=())]
    at = ANSWER_COLUMNS.index("faults")
    assert [row[at] for row in answer_rows(answers, 5)] == ["x, y", "x, y", "none"]
    faulty = group(1.0, 5.0)
    cut = replace(faulty.rollouts[0], completion=replace(faulty.rollouts[0].completion, is_finished=False))
    rows = example_rows([replace(faulty, rollouts=(cut, faulty.rollouts[1]))], 0, 5)
    assert [row[example_columns().index("faults")] for row in rows] == ["none", "cut_off"]


def test_a_missing_artifact_is_our_mistake_not_wandbs(tmp_path: Path) -> None:
    with tracker(tmp_path) as t, pytest.raises(FileNotFoundError, match="adapter"):
        t.artifact("adapter", "adapter", tmp_path / "missing")


# --- a real offline W&B run, in a process of its own because W&B keeps global state -----------------------------------


def test_best_and_last_by_hand() -> None:
    lines = [
        {"progress/step": 0, "reward/total_mean": 1.0, "loss/total": 0.1, "loss/kl": None},
        {"progress/step": 1, "reward/total_mean": 3.0, "loss/total": -0.1, "loss/kl": 0.2},
        {"progress/step": 2, "reward/total_mean": 2.0, "loss/total": 0.0, "loss/kl": None},
    ]
    assert best_and_last(lines) == {
        "last/progress/step": 2,
        "last/reward/total_mean": 2.0,
        "last/loss/total": 0.0,
        "last/loss/kl": 0.2,
        "best/reward/total_mean": 3.0,
    }
    assert best_and_last([{"loss/total": 2.0}, {"loss/total": 1.0}, {"loss/total": 1.5}])["best/loss/total"] == 1.0
    assert best_and_last([]) == {}


def test_names_of_artifacts_and_tags() -> None:
    assert artifact_name("grpo1-rollouts") == "grpo1-rollouts"
    assert artifact_name("my adapter (old)/x") == "my-adapter-old-x"
    assert len(artifact_name("x" * 200)) == MAX_ARTIFACT_NAME
    config = {"policy": {"name": "tiny"}, "dataset": {"name": "planted"}, "anchors": {"count": 2}, "seed": 0}
    assert tags_of(config) == ["policy:tiny", "dataset:planted", "anchors:2", "seed:0"]


def test_what_must_not_leave_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    config = {"root": "/home/somebody/data", "list": ["a:/home/somebody", 3], "odd": "xhf_0123456789", "on": "true"}
    assert scrub(config) == {"root": "~/data", "list": ["a:~", 3], "odd": "x***", "on": "true"}
    assert scrub("/home/somebodyelse/x") == "/home/somebodyelse/x"


FAKE_KEY = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import io
import sys
import time
from pathlib import Path
sys.path.insert(0, {tests!r})
from tartvg.config import TrackingConfig, TrackingMode
from tartvg.monitors import Alarm
from tartvg.types import Span
from helpers.tracking import answer, group, tracker
from PIL import Image


def draw(answer):
    if answer.sample_id == "e":
        raise ValueError("a damaged video")
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(buffer, "PNG")
    return buffer.getvalue()


folder, mode = Path(sys.argv[1]), TrackingMode(sys.argv[2])
for resume_step in (0, 2):
    with tracker(folder, TrackingConfig(mode=mode, tags=["toy"]), resume_step=resume_step) as t:
        for step in range(resume_step, resume_step + 2):
            t.log({{"loss/total": 1.0 + step, "loss/kl": float("nan")}}, step)
        t.examples([group(1.0, 2.0, query="find the cat")], resume_step)
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter" / "weights.bin").write_bytes(b"weights")
        (folder / "traces.jsonl").write_text("{{}}\\n")
        t.uses("traces", "traces", folder / "traces.jsonl")
        t.artifact("grpo1-adapter", "adapter", folder / "adapter")
        answers = [answer(name, Span(1.0, 3.0) if name == "a" else None) for name in "abcde"]
        t.answers(answers[:2], "planted")
        t.strips(answers, "planted", draw)
        t.alarms([Alarm("kl_blowup", resume_step, "rollout/kl", 2.0, 0.5, "step: too far")])
        t.summary({{"eval/planted/miou": 0.625}})
    time.sleep(1.1)  # W&B names the folder of a run by the second
print("DONE")
"""


def run_script(folder: Path, mode: str, **env: str) -> subprocess.CompletedProcess[str]:
    home = folder.parent / "home-of-somebody"
    home.mkdir()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parents[2])), str(folder), mode],
        capture_output=True,
        text=True,
        env={**clean, "HOME": str(home), **env},
        stdin=subprocess.DEVNULL,
        timeout=600,
    )
    assert "DONE" in result.stdout, result.stderr
    assert [line["progress/step"] for line in lines(folder)] == [0, 1, 2, 3]
    return result


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline") / "grpo1"
    run_script(folder, "offline", WANDB_API_KEY=FAKE_KEY)
    return folder


@pytest.mark.slow
def test_an_offline_run_holds_what_was_logged(offline: Path) -> None:
    records = wandb_records(offline)
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    scalars = [row for row in rows if "loss/total" in row]
    assert scalars == [{"progress/step": s, "loss/total": 1.0 + s} for s in range(4)]
    logged = [{k: v for k, v in line.items() if v is not None} for line in lines(offline)]
    assert scalars == logged, "W&B holds what metrics.jsonl holds"
    numbers = [
        json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
        if (item.key or "/".join(item.nested_key)) == "_step"
    ]
    assert numbers == sorted(set(numbers)) and len(numbers) == len(rows), "parts of a run do not overwrite each other"
    assert sum("eval/planted/answers/path" in row for row in rows) == 2
    assert sum("rollout/examples/path" in row for row in rows) == 2
    tables = [json.loads(p.read_text()) for p in offline.glob("wandb/offline-run-*/files/media/table/rollout/*.json")]
    assert [table["data"][0][1:4] for table in tables] == [[1, "none", "find the cat"]] * 2
    tables = [json.loads(p.read_text()) for p in offline.glob("wandb/offline-run-*/files/media/table/eval/*/*.json")]
    assert [row[:3] for row in tables[0]["data"]] == [[1, "x, y", "a"], [2, "x, y", "b"]]
    strips = [{k.rpartition("/")[2]: v for k, v in row.items() if "film_strips" in k} for row in rows]
    strips = [row for row in strips if row]
    # The best two and the worst two, one of whose videos is damaged; once in each part of the run.
    assert [row["captions"] for row in strips] == [["rank 1: q", "rank 2: q", "rank 4: q"]] * 2
    assert [(row["count"], row["width"], row["height"]) for row in strips] == [(3, 40, 20)] * 2
    kept = [[p for p in offline.glob("wandb/offline-run-*/files/" + name)] for name in strips[0]["filenames"]]
    assert all(kept), "the pictures are among the run's own files"
    assert not [p for p in offline.rglob("*.png") if "media" not in p.parts], "and nothing is left beside them"


@pytest.mark.slow
def test_an_offline_run_holds_its_artifacts_and_what_it_used(offline: Path) -> None:
    own = [a for a in artifacts(wandb_records(offline)) if a.type in ("adapter", "traces")]
    assert [(a.name, a.type, a.use_after_commit) for a in own] == [
        ("traces", "traces", True),
        ("grpo1-adapter", "adapter", False),
    ] * 2
    assert [[entry.path for entry in a.manifest.contents] for a in own[:2]] == [["traces.jsonl"], ["weights.bin"]]
    assert json.loads(own[1].metadata) == {"run": "myrun", "stage": "grpo1"}
    assert own[0].digest == own[2].digest, "the same content is the same version, and the line between two runs"


@pytest.mark.slow
def test_an_offline_run_holds_alerts_and_headlines(offline: Path) -> None:
    records = wandb_records(offline)
    alerts = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    assert [(a.title, a.text, a.level) for a in alerts] == [("grpo1: kl_blowup", "step: too far", "WARN")] * 2
    assert len((offline / "alarms.jsonl").read_text().splitlines()) == 2
    summary = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert summary["last/loss/total"] == 4.0 and summary["best/loss/total"] == 1.0, "over both parts of the run"
    assert summary["eval/planted/miou"] == 0.625


@pytest.mark.slow
def test_an_offline_run_is_named_and_resumed_under_one_id(offline: Path) -> None:
    runs = [r.run for r in wandb_records(offline) if r.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {(offline / "wandb_id").read_text().strip()}
    assert (runs[0].display_name, runs[0].run_group, runs[0].job_type) == ("myrun/grpo1", "myrun", "grpo1")
    assert list(runs[0].tags) == ["toy", "policy:tiny", "seed:7"]
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update if item.key}
    assert (config["seed"], config["stage"], config["policy"]) == (7, "grpo1", {"name": "tiny"})
    axes = {
        r.metric.glob_name: r.metric.step_metric
        for r in wandb_records(offline)
        if r.WhichOneof("record_type") == "metric"
    }
    assert axes["loss/*"] == axes["eval/*"] == "progress/step"


@pytest.mark.slow
def test_no_file_holds_the_key_or_the_home_folder(offline: Path) -> None:
    files = [path for path in offline.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert FAKE_KEY.encode() not in content, path
        if path.suffix == ".wandb":
            assert b"home-of-somebody" not in content
    assert not list(offline.rglob("requirements.txt")) and not list(offline.rglob("wandb-metadata.json"))


@pytest.mark.parametrize(
    ("mode", "name", "value", "held", "said"),
    [
        ("offline", "WANDB_MODE", "disabled", "off", "W&B is off, although tracking.mode=offline"),
        ("online", "WANDB_MODE", "offline", "offline", "W&B is offline, although tracking.mode=online"),
        ("online", "WANDB_DISABLED", "true", "off", "W&B is off"),
        ("offline", "WANDB_MODE", "online", "offline", "WANDB_MODE=online is not followed, as tracking.mode=offline"),
        ("off", "WANDB_MODE", "offline", "off", "is not followed"),
        ("offline", "WANDB_MODE", "sideways", "offline", "is not followed"),
        ("offline", "WANDB_MODE", "offline", "offline", ""),
        ("offline", "WANDB_MODE", "", "offline", ""),
    ],
)
def test_the_environment_may_track_less_and_never_more(
    mode: str, name: str, value: str, held: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv(name, value)
    warn_once.cache_clear()
    settings = TrackingConfig(mode=TrackingMode(mode))
    for _ in range(2):
        assert heeding_environment(settings).mode is TrackingMode(held)
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == bool(said)


@pytest.mark.slow
def test_online_without_a_key_warns_once_and_goes_on_offline(tmp_path: Path) -> None:
    result = run_script(tmp_path / "grpo1", "online", WANDB_BASE_URL="http://127.0.0.1:9")
    # One warning per tracker: the script opens two.
    assert result.stderr.count("W&B cannot be reached and goes on offline") == 2
    assert "W&B failed" not in result.stderr
    assert list((tmp_path / "grpo1").glob("wandb/offline-run-*/*.wandb"))
