"""The pipeline on an untrained base: whole, resumable, idempotent. Real processes, real kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forking import start as start_command
from helpers.settings import composed, watched
from interruptions import kill_when, num_lines, results, rows

TRAINED = ("grpo1", "filter", "sft", "grpo2", "evaluate/base", "evaluate/grpo1", "evaluate/sft", "evaluate/grpo2")


@pytest.mark.slow
def test_a_killed_grpo_stage_ends_like_one_that_was_not(settings, run_command, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [*settings, "stage=grpo1", "trainer.checkpoint_every=2"]
    run_command(*command, f"runs_dir={tmp_path}", "name=whole")
    process = start_command([*command, f"runs_dir={tmp_path}", "name=cut"])
    kill_when(process, lambda: num_lines(cut / "grpo1" / "metrics.jsonl") >= 3)
    assert not json.loads((cut / "grpo1" / "manifest.json").read_text())["finished"]
    # An interpreter of its own, whose hashes differ from those of the killed process.
    run_command(*command, f"runs_dir={tmp_path}", "name=cut", is_real=True)
    assert results(cut) == results(whole)
    assert len(rows(cut / "grpo1" / "rollouts.jsonl")) == 4 * 2
    before = (cut / "grpo1" / "manifest.json").stat().st_mtime_ns
    again = run_command(*command, f"runs_dir={tmp_path}", "name=cut")
    assert "finished before" in again.stdout
    assert (cut / "grpo1" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_pipeline_killed_in_every_stage_ends_like_one_that_was_not(settings, run_command, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [*watched(settings), f"runs_dir={tmp_path}", "sft.epochs=1"]
    run_command(*command, "name=whole")
    moments = {
        "grpo1": lambda: num_lines(cut / "grpo1/metrics.jsonl") >= 2,
        "filter": lambda: (cut / "filter/manifest.json").exists(),
        "sft": lambda: num_lines(cut / "sft/metrics.jsonl") >= 1,
        "grpo2": lambda: (cut / "grpo2/checkpoints").exists(),
        "evaluate": lambda: (cut / "evaluate/sft/batches").exists(),
    }
    for moment in moments.values():
        kill_when(start_command([*command, "name=cut"]), moment)
    run_command(*command, "name=cut")
    expected = results(whole)
    assert set(expected) >= {f"{stage}/rollouts.jsonl" for stage in ("grpo1", "grpo2")}
    assert results(cut) == expected
    assert (cut / "report.html").is_file()
    for stage in TRAINED:
        assert json.loads((cut / stage / "manifest.json").read_text())["finished"]


@pytest.mark.campaign
@pytest.mark.slow
def test_random_kills_of_every_kind_leave_no_trace(tmp_path):
    """The campaign of tests/interruptions.py, one kill of each kind."""
    script = Path(__file__).parents[1] / "interruptions.py"
    result = subprocess.run(
        [sys.executable, script, "--kills", "6", "--folder", tmp_path], capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 of 6 equal" in result.stdout


@pytest.mark.slow
def test_the_adapter_of_grpo2_is_a_plain_peft_adapter(settings, untrained_base, run_command, tmp_path):
    """Loaded by PEFT alone on the untouched base, it says what `stage=evaluate` recorded."""
    run_command(*settings, f"runs_dir={tmp_path}", "name=r", "stage.sequence=[grpo1,filter,sft,grpo2,evaluate]",
                "grpo.lr=3e-3")  # fmt: skip
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    from tartvg.policy.policy import Policy
    from tartvg.policy.sampling import greedy
    from tartvg.prompts import build_prompt
    from tartvg.records import prediction_from_json

    config = composed(*settings, f"runs_dir={tmp_path}", "name=r")
    policy = Policy(config.policy)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(untrained_base)
    plain = PeftModel.from_pretrained(base, tmp_path / "r/grpo2/adapter").eval()
    policy.model = plain
    policy._core = [plain.get_base_model()]
    from tartvg.data.datasets import load_samples

    prompts = [build_prompt(s, config.anchors) for s in load_samples(config.dataset, "test")]
    said = {
        p.sample.sample_id: policy.sample([policy.prepare(p)], 1, greedy(config.grpo.sampling), [0])[0][0].text
        for p in prompts
    }
    recorded = [prediction_from_json(row) for row in rows(tmp_path / "r/evaluate/grpo2/predictions.jsonl")]
    assert {p.sample_id: p.text for p in recorded if p.sample_index == 0} == said
    base_rows = map(prediction_from_json, rows(tmp_path / "r/evaluate/base/predictions.jsonl"))
    without = {p.sample_id: p.text for p in base_rows if p.sample_index == 0}
    assert without != said


# The one test that starts run.py among the quick ones.
@pytest.mark.slow
@pytest.mark.xdist_group("forked")
def test_a_training_with_changed_settings_is_refused_until_the_old_results_may_be_moved(
    settings, run_command, tmp_path
):
    command = [*settings, "stage=grpo1", "grpo.max_steps=1", f"runs_dir={tmp_path}", "name=r"]
    run_command(*command)
    old = (tmp_path / "r/grpo1/rollouts.jsonl").read_text()
    refused = run_command(*command, "reward.beta=1", check=False)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    for words in ("reward.beta 5.0 -> 1.0.", "overwrite=true", str(tmp_path / "r/grpo1")):
        assert words in refused.stderr
    assert [path.name for path in (tmp_path / "r").iterdir() if path.is_dir()] == ["grpo1"]
    result = run_command(*command, "reward.beta=1", "overwrite=true")
    assert "reward.beta 5.0 -> 1.0; the old results are in grpo1.old1" in result.stdout
    assert (tmp_path / "r/grpo1.old1/rollouts.jsonl").read_text() == old
    assert len(rows(tmp_path / "r/grpo1/rollouts.jsonl")) == 2


@pytest.mark.slow
def test_a_stage_says_what_it_lacks(settings, run_command, tmp_path):
    for stage, lack in (("filter", "grpo1"), ("sft", "filter"), ("grpo2", "sft"), ("evaluate", "grpo2")):
        result = run_command(*settings, f"stage={stage}", f"runs_dir={tmp_path}", "name=empty", check=False)
        assert result.returncode == 2, result.stderr
        assert lack in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_ground_starts_no_decoders_beyond_the_one_that_it_uses(settings, planted_root, prompts, tmp_path, capsys):
    from tartvg.data.clips import DECODERS
    from tartvg.stages.ground import run_ground

    DECODERS.stop()
    run_ground(composed(*settings, "stage=ground", f"video={prompts[0].sample.video}", "query=the red circle",
                        "trainer.num_workers=3", f"runs_dir={tmp_path}"))  # fmt: skip
    assert "answer:" in capsys.readouterr().out
    assert len(DECODERS._idle) == 1


@pytest.mark.slow
def test_ground_answers_on_any_video(settings, run_command, planted_root, tmp_path):
    run_command(*settings, "stage=grpo1", "grpo.max_steps=1", f"runs_dir={tmp_path}", "name=r")
    video = next(planted_root.glob("planted-*/test_*.mp4"))
    result = run_command(*settings, "stage=ground", f"video={video}", "query='the red, \"circle\"'",
                         f"runs_dir={tmp_path}", "name=r")  # fmt: skip
    assert "answer:" in result.stdout
    assert list((tmp_path / "r/ground").glob("*.png"))
    missing = run_command(
        *settings, "stage=ground", "video=nowhere.mp4", "query=x", f"runs_dir={tmp_path}", check=False
    )
    assert missing.returncode == 2 and "nowhere.mp4" in missing.stderr
