"""dataset=mix of planted and planted_long: killed and resumed, and scored for each source."""

import json

import pytest
from forking import start as start_command
from helpers.tracking import wandb_records
from interruptions import kill_when, num_lines, results, rows

PARTS = {"planted": 1, "planted_long": 2}


@pytest.fixture(scope="module")
def mixed(settings, planted_root):
    few = {"num_train": 4, "num_val": 1, "num_test": 3, "queries_per_video": 2}
    sources = [f"dataset.sources.{part}.planted.{name}={value}" for part in PARTS for name, value in few.items()]
    parts = ", ".join(f"{name}: {weight}" for name, weight in PARTS.items())
    return [*settings, "dataset=mix", f"dataset.parts={{{parts}}}", *sources]


@pytest.fixture(scope="module")
def alone(settings, planted_root):
    few = ["dataset.planted.num_train=4", "dataset.planted.num_val=1", "dataset.planted.num_test=3"]
    return {p: [*settings, f"dataset={p}", *few, f"dataset.root={planted_root}/{p}"] for p in PARTS}


@pytest.mark.slow
def test_a_killed_mix_ends_like_one_that_was_not(mixed, run_command, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    validation = ["validation.every=2", "validation.num_queries=2"]
    command = [*mixed, *validation, f"runs_dir={tmp_path}", "stage=grpo1", "trainer.checkpoint_every=2"]
    said = run_command(*command, "name=whole").stdout
    kill_when(start_command([*command, "name=cut"]), lambda: num_lines(cut / "grpo1/metrics.jsonl") >= 3)
    run_command(*command, "name=cut", is_real=True)
    assert results(cut) == results(whole)
    groups, metrics = rows(whole / "grpo1/rollouts.jsonl"), rows(whole / "grpo1/metrics.jsonl")
    assert {g["prompt"]["sample"]["source"] for g in groups} == set(PARTS)
    several = [g["prompt"]["sample"] for g in groups if len(g["prompt"]["sample"]["windows"]) > 1]
    assert not several or "queries have several windows; reward.truth=best" in said
    for line in metrics[:4]:
        own = [g for g in groups if g["step"] == line["progress/step"]]
        for part in PARTS:
            totals = [
                r["reward"]["total"] for g in own if g["prompt"]["sample"]["source"] == part for r in g["rollouts"]
            ]
            assert line.get(f"reward/{part}/total_mean") == pytest.approx(sum(totals) / len(totals) if totals else None)
            assert line.get(f"group/{part}/count", 0) * 4 == len(totals)
    measured = rows(whole / "grpo1/validation.jsonl")
    assert all(row["miou"] == pytest.approx((row["planted/miou"] + row["planted_long/miou"]) / 2) for row in measured)


@pytest.mark.slow
def test_each_source_scores_what_it_scores_alone(mixed, alone, run_command, tmp_path):
    together = [*mixed, f"runs_dir={tmp_path}", "name=mix", "evaluate.policies=[base]"]
    run_command(*together, "stage=evaluate")
    card = json.loads((tmp_path / "mix/evaluate/base/scores.json").read_text())
    said = rows(tmp_path / "mix/evaluate/base/predictions.jsonl")
    (metrics,) = rows(tmp_path / "mix/evaluate/base/metrics.jsonl")
    assert set(card["by_source"]) == set(PARTS)
    for part, settings in alone.items():
        run_command(*settings, f"runs_dir={tmp_path}", f"name={part}", "stage=evaluate", "evaluate.policies=[base]")
        folder = tmp_path / part / "evaluate/base"
        assert card["by_source"][part] == json.loads((folder / "scores.json").read_text())
        own = [p for p in said if p["sample_id"].startswith(f"{part}/")]
        assert [p["text"] for p in own] == [p["text"] for p in rows(folder / "predictions.jsonl")]
        assert metrics[f"eval/{part}/miou"] == card["by_source"][part]["miou"]["value"]
    assert card["num_queries"] == sum(part["num_queries"] for part in card["by_source"].values())
    run_command(*together, "stage=report")
    report = (tmp_path / "mix/report/report.md").read_text()
    assert "Scores by source" in report and "base, planted_long" in report


@pytest.mark.slow
def test_a_missing_part_is_refused_before_a_policy_is_loaded(mixed, run_command, tmp_path):
    parts = "dataset.parts={planted: 1, planted_long: 1, tacos: 1}"
    done = run_command(
        *mixed, parts, f"dataset.root={tmp_path}", f"runs_dir={tmp_path}/runs", "stage=grpo1", check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: dataset=mix: dataset=tacos has no train split in")
    assert not list(tmp_path.glob("planted*"))


@pytest.mark.slow
def test_wandb_holds_the_rewards_of_each_source(mixed, run_command, tmp_path):
    short = ["grpo.max_steps=1", "grpo.prompts_per_step=6", "grpo.group_size=2", "grpo.sampling.max_new_tokens=8"]
    command = [*mixed, *short, f"runs_dir={tmp_path}", "name=r", "stage=grpo1", "tracking.mode=offline"]
    run_command(*command, is_real=True)  # forked, W&B's own process would be left before it has written everything
    sent = {}
    for record in wandb_records(tmp_path / "r/grpo1"):
        if record.WhichOneof("record_type") == "history":
            sent |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
    (line,) = rows(tmp_path / "r/grpo1/metrics.jsonl")
    own = {name: value for name, value in line.items() if name.split("/")[1] in PARTS}
    assert {"reward/planted/format_mean", "reward/planted_long/total_mean", "anchors/planted_long/valid_rate"} <= set(
        own
    )
    assert own.items() <= sent.items()
