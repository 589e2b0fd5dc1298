"""Real stages in a sweep: rollouts without learning, stages that cells share, failed and repaired cells."""

import json

import pytest
from forking import start as start_command
from helpers.settings import OPEN_FILTER
from interruptions import kill_when, num_lines, results, rows

from tartvg.launch.sweeps import jobs_below


@pytest.mark.slow
def test_rollouts_of_the_base_survive_a_kill_and_feed_the_filter(settings, run_command, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [*settings, "stage=rollouts", f"runs_dir={tmp_path}"]
    run_command(*command, "name=whole")
    process = start_command([*command, "name=cut"])
    kill_when(process, lambda: num_lines(cut / "rollouts" / "metrics.jsonl") >= 2)
    run_command(*command, "name=cut")
    assert results(cut) == results(whole)
    drawn = rows(whole / "rollouts" / "rollouts.jsonl")
    assert [row["step"] for row in drawn] == [0, 0, 1, 1, 2, 2, 3, 3]  # 4 steps of 2 prompts
    assert all(len(row["rollouts"]) == 4 for row in drawn)
    result = run_command(*settings, "stage=filter", "filter.source=rollouts", f"runs_dir={tmp_path}", "name=whole")
    assert "of 32 rollouts" in result.stdout
    assert not list(whole.glob("*/adapter")), "nothing was trained"


@pytest.mark.slow
def test_cells_share_grpo1_fail_alone_and_are_repaired(settings, run_command, tmp_path):
    """Two filters, one of which keeps nothing: one grpo1, one failed cell, and a second call that mends a third."""
    command = [
        *(s for s in settings if not s.startswith("filter.min_reward")),
        *("sweeps=filter_thresholds", "filter.min_reward=-100,100", "filter.min_ious=[]", "seed=0"),
        *("grpo.max_steps=2", "grpo.max_steps_grpo2=1", "evaluate.policies=[base,grpo2]", f"runs_dir={tmp_path}"),
        "stage.sequence=[grpo1,filter,sft,grpo2,evaluate]",
    ]
    assert OPEN_FILTER[0].startswith("filter.min_reward")
    first = run_command(*command, check=False)
    assert first.returncode == 1 and "1 finished, 1 failed" in first.stderr
    assert "the filter kept none" in first.stderr and first.stdout.count("grpo1: the same stage is finished in") == 1
    found = {json.dumps(job.overrides[0]): (folder, job) for folder, job in jobs_below(tmp_path)}
    good, bad = (found[f'"filter.min_reward={bound}"'] for bound in (-100, 100))
    assert (good[1].status, bad[1].status) == ("finished", "failed")
    assert results(good[0])["grpo1/rollouts.jsonl"] == results(bad[0])["grpo1/rollouts.jsonl"]
    manifest = json.loads((bad[0] / "grpo1" / "manifest.json").read_text())
    assert manifest["copied_from"].endswith("/grpo1") and manifest["finished"]
    before = results(good[0])
    weights = good[0] / "grpo2" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    second = run_command(*command, check=False)
    assert second.returncode == 1 and "files of it are missing or damaged" in second.stdout
    assert {k: v for k, v in results(good[0]).items() if ".old" not in k} == before
