"""stage=export: the folder says elsewhere what the run's evaluation says, and its card tells where it is from."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from helpers.settings import composed
from interruptions import rows

from tartvg.config import PolicyConfig
from tartvg.policy.loading import load_base, new_adapter, save_adapter
from tartvg.report.model_card import CardFacts, Shift, model_card, training_behind
from tartvg.stages.evaluate import prompts_to_score

FACTS = CardFacts("t", "base", "a", "bf16", [], [], "When?\n{query}", None, 9)


def test_a_card_without_a_record_says_so() -> None:
    card = model_card(FACTS)
    assert "without a record" in card and "Not evaluated" in card and "was not measured" in card
    assert "When?\n{query}" in card and card.startswith("---\nlibrary_name: transformers\n")
    measured = Shift(num_queries=3, num_tokens=70, num_equal=2, mean=1e-3, largest=0.25)
    card = model_card(CardFacts(**{**vars(FACTS), "shift": measured}))
    assert "2 of 3 are the same" in card and "1.0e-03 nats on average and 2.5e-01 at most (70 tokens)" in card


def test_a_card_names_data_command_and_commit_of_each_stage_that_led_there(tmp_path: Path) -> None:
    for stage in ("grpo1", "sft", "grpo2"):
        (tmp_path / stage / "adapter").mkdir(parents=True)
        manifest = {
            "command": f"python run.py stage={stage}",
            "git": "0f1e2d",
            "seconds": 12.4,
            "inputs": {"data": "ab"},
        }
        (tmp_path / stage / "manifest.json").write_text(json.dumps(manifest))
        (tmp_path / stage / "config.yaml").write_text("seed: 3\ndataset:\n  name: planted\n")
    (tmp_path / "grpo1/manifest.json").write_text("cut")
    behind = training_behind(tmp_path / "sft/adapter")
    assert behind == [("sft", "data set planted, seed 3; `python run.py stage=sft`; commit 0f1e2d; 12 s; data ab")]
    card = model_card(CardFacts(**{**vars(FACTS), "training": behind}))
    assert "- **sft**: data set planted, seed 3; `python run.py stage=sft`; commit 0f1e2d" in card
    assert training_behind(tmp_path / "elsewhere") == []


def test_a_run_without_an_adapter_is_refused(run_command, tmp_path: Path) -> None:
    refused = run_command("stage=export", f"runs_dir={tmp_path}", "name=r", check=False)
    assert refused.returncode == 2 and "no trained adapter to export" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1 and not (tmp_path / "r/export").exists()


def moved_adapter(folder: Path, policy: str) -> Path:
    """An adapter that changes what the embedded base says."""
    settings = composed(f"policy={policy}").policy
    assert isinstance(settings, PolicyConfig)
    model, _ = load_base(settings)
    adapted = new_adapter(model, settings.lora, seed=0)
    torch.manual_seed(3)
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(std=0.02)
    save_adapter(adapted, folder, settings.path)
    return folder


@pytest.mark.parametrize(
    "count", [pytest.param(10, marks=pytest.mark.slow), pytest.param(120, marks=pytest.mark.campaign)]
)
@pytest.mark.parametrize("policy", ["tiny", "tiny3"])
def test_plain_transformers_answers_as_evaluate_does(
    run_command, tmp_path: Path, policy: str, count: int
) -> None:  # fmt: skip
    """The folder's own script, which imports nothing of this package, on test queries in fp32; 120 are all of them."""
    adapter = moved_adapter(tmp_path / "other/sft/adapter", policy)
    common = [
        f"policy={policy}", f"runs_dir={tmp_path}", "name=r", f"dataset.root={tmp_path}/data",
        "dataset.planted.num_train=1", "dataset.planted.num_val=1", "trainer.num_threads=1",
        "trainer.progress_bar=false", "tracking.mode=off",
        "faithfulness.kinds=[]", "evaluate.num_samples=0", f"evaluate.num_queries={count}",
    ]  # fmt: skip
    run_command(*common, "stage=evaluate", f"evaluate.policies=[base,{adapter}]")
    shown = run_command(*common, "stage=export", f"init_adapter={adapter}", "export.num_queries=6").stdout
    folder = tmp_path / "r/export/model"
    assert "6 of 6 are the same to the letter" in shown.splitlines()[-1]
    again = run_command(*common, "stage=export", f"init_adapter={adapter}", "export.num_queries=6").stdout
    assert "finished before, nothing changed" in again

    script = (folder / "answer.py").read_text()
    assert "tartvg" not in script
    namespace = runpy.run_path(str(folder / "answer.py"), run_name="elsewhere")
    model, tokenizer = namespace["load"]()
    expected = {row["sample_id"]: row["text"] for row in rows(tmp_path / "r/evaluate/sft/predictions.jsonl")}
    base = {row["sample_id"]: row["text"] for row in rows(tmp_path / "r/evaluate/base/predictions.jsonl")}
    samples = [prompt.sample for prompt in prompts_to_score(composed(*common))]
    assert len(samples) == len(expected) == count
    said = {s.sample_id: namespace["answer"](model, tokenizer, s.video, s.query) for s in samples}
    assert said == expected
    assert said != base, "the adapter is in the weights"

    card = (folder / "README.md").read_text()
    scores = json.loads((tmp_path / "r/evaluate/sft/scores.json").read_text())
    miou = scores["miou"]
    shown_miou = f"{100 * miou['value']:.1f} [{100 * miou['low']:.1f}, {100 * miou['high']:.1f}]"
    assert re.search(rf"\| sft \| planted, test \| {count} \| {re.escape(shown_miou)} \|", card)
    assert re.search(rf"\| base \| planted, test \| {count} \|", card) and "stage=evaluate" in card
    assert "exactly two time ranges in seconds" in card and "6 of 6 are the same" in card
